package docker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/docker/engine"
	"github.com/kindos/kmo/backends/docker/plan"
	"github.com/kindos/kmo/backends/process"
)

// ready asks the engine once what an earlier process has left, and goes on with it: programs that run are kept, those that ended are
// started again, half-made containers are removed, removals are finished.
func (b *Backend) ready(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if b.options.Look {
		return errors.New(b.options.Name + ": it was opened to look only")
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
	entries, err := b.left(ctx)
	if err != nil {
		return err
	}
	b.mu.Lock()
	b.entries, b.settled = entries, true
	for _, e := range entries {
		for i, p := range e.workload.Run.Ports {
			if plan.NamedPort(&e.workload, p) == 0 {
				b.ports[e.ports[i]] = e.name
			}
		}
	}
	b.mu.Unlock()
	list := b.list()
	b.working.Go(func() { b.resume(list) })
	return nil
}

// left are the workloads of an earlier process, by name. Nothing else of it is left when it returns them.
func (b *Backend) left(ctx context.Context) (map[string]*entry, error) {
	found, err := b.containers(ctx)
	if err != nil {
		return nil, err
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
			return nil, err
		}
	}
	err = b.sweepFolders(entries)
	for _, e := range entries {
		err = errors.Join(err, b.endLeft(ctx, e))
	}
	return entries, err
}

// recall makes the entry of a container of an earlier process.
func (b *Backend) recall(c container.Summary) (*entry, error) {
	if c.Labels[plan.LabelRole] != plan.RoleWorkload || c.State == container.StateCreated {
		return nil, fmt.Errorf("a %s, %s", c.Labels[plan.LabelRole], c.State)
	}
	e := b.fresh(c.Labels[plan.LabelName])
	if err := errors.Join(json.Unmarshal([]byte(c.Labels[plan.LabelWorkload]), &e.workload), json.Unmarshal([]byte(c.Labels[plan.LabelPorts]), &e.ports)); err != nil {
		return nil, fmt.Errorf("its labels: %v", err)
	}
	if e.workload.Name != e.name || !backends.ValidName(e.name) || len(e.ports) != len(e.workload.Run.Ports) {
		return nil, fmt.Errorf("its labels speak of %.100q with %d ports", e.workload.Name, len(e.ports))
	}
	e.id, e.image = c.ID, imageID(c.ImageID)
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

// executes records a command that is about to be executed.
func (e *entry) executes(exec string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.cleared {
		return backends.ErrNotFound
	}
	dir := filepath.Join(e.dir, "commands")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	e.commands[exec] = true
	return os.WriteFile(filepath.Join(dir, exec), nil, 0o600)
}

// executed forgets a command that nobody waits for. One that may go on stays on record.
func (e *entry) executed(exec string, over bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.commands, exec)
	if over {
		_ = os.Remove(filepath.Join(e.dir, "commands", exec)) // else it is asked after again
	}
}

// endLeft ends the commands that went on when this process, or one before it, waited for them no longer.
func (b *Backend) endLeft(ctx context.Context, e *entry) error {
	found, err := os.ReadDir(filepath.Join(e.dir, "commands"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, note := range found {
		e.mu.Lock()
		id, ours := e.id, e.commands[note.Name()]
		e.mu.Unlock()
		if ours {
			continue
		}
		if err := b.endExec(ctx, note.Name(), id); err != nil {
			return err
		}
		e.executed(note.Name(), true)
	}
	return nil
}

// sweepFolders removes what lies on this host of workloads that have no container.
func (b *Backend) sweepFolders(known map[string]*entry) error {
	b.plan.Secrets.Keep(func(name string) bool { return known[name] != nil })
	found, err := os.ReadDir(filepath.Join(b.options.State, "work"))
	for _, dir := range found {
		if known[dir.Name()] == nil {
			err = errors.Join(err, os.RemoveAll(filepath.Join(b.options.State, "work", dir.Name())))
		}
	}
	return err
}

// resume goes on with what an earlier process had begun.
func (b *Backend) resume(entries []*entry) {
	b.working.Go(func() {
		if err := b.tidy(b.ctx); err != nil && b.ctx.Err() == nil {
			b.options.Logger.Warn("removing images that nobody uses", "err", err)
		}
	})
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
	c, err := b.inspect(ctx, b.plan.Container(e.name))
	if err != nil || c == nil || !c.running {
		return err
	}
	b.adopt(e, c)
	return b.postInit(ctx, e)
}

func (b *Backend) nudge() {
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// watch looks at all containers when there is reason to, and now and then.
func (b *Backend) watch() {
	const seldom, soon = 10 * time.Second, 300 * time.Millisecond
	b.working.Go(func() { _, _ = b.abilities(b.ctx) }) // before anybody asks, who is told what goes wrong with it
	for {
		ctx, cancel := context.WithTimeout(b.ctx, time.Minute)
		err := b.ready(ctx)
		if err == nil {
			err = b.look(ctx)
		}
		cancel()
		var down *engine.DownError
		if err != nil && b.ctx.Err() == nil && !errors.As(err, &down) {
			b.options.Logger.Warn("looking at the containers", "err", err)
		}
		select {
		case <-time.After(soon):
		case <-b.ctx.Done():
			return
		}
		select {
		case <-time.After(seldom):
		case <-b.wake:
		case <-b.ctx.Done():
			return
		}
	}
}

// listen takes up what the engine tells of by itself. Whenever it has not been heard for a while all is looked at again.
func (b *Backend) listen() {
	for b.ctx.Err() == nil {
		events := b.engine.Events(b.ctx, client.EventsListOptions{Filters: b.mine().Add("type", "container")})
		b.nudge()
		for open := true; open; {
			select {
			case m := <-events.Messages:
				b.told(string(m.Action), m.Actor.Attributes[plan.LabelName])
			case err := <-events.Err:
				b.options.Logger.Debug("listening to the engine", "err", err)
				open = false
			}
		}
		select {
		case <-time.After(500 * time.Millisecond):
		case <-b.ctx.Done():
		}
	}
}

func (b *Backend) told(action, name string) {
	e := b.entry(name)
	if e == nil {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case action == "oom":
		e.oom = true
	case strings.HasPrefix(action, "exec"):
	case action == "destroy", action == "remove", e.program == nil:
		b.nudge()
	}
}

// look compares what there is with what is known, and mends it.
func (b *Backend) look(ctx context.Context) error {
	found, err := b.containers(ctx)
	if err != nil {
		return err
	}
	there := map[string]bool{}
	for _, c := range found {
		name := c.Labels[plan.LabelName]
		e := b.entry(name)
		switch {
		case c.Labels[plan.LabelRole] != plan.RoleWorkload || e == nil || c.State == container.StateCreated:
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
	if !backends.ValidName(name) {
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
	whole, err := b.inspect(ctx, b.plan.Container(name))
	hook, hookErr := b.inspect(ctx, b.plan.Container(name)+"-hook")
	if err := errors.Join(err, hookErr); err != nil {
		return // the next look finds it again
	}
	made := whole != nil && whole.status != container.StateCreated || e.waits()
	if made && e.known() && (!e.removing() || whole != nil && whole.running) {
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

// choosePorts gives every port of a workload its number on this host. Those in taken are not chosen.
func (b *Backend) choosePorts(w backends.Workload, taken []int) (ports []int, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, p := range w.Run.Ports {
		port := plan.NamedPort(&w, p)
		if port != 0 && errors.Is(process.FreePort(port), unix.EADDRINUSE) {
			return nil, takenError(w.Name, p.Name, port)
		}
		if port == 0 {
			if port, err = process.ChoosePort(w.Name, p.Name, func(candidate int) bool {
				return b.ports[candidate] == "" && !slices.Contains(ports, candidate) && !slices.Contains(taken, candidate)
			}); err != nil {
				return nil, err
			}
			b.ports[port] = w.Name
		}
		ports = append(ports, port)
	}
	return ports, nil
}

func takenError(workload, name string, port int) error {
	return fmt.Errorf("%s: port %s: port %d is taken by another program of this host", workload, name, port)
}

// releasePorts lets go of the numbers that were chosen for a workload.
func (b *Backend) releasePorts(name string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	maps.DeleteFunc(b.ports, func(_ int, whose string) bool { return whose == name })
}

var _ backends.Execer = (*Backend)(nil)
