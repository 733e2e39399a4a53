package wasm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/conformance"
	"github.com/kindos/kmo/registry/merkle"
)

func quickly(int) time.Duration { return 100 * time.Millisecond }

// over opens a backend over a state folder, as a process of its own would.
func over(t testing.TB, state string) *Backend {
	t.Helper()
	b, err := Open(Options{State: state, Program: binaries.runner, Backoff: quickly})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestConformance(t *testing.T) {
	conformance.Test(t, func(t *testing.T) conformance.Subject {
		state := shareModules(t)
		var present *Backend
		return conformance.Subject{
			Open: func(t *testing.T) backends.Backend {
				present = over(t, state)
				return present
			},
			Dies: true,
			At: func(t *testing.T, state string) backends.Backend {
				_ = os.Mkdir(state, 0o700) // or an earlier one did
				_ = os.Symlink(binaries.modules, filepath.Join(state, "modules"))
				return over(t, state)
			},
			Images: map[backends.Format]backends.Image{backends.WASM: {Content: binaries.program}},
			Table:  "testdata/features",
			Disk:   []string{state},
			Leaks:  func(t *testing.T) []string { return leaks(t, state) },
			Damage: func(t *testing.T, _ backends.Workload) { damage(t, present) },
		}
	})
}

func TestDemo(t *testing.T) { conformance.Demo(t, Name, "") }

// damage cuts off a guest's machine code, so that it could not go on, and ends the guest.
func damage(t *testing.T, b *Backend) {
	guest := only(t, b)
	if err := os.Remove(filepath.Join(machineCode(t, binaries.program).dir, sumFile)); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(guest.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

// shareModules makes a state folder that has the test's modules compiled already.
func shareModules(t testing.TB) string {
	t.Helper()
	machineCode(t, binaries.program)
	state := t.TempDir()
	if err := os.Symlink(binaries.modules, filepath.Join(state, "modules")); err != nil {
		t.Fatal(err)
	}
	return state
}

// leaks finds processes whose command is the runner's, and folders of workloads.
func leaks(t *testing.T, state string) []string {
	t.Helper()
	left, err := filepath.Glob(filepath.Join(state, "guests", "work", "*"))
	if err != nil {
		t.Fatal(err)
	}
	half, err := filepath.Glob(filepath.Join(binaries.modules, unfinished+"*"))
	if err != nil {
		t.Fatal(err)
	}
	left = append(left, half...)
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, state) {
			left = append(left, "mount "+line)
		}
	}
	return left
}

// workload is one that runs steps of the suite's program.
func workload(module string, steps ...string) backends.Workload {
	w := backends.Workload{
		Unit: "relay", Backend: Name, Tier: 3, Format: backends.WASM, Image: backends.Image{Content: module},
		Run: backends.Run{Args: steps, User: 65532, Grace: 2 * time.Second}, Resources: backends.Resources{CPU: 2000, Memory: 64 << 20, PIDs: 8},
	}
	w.Image.Config.Entrypoint = []string{"/app"}
	w.Spec = merkle.Digest{1: byte(len(steps)), 2: byte(len(module)), 3: 7}
	w.Name = w.Unit + "-" + w.Spec.Short()
	return w
}

func apply(t testing.TB, b *Backend, w backends.Workload) {
	t.Helper()
	t.Cleanup(func() {
		if err := b.Remove(context.Background(), w.Name); err != nil {
			t.Errorf("remove: %v", err)
		}
		if err := b.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	if err := b.Apply(t.Context(), w); err != nil {
		t.Fatal(err)
	}
}

func logged(t testing.TB, b *Backend, name, want string) {
	t.Helper()
	until(t, fmt.Sprintf("log with %q", want), func() (string, bool) {
		r, err := b.Logs(t.Context(), name, backends.LogOptions{})
		if err != nil {
			return err.Error(), false
		}
		defer r.Close()
		text, err := io.ReadAll(r)
		return string(text), err == nil && strings.Contains(string(text), want)
	})
}

func only(t testing.TB, b *Backend) backends.Status {
	t.Helper()
	list, err := b.Observe(t.Context())
	if err != nil || len(list) != 1 {
		t.Fatalf("observe: %+v, %v; want one", list, err)
	}
	return list[0]
}

func TestApplyRefuses(t *testing.T) {
	b := over(t, shareModules(t))
	defer b.Close()
	dir := t.TempDir()
	file := func(name string, bytes []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, bytes, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	var lacks *backends.FeatureError
	var fault *backends.StartError
	if err := b.Apply(t.Context(), workload(file("component", []byte("\x00asm\x0d\x00\x01\x00")))); !errors.As(err, &lacks) || lacks.Feature != "component-model" {
		t.Errorf("a component: error %v", err)
	}
	foreign := module(section(sectionImport, imported("env", "memory", 2, 0, 1)), section(sectionExport, exported(startFunction, 0)))
	if err := b.Apply(t.Context(), workload(file("foreign", foreign))); !errors.As(err, &lacks) || lacks.Feature != "imports" || !strings.Contains(lacks.Detail, "memory env.memory") {
		t.Errorf("a foreign import: error %v", err)
	}
	if err := b.Apply(t.Context(), workload(file("text", []byte("not a module")))); !errors.As(err, &fault) || !strings.Contains(fault.Cause, "it starts with the bytes") {
		t.Errorf("no module: error %v", err)
	}
	escaping := workload(binaries.program, "wait")
	escaping.Files = []backends.File{{To: "/../kmo/run", Mode: 0o444}}
	if err := b.Apply(t.Context(), escaping); err == nil || !strings.Contains(err.Error(), "E_PATH") {
		t.Errorf("a file outside the tree: error %v", err)
	}
	if list, err := b.Observe(t.Context()); err != nil || len(list) != 0 {
		t.Errorf("observe: %v, %v; want none", list, err)
	}
}

func TestFingerprint(t *testing.T) {
	b := over(t, shareModules(t))
	defer b.Close()
	print, err := b.Fingerprint(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := []backends.Feature{
		backends.Exec, backends.Hooking, backends.HostNetwork, backends.Keep, backends.LimitCPU, backends.LimitDisk, backends.LimitMemory,
		backends.LimitPIDs, backends.Mounts, backends.Overlays, backends.PortMap,
	}
	for _, feature := range want {
		if !print.Has(feature) {
			t.Errorf("features %v have no %s", print.Features, feature)
		}
	}
	if !slices.IsSorted(print.Features) || print.Isolation != backends.IsolationSandbox || !strings.HasPrefix(print.Version, "wazero ") {
		t.Errorf("fingerprint %+v", print)
	}
}

func TestStaticBinaryWanted(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]bool{binaries.runner: true, "/bin/sh": false, self: static(self) == nil} {
		if err := static(path); (err == nil) != want {
			t.Errorf("%s: error %v, want static %t", path, err, want)
		}
	}
}

// What the guest sees is its own tree, and none of what its runner needs.
func TestGuestSeesNothingOfItsRunner(t *testing.T) {
	b := over(t, shareModules(t))
	w := workload(binaries.program, "cat /kmo/run", "cat /etc/passwd", "cat /proc/self/environ", "cat /dev/null", "cat "+binaries.program, "cat /mine", "wait")
	w.Files = []backends.File{{To: "/mine", Mode: 0o444, Content: []byte("mine")}}
	apply(t, b, w)
	logged(t, b, w.Name, `cat /mine: "mine"`)
	for _, path := range []string{"/kmo/run", "/etc/passwd", "/proc/self/environ", "/dev/null", binaries.program} {
		logged(t, b, w.Name, "cat "+path+": error: ")
	}
}

func TestSpinningGuestIsRemovedWithinGrace(t *testing.T) {
	b := over(t, shareModules(t))
	w := workload(binaries.program, "say up", "burn")
	apply(t, b, w)
	logged(t, b, w.Name, "up\n")
	begin := time.Now()
	if err := b.Remove(t.Context(), w.Name); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begin); took > w.Run.Grace {
		t.Errorf("it took %v, its grace is %v", took, w.Run.Grace)
	}
}

// A module that spins before it has begun keeps neither Apply nor Remove: it is a guest like any other.
func TestSpinningStartHoldsNobody(t *testing.T) {
	b := over(t, t.TempDir())
	spins := []byte{10, 1, 7, 0, 0x03, 0x40, 0x0c, 0, 0x0b, 0x0b} // the code of one function: loop, branch to it
	path := filepath.Join(t.TempDir(), "module.wasm")
	text := module([]byte{1, 1, 0x60, 0, 0}, []byte{3, 1, 0}, section(sectionExport, exported(startFunction, 0)), []byte{8, 0}, spins)
	if err := os.WriteFile(path, text, 0o644); err != nil { // others run it
		t.Fatal(err)
	}
	w := workload(path)
	begin := time.Now()
	apply(t, b, w)
	until(t, "it uses the processor", func() (string, bool) {
		s := only(t, b)
		return fmt.Sprintf("%+v", s), s.State == backends.Starting && s.Restarts == 0 && s.Usage.CPU > 300*time.Millisecond
	})
	if err := b.Remove(t.Context(), w.Name); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begin); took > 20*time.Second {
		t.Errorf("it took %v", took)
	}
}

func TestMemoryBoundIsTold(t *testing.T) {
	b := over(t, shareModules(t))
	w := workload(binaries.program, "eat 30000000", "say enough", "eat 200000000", "wait")
	apply(t, b, w)
	logged(t, b, w.Name, "enough\n")
	logged(t, b, w.Name, "its bound is 67108864\n")
	until(t, "an end for want of memory", func() (string, bool) {
		s := only(t, b)
		return fmt.Sprintf("%+v", s), s.OOM && s.ExitCode == 137 && s.Detail == "ended with status 137, for want of memory"
	})
}

func TestWebGuest(t *testing.T) {
	b := over(t, shareModules(t))
	w := workload(binaries.web, "one")
	w.Run.Ports = []backends.Port{{Name: "http", Port: 80, Host: 18431}}
	apply(t, b, w)
	until(t, "the guest answers", func() (string, bool) {
		s := only(t, b)
		answer, err := http.Get("http://" + s.Addresses[0].Address)
		if err != nil {
			return err.Error(), false
		}
		defer answer.Body.Close()
		body, err := io.ReadAll(answer.Body)
		return string(body), err == nil && string(body) == "/app [\"one\"] told port 80\n"
	})
}

// A guest runs once its machine code is loaded, and until then nothing counts as its running.
func TestStartingUntilItBegins(t *testing.T) {
	b := over(t, shareModules(t))
	w := workload(binaries.program, "wait")
	apply(t, b, w)
	if s := only(t, b); s.State != backends.Starting {
		t.Errorf("right after Apply: %+v", s)
	}
	until(t, "it runs", func() (string, bool) {
		s := only(t, b)
		return fmt.Sprintf("%+v", s), s.State == backends.Running && s.Restarts == 0
	})
}

// plugin starts a process of its own that applies a workload over a state folder, and returns the guest's process.
func plugin(t *testing.T, state string, w backends.Workload, as *syscall.Credential) (kill func(), pid int) {
	t.Helper()
	text, err := json.Marshal(w)
	if err != nil {
		t.Fatal(err)
	}
	path := state + ".json"
	if err := os.WriteFile(path, text, 0o644); err != nil { // the plugin may be another user's
		t.Fatal(err)
	}
	plugin := exec.Command(binaries.runner, "apply", state, path)
	plugin.SysProcAttr = &syscall.SysProcAttr{Credential: as}
	plugin.Stderr = os.Stderr
	said, err := plugin.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := plugin.Start(); err != nil {
		t.Fatal(err)
	}
	kill = sync.OnceFunc(func() {
		_ = plugin.Process.Kill() // it may have ended
		_ = plugin.Wait()
	})
	t.Cleanup(kill)
	if _, err := fmt.Fscanf(said, "applied %d\n", &pid); err != nil || pid <= 1 {
		t.Fatalf("the plugin said nothing of a guest: %v, process %d", err, pid)
	}
	return kill, pid
}

// A guest outlives a plugin that is killed, and the next one finds it and leaves it as it is.
func TestGuestOutlivesThePlugin(t *testing.T) {
	state := shareModules(t)
	w := workload(binaries.program, "say up", "wait")
	kill, pid := plugin(t, state, w, nil)
	kill()
	b := over(t, state)
	if s := only(t, b); s.State != backends.Running || s.Restarts != 0 || s.PID != pid {
		t.Errorf("the new plugin sees %+v, the guest is process %d", s, pid)
	}
	apply(t, b, w)
	if s := only(t, b); s.PID != pid || s.Restarts != 0 {
		t.Errorf("applying the same changed the guest: %+v, it was process %d", s, pid)
	}
	logged(t, b, w.Name, "up\n")
}

// Without root there is no tree, and a guest sees no file at all; hooks and listeners are as ever.
func TestWithoutRoot(t *testing.T) {
	const nobody = 65534
	open, err := os.MkdirTemp("", "kmo-wasm-test-") // a test's own folder is closed to others
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(open) })
	state := filepath.Join(open, "state")
	if err := errors.Join(os.Chmod(open, 0o755), os.Mkdir(state, 0o700), os.Chown(state, nobody, nobody)); err != nil { // on purpose
		t.Fatal(err)
	}
	w := workload(binaries.program, "say up", "cat /etc/passwd", "serve http", "wait")
	w.Run.User, w.Resources = nobody, backends.Resources{}
	w.Run.Ports = []backends.Port{{Name: "http"}}
	w.Hooks.PostInit = [][]string{{"/app", "say hooked"}}
	_, pid := plugin(t, state, w, &syscall.Credential{Uid: nobody, Gid: nobody})
	t.Cleanup(func() {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Error(err)
		}
	})
	until(t, "the guest's log", func() (string, bool) {
		logs, err := filepath.Glob(filepath.Join(state, "guests/work/*/log"))
		if err != nil || len(logs) != 1 {
			return fmt.Sprint(logs, err), false
		}
		text, err := os.ReadFile(logs[0])
		said := string(text)
		return said, err == nil && strings.Contains(said, "cat /etc/passwd: error: ") && strings.Contains(said, "serving http\n") && strings.Contains(said, "hooked\n")
	})
}
