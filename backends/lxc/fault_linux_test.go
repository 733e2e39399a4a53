package lxc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/conformance"
	"github.com/kindos/kmo/registry/merkle"
)

// backendArg makes the test binary a process with a backend: a state folder and a workload as JSON, which it applies.
const backendArg = "test-backend"

func backend(args []string) {
	b, err := Open(Options{State: args[0], Backoff: quickly})
	var w backends.Workload
	if err == nil {
		err = json.Unmarshal([]byte(args[1]), &w)
	}
	if err == nil {
		err = b.Apply(context.Background(), w)
	}
	fmt.Println("applied", err)
	time.Sleep(time.Hour)
}

// yard is a backend whose workloads are removed, and looked for, at the end.
type yard struct {
	testing.TB
	*Backend
	state, root string
}

func newYard(t testing.TB) *yard {
	t.Helper()
	y := &yard{TB: t, state: t.TempDir(), root: content(t, conformance.Build(t, "linux", runtime.GOARCH))}
	y.Backend = open(t, y.state)
	t.Cleanup(y.sweep)
	return y
}

func (y *yard) sweep() {
	list, err := y.Observe(context.Background())
	if err != nil {
		y.Error(err)
	}
	for _, s := range list {
		if err := y.Remove(context.Background(), s.Name); err != nil {
			y.Errorf("removing %s: %v", s.Name, err)
		}
	}
	if err := y.Close(); err != nil {
		y.Error(err)
	}
	if len(y.planned) > 0 {
		y.Errorf("users are still planned for workloads that are gone: %v", y.planned)
	}
	if left := leaks(y.state); len(left) > 0 {
		y.Errorf("left behind: %q", left)
	}
}

func (y *yard) workload(steps ...string) backends.Workload {
	w := backends.Workload{
		Name: "relay-00000001", Unit: "relay", Spec: merkle.Digest{1}, Format: backends.LXC, Image: backends.Image{Content: y.root},
		Run:       backends.Run{Args: steps, User: 65532, Grace: 2 * time.Second},
		Resources: backends.Resources{CPUMin: 1000, CPU: 2000, Memory: 64 << 20, PIDs: 32},
	}
	w.Image.Config.Entrypoint = []string{"/app"}
	return w
}

func (y *yard) status() backends.Status {
	y.Helper()
	list, err := y.Observe(context.Background())
	if err != nil {
		y.Fatal(err)
	}
	if len(list) > 1 {
		y.Fatalf("%d workloads, want one: %+v", len(list), list)
	}
	if len(list) == 0 {
		return backends.Status{}
	}
	return list[0]
}

func (y *yard) log() string {
	y.Helper()
	r, err := y.Logs(context.Background(), "relay-00000001", backends.LogOptions{})
	if err != nil {
		return err.Error()
	}
	defer r.Close()
	text, err := io.ReadAll(r)
	if err != nil {
		y.Fatal(err)
	}
	return string(text)
}

func (y *yard) until(wanted string, is func(s backends.Status) bool) backends.Status {
	y.Helper()
	var s backends.Status
	for deadline := time.Now().Add(40 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if s = y.status(); is(s) {
			return s
		}
	}
	y.Fatalf("%s: not within 40 s: %+v, log %q", wanted, s, y.log())
	return s
}

func (y *yard) apply(w backends.Workload) {
	y.Helper()
	if err := y.Apply(context.Background(), w); err != nil {
		y.Fatal(err)
	}
}

// said waits for a line of the log.
func (y *yard) said(text string) {
	y.Helper()
	y.until("log with "+text, func(backends.Status) bool { return strings.Contains(y.log(), text) })
}

func running(s backends.Status) bool { return s.State == backends.Running }

// child is a process on this host whose parent is one, by the name of its program.
func child(parent int, program string) int {
	for _, pid := range processes() {
		name, err := os.ReadFile(proc(pid, "comm"))
		if err == nil && parentOf(pid) == parent && strings.TrimSpace(string(name)) == program {
			return pid
		}
	}
	return 0
}

func TestEngineMissing(t *testing.T) {
	y := newYard(t)
	y.tools = t.TempDir()
	var lacks *backends.FeatureError
	var start *backends.StartError
	_, err := y.Fingerprint(t.Context())
	if err == nil || !strings.Contains(err.Error(), "install LXC") {
		t.Errorf("fingerprint: error %v, want one that says what to install", err)
	}
	if err := y.Apply(t.Context(), y.workload("wait")); err == nil || errors.As(err, &lacks) || errors.As(err, &start) {
		t.Errorf("apply: error %v, want one that blames nobody", err)
	}
	if list, err := y.Observe(t.Context()); err != nil || len(list) > 0 {
		t.Errorf("observe: %v, %v", list, err)
	}
	y.tools = ""
	if print, err := y.Fingerprint(t.Context()); err != nil || !strings.HasPrefix(print.Version, "lxc ") || len(print.Formats) != 2 {
		t.Errorf("once it is there again: %+v, %v", print, err)
	}
	y.apply(y.workload("wait"))
}

// Whichever of a container's processes is killed, it is one container again.
func TestProcessKilled(t *testing.T) {
	for _, which := range []string{"monitor", "lxc-start", "program", "slirp4netns"} {
		t.Run(which, func(t *testing.T) {
			y := newYard(t)
			y.apply(y.workload("wait"))
			y.said("waiting")
			s := y.status()
			victim := s.PID
			switch which {
			case "lxc-start", "slirp4netns":
				victim = child(victim, which)
			case "program":
				victim = child(child(victim, "lxc-start"), "app")
			}
			if err := syscall.Kill(victim, syscall.SIGKILL); err != nil || victim == 0 {
				t.Fatalf("killing %d: %v", victim, err)
			}
			after := y.until("another", func(now backends.Status) bool { return running(now) && now.Restarts == 1 })
			want := 137
			if which == "slirp4netns" {
				want = 127
			}
			if after.ExitCode != want || after.OOM || after.PID == s.PID {
				t.Errorf("it is %+v, was %+v; want status %d of another process", after, s, want)
			}
		})
	}
}

// A backend that is killed at any moment of a start leaves nothing or the workload, and the next one makes it one that runs.
func TestBackendKilled(t *testing.T) {
	y := newYard(t)
	if err := y.Close(); err != nil {
		t.Fatal(err)
	}
	w := y.workload("wait")
	w.Hooks.PreInit = [][]string{{"/app", "say before"}}
	w.Hooks.PostInit = [][]string{{"/app", "say after"}}
	text, err := json.Marshal(w)
	if err != nil {
		t.Fatal(err)
	}
	for after := time.Millisecond; after < 2*time.Second; after *= 2 {
		cmd := exec.Command("/proc/self/exe", backendArg, y.state, string(text))
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(after)
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait() // it was killed
		y.Backend = open(t, y.state)
		y.apply(w)
		if s := y.until("running", running); len(s.Name) == 0 {
			t.Errorf("killed after %v: %+v", after, s)
		}
		y.said("waiting")
		if err := y.Remove(t.Context(), w.Name); err != nil {
			t.Fatal(err)
		}
		if left := leaks(y.state); len(left) > 0 {
			t.Errorf("killed after %v: left behind: %q", after, left)
		}
		if err := y.Close(); err != nil {
			t.Fatal(err)
		}
	}
	y.Backend = open(t, y.state)
}

func TestPortTaken(t *testing.T) {
	y := newYard(t)
	other, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := y.workload("serve http", "wait")
	_, port, _ := net.SplitHostPort(other.Addr().String())
	number, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	w.Run.Ports = []backends.Port{{Name: "http", Port: 80, Host: number}}
	var start *backends.StartError
	if err := y.Apply(t.Context(), w); err == nil || errors.As(err, &start) || !strings.Contains(err.Error(), "taken") {
		t.Errorf("error %v, want one that says the port is taken and blames nobody", err)
	}
	if left := leaks(y.state); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	y.apply(w)
	y.said("serving http")
}

// An image that vanishes takes no running program with it; it is told when that is to be started again, and made good when it is back.
func TestImageVanishes(t *testing.T) {
	y := newYard(t)
	y.apply(y.workload("wait"))
	y.said("waiting")
	if err := os.Rename(y.root, y.root+".away"); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(y.status().PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	y.until("no image", func(s backends.Status) bool {
		return s.State == backends.Backoff && strings.Contains(s.Detail, "is no folder")
	})
	if err := os.Rename(y.root+".away", y.root); err != nil {
		t.Fatal(err)
	}
	y.until("running again", running)
}

// A hook that hangs is ended with its caller's patience, and all that it began.
func TestHookHangs(t *testing.T) {
	y := newYard(t)
	w := y.workload("wait")
	w.Hooks.PreInit = [][]string{{"/app", "fork 1", "wait"}}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	if err := y.Apply(ctx, w); err == nil {
		t.Error("apply: no error")
	}
	if left := leaks(y.state); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	w.Hooks = backends.Hooks{PostInit: [][]string{{"/app", "wait"}}}
	ctx, cancel = context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	if err := y.Apply(ctx, w); err == nil {
		t.Error("apply: no error")
	}
	if s := y.status(); s.State != backends.Damaged {
		t.Errorf("it is %+v, want it damaged", s)
	}
	for _, pid := range processes() {
		line, err := os.ReadFile(proc(pid, "cmdline"))
		if err == nil && strings.Contains(string(line), "lxc-attach") && strings.Contains(string(line), "/run/lxc/") && strings.Contains(string(line), lxcPath(filepath.Join(y.state, "work", w.Name, "own"))) {
			t.Errorf("process %d goes on: %q", pid, line)
		}
	}
}
