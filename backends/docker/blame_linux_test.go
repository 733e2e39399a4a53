package docker

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

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
			if !errors.As(err, &start) || start.Stage != stage {
				t.Errorf("apply: %v, want a *StartError of %s", err, stage)
			}
			if err := b.Remove(t.Context(), w.Name); err != nil {
				t.Error(err)
			}
		}
		over(t, d, b, state)
	})
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
