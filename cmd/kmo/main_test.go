package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/kindos/kmo/backends/fake"
	"github.com/kindos/kmo/backends/lxc"
	"github.com/kindos/kmo/backends/plugin"
	"github.com/kindos/kmo/backends/process"
	"github.com/kindos/kmo/backends/wasm"
)

// built is what the tests of the real binary run, laid out as make build lays it out, so that `kmo demo` finds its programs:
//
//	dir/kmo
//	dir/programs/{relay-1,relay-2,bus.wasm}
type built struct {
	dir      string
	kmo      string
	programs string
}

// program is the path of one of the programs.
func (b built) program(name string) string { return filepath.Join(b.programs, name) }

// builds compiles everything once, when the first test asks for it; the binary is static, so that it also runs in an empty root.
var builds = sync.OnceValues(func() (built, error) {
	dir, err := os.MkdirTemp("", "kmo-test-")
	if err != nil {
		return built{}, err
	}
	made.Lock()
	made.dir = dir
	made.Unlock()
	b := built{dir: dir, kmo: filepath.Join(dir, "kmo"), programs: filepath.Join(dir, "programs")}
	for _, one := range []struct {
		path, source, flags string
		env                 []string
	}{
		{b.kmo, "./cmd/kmo", "-s -w -X main.version=test", nil},
		{b.program("relay-1"), "./fixtures/programs/relay", "-s -w", nil},
		{b.program("relay-2"), "./fixtures/programs/relay", "-s -w -X main.version=2 -X main.health=500", nil},
		{b.program("bus.wasm"), "./fixtures/programs/bus", "-s -w", []string{"GOOS=wasip1", "GOARCH=wasm"}},
	} {
		cmd := exec.CommandContext(context.Background(), "go", "build", "-trimpath", "-ldflags", one.flags, "-o", one.path, one.source)
		cmd.Dir = filepath.Join("..", "..")
		cmd.Env = append(append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS="), one.env...)
		if out, err := cmd.CombinedOutput(); err != nil {
			return b, fmt.Errorf("building %s: %w\n%s", one.source, err, out)
		}
	}
	return b, nil
})

// binaries returns what was built, and ends the test if it does not build.
func binaries(t testing.TB) built {
	t.Helper()
	b, err := builds()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// fakeName is the backend that starts nothing.
const fakeName = "fake"

// TestMain is kmo where a host that a test opened starts its plugins or a stage, with a backend fake beside the built-in ones; else it
// runs the tests and removes what builds made.
func TestMain(m *testing.M) {
	if len(os.Args) > 3 && slices.Equal(os.Args[1:4], []string{"backend", "serve", fakeName}) {
		plugin.Serve(&fake.Backend{}, newLogger(os.Stderr))
		return
	}
	if len(os.Args) > 1 && slices.Contains([]string{"backend", process.StageArg, wasm.GuestArg, lxc.GuestArg}, os.Args[1]) {
		main()
	}
	code := m.Run()
	made.Lock()
	defer made.Unlock()
	if made.dir != "" {
		_ = os.RemoveAll(made.dir)
	}
	os.Exit(code)
}

// made is the folder that builds made, if any test asked.
var made struct {
	sync.Mutex
	dir string
}

// A backend's process gets what it needs to find its runtime, and nothing else of the agent's.
func TestPassed(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", "/run/user/1000")
	t.Setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
	for name, want := range map[string][]string{"native": nil, "podman": {"XDG_RUNTIME_DIR=/run/user/1000"}} {
		if got := passed(name); !slices.Equal(got, want) {
			t.Errorf("%s gets %q, want %q", name, got, want)
		}
	}
	if got := passed("kubernetes"); !slices.Contains(got, "KUBERNETES_SERVICE_HOST=10.0.0.1") || slices.ContainsFunc(got, func(v string) bool { return strings.HasPrefix(v, "XDG") }) {
		t.Errorf("kubernetes gets %q", got)
	}
}
