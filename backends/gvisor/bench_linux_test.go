package gvisor

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/conformance"
)

func Benchmark(b *testing.B) {
	backend, image := open(b, b.TempDir()), content(b)
	defer backend.Close()
	conformance.Bench(b, conformance.Race{Backend: backend, Format: backends.OCI, Image: image, Many: 100, Rival: byHand(b, image)})
}

// byHand is runsc's own command line, with the same root and platform and without a network.
func byHand(b *testing.B, image backends.Image) *conformance.Rival {
	b.Helper()
	dir := b.TempDir()
	r, err := measure(b.Context(), Options{State: dir, Runsc: os.Getenv(variable)})
	if err != nil {
		b.Fatal(err)
	}
	r.Runsc = conformance.Beside(b, r.Runsc)
	sandboxed := func(name string) sandbox {
		at := filepath.Join(dir, name)
		return sandbox{runtime: r, id: identify(at), root: filepath.Join(at, "runsc"), log: filepath.Join(at, "log"), network: "none"}
	}
	start := func(name string) (*exec.Cmd, error) {
		spec := specs.Spec{
			Version: "1.0.2", Root: &specs.Root{Path: image.Content, Readonly: true}, Linux: &specs.Linux{},
			Process: &specs.Process{
				User: specs.User{UID: 65532, GID: 65532}, Args: []string{"/app", "wait"}, Cwd: "/", NoNewPrivileges: true, Capabilities: &specs.LinuxCapabilities{},
			},
		}
		at, err := bundle(filepath.Join(dir, name), spec, "")
		s := sandboxed(name)
		return s.command(context.Background(), "run", "--bundle", at, s.id), err
	}
	stop := func(name string, running *exec.Cmd) error {
		s := sandboxed(name)
		if err := s.do("kill", s.id, "TERM"); err != nil {
			return err
		}
		_ = running.Wait() // its status is the program's
		return s.do("delete", "--force", s.id)
	}
	return conformance.Foreground("runsc", start, stop)
}
