package conformance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kindos/kmo/backends"
)

// killedAt names the folder of the process that is to be killed, and is set in that alone: the workload, its backend's state, and "ticks"
// once the hook does.
const killedAt = "KMO_CONFORMANCE_KILLED"

// hookOutlives kills the process of a backend while a hook counts. In the log of the next run nothing may be the first one's.
func hookOutlives(b *bench) {
	if !b.subject.Dies || !b.has(backends.Hooking) {
		return // nobody's process is ours to kill
	}
	if at := os.Getenv(killedAt); at != "" {
		b.hookUntilKilled(at)
		return
	}
	w := b.unit("relay", "wait")
	w.Hooks.PostInit = [][]string{{"/app", "tick"}}
	w = seal(w)
	at := b.TempDir()
	b.killMeanwhile(w, at)
	b.subject.Open = func(t *testing.T) backends.Backend { return b.subject.At(t, filepath.Join(at, "state")) }
	b.reopen()
	b.names = append(b.names, w.Name)
	b.poll("the second run of the hook", func() (string, bool) {
		text := b.log(w.Name)
		second := text[max(0, strings.LastIndex(text, "tick 1\n")):]
		if strings.Count(text, "tick 1\n") < 2 || strings.Count(second, "\n") < 50 {
			return text, false
		}
		for i, line := range strings.Split(second, "\n")[:50] {
			if want := fmt.Sprint("tick ", i+1); line != want {
				b.Fatalf("in the second run of a hook the log says %q, want %q: its first run goes on beside it", line, want)
			}
		}
		return text, true
	})
}

// killMeanwhile applies a workload by this test again, in a process of its own, which is killed as soon as the workload's hook ticks.
func (b *bench) killMeanwhile(w backends.Workload, at string) {
	b.Helper()
	text, err := json.Marshal(w)
	if err = errors.Join(err, os.WriteFile(filepath.Join(at, "workload"), text, 0o600)); err != nil {
		b.Fatal(err)
	}
	mortal := exec.CommandContext(b.Context(), os.Args[0], "-test.run", "^"+strings.ReplaceAll(b.Name(), "/", "$/^")+"$")
	mortal.Env = append(os.Environ(), killedAt+"="+at, "TMPDIR="+b.TempDir())
	var said strings.Builder
	mortal.Stdout, mortal.Stderr, mortal.WaitDelay = &said, &said, time.Second // what it has left behind may hold them
	if err := mortal.Start(); err != nil {
		b.Fatal(err)
	}
	for deadline := time.Now().Add(2 * b.patience); ; time.Sleep(10 * time.Millisecond) { // its images are made first
		if _, err = os.Stat(filepath.Join(at, "ticks")); err == nil || time.Now().After(deadline) {
			break
		}
	}
	_, _ = mortal.Process.Kill(), mortal.Wait()
	if err != nil {
		b.Fatalf("the hook does not tick: %s", said.String())
	}
}

// hookUntilKilled applies the workload and says when its hook ticks.
func (b *bench) hookUntilKilled(at string) {
	var w backends.Workload
	text, err := os.ReadFile(filepath.Join(at, "workload"))
	if err = errors.Join(err, json.Unmarshal(text, &w)); err != nil {
		b.Fatal(err)
	}
	b.subject.Open = func(t *testing.T) backends.Backend { return b.subject.At(t, filepath.Join(at, "state")) }
	b.reopen()
	go func() { _ = b.backend.Apply(context.Background(), w) }() // it ends with this process
	b.poll("a hook that ticks", func() (string, bool) {
		text, err := b.logs(w.Name, backends.LogOptions{})
		return fmt.Sprint(text, err), strings.Contains(text, "tick 20\n")
	})
	if err := os.WriteFile(filepath.Join(at, "ticks"), nil, 0o600); err != nil {
		b.Fatal(err)
	}
	time.Sleep(b.patience)
}
