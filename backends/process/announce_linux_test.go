package process

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kindos/kmo/backends"
)

// announcing is a keeper, over a folder, of programs that announce themselves.
func announcing(t *testing.T, state string) *Keeper {
	t.Helper()
	o := options(state)
	o.Backoff = func(int) time.Duration { return time.Hour }
	o.Plan = func(ctx context.Context, w backends.Workload, _ Place) (Program, error) {
		p, err := plan(ctx, w, Place{})
		p.Announces = true
		return p, err
	}
	k, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = k.Close() }) // a test may have closed it
	return k
}

// gated is a workload that announces itself once open is called.
func gated(t *testing.T) (w backends.Workload, open func()) {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	w = workload("gated", "until /gate/open", "announce", "fds", "wait")
	w.Mounts = []backends.Mount{{From: dir, To: "/gate", ReadOnly: true}}
	return w, func() {
		if err := os.WriteFile(filepath.Join(dir, "open"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func TestStartingUntilAnnounced(t *testing.T) {
	k := announcing(t, t.TempDir())
	t.Cleanup(func() { sweep(t, k) })
	w, open := gated(t)
	w.Hooks.PreInit = [][]string{{"/app", "env", "fds"}}
	w.Hooks.PostInit = [][]string{{"/app", "stamp"}}
	applied := make(chan error, 1)
	go func() { applied <- k.Apply(context.Background(), w) }()
	until(t, "a program", func() (string, bool) { return "", status(t, k, w.Name).PID != 0 })
	time.Sleep(100 * time.Millisecond)
	if s := status(t, k, w.Name); s.State != backends.Starting || len(applied) > 0 || strings.Contains(logOf(k, w.Name), "stamp") {
		t.Errorf("before it announces itself: %+v, log %q", s, logOf(k, w.Name))
	}
	if hook := said(t, k, w.Name, "fds"); len(strings.Fields(hook)) != 3 {
		t.Errorf("a hook has %q, want the standard three", hook)
	}
	open()
	if err := <-applied; err != nil {
		t.Fatal(err)
	}
	if s := status(t, k, w.Name); s.State != backends.Running || s.Restarts != 0 {
		t.Errorf("after it announced itself: %+v", s)
	}
	said(t, k, w.Name, "stamp")
	until(t, "the program's own descriptors", func() (string, bool) {
		text := logOf(k, w.Name)
		return text, strings.Count(text, "fds: ") == 2 && strings.Contains(text, "fds: 0=null 1=log 2=log\n")
	})
}

// A program that ends first holds nobody, and is told as one that announces nothing.
func TestEndsBeforeItAnnounces(t *testing.T) {
	k := announcing(t, t.TempDir())
	k.hookTime = time.Hour
	t.Cleanup(func() { sweep(t, k) })
	w := workload("brief", "exit xxx")
	w.Hooks.PostInit = [][]string{{"/app", "stamp"}}
	if err := k.Apply(t.Context(), w); !errors.Is(err, backends.ErrNotFound) {
		t.Errorf("apply: error %v, want that of a hook without its program", err)
	}
	if s := status(t, k, w.Name); s.State != backends.Backoff || s.ExitCode != 3 {
		t.Errorf("got %+v", s)
	}
}

func TestNeverAnnounces(t *testing.T) {
	k := announcing(t, t.TempDir())
	k.hookTime = 200 * time.Millisecond
	t.Cleanup(func() { sweep(t, k) })
	w := workload("silent", "wait")
	apply(t, k, w)
	if s := status(t, k, w.Name); s.State != backends.Starting {
		t.Errorf("without hooks: %+v", s)
	}
	w.Name, w.Hooks.PostInit = "silent-00000002", [][]string{{"/app", "stamp"}}
	var fault *backends.StartError
	if err := k.Apply(t.Context(), w); !errors.As(err, &fault) || fault.Cause != "the program has not begun within 200ms" {
		t.Errorf("with a hook: error %v", err)
	}
	if s := status(t, k, w.Name); s.State != backends.Damaged || strings.Contains(logOf(k, w.Name), "stamp") {
		t.Errorf("with a hook: %+v, log %q", s, logOf(k, w.Name))
	}
}

// The next keeper takes it for running, and a program does not end because nobody hears it.
func TestAnnouncesToNobody(t *testing.T) {
	state := t.TempDir()
	k := announcing(t, state)
	w, open := gated(t)
	apply(t, k, w)
	if err := k.Close(); err != nil { // ends, although it is being listened to
		t.Fatal(err)
	}
	k = announcing(t, state)
	t.Cleanup(func() { sweep(t, k) })
	if s := status(t, k, w.Name); s.State != backends.Running {
		t.Errorf("found again: %+v", s)
	}
	open()
	said(t, k, w.Name, "announce")
	if s := status(t, k, w.Name); s.State != backends.Running || s.Restarts != 0 {
		t.Errorf("it announced itself to nobody: %+v", s)
	}
}
