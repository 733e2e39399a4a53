package gvisor

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	goruntime "runtime"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/conformance"
	"github.com/kindos/kmo/backends/process"
	"github.com/kindos/kmo/registry/merkle"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == process.StageArg {
		process.Stage()
	}
	if len(os.Args) > 1 && os.Args[1] == GuestArg {
		os.Exit(Guest(os.Args[2:]))
	}
	if len(os.Args) > 1 && os.Args[1] == keeperArg {
		keeper(os.Args[2:])
	}
	if os.Getenv(inside) == "" {
		os.Exit(elsewhere())
	}
	os.Exit(m.Run())
}

// inside is set where these tests run.
const inside = "KMO_TEST_INSIDE"

// elsewhere runs these tests in namespaces of their own, with which all that they start and mount goes, however they end: sandboxes
// outlive whoever has started them.
func elsewhere() int {
	const prepare = `mount --make-rprivate / && mount -t proc proc /proc && "$@"`
	self := exec.Command("/bin/sh", append([]string{"-c", prepare, "sh", os.Args[0]}, os.Args[1:]...)...)
	self.Stdin, self.Stdout, self.Stderr, self.Env = os.Stdin, os.Stdout, os.Stderr, append(os.Environ(), inside+"=1")
	goruntime.LockOSThread() // the child dies with the thread that started it
	self.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID, Pdeathsig: syscall.SIGKILL}
	err := self.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		fmt.Fprintln(os.Stderr, "running the tests in namespaces of their own, which needs root:", err)
		return 1
	}
	return self.ProcessState.ExitCode()
}

// variable names another runsc than the one in PATH to test with.
const variable = "KMO_TEST_RUNSC"

func open(t testing.TB, state string) *Backend {
	t.Helper()
	b, err := Open(Options{State: state, Runsc: os.Getenv(variable), Backoff: func(n int) time.Duration { return 10 * time.Millisecond << min(n, 6) }})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// content puts the test program into a root file system.
func content(t testing.TB) backends.Image {
	t.Helper()
	program := conformance.Build(t, "linux", goruntime.GOARCH)
	root := filepath.Join(t.TempDir(), "root")
	for _, dir := range []string{"etc", "tmp", "var"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "app"), text, 0o755); err != nil {
		t.Fatal(err)
	}
	return backends.Image{Content: root, Config: backends.ImageConfig{Entrypoint: []string{"/app"}}}
}

func TestConformance(t *testing.T) {
	image := content(t)
	conformance.Test(t, func(t *testing.T) conformance.Subject {
		dir := t.TempDir()
		return conformance.Subject{
			Table:    "testdata/features",
			Open:     func(t *testing.T) backends.Backend { return open(t, dir) },
			At:       func(t *testing.T, state string) backends.Backend { return open(t, state) },
			Dies:     true,
			Images:   map[backends.Format]backends.Image{backends.OCI: {Content: image.Content}},
			Patience: time.Minute,
			Disk:     []string{dir},
			Leaks:    func(t *testing.T) []string { return leaks(dir) },
			Stranger: func(t *testing.T) func(*testing.T) { return stranger(t, image) },
		}
	})
}

func TestDemo(t *testing.T) { conformance.Demo(t, Name, os.Getenv(variable)) }

// own is the name of what belongs to a state folder.
func own(state string) string {
	return "gvisor-" + fmt.Sprintf("%x", sha256.Sum256([]byte(state)))[:8]
}

// leaks lists what is left of the workloads of a state folder on this host. What lives is in its cgroup, which then is left too.
func leaks(state string) (list []string) {
	for _, pattern := range []string{
		filepath.Join(state, "work", "*"), filepath.Join(state, "measure-*"), "/run/kmo/" + own(state), "/dev/shm/kmo/" + own(state),
		"/sys/fs/cgroup/kmo/" + own(state), "/sys/fs/cgroup/*/kmo/" + own(state), // version 2, version 1
		"/var/run/runsc/*", "/run/runsc*",
	} {
		found, _ := filepath.Glob(pattern)
		list = append(list, found...)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || bytes.Contains(mounts, []byte(state)) {
		list = append(list, fmt.Sprint("a mount here, ", err))
	}
	return append(list, processes(state)...)
}

// processes lists whoever has a folder among its mounts, its words or as its own.
func processes(folder string) (list []string) {
	found, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range found {
		line, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		mounts, _ := os.ReadFile(filepath.Join(dir, "mountinfo"))
		at, _ := os.Readlink(filepath.Join(dir, "cwd"))
		if strings.Contains(string(line)+string(mounts)+at, folder) {
			list = append(list, fmt.Sprintf("process %s %q", dir, line))
		}
	}
	return list
}

// unit is a workload of a unit whose program runs the steps.
func unit(image backends.Image, name string, steps ...string) backends.Workload {
	return backends.Workload{
		Name: name + "-00000001", Unit: name, Spec: merkle.Digest{1}, Format: backends.OCI, Image: image,
		Run:       backends.Run{Args: steps, User: 65532, Grace: 2 * time.Second},
		Resources: backends.Resources{CPU: 1000, Memory: 64 << 20, PIDs: 64},
	}
}

// stranger runs a workload of another state folder, and returns a check that it still runs.
func stranger(t *testing.T, image backends.Image) func(*testing.T) {
	b := open(t, t.TempDir())
	w := unit(image, "stranger", "wait")
	if err := b.Apply(t.Context(), w); err != nil {
		t.Fatal(err)
	}
	before, err := b.Observe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return func(t *testing.T) {
		after, err := b.Observe(t.Context())
		if err != nil || len(after) != 1 || after[0].PID != before[0].PID || after[0].State != backends.Running {
			t.Errorf("the stranger is %+v, was %+v; %v", after, before, err)
		}
		if err := b.Remove(t.Context(), w.Name); err != nil {
			t.Error(err)
		}
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	}
}
