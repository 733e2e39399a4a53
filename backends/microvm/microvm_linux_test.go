package microvm

import (
	"crypto/sha256"
	"errors"
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
	"github.com/kindos/kmo/backends/microvm/boot"
	"github.com/kindos/kmo/backends/process"
	"github.com/kindos/kmo/registry/merkle"
)

// world is what TestMain makes once: the guest, an image, and a cache that all tests share.
type world struct {
	dir, guest, image, cache string
	kernel                   boot.Kernel
	home                     string // of the kernel
}

var ground world // written by TestMain alone

func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case process.StageArg:
			process.Stage()
		case MonitorArg:
			os.Exit(Monitor(os.Args[2:]))
		case keeperArg:
			keeper(os.Args[2], world{guest: os.Args[3], image: os.Args[4], home: os.Args[5]})
		}
	}
	dir, err := os.MkdirTemp("", "kmo-microvm-")
	if err == nil {
		ground, err = makeWorld(dir)
	}
	status := 1
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	} else {
		status = m.Run()
	}
	_ = os.RemoveAll(dir)
	os.Exit(status)
}

func makeWorld(dir string) (w world, err error) {
	w = world{dir: dir, guest: filepath.Join(dir, "guest"), image: filepath.Join(dir, "image"), cache: filepath.Join(dir, "cache")}
	kernel, err := exec.Command("../../.ci/kernel").Output()
	if err != nil {
		var failed *exec.ExitError
		if errors.As(err, &failed) {
			err = fmt.Errorf("%v: %s", err, failed.Stderr)
		}
		return w, fmt.Errorf("a guest's kernel, by .ci/kernel: %v", err)
	}
	at := strings.TrimSpace(string(kernel))
	w.home = at
	if w.kernel, err = boot.Find(filepath.Join(at, "boot"), filepath.Join(at, "lib/modules")); err != nil {
		return w, err
	}
	for _, folder := range []string{"etc", "tmp", "var"} {
		if err := os.MkdirAll(filepath.Join(w.image, folder), 0o755); err != nil {
			return w, err
		}
	}
	for to, from := range map[string]string{w.guest: "./guest", filepath.Join(w.image, "app"): "../conformance/testprogram", filepath.Join(w.image, "probe"): "./testdata/probe"} {
		build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", to, from)
		build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+runtime.GOARCH)
		if output, err := build.CombinedOutput(); err != nil {
			return w, fmt.Errorf("building %s: %v\n%s", from, err, output)
		}
	}
	return w, nil
}

func options(state string) Options {
	return Options{
		State: state, Kernel: ground.home, Guest: ground.guest,
		Backoff: func(n int) time.Duration { return 10 * time.Millisecond << min(n, 6) },
	}
}

// stateFolder is one whose cache all tests share.
func stateFolder(t testing.TB) string {
	t.Helper()
	state := t.TempDir()
	if err := errors.Join(os.MkdirAll(ground.cache, 0o700), os.Symlink(ground.cache, filepath.Join(state, "cache"))); err != nil {
		t.Fatal(err)
	}
	return state
}

func open(t testing.TB, state string) *Backend {
	t.Helper()
	b, err := Open(options(state))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestConformance(t *testing.T) {
	conformance.Test(t, func(t *testing.T) conformance.Subject {
		state := stateFolder(t)
		return conformance.Subject{
			Table:    "testdata/features",
			Open:     func(t *testing.T) backends.Backend { return open(t, state) },
			At:       func(t *testing.T, state string) backends.Backend { return open(t, state) },
			Dies:     true,
			Images:   map[backends.Format]backends.Image{backends.OCI: {Content: ground.image, ContentRoot: merkle.Digest{1}}},
			Patience: 120 * time.Second,
			Disk:     []string{state},
			Leaks:    func(t *testing.T) []string { return leaks(state) },
		}
	})
}

func TestDemo(t *testing.T) { conformance.Demo(t, Name, ground.home) }

// leaks lists what is left of the workloads of a state folder on this host.
func leaks(state string) (list []string) {
	folder := filepath.Join(state, "machines")
	group := "kmo/microvm-" + fmt.Sprintf("%x", sha256.Sum256([]byte(folder)))[:8]
	for _, pattern := range []string{filepath.Join(folder, "work", "*"), "/sys/fs/cgroup/" + group, "/sys/fs/cgroup/*/" + group} { // version 2, version 1
		found, _ := filepath.Glob(pattern)
		list = append(list, found...)
	}
	processes, _ := filepath.Glob("/proc/[0-9]*")
	for _, path := range processes {
		mounts, _ := os.ReadFile(filepath.Join(path, "mountinfo"))
		line, _ := os.ReadFile(filepath.Join(path, "cmdline"))
		if strings.Contains(string(mounts), state) || strings.Contains(string(line), state) {
			list = append(list, fmt.Sprintf("process %s %q", path, line))
		}
	}
	return list
}
