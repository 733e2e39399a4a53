package docker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/client"
	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/registry/merkle"
)

// each runs a test on both engines.
func each(t *testing.T, test func(t *testing.T, d *daemon)) {
	for _, name := range []string{Docker, Podman} {
		t.Run(name, func(t *testing.T) { test(t, up(t, name)) })
	}
}

// unit is a workload whose program runs the steps.
func unit(name string, image backends.Image, steps ...string) backends.Workload {
	return backends.Workload{
		Name: name + "-00000001", Unit: name, Spec: merkle.Digest{1}, Format: backends.OCI,
		Image: backends.Image{Content: image.Content, ContentRoot: image.ContentRoot, Config: backends.ImageConfig{Entrypoint: []string{"/app"}}},
		Run:   backends.Run{Args: steps, User: 65532, Grace: 2 * time.Second},
	}
}

// until waits until the one workload that there is is as wanted.
func until(t *testing.T, b *Backend, wanted string, is func(backends.Status) bool) backends.Status {
	t.Helper()
	var list []backends.Status
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		var err error
		if list, err = b.Observe(t.Context()); err == nil && len(list) == 1 && is(list[0]) {
			return list[0]
		}
	}
	t.Fatalf("not %s within a minute; last seen: %+v", wanted, list)
	return backends.Status{}
}

func running(s backends.Status) bool { return s.State == backends.Running && s.PID != 0 }

// over removes what there is and looks for leaks.
func over(t *testing.T, d *daemon, b *Backend, state string) {
	t.Helper()
	list, err := b.Observe(t.Context())
	for _, s := range list {
		err = errors.Join(err, b.Remove(t.Context(), s.Name))
	}
	if err := errors.Join(err, b.Close()); err != nil {
		t.Error(err)
	}
	if left := leaks(t, d, state); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// plain wants an error that blames nobody: the engine did not answer.
func plain(t *testing.T, what string, err error) {
	t.Helper()
	var feature *backends.FeatureError
	var start *backends.StartError
	if err == nil || errors.As(err, &feature) || errors.As(err, &start) || refusal.Of(err) != nil {
		t.Errorf("%s: error %v, want one that blames nobody", what, err)
	}
}

func TestEngineKilled(t *testing.T) {
	image := content(t)
	each(t, func(t *testing.T, d *daemon) {
		state := t.TempDir()
		b := open(t, d.name, state)
		w := unit("relay", image, "say hello", "wait")
		if err := b.Apply(t.Context(), w); err != nil {
			t.Fatal(err)
		}
		before := until(t, b, "running", running)
		if err := d.kill(unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		_, err := b.Observe(t.Context())
		plain(t, "observe without an engine", err)
		if err == nil || !strings.Contains(err.Error(), "install") {
			t.Errorf("observe without an engine: %v; want what to install or start", err)
		}
		_, err = b.Fingerprint(t.Context())
		plain(t, "fingerprint without an engine", err)
		plain(t, "apply without an engine", b.Apply(t.Context(), unit("other", image, "wait")))
		if err := d.start(); err != nil {
			t.Fatal(err)
		}
		after := until(t, b, "running", running)
		if after.PID != before.PID || after.Restarts != 0 {
			t.Errorf("after the engine was killed it is %+v, was %+v", after, before)
		}
		if err := d.kill(unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if err := unix.Kill(after.PID, unix.SIGKILL); err != nil { // nobody is there to be told
			t.Fatal(err)
		}
		if err := d.start(); err != nil {
			t.Fatal(err)
		}
		until(t, b, "running again", func(s backends.Status) bool { return running(s) && s.Restarts == 1 && s.PID != after.PID })
		over(t, d, b, state)
	})
}

// The engine is not there when the backend is opened.
func TestEngineComesLate(t *testing.T) {
	image := content(t)
	each(t, func(t *testing.T, d *daemon) {
		state := t.TempDir()
		b := open(t, d.name, state)
		w := unit("relay", image, "wait")
		if err := b.Apply(t.Context(), w); err != nil {
			t.Fatal(err)
		}
		before := until(t, b, "running", running)
		if err := errors.Join(b.Close(), d.kill(unix.SIGTERM)); err != nil {
			t.Fatal(err)
		}
		b = open(t, d.name, state)
		_, err := b.Observe(t.Context())
		plain(t, "observe without an engine", err)
		if err := d.start(); err != nil {
			t.Fatal(err)
		}
		if after := until(t, b, "running", running); after.PID != before.PID || after.Restarts != 0 {
			t.Errorf("it is %+v, was %+v", after, before)
		}
		over(t, d, b, state)
	})
}

// steps are those of a start at which something ends.
func steps() []string {
	return []string{"load", "loaded", "create", "created", "hook", "start", "started"}
}

func TestEngineKilledInApply(t *testing.T) {
	image := content(t)
	each(t, func(t *testing.T, d *daemon) {
		for _, at := range steps() {
			t.Run(at, func(t *testing.T) {
				state := t.TempDir()
				b := open(t, d.name, state)
				killed := false
				b.step = func(step string) {
					if step == at && !killed {
						killed = true
						if err := d.kill(unix.SIGKILL); err != nil {
							t.Error(err)
						}
					}
				}
				w := unit("relay", image, "wait")
				w.Hooks.PreInit = [][]string{{"/app", "say first"}}
				err := b.Apply(t.Context(), w)
				if !killed {
					t.Fatalf("no such step; apply: %v", err)
				}
				plain(t, "apply", err)
				if err := d.start(); err != nil {
					t.Fatal(err)
				}
				if err := b.Apply(t.Context(), w); err != nil {
					t.Fatal(err)
				}
				until(t, b, "running", running)
				once(t, d, b)
				over(t, d, b, state)
			})
		}
	})
}

// once wants one container of the backend's, which runs.
func once(t *testing.T, d *daemon, b *Backend) {
	t.Helper()
	found, err := asked(t, d).ContainerList(t.Context(), client.ContainerListOptions{All: true, Filters: b.mine()})
	if err != nil || len(found.Items) != 1 {
		t.Errorf("%d containers, want one: %+v; %v", len(found.Items), found.Items, err)
	}
}

// What child is told.
const (
	childState   = "KMO_TEST_STATE"
	childEngine  = "KMO_TEST_ENGINE"
	childSocket  = "KMO_TEST_SOCKET"
	childStep    = "KMO_TEST_STEP"
	childContent = "KMO_TEST_CONTENT"
)

// child applies a workload in a process of its own, and ends itself at a step.
func child() {
	b, err := Open(Options{Name: os.Getenv(childEngine), Socket: os.Getenv(childSocket), State: os.Getenv(childState)})
	if err == nil {
		b.step = func(step string) {
			if step == os.Getenv(childStep) {
				_ = unix.Kill(os.Getpid(), unix.SIGKILL)
				select {}
			}
		}
		err = b.Apply(context.Background(), hooked(backends.Image{Content: os.Getenv(childContent)}))
	}
	fmt.Fprintln(os.Stderr, "not killed:", err)
	os.Exit(1)
}

func hooked(image backends.Image) backends.Workload {
	w := unit("relay", image, "wait")
	w.Hooks = backends.Hooks{PreInit: [][]string{{"/app", "say first"}}, PostInit: [][]string{{"/app", "say last"}}}
	return w
}

func TestKilledAtEachStep(t *testing.T) {
	image := content(t)
	each(t, func(t *testing.T, d *daemon) {
		for _, at := range steps() {
			t.Run(at, func(t *testing.T) {
				state := t.TempDir()
				self := exec.Command("/proc/self/exe")
				self.Env = append(os.Environ(), childState+"="+state, childEngine+"="+d.name, childSocket+"="+d.socket, childStep+"="+at, childContent+"="+image.Content)
				if output, err := self.CombinedOutput(); err == nil || self.ProcessState.ExitCode() != -1 {
					t.Fatalf("the child ended by itself: %v: %s", err, output)
				}
				b := open(t, d.name, state)
				list, err := b.Observe(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if there := at == "started"; (len(list) == 1) != there {
					t.Errorf("a new process sees %+v; want it there: %t", list, there)
				}
				if err := b.Apply(t.Context(), hooked(image)); err != nil {
					t.Fatal(err)
				}
				if s := until(t, b, "running", running); s.Restarts != 0 {
					t.Errorf("it was started again: %+v", s)
				}
				once(t, d, b)
				over(t, d, b, state)
			})
		}
	})
}

func TestImageVanishes(t *testing.T) {
	image := content(t)
	image.ContentRoot = merkle.Digest{7}
	each(t, func(t *testing.T, d *daemon) {
		state := t.TempDir()
		b := open(t, d.name, state)
		w := unit("relay", image, "wait")
		if err := b.Apply(t.Context(), w); err != nil {
			t.Fatal(err)
		}
		until(t, b, "running", running)
		id := b.entry(w.Name).imageID()
		damage(t, d, state, w)
		if _, err := asked(t, d).ImageRemove(t.Context(), id, client.ImageRemoveOptions{Force: true}); err != nil {
			t.Fatal(err)
		}
		if err := b.Apply(t.Context(), w); err != nil {
			t.Fatal(err)
		}
		until(t, b, "running again", running)
		over(t, d, b, state)
	})
}

// A full disk of the engine is told and blames nobody, and what was begun is gone.
func TestDiskFull(t *testing.T) {
	image := content(t)
	each(t, func(t *testing.T, d *daemon) {
		state, filler := t.TempDir(), filepath.Join(d.dir, "filler")
		b := open(t, d.name, state)
		w := unit("relay", image, "wait")
		fill := exec.Command("dd", "if=/dev/zero", "of="+filler, "bs=1M")
		if output, err := fill.CombinedOutput(); err == nil || !strings.Contains(string(output), "No space left") {
			t.Fatalf("filling the disk: %v: %s", err, output)
		}
		err := b.Apply(t.Context(), w)
		if plain(t, "apply", err); err != nil && !strings.Contains(err.Error(), "no space left") {
			t.Errorf("error %v, want one that says there is no space left", err)
		}
		if err := os.Remove(filler); err != nil {
			t.Fatal(err)
		}
		if list, err := b.Observe(t.Context()); err != nil || len(list) > 0 {
			t.Errorf("observe: %+v, %v; want nothing", list, err)
		}
		if err := b.Apply(t.Context(), w); err != nil {
			t.Fatal(err)
		}
		until(t, b, "running", running)
		once(t, d, b)
		over(t, d, b, state)
	})
}

func TestPortTaken(t *testing.T) {
	image := content(t)
	each(t, func(t *testing.T, d *daemon) {
		state := t.TempDir()
		b := open(t, d.name, state)
		stranger, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			t.Fatal(err)
		}
		port, _ := stranger.Addr().(*net.TCPAddr)
		w := unit("relay", image, "serve http", "wait")
		w.Run.Ports = []backends.Port{{Name: "http", Host: port.Port}}
		err = b.Apply(t.Context(), w)
		plain(t, "apply", err)
		if err == nil || !strings.Contains(err.Error(), fmt.Sprint("port ", port.Port, " is taken")) {
			t.Errorf("apply: %v; want it to name port %d", err, port.Port)
		}
		if left := leaks(t, d, state); len(left) > 0 {
			t.Errorf("left behind: %q", left)
		}
		if err := errors.Join(stranger.Close(), b.Apply(t.Context(), w)); err != nil {
			t.Fatal(err)
		}
		// Taken while the program is between two starts: tried again until it is free.
		before := until(t, b, "running", running)
		b.options.Backoff = func(int) time.Duration { return 500 * time.Millisecond }
		if err := unix.Kill(before.PID, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		until(t, b, "ended", func(s backends.Status) bool { return s.State == backends.Backoff })
		for stranger = nil; stranger == nil; time.Sleep(time.Millisecond) {
			if stranger, err = net.ListenTCP("tcp", port); err != nil && !errors.Is(err, unix.EADDRINUSE) {
				t.Fatal(err)
			}
		}
		until(t, b, "kept from its port", func(s backends.Status) bool { return s.State == backends.Backoff && strings.Contains(s.Detail, "port") })
		if err := stranger.Close(); err != nil {
			t.Fatal(err)
		}
		until(t, b, "running again", func(s backends.Status) bool { return running(s) && s.Restarts == 1 })
		over(t, d, b, state)
	})
}

func TestHookHangs(t *testing.T) {
	image := content(t)
	each(t, func(t *testing.T, d *daemon) {
		state := t.TempDir()
		b := open(t, d.name, state)
		b.hookTime = 5 * time.Second
		w := unit("relay", image, "wait")
		w.Hooks.PreInit = [][]string{{"/app", "say so-far", "wait"}}
		err := b.Apply(t.Context(), w)
		var start *backends.StartError
		if !errors.As(err, &start) || !strings.Contains(start.Cause, "not ended") || !strings.Contains(start.Output, "so-far") {
			t.Errorf("apply: %v, want a *StartError with the hook's output", err)
		}
		if left := leaks(t, d, state); len(left) > 0 {
			t.Errorf("left behind: %q", left)
		}
		w = unit("relay", image, "wait")
		w.Hooks.PostInit = [][]string{{"/app", "say so-far", "wait"}}
		if err := b.Apply(t.Context(), w); !errors.As(err, &start) || !strings.Contains(start.Output, "so-far") {
			t.Errorf("apply: %v, want a *StartError with the hook's output", err)
		}
		s := until(t, b, "damaged", func(s backends.Status) bool { return s.State == backends.Damaged })
		if s.Usage.PIDs > 12 || commands(s.PID) != 1 {
			t.Errorf("%d programs in its container, want the hook ended: %+v", commands(s.PID), s)
		}
		over(t, d, b, state)
	})
}

// commands counts the programs that share a process's pid namespace.
func commands(pid int) (n int) {
	own, _ := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", pid))
	found, _ := os.ReadDir("/proc")
	for _, one := range found {
		if its, err := os.Readlink("/proc/" + one.Name() + "/ns/pid"); err == nil && its == own {
			n++
		}
	}
	return n
}

// Who starts a program without its hooks, by whatever tool, has it started again with them.
func TestStartedByOthers(t *testing.T) {
	image := content(t)
	each(t, func(t *testing.T, d *daemon) {
		state := t.TempDir()
		b := open(t, d.name, state)
		w := unit("relay", image, "append /keep/order main,", "cat /keep/order", "wait")
		w.Overlay.Keep = []string{"/keep"}
		w.Hooks.PreInit = [][]string{{"/app", "append /keep/order pre,"}}
		if err := b.Apply(t.Context(), w); err != nil {
			t.Fatal(err)
		}
		until(t, b, "running", running)
		b.options.Backoff = func(int) time.Duration { return time.Second }
		none := 0
		if _, err := asked(t, d).ContainerRestart(t.Context(), b.entry(w.Name).id, client.ContainerRestartOptions{Timeout: &none}); err != nil {
			t.Fatal(err)
		}
		until(t, b, "started again with its hooks", func(s backends.Status) bool {
			log, err := b.Logs(t.Context(), w.Name, backends.LogOptions{})
			if err != nil {
				return false
			}
			text, _ := io.ReadAll(log)
			lines := strings.Split(strings.TrimSpace(string(text)), "\n")
			said := strings.HasSuffix(lines[max(len(lines)-2, 0)], `pre,main,"`) && strings.Count(string(text), "pre,main") > 1
			return running(s) && s.Restarts > 0 && said
		})
		over(t, d, b, state)
	})
}

// An end is learnt of as it comes, also soon after another, and while the answer to that is waited for.
func TestEndSoonAfterRestart(t *testing.T) {
	image := content(t)
	each(t, func(t *testing.T, d *daemon) {
		state := t.TempDir()
		b := open(t, d.name, state)
		b.options.Backoff = func(int) time.Duration { return time.Hour }
		w := unit("relay", image, "wait")
		w.Hooks.PreInit = [][]string{{"/app", "say first"}}
		if err := b.Apply(t.Context(), w); err != nil {
			t.Fatal(err)
		}
		e, none := b.entry(w.Name), 0
		learns := func(what string) {
			t.Helper()
			for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
				c, err := b.inspect(t.Context(), b.plan.Container(w.Name))
				if err != nil || c == nil || time.Now().After(deadline) {
					t.Fatalf("%s: its end is not learnt of: %+v; %v", what, c, err)
				}
				if !c.running && e.now() == nil {
					return
				}
			}
		}
		for _, what := range []string{"applied", "applied while it waits to be started again"} {
			if err := b.Apply(t.Context(), w); err != nil {
				t.Fatal(err)
			}
			if err := unix.Kill(e.now().PID, unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			learns(what)
		}
		if err := b.Apply(t.Context(), w); err != nil {
			t.Fatal(err)
		}
		if _, err := asked(t, d).ContainerRestart(t.Context(), b.plan.Container(w.Name), client.ContainerRestartOptions{Timeout: &none}); err != nil {
			t.Fatal(err)
		}
		learns("started by others without its hooks")
		over(t, d, b, state)
	})
}
