package lxc

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/kindos/kmo/backends"
)

// machine is a root file system with busybox as its init.
func machine(t *testing.T, script string) string {
	t.Helper()
	const busybox = "/bin/busybox"
	text, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatalf("%v - as root: apt-get install --no-install-recommends busybox-static", err)
	}
	root := filepath.Join(t.TempDir(), "machine")
	for _, dir := range []string{"bin", "sbin", "etc/init.d", "proc", "dev", "tmp"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, content := range map[string]string{
		"bin/busybox": string(text), "etc/inittab": "::sysinit:/etc/init.d/rcS\n::respawn:/bin/sleep 1000\n", "etc/init.d/rcS": "#!/bin/sh\n" + script,
	} {
		if err := os.WriteFile(filepath.Join(root, name), []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"bin/sh", "bin/sleep", "bin/id", "bin/mount", "bin/cat", "bin/echo", "bin/reboot", "bin/poweroff", "sbin/init"} {
		if err := os.Symlink("/bin/busybox", filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// A system container boots its init as root of its own users, does what root does there, and none of what it does here.
func TestSystemContainer(t *testing.T) {
	y := newYard(t)
	y.root = machine(t, `echo user $(id -u) of init $$
mount -t tmpfs none /tmp && echo mounted
echo 1 > /proc/sys/vm/drop_caches && echo dropped
cat /proc/self/uid_map
echo up
`)
	w := y.workload()
	w.Image.Config.Entrypoint, w.Run.User, w.Overlay.Size = nil, 0, 16<<20
	y.apply(w)
	y.said("up\n")
	log := y.log()
	if !strings.Contains(log, "user 0 of init") || !strings.Contains(log, "mounted") || strings.Contains(log, "dropped") {
		t.Errorf("log %q; want user 0, a mount, and no sysctl", log)
	}
	if want := strconv.Itoa(y.firstUser(w.Name)) + "      65536"; !strings.Contains(log, want) {
		t.Errorf("log %q has no map with %s", log, want)
	}
	if code, said, err := y.Exec(t.Context(), w.Name, []string{"/bin/id", "-u"}); err != nil || code != 0 || string(said) != "0\n" {
		t.Errorf("id: %d, %q, %v", code, said, err)
	}
	before := y.status()
	if _, _, err := y.Exec(t.Context(), w.Name, []string{"/bin/reboot"}); err != nil {
		t.Errorf("reboot: %v", err)
	}
	after := y.until("started again", func(s backends.Status) bool { return running(s) && s.Restarts == 1 })
	if after.PID == before.PID {
		t.Errorf("it restarted behind our back: %+v", after)
	}
}

// systemd is refused before it fails by itself.
func TestSystemdRefused(t *testing.T) {
	y := newYard(t)
	y.root = machine(t, "")
	init := filepath.Join(y.root, "sbin/init")
	if err := errors.Join(os.Remove(init), os.WriteFile(filepath.Join(y.root, "bin/systemd"), nil, 0o755), os.Symlink("/bin/systemd", init)); err != nil {
		t.Fatal(err)
	}
	w := y.workload()
	w.Image.Config.Entrypoint, w.Run.User = nil, 0
	var start *backends.StartError
	if err := y.Apply(t.Context(), w); !errors.As(err, &start) || !strings.Contains(err.Error(), "systemd") {
		t.Errorf("error %v, want a *StartError that names systemd", err)
	}
}

// Users inside are as on disk, outside they are the workload's own.
func TestUsers(t *testing.T) {
	y := newYard(t)
	for name, owner := range map[string]int{"roots": 0, "mine": 65532} {
		path := filepath.Join(y.root, name)
		if err := errors.Join(os.WriteFile(path, []byte(name), 0o400), os.Chown(path, owner, owner)); err != nil {
			t.Fatal(err)
		}
	}
	w := y.workload("id", "cat /roots", "cat /mine", "write /keep/x text", "wait")
	w.Overlay.Keep = []string{"/keep"}
	y.apply(w)
	y.said("waiting")
	log := y.log()
	for _, want := range []string{"id 65532 65532", "cat /roots: error", `cat /mine: "mine"`, "write /keep/x: ok"} {
		if !strings.Contains(log, want) {
			t.Errorf("log %q has no %q", log, want)
		}
	}
	program := child(child(y.status().PID, "lxc-start"), "app")
	if got, want := strings.Fields(field(program, "Uid") + " -")[0], strconv.Itoa(y.firstUser(w.Name)+65532); got != want {
		t.Errorf("outside the program is user %s, want %s", got, want)
	}
	kept, err := filepath.Glob(filepath.Join(y.state, "kept/relay/*/x"))
	if err != nil || len(kept) != 1 {
		t.Fatalf("kept %v, %v", kept, err)
	}
	var stat syscall.Stat_t
	if err := syscall.Stat(kept[0], &stat); err != nil || stat.Uid != 65532 {
		t.Errorf("on disk the kept file is user %d's, want 65532's: %v", stat.Uid, err)
	}
}

// A user beyond the range is one more; so is what a unit mounts of a file system whose owners cannot be mapped: then it has the host's
// users, and says so.
func TestOtherUsers(t *testing.T) {
	y := newYard(t)
	w := y.workload("id", "wait")
	w.Run.User = 1000000
	y.apply(w)
	y.said("id 1000000 1000000")
	w.Spec[2], w.Mounts = 7, []backends.Mount{{From: "/sys/kernel", To: "/kernel", ReadOnly: true}}
	w.Run.Args = []string{"cat /kernel/profiling", "say plain", "wait"}
	y.apply(w)
	y.said("plain")
	s := y.status()
	if unapplied := strings.Join(s.Unapplied, "\n"); !strings.Contains(unapplied, "users of its own: /sys/kernel") {
		t.Errorf("unapplied %q does not say that it has the host's users", unapplied)
	}
	if caps := field(child(child(s.PID, "lxc-start"), "app"), "CapBnd"); caps != "0000000000000000" {
		t.Errorf("its capabilities are %s", caps)
	}
}
