// Package fake is the contract of package backends in memory, for the tests of whatever uses a backend.
//
// Its programs are imaginary: a program runs the moment it is started, all at once, and then either has ended or is said to
// run until it is stopped. So nothing waits, nothing leaks, and time passes only through Now. With a Dir the state is in files,
// and another Backend over the same Dir, in the same process or a later one, finds it.
//
//	b := &fake.Backend{}
//	b.Before = func(ctx context.Context, call, name string) error { … } // fail with nothing done, or hang until ctx ends
//	b.After = func(ctx context.Context, call, name string) error { … }  // fail with everything done
//
// Content that is an absolute path must be there; any other text stands for itself.
//
//	b.Kill("relay-3f9a2c1d"); b.Damage("relay-3f9a2c1d", "a byte of the base changed"); b.Calls("Apply")
package fake

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/kindos/kmo/backends"
)

// Backend is a backend that runs nothing. The zero value is ready; the fields are to be set before its first use.
type Backend struct {
	Dir     string                                  // where state is kept; empty for nowhere
	Print   backends.Fingerprint                    // what it can do; the zero value is Able
	Program func(p *Process) (code int, ended bool) // what an image does, hooks and Exec included; nil runs for ever, and ends at once with 0 as a hook
	Pause   time.Duration                           // from the end of a program to its next start, doubled with each; 0 means 10 ms
	Now     func() time.Time                        // nil means time.Now
	// Before is asked ahead of a call's effect, After behind it; the error is the call's. Call is the method's name.
	Before, After func(ctx context.Context, call, name string) error

	mu        sync.Mutex
	loaded    bool
	workloads map[string]*workload
	kept      map[string]map[string][]byte // unit → path → content
	list      []backends.Status            // what Observe says; nil when it is to be made anew
	calls     map[string]int
	more      chan struct{} // closed, and made anew, when a log has grown
}

var (
	_ backends.Backend = (*Backend)(nil)
	_ backends.Execer  = (*Backend)(nil)
)

// workload is one workload's state, as it is kept.
type workload struct {
	Workload backends.Workload
	Status   backends.Status
	Log      []byte
	Again    time.Time         // when a program that ended is started again
	Pending  bool              // its postInit hooks have not all ended well since the program was started
	Written  map[string][]byte // its overlay
}

// lives says whether the program runs: a postInit hook that ended badly ends nothing.
func (x *workload) lives() bool {
	return x.Status.State == backends.Running || x.Status.State == backends.Damaged && x.Pending
}

// Able is the fingerprint of a Backend that is not given another: every format, and the features that can be imagined.
func Able() backends.Fingerprint {
	return backends.Fingerprint{
		Backend: "fake", Version: "1", Isolation: backends.IsolationNone,
		Formats:   []backends.Format{backends.OCI, backends.LXC, backends.WASM, backends.AppImage, backends.Native},
		Platforms: []string{runtime.GOOS + "/" + runtime.GOARCH},
		Features: []backends.Feature{
			backends.Exec, backends.Files, backends.Hooking, backends.Keep, backends.LimitCPU, backends.LimitDisk, backends.LimitMemory,
			backends.LimitPIDs, backends.Overlays, backends.OverlayRoot,
		},
	}
}

// Fingerprint returns Print.
func (b *Backend) Fingerprint(ctx context.Context) (able backends.Fingerprint, err error) {
	err = b.call(ctx, "Fingerprint", "", func() error {
		able = b.able()
		return nil
	})
	return able, err
}

func (b *Backend) able() backends.Fingerprint {
	if b.Print.Backend == "" {
		return Able()
	}
	return b.Print
}

// Observe lists the workloads.
func (b *Backend) Observe(ctx context.Context) (list []backends.Status, err error) {
	err = b.call(ctx, "Observe", "", func() error {
		if b.list == nil {
			b.list = make([]backends.Status, 0, len(b.workloads))
			for _, name := range slices.Sorted(maps.Keys(b.workloads)) {
				b.list = append(b.list, b.workloads[name].Status)
			}
		}
		list = slices.Clone(b.list)
		return nil
	})
	return list, err
}

// Apply makes the workload exist and starts its program.
func (b *Backend) Apply(ctx context.Context, w backends.Workload) error {
	return b.call(ctx, "Apply", w.Name, func() error {
		able := b.able()
		if err := able.Admit(w); err != nil {
			return err
		}
		if err := checkContent(w.Image.Content); err != nil {
			return fmt.Errorf("%s: image content: %w", w.Name, err)
		}
		x := b.workloads[w.Name]
		same := x != nil && x.Workload.Image.Content == w.Image.Content
		switch {
		case same && x.Pending && x.Status.State == backends.Damaged: // its program goes on
			err := b.postInit(x)
			return errors.Join(err, b.changed(w.Name))
		case same && x.Status.State != backends.Damaged && x.Status.State != backends.Exited:
			return nil
		case x == nil:
			x = &workload{Written: map[string][]byte{}}
			x.Status = backends.Status{Name: w.Name, Spec: w.Spec, State: backends.Starting, Addresses: b.addresses(w)}
		case !same:
			b.stop(x)
		}
		x.Workload, x.Status.Content, x.Status.Detail = w, w.Image.Content, ""
		b.workloads[w.Name] = x
		started, err := b.launch(x)
		if !started {
			delete(b.workloads, w.Name)
		}
		return errors.Join(err, b.changed(w.Name))
	})
}

// checkContent wants a path that is absolute to exist, and takes anything else for imaginary content.
func checkContent(path string) error {
	if path == "" {
		return errors.New("it was not fetched")
	}
	if !filepath.IsAbs(path) {
		return nil
	}
	_, err := os.Stat(path)
	return err
}

// Remove clears the workload but for its kept paths.
func (b *Backend) Remove(ctx context.Context, name string) error {
	return b.call(ctx, "Remove", name, func() error {
		x := b.workloads[name]
		if x == nil {
			return nil
		}
		b.hooks(x, "exit", x.Workload.Hooks.Exit) //nolint:errcheck // it is removed whatever its hooks say
		b.stop(x)
		delete(b.workloads, name)
		return b.changed(name)
	})
}

// Exec runs Program with another argv. One that does not end goes on until the context does.
func (b *Backend) Exec(ctx context.Context, name string, argv []string) (code int, output []byte, err error) {
	ended := true
	err = b.call(ctx, "Exec", name, func() error {
		x := b.workloads[name]
		if x == nil || !x.lives() {
			return backends.ErrNotFound
		}
		code, output, ended = b.run(x, argv)
		return b.changed(name)
	})
	if err == nil && !ended {
		<-ctx.Done()
		return 0, nil, ctx.Err()
	}
	return code, output, err
}

// Logs returns what the workload's programs have written.
func (b *Backend) Logs(ctx context.Context, name string, options backends.LogOptions) (log io.ReadCloser, err error) {
	err = b.call(ctx, "Logs", name, func() error {
		x := b.workloads[name]
		if x == nil {
			return backends.ErrNotFound
		}
		text, at := x.Log, len(x.Log)
		if options.Tail > 0 {
			lines := strings.SplitAfter(strings.TrimSuffix(string(text), "\n"), "\n")
			text = []byte(strings.Join(lines[max(0, len(lines)-options.Tail):], ""))
			if at > 0 && x.Log[at-1] == '\n' {
				text = append(text, '\n')
			}
		}
		if !options.Follow {
			log = io.NopCloser(bytes.NewReader(bytes.Clone(text)))
			return nil
		}
		ctx, cancel := context.WithCancel(ctx)
		log = &follower{backend: b, ctx: ctx, cancel: cancel, x: x, rest: bytes.Clone(text), at: at}
		return nil
	})
	return log, err
}

// call is the frame of every method: it counts, asks Before, holds the lock, lets time pass, and asks After.
func (b *Backend) call(ctx context.Context, call, name string, effect func() error) error {
	b.mu.Lock()
	if b.calls == nil {
		b.calls = map[string]int{}
	}
	b.calls[call]++
	b.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	if b.Before != nil {
		if err := b.Before(ctx, call, name); err != nil {
			return err
		}
	}
	if err := b.locked(effect); err != nil {
		return err
	}
	if b.After != nil {
		return b.After(ctx, call, name)
	}
	return nil
}

func (b *Backend) locked(effect func() error) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.load(); err != nil {
		return fmt.Errorf("fake state: %w", err)
	}
	if err := b.pass(); err != nil {
		return fmt.Errorf("fake state: %w", err)
	}
	return effect()
}

// Calls says how often a method was called, whatever came of it.
func (b *Backend) Calls(call string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.calls[call]
}

// Kill ends a workload's program from outside. It says whether there was one.
func (b *Backend) Kill(name string) bool {
	return b.change(name, func(x *workload) bool {
		if !x.lives() {
			return false
		}
		b.ended(x, 137)
		return true
	})
}

// Damage makes a workload differ from what was applied. It says whether there is such a workload.
func (b *Backend) Damage(name, how string) bool {
	return b.change(name, func(x *workload) bool {
		x.Status.State, x.Status.Detail, x.Pending = backends.Damaged, how, false
		return true
	})
}

// Set changes what Observe says of a workload, for whatever else a test needs. It says whether there is such a workload.
func (b *Backend) Set(name string, change func(*backends.Status)) bool {
	return b.change(name, func(x *workload) bool {
		change(&x.Status)
		return true
	})
}

// Workloads returns what was applied and not removed, sorted by name.
func (b *Backend) Workloads() []backends.Workload {
	var all []backends.Workload
	b.locked(func() error { //nolint:errcheck // without state there is nothing
		for _, name := range slices.Sorted(maps.Keys(b.workloads)) {
			all = append(all, b.workloads[name].Workload)
		}
		return nil
	})
	return all
}

func (b *Backend) change(name string, change func(x *workload) bool) (done bool) {
	err := b.locked(func() error {
		x := b.workloads[name]
		if x == nil || !change(x) {
			return nil
		}
		done = true
		return b.changed(name)
	})
	return done && err == nil
}
