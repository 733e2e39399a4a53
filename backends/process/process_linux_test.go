package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
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
	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/registry/merkle"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == StageArg {
		Stage()
	}
	if len(os.Args) > 3 && os.Args[1] == monitorArg {
		os.Exit(monitored(os.Args[2], os.Args[3], os.Args[4:]))
	}
	if len(os.Args) > 1 && os.Args[1] == keeperArg {
		keeper(os.Args[2:])
	}
	os.Exit(testMain(m))
}

// testMain builds the probe once for all tests.
func testMain(m *testing.M) int {
	if probe() != "" { // this process was started by a test
		return m.Run()
	}
	dir, err := os.MkdirTemp("", "probe")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		panic(err)
	}
	build := exec.Command("go", "build", "-o", filepath.Join(dir, "probe"), "./testdata/probe")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if output, err := build.CombinedOutput(); err != nil {
		panic(fmt.Sprintf("%v\n%s", err, output))
	}
	if err := os.Setenv("KMO_TEST_PROBE", filepath.Join(dir, "probe")); err != nil {
		panic(err)
	}
	return m.Run()
}

func probe() string { return os.Getenv("KMO_TEST_PROBE") }

// keeperArg makes the test binary a process with a keeper: state folder, then a step at which it is to be killed, then the unit and
// the probe's steps. Without a step it prints "applied" and waits to be killed.
const keeperArg = "test-keeper"

func keeper(args []string) {
	k, err := Open(options(args[0]))
	if err == nil {
		k.step = func(step string) {
			if step == args[1] {
				_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			}
		}
		err = k.Apply(context.Background(), workload(args[2], args[3:]...))
	}
	if err == nil && args[2] == "asked" {
		go k.Exec(context.Background(), workload(args[2]).Name, []string{"/app", "child asked-mark", "wait asked-mark"})
	}
	fmt.Println("applied", err)
	time.Sleep(time.Hour)
}

const testLog = 1 << 20

func options(state string) Options {
	return Options{Backend: "probe", State: state, LogSize: testLog, Plan: plan, Backoff: func(n int) time.Duration { return 5 * time.Millisecond << min(n, 5) }}
}

func plan(_ context.Context, w backends.Workload, _ Place) (Program, error) {
	p := Program{Argv: w.Argv(), Env: w.Env(), Dir: w.Run.Dir}
	if w.Format == backends.OCI {
		p.Root = w.Image.Content
	} else {
		p.Binds = []Bind{{From: w.Image.Content, To: "/app"}}
	}
	return p, nil
}

func workload(unit string, steps ...string) backends.Workload {
	w := backends.Workload{
		Name: unit + "-00000001", Unit: unit, Spec: merkle.Digest{1}, Format: backends.Native,
		Image:     backends.Image{Content: probe(), Config: backends.ImageConfig{Entrypoint: []string{"/app"}}},
		Run:       backends.Run{Args: steps, User: 65532, Grace: 2 * time.Second},
		Resources: backends.Resources{CPU: 1000, Memory: 64 << 20, PIDs: 64},
	}
	return w
}

func start(t testing.TB, state string) *Keeper {
	t.Helper()
	k, err := Open(options(state))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := k.Close(); err != nil {
			t.Error(err)
		}
	})
	return k
}

// fresh is a keeper over a new folder whose workloads are removed, and looked for, at the end.
func fresh(t testing.TB) *Keeper {
	t.Helper()
	k := start(t, t.TempDir())
	t.Cleanup(func() { sweep(t, k) })
	return k
}

// sweep removes all and fails for whatever is left.
func sweep(t testing.TB, k *Keeper) {
	t.Helper()
	list, err := k.Observe(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range list {
		if err := k.Remove(context.Background(), s.Name); err != nil {
			t.Errorf("removing %s: %v", s.Name, err)
		}
	}
	for _, left := range leaks(k.options.State) {
		t.Errorf("left behind: %s", left)
	}
	if names := k.groups.Names(); len(names) > 0 {
		t.Errorf("cgroups left behind: %v", names)
	}
}

// leaks names the folders, mounts and processes of a state folder.
func leaks(state string) (list []string) {
	list, _ = filepath.Glob(filepath.Join(state, "work", "*"))
	found, _ := filepath.Glob("/proc/[0-9]*/mountinfo")
	for _, path := range append(found, "/proc/self/mountinfo") {
		text, err := os.ReadFile(path)
		if err == nil && bytes.Contains(text, []byte(state)) {
			line, _ := os.ReadFile(filepath.Join(filepath.Dir(path), "cmdline"))
			list = append(list, fmt.Sprintf("%s %q", path, line))
		}
	}
	return list
}

func apply(t testing.TB, k *Keeper, w backends.Workload) {
	t.Helper()
	if err := k.Apply(context.Background(), w); err != nil {
		t.Fatalf("apply %s: %v", w.Name, err)
	}
}

func status(t testing.TB, k *Keeper, name string) backends.Status {
	t.Helper()
	list, err := k.Observe(context.Background())
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

// until asks until the answer is yes; ask also says what was seen.
func until(t testing.TB, wanted string, ask func() (string, bool)) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		seen, ok := ask()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 20 s; last seen: %s", wanted, seen)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func logOf(k *Keeper, name string) string {
	var text bytes.Buffer
	r, err := k.Logs(context.Background(), name, backends.LogOptions{})
	if err != nil {
		return err.Error()
	}
	defer r.Close()
	_, _ = text.ReadFrom(r)
	return text.String()
}

// said waits for the probe's line on a step, and returns what it says.
func said(t testing.TB, k *Keeper, name, step string) string {
	t.Helper()
	var rest string
	until(t, "a line on "+step, func() (string, bool) {
		text := logOf(k, name)
		for line := range strings.SplitSeq(text, "\n") {
			if after, ok := strings.CutPrefix(line, step+": "); ok {
				rest = after
				return text, true
			}
		}
		return text, false
	})
	return rest
}

// processes counts who has the mark in its arguments, except stages.
func processes(mark string) (pids []int) {
	found, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range found {
		text, err := os.ReadFile(path)
		if err != nil || !bytes.Contains(text, []byte(mark)) || bytes.Contains(text, []byte(keeperArg)) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

func stages() (pids []int) { return processes("\x00" + StageArg + "\x00") }

// oci makes a root file system of the probe, with a set-uid copy of it.
func oci(t testing.TB) string {
	t.Helper()
	root := filepath.Join(t.TempDir(), "root")
	for _, dir := range []string{"etc", "tmp", "usr/lib", "var/lib/data"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(probe())
	if err != nil {
		t.Fatal(err)
	}
	for name, mode := range map[string]os.FileMode{"app": 0o755, "suid": 0o755 | os.ModeSetuid} {
		if err := os.WriteFile(filepath.Join(root, name), text, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(filepath.Join(root, name), mode); err != nil {
			t.Fatal(err)
		}
	}
	for link, to := range map[string]string{"lib": "usr/lib", "outside": "/etc/../../../etc", "away": "../../../.."} {
		if err := os.Symlink(to, filepath.Join(root, link)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(root, "etc/hello"), []byte("hello"), 0o666); err != nil {
		t.Fatal(err)
	}
	return root
}

func TestConfinement(t *testing.T) {
	listener, err := (&netListener{}).abstract("kmo-test-abstract")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	k := fresh(t)
	w := workload("caged")
	w.Format, w.Image.Content = backends.OCI, oci(t)
	tests := []struct{ name, step, want string }{
		{"mount", "mount", "error: operation not permitted"},
		{"making the root writable", "remount", "error: operation not permitted"},
		{"a user namespace", "unshare", "error: operation not permitted"},
		{"a user namespace by clone", "clone", "error: fork/exec /app: operation not permitted"},
		{"clone3, whose flags no filter sees", "clone3", "answered ENOSYS"},
		{"ptrace", "ptrace", "error: operation not permitted"},
		{"bpf", "bpf", "answered EPERM"},
		{"keys", "keyctl", "error: operation not permitted"},
		{"vsock", "vsock", "error: address family not supported by protocol"},
		{"a car's bus", "socket 29", "error: address family not supported by protocol"},
		{"a local socket", "socket 1", "ok"},
		{"typing into a terminal", "tiocsti", "answered EPERM"},
		{"an abstract socket of the host", "abstract kmo-test-abstract", "error: dial unix @kmo-test-abstract: connect: operation not permitted"},
		{"a device node", "mknod /tmp/null", "error: read-only file system"},
		{"a file of the host", "read " + probe(), "error: open " + probe() + ": no such file or directory"},
		{"U-05 a link that points out stays in", "read /outside/hello", `ok "hello"`},
		{"U-05 a link with too many .. stays in", "read /away/etc/hello", `ok "hello"`},
		{"T56 a file of the base", "write /etc/hello", "error: open /etc/hello: read-only file system"},
		{"T56 a new file in the base", "write /tmp/new", "error: open /tmp/new: read-only file system"},
		{"T56 the mode of the base", "chmod /app", "error: chmod /app: read-only file system"},
		{"a setting of the kernel", "write /proc/sys/kernel/core_pattern", "error: open /proc/sys/kernel/core_pattern: read-only file system"},
		{"memory by way of /proc", "write /proc/1/mem", "error: open /proc/1/mem: read-only file system"},
		{"capabilities", "status CapEff", "0000000000000000"},
		{"capabilities to be had", "status CapBnd", "0000000000000000"},
		{"capabilities to be inherited", "status CapInh", "0000000000000000"},
		{"ambient capabilities", "status CapAmb", "0000000000000000"},
		{"no new privileges", "status NoNewPrivs", "1"},
		{"the filter", "status Seccomp", "2"},
		{"groups", "status Groups", ""},
		{"T54 a set-uid program gains nothing", "suid", "id: 65532 65532"},
		{"user, group and process id", "id", "65532 65532 1"},
		{"umask", "umask", "022"},
		{"cores", "core", "0 0"},
		{"the name of the host", "host", "caged-00000001"},
		{"other processes", "list /proc/[0-9]*", "/proc/1"},
		{"devices", "list /dev/*", "/dev/fd /dev/full /dev/null /dev/random /dev/stderr /dev/stdin /dev/stdout /dev/urandom /dev/zero"},
		{"open files", "fds", "0=null 1=log 2=log"},
		{"an environment of its own", "env", "KMO_PORT_WEB_UI=18234|PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
	}
	if runtime.GOARCH == "amd64" {
		tests = append(tests, struct{ name, step, want string }{"another table of calls", "x32", "answered ENOSYS"})
	}
	for _, test := range tests {
		w.Run.Args = append(w.Run.Args, test.step)
	}
	w.Run.Args = append(w.Run.Args, "wait")
	w.Run.Ports = []backends.Port{{Name: "web-ui", Port: 18234}}
	apply(t, k, w)
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got := said(t, k, w.Name, test.step)
			if test.step == "suid" {
				got = got[:max(strings.LastIndexByte(got, ' '), 0)] // without its process id
			}
			if got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
	if s := status(t, k, w.Name); len(s.Unapplied) > 0 {
		t.Errorf("unapplied: %q", s.Unapplied)
	}
}

// uid 0 inside is the host's uid 0, so what keeps it is not its number.
func TestRootInsideGainsNothing(t *testing.T) {
	k := fresh(t)
	w := workload("rooted", "status CapEff", "mount", "write /proc/sys/kernel/core_pattern", "chmod /app", "ptrace", "wait")
	w.Format, w.Image.Content, w.Run.User = backends.OCI, oci(t), 0
	apply(t, k, w)
	for step, want := range map[string]string{
		"status CapEff":                       "0000000000000000",
		"mount":                               "error: operation not permitted",
		"write /proc/sys/kernel/core_pattern": "error: open /proc/sys/kernel/core_pattern: read-only file system",
		"chmod /app":                          "error: chmod /app: read-only file system",
		"ptrace":                              "error: operation not permitted",
	} {
		if got := said(t, k, w.Name, step); got != want {
			t.Errorf("%s: got %q, want %q", step, got, want)
		}
	}
}

func TestFilesAndMounts(t *testing.T) {
	k := fresh(t)
	host := t.TempDir()
	if err := os.WriteFile(filepath.Join(host, "note"), []byte("from the host"), 0o644); err != nil {
		t.Fatal(err)
	}
	w := workload("filed", "read /lib/relay.toml", "read /usr/lib/relay.toml", "write /lib/relay.toml", "rename /lib/relay.toml /tmp/x",
		"read /mnt/note", "write /mnt/note", "write /keep/a/new", "write /tmp/new", "write /new", "status Umask", "wait")
	w.Format, w.Image.Content = backends.OCI, oci(t)
	w.Overlay = backends.Overlay{Size: 1 << 20, Keep: []string{"/keep/a"}}
	w.Files = []backends.File{{To: "/lib/relay.toml", Mode: 0o640, Content: []byte("level = 1")}}
	w.Mounts = []backends.Mount{{From: host, To: "/mnt", ReadOnly: true}}
	apply(t, k, w)
	for _, test := range []struct{ name, step, want string }{
		{"P-07 a file is there, through a link of the image", "read /lib/relay.toml", `ok "level = 1"`},
		{"P-07 it is where the link points", "read /usr/lib/relay.toml", `ok "level = 1"`},
		{"P-07 it cannot be written", "write /lib/relay.toml", "error: open /lib/relay.toml: read-only file system"},
		{"P-07 it cannot be moved away", "rename /lib/relay.toml /tmp/x", "error: rename /lib/relay.toml /tmp/x: permission denied"},
		{"a mount is there", "read /mnt/note", `ok "from the host"`},
		{"a read-only mount is", "write /mnt/note", "error: open /mnt/note: read-only file system"},
		{"a kept path can be written", "write /keep/a/new", "ok"},
		{"the overlay can be written", "write /tmp/new", "ok"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := said(t, k, w.Name, test.step); got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
	if _, err := os.Stat(filepath.Join(w.Image.Content, "tmp/new")); err == nil {
		t.Error("T56 what was written reached the base")
	}

	t.Run("U-05 a mount by way of a link", func(t *testing.T) {
		link := filepath.Join(t.TempDir(), "link")
		if err := os.Symlink(host, link); err != nil {
			t.Fatal(err)
		}
		bad := workload("linked", "wait")
		bad.Mounts = []backends.Mount{{From: link, To: "/mnt"}}
		var fault *backends.StartError
		if err := k.Apply(t.Context(), bad); !errors.As(err, &fault) {
			t.Fatalf("got %v, want a *StartError", err)
		}
		if s := status(t, k, bad.Name); s.Name != "" {
			t.Errorf("it is there: %+v", s)
		}
	})
	t.Run("U-05 a file by way of a link to a descriptor", func(t *testing.T) {
		bad := workload("streamed", "wait")
		bad.Format, bad.Image.Content = backends.OCI, oci(t)
		bad.Files = []backends.File{{To: "/etc/relay.toml", Mode: 0o644, Content: []byte("level = 1")}}
		if err := os.Symlink("/dev/stdout", filepath.Join(bad.Image.Content, "etc/relay.toml")); err != nil {
			t.Fatal(err)
		}
		var fault *backends.StartError
		if err := k.Apply(t.Context(), bad); !errors.As(err, &fault) || !strings.Contains(err.Error(), "want a path outside /dev and /proc") {
			t.Fatalf("got %v, want a *StartError", err)
		}
	})
	t.Run("U-05 a mount by way of a link in a kept path", func(t *testing.T) {
		bad := workload("planted", "wait")
		bad.Format, bad.Image.Content = backends.OCI, oci(t)
		bad.Overlay.Keep = []string{"/keep"}
		bad.Mounts = []backends.Mount{{From: host, To: "/deep"}}
		kept := k.keptPath(bad.Unit, "/keep")
		for _, err := range []error{
			os.Symlink("/keep/sub", filepath.Join(bad.Image.Content, "deep")), os.MkdirAll(kept, 0o755), os.Symlink(t.TempDir(), filepath.Join(kept, "sub")),
		} {
			if err != nil {
				t.Fatal(err)
			}
		}
		var fault *backends.StartError
		if err := k.Apply(t.Context(), bad); !errors.As(err, &fault) || !strings.Contains(err.Error(), "/deep: in the image it is /keep/sub, within /keep") {
			t.Fatalf("got %v, want a *StartError", err)
		}
	})
	t.Run("T42 paths", func(t *testing.T) {
		for _, change := range []func(*backends.Workload){
			func(w *backends.Workload) { w.Files[0].To = "/etc/../x" },
			func(w *backends.Workload) { w.Files[0].To = "etc/x" },
			func(w *backends.Workload) { w.Files[0].To = "/proc/x" },
			func(w *backends.Workload) { w.Files[0].To = "/keep/a/x" },
			func(w *backends.Workload) { w.Files[0].To = "/a\nb" },
			func(w *backends.Workload) { w.Overlay.Keep = []string{"/"} },
			func(w *backends.Workload) { w.Mounts[0].From = k.options.State },
			func(w *backends.Workload) { w.Mounts[0].From = filepath.Dir(k.options.State) },
			func(w *backends.Workload) { w.Name = "../x" },
			func(w *backends.Workload) { w.Unit = ".." },
			func(w *backends.Workload) { w.Run.User = -1 },
			func(w *backends.Workload) { w.Run.User = 1 << 31 },
		} {
			bad := w
			bad.Name = "other-00000002"
			bad.Files = append([]backends.File(nil), w.Files...)
			bad.Mounts = append([]backends.Mount(nil), w.Mounts...)
			change(&bad)
			if err := k.Apply(t.Context(), bad); refusal.Of(err) == nil {
				t.Errorf("%q %+v: got %v, want a refusal", bad.Name, bad.Files[0].To, err)
			}
		}
	})
}
