package conformance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kindos/kmo/backends"
)

// askedChecks are about what was asked for, and hold for a backend that runs nothing, too.
func askedChecks() []check {
	return []check{
		{"apply twice is once", applyTwice},
		{"two specs of one unit stand side by side", sideBySide},
		{"remove clears and is nil if there is none", removeClears},
		{"a new process finds what an old one left", newProcess},
		{"a context that has ended changes nothing", endedContext},
		{"many at once", manyAtOnce},
	}
}

// lifeChecks are about being applied, ending, coming back and being removed.
func lifeChecks() []check {
	return []check{
		{"apply starts the program", applyStarts},
		{"another content of the same spec starts it again", otherContent},
		{"remove gives the program its grace", removeGrace},
		{"nomad#27815 a program goes on writing when what started it is gone", writesOn},
		{"a killed program comes back", killedComesBack},
		{"a hook does not run on beside its second run when the backend is killed", hookOutlives},
		{"a program that ends is told with its exit code", exitTold},
	}
}

func applyStarts(b *bench) {
	w := b.apply(b.unit("relay", "say hello", "wait"))
	s, ok := b.status(w.Name)
	if !ok || s.State != backends.Running && s.State != backends.Starting {
		b.Fatalf("right after apply the workload is %+v", s)
	}
	s = b.until(w.Name, "running", running)
	if s.Spec != w.Spec {
		b.Errorf("spec is %v, want %v", s.Spec, w.Spec)
	}
	if s.Restarts != 0 || s.Started.IsZero() {
		b.Errorf("restarts %d, started %v; want 0 and a time", s.Restarts, s.Started)
	}
	b.line(w.Name, "hello")
}

func applyTwice(b *bench) {
	w := b.apply(b.unit("relay", "wait"))
	before := b.up(w.Name)
	b.apply(w)
	after, _ := b.status(w.Name)
	if before.PID != after.PID || !before.Started.Equal(after.Started) || after.Restarts != 0 {
		b.Errorf("the second apply changed the program: %+v, was %+v", after, before)
	}
	if list := b.observe(); len(list) != 1 {
		b.Errorf("observe lists %v, want one", names(list))
	}
}

func otherContent(b *bench) {
	w := b.unit("relay", "wait")
	w.Run.Ports = []backends.Port{{Name: "http"}} // any number, which stays
	w = b.apply(w)
	before := b.up(w.Name)
	if before.Content == "" {
		return // the backend has a copy of its own
	}
	w.Image.Content = b.copied(w.Image.Content)
	b.apply(w)
	after := b.until(w.Name, "running", running)
	if after.Content != w.Image.Content || !after.Started.After(before.Started) || after.Restarts != 0 || !slices.Equal(after.Addresses, before.Addresses) {
		b.Errorf("on another content it is %+v, was %+v", after, before)
	}
	if list := b.observe(); len(list) != 1 {
		b.Errorf("observe lists %v, want one", names(list))
	}
}

// copied is a copy of an image's content at another place, or another name where it is imaginary.
func (b *bench) copied(content string) string {
	b.Helper()
	stat, err := os.Stat(content)
	if err != nil {
		return content + "-copy"
	}
	to := filepath.Join(b.hostDir(), "copy")
	if stat.IsDir() {
		err = os.CopyFS(to, os.DirFS(content))
	} else {
		var text []byte
		if text, err = os.ReadFile(content); err == nil {
			err = os.WriteFile(to, text, 0o755)
		}
	}
	if err != nil {
		b.Fatal(err)
	}
	return to
}

func sideBySide(b *bench) {
	one := b.apply(b.unit("relay", "say one", "wait"))
	two := b.apply(b.unit("relay", "say two", "wait"))
	b.up(one.Name)
	before := b.up(two.Name)
	want := []string{one.Name, two.Name}
	slices.Sort(want)
	if got := names(b.observe()); !slices.Equal(got, want) {
		b.Fatalf("observe lists %v, want %v", got, want)
	}
	b.remove(one.Name)
	after, ok := b.status(two.Name)
	if !ok || after.State != before.State || after.PID != before.PID {
		b.Errorf("removing %s changed %s: %+v, was %+v", one.Name, two.Name, after, before)
	}
	if b.subject.programless() {
		return
	}
	if text := b.log(two.Name); strings.Contains(text, "one") {
		b.Errorf("the log of the one holds lines of the other: %q", text)
	}
}

func removeClears(b *bench) {
	b.remove("nothing-00000000")
	w := b.apply(b.unit("relay", "wait"))
	s := b.up(w.Name)
	b.remove(w.Name)
	if list := b.observe(); len(list) != 0 {
		b.Errorf("observe still lists %v", names(list))
	}
	if s.PID != 0 && syscall.Kill(s.PID, 0) == nil {
		b.Errorf("process %d lives on", s.PID)
	}
	b.remove(w.Name)
	if _, err := b.logs(w.Name, backends.LogOptions{}); !errors.Is(err, backends.ErrNotFound) {
		b.Errorf("logs of a removed workload: error %v, want ErrNotFound", err)
	}
	again := b.apply(b.unit("relay", "wait"))
	if s := b.up(again.Name); s.Restarts != 0 {
		b.Errorf("a workload applied anew has %d restarts", s.Restarts)
	}
}

// removeGrace: the program gets its signal and its time, and whoever follows its log sees its last words.
func removeGrace(b *bench) {
	w := b.apply(b.unit("relay", "wait"))
	b.up(w.Name)
	end := b.follow(w.Name)
	b.remove(w.Name)
	if text := end(); !strings.HasSuffix(text, "stopped\n") && b.format != backends.WASM { // WASI has no signals
		b.Errorf("the log ends as %q, want the program to have stopped by itself", text)
	}
}

func newProcess(b *bench) {
	w := b.apply(b.unit("relay", "say before", "wait"))
	before := b.up(w.Name)
	b.reopen()
	after, ok := b.status(w.Name)
	if !ok || after.State != before.State || after.PID != before.PID || !after.Started.Equal(before.Started) || after.Restarts != 0 {
		b.Fatalf("the new process sees %+v, the old one saw %+v", after, before)
	}
	if !b.subject.programless() {
		b.line(w.Name, "before")
	}
	b.apply(w)
	if again, _ := b.status(w.Name); again.PID != before.PID || !again.Started.Equal(before.Started) {
		b.Errorf("applying the same in a new process changed the program: %+v, was %+v", again, before)
	}
	b.reopen()
	b.remove(w.Name)
	if list := b.observe(); len(list) != 0 {
		b.Errorf("observe still lists %v", names(list))
	}
}

func writesOn(b *bench) {
	w := b.apply(b.unit("relay", "tick"))
	before := b.until(w.Name, "running", running)
	if b.subject.Programs == Imagined {
		return
	}
	b.line(w.Name, "tick 3")
	b.reopen()
	seen, err := strconv.Atoi(b.line(w.Name, "tick"))
	if err != nil {
		b.Fatal(err)
	}
	b.line(w.Name, fmt.Sprint("tick ", seen+5))
	if after, _ := b.status(w.Name); after.Restarts != 0 || after.PID != before.PID {
		b.Errorf("the program was started again: %+v, was %+v", after, before)
	}
}

func killedComesBack(b *bench) {
	w := b.apply(b.unit("relay", "wait"))
	before := b.up(w.Name)
	b.kill(before)
	after := b.until(w.Name, "running again", func(s backends.Status) bool { return running(s) && s.Restarts == before.Restarts+1 })
	if before.PID != 0 && after.PID == before.PID {
		b.Errorf("the program has process %d as before", after.PID)
	}
	if !after.Started.After(before.Started) {
		b.Errorf("started %v, before it was %v", after.Started, before.Started)
	}
	b.reopen()
	b.kill(after)
	b.until(w.Name, "running again in a new process", func(s backends.Status) bool { return running(s) && s.Restarts == after.Restarts+1 })
}

func (b *bench) kill(s backends.Status) {
	b.Helper()
	if b.subject.Kill != nil {
		b.subject.Kill(b.T, s)
		return
	}
	if s.PID <= 1 {
		b.Fatalf("pid is %d: the subject needs a Kill", s.PID)
	}
	if err := syscall.Kill(s.PID, syscall.SIGKILL); err != nil {
		b.Fatalf("killing %d: %v", s.PID, err)
	}
}

func exitTold(b *bench) {
	for _, code := range []int{0, 3} {
		w := b.apply(b.unit("relay", "say bye", "exit "+strconv.Itoa(code)))
		ended := func(s backends.Status) bool { return s.State == backends.Backoff || s.State == backends.Exited }
		s := b.until(w.Name, "ended", ended)
		if s.ExitCode != code || s.OOM {
			b.Errorf("exit code %d, oom %t; want %d, false", s.ExitCode, s.OOM, code)
		}
		b.line(w.Name, "bye")
		b.remove(w.Name)
	}
}

// killedAt names the folder of the process that is to be killed, and is set in that alone: the workload, its backend's state, and "ticks"
// once the hook does.
const killedAt = "KMO_CONFORMANCE_KILLED"

// ticks is where a hook counts: not in its output, whose end might end it.
const ticks = "/tmp/ticks"

// hookOutlives kills the process of a backend while a hook counts. Once the hook is run again nothing may be counted by its first run.
func hookOutlives(b *bench) {
	if !b.subject.Dies || !b.has(backends.Hooking) || !b.has(backends.Overlays) || !b.has(backends.Exec) {
		return // nobody's process is ours to kill, or it could not be seen
	}
	if at := os.Getenv(killedAt); at != "" {
		b.hookUntilKilled(at)
		return
	}
	w := b.unit("relay", "wait")
	w.Hooks.PostInit = [][]string{{"/app", "tick " + ticks}}
	w.Overlay.Size = 1 << 20
	w = seal(w)
	at := b.TempDir()
	b.killMeanwhile(w, at)
	b.subject.Open = func(t *testing.T) backends.Backend { return b.subject.At(t, filepath.Join(at, "state")) }
	b.reopen()
	b.names = append(b.names, w.Name)
	b.poll("the second run of the hook", func() (string, bool) {
		text, err := b.ticks(w.Name)
		second := text[max(0, strings.LastIndex(text, "tick 1\n")):]
		if strings.Count(text, "tick 1\n") < 2 || strings.Count(second, "\n") < 50 {
			return fmt.Sprint(text, err), false
		}
		for i, line := range strings.Split(second, "\n")[:50] {
			if want := fmt.Sprint("tick ", i+1); line != want {
				b.Fatalf("in the second run of a hook is counted %q, want %q: its first run goes on beside it", line, want)
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
		text, err := b.ticks(w.Name)
		return fmt.Sprint(text, err), strings.Contains(text, "tick 20\n")
	})
	if err := os.WriteFile(filepath.Join(at, "ticks"), nil, 0o600); err != nil {
		b.Fatal(err)
	}
	time.Sleep(b.patience)
}

// ticks reads what a workload's hook has counted.
func (b *bench) ticks(name string) (string, error) {
	execer, ok := b.backend.(backends.Execer)
	if !ok {
		b.Fatal("the fingerprint says exec, the backend is no Execer")
	}
	_, output, err := execer.Exec(b.Context(), name, []string{"/app", "cat " + ticks})
	if err != nil {
		return "", err
	}
	return strconv.Unquote(strings.TrimSpace(strings.TrimPrefix(string(output), "cat "+ticks+": ")))
}
