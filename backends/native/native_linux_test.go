package native

import (
	"crypto/sha256"
	"fmt"
	"os"
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
	if len(os.Args) > 1 && os.Args[1] == process.StageArg {
		process.Stage()
	}
	os.Exit(m.Run())
}

func open(t testing.TB, state string) *Backend {
	t.Helper()
	b, err := Open(Options{State: state, Backoff: func(n int) time.Duration { return 10 * time.Millisecond << min(n, 6) }})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// content puts the test program into a root file system, and returns both forms.
func content(t testing.TB) map[backends.Format]backends.Image {
	program := conformance.Build(t, "linux", runtime.GOARCH)
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
	return map[backends.Format]backends.Image{backends.OCI: {Content: root}, backends.Native: {Content: program}}
}

func TestConformance(t *testing.T) {
	images := content(t)
	conformance.Test(t, func(t *testing.T) conformance.Subject {
		dir := t.TempDir()
		return conformance.Subject{
			Open:     func(t *testing.T) backends.Backend { return open(t, dir) },
			At:       func(t *testing.T, state string) backends.Backend { return open(t, state) },
			Dies:     true,
			Images:   images,
			Table:    "testdata/features",
			Disk:     []string{dir},
			Leaks:    func(t *testing.T) []string { return leaks(dir) },
			Stranger: func(t *testing.T) func(*testing.T) { return stranger(t, images[backends.Native]) },
		}
	})
}

// leaks lists what is left of the workloads of a state folder on this host. A program that lives is in its cgroup, which then is
// left too; a stage that is not yet has the state folder among its mounts.
func leaks(state string) (list []string) {
	group := "kmo/native-" + fmt.Sprintf("%x", sha256.Sum256([]byte(state)))[:8]
	for _, pattern := range []string{filepath.Join(state, "work", "*"), "/sys/fs/cgroup/" + group, "/sys/fs/cgroup/*/" + group} { // version 2, version 1
		found, _ := filepath.Glob(pattern)
		list = append(list, found...)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return append(list, err.Error())
	}
	for line := range strings.SplitSeq(string(mounts), "\n") {
		if strings.Contains(line, state) {
			list = append(list, line)
		}
	}
	processes, _ := filepath.Glob("/proc/[0-9]*/mountinfo")
	for _, path := range processes {
		text, err := os.ReadFile(path)
		if err == nil && strings.Contains(string(text), state) {
			line, _ := os.ReadFile(filepath.Join(filepath.Dir(path), "cmdline"))
			list = append(list, fmt.Sprintf("process %s %q", path, line))
		}
	}
	return list
}

// stranger runs a workload of another state folder, and returns a check that it still runs.
func stranger(t *testing.T, image backends.Image) func(*testing.T) {
	b := open(t, t.TempDir())
	w := backends.Workload{Name: "stranger-00000001", Unit: "stranger", Format: backends.Native, Image: image, Run: backends.Run{Args: []string{"wait"}, User: 65532}}
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
	}
}

// The check for leaks finds what a running workload has.
func TestLeaksAreSeen(t *testing.T) {
	dir := t.TempDir()
	b := open(t, dir)
	w := backends.Workload{Name: "there-00000001", Unit: "there", Format: backends.Native, Image: content(t)[backends.Native], Run: backends.Run{Args: []string{"wait"}, User: 65532}}
	if err := b.Apply(t.Context(), w); err != nil {
		t.Fatal(err)
	}
	found := strings.Join(leaks(dir), "\n")
	for _, want := range []string{"/work/there-00000001", "/kmo/native-"} {
		if !strings.Contains(found, want) {
			t.Errorf("%q has no %s", found, want)
		}
	}
	if err := b.Remove(t.Context(), w.Name); err != nil {
		t.Fatal(err)
	}
	if left := leaks(dir); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
}
