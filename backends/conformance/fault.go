package conformance

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kindos/kmo/backends"
)

// faultChecks are about what goes wrong.
func faultChecks() []check {
	return []check{
		{"hooks run at their moments", hooksRun},
		{"preInit runs again before a program that is started again", hooksAgain},
		{"a failing preInit is an error with its output, and no program", preInitFails},
		{"a postInit hook that ends badly damages the workload", postInitFails},
		{"an exit hook that does not end holds nobody", exitHangs},
		{"an image without content is an error and leaves nothing", noContent},
		{"cancel leaves nothing half", cancelled},
		{"damage is seen and repaired", damageRepaired},
		{"a full disk is told and leaves nothing", diskFull},
	}
}

func hooksRun(b *bench) {
	if !b.has(backends.Hooking) || !b.has(backends.Keep) {
		return // without a kept path the order could not be seen; that each is run is seen where it fails or hangs
	}
	w := b.unit("relay", "append /keep/order main,", "wait")
	w.Overlay.Keep = []string{"/keep"}
	w.Hooks = backends.Hooks{
		PreInit:  [][]string{{"/app", "append /keep/order pre1,"}, {"/app", "append /keep/order pre2,"}},
		PostInit: [][]string{{"/app", "append /keep/order post,"}},
		Exit:     [][]string{{"/app", "append /keep/order exit,"}},
	}
	w = b.apply(w)
	b.line(w.Name, "waiting")
	b.apply(w)
	b.remove(w.Name)
	look := b.unit("relay", "cat /keep/order", "wait")
	look.Overlay.Keep = []string{"/keep"}
	look = b.apply(look)
	got := b.line(look.Name, "cat /keep/order:")
	if got != `"pre1,pre2,main,post,exit,"` && got != `"pre1,pre2,post,main,exit,"` {
		b.Errorf("hooks and program ran as %s, want pre1,pre2,main,post,exit,", got)
	}
}

func hooksAgain(b *bench) {
	if !b.has(backends.Hooking) || !b.has(backends.Keep) {
		return // as above
	}
	w := b.unit("relay", "append /keep/order main,", "cat /keep/order", "wait")
	w.Overlay.Keep = []string{"/keep"}
	w.Hooks.PreInit = [][]string{{"/app", "append /keep/order pre,"}}
	w = b.apply(w)
	b.kill(b.up(w.Name))
	b.poll("a second start", func() (string, bool) {
		text := b.log(w.Name)
		return text, strings.Count(text, "waiting\n") == 2
	})
	if got := b.line(w.Name, "cat /keep/order:"); got != `"pre,main,pre,main,"` {
		b.Errorf("hook and program ran as %s, want pre,main,pre,main,", got)
	}
}

func preInitFails(b *bench) {
	if !b.has(backends.Hooking) {
		return // the refusal of it is checked with the others
	}
	w := b.unit("relay", "say never", "wait")
	w.Hooks.PreInit = [][]string{{"/app", "say because-of-this", "exit 9"}, {"/app", "say not-reached"}}
	w = seal(w)
	b.names = append(b.names, w.Name)
	err := b.backend.Apply(b.Context(), w)
	var start *backends.StartError
	if !errors.As(err, &start) || start.Workload != w.Name || !strings.Contains(start.Output, "because-of-this") {
		b.Fatalf("apply: error %v, want a *StartError with the hook's output", err)
	}
	if strings.Contains(err.Error(), "not-reached") {
		b.Errorf("the hook after the one that failed was run: %v", err)
	}
	if s, ok := b.status(w.Name); ok && s.State == backends.Running {
		b.Errorf("the program runs although preInit failed: %+v", s)
	}
	if text, err := b.logs(w.Name, backends.LogOptions{}); err == nil && strings.Contains(text, "never") {
		b.Errorf("the program ran although preInit failed: %q", text)
	}
	b.remove(w.Name)
	b.gone(w.Name)
}

func postInitFails(b *bench) {
	if !b.has(backends.Hooking) {
		return // the refusal of it is checked with the others
	}
	w := b.unit("relay", "wait")
	w.Hooks.PostInit = [][]string{{"/app", "say because-of-this", "exit 9"}}
	w = seal(w)
	b.names = append(b.names, w.Name)
	var first backends.Status
	for range 2 { // the second runs the hook again, and leaves the program alone
		err := b.backend.Apply(b.Context(), w)
		var start *backends.StartError
		if !errors.As(err, &start) || start.Workload != w.Name {
			b.Fatalf("apply: error %v, want a *StartError", err)
		}
		s, ok := b.status(w.Name)
		if !ok || s.State != backends.Damaged || s.Detail == "" {
			b.Errorf("after a postInit hook that failed it is %+v, want it damaged, and why", s)
		}
		if first.Name == "" {
			first = s
		}
		if s.PID != first.PID || !s.Started.Equal(first.Started) {
			b.Errorf("applying it again started the program again: %+v, was %+v", s, first)
		}
	}
	b.remove(w.Name)
	b.gone(w.Name)
}

// exitHangs: the hook comes before the stop, and Remove returns soon after its context ends or after a bound of the backend's own.
func exitHangs(b *bench) {
	if !b.has(backends.Hooking) {
		return // the refusal of it is checked with the others
	}
	w := b.unit("relay", "wait")
	w.Hooks.Exit = [][]string{{"/app", "wait"}}
	w = b.apply(w)
	before := b.up(w.Name)
	var err error
	b.within(500*time.Millisecond, func(ctx context.Context) error {
		err = b.backend.Remove(ctx, w.Name)
		return err
	})
	if err != nil {
		if s, _ := b.status(w.Name); !errors.Is(err, context.DeadlineExceeded) || s.PID != before.PID {
			b.Errorf("Remove ended with %v, workload %+v; want the context's end, and the program not stopped before its hook has ended", err, s)
		}
		b.kill(before) // what has no program has no exit hooks
		b.remove(w.Name)
	}
	b.gone(w.Name)
}

// gone makes sure that nothing of a removed workload is listed.
func (b *bench) gone(name string) {
	b.Helper()
	if s, ok := b.status(name); ok {
		b.Errorf("a removed workload is still listed: %+v", s)
	}
}

func noContent(b *bench) {
	if b.subject.Images[b.format].Content == "" {
		return // it is the runtime that fetches it, and it may yet find it
	}
	for _, content := range []string{"", filepath.Join(b.TempDir(), "none")} {
		w := b.unit("relay", "wait")
		w.Image.Content = content
		w = seal(w)
		b.names = append(b.names, w.Name)
		if err := b.backend.Apply(b.Context(), w); err == nil {
			b.Errorf("apply of an image with content %q: no error", content)
		}
		if s, ok := b.status(w.Name); ok && s.State == backends.Running {
			b.Errorf("it runs: %+v", s)
		}
		b.remove(w.Name)
		b.gone(w.Name)
	}
}

func endedContext(b *bench) {
	w := b.apply(b.unit("relay", "wait"))
	before := b.up(w.Name)
	other := seal(b.unit("other", "wait"))
	b.names = append(b.names, other.Name)
	ctx, cancel := context.WithCancel(b.Context())
	cancel()
	calls := map[string]func() error{
		"apply":  func() error { return b.backend.Apply(ctx, other) },
		"remove": func() error { return b.backend.Remove(ctx, w.Name) },
		"observe": func() error {
			_, err := b.backend.Observe(ctx)
			return err
		},
	}
	for name, call := range calls {
		if err := call(); !errors.Is(err, context.Canceled) {
			b.Errorf("%s with an ended context: error %v, want context.Canceled", name, err)
		}
	}
	if list := b.observe(); len(list) != 1 || list[0].Name != w.Name || list[0].State != before.State {
		b.Errorf("calls with an ended context changed the host: %+v", list)
	}
}

// cancelled ends the context of Apply and Remove at moments from at once to well after.
func cancelled(b *bench) {
	for i, after := range []time.Duration{0, 1, 3, 10, 30, 100} {
		w := seal(b.unit("relay", fmt.Sprint("say ", i), "wait"))
		b.names = append(b.names, w.Name)
		b.within(after*time.Millisecond, func(ctx context.Context) error { return b.backend.Apply(ctx, w) })
		if list := b.observe(); len(list) > 1 || len(list) == 1 && list[0].Name != w.Name {
			b.Fatalf("after a cancelled apply observe lists %v", names(list))
		}
		b.apply(w)
		b.line(w.Name, "waiting")
		b.within(after*time.Millisecond, func(ctx context.Context) error { return b.backend.Remove(ctx, w.Name) })
		b.remove(w.Name)
		b.gone(w.Name)
		if b.subject.Leaks != nil {
			if left := b.subject.Leaks(b.T); len(left) > 0 {
				b.Errorf("cancelled after %v: left behind: %q", after*time.Millisecond, left)
			}
		}
	}
}

// within runs a call whose context ends after a time, and wants it to return soon after that.
func (b *bench) within(after time.Duration, call func(context.Context) error) {
	b.Helper()
	ctx, cancel := context.WithTimeout(b.Context(), after)
	defer cancel()
	returned := make(chan struct{})
	go func() {
		defer close(returned)
		_ = call(ctx) // done or not: what has become of it is looked at
	}()
	select {
	case <-returned:
	case <-time.After(after + b.patience):
		b.Fatalf("a call has not returned %v after its context ended", b.patience)
	}
}

func damageRepaired(b *bench) {
	if b.subject.Damage == nil {
		return // nothing of this runtime can be damaged
	}
	w := b.apply(b.unit("relay", "wait"))
	b.up(w.Name)
	b.subject.Damage(b.T, w)
	s := b.until(w.Name, "not running as applied", func(s backends.Status) bool { return !running(s) })
	if s.State == backends.Damaged && s.Detail == "" {
		b.Errorf("a damaged workload without a detail: %+v", s)
	}
	b.apply(w)
	b.until(w.Name, "running after repair", running)
	b.line(w.Name, "waiting")
}

func manyAtOnce(b *bench) {
	const many = 6
	var all sync.WaitGroup
	var mu sync.Mutex
	for i := range many {
		w := seal(b.unit(fmt.Sprint("unit-", i), "wait"))
		b.names = append(b.names, w.Name)
		for range 2 {
			all.Go(func() {
				if err := b.backend.Apply(b.Context(), w); err != nil {
					mu.Lock()
					defer mu.Unlock()
					b.Errorf("apply: %v", err)
				}
			})
		}
		all.Go(func() {
			if _, err := b.backend.Observe(b.Context()); err != nil {
				mu.Lock()
				defer mu.Unlock()
				b.Errorf("observe: %v", err)
			}
		})
	}
	all.Wait()
	for _, name := range b.names {
		s := b.up(name)
		if s.Restarts != 0 {
			b.Errorf("%s was started %d times", name, s.Restarts+1)
		}
	}
	for _, name := range b.names {
		all.Go(func() {
			if err := b.backend.Remove(b.Context(), name); err != nil {
				mu.Lock()
				defer mu.Unlock()
				b.Errorf("remove: %v", err)
			}
		})
	}
	all.Wait()
	if list := b.observe(); len(list) != 0 {
		b.Errorf("observe still lists %v", names(list))
	}
}

// hostDir is a folder that anybody may write, with a file in it.
func (b *bench) hostDir() string {
	b.Helper()
	dir := b.TempDir()
	if err := os.Chmod(dir, 0o777); err != nil { // that is the point
		b.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("of the host"), 0o644); err != nil { // to be read by the workload's user
		b.Fatal(err)
	}
	return dir
}

// diskFull looks at a backend whose state lies on a disk without room, and then with it again.
func diskFull(b *bench) {
	if b.subject.At == nil {
		return // nothing is kept on a disk of this host
	}
	if os.Geteuid() != 0 {
		b.Skip("a small disk needs root")
	}
	disk := b.TempDir()
	if output, err := exec.CommandContext(b.Context(), "mount", "-t", "tmpfs", "-o", "size=256m", "none", disk).CombinedOutput(); err != nil {
		b.Fatalf("mounting a small disk: %v: %s", err, output)
	}
	b.Cleanup(func() {
		b.end()
		if output, err := exec.CommandContext(context.Background(), "umount", disk).CombinedOutput(); err != nil {
			b.Errorf("somebody still uses the disk: %v: %s", err, output)
		}
	})
	open := b.subject.Open
	b.subject.Open = func(t *testing.T) backends.Backend { return b.subject.At(t, filepath.Join(disk, "state")) }
	b.reopen()
	filler := filepath.Join(disk, "filler")
	if output, err := exec.CommandContext(b.Context(), "dd", "if=/dev/zero", "of="+filler, "bs=1M").CombinedOutput(); !strings.Contains(string(output), "No space left") {
		b.Fatalf("filling the disk: %v: %s", err, output)
	}
	w := seal(b.unit("relay", "wait"))
	b.names = append(b.names, w.Name)
	if err := b.backend.Apply(b.Context(), w); err == nil {
		b.up(w.Name) // it needed no room
	} else if !strings.Contains(err.Error(), "no space left") {
		b.Errorf("apply: error %v, want one that says there is no space left", err)
	} else if list := b.observe(); len(list) > 0 {
		b.Errorf("observe: %+v, want nothing", list)
	}
	if err := os.Remove(filler); err != nil {
		b.Fatal(err)
	}
	b.apply(w)
	b.up(w.Name)
	b.remove(w.Name)
	b.gone(w.Name)
	b.subject.Open = open
	b.reopen()
}
