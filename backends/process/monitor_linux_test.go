package process

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/process/monitor"
)

// monitorArg makes the test binary a monitor, or a command beside one, that runs programs of this host.
const monitorArg = "test-monitor"

func monitored(what, place string, argv []string) int {
	if what == "run" {
		return monitor.Run(place, keepShell)
	}
	code, err := shell(argv)
	if err != nil {
		fmt.Println(err)
	}
	return code
}

// keepShell runs the workload's arguments as a command of the host.
func keepShell(m *monitor.Monitor) (monitor.End, error) {
	for _, f := range m.Workload.Files {
		fmt.Printf("file %s %q\n", f.To, f.Content)
	}
	for _, p := range m.Workload.Run.Ports {
		fmt.Printf("port %s %d %t\n", p.Name, p.Port, p.Host > 20000)
	}
	if m.Workload.Run.Args[0] == "unbuilt" {
		return monitor.End{}, monitor.Blame{Step: "building", Cause: errors.New("of no use")}
	}
	if err := m.Built(); err != nil {
		return monitor.End{}, err
	}
	terminated := make(chan os.Signal, 1)
	signal.Notify(terminated, syscall.SIGTERM)
	program := exec.Command(m.Workload.Run.Args[0], m.Workload.Run.Args[1:]...)
	program.Stdout, program.Stderr = os.Stdout, os.Stderr
	if err := program.Start(); err != nil {
		return monitor.End{}, monitor.Blame{Step: "exec", Cause: err}
	}
	m.Started()
	go func() {
		<-terminated
		fmt.Println("terminated")
		_ = program.Process.Kill()
	}()
	_ = program.Wait()
	code := program.ProcessState.ExitCode()
	if code < 0 {
		code = 137
	}
	return monitor.End{Code: code, OOM: code == 9}, nil
}

func shell(argv []string) (int, error) {
	command := exec.Command(argv[0], argv[1:]...)
	command.Stdout, command.Stderr = os.Stdout, os.Stderr
	if err := command.Run(); err != nil && command.ProcessState == nil {
		return 127, err
	}
	return command.ProcessState.ExitCode(), nil
}

func monitorOptions(state string) Options {
	o := options(state)
	o.Publishes = true
	o.Features = func(have []backends.Feature) []backends.Feature { return append(have, backends.PortMap) }
	o.Plan = func(_ context.Context, _ backends.Workload, place Place) (Program, error) {
		text, err := json.Marshal(place)
		return Program{
			Monitor: true, Argv: []string{monitorArg, "run", string(text)}, Env: map[string]string{"PATH": os.Getenv("PATH")},
			Command: func(argv []string) []string { return append([]string{monitorArg, "command", string(text)}, argv...) },
		}, err
	}
	return o
}

func monitors(t *testing.T, state string) *Keeper {
	t.Helper()
	k, err := Open(monitorOptions(state))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestMonitor(t *testing.T) {
	state := t.TempDir()
	k := monitors(t, state)
	defer func() { sweep(t, k); _ = k.Close() }()
	w := workload("vm", "sh", "-c", "echo begun; exec sleep 1000")
	w.Resources.Memory = 256 << 20 // the test binary's, with the race detector
	w.Run.Ports = []backends.Port{{Name: "http", Port: 80}}
	w.Files = []backends.File{{To: "/token", Content: []byte("canary"), Secret: true}}
	w.Overlay.Keep = []string{"/keep"}
	w.Hooks = backends.Hooks{PreInit: [][]string{{"echo", "before"}}, PostInit: [][]string{{"echo", "after"}}, Exit: [][]string{{"echo", "last"}}}
	apply(t, k, w)
	s := status(t, k, w.Name)
	if s.State != backends.Running || s.PID == 0 || len(s.Addresses) != 1 || strings.HasSuffix(s.Addresses[0].Address, ":80") {
		t.Errorf("it is %+v", s)
	}
	if got := strings.Join(s.Unapplied, "\n"); !strings.Contains(got, "log bound without the agent: what runs this workload writes the log") || strings.Contains(got, "may be written") {
		t.Errorf("unapplied: %q", got)
	}
	until(t, "the program has begun", func() (string, bool) { text := logOf(k, w.Name); return text, strings.Contains(text, "begun\n") })
	if text := logOf(k, w.Name); !strings.HasPrefix(text, "file /token \"canary\"\nport http 80 true\nbefore\n") || !strings.Contains(text, "after\n") {
		t.Errorf("log is %q", text)
	}
	record, err := os.ReadFile(filepath.Join(state, "work", w.Name, recordFile))
	if err != nil || strings.Contains(string(record), "Y2FuYXJ5") || strings.Contains(string(record), "canary") {
		t.Errorf("the record holds the secret: %v", err)
	}
	code, output, err := k.Exec(t.Context(), w.Name, []string{"sh", "-c", "echo inside; ps -A | wc -l; exit 7"})
	if err != nil || code != 7 || !strings.HasPrefix(string(output), "inside\n") {
		t.Errorf("exec: %d %q %v", code, output, err)
	}
	if err := k.Close(); err != nil {
		t.Fatal(err)
	}
	k = monitors(t, state)
	if again := status(t, k, w.Name); again.PID != s.PID || again.State != backends.Running {
		t.Errorf("found again it is %+v, was %+v", again, s)
	}
	if err := syscall.Kill(s.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	until(t, "a second start with the secret", func() (string, bool) {
		text := logOf(k, w.Name)
		return text, strings.Count(text, "before\n") == 2 && strings.Count(text, "file /token \"canary\"") == 2 && strings.Count(text, "after\n") == 2
	})
	if err := k.Remove(t.Context(), w.Name); err != nil {
		t.Error(err)
	}
}

func TestMonitorEnds(t *testing.T) {
	state := t.TempDir()
	k := monitors(t, state)
	defer func() { sweep(t, k); _ = k.Close() }()
	for _, test := range []struct {
		argv  []string
		stage string // of the *StartError, or "" if it starts
		code  int
		oom   bool
	}{
		{[]string{"unbuilt"}, "building", 0, false},
		{[]string{"/no/such/program"}, "exec", 0, false},
		{[]string{"sh", "-c", "exit 5"}, "", 5, false},
		{[]string{"sh", "-c", "exit 9"}, "", 9, true},
		{[]string{"sh", "-c", "kill -9 $$"}, "", 137, false},
	} {
		w := workload("vm", test.argv...)
		w.Resources.Memory = 256 << 20
		err := k.Apply(t.Context(), w)
		var fault *backends.StartError
		if errors.As(err, &fault); test.stage != "" && (fault == nil || fault.Stage != test.stage) || test.stage == "" && err != nil {
			t.Errorf("%q: %v, want stage %q", test.argv, err, test.stage)
		}
		if test.stage == "" {
			until(t, "its end", func() (string, bool) {
				s := status(t, k, w.Name)
				return fmt.Sprintf("%+v", s), s.Restarts > 0 && s.ExitCode == test.code && s.OOM == test.oom
			})
		}
		if err := k.Remove(t.Context(), w.Name); err != nil {
			t.Error(err)
		}
	}
	w := workload("vm", "sleep", "1000")
	w.Resources.Memory = 256 << 20
	w.Hooks.PreInit = [][]string{{"sh", "-c", "echo because; exit 3"}}
	var fault *backends.StartError
	if err := k.Apply(t.Context(), w); !errors.As(err, &fault) || !strings.Contains(fault.Output, "because") {
		t.Errorf("preInit: %v", err)
	}
	w.Hooks = backends.Hooks{}
	apply(t, k, w)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, _, err := k.Exec(ctx, w.Name, []string{"sleep", "1000"}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("exec: %v", err)
	}
	if err := k.Remove(t.Context(), w.Name); err != nil {
		t.Error(err)
	}
}

// A monitor whose keeper ends before the program was started goes with it.
func TestMonitorOfNobody(t *testing.T) {
	state := t.TempDir()
	k := monitors(t, state)
	ctx, cancel := context.WithCancel(t.Context())
	k.step = func(step string) {
		if step == "ordered" {
			cancel()
		}
	}
	w := workload("vm", "sleep", "1000")
	if err := k.Apply(ctx, w); !errors.Is(err, context.Canceled) {
		t.Errorf("apply: %v", err)
	}
	sweep(t, k)
	if err := k.Close(); err != nil {
		t.Error(err)
	}
}

func TestSecretsGone(t *testing.T) {
	memory, err := os.MkdirTemp("/dev/shm", "kmo-test-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(memory)
	o := options(t.TempDir())
	o.Memory = memory
	k, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { sweep(t, k); _ = k.Close() }()
	w := workload("relay", "wait")
	w.Files = []backends.File{{To: "/token", Mode: 0o400, Content: []byte("canary"), Secret: true}}
	apply(t, k, w)
	if err := k.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(k.secrets.Folder(w.Name)); err != nil { // as a host that was started again
		t.Fatal(err)
	}
	if k, err = Open(o); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(status(t, k, w.Name).PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	until(t, "damage", func() (string, bool) {
		s := status(t, k, w.Name)
		return fmt.Sprintf("%+v", s), s.State == backends.Damaged && strings.Contains(s.Detail, "its secrets are gone")
	})
	apply(t, k, w)
	if s := status(t, k, w.Name); s.State != backends.Running {
		t.Errorf("applied again it is %+v", s)
	}
	if err := k.Remove(t.Context(), w.Name); err != nil {
		t.Error(err)
	}
	if left, _ := filepath.Glob(memory + "/*"); len(left) > 0 {
		t.Errorf("left in memory: %q", left)
	}
}

// A monitor whose program was not started yet, as far as anybody knows, is undone by the next keeper, and the workload started anew.
func TestMonitorHalfIsUndone(t *testing.T) {
	state := t.TempDir()
	w := workload("vm", "sleep", "1000")
	k := monitors(t, state)
	apply(t, k, w)
	for _, half := range []bool{false, true} {
		before := status(t, k, w.Name)
		if err := k.Close(); err != nil {
			t.Fatal(err)
		}
		if half {
			if err := os.Remove(filepath.Join(k.place(&w).Dir, "begun")); err != nil {
				t.Fatal(err)
			}
		}
		k = monitors(t, state)
		until(t, "running", func() (string, bool) {
			s := status(t, k, w.Name)
			return fmt.Sprintf("%+v", s), s.State == backends.Running
		})
		if s := status(t, k, w.Name); (s.PID != before.PID) != half {
			t.Errorf("half %t: process %d, was %d", half, s.PID, before.PID)
		}
	}
	sweep(t, k)
	if err := k.Close(); err != nil {
		t.Error(err)
	}
}
