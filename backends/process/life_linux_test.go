package process

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kindos/kmo/backends"
)

type netListener struct{}

func (*netListener) abstract(name string) (net.Listener, error) { return net.Listen("unix", "@"+name) }

// other runs a keeper in a process of its own, and returns when that has applied the workload or is dead.
func other(t *testing.T, state, step, unit string, steps ...string) (kill func()) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", append([]string{keeperArg, state, step, unit}, steps...)...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err == nil && line != "applied <nil>\n" {
		t.Errorf("the other keeper says %q", line)
	}
	if step != "" && err == nil {
		t.Errorf("the other keeper was not killed at step %q", step)
	}
	kill = func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	t.Cleanup(kill)
	if step != "" {
		kill()
	}
	return kill
}

// U-46: whatever the step of the start at which the keeper is killed, the next one has the program once, recorded, or not at all.
func TestKilledAtEachStep(t *testing.T) {
	for step, recorded := range map[string]bool{"clone": false, "cloned": false, "recorded": true, "ordered": true, "started": true} {
		t.Run("U-46 killed at "+step, func(t *testing.T) {
			state, mark := t.TempDir(), "mark-"+step
			other(t, state, step, "fallen", "id", "wait "+mark)
			until(t, "the unrecorded stage's end", func() (string, bool) { return "", recorded || len(stages()) == 0 })
			if !recorded {
				if pids := processes(mark); len(pids) > 0 {
					t.Fatalf("unrecorded processes %v", pids)
				}
			}
			k := start(t, state)
			defer sweep(t, k)
			name := workload("fallen").Name
			if !recorded {
				if s := status(t, k, name); s.Name != "" {
					t.Errorf("a workload that was never recorded is there: %+v", s)
				}
				if names := k.groups.Names(); len(names) > 0 {
					t.Errorf("its cgroups are still there: %v", names)
				}
				return
			}
			until(t, "running once", func() (string, bool) {
				s := status(t, k, name)
				return s.Detail, s.State == backends.Running && len(processes(mark)) == 1
			})
			apply(t, k, workload("fallen", "id", "wait "+mark))
			if pids := processes(mark); len(pids) != 1 {
				t.Errorf("processes %v, want one", pids)
			}
		})
	}
}

func TestOutlivesItsKeeper(t *testing.T) {
	state := t.TempDir()
	kill := other(t, state, "", "lasting", "tick")
	kill()
	k := start(t, state)
	defer sweep(t, k)
	name := workload("lasting").Name
	s := status(t, k, name)
	if s.State != backends.Running || s.Restarts != 0 || s.PID == 0 || s.Started.IsZero() {
		t.Fatalf("after its keeper was killed it is %+v", s)
	}
	// Its output has no reader that could die: the nomad lesson of the closed stderr.
	before := len(logOf(k, name))
	until(t, "more log", func() (string, bool) { return "", len(logOf(k, name)) > before })
	apply(t, k, workload("lasting", "tick"))
	if after := status(t, k, name); after.PID != s.PID {
		t.Errorf("applying it again changed its process from %d to %d", s.PID, after.PID)
	}
	// How a program ends that is not our child is known from the pidfd, or said not to be.
	if err := syscall.Kill(s.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	until(t, "a new program", func() (string, bool) {
		after := status(t, k, name)
		return after.Detail, after.State == backends.Running && after.Restarts == 1 && after.PID != s.PID
	})
	if s := status(t, k, name); s.ExitCode != 137 && (s.ExitCode != 0 || s.Detail != unknownEnd) {
		t.Errorf("exit code %d, %q; want 137, or 0 and that it is not known", s.ExitCode, s.Detail)
	}
	e := k.entry(name)
	e.mu.Lock()
	e.record.Ended = &end{} // as a kernel before 6.15 has it
	e.mu.Unlock()
	if s := status(t, k, name); s.State != backends.Running || s.Detail != unknownEnd {
		t.Errorf("state %s, detail %q; want that the last end is not known", s.State, s.Detail)
	}
}

func TestOneKeeperAFolder(t *testing.T) {
	k := fresh(t)
	if second, err := Open(options(k.options.State)); err == nil {
		t.Error("two keepers have one folder", second.Close())
	}
}

func TestStateOfOthers(t *testing.T) {
	for name, change := range map[string]func(string) error{
		"written by all":  func(dir string) error { return os.Chmod(dir, 0o777) },
		"owned by others": func(dir string) error { return os.Chown(dir, 65534, 65534) },
	} {
		dir := t.TempDir()
		if err := change(dir); err != nil {
			t.Fatal(err)
		}
		if k, err := Open(options(dir)); err == nil {
			t.Errorf("a state folder %s is taken, %v", name, k.Close())
		}
	}
}

func TestStrangersGetNoSignal(t *testing.T) {
	stranger := exec.Command(probe(), "wait")
	if err := stranger.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = stranger.Process.Kill()
		_ = stranger.Wait()
	}()
	began, err := startTime(stranger.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	boot, err := bootID()
	if err != nil {
		t.Fatal(err)
	}
	for name, id := range map[string]identity{
		"P stale pid, another start time":  {boot, stranger.Process.Pid, began - 1},
		"P stale record of another boot":   {"6c6f6e67-2061-676f-0000-000000000000", stranger.Process.Pid, began},
		"P right process, another cgroup":  {boot, stranger.Process.Pid, began},
		"P a process number that is not":   {boot, 1 << 22, 1},
		"P a record that names no process": {},
	} {
		t.Run(name, func(t *testing.T) {
			state := t.TempDir()
			w := workload("stale", "wait")
			dir := filepath.Join(state, "work", w.Name)
			if err := os.MkdirAll(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			r := record{Workload: w, Process: id, Started: time.Now()}
			if err := r.save(dir); err != nil {
				t.Fatal(err)
			}
			k := start(t, state)
			until(t, "running anew", func() (string, bool) {
				s := status(t, k, w.Name)
				return s.Detail, s.State == backends.Running && s.PID != stranger.Process.Pid && s.Restarts == 1
			})
			sweep(t, k)
			if now, err := startTime(stranger.Process.Pid); err != nil || now != began {
				t.Errorf("the stranger is gone: %v", err)
			}
		})
	}
}

func TestTornRecordBlocksNothing(t *testing.T) {
	for name, text := range map[string]string{
		"empty": "", "half": `{"workload":{"name":"lasting-0000`, "of another": `{"workload":{"name":"x-1"}}`,
		"ports missing": `{"workload":{"name":"lasting-00000001","run":{"ports":[{"name":"a"}]}}}`,
	} {
		t.Run(name, func(t *testing.T) {
			state, mark := t.TempDir(), "torn-"+strings.ReplaceAll(name, " ", "-")
			other(t, state, "", "lasting", "wait "+mark)()
			if err := os.WriteFile(filepath.Join(state, "work", workload("lasting").Name, recordFile), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			k := start(t, state)
			defer sweep(t, k)
			if s := status(t, k, workload("lasting").Name); s.Name != "" {
				t.Errorf("it is there: %+v", s)
			}
			until(t, "its program's end", func() (string, bool) { return "", len(processes(mark)) == 0 })
			apply(t, k, workload("lasting", "wait "+mark))
		})
	}
}

func TestBounds(t *testing.T) {
	t.Run("memory", func(t *testing.T) {
		k := fresh(t)
		w := workload("hungry", "eat")
		w.Resources.Memory = 32 << 20
		apply(t, k, w)
		until(t, "an end for want of memory", func() (string, bool) {
			s := status(t, k, w.Name)
			return s.Detail, s.OOM && s.ExitCode == 137 && s.Restarts > 0
		})
	})
	t.Run("a child's want of memory is not its parent's end", func(t *testing.T) {
		k := fresh(t)
		w := workload("feeding", "feed", "exit xxx")
		w.Resources.Memory = 32 << 20
		apply(t, k, w)
		if got := said(t, k, w.Name, "feed"); got != "signal: killed" {
			t.Errorf("the child says %q", got)
		}
		until(t, "its end", func() (string, bool) {
			s := status(t, k, w.Name)
			return s.Detail, s.ExitCode == 3
		})
		if s := status(t, k, w.Name); s.OOM || strings.Contains(s.Detail, "memory") {
			t.Errorf("it is %+v, want no want of memory", s)
		}
	})
	t.Run("less memory than a stage needs", func(t *testing.T) {
		k := fresh(t)
		w := workload("small", "id", "wait")
		w.Resources.Memory = 4 << 20
		apply(t, k, w)
		said(t, k, w.Name, "id")
	})
	t.Run("fork bomb", func(t *testing.T) {
		k := fresh(t)
		w := workload("bomber", "bomb", "wait")
		w.Resources.PIDs = 40
		apply(t, k, w)
		if got := said(t, k, w.Name, "bomb"); got != "ok stopped" {
			t.Errorf("the bomb says %q", got)
		}
		if s := status(t, k, w.Name); s.Usage.PIDs > 40 {
			t.Errorf("%d processes, want 40 at most", s.Usage.PIDs)
		}
	})
	t.Run("grace ends deaf programs", func(t *testing.T) {
		k := fresh(t)
		w := workload("deaf", "deaf", "child", "wait deaf-mark")
		w.Run.Grace = 50 * time.Millisecond
		apply(t, k, w)
		said(t, k, w.Name, "child")
		if err := k.Remove(t.Context(), w.Name); err != nil {
			t.Fatal(err)
		}
		if pids := processes("deaf-mark"); len(pids) > 0 {
			t.Errorf("processes %v are left", pids)
		}
	})
	t.Run("log", func(t *testing.T) {
		k := fresh(t)
		w := workload("loud", "flood")
		w.Resources.CPU = 50
		apply(t, k, w)
		until(t, "an older part", func() (string, bool) {
			found, err := os.Stat(filepath.Join(k.options.State, "work", w.Name, olderFile))
			return "", err == nil && found.Size() == testLog
		})
	})
}

// A cgroup that cannot be removed is shown, and keeps nothing else from being kept.
func TestStuckCgroup(t *testing.T) {
	state := t.TempDir()
	k, err := Open(options(state))
	if err != nil {
		t.Fatal(err)
	}
	if !k.groups.Has("memory") {
		t.Skip("no memory cgroup", k.Close())
	}
	name := workload("stuck").Name
	if err := k.groups.Make(name, backends.Resources{}); err != nil {
		t.Fatal(err)
	}
	inner := filepath.Join(filepath.Dir(k.groups.Joins(name)[0]), "inner")
	if err := errors.Join(os.Mkdir(inner, 0o755), syscall.Mount("tmpfs", inner, "tmpfs", 0, "")); err != nil { // what is mounted on stays
		t.Fatal(err)
	}
	defer syscall.Unmount(inner, 0)
	apply(t, k, workload("well", "wait"))
	if err := k.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := Open(options(state))
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if s := status(t, again, name); s.State != backends.Damaged || !strings.Contains(s.Detail, "cannot be removed") {
		t.Errorf("the stuck one is %+v, want it damaged", s)
	}
	if s := status(t, again, workload("well").Name); s.State != backends.Running || s.Restarts != 0 {
		t.Errorf("the other is %+v, want it running", s)
	}
	if err := again.Remove(t.Context(), name); err == nil {
		t.Error("it was removed")
	}
	if err := syscall.Unmount(inner, 0); err != nil {
		t.Fatal(err)
	}
	sweep(t, again)
}

func TestAnotherContentReplaces(t *testing.T) {
	k := fresh(t)
	w := workload("moved", "wait")
	w.Format, w.Image.Content = backends.OCI, oci(t)
	apply(t, k, w)
	first := status(t, k, w.Name)
	t.Run("T56 the same base changes nothing", func(t *testing.T) {
		apply(t, k, w)
		if s := status(t, k, w.Name); s.PID != first.PID {
			t.Errorf("process %d, was %d", s.PID, first.PID)
		}
	})
	t.Run("T56 a repaired base starts it again", func(t *testing.T) {
		w.Image.Content = oci(t)
		apply(t, k, w)
		if s := status(t, k, w.Name); s.PID == first.PID || s.State != backends.Running {
			t.Errorf("%+v, was process %d", s, first.PID)
		}
	})
}

// The keeper is killed while it removes: the next one finishes.
func TestRemovalIsFinished(t *testing.T) {
	state := t.TempDir()
	other(t, state, "", "leaving", "wait leaving-mark")()
	dir := filepath.Join(state, "work", workload("leaving").Name)
	r, err := loadRecord(dir)
	if err != nil {
		t.Fatal(err)
	}
	r.Removing = true
	if err := r.save(dir); err != nil {
		t.Fatal(err)
	}
	k := start(t, state)
	until(t, "gone", func() (string, bool) {
		s := status(t, k, r.Workload.Name)
		return s.Detail, s.Name == "" && len(processes("leaving-mark")) == 0
	})
	sweep(t, k)
}

func TestFollow(t *testing.T) {
	k := fresh(t)
	w := workload("ticking", "tick")
	apply(t, k, w)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r, err := k.Logs(ctx, w.Name, backends.LogOptions{Follow: true, Tail: 1})
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(r)
	for range 100 {
		if !lines.Scan() || !strings.HasPrefix(lines.Text(), "tick ") {
			t.Fatalf("line %q, %v", lines.Text(), lines.Err())
		}
	}
	cancel()
	if _, err := io.Copy(io.Discard, r); err != nil {
		t.Errorf("at the end of following: %v", err)
	}
}

func TestRecordForm(t *testing.T) {
	w := workload("formed")
	w.Run.Ports = []backends.Port{{Name: "a"}}
	r := record{Workload: w, Ports: []int{20001}, Process: identity{"b", 2, 3}, Ended: &end{Known: true, Code: 3}}
	dir := filepath.Join(t.TempDir(), w.Name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := r.save(dir); err != nil {
		t.Fatal(err)
	}
	got, err := loadRecord(dir)
	if err != nil {
		t.Fatal(err)
	}
	one, _ := json.Marshal(r)
	two, _ := json.Marshal(got)
	if string(one) != string(two) {
		t.Errorf("got %s, want %s", two, one)
	}
	if p := got.resolved(false).Run.Ports[0]; p.Port != 20001 || p.Host != 20001 || got.Workload.Run.Ports[0].Port != 0 {
		t.Errorf("resolved port %+v", p)
	}
}
