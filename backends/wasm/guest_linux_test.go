package wasm

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/process"
)

// What TestMain builds once: the binary that runs guests, the suite's program and a web server, both as modules.
type built struct{ runner, program, web, modules string }

var binaries built // written by TestMain alone

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == process.StageArg {
		process.Stage()
	}
	dir, err := os.MkdirTemp("", "kmo-wasm-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	binaries = built{filepath.Join(dir, "runner"), filepath.Join(dir, "program.wasm"), filepath.Join(dir, "web.wasm"), filepath.Join(dir, "modules")}
	status := 1
	if err := os.Chmod(dir, 0o755); err != nil { // guests of other users are to reach it
		fmt.Fprintln(os.Stderr, err)
	} else if err := buildAll(); err != nil {
		fmt.Fprintln(os.Stderr, err)
	} else {
		status = m.Run()
	}
	os.RemoveAll(dir)
	os.Exit(status)
}

func buildAll() error {
	for _, b := range []struct{ to, from, goos, goarch string }{
		{binaries.runner, "./testdata/runner", "", ""},
		{binaries.program, "../conformance/testprogram", "wasip1", "wasm"},
		{binaries.web, "./testdata/web", "wasip1", "wasm"},
	} {
		build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", b.to, b.from)
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if b.goos != "" {
			build.Env = append(build.Env, "GOOS="+b.goos, "GOARCH="+b.goarch)
		}
		if output, err := build.CombinedOutput(); err != nil {
			return fmt.Errorf("building %s: %v\n%s", b.from, err, output)
		}
	}
	return nil
}

// machineCode compiles a module as the backend does, into a folder that all tests share.
func machineCode(t testing.TB, module string) code {
	t.Helper()
	return machineCodeIn(t, binaries.modules, module)
}

func machineCodeIn(t testing.TB, dir, module string) code {
	t.Helper()
	c, err := openCache(dir, binaries.runner)
	if err != nil {
		t.Fatal(err)
	}
	found, err := c.ready(t.Context(), module, 65532)
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// in makes a plan one for the machine code.
func (p *plan) in(c code) { p.Code, p.Sum = c.dir, c.sum }

// bare starts a guest without any confinement, so that what holds is the runner's own doing.
func bare(t testing.TB, p plan, args ...string) (*exec.Cmd, *bytes.Buffer) {
	t.Helper()
	text, err := p.encode()
	if err != nil {
		t.Fatal(err)
	}
	said := &bytes.Buffer{}
	guest := exec.Command(binaries.runner, append([]string{GuestArg, runArg, "guest"}, args...)...)
	guest.Env = []string{planVariable + "=" + text}
	guest.Stdout, guest.Stderr = said, said
	if err := guest.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = guest.Process.Kill() // it may have ended
		_ = guest.Wait()
	})
	return guest, said
}

// run runs a guest to its end.
func run(t *testing.T, p plan, args ...string) (status int, said string) {
	t.Helper()
	guest, log := bare(t, p, args...)
	_ = guest.Wait() // the status says it
	return guest.ProcessState.ExitCode(), log.String()
}

// until polls for what a process must come to do.
func until(t testing.TB, what string, ask func() (string, bool)) {
	t.Helper()
	seen := ""
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		ok := false
		if seen, ok = ask(); ok {
			return
		}
	}
	t.Fatalf("%s: not within 20 s; last seen: %s", what, seen)
}

func TestGuestEnds(t *testing.T) {
	p := plan{Module: binaries.program, Memory: 64 << 20}
	p.in(machineCode(t, binaries.program))
	for _, test := range []struct {
		steps  []string
		status int
		want   string
	}{
		{[]string{"say hello"}, 0, "hello\n"},
		{[]string{"say bye", "exit 3"}, 3, "bye\n"},
		{[]string{"exit 247"}, 246, ""},
		{[]string{"eat 200000000"}, statusMemory, "its bound is 67108864"},
		{[]string{"eat 8000000", "say enough"}, 0, "enough"},
	} {
		t.Run(strings.Join(test.steps, ","), func(t *testing.T) {
			if status, said := run(t, p, test.steps...); status != test.status || !strings.Contains(said, test.want) {
				t.Errorf("status %d, log %q; want %d and %q", status, said, test.status, test.want)
			}
		})
	}
	t.Run("a bound below what it starts with", func(t *testing.T) {
		small := p
		small.Memory = pageSize
		if status, said := run(t, small, "say hello"); status != statusMemory || !strings.Contains(said, "its bound is 65536") {
			t.Errorf("status %d, log %q", status, said)
		}
	})
	t.Run("a trap", func(t *testing.T) {
		p := plan{Module: tiny(t, 0)}
		p.in(machineCodeIn(t, t.TempDir(), p.Module))
		if status, said := run(t, p); status != statusTrap || !strings.Contains(said, "the guest trapped: ") || !strings.Contains(said, "wasm error: unreachable") {
			t.Errorf("status %d, log %q", status, said)
		}
	})
}

// tiny writes a module that does nothing but the body of its one function.
func tiny(t *testing.T, body ...byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "tiny.wasm")
	function := append([]byte{byte(len(body) + 2), 0}, append(body, 0x0b)...) // no locals; end
	whole := module([]byte{1, 1, 0x60, 0, 0}, []byte{3, 1, 0}, section(sectionExport, exported(startFunction, 0)), append([]byte{10, 1}, function...))
	if err := os.WriteFile(path, whole, 0o644); err != nil { // others run it
		t.Fatal(err)
	}
	return path
}

// A guest's memory need not be exported to be bounded.
func TestMemoryThatIsNotExported(t *testing.T) {
	path := filepath.Join(t.TempDir(), "module.wasm")
	whole := module([]byte{1, 1, 0x60, 0, 0}, []byte{3, 1, 0}, []byte{5, 1, 0, 0x80, 0x40}, // from 8,192 pages on
		section(sectionExport, exported(startFunction, 0)), []byte{10, 1, 2, 0, 0x0b})
	if err := os.WriteFile(path, whole, 0o644); err != nil { // others run it
		t.Fatal(err)
	}
	p := plan{Module: path, Memory: 64 << 20}
	p.in(machineCodeIn(t, t.TempDir(), path))
	if status, said := run(t, p); status != statusMemory || said != "kmo: the guest asked for 536870912 bytes of memory, its bound is 67108864\n" {
		t.Errorf("status %d, log %q", status, said)
	}
}

// Machine code that is not there, or is damaged, costs time and not the guest.
func TestGuestWithoutMachineCode(t *testing.T) {
	p := plan{Module: tiny(t)}
	p.in(machineCodeIn(t, t.TempDir(), p.Module))
	if status, said := run(t, p); status != 0 || said != "" {
		t.Fatalf("with good machine code: status %d, log %q", status, said)
	}
	files, err := filepath.Glob(filepath.Join(p.Code, "*", "*"))
	if err != nil || len(files) != 1 {
		t.Fatalf("files of machine code: %q, %v; want one", files, err)
	}
	whole, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(files[0], 0o600); err != nil {
		t.Fatal(err)
	}
	for n := range whole {
		flipped := bytes.Clone(whole)
		flipped[n] ^= 0x80
		for _, damaged := range [][]byte{whole[:n], flipped} {
			if n%16 != 0 { // a process for each byte would take minutes
				continue
			}
			if err := os.WriteFile(files[0], damaged, 0o600); err != nil {
				t.Fatal(err)
			}
			if status, said := run(t, p); status != 0 || !strings.Contains(said, "no machine code that fits, compiling: SHA-256") {
				t.Errorf("byte %d of %d, %d left: status %d, log %q", n, len(whole), len(damaged), status, said)
			}
		}
	}
	if err := os.RemoveAll(p.Code); err != nil {
		t.Fatal(err)
	}
	if status, said := run(t, p); status != 0 {
		t.Errorf("without a folder: status %d, log %q", status, said)
	}
}

func TestGuestSeesOnlyItsTree(t *testing.T) {
	outside := t.TempDir()
	secret := filepath.Join(outside, "secret")
	tree := filepath.Join(outside, "tree")
	for path, text := range map[string]string{secret: "secret", filepath.Join(tree, "mine"): "mine", filepath.Join(tree, "deep/mine"): "deep"} {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for to, name := range map[string]string{
		secret: "absolute", "../secret": "relative", "../../../../../../../../etc": "folder", "relative": "twice", "mine": "inner", "deep": "deeper", "../nothing": "dangling",
	} {
		if err := os.Symlink(to, filepath.Join(tree, name)); err != nil {
			t.Fatal(err)
		}
	}
	p := plan{Module: binaries.program, Root: tree}
	p.in(machineCode(t, binaries.program))
	_, said := run(t, p, "cat /mine", "cat /inner", "cat /deeper/mine", "cat /absolute", "cat /relative", "cat /twice", "cat /folder/passwd", "cat /../secret",
		"cat "+secret, "write /dangling gone", "write /folder/x gone", "write /new text", "cat /new")
	for _, line := range []string{`cat /mine: "mine"`, `cat /inner: "mine"`, `cat /deeper/mine: "deep"`, `write /new: ok`, `cat /new: "text"`} {
		if !strings.Contains(said, line+"\n") {
			t.Errorf("no line %q", line)
		}
	}
	for _, line := range []string{"cat /absolute", "cat /relative", "cat /twice", "cat /folder/passwd", "cat /../secret", "cat " + secret, "write /dangling", "write /folder/x"} {
		if !strings.Contains(said, line+": error: ") {
			t.Errorf("U-01 %s is no error", line)
		}
	}
	if strings.Contains(said, `"secret"`) {
		t.Error("the guest read the secret")
	}
	if _, err := os.Stat(filepath.Join(outside, "nothing")); err == nil {
		t.Error("the guest wrote outside its tree")
	}
	if t.Failed() {
		t.Log(said)
	}
}

// web starts the web server on a free port.
func web(t testing.TB) (guest *exec.Cmd, said *bytes.Buffer, url string) {
	t.Helper()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := free.Addr().(*net.TCPAddr).Port
	free.Close()
	p := plan{
		Module: binaries.web, Root: t.TempDir(), Listen: []listener{{Port: port}},
		Env: map[string]string{"KMO_FD_HTTP": "4", "KMO_PORT_HTTP": "8080"},
	}
	p.in(machineCode(t, binaries.web))
	guest, said = bare(t, p, "one")
	url = "http://127.0.0.1:" + strconv.Itoa(port)
	until(t, "the guest answers", func() (string, bool) {
		answer, err := http.Get(url)
		if err != nil {
			return err.Error(), false
		}
		defer answer.Body.Close()
		body, err := io.ReadAll(answer.Body)
		return string(body), err == nil && string(body) == "guest [\"one\"] told port 8080\n"
	})
	return guest, said, url
}

func TestTakenPort(t *testing.T) {
	stranger, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()
	port := stranger.Addr().(*net.TCPAddr).Port
	want := fmt.Sprintf("port %d is taken by another program", port)

	p := plan{Module: binaries.web, Root: t.TempDir(), Listen: []listener{{Port: port}}}
	p.in(machineCode(t, binaries.web))
	if status, said := run(t, p); status != statusRunner || !strings.Contains(said, want) {
		t.Errorf("the runner ends with %d and says %q, want %d and %q", status, said, statusRunner, want)
	}

	b := over(t, shareModules(t))
	w := workload(binaries.web)
	w.Run.Ports = []backends.Port{{Name: "http", Port: 80, Host: port}}
	var fault *backends.StartError
	if err := b.Apply(t.Context(), w); err == nil || errors.As(err, &fault) || !strings.Contains(err.Error(), want) {
		t.Errorf("apply: %v, want an error that blames nobody with %q", err, want)
	}
}

// An idle guest is asleep in the kernel, on its sockets. Were they hidden from poll_oneoff, it would wait on none.
func TestGuestServesAndSleeps(t *testing.T) {
	guest, _, url := web(t)
	until(t, "a thread that waits for a socket in ppoll", func() (string, bool) {
		tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/syscall", guest.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		all := ""
		for _, task := range tasks {
			text, _ := os.ReadFile(task) // a thread may be gone
			all += string(text)
			var number, set, count uint64
			n, _ := fmt.Sscanf(string(text), "%d 0x%x 0x%x", &number, &set, &count)
			if n == 3 && number == syscall.SYS_PPOLL && count > 0 {
				return all, true
			}
		}
		return all, false
	})
	t.Run("an answer larger than the socket's buffer", func(t *testing.T) {
		answer, err := http.Get(url + "/big")
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		// The small buffer makes the guest wait to be able to write.
		n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{answer.Body}, make([]byte, 4<<10))
		if n != 32<<20 || err != nil {
			t.Errorf("%d bytes, %v; want %d", n, err, 32<<20)
		}
	})
	t.Run("many at once", func(t *testing.T) {
		failures := make(chan error)
		for range 50 {
			go func() {
				answer, err := http.Get(url)
				if err == nil {
					_, err = io.Copy(io.Discard, answer.Body)
					answer.Body.Close()
				}
				failures <- err
			}()
		}
		for range 50 {
			if err := <-failures; err != nil {
				t.Error(err)
			}
		}
	})
}

func TestSpinningGuestStops(t *testing.T) {
	p := plan{Module: binaries.program}
	p.in(machineCode(t, binaries.program))
	guest, said := bare(t, p, "say up", "burn")
	until(t, "the guest spins", func() (string, bool) {
		used := ticks(t, guest.Process.Pid)
		return strconv.Itoa(used), used > 20
	})
	begin := time.Now()
	if err := guest.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	_ = guest.Wait() // the state says it
	if state := guest.ProcessState.Sys().(syscall.WaitStatus); !state.Signaled() || state.Signal() != syscall.SIGTERM {
		t.Errorf("state %v, log %q; want ended by SIGTERM", guest.ProcessState, said)
	}
	if took := time.Since(begin); took > 2*time.Second {
		t.Errorf("it took %v", took)
	}
}

func TestCompileIsOnce(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "modules")
	c, err := openCache(dir, binaries.runner)
	if err != nil {
		t.Fatal(err)
	}
	one, other := tiny(t), tiny(t, 1)
	first, err := c.ready(t.Context(), one, 65532)
	if err != nil {
		t.Fatal(err)
	}
	// What compiles now would fail.
	c, err = openCache(dir, "/nonexistent")
	if err != nil {
		t.Fatal(err)
	}
	second, err := c.ready(t.Context(), one, 65532)
	if err != nil || second != first {
		t.Errorf("the second time: %+v, %v; want %+v", second, err, first)
	}
	if _, err := c.ready(t.Context(), other, 65532); err == nil {
		t.Error("another module needed no compiling")
	}
	if left, _ := filepath.Glob(filepath.Join(dir, unfinished+"*")); len(left) > 0 {
		t.Errorf("half-made folders: %q", left)
	}
}

func TestCompileRefuses(t *testing.T) {
	path := filepath.Join(t.TempDir(), "bad.wasm")
	// A function whose body leaves nothing where a number is promised: it decodes, and is not valid.
	bad := module([]byte{1, 1, 0x60, 0, 1, 0x7f}, []byte{3, 1, 0}, section(sectionExport, exported(startFunction, 0)), []byte{10, 1, 2, 0, 0x0b})
	if err := os.WriteFile(path, bad, 0o600); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "modules")
	c, err := openCache(dir, binaries.runner)
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.ready(t.Context(), path, 65532)
	if fault, ok := err.(*moduleError); !ok || !strings.Contains(fault.what, "compiling: exit status 70: kmo: invalid function[0]") {
		t.Errorf("error %v", err)
	}
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestPrune(t *testing.T) {
	c, err := openCache(t.TempDir(), binaries.runner)
	if err != nil {
		t.Fatal(err)
	}
	newest := ""
	for i := range keptModules + 3 {
		newest = filepath.Join(c.dir, strconv.Itoa(i))
		when := time.Unix(int64(i), 0)
		if err := os.Mkdir(newest, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(newest, when, when); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.prune(newest); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(c.dir)
	if err != nil || len(left) != keptModules {
		t.Errorf("%d left, %v; want %d", len(left), err, keptModules)
	}
	for _, old := range []string{"0", "1", "2"} {
		if _, err := os.Stat(filepath.Join(c.dir, old)); err == nil {
			t.Errorf("%s is left", old)
		}
	}
}

func TestPlanTooLarge(t *testing.T) {
	if _, err := (plan{Env: map[string]string{"X": strings.Repeat("x", maxPlan)}}).encode(); err == nil {
		t.Error("a plan of more than the kernel takes passes")
	}
	text, err := plan{Listen: []listener{{true, 80}}}.encode()
	var back plan
	if err != nil || json.Unmarshal([]byte(text), &back) != nil || back.Listen[0] != (listener{true, 80}) {
		t.Errorf("%s, %v", text, err)
	}
}
