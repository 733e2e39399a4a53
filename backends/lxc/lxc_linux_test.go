package lxc

import (
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/conformance"
	"github.com/kindos/kmo/backends/process"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case process.StageArg:
			process.Stage()
		case GuestArg:
			os.Exit(Guest(os.Args[2:]))
		case backendArg:
			backend(os.Args[2:])
		}
	}
	for _, tool := range []string{"lxc-start", "lxc-attach", "slirp4netns"} {
		if _, err := exec.LookPath(tool); err != nil {
			fmt.Fprintln(os.Stderr, err, "- as root: apt-get install --no-install-recommends lxc slirp4netns")
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

func quickly(n int) time.Duration { return 10 * time.Millisecond << min(n, 6) }

func open(t testing.TB, state string) *Backend {
	t.Helper()
	b, err := Open(Options{State: state, Backoff: quickly})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// content puts the test program into a root file system.
func content(t testing.TB, program string) string {
	t.Helper()
	root := filepath.Join(t.TempDir(), "root")
	for _, dir := range []string{"etc", "tmp", "var", "proc", "dev"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(program)
	if err == nil {
		err = os.WriteFile(filepath.Join(root, "app"), text, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	return root
}

func TestConformance(t *testing.T) {
	root := content(t, conformance.Build(t, "linux", runtime.GOARCH))
	conformance.Test(t, func(t *testing.T) conformance.Subject {
		dir := t.TempDir()
		return conformance.Subject{
			Table:    "testdata/features",
			Open:     func(t *testing.T) backends.Backend { return open(t, dir) },
			At:       func(t *testing.T, state string) backends.Backend { return open(t, state) },
			Dies:     true,
			Images:   map[backends.Format]backends.Image{backends.OCI: {Content: root}, backends.LXC: {Content: root}},
			Leaks:    func(t *testing.T) []string { return leaks(dir) },
			Patience: time.Minute, // on a machine that others use, with the race detector, a start takes seconds
			Disk:     []string{dir, "/run/lxc", "/var/lib/lxc"},
			Stranger: func(t *testing.T) func(*testing.T) { return stranger(t, root) },
		}
	})
}

func TestDemo(t *testing.T) { conformance.Demo(t, Name, "") }

// leaks lists what is left of the workloads of a state folder on this host. A process of one has the folder among its mounts or in its
// command; a network is there as long as a process is in it.
func leaks(state string) (list []string) {
	group := "kmo/lxc-" + fmt.Sprintf("%x", sha256.Sum256([]byte(state)))[:8]
	for _, pattern := range []string{
		filepath.Join(state, "work", "*"), "/sys/fs/cgroup/" + group, "/sys/fs/cgroup/*/" + group, "/sys/fs/cgroup/*/lxc*", "/run/" + group + "/*",
		"/run/lxc/lock" + state, "/run/lxc/root",
	} {
		found, _ := filepath.Glob(pattern)
		list = append(list, found...)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return append(list, err.Error())
	}
	for line := range strings.SplitSeq(string(mounts), "\n") {
		if strings.Contains(line, state) || strings.Contains(line, "/run/lxc") {
			list = append(list, line)
		}
	}
	processes, _ := filepath.Glob("/proc/[0-9]*")
	for _, at := range processes {
		seen, _ := os.ReadFile(filepath.Join(at, "mountinfo"))
		line, _ := os.ReadFile(filepath.Join(at, "cmdline"))
		if strings.Contains(string(seen), state) || strings.Contains(string(line), state) {
			list = append(list, fmt.Sprintf("process %s %q", at, line))
		}
	}
	return list
}

// strangers is the configuration of a container that is nobody's here.
func strangers(root string) string {
	return "lxc.rootfs.path = dir:" + root + "\nlxc.rootfs.options = ro\nlxc.net.0.type = none\nlxc.apparmor.profile = unconfined\n" +
		"lxc.autodev = 0\nlxc.console.path = none\nlxc.pty.max = 0\n"
}

// stranger runs a container that somebody else has started by hand, and returns a check that it still runs.
func stranger(t *testing.T, root string) func(*testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "config"), []byte(strangers(root)), 0o600); err != nil {
		t.Fatal(err)
	}
	lxc := exec.Command("unshare", "-m", "sh", "-c", `mount -t tmpfs none /sys/fs/cgroup && mount -t tmpfs none /run/lxc && exec lxc-start -F -P "$1" -n stranger -f "$1/config" -- /app wait`, "sh", dir)
	lxc.Stderr = os.Stderr
	said, err := lxc.StdoutPipe()
	if err == nil {
		err = lxc.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := said.Read(make([]byte, 100)); err != nil {
		t.Fatalf("the stranger: %v", err)
	}
	return func(t *testing.T) {
		if err := lxc.Process.Signal(os.Interrupt); err != nil { // LXC passes it on to the container
			t.Errorf("the stranger: %v", err)
		}
		if err := lxc.Wait(); err != nil {
			t.Errorf("the stranger: %v", err)
		}
	}
}

// What is not there on this host is told of each workload that it concerns.
func TestUnapplied(t *testing.T) {
	b := open(t, t.TempDir())
	defer b.Close()
	t.Setenv("PATH", t.TempDir()) // without slirp4netns
	told := func(w backends.Workload, subject string) bool {
		return len(backends.Concerning(b.unapplied(w), subject)) > 0
	}
	if w := (backends.Workload{}); !told(w, "network") || !told(w, "apparmor") {
		t.Errorf("unapplied is %q, want the network and apparmor in it", b.unapplied(w))
	}
	if w := (backends.Workload{Security: backends.Security{Host: []string{"network"}}}); told(w, "network") {
		t.Errorf("in the host's network unapplied is %q", b.unapplied(w))
	}
}
