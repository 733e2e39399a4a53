package docker

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/moby/moby/client"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/docker/engine"
	"github.com/kindos/kmo/backends/docker/program"
)

const hookTime = 30 * time.Second // for each hook

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
	for _, argv := range e.asked().Hooks.PostInit {
		if err := b.hook(ctx, e.name, "postInit", argv, b.inside(c, argv)); err != nil {
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

// inside is how a hook is run in a container that runs.
func (b *Backend) inside(id string, argv []string) func(context.Context) (int, []byte, error) {
	return func(ctx context.Context) (int, []byte, error) {
		out := &output{most: maxWords, last: true}
		status, _, err := b.exec(ctx, id, argv, out)
		return status, out.text, err
	}
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
	out := &output{most: maxWords, last: true}
	_ = b.copyLog(undo, id, 0, out.add) // without them it has failed all the same
	c, err := b.inspect(undo, id)
	if ended == nil && err == nil && c != nil && c.running {
		err = fmt.Errorf("%s says that container %s runs, whose process %d has ended: how it ended cannot be told", b.options.Name, id, c.pid)
	}
	if ended != nil || err != nil || c == nil {
		return 0, out.text, errors.Join(ended, err)
	}
	return c.exit, out.text, nil
}
