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
	"github.com/kindos/kmo/backends/process/cgroup"
)

func Benchmark(b *testing.B) {
	y := newYard(b)
	conformance.Bench(b, conformance.Race{
		Backend: y.Backend, Format: backends.LXC, Image: backends.Image{Content: y.root}, Many: 100, Rival: plain(b, y.root),
	})
}

// plain is the same by hand: containers with users, bounds and a network of their own. Nothing watches what their slirp4netns does.
func plain(b *testing.B, root string) *conformance.Rival {
	b.Helper()
	lxc, err := exec.LookPath("lxc-start")
	if err != nil {
		b.Fatal(err)
	}
	dir, groups := b.TempDir(), cgroup.Find("/sys/fs/cgroup", "kmo/bench")
	if err := os.Chmod(filepath.Dir(dir), 0o711); err != nil { // users of containers pass there
		b.Fatal(err)
	}
	config := strangers(root) + `
lxc.rootfs.options = ro,idmap=container
lxc.mount.auto = proc:mixed
lxc.net.0.type = empty
lxc.seccomp.profile = ` + seccompProfile + `
lxc.init.uid = 65532
lxc.init.gid = 65532
lxc.cap.keep = none
lxc.no_new_privs = 1
lxc.signal.halt = SIGTERM
lxc.idmap = u 0 536870912 65536
lxc.idmap = g 0 536870912 65536
lxc.hook.start-host = ` + hook(b, dir, "connect", `mkfifo "$at.ready"
slirp4netns --configure --mtu=65520 --disable-host-loopback --enable-sandbox --enable-seccomp --ready-fd=3 "$LXC_PID" tap0 3>"$at.ready" >"$at.said" 2>&1 &
echo $! >"$at.pid"
head -c 1 <"$at.ready" >&2`) + `
lxc.hook.post-stop = ` + hook(b, dir, "disconnect", `kill "$(cat "$at.pid")"
rm "$at".*`) + "\n"
	start := func(name string) (*exec.Cmd, error) {
		at := filepath.Join(dir, name)
		err := errors.Join(groups.Make(name, backends.Resources{CPU: 1000, Memory: 128 << 20, PIDs: 64}),
			os.MkdirAll(at, 0o700), os.WriteFile(filepath.Join(at, "config"), []byte(config), 0o600))
		return exec.Command("unshare", append([]string{"-m", "sh", "-c", `for at in "$@"; do echo 0 >"$at"; done
mount -t tmpfs none /sys/fs/cgroup && mount -t tmpfs none /run/lxc && PATH=/nowhere exec ` + lxc + ` -F -P ` + dir + ` -n "$0" -- /app wait`, name}, groups.Joins(name)...)...), err
	}
	stop := func(name string, started *exec.Cmd) error {
		said, err := exec.Command("lxc-stop", "-P", dir, "-n", name).CombinedOutput()
		if err != nil {
			return fmt.Errorf("lxc-stop: %v: %s", err, said)
		}
		_ = started.Wait() // its status is the program's
		return groups.Remove(name)
	}
	return conformance.Foreground("lxc-start", start, stop)
}

// hook makes a script that LXC runs for a container, with $at for the beginning of its files' names.
func hook(b *testing.B, dir, name, script string) string {
	b.Helper()
	path := filepath.Join(dir, name)
	text := "#!/bin/sh -e\nPATH=/usr/sbin:/usr/bin:/sbin:/bin\nat=\"" + dir + "/$LXC_NAME\"\n" + script + "\n"
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil { // to be executed
		b.Fatal(err)
	}
	return path
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
