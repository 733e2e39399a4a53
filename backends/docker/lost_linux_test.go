package docker

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/docker/program"
	"github.com/kindos/kmo/backends/process/stage"
)

// orphan kills what an engine watches a program by, and then the program, of whose end nobody can tell the engine any more.
func orphan(t *testing.T, pid int) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	var state string
	var monitor int
	if _, err := fmt.Sscan(string(text[strings.LastIndexByte(string(text), ')')+1:]), &state, &monitor); err != nil || monitor < 2 {
		t.Fatalf("the parent of process %d is %d; %v", pid, monitor, err)
	}
	for _, one := range []int{monitor, pid} {
		before, err := stage.ReadStat(one)
		if err != nil {
			continue
		}
		if err := unix.Kill(one, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) { // containerd ends what has lost its monitor
			t.Fatal(err)
		}
		for deadline := time.Now().Add(time.Minute); program.Lives(one, before.Began); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("process %d does not end", one)
			}
		}
	}
}

// unreaped leaves what has lost its parent to this process, which does not wait for it: when it ends it is a zombie.
func unreaped(t *testing.T) {
	t.Helper()
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) }) // never fails
}

// A program that has ended is not believed to run, whatever the engine says, once it had the time to learn of it; it is started again as any other.
func TestEngineLosesProgram(t *testing.T) {
	image := content(t)
	each(t, func(t *testing.T, d *daemon) {
		state := t.TempDir()
		b := open(t, d.name, state)
		w := unit("relay", image, "say hello", "wait")
		w.Run.Ports = []backends.Port{{Name: "http"}}
		if err := b.Apply(t.Context(), w); err != nil {
			t.Fatal(err)
		}
		for restarts, away := range []bool{false, true, true} { // whether the backend is there when it happens
			before := until(t, b, "running", func(s backends.Status) bool { return running(s) && s.Restarts == restarts })
			if away {
				if err := b.Close(); err != nil {
					t.Fatal(err)
				}
			}
			orphan(t, before.PID)
			if away {
				b = open(t, d.name, state)
			}
			list, err := b.Observe(t.Context())
			if err != nil || len(list) != 1 || list[0].Restarts == restarts && (list[0].PID != 0 || list[0].Usage.Memory != 0) {
				t.Errorf("after its end it is %+v; %v", list, err)
			}
			unreaped(t) // from the next on
			after := until(t, b, "running again", func(s backends.Status) bool { return running(s) && s.Restarts == restarts+1 })
			if want := "does not know"; d.name == Podman && (after.ExitCode != 0 || after.OOM || !strings.Contains(after.Detail, want)) {
				t.Errorf("it is %+v, want exit code 0 and a detail with %q", after, want)
			}
			if after.Addresses[0] != before.Addresses[0] {
				t.Errorf("it is reached at %v, was at %v", after.Addresses, before.Addresses)
			}
		}
		once(t, d, b)
		over(t, d, b, state)
	})
}

// What the engine takes for running, and is not, is removed and replaced, whether or not it is known that it has ended.
func TestLostProgramGoes(t *testing.T) {
	image := content(t)
	each(t, func(t *testing.T, d *daemon) {
		state := t.TempDir()
		b := open(t, d.name, state)
		b.options.Backoff = func(int) time.Duration { return time.Hour }
		w := unit("relay", image, "wait")
		w.Hooks.Exit = [][]string{{"/app", "say bye"}}
		for name, act := range map[string]func() error{
			"remove": func() error { return b.Remove(t.Context(), w.Name) },
			"apply again": func() error {
				err := b.Apply(t.Context(), w)
				if s := until(t, b, "running", running); s.Restarts != 1 {
					t.Errorf("applied again it is %+v, want one restart", s)
				}
				return errors.Join(err, b.Remove(t.Context(), w.Name))
			},
			"remove without a record": func() error {
				e := b.entry(w.Name)
				e.mu.Lock()
				e.record.Held, e.program, e.running = nil, nil, true
				e.mu.Unlock()
				return b.Remove(t.Context(), w.Name)
			},
		} {
			if err := b.Apply(t.Context(), w); err != nil {
				t.Fatal(err)
			}
			orphan(t, until(t, b, "running", running).PID)
			if err := act(); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if left := leaks(t, d, state); len(left) > 0 {
				t.Errorf("%s: left behind: %q", name, left)
			}
		}
		over(t, d, b, state)
	})
}

// A hook of whose end nobody knows has not ended badly, for all that is known: nobody is blamed.
func TestEngineLosesHook(t *testing.T) {
	image := content(t)
	state := t.TempDir()
	d := up(t, Podman)
	b := open(t, d.name, state)
	w := unit("relay", image, "wait")
	w.Hooks.PreInit = [][]string{{"/app", "wait"}}
	b.step = func(step string) {
		if step != "held" {
			return
		}
		c, err := b.inspect(t.Context(), b.plan.Container(w.Name)+"-hook")
		if err != nil || c == nil || !c.running {
			t.Fatalf("its hook is %+v; %v", c, err)
		}
		orphan(t, c.pid)
	}
	plain(t, "apply", b.Apply(t.Context(), w))
	if left := leaks(t, d, state); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	over(t, d, b, state)
}

// A workload whose container is replaced stays what it is, wherever its start fails, until one does not.
func TestLostProgramFailsToStart(t *testing.T) {
	image := content(t)
	d := up(t, Podman)
	for at, fail := range map[string]func(b *Backend, w backends.Workload) error{
		"hook": func(b *Backend, w backends.Workload) error {
			return b.discard(t.Context(), b.plan.Container(w.Name)+"-hook")
		},
		"create": func(*Backend, backends.Workload) error { return d.kill(unix.SIGKILL) },
		"start":  func(*Backend, backends.Workload) error { return d.kill(unix.SIGKILL) },
	} {
		t.Run(at, func(t *testing.T) {
			state, failed := t.TempDir(), make(chan error, 1)
			b := open(t, d.name, state)
			b.options.Backoff = func(int) time.Duration { return 2 * time.Second }
			w := unit("relay", image, "cat /run/secrets/token", "wait")
			w.Hooks.PreInit = [][]string{{"/app", "say first"}}
			w.Files = []backends.File{{To: "/run/secrets/token", Mode: 0o400, Content: []byte("canary"), Secret: true}}
			var armed atomic.Bool
			b.step = func(step string) {
				if step == at && armed.CompareAndSwap(true, false) {
					failed <- fail(b, w)
				}
			}
			if err := b.Apply(t.Context(), w); err != nil {
				t.Fatal(err)
			}
			before := until(t, b, "running", running)
			armed.Store(true)
			orphan(t, before.PID)
			if err := errors.Join(<-failed, d.start()); err != nil {
				t.Fatal(err)
			}
			for range 10 {
				if err := b.look(t.Context()); err != nil {
					t.Error(err)
				}
				time.Sleep(100 * time.Millisecond)
			}
			until(t, b, "running again", func(s backends.Status) bool { return running(s) && s.Restarts == 1 })
			once(t, d, b)
			over(t, d, b, state)
		})
	}
}
