package kubernetes

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kindos/kmo/backends"
)

// shell is a command "in" a container, which KWOK runs on this host.
func shell(script string) []string { return []string{"/bin/sh", "-c", script} }

func TestExec(t *testing.T) {
	b := newBench(t)
	w := workload("relay", "1")
	b.apply(w)
	b.running()
	status, output, err := b.Exec(t.Context(), w.Name, shell("echo out; echo err >&2"))
	if err != nil || status != 0 || !strings.Contains(string(output), "out\n") || !strings.Contains(string(output), "err\n") {
		t.Errorf("exec: %d, %q, %v; want 0, and both streams", status, output, err)
	}
	status, output, err = b.Exec(t.Context(), w.Name, shell("yes | head -c 200000"))
	if err != nil || status != 0 || len(output) != maxOutput {
		t.Errorf("exec: %d, %d bytes, %v; want 0, and as much as is allowed", status, len(output), err)
	}
	if _, _, err := b.Exec(t.Context(), "nothing-00000000", shell("true")); !errors.Is(err, backends.ErrNotFound) {
		t.Errorf("exec in nothing: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, _, err := b.Exec(ctx, w.Name, shell("exec sleep 2")); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("exec whose context ends: %v", err)
	}
	b.remove(w.Name)
}

// TestExitStatus: what a kubelet says of how a command ended; KWOK does not tell its status.
func TestExitStatus(t *testing.T) {
	for text, want := range map[string]struct {
		status int
		said   string
	}{
		`{"metadata":{},"status":"Success"}`: {},
		`{"metadata":{},"status":"Failure","message":"command terminated with non-zero exit code","reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"7"}]}}`: {7, ""},
		`{"metadata":{},"status":"Failure","message":"Internal error occurred: OCI runtime exec failed: exec: \"/x\": no such file or directory","code":500}`:                             {126, `exec: "/x": no such file or directory`},
	} {
		if got, said, err := exitStatus([]byte(text)); got != want.status || said != want.said || err != nil {
			t.Errorf("%s is %d, %q, %v; want %d, %q", text, got, said, err, want.status, want.said)
		}
	}
	for _, text := range []string{`{"status":"Failure","message":"no such container"}`, `{"status":"Failure","message":"OCI runtime exec failed: cannot exec in a stopped container"}`, `x`} {
		if _, _, err := exitStatus([]byte(text)); err == nil {
			t.Errorf("%s is no error", text)
		}
	}
}

func TestLogs(t *testing.T) {
	b := newBench(t)
	w := workload("relay", "2")
	b.apply(w)
	b.running()
	read := func(o backends.LogOptions) string {
		t.Helper()
		log, err := b.Logs(t.Context(), w.Name, o)
		if err != nil {
			t.Fatal(err)
		}
		defer log.Close()
		text, err := io.ReadAll(log)
		if err != nil {
			t.Error(err)
		}
		return string(text)
	}
	if got := read(backends.LogOptions{}); got != "one\ntwo\nthree\n" {
		t.Errorf("the log is %q", got)
	}
	if got := read(backends.LogOptions{Tail: 2}); got != "two\nthree\n" {
		t.Errorf("its tail is %q", got)
	}
	b.says(1, `{"running":{"startedAt":"2026-01-01T00:00:00Z"}}`, `{"terminated":{"exitCode":1,"startedAt":"2026-01-01T00:00:00Z","finishedAt":"2026-01-01T00:00:00Z"}}`)
	if got := read(backends.LogOptions{}); got != "zero\none\ntwo\nthree\n" {
		t.Errorf("after a restart the log is %q, want that of the start before, too", got)
	}
	log, err := b.Logs(t.Context(), w.Name, backends.LogOptions{Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	seen := make([]byte, len("zero\none\ntwo\nthree\n"))
	if _, err := io.ReadFull(log, seen); err != nil || string(seen) != "zero\none\ntwo\nthree\n" {
		t.Errorf("following it shows %q, %v", seen, err)
	}
	if err := log.Close(); err != nil {
		t.Error(err)
	}
	if _, err := log.Read(seen); err == nil {
		t.Error("a log that was closed goes on")
	}
	b.remove(w.Name)
}

// TestHooks runs them at their moments, and again when the cluster has started the program again.
func TestHooks(t *testing.T) {
	b := newBench(t)
	said := filepath.Join(t.TempDir(), "said")
	expect := func(want string) {
		t.Helper()
		text, _ := os.ReadFile(said)
		if string(text) != want {
			t.Errorf("hooks have said %q, want %q", text, want)
		}
	}
	w := workload("relay", "3")
	w.Hooks.PreInit = [][]string{{"/app", "one"}, {"/app", "two"}}
	w.Hooks.PostInit = [][]string{shell("printf 1 >>" + said), shell("printf 2 >>" + said)}
	w.Hooks.Exit = [][]string{shell("printf 3 >>" + said), shell("exec sleep 1"), shell("printf 4 >>" + said)}
	b.hookTime = 500 * time.Millisecond // the second exit hook takes longer, and holds nobody
	b.apply(w)
	expect("12")
	if s := b.status(); s.State != backends.Running {
		t.Errorf("after its hooks it is %+v", s)
	}
	b.apply(w)
	expect("12")
	b.says(1, `{"running":{"startedAt":"2026-01-01T00:00:00Z"}}`, `{"terminated":{"exitCode":1,"startedAt":"2026-01-01T00:00:00Z","finishedAt":"2026-01-01T00:00:00Z"}}`)
	if s := b.status(); s.State != backends.Starting || !strings.Contains(s.Detail, "postInit") {
		t.Errorf("after a restart it is %+v, want it starting, since its hooks are due", s)
	}
	b.running()
	expect("1212")
	reopened := &bench{t, open(t, b.options), b.options, b.namespace}
	reopened.hookTime = b.hookTime
	reopened.running()
	reopened.remove(w.Name)
	expect("121234")
}

func TestPreInitFails(t *testing.T) {
	b := newBench(t)
	w := workload("preinit-fails", "4") // a stage of KWOK's makes its second hook fail
	w.Hooks.PreInit = [][]string{{"/app", "one"}, {"/app", "two"}, {"/app", "three"}}
	var start *backends.StartError
	if err := b.Apply(t.Context(), w); !errors.As(err, &start) || start.Stage != "preInit [/app two]" || start.Cause != "exit status 9" || !strings.Contains(start.Output, "three\n") {
		t.Errorf("apply: %v; want the second hook's end, and its log", err)
	}
	if left := control.objects(t, b.namespace); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

func TestPostInitFails(t *testing.T) {
	b := newBench(t)
	marker := filepath.Join(t.TempDir(), "marker")
	w := workload("relay", "5")
	b.hookTime = 500 * time.Millisecond
	w.Hooks.PostInit = [][]string{shell("echo because-of-this; test -e " + marker + " || exec sleep 2")}
	for range 2 {
		var start *backends.StartError
		if err := b.Apply(t.Context(), w); !errors.As(err, &start) || !strings.Contains(start.Output, "because-of-this") {
			t.Errorf("apply: %v; want a *StartError with what the hook wrote", err)
		}
		if s := b.status(); s.State != backends.Damaged || !strings.Contains(s.Detail, "it has not ended in") {
			t.Errorf("it is %+v, want it damaged, and why", s)
		}
	}
	if err := os.WriteFile(marker, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	b.apply(w)
	if s := b.status(); s.State != backends.Running {
		t.Errorf("when its hooks have ended well it is %+v", s)
	}
	b.remove(w.Name)
}

func TestExitHangs(t *testing.T) {
	b := newBench(t)
	w := workload("relay", "6")
	w.Hooks.Exit = [][]string{shell("exec sleep 3")}
	b.apply(w)
	b.running()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := b.Remove(ctx, w.Name); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("remove whose context ends in a hook: %v", err)
	}
	b.running() // it is not stopped before its hook has ended
	b.hookTime = 200 * time.Millisecond
	b.remove(w.Name)
	if left := control.objects(t, b.namespace); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}
