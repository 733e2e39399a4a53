package docker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/client"
	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/docker/engine"
	"github.com/kindos/kmo/backends/docker/plan"
	"github.com/kindos/kmo/backends/docker/program"
)

const (
	hookTime     = 30 * time.Second // for each hook
	defaultGrace = 10 * time.Second // where a workload says none
	restartTime  = 3 * time.Minute  // for a start without a caller, preInit hooks and all
	clearTime    = 20 * time.Second // for undoing what an ended call has begun
	quick        = time.Minute      // an end sooner than this after the start makes the next pause longer
	lastWords    = 2 * time.Second  // for those who follow a log to read the end of it
	tellTime     = 5 * time.Second  // for an engine to learn that a program has ended
)

// Apply makes a workload run as specified.
func (b *Backend) Apply(ctx context.Context, w backends.Workload) error {
	if err := b.ready(ctx); err != nil {
		return err
	}
	able, err := b.abilities(ctx)
	if err == nil {
		err = b.plan.Check(able, w)
	}
	if err != nil {
		return err
	}
	e, release, err := b.take(ctx, w.Name, true)
	if err != nil {
		return err
	}
	defer release()
	found, err := b.final(ctx, b.plan.Container(w.Name))
	if err != nil {
		return b.unmade(e, err)
	}
	same := found != nil && !found.paused && found.labels[plan.LabelSpec] == w.Spec.String() && found.status != "created" && !e.removing() && e.known()
	if same && found.running {
		b.adopt(e, found)
		return b.postInit(ctx, e)
	}
	if same { // between two starts: not waited for any longer
		if err := b.plan.Put(&w); err != nil {
			return err
		}
		e.mu.Lock()
		e.stuck = false
		e.mu.Unlock()
		b.ended(e, found)
		if err := b.start(ctx, e, found); err != nil {
			return err
		}
		return b.postInit(ctx, e)
	}
	if found != nil {
		if err := b.stop(ctx, e, found, !e.removing()); err != nil {
			return err
		}
		if err := b.discard(ctx, found.id); err != nil {
			return err
		}
		defer b.drop(found.image)
	}
	return b.anew(ctx, e, w)
}

// anew makes a workload that has no container, and leaves nothing of one that cannot be started.
func (b *Backend) anew(ctx context.Context, e *entry, w backends.Workload) error {
	err := b.make(ctx, e, w)
	if err == nil {
		return b.postInit(ctx, e)
	}
	undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), clearTime)
	defer cancel()
	// What cannot be cleared now is found without a program, and cleared when the engine answers again.
	_ = b.clear(undo, e)
	return err
}

// unmade lets go of an entry that never came to be.
func (b *Backend) unmade(e *entry, err error) error {
	if !e.known() {
		b.leave(e)
	}
	return err
}

// make creates and starts the container of a workload. A chosen port that turns out to be taken is chosen again.
func (b *Backend) make(ctx context.Context, e *entry, w backends.Workload) error {
	ports, err := b.choosePorts(w, nil)
	if err != nil {
		return err
	}
	image, done, err := b.image(ctx, w)
	if err != nil {
		return err
	}
	defer done()
	e.mu.Lock()
	e.image = image
	e.mu.Unlock()
	if err := b.plan.Put(&w); err != nil {
		return err
	}
	var taken []int
	for range 5 {
		if err := e.begin(w, ports, image); err != nil {
			return err
		}
		b.step("create")
		id, err := b.createLoaded(ctx, w, image, ports, nil)
		if err != nil {
			return err
		}
		b.step("created")
		err = b.start(ctx, e, &seen{id: id, image: image})
		var busy *busyError
		if !errors.As(err, &busy) || !slices.ContainsFunc(w.Run.Ports, func(p backends.Port) bool { return plan.NamedPort(&w, p) == 0 }) {
			return err
		}
		taken = append(taken, ports...)
		if err := b.discard(ctx, id); err != nil {
			return err
		}
		b.releasePorts(w.Name)
		if ports, err = b.choosePorts(w, taken); err != nil {
			return err
		}
	}
	return fmt.Errorf("%s: each of its ports that was chosen was taken when it was to be published", w.Name)
}

// busyError says that a port could not be published.
type busyError struct{ workload, cause string }

func (e *busyError) Error() string {
	return e.workload + ": a port of it is taken by another program of this host: " + e.cause
}

// start runs the preInit hooks and the program of a workload whose container is there and does not run. The turn is held.
func (b *Backend) start(ctx context.Context, e *entry, c *seen) (err error) {
	e.starts(true)
	defer func() {
		e.starts(false)
		if err != nil {
			e.fail(err)
		}
	}()
	w := e.asked()
	if err := b.plan.Missing(&w); err != nil {
		return err
	}
	for _, argv := range w.Hooks.PreInit {
		if err := b.preInit(ctx, e, w, argv); err != nil {
			return err
		}
	}
	if c.untold { // the engine takes it for running, and would not start it
		if c, err = b.replace(ctx, e, w); err != nil {
			return err
		}
	}
	if err := e.startsAgain(c); err != nil {
		return err
	}
	b.step("start")
	if _, err := b.engine.ContainerStart(ctx, c.id, client.ContainerStartOptions{}); err != nil {
		return b.startFault(ctx, w.Name, w.Argv(), err)
	}
	b.step("started")
	found, err := b.inspect(ctx, c.id)
	if err != nil {
		return err
	}
	if found == nil {
		return fmt.Errorf("%s: its container has been removed as soon as it was started", w.Name)
	}
	b.adopt(e, found)
	return e.change(func(r *record) { r.Starting, r.Started = false, found.started })
}

// replace makes the container of a workload anew. One that it cannot make is made when the workload is next started.
func (b *Backend) replace(ctx context.Context, e *entry, w backends.Workload) (*seen, error) {
	if err := b.discard(ctx, b.plan.Container(e.name)); err != nil {
		return nil, err
	}
	e.mu.Lock()
	e.id = ""
	image, ports := e.image, e.ports
	e.mu.Unlock()
	b.step("create")
	id, err := b.createLoaded(ctx, w, image, ports, nil)
	e.mu.Lock()
	e.id = id
	e.mu.Unlock()
	return &seen{id: id, image: image}, err
}

// startFault says whose fault it is that a container of a workload does not start.
func (b *Backend) startFault(ctx context.Context, workload string, argv []string, err error) error {
	var down *engine.DownError
	plain := b.plain(ctx, err)
	text := plain.Error()
	switch {
	case ctx.Err() != nil, b.ctx.Err() != nil, errors.As(plain, &down):
		return plain
	case strings.Contains(text, "address already in use"), strings.Contains(text, "port is already allocated"):
		return &busyError{workload, text}
	case engine.Unexecutable(text):
		return &backends.StartError{Workload: workload, Stage: "exec " + argv[0], Cause: text}
	}
	if place, why := engine.Unmountable(text); why != "" {
		return &backends.StartError{Workload: workload, Stage: "mount " + place, Cause: why + ": " + text}
	}
	return err
}

// Remove ends a workload: exit hooks, SIGTERM, its grace, SIGKILL. When ctx ends before, the workload is still there, is not started
// again, and the next Remove goes on.
func (b *Backend) Remove(ctx context.Context, name string) error {
	if err := b.ready(ctx); err != nil {
		return err
	}
	if e := b.entry(name); e != nil {
		if err := e.leaving(); err != nil { // before its turn: what is done with it of our own accord ends now
			return err
		}
	}
	e, release, err := b.take(ctx, name, false)
	if err != nil || e == nil {
		return err
	}
	defer release()
	if err := e.leaving(); err != nil { // again: an Apply may have had the turn before
		return err
	}
	found, err := b.final(ctx, b.plan.Container(name))
	if err != nil {
		return err
	}
	if found != nil {
		if err := b.stop(ctx, e, found, true); err != nil {
			return err
		}
	}
	e.heard(ctx)
	return b.clear(ctx, e)
}

// stop ends the program of a container, if there is one. Where the engine refuses to, the removal that follows ends it by force.
func (b *Backend) stop(ctx context.Context, e *entry, c *seen, hooks bool) (err error) {
	if !c.running {
		return nil
	}
	defer func() {
		if improper(err) {
			b.options.Logger.Warn("ending a program", "workload", e.name, "err", err)
			err = nil
		}
	}()
	b.adopt(e, c)
	w := e.asked()
	if hooks && !c.paused {
		for _, argv := range w.Hooks.Exit {
			if err := b.hook(ctx, e.name, "exit", argv, b.inside(e, c.id, argv)); err != nil {
				b.options.Logger.Warn("running an exit hook", "workload", e.name, "hook", argv, "err", err)
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
	p := e.now()
	// Process 1 of a namespace gets no signal it does not catch: what SIGTERM would have ended is ended at once.
	if !c.paused && p.Catches(unix.SIGTERM) {
		if err := b.signal(ctx, c.id, "SIGTERM"); err != nil {
			return err
		}
		within, cancel := context.WithTimeout(ctx, grace)
		defer cancel()
		if b.over(within, c.id, p) == nil {
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	if err := b.signal(ctx, c.id, "SIGKILL"); err != nil {
		return err
	}
	return b.over(ctx, c.id, p)
}

// signal is without effect on a container that does not run.
func (b *Backend) signal(ctx context.Context, id, signal string) error {
	_, err := b.engine.ContainerKill(ctx, id, client.ContainerKillOptions{Signal: signal})
	if err == nil || absent(err) || errdefs.IsConflict(err) {
		return nil
	}
	if found, inspectErr := b.inspect(ctx, id); inspectErr == nil && (found == nil || !found.running) {
		return nil
	}
	return b.plain(ctx, err)
}

// over waits until a container does not run, or its program has ended and the engine has had the time to learn of it.
func (b *Backend) over(ctx context.Context, id string, p *program.Program) error {
	var late <-chan time.Time
	if p != nil {
		select {
		case <-p.Done:
			late = time.After(tellTime)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		found, err := b.inspect(ctx, id)
		if err != nil || found == nil || !found.running && !found.untold {
			return err
		}
		if found.untold && late == nil {
			late = time.After(tellTime)
		}
		select {
		case <-time.After(pause):
		case <-late:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// clear removes everything of a workload but its kept paths. The container goes first: what a crash leaves of the rest has none, and is
// cleared by whoever comes next.
func (b *Backend) clear(ctx context.Context, e *entry) error {
	for _, name := range []string{b.plan.Container(e.name) + "-hook", b.plan.Container(e.name)} {
		found, err := b.inspect(ctx, name)
		if err == nil && found != nil {
			err = b.discard(ctx, found.id)
		}
		if err != nil {
			return err
		}
	}
	image := e.imageID()
	e.mu.Lock()
	err := errors.Join(os.RemoveAll(e.dir), b.plan.Secrets.Forget(e.name))
	e.cleared = err == nil // an end that is told of now is recorded no more
	e.mu.Unlock()
	if err != nil {
		return err
	}
	b.leave(e)
	b.drop(image)
	return nil
}

// leave takes an entry out of the list.
func (b *Backend) leave(e *entry) {
	b.releasePorts(e.name)
	b.mu.Lock()
	if b.entries[e.name] == e {
		delete(b.entries, e.name)
	}
	b.mu.Unlock()
	e.mu.Lock()
	defer e.mu.Unlock()
	e.cleared = true
	e.program.Release()
}

// postInit runs the hooks that follow a start, if they have not all ended well. A workload in which they did not is damaged, and
// applying it again runs them again.
func (b *Backend) postInit(ctx context.Context, e *entry) error {
	e.mu.Lock()
	pending, fault, c := e.record.Pending, e.record.Fault, e.id
	e.mu.Unlock()
	if !pending && fault != "" { // of an engine that went away while it was started
		return e.change(func(r *record) { r.Fault = "" })
	}
	if !pending {
		return nil
	}
	if err := b.endLeft(ctx, e); err != nil {
		return err
	}
	for _, argv := range e.asked().Hooks.PostInit {
		if err := b.hook(ctx, e.name, "postInit", argv, b.inside(e, c, argv)); err != nil {
			e.fail(err)
			return err
		}
	}
	return e.change(func(r *record) { r.Pending, r.Fault = false, "" })
}

// hook runs a hook and turns how it ended into an error with what it wrote. One that does not end in its time is at fault itself.
func (b *Backend) hook(ctx context.Context, name, moment string, argv []string, run func(context.Context) (int, []byte, error)) error {
	within, cancel := context.WithTimeout(ctx, b.hookTime)
	defer cancel()
	status, words, err := run(within)
	fault := &backends.StartError{Workload: name, Stage: fmt.Sprintf("%s %v", moment, argv), Output: string(words)}
	var cause *backends.StartError
	var down *engine.DownError
	switch {
	case errors.As(err, &down):
		return err
	case err != nil && ctx.Err() == nil && within.Err() != nil:
		fault.Cause = fmt.Sprintf("has not ended within %v", b.hookTime)
	case errors.As(err, &cause):
		fault.Cause = cause.Stage + ": " + cause.Cause
	case err != nil && engine.Unexecutable(err.Error()):
		fault.Cause = err.Error()
	case err != nil:
		return err
	case status != 0:
		fault.Cause = fmt.Sprintf("exit status %d", status)
	default:
		return nil
	}
	return fault
}

// preInit runs a hook in a container of its own, which is removed. Its time begins when it has been started: a slow engine is no fault of the hook's.
func (b *Backend) preInit(ctx context.Context, e *entry, w backends.Workload, argv []string) (err error) {
	e.mu.Lock()
	image, ports := e.image, e.ports
	e.mu.Unlock()
	id, err := b.createLoaded(ctx, w, image, ports, argv)
	if err != nil {
		return err
	}
	defer func() {
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), clearTime)
		defer cancel()
		if left := b.discard(undo, id); err == nil {
			err = left // what is left otherwise is removed by the next look
		}
	}()
	b.step("hook")
	_, startErr := b.engine.ContainerStart(ctx, id, client.ContainerStartOptions{})
	return b.hook(ctx, e.name, "preInit", argv, func(ctx context.Context) (int, []byte, error) {
		if startErr != nil {
			return 0, nil, b.startFault(ctx, w.Name, argv, startErr)
		}
		return b.await(ctx, id)
	})
}

// await waits until a hook's container has ended, and returns its status and its last words.
func (b *Backend) await(ctx context.Context, id string) (int, []byte, error) {
	var p *program.Program
	if c, err := b.inspect(ctx, id); err == nil && c != nil && c.running {
		p = program.Hold(c.pid, id)
		defer p.Release()
	}
	b.step("held")
	ended := b.over(ctx, id, p)
	undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), clearTime)
	defer cancel()
	out := &engine.Output{Most: maxWords, Last: true}
	_ = b.copyLog(undo, id, 0, out.Add) // without them it has failed all the same
	c, err := b.inspect(undo, id)
	if ended == nil && err == nil && c != nil && c.running {
		err = fmt.Errorf("%s says that container %s runs, whose process %d has ended: how it ended cannot be told", b.options.Name, id, c.pid)
	}
	if ended != nil || err != nil || c == nil {
		return 0, out.Text, errors.Join(ended, err)
	}
	return c.exit, out.Text, nil
}
