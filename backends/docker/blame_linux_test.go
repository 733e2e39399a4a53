package docker

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends"
)

// What cannot be executed is the workload's own fault, program and hook alike.
func TestNotExecutable(t *testing.T) {
	image := content(t)
	each(t, func(t *testing.T, d *daemon) {
		state := t.TempDir()
		b := open(t, d.name, state)
		for stage, change := range map[string]func(w *backends.Workload){
			"exec /none":       func(w *backends.Workload) { w.Image.Config.Entrypoint = []string{"/none"} },
			"preInit [/none]":  func(w *backends.Workload) { w.Hooks.PreInit = [][]string{{"/none"}} },
			"postInit [/none]": func(w *backends.Workload) { w.Hooks.PostInit = [][]string{{"/none"}} },
		} {
			w := unit("relay", image, "wait")
			change(&w)
			err := b.Apply(t.Context(), w)
			var start *backends.StartError
			if !errors.As(err, &start) || start.Stage != stage || strings.Contains(start.Cause, "exec /app") {
				t.Errorf("apply: %v, want a *StartError of %s, and no word of another program", err, stage)
			}
			if err := b.Remove(t.Context(), w.Name); err != nil {
				t.Error(err)
			}
		}
		over(t, d, b, state)
	})
}

// Where nothing can be mounted the unit has named a wrong path, whatever stands in the way: the image's, the engine's, its own.
func TestCannotBeMounted(t *testing.T) {
	image := content(t)
	err := errors.Join(os.Symlink("/proc/mounts", filepath.Join(image.Content, "etc", "mtab")), os.Symlink("loop", filepath.Join(image.Content, "loop")))
	if err != nil {
		t.Fatal(err)
	}
	each(t, func(t *testing.T, d *daemon) {
		state := t.TempDir()
		b := open(t, d.name, state)
		keep := func(path string) func(w *backends.Workload) {
			return func(w *backends.Workload) { w.Overlay.Keep = []string{path} }
		}
		cases := map[string]func(w *backends.Workload){
			"/app": keep("/app"), "/app/x": keep("/app/x"), "/etc/mtab": keep("/etc/mtab"), "/loop/x": keep("/loop/x"), "/" + strings.Repeat("a", 256): keep("/" + strings.Repeat("a", 256)),
			"/var":     func(w *backends.Workload) { w.Files = []backends.File{{To: "/var", Mode: 0o400}} },
			"/app/dir": func(w *backends.Workload) { w.Mounts = []backends.Mount{{From: t.TempDir(), To: "/app/dir"}} },
		}
		if d.name == Docker { // which has a file of its own there
			cases["/etc/resolv.conf"] = keep("/etc/resolv.conf")
		}
		for path, change := range cases {
			w := unit("relay", image, "wait")
			change(&w)
			for range 2 { // as the program's fault, and as a hook's, which is started before
				var start *backends.StartError
				if err := b.Apply(t.Context(), w); !errors.As(err, &start) || !strings.Contains(err.Error(), "mount "+path+": ") || !strings.Contains(start.Cause, "; want ") {
					t.Errorf("keeping %s: %v, want a *StartError that says what is wrong there", path, err)
				}
				w.Hooks.PreInit = [][]string{{"/app", "say first"}}
			}
		}
		over(t, d, b, state)
	})
}

// Any folder may be kept, and the unit's own takes the place of what the engine would have there.
func TestKeptInsteadOfEngines(t *testing.T) {
	image := content(t)
	if err := os.Symlink("/run", filepath.Join(image.Content, "var", "run")); err != nil {
		t.Fatal(err)
	}
	each(t, func(t *testing.T, d *daemon) {
		state := t.TempDir()
		b := open(t, d.name, state)
		for _, path := range []string{"/tmp", "/run", "/var/tmp", "/tmp/x", "/run/x", "/var/run", "/var", "/etc", "/run/secrets", "/home/a b:c=d"} {
			for _, size := range []int64{0, 1 << 20} {
				w := unit("relay", image, "append file x", "wait")
				w.Run.Dir, w.Overlay = path, backends.Overlay{Size: size, Keep: []string{path}}
				if err := b.Apply(t.Context(), w); err != nil {
					t.Errorf("keeping %s, with %d bytes to write: %v", path, size, err)
					continue
				}
				if got := says(t, b, w.Name, "append file:"); got != "append file: ok" {
					t.Errorf("keeping %s, with %d bytes to write: the program says %q", path, size, got)
				}
				if err := b.Remove(t.Context(), w.Name); err != nil {
					t.Error(err)
				}
			}
			if text, err := os.ReadFile(filepath.Join(state, "kept", "relay", backends.KeptName(path), "file")); string(text) != "xx" {
				t.Errorf("kept of %s is %q; %v; want what was written in two runs", path, text, err)
			}
		}
		over(t, d, b, state)
	})
}

// says waits for the line of a workload's log that begins so.
func says(t *testing.T, b *Backend, name, begins string) string {
	t.Helper()
	var text []byte
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		log, err := b.Logs(t.Context(), name, backends.LogOptions{})
		if err == nil {
			text, err = io.ReadAll(log)
		}
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			if strings.HasPrefix(line, begins) {
				return strings.TrimSuffix(line, "\n")
			}
		}
	}
	t.Fatalf("no line %q within a minute; its log is %q", begins, text)
	return ""
}

func TestLinkIsNotMounted(t *testing.T) {
	image := content(t)
	each(t, func(t *testing.T, d *daemon) {
		state, dir := t.TempDir(), t.TempDir()
		b := open(t, d.name, state)
		if err := os.Symlink("/etc", filepath.Join(dir, "link")); err != nil {
			t.Fatal(err)
		}
		w := unit("relay", image, "wait")
		w.Mounts = []backends.Mount{{From: filepath.Join(dir, "link"), To: "/host", ReadOnly: true}}
		var start *backends.StartError
		if err := b.Apply(t.Context(), w); !errors.As(err, &start) || !strings.Contains(start.Cause, "link") {
			t.Errorf("apply: %v, want a *StartError that speaks of the link", err)
		}
		over(t, d, b, state)
	})
}

// Secrets that are gone with the host's memory make a workload damaged, once its program is to be started again, until it is applied again.
// The engine looks for a folder again by its name: where others may write beside it they could put a link to anything there meanwhile.
func TestMountThatOthersCanReplace(t *testing.T) {
	image := content(t)
	each(t, func(t *testing.T, d *daemon) {
		state, shared := t.TempDir(), filepath.Join(t.TempDir(), "anybody")
		folder := filepath.Join(shared, "mine")
		if err := errors.Join(os.MkdirAll(folder, 0o755), os.Chmod(shared, 0o777)); err != nil {
			t.Fatal(err)
		}
		b := open(t, d.name, state)
		w := unit("relay", image, "wait")
		w.Mounts = []backends.Mount{{From: folder, To: "/host"}}
		err := b.Apply(t.Context(), w)
		if plain(t, "apply", err); err != nil && !strings.Contains(err.Error(), "others may put another in its place") {
			t.Errorf("error %v", err)
		}
		if err := os.Chmod(shared, 0o777|os.ModeSticky); err != nil { // now only its owner may
			t.Fatal(err)
		}
		if err := b.Apply(t.Context(), w); err != nil {
			t.Fatal(err)
		}
		until(t, b, "running", running)
		over(t, d, b, state)
	})
}

func TestSecretsGone(t *testing.T) {
	image := content(t)
	each(t, func(t *testing.T, d *daemon) {
		state := t.TempDir()
		b := open(t, d.name, state)
		w := unit("relay", image, "cat /run/secrets/token", "wait")
		w.Files = []backends.File{{To: "/run/secrets/token", Mode: 0o400, Content: []byte("canary"), Secret: true}}
		if err := b.Apply(t.Context(), w); err != nil {
			t.Fatal(err)
		}
		before := until(t, b, "running", running)
		err := os.RemoveAll(b.plan.Secrets.Folder(w.Name))
		if err := errors.Join(err, unix.Kill(before.PID, unix.SIGKILL)); err != nil {
			t.Fatal(err)
		}
		damaged := func(s backends.Status) bool {
			return s.State == backends.Damaged && strings.Contains(s.Detail, "secrets are gone")
		}
		until(t, b, "damaged", damaged)
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
		b = open(t, d.name, state)
		until(t, b, "damaged in a new process", damaged)
		if err := b.Apply(t.Context(), w); err != nil {
			t.Fatal(err)
		}
		until(t, b, "running again", func(s backends.Status) bool { return running(s) && s.Restarts == 1 })
		over(t, d, b, state)
	})
}
