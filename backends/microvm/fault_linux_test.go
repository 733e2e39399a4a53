package microvm

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
	"syscall"
	"testing"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/microvm/channel"
	"github.com/kindos/kmo/backends/microvm/machine"
	"github.com/kindos/kmo/backends/process/stage"
	"github.com/kindos/kmo/registry/merkle"
)

// workload is one that runs steps of the suite's program.
func workload(unit string, steps ...string) backends.Workload {
	w := backends.Workload{
		Unit: unit, Backend: Name, Tier: 3, Format: backends.OCI, Image: backends.Image{Content: ground.image, ContentRoot: merkle.Digest{1}},
		Run: backends.Run{Args: steps, User: 65532, Grace: 2 * time.Second}, Resources: backends.Resources{Memory: 64 << 20, PIDs: 64},
	}
	w.Image.Config.Entrypoint = []string{"/app"}
	w.Spec = merkle.Digest{1: byte(len(steps)), 2: 7}
	w.Name = w.Unit + "-" + w.Spec.Short()
	return w
}

// begin opens a backend that is swept at the end: nothing may be left.
func begin(t testing.TB) (*Backend, string) {
	t.Helper()
	state := stateFolder(t)
	b := open(t, state)
	t.Cleanup(func() { sweep(t, b, state) })
	return b, state
}

func sweep(t testing.TB, b *Backend, state string) {
	t.Helper()
	list, err := b.Observe(context.Background())
	for _, s := range list {
		err = errors.Join(err, b.Remove(context.Background(), s.Name))
	}
	if err = errors.Join(err, b.Close()); err != nil {
		t.Error(err)
	}
	if left := leaks(state); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

func until(t testing.TB, what string, ask func() (string, bool)) {
	t.Helper()
	seen := ""
	for end := time.Now().Add(3 * time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		ok := false
		if seen, ok = ask(); ok {
			return
		}
	}
	t.Fatalf("%s: not within 3 min; last seen: %s", what, seen)
}

func status(t testing.TB, b *Backend, name string) backends.Status {
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

func logOf(t testing.TB, b *Backend, name string) string {
	t.Helper()
	r, err := b.Logs(t.Context(), name, backends.LogOptions{})
	if err != nil {
		return err.Error()
	}
	defer r.Close()
	text, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// emulator is the process of QEMU that a monitor started.
func emulator(t *testing.T, monitor int) int {
	t.Helper()
	return started(t, monitor, "qemu-system")
}

// started is a process that a monitor started, by the beginning of its name.
func started(t *testing.T, monitor int, name string) int {
	t.Helper()
	found, err := filepath.Glob("/proc/[0-9]*/status")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range found {
		text, err := os.ReadFile(path)
		if err == nil && strings.Contains(string(text), fmt.Sprintf("PPid:\t%d\n", monitor)) && strings.HasPrefix(string(text), "Name:\t"+name) {
			var pid int
			if _, err := fmt.Sscanf(path, "/proc/%d/", &pid); err != nil {
				t.Fatal(err)
			}
			return pid
		}
	}
	t.Fatalf("monitor %d has no %s", monitor, name)
	return 0
}

// A machine that is killed is told, and comes back.
func TestEmulatorKilled(t *testing.T) {
	b, _ := begin(t)
	w := workload("relay", "wait")
	if err := b.Apply(t.Context(), w); err != nil {
		t.Fatal(err)
	}
	before := status(t, b, w.Name)
	if err := syscall.Kill(emulator(t, before.PID), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	until(t, "it runs again", func() (string, bool) {
		s := status(t, b, w.Name)
		return fmt.Sprintf("%+v", s), s.State == backends.Running && s.Restarts == 1 && s.ExitCode == 137 && !s.OOM
	})
	if text := logOf(t, b, w.Name); !strings.Contains(text, "the machine: it ended by itself") {
		t.Errorf("the log does not tell: %q", text)
	}
}

// A machine that has lost one of its programs is told, and comes back with others. The second virtiofsd is in the first one's sandbox.
func TestProgramKilled(t *testing.T) {
	for program, words := range map[string]string{"slirp4netns": "the machine: slirp4netns ended", "virtiofsd": "virtiofsd ended: ", "virtiofsd/virtiofsd": "virtiofsd ended: "} {
		t.Run(program, func(t *testing.T) {
			b, _ := begin(t)
			w := workload("relay", "write /keep/x text", "cat /keep/x", "wait")
			w.Overlay.Keep = []string{"/keep"}
			if err := b.Apply(t.Context(), w); err != nil {
				t.Fatal(err)
			}
			reads := func(times int) {
				until(t, "its kept path", func() (string, bool) {
					text := logOf(t, b, w.Name)
					return text, strings.Count(text, `cat /keep/x: "text"`) == times
				})
			}
			reads(1)
			victim := status(t, b, w.Name).PID
			for part := range strings.SplitSeq(program, "/") {
				victim = started(t, victim, part)
			}
			if err := syscall.Kill(victim, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			reads(2)
			if s, text := status(t, b, w.Name), logOf(t, b, w.Name); s.Restarts != 1 || !strings.Contains(text, words) {
				t.Errorf("it is %+v, want it started again once; the log does not say %q: %q", s, words, text)
			}
		})
	}
}

// A boot that nobody waits for any more leaves nothing, at whatever moment.
func TestBootAbandoned(t *testing.T) {
	b, state := begin(t)
	w := workload("relay", "wait")
	for _, after := range []time.Duration{200 * time.Millisecond, time.Second, 3 * time.Second} {
		ctx, cancel := context.WithTimeout(t.Context(), after)
		err := b.Apply(ctx, w)
		cancel()
		if err == nil {
			continue // it was quicker
		}
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("abandoned after %v: %v", after, err)
		}
		if left := leaks(state); len(left) > 0 {
			t.Errorf("abandoned after %v: left behind: %q", after, left)
		}
	}
}

// keeperArg is the first argument of a process that is only keeper.
const keeperArg = "test-keeper"

// keeper is a backend of its own process, which applies one workload and stays.
func keeper(state string, w world) {
	ground = w
	b, err := Open(options(state))
	if err == nil {
		hooked := workload("relay", "wait")
		hooked.Hooks.PreInit = [][]string{{"/app", "say before"}}
		err = b.Apply(context.Background(), hooked)
	}
	fmt.Println("applied", err)
	time.Sleep(time.Hour)
}

// Whatever a start has come to when the backend's process is killed, the next one has the machine once, or not at all.
func TestKilledAtEachStep(t *testing.T) {
	for _, step := range []string{"cache/*", "machines/work/*/record.json", "machines/work/*/own/spec.json", "machines/work/*/own/*.sock", "machines/work/*/own/" + usageFile, ""} {
		t.Run("killed at "+step, func(t *testing.T) {
			state := t.TempDir()
			cmd := exec.Command("/proc/self/exe", keeperArg, state, ground.guest, ground.image, ground.home)
			out, err := cmd.StdoutPipe()
			if err == nil {
				err = cmd.Start()
			}
			if err != nil {
				t.Fatal(err)
			}
			applied := make(chan struct{})
			go func() {
				defer close(applied)
				_, _ = out.Read(make([]byte, 8)) // or it was killed before
			}()
			until(t, step, func() (string, bool) {
				found, _ := filepath.Glob(filepath.Join(state, step))
				select {
				case <-applied:
					return "", true
				default:
					return "", step != "" && len(found) > 0
				}
			})
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait() // it was killed
			b := open(t, state)
			defer sweep(t, b, state)
			w := workload("relay", "wait")
			until(t, "running, or never there", func() (string, bool) {
				s := status(t, b, w.Name)
				return fmt.Sprintf("%+v", s), s.Name == "" || s.State == backends.Running
			})
			if s := status(t, b, w.Name); s.Name != "" {
				emulator(t, s.PID)
			}
		})
	}
}

// A port that another program has is nobody's fault, and nothing is started.
func TestPortTaken(t *testing.T) {
	b, _ := begin(t)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := workload("relay", "serve http", "wait")
	w.Run.Ports = []backends.Port{{Name: "http", Port: 80, Host: listener.Addr().(*net.TCPAddr).Port}}
	var fault *backends.StartError
	if err := b.Apply(t.Context(), w); err == nil || errors.As(err, &fault) || !strings.Contains(err.Error(), "taken") {
		t.Errorf("apply: %v", err)
	}
	if err := listener.Close(); err != nil {
		t.Fatal(err)
	}
	if err := b.Apply(t.Context(), w); err != nil {
		t.Error(err)
	}
}

// While nobody trims a log it does not grow for ever, and what is written when there is room again is in it.
func TestLogIsBoundedWithoutAnAgent(t *testing.T) {
	state := stateFolder(t)
	b := open(t, state)
	w := workload("loud", "tick")
	if err := b.Apply(t.Context(), w); err != nil {
		t.Fatal(err)
	}
	s := status(t, b, w.Name)
	if got := strings.Join(s.Unapplied, "\n"); strings.Contains(got, "log") {
		t.Errorf("unapplied: %q", got)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	const bound = 16 * 8 << 20
	log := filepath.Join(state, "machines/work", w.Name, "log")
	if err := os.Truncate(log, bound-3); err != nil {
		t.Fatal(err)
	}
	var size int64
	until(t, "a log that is full", func() (string, bool) {
		found, err := os.Stat(log)
		if err == nil {
			size = found.Size()
		}
		return fmt.Sprint(size, err), size > bound-3
	})
	if size != bound { // a line has more than 3 bytes
		t.Errorf("the log has %d bytes, want %d", size, bound)
	}
	b = open(t, state)
	defer sweep(t, b, state)
	until(t, "the program's next line", func() (string, bool) {
		text, err := os.ReadFile(log)
		return fmt.Sprint(len(text), err), len(text) < 1<<20 && strings.Contains(string(text), "tick ")
	})
	if again := status(t, b, w.Name); again.PID != s.PID || again.State != backends.Running {
		t.Errorf("it is %+v, was %+v", again, s)
	}
}

// What a host lacks is said, and what to install.
func TestMissing(t *testing.T) {
	for _, test := range []struct {
		change func(o *Options)
		want   string
	}{
		{func(o *Options) { o.Kernel = filepath.Join(o.State, "none") }, "no such file"},
		{func(o *Options) { o.Kernel = "/etc/passwd" }, "is no kernel"},
		{func(o *Options) { o.Guest = filepath.Join(o.State, "none") }, "no such file"},
		{func(o *Options) { o.VMM = filepath.Join(o.State, "none") }, "no such file"},
	} {
		state := stateFolder(t)
		o := options(state)
		test.change(&o)
		b, err := Open(o)
		if err != nil {
			t.Fatal(err)
		}
		err = b.Apply(t.Context(), workload("relay", "wait"))
		var fault *backends.StartError
		var lacks *backends.FeatureError
		if err == nil || errors.As(err, &fault) || errors.As(err, &lacks) || !strings.Contains(err.Error(), test.want) {
			t.Errorf("apply: %v, want %q and nobody blamed", err, test.want)
		}
		sweep(t, b, state)
	}
	empty := tools{}
	if err := empty.check(); err == nil || !strings.Contains(err.Error(), "qemu-system-x86") {
		t.Errorf("without QEMU: %v", err)
	}
}

// A hook that hangs is ended in the machine, too: the processes inside are the program's alone afterwards.
func TestCommandEnded(t *testing.T) {
	b, _ := begin(t)
	w := workload("relay", "wait")
	if err := b.Apply(t.Context(), w); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if _, _, err := b.Exec(ctx, w.Name, []string{"/app", "fork 3", "wait"}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("exec: %v", err)
	}
	until(t, "what it started has ended", func() (string, bool) {
		s := status(t, b, w.Name)
		return fmt.Sprintf("%+v", s.Usage), s.Usage.PIDs > 0 && s.Usage.PIDs < 12
	})
	status, output, err := b.Exec(t.Context(), w.Name, []string{"/none"})
	if err != nil || status != 127 || !strings.Contains(string(output), "/none") {
		t.Errorf("a program that is not there: %d %q %v", status, output, err)
	}
}

// Commands leave nothing open in process 1 of a machine, not those that cannot be run either.
func TestCommandsLeaveNothingOpen(t *testing.T) {
	with, config := bareConfig(t, workload("relay").Image)
	config.Dir = t.TempDir()
	t.Chdir(config.Dir)
	m := &bare{vmm: &machine.QEMU{Program: with.vmm, KVM: with.kvm}}
	defer m.vmm.Stop()
	if err := m.start(config, func(o *stage.Orders) {
		o.Confine.User = 0 // process 1 is root's
		o.Root.Binds = append(o.Root.Binds, stage.Bind{From: "/proc", To: "/machine"})
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := m.wait(channel.Started, 0, ""); err != nil {
		t.Fatal(err)
	}
	next := uint32(0)
	run := func(done channel.Kind, argv ...string) string {
		t.Helper()
		next++
		if err := m.Say(channel.Exec, next, argv); err != nil {
			t.Fatal(err)
		}
		said, err := m.wait(done, next, "")
		if err != nil {
			t.Fatal(err)
		}
		return said
	}
	count := func() (open int) {
		t.Helper()
		said := run(channel.Ended, "/probe", "count", "/machine/1/fd")
		if _, err := fmt.Sscan(said, &open); err != nil || open < 4 {
			t.Fatalf("process 1 has %q open", said)
		}
		return open
	}
	before := count()
	for range 150 {
		run(channel.Ended, "/app", "say it")
		run(channel.Fault, "/none")
	}
	if after := count(); after > before+4 {
		t.Errorf("process 1 has %d open, had %d", after, before)
	}
}

// The fault of an image is the workload's.
func TestBlame(t *testing.T) {
	b, _ := begin(t)
	w := workload("relay", "wait")
	w.Image.Config.Entrypoint = []string{"/none"}
	var fault *backends.StartError
	if err := b.Apply(t.Context(), w); !errors.As(err, &fault) || fault.Stage != "exec /none" {
		t.Errorf("apply: %v", err)
	}
}

// An image that vanishes is told at the next start, and what runs goes on.
func TestImageVanishes(t *testing.T) {
	b, state := begin(t)
	image := filepath.Join(state, "image")
	if err := os.CopyFS(image, os.DirFS(ground.image)); err != nil {
		t.Fatal(err)
	}
	w := workload("relay", "wait")
	w.Image.Content, w.Image.ContentRoot = image, merkle.Digest{} // not from the cache
	if err := b.Apply(t.Context(), w); err != nil {
		t.Fatal(err)
	}
	before := status(t, b, w.Name)
	if err := os.RemoveAll(image); err != nil {
		t.Fatal(err)
	}
	if s := status(t, b, w.Name); s.State != backends.Running || s.PID != before.PID {
		t.Errorf("it is %+v", s)
	}
	if err := syscall.Kill(before.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	until(t, "it is told", func() (string, bool) {
		s := status(t, b, w.Name)
		return fmt.Sprintf("%+v", s), s.State == backends.Backoff && strings.Contains(s.Detail, "content is not at")
	})
}

// Firecracker is booted for real where it and KVM are.
func TestFirecracker(t *testing.T) {
	path := look("firecracker")
	if tried := find(Options{VMM: path}); path == "" || !tried.kvm {
		t.Logf("not booted: firecracker is at %q, KVM runs a guest's kernel: %t; the requests were held against its description only", path, tried.kvm)
		return
	}
	state := stateFolder(t)
	o := options(state)
	o.VMM = path
	b, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	defer sweep(t, b, state)
	w := workload("relay", "serve http", "wait")
	w.Run.Ports = []backends.Port{{Name: "http", Port: 80}}
	if err := b.Apply(t.Context(), w); err != nil {
		t.Fatal(err)
	}
	until(t, "an answer", func() (string, bool) {
		s := status(t, b, w.Name)
		conn, err := net.Dial("tcp", s.Addresses[0].Address)
		if err != nil {
			return err.Error(), false
		}
		defer conn.Close()
		if _, err := io.WriteString(conn, "GET / HTTP/1.0\r\n\r\n"); err != nil {
			return err.Error(), false
		}
		text, err := io.ReadAll(conn)
		return fmt.Sprint(string(text), err), strings.Contains(string(text), "200 OK")
	})
	t.Log("booted by", path)
}
