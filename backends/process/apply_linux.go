package process

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/policy/refusal"
	"golang.org/x/sys/unix"
)

const (
	hookTime     = 30 * time.Second       // for each hook
	defaultGrace = 10 * time.Second       // where a workload says none
	dismissTime  = 5 * time.Second        // for an earlier keeper's command to end
	restartTime  = 2 * time.Minute        // for a start without a caller, preInit hooks and all
	portTime     = 500 * time.Millisecond // for a port to be let go
	quick        = time.Minute            // an end sooner than this after the start makes the next pause longer
)

// Apply makes a workload run as specified. The same spec with another Content is another base, and starts it again.
func (k *Keeper) Apply(ctx context.Context, w backends.Workload) error {
	if err := k.check(w); err != nil {
		return err
	}
	e, release, err := k.take(ctx, w.Name, true)
	if err != nil {
		return err
	}
	defer release()
	known := e.record.Workload.Name != ""
	removing := e.removing()
	if err := k.secrets.Hide(w); err != nil {
		if !known {
			err = errors.Join(err, k.clear(e))
		}
		return err
	}
	same := known && !removing && e.record.Workload.Spec == w.Spec && e.record.Workload.Image.Content == w.Image.Content
	if same {
		e.mu.Lock()
		e.record.Workload.Files = w.Files // with their secrets
		e.mu.Unlock()
	}
	if same && e.now() != nil {
		return k.postInit(ctx, e)
	}
	if same { // between two starts: not waited for any longer
		if err := k.start(ctx, e, nil); err != nil {
			return err
		}
		return k.postInit(ctx, e)
	}
	if err := k.replace(ctx, e, w, !removing); err != nil {
		if e.record.Workload.Name == "" { // it never came to be
			err = errors.Join(err, k.clear(e))
		}
		return err
	}
	return k.postInit(ctx, e)
}

// replace makes an entry's program the one of w. What is refused is refused before the old one is touched.
func (k *Keeper) replace(ctx context.Context, e *entry, w backends.Workload, exitHooks bool) error {
	ports := e.record.Ports // those of the same spec stay
	if e.record.Workload.Spec != w.Spec || len(ports) != len(w.Run.Ports) {
		var err error
		if ports, err = k.choosePorts(w); err != nil {
			return err
		}
	}
	next := record{Workload: w, Ports: ports, Pending: len(w.Hooks.PostInit) > 0}
	p, err := k.plan(ctx, &next)
	if err != nil {
		return err
	}
	if err := k.stop(ctx, e, exitHooks); err != nil {
		return err
	}
	e.mu.Lock()
	e.record = next // whole: Observe reads it from here on
	e.mu.Unlock()
	if err := k.start(ctx, e, p); err != nil {
		return errors.Join(err, k.clear(e))
	}
	return nil
}

// Remove ends a workload: exit hooks, SIGTERM, its grace, SIGKILL. When ctx ends before, the workload is still there, is not
// started again, and the next Remove goes on.
func (k *Keeper) Remove(ctx context.Context, name string) error {
	if e := k.entry(name); e != nil && ctx.Err() == nil {
		if err := e.leave(); err != nil { // before its turn: what the keeper itself does with it ends now
			return err
		}
	}
	e, release, err := k.take(ctx, name, false)
	if err != nil || e == nil {
		return err
	}
	defer release()
	if !e.removing() { // an Apply has had the turn before
		if err := e.leave(); err != nil {
			return err
		}
	}
	if err := k.stop(ctx, e, true); err != nil {
		return err
	}
	return k.clear(e)
}

// leave marks a workload as one that is being removed, and ends a start or hooks that nobody but the keeper waits for.
func (e *entry) leave() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.record.Workload.Name == "" {
		return nil // asked for, and not there yet
	}
	e.record.Removing, e.detail = true, "being removed"
	if e.interrupt != nil {
		e.interrupt()
	}
	if err := e.record.save(e.dir); err != nil && !errors.Is(err, os.ErrNotExist) { // somebody took the folder away: the rest is to go too
		return err
	}
	return nil
}

// removing says whether Remove has begun, which marks that without the turn.
func (e *entry) removing() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.record.Removing
}

// unasked is the context of what the keeper does with a workload of its own accord. It is ended by Close, by Remove, and by done, which
// the caller must call.
func (k *Keeper) unasked(e *entry, limit time.Duration) (ctx context.Context, done func()) {
	ctx, cancel := context.WithTimeout(k.ctx, limit)
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.record.Removing {
		cancel()
	}
	e.interrupt = cancel
	return ctx, func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.interrupt = nil
		cancel()
	}
}

// stop ends the program of a workload, if there is one, and everything it started.
func (k *Keeper) stop(ctx context.Context, e *entry, hooks bool) error {
	p := e.now()
	if p == nil {
		return nil
	}
	w := e.record.Workload
	if hooks {
		for _, argv := range w.Hooks.Exit {
			if err := k.runHook(ctx, e, "exit", argv); err != nil {
				k.options.Logger.Warn("running an exit hook", "workload", e.name, "hook", argv, "err", err)
			}
			if ctx.Err() != nil {
				return ctx.Err()
			}
		}
	}
	grace := w.Run.Grace
	if grace <= 0 {
		grace = defaultGrace
	}
	// Process 1 of a namespace gets no signal it does not catch: what SIGTERM would have ended is ended at once.
	if p.catches(unix.SIGTERM) {
		p.signal(unix.SIGTERM)
		timer := time.NewTimer(grace)
		defer timer.Stop()
		select {
		case <-p.done:
		case <-timer.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	p.kill()
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// clear removes everything of a workload that has no program but its kept paths. The record goes first: what a crash leaves
// of the rest has no record and is cleared when the folder is opened again.
func (k *Keeper) clear(e *entry) error {
	if err := k.groups.Remove(e.name); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(e.dir, recordFile)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := errors.Join(os.RemoveAll(e.dir), k.secrets.Forget(e.name)); err != nil {
		return err
	}
	if k.options.Gone != nil {
		k.options.Gone(e.name)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.entries, e.name)
	for port, whose := range k.ports {
		if whose == e.name {
			delete(k.ports, port)
		}
	}
	e.mu.Lock()
	e.cleared = true
	e.mu.Unlock()
	return nil
}

// postInit runs the hooks that follow a start, if they have not all ended well. A workload in which they did not is damaged, and
// applying it again runs them again.
func (k *Keeper) postInit(ctx context.Context, e *entry) error {
	if !e.record.Pending {
		return nil
	}
	for _, argv := range e.record.Workload.Hooks.PostInit {
		err := k.begun(ctx, e)
		if err == nil {
			err = k.runHook(ctx, e, "postInit", argv)
		}
		if err != nil {
			e.note(backends.Damaged, err.Error())
			return err
		}
	}
	e.note(backends.Running, "")
	return e.change(func(r *record) { r.Pending = false })
}

// note sets the state of a workload whose program runs.
func (e *entry) note(state backends.State, detail string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.program != nil {
		e.state, e.detail = state, refusal.Clip(detail, 400)
	}
}

// runHook runs a command inside a running workload, with its log for output.
func (k *Keeper) runHook(ctx context.Context, e *entry, moment string, argv []string) error {
	log, err := openLog(e.dir)
	if err != nil {
		return err
	}
	defer log.Close()
	return k.hook(ctx, e, moment, argv, log, func(ctx context.Context, out io.Writer) (int, error) {
		return k.join(ctx, e, argv, out)
	})
}

// kept makes the kept folders of a workload for its user.
func (k *Keeper) kept(w backends.Workload) (list []string, err error) {
	for _, keep := range w.Overlay.Keep {
		at := k.keptPath(w.Unit, keep)
		if err := errors.Join(os.MkdirAll(at, 0o750), os.Chown(at, w.Run.User, w.Run.User)); err != nil {
			return nil, err
		}
		list = append(list, at)
	}
	return list, nil
}

// place is where a monitor finds what belongs to a workload.
func (k *Keeper) place(w *backends.Workload) Place {
	p := Place{Dir: filepath.Join(k.options.State, "work", w.Name, "own"), Memory: k.secrets.Folder(w.Name), Log: logTimes * k.options.LogSize, Bare: !k.support.Mounts}
	for _, keep := range w.Overlay.Keep {
		p.Kept = append(p.Kept, k.keptPath(w.Unit, keep))
	}
	return p
}

// keptPath is where a kept path of a unit lies.
func (k *Keeper) keptPath(unit, to string) string {
	return filepath.Join(k.options.State, "kept", unit, backends.KeptName(to))
}

// check refuses what cannot be done, before anything is.
func (k *Keeper) check(w backends.Workload) error {
	if !k.Confines() {
		return &backends.FeatureError{Backend: k.options.Backend, Feature: backends.Feature(w.Format), Detail: "without root a program needs landlock and seccomp to be kept from what is its user's"}
	}
	// The bounds are among it: what is to be bounded never runs unbounded. The format is the plan's to look at.
	able := backends.Fingerprint{Backend: k.options.Backend, Formats: []backends.Format{w.Format}, Features: k.Features(), Missing: k.Missing()}
	if err := able.Check(w, k.options.State, "/proc", "/dev"); err != nil {
		return err
	}
	free := unprivilegedPorts()
	for _, p := range w.Run.Ports {
		if port := max(p.Port, p.Host); port != 0 && port < free && !k.publishes(w) {
			return &backends.FeatureError{Backend: k.options.Backend, Feature: backends.LowPorts,
				Detail: fmt.Sprintf("port %s: numbers below %d need a capability; a program here has none", p.Name, free)}
		}
	}
	return nil
}

// plan asks for the program of a workload, and refuses one that cannot be run here.
func (k *Keeper) plan(ctx context.Context, r *record) (*Program, error) {
	p, err := k.options.Plan(ctx, k.resolved(r), k.place(&r.Workload))
	switch {
	case err != nil:
		return nil, err
	case p.Root != "" && !k.support.Overlay:
		return nil, &backends.FeatureError{Backend: k.options.Backend, Feature: backends.Overlays, Detail: "an image's root needs overlayfs, and root to mount it"}
	case len(p.Argv) == 0:
		return nil, &backends.StartError{Workload: r.Workload.Name, Stage: "exec", Cause: "neither the image nor the unit names a command"}
	}
	return &p, nil
}

// settle gives a start its ports and its plan, which is made anew if the ports are others than it was made for.
func (k *Keeper) settle(ctx context.Context, e *entry, p *Program) (*Program, error) {
	changed, err := k.settlePorts(ctx, e)
	if err != nil {
		return nil, err
	}
	if p == nil || changed {
		if p, err = k.plan(ctx, &e.record); err != nil {
			return nil, err
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.plan = p
	return p, nil
}

// planned is what a workload's present program was started by. Of one that an earlier process started it is asked for now.
func (k *Keeper) planned(ctx context.Context, e *entry) (*Program, error) {
	e.mu.Lock()
	p, r := e.plan, e.record
	e.mu.Unlock()
	if p != nil {
		return p, nil
	}
	p, err := k.plan(ctx, &r)
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.plan == nil {
		e.plan = p
	}
	return p, nil
}
