package docker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/moby/moby/api/types/container"

	"github.com/kindos/kmo/backends"
)

// ready asks the engine once what an earlier process has left, and goes on with it: programs that run are kept, those that ended are
// started again, half-made containers are removed, removals are finished.
func (b *Backend) ready(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	b.mu.Lock()
	settled := b.settled
	b.mu.Unlock()
	if settled {
		return nil
	}
	select {
	case b.settling <- struct{}{}:
		defer func() { <-b.settling }()
	case <-ctx.Done():
		return ctx.Err()
	}
	b.mu.Lock()
	settled = b.settled
	b.mu.Unlock()
	if settled {
		return nil
	}
	found, err := b.containers(ctx)
	if err != nil {
		return err
	}
	entries := map[string]*entry{}
	for _, c := range found {
		e, err := b.recall(c)
		if err == nil {
			entries[e.name] = e
			continue
		}
		b.options.Logger.Warn("removing a container that was not made to the end", "container", c.Names, "err", err)
		if err := b.discard(ctx, c.ID); err != nil {
			return err
		}
	}
	if err := b.sweepFolders(entries); err != nil {
		return err
	}
	b.mu.Lock()
	b.entries, b.settled = entries, true
	for _, e := range entries {
		for i, p := range e.workload.Run.Ports {
			if namedPort(&e.workload, p) == 0 {
				b.ports[e.ports[i]] = e.name
			}
		}
	}
	b.mu.Unlock()
	b.working.Go(func() { b.resume(entries) })
	return nil
}

// recall makes the entry of a container of an earlier process.
func (b *Backend) recall(c container.Summary) (*entry, error) {
	if c.Labels[labelRole] != roleWorkload || c.State == container.StateCreated {
		return nil, fmt.Errorf("a %s, %s", c.Labels[labelRole], c.State)
	}
	e := b.fresh(c.Labels[labelName])
	if err := errors.Join(json.Unmarshal([]byte(c.Labels[labelWorkload]), &e.workload), json.Unmarshal([]byte(c.Labels[labelPorts]), &e.ports)); err != nil {
		return nil, fmt.Errorf("its labels: %v", err)
	}
	if e.workload.Name != e.name || !names().MatchString(e.name) || len(e.ports) != len(e.workload.Run.Ports) {
		return nil, fmt.Errorf("its labels speak of %.100q with %d ports", e.workload.Name, len(e.ports))
	}
	e.id, e.image = c.ID, c.ImageID
	text, err := os.ReadFile(filepath.Join(e.dir, "record.json"))
	if err == nil {
		err = json.Unmarshal(text, &e.record)
	}
	if err != nil {
		e.record.Pending = len(e.workload.Hooks.PostInit) > 0
		b.options.Logger.Warn("a workload without a readable record: its restarts are counted anew", "workload", e.name, "err", err)
	}
	e.detail = e.record.Fault
	return e, nil
}

// sweepFolders removes what lies on this host of workloads that have no container.
func (b *Backend) sweepFolders(known map[string]*entry) error {
	b.secrets.Keep(func(name string) bool { return known[name] != nil })
	found, err := os.ReadDir(filepath.Join(b.options.State, "work"))
	for _, dir := range found {
		if known[dir.Name()] == nil {
			err = errors.Join(err, os.RemoveAll(filepath.Join(b.options.State, "work", dir.Name())))
		}
	}
	return err
}

// resume goes on with what an earlier process had begun.
func (b *Backend) resume(entries map[string]*entry) {
	if err := b.tidy(b.ctx); err != nil && b.ctx.Err() == nil {
		b.options.Logger.Warn("removing images that nobody uses", "err", err)
	}
	for _, e := range entries {
		b.working.Go(func() {
			var err error
			if e.removing() {
				err = b.Remove(b.ctx, e.name)
			} else {
				err = b.finishHooks(e)
			}
			if err != nil && b.ctx.Err() == nil {
				b.options.Logger.Warn("going on with a workload", "workload", e.name, "err", err)
			}
		})
	}
}

func (b *Backend) finishHooks(e *entry) error {
	taken, release, err := b.take(b.ctx, e.name, false)
	if err != nil || taken != e {
		return err
	}
	defer release()
	ctx, done := b.unasked(e)
	defer done()
	c, err := b.inspect(ctx, e.id)
	if err != nil || c == nil || !c.running {
		return err
	}
	b.adopt(e, c)
	return b.postInit(ctx, e)
}

// look compares what there is with what is known, and mends it.
func (b *Backend) look(ctx context.Context) error {
	found, err := b.containers(ctx)
	if err != nil {
		return err
	}
	there := map[string]bool{}
	for _, c := range found {
		name := c.Labels[labelName]
		e := b.entry(name)
		switch {
		case c.Labels[labelRole] != roleWorkload || e == nil || c.State == container.StateCreated:
			b.sweep(ctx, name)
		default:
			there[name] = true
			if _, err := b.status(ctx, e, c); err != nil {
				return err
			}
			if e.removing() {
				b.sweep(ctx, name)
			}
		}
	}
	for _, e := range b.list() {
		if !there[e.name] {
			b.sweep(ctx, e.name)
		}
	}
	return nil
}

// sweep clears away what is left of a workload that has no container, or one that was not made to the end, unless somebody is at it.
func (b *Backend) sweep(ctx context.Context, name string) {
	if !names().MatchString(name) {
		return
	}
	b.mu.Lock()
	e := b.entries[name]
	if e == nil {
		e = b.fresh(name)
		b.entries[name] = e
	}
	b.mu.Unlock()
	select {
	case <-e.turn:
		defer func() { e.turn <- struct{}{} }()
	default:
		return
	}
	if e.gone() {
		return
	}
	whole, err := b.inspect(ctx, b.container(name))
	hook, hookErr := b.inspect(ctx, b.container(name)+"-hook")
	if err := errors.Join(err, hookErr); err != nil {
		return // the next look finds it again
	}
	if whole != nil && whole.status != container.StateCreated && e.known() && !(e.removing() && !whole.running) {
		if hook != nil {
			err = b.discard(ctx, hook.id)
		}
	} else {
		err = b.clear(ctx, e)
	}
	if err != nil && b.ctx.Err() == nil {
		b.options.Logger.Warn("clearing what is left of a workload", "workload", name, "err", err)
	}
}

var _ backends.Execer = (*Backend)(nil)
