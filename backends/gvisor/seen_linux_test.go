package gvisor

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/conformance"
)

// looking is an image with the probe of this package.
func looking(t *testing.T) backends.Image {
	t.Helper()
	root := t.TempDir()
	build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-ldflags=-s -w", "-o", filepath.Join(root, "app"), "./testdata/probe")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building the probe: %v\n%s", err, out)
	}
	return backends.Image{Content: root, Config: backends.ImageConfig{Entrypoint: []string{"/app"}}}
}

// A sandbox reaches what this host reaches, and nothing that listens on the host's loopback.
func TestWayOut(t *testing.T) {
	b, image, out := fresh(t), looking(t), conformance.HostAddress(t)
	for name, test := range map[string]struct {
		steps []string
		host  []string
		want  string
	}{
		"host":     {[]string{"get", net.JoinHostPort(out, conformance.Greeting(t, out))}, nil, "got hello"},
		"loopback": {[]string{"get", net.JoinHostPort("10.0.2.2", conformance.Greeting(t, "127.0.0.1"))}, nil, "error: "},
		"itself":   {[]string{"get", net.JoinHostPort("127.0.0.1", conformance.Greeting(t, "127.0.0.1"))}, nil, "error: "},
		"shared":   {[]string{"get", net.JoinHostPort("127.0.0.1", conformance.Greeting(t, "127.0.0.1"))}, []string{"network"}, "got hello"},
		"names":    {[]string{"resolve", "localhost"}, nil, "resolved "},
	} {
		w := unit(image, name, test.steps...)
		w.Security.Host = test.host
		apply(t, b, w)
		if name == "names" { // what this host's resolver knows is not known here; that it answers is seen
			until(t, "an answer of the resolver", func() (string, bool) {
				text := logOf(t, b, w.Name)
				return text, strings.Contains(text, "resolved ") || strings.Contains(text, "on 10.0.2.3:53: no such host")
			})
			continue
		}
		says(t, b, w.Name, test.want)
	}
}

// What is mapped from a memory pool is one page for all, both ways, while it is mapped.
func TestPoolIsOnePage(t *testing.T) {
	b, image := fresh(t), looking(t)
	dir, err := os.MkdirTemp("/dev/shm", "kmo-door-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	page := make([]byte, 4096)
	frames := filepath.Join(dir, "frames")
	if err := os.WriteFile(frames, page, 0o666); err != nil {
		t.Fatal(err)
	}
	for at, mode := range map[string]os.FileMode{dir: 0o777, frames: 0o666} { // every unit's user is to have them
		if err := os.Chmod(at, mode); err != nil {
			t.Fatal(err)
		}
	}
	w := unit(image, "reader", "answer", "/pool/frames", "first")
	w.Doors = []backends.Door{{From: dir, To: "/pool", Via: "memory"}}
	apply(t, b, w)
	says(t, b, w.Name, "mapped")
	f, err := os.OpenFile(frames, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("first"), 0); err != nil {
		t.Fatal(err)
	}
	says(t, b, w.Name, "heard")
	if _, err := f.ReadAt(page, 0); err != nil || !strings.HasPrefix(string(page), "firstheard") {
		t.Errorf("the page is %q, %v; want what was written within", page[:20], err)
	}
}

// The bound of processes holds within: each of these has several threads.
func TestThreadsWithin(t *testing.T) {
	b := fresh(t)
	w := unit(looking(t), "relay", "threads", "40")
	w.Resources.PIDs = 32
	apply(t, b, w)
	if n, err := strconv.Atoi(says(t, b, w.Name, "threads ")); err != nil || n > 16 {
		t.Errorf("%d processes of two threads and more under a bound of 32, %v", n, err)
	}
	if s := status(t, b, w.Name); s.Usage.PIDs > 32 {
		t.Errorf("it uses %d processes", s.Usage.PIDs)
	}
}
