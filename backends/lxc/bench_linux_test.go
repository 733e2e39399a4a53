package lxc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/conformance"
)

func Benchmark(b *testing.B) {
	y := newYard(b)
	conformance.Bench(b, conformance.Race{
		Backend: y.Backend, Format: backends.LXC, Image: backends.Image{Content: y.root}, Many: 100, Rival: plain(b, y.root),
	})
}

// plain is the same by hand: containers with no network, no files and the host's users.
func plain(b *testing.B, root string) *conformance.Rival {
	b.Helper()
	dir := b.TempDir()
	b.Cleanup(func() { _ = os.RemoveAll("/run/lxc/lock" + dir) }) // lxc-stop locks on this host
	unshare := conformance.Beside(b, "unshare")
	config := strangers(root) + "lxc.init.uid = 65532\nlxc.init.gid = 65532\nlxc.cap.keep = none\nlxc.no_new_privs = 1\nlxc.signal.halt = SIGTERM\n"
	start := func(name string) (*exec.Cmd, error) {
		lxc := exec.Command(unshare, "-m", "sh", "-c",
			`mount -t tmpfs none /sys/fs/cgroup && mount -t tmpfs none /run/lxc && exec lxc-start -F -P "$1" -n "$2" -- /app wait`, "sh", dir, name)
		at := filepath.Join(dir, name)
		return lxc, errors.Join(os.MkdirAll(at, 0o700), os.WriteFile(filepath.Join(at, "config"), []byte(config), 0o600))
	}
	stop := func(name string, _ *exec.Cmd) error {
		if said, err := exec.Command("lxc-stop", "-P", dir, "-n", name).CombinedOutput(); err != nil {
			return fmt.Errorf("lxc-stop: %v: %s", err, said)
		}
		return nil
	}
	return conformance.Foreground("lxc-start", start, stop)
}

// BenchmarkExec is one command in a running container.
func BenchmarkExec(b *testing.B) {
	y := newYard(b)
	w := y.workload("wait")
	y.apply(w)
	y.until("running", func(s backends.Status) bool { return running(s) })
	for b.Loop() {
		if code, said, err := y.Exec(context.Background(), w.Name, []string{"/app", "say hello"}); err != nil || code != 0 {
			b.Fatal(code, string(said), err)
		}
	}
}
