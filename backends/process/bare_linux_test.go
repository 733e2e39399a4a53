package process

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/process/stage"
)

// A keeper that is not root: no mounts, no namespaces, no cgroups, and it says so. As root the test runs itself as nobody.
func TestNotRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		asNobody(t)
		return
	}
	state, self := t.TempDir(), filepath.Join(t.TempDir(), "self")
	text, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{os.WriteFile(self, text, 0o755), os.Chown(state, 65534, 65534), openUp(state), openUp(self)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(self, "-test.run=^TestNotRoot$", "-test.v")
	cmd.Env = append(os.Environ(), "TMPDIR="+state)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if output, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, output)
	}
}

func asNobody(t *testing.T) {
	state := t.TempDir()
	k := start(t, state)
	if k.Mounts() || len(k.Missing()) < 4 || !slices.Equal(k.Features(), []backends.Feature{backends.Exec, backends.Hooking, backends.HostNetwork}) {
		t.Errorf("mounts %t, missing %q, features %q", k.Mounts(), k.Missing(), k.Features())
	}
	if said := strings.Join(k.Missing(), "\n"); !strings.Contains(said, "limit-memory: a keeper that is not root") || strings.Contains(said, "takes a bound on this host") {
		t.Errorf("it says %q, want nothing of cgroups that nobody has looked at", said)
	}
	w := workload("nobody", "read /etc/passwd", "write "+filepath.Join(state, "x"), "mount", "setsid", "ptrace", "status CapEff", "status NoNewPrivs",
		"status Seccomp", "env", "socket 1", "socket 2", "pair stream", "pair datagram", "child setsid", "child nobody-mark", "wait nobody-mark")
	w.Resources = backends.Resources{} // nobody here may bound anything
	w.Hooks.PreInit = [][]string{{"/app", "id"}}
	apply(t, k, w)
	for step, want := range map[string]string{
		"read /etc/passwd":                   "error: open /etc/passwd: permission denied",
		"write " + filepath.Join(state, "x"): "error: open " + filepath.Join(state, "x") + ": permission denied",
		"mount":                              "error: operation not permitted",
		"setsid":                             "error: operation not permitted",
		"ptrace":                             "error: operation not permitted",
		"status NoNewPrivs":                  "error: open /proc/thread-self/status: permission denied",
		"env":                                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"socket 1":                           "error: address family not supported by protocol",
		"socket 2":                           "ok",
		"pair stream":                        "ok",
		"pair datagram":                      "error: operation not permitted",
		"child setsid":                       "error: fork/exec " + probe() + ": operation not permitted",
		"child nobody-mark":                  "ok",
	} {
		if got := said(t, k, w.Name, step); got != want {
			t.Errorf("%s: got %q, want %q", step, got, want)
		}
	}
	if s := status(t, k, w.Name); len(s.Unapplied) != 1 || s.State != backends.Running {
		t.Errorf("status %+v, want the namespaces unapplied", s)
	}
	if code, output, err := k.Exec(t.Context(), w.Name, []string{"/app", "mount"}); code != 0 || err != nil || string(output) != "mount: error: operation not permitted\n" {
		t.Errorf("exec: %d, %q, %v", code, output, err)
	}
	for _, change := range []func(*backends.Workload){
		func(w *backends.Workload) { w.Overlay.Size = 1 },
		func(w *backends.Workload) { w.Resources.CPU = 1000 },
		func(w *backends.Workload) { w.Resources.Memory = 64 << 20 },
		func(w *backends.Workload) { w.Resources.PIDs = 64 },
		func(w *backends.Workload) { w.Overlay.Keep = []string{"/a"} },
		func(w *backends.Workload) { w.Mounts = []backends.Mount{{From: "/a", To: "/a"}} },
		func(w *backends.Workload) { w.Files = []backends.File{{To: "/a"}} },
		func(w *backends.Workload) { w.Format = backends.OCI },
	} {
		bad := workload("refused", "wait")
		bad.Resources = backends.Resources{}
		change(&bad)
		var lacking *backends.FeatureError
		if err := k.Apply(t.Context(), bad); !errors.As(err, &lacking) {
			t.Errorf("%+v: got %v, want a *FeatureError", bad.Overlay, err)
		}
	}
	whole := k.support
	for lost, change := range map[string]func(*stage.Support){
		"landlock": func(s *stage.Support) { s.Landlock = 0 }, "seccomp": func(s *stage.Support) { s.Seccomp = false },
	} {
		change(&k.support)
		var lacking *backends.FeatureError
		if err := k.Apply(t.Context(), workload("loose", "wait")); k.Confines() || !errors.As(err, &lacking) || lacking.Feature != backends.Feature(backends.Native) {
			t.Errorf("without %s: got %v, want a *FeatureError for the format", lost, err)
		}
		k.support = whole
	}
	k.support.Groups = false // as a kernel before 6.9
	old := workload("older", "child older-mark", "wait older-mark")
	old.Resources = backends.Resources{}
	apply(t, k, old)
	said(t, k, old.Name, "child older-mark")
	if err := k.Remove(t.Context(), old.Name); err != nil {
		t.Fatal(err)
	}
	until(t, "the end of all its processes by number", func() (string, bool) { return "", len(processes("older-mark")) == 0 })
	if err := k.Remove(t.Context(), w.Name); err != nil {
		t.Fatal(err)
	}
	until(t, "the end of all its processes", func() (string, bool) { return "", len(processes("nobody-mark")) == 0 })
	sweep(t, k)
}

func openUp(path string) error {
	for dir := filepath.Dir(path); dir != "/tmp" && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			return err
		}
	}
	return nil
}
