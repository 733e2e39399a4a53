package gvisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kindos/kmo/backends"
)

// keeperArg makes the test binary a backend of its own: state folder, content, unit.
const keeperArg = "gvisor-test-keeper"

// until asks until it is answered true, or fails with what was seen last.
func until(t *testing.T, wanted string, ask func() (string, bool)) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		seen, ok := ask()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within a minute; last seen: %s", wanted, seen)
		}
	}
}

func status(t *testing.T, b *Backend, name string) backends.Status {
	t.Helper()
	list, err := b.Observe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range list {
		if s.Name == name {
			return s
		}
	}
	return backends.Status{}
}

func apply(t *testing.T, b *Backend, w backends.Workload) {
	t.Helper()
	if err := b.Apply(t.Context(), w); err != nil {
		t.Fatal(err)
	}
}

func logOf(t *testing.T, b *Backend, name string) string {
	t.Helper()
	r, err := b.Logs(t.Context(), name, backends.LogOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	text, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// says waits for a line in a workload's log and returns what follows its beginning.
func says(t *testing.T, b *Backend, name, line string) (rest string) {
	t.Helper()
	until(t, name+" saying "+line, func() (string, bool) {
		text := logOf(t, b, name)
		for one := range strings.Lines(text) {
			if after, ok := strings.CutPrefix(one, line); ok && strings.HasSuffix(one, "\n") {
				rest = strings.TrimSpace(after)
				return text, true
			}
		}
		return text, false
	})
	return rest
}

// fresh is a backend over a folder of its own, which at the end holds nothing.
func fresh(t *testing.T) *Backend {
	t.Helper()
	dir := t.TempDir()
	b := open(t, dir)
	t.Cleanup(func() { sweep(t, b, dir) })
	return b
}

func sweep(t *testing.T, b *Backend, dir string) {
	t.Helper()
	list, err := b.Observe(context.Background())
	if err != nil {
		t.Error(err)
	}
	for _, s := range list {
		if err := b.Remove(context.Background(), s.Name); err != nil {
			t.Error(err)
		}
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	for _, left := range leaks(dir) {
		t.Errorf("left behind: %s", left)
	}
}

// parts finds the children of a workload's monitor that are of one program.
func parts(monitor int, word string) (pids []int) {
	found, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range found {
		text, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
		line, _ := os.ReadFile(filepath.Join(filepath.Dir(path), "cmdline"))
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		program, _, _ := strings.Cut(string(line), "\x00")
		if err == nil && len(fields) > 1 && fields[1] == strconv.Itoa(monitor) && filepath.Base(program) == word {
			pids = append(pids, pid)
		}
	}
	return pids
}

// Whatever part of a sandbox ends, the workload ends with it, is told so, and comes back whole.
func TestPartsKilled(t *testing.T) {
	image := content(t)
	for word, code := range map[string]int{"runsc-sandbox": 137, "runsc-gofer": 0, "slirp4netns": 127} {
		t.Run(word, func(t *testing.T) {
			b := fresh(t)
			w := unit(image, "relay", "serve http", "wait")
			w.Run.Ports = []backends.Port{{Name: "http"}}
			apply(t, b, w)
			says(t, b, w.Name, "waiting")
			before := status(t, b, w.Name)
			found := parts(before.PID, word)
			if len(found) != 1 {
				t.Fatalf("processes %v, want one", found)
			}
			if err := syscall.Kill(found[0], syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			until(t, "running again", func() (string, bool) {
				s := status(t, b, w.Name)
				return fmt.Sprintf("%+v", s), s.State == backends.Running && s.Restarts == 1
			})
			if s := status(t, b, w.Name); code != 0 && s.ExitCode != code || s.OOM || s.Addresses[0] != before.Addresses[0] {
				t.Errorf("it is %+v, was %+v; want exit code %d, and the same address", s, before, code)
			}
			until(t, "an answer", func() (string, bool) {
				answer, err := net.Dial("tcp", before.Addresses[0].Address)
				if err != nil {
					return err.Error(), false
				}
				defer answer.Close()
				_, _ = io.WriteString(answer, "GET / HTTP/1.1\r\n\r\n")
				text, err := io.ReadAll(answer)
				return fmt.Sprint(string(text), err), strings.Contains(string(text), "serve http")
			})
		})
	}
}

// keeper is a backend of its own process, which applies one workload and stays.
func keeper(args []string) {
	b, err := Open(Options{State: args[0], Runsc: os.Getenv(variable)})
	if err == nil {
		w := unit(backends.Image{Content: args[1], Config: backends.ImageConfig{Entrypoint: []string{"/app"}}}, args[2], "wait")
		w.Hooks.PreInit = [][]string{{"/app", "say before"}}
		w.Run.Ports = []backends.Port{{Name: "http"}}
		err = b.Apply(context.Background(), w)
	}
	fmt.Println("applied", err)
	time.Sleep(time.Hour)
}

// U-46: whatever a start has come to when the backend's process is killed, the next one has the program once, or not at all.
func TestKilledAtEachStep(t *testing.T) {
	image := content(t)
	for _, step := range []string{"record.json", "own/spec.json", "own/command-*", "own/command-*/pid", "own/slirp.sock", "own/runsc/*", "own/bundle/pid", ""} {
		t.Run("U-46 killed at "+step, func(t *testing.T) {
			state := t.TempDir()
			name := unit(image, "fallen").Name
			cmd := exec.Command("/proc/self/exe", keeperArg, state, image.Content, "fallen")
			out, err := cmd.StdoutPipe()
			if err == nil {
				err = cmd.Start()
			}
			if err != nil {
				t.Fatal(err)
			}
			if step == "" {
				_, err = out.Read(make([]byte, 8))
			} else {
				until(t, step, func() (string, bool) {
					found, _ := filepath.Glob(filepath.Join(state, "work", name, step))
					return "", len(found) > 0
				})
			}
			if err := errors.Join(err, cmd.Process.Kill()); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait() // it was killed
			b := open(t, state)
			defer sweep(t, b, state)
			until(t, "running, or never there", func() (string, bool) {
				s := status(t, b, name)
				return fmt.Sprintf("%+v", s), s.Name == "" || s.State == backends.Running
			})
			if s := status(t, b, name); s.Name != "" && len(parts(s.PID, "runsc-sandbox")) != 1 {
				t.Errorf("sandboxes %v, want one", parts(s.PID, "runsc-sandbox"))
			}
		})
	}
}

func TestNoRuntime(t *testing.T) {
	for name, o := range map[string]Options{"runsc": {Runsc: "/none/runsc"}, "slirp4netns": {Slirp: "/none/slirp4netns"}} {
		o.State = t.TempDir()
		b, err := Open(o)
		if err != nil {
			t.Fatal(err)
		}
		_, err = b.Fingerprint(t.Context())
		if err == nil || !strings.Contains(err.Error(), "install the package "+name) {
			t.Errorf("the fingerprint's error is %v, want what to install", err)
		}
		err = b.Apply(t.Context(), unit(content(t), "relay", "wait"))
		if err == nil || errors.As(err, new(*backends.StartError)) || errors.As(err, new(*backends.FeatureError)) {
			t.Errorf("apply: %v, want an error that blames nobody", err)
		}
		sweep(t, b, o.State)
	}
}

func TestPortTaken(t *testing.T) {
	b := fresh(t)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	w := unit(content(t), "relay", "wait")
	w.Run.Ports = []backends.Port{{Name: "http", Port: 80, Host: taken.Addr().(*net.TCPAddr).Port}}
	err = b.Apply(t.Context(), w)
	if err == nil || errors.As(err, new(*backends.StartError)) || !strings.Contains(err.Error(), "taken") {
		t.Errorf("apply: %v, want that the port is taken", err)
	}
}

// An image that is gone keeps a workload from coming back, and no longer than that.
func TestImageVanished(t *testing.T) {
	b := fresh(t)
	image := content(t)
	w := unit(image, "relay", "wait")
	apply(t, b, w)
	says(t, b, w.Name, "waiting")
	if err := os.Rename(image.Content, image.Content+"-away"); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(status(t, b, w.Name).PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	until(t, "waiting for its image", func() (string, bool) {
		s := status(t, b, w.Name)
		return s.Detail, s.State == backends.Backoff && strings.Contains(s.Detail, image.Content)
	})
	if err := os.Rename(image.Content+"-away", image.Content); err != nil {
		t.Fatal(err)
	}
	apply(t, b, w)
	if s := status(t, b, w.Name); s.State != backends.Running {
		t.Errorf("it is %+v", s)
	}
}

// A sandbox that does not start a program blames the workload for what it cannot execute, and for nothing else.
func TestWhatIsBlamed(t *testing.T) {
	const starting = "starting container: starting root container: starting sandbox: "
	for text, want := range map[string]bool{
		starting + "creating process: failed to load /none: no such file or directory":           true,
		starting + "creating process: failed to load /app: exec format error; once more":         true,
		starting + "creating process: failed to load /app: permission denied":                    true,
		starting + "creating process: failed to load /app/x: not a directory":                    true,
		starting + `error finding executable "none" in PATH [/bin]: no such file or directory`:   true,
		starting + "creating process: failed to load /app: input/output error":                   false,
		starting + "creating process: failed to load /app: cannot allocate memory":               false,
		starting + "urpc method \"containerManager.StartRoot\" failed: EOF":                      false,
		"loading container: file does not exist":                                                 false,
		"context deadline exceeded\nsignal: killed":                                              false,
		"starting container: opening /run/user/none.sock: no such file or directory":             false,
		`cannot connect to control server: connecting to "none.sock": no such file or directory`: false,
	} {
		if got := unexecutable(text); got != want {
			t.Errorf("%q: blames the workload: %v, want %v", text, got, want)
		}
	}
}

// A program that cannot be executed is the workload's fault.
func TestNoSuchProgram(t *testing.T) {
	b := fresh(t)
	w := unit(content(t), "relay")
	w.Image.Config.Entrypoint = []string{"/none"}
	err := b.Apply(t.Context(), w)
	var fault *backends.StartError
	if !errors.As(err, &fault) || fault.Stage != "exec /none" {
		t.Errorf("apply: %v, want that /none cannot be executed", err)
	}
}

// What does not end is ended, in the sandbox too: what is left of it would be counted.
func TestHungCommands(t *testing.T) {
	b := fresh(t)
	w := unit(content(t), "relay", "wait")
	w.Resources.PIDs = 24
	apply(t, b, w)
	says(t, b, w.Name, "waiting")
	for range 6 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		if _, _, err := b.Exec(ctx, w.Name, []string{"/app", "say hung", "wait"}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("exec: %v, want its deadline", err)
		}
		cancel()
	}
	code, out, err := b.Exec(t.Context(), w.Name, []string{"/app", "say well"})
	if err != nil || code != 0 || string(out) != "well\n" {
		t.Errorf("exec: %d, %q, %v", code, out, err)
	}
	code, out, err = b.Exec(t.Context(), w.Name, []string{"/none"})
	if err != nil || code != statusGuest || !strings.Contains(string(out), "/none") {
		t.Errorf("exec of what is not there: %d, %q, %v", code, out, err)
	}
	hung := unit(content(t), "hung", "wait")
	hung.Hooks.PreInit = [][]string{{"/app", "wait"}}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	if err := b.Apply(ctx, hung); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("apply: %v, want its deadline", err)
	}
	if s := status(t, b, hung.Name); s.Name != "" {
		t.Errorf("it is there: %+v", s)
	}
}
