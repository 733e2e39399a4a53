package native

import (
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
	t.Cleanup(func() { _ = b.Close() })
	return b
}

// content puts the test program into a root file system, and returns both forms.
func content(t *testing.T) map[backends.Format]backends.Image {
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
			Open:   func(t *testing.T) backends.Backend { return open(t, dir) },
			Images: images,
			Leaks:  func(t *testing.T) []string { return leaks(dir) },
		}
	})
}

// leaks lists what is left of the workloads of a state folder on this host.
func leaks(state string) (list []string) {
	for _, pattern := range []string{filepath.Join(state, "work", "*"), "/sys/fs/cgroup/*/kmo/native-*"} {
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
