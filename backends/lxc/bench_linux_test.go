package lxc

import (
	"bufio"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kindos/kmo/backends"
)

// built is a root file system with the suite's program.
func built(b *testing.B) string {
	b.Helper()
	path := filepath.Join(b.TempDir(), "app")
	build := exec.Command("go", "build", "-o", path, "github.com/kindos/kmo/backends/conformance/testprogram")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if said, err := build.CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, said)
	}
	return content(b, path)
}

// BenchmarkStart is from Apply to the program's first line, and Remove, in turn with lxc-start and lxc-stop of the same root.
func BenchmarkStart(b *testing.B) {
	y := newYard(b)
	y.root = built(b)
	w := y.workload("wait")
	took := map[string][]time.Duration{}
	for b.Loop() {
		began := time.Now()
		y.apply(w)
		for !strings.Contains(y.log(), "waiting") {
			time.Sleep(time.Millisecond)
		}
		took["start"] = append(took["start"], time.Since(began))
		began = time.Now()
		if err := y.Remove(context.Background(), w.Name); err != nil {
			b.Fatal(err)
		}
		took["stop"] = append(took["stop"], time.Since(began))
		plain(b, y.root, took)
	}
	for name, list := range took {
		slices.Sort(list)
		b.ReportMetric(float64(list[len(list)/2].Microseconds())/1000, "ms-"+name+"-p50")
	}
}

// beside is where what is measured by hand has the same share of the processor as the workload, on a machine that has other work.
const beside = "/sys/fs/cgroup/cpu/kmo/lxc-bench"

// plain is the same by hand: a container with no network, no files and the host's users.
func plain(b *testing.B, root string, took map[string][]time.Duration) {
	b.Helper()
	dir := b.TempDir()
	text := strangers(root) + "lxc.init.uid = 65532\nlxc.init.gid = 65532\nlxc.cap.keep = none\nlxc.no_new_privs = 1\nlxc.signal.halt = SIGTERM\n"
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "plain"), 0o700), os.WriteFile(filepath.Join(dir, "plain/config"), []byte(text), 0o600)); err != nil {
		b.Fatal(err)
	}
	lxc := exec.Command("unshare", "-m", "sh", "-c", `
		mkdir -p `+beside+`; echo $$ > `+beside+`/cgroup.procs
		mount -t tmpfs none /sys/fs/cgroup && mount -t tmpfs none /run/lxc && exec lxc-start -F -P "$1" -n plain -- /app wait`, "sh", dir)
	said, err := lxc.StdoutPipe()
	began := time.Now()
	if err = errors.Join(err, lxc.Start()); err != nil {
		b.Fatal(err)
	}
	if _, err := bufio.NewReader(said).ReadString('\n'); err != nil {
		b.Fatal(err)
	}
	took["lxc-start"] = append(took["lxc-start"], time.Since(began))
	began = time.Now()
	if said, err := exec.Command("lxc-stop", "-P", dir, "-n", "plain").CombinedOutput(); err != nil {
		b.Fatalf("lxc-stop: %v: %s", err, said)
	}
	_, _ = lxc.Wait(), os.Remove(beside)
	took["lxc-stop"] = append(took["lxc-stop"], time.Since(began))
	if err := os.RemoveAll("/run/lxc/lock" + dir); err != nil { // lxc-stop locks on this host
		b.Fatal(err)
	}
}

// BenchmarkExec is one command in a running container.
func BenchmarkExec(b *testing.B) {
	y := newYard(b)
	y.root = built(b)
	w := y.workload("wait")
	y.apply(w)
	y.until("running", func(s backends.Status) bool { return running(s) })
	for b.Loop() {
		if code, said, err := y.Exec(context.Background(), w.Name, []string{"/app", "say hello"}); err != nil || code != 0 {
			b.Fatal(code, string(said), err)
		}
	}
}
