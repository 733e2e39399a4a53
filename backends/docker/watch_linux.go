package docker

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/moby/moby/api/types/container"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/docker/engine"
	"github.com/kindos/kmo/backends/docker/program"
	"github.com/kindos/kmo/backends/process/monitor"
	"github.com/kindos/kmo/backends/process/secret"
)

// entry is one workload. Whoever holds its turn may change what it is; mu is for what others look at meanwhile.
type entry struct {
	name, dir string
	turn      chan struct{} // holds one token

	mu     sync.Mutex // guards what follows
	record record
	made
	present
	working

	cleared bool // gone from the backend: who waited for its turn must look again
	readers int  // who follow its log
}

// made is a workload as it was made.
type made struct {
	workload backends.Workload // as its container's labels say; no name where there is no container yet
	ports    []int             // its numbers on this host, in the order of Run.Ports
	id       string            // of its container, once it has one
	image    string            // its id
}

// present is what is known of a workload's program.
type present struct {
	program *program.Program // that runs; nil if there is none, or it cannot be seen from here
	running bool             // as far as is known
	started time.Time        // of the present program
	oom     bool             // the engine told of a want of memory since the start
	detail  string
}

// working is what is being done with a workload.
type working struct {
	starting  bool                      // somebody starts it
	again     bool                      // somebody waits to start it again
	ending    map[*program.Program]bool // somebody asks the engine how it ended; nil is one that cannot be seen
	commands  map[string]bool           // that are being executed, by the engine's id
	stuck     bool                      // it is not to be started again until it is applied
	interrupt context.CancelFunc        // ends what is done under the turn of our own accord; nil when nothing is
}

// record is what changes while a container stays the same.
type record struct {
	Restarts int       `json:"restarts"`
	Quick    int       `json:"quick"` // ends in a row that came soon after the start
	Ended    *end      `json:"ended,omitempty"`
	Answered string    `json:"answered,omitempty"` // the end that the last start was the answer to
	Pending  bool      `json:"pending,omitempty"`  // the postInit hooks have not all ended 0
	Starting bool      `json:"starting,omitempty"` // it is about to be started by us
	Started  time.Time `json:"started,omitzero"`   // of the program that we started last
	Held     *held     `json:"held,omitempty"`     // the program that was seen last
	Removing bool      `json:"removing,omitempty"` // Remove has begun: never start it again
	Fault    string    `json:"fault,omitempty"`    // why it is damaged
}

// end is how a program ended.
type end struct {
	At     string `json:"at"` // as the engine says it, or after which start it came: it tells one end from another
	Code   int    `json:"code"`
	OOM    bool   `json:"oom"`
	Untold bool   `json:"untold,omitempty"` // the engine does not know: Code and OOM say nothing, and At speaks of the start
}

func (b *Backend) fresh(name string) *entry {
	e := &entry{name: name, dir: filepath.Join(b.options.State, "work", name), turn: make(chan struct{}, 1)}
	e.ending, e.commands = map[*program.Program]bool{}, map[string]bool{}
	e.turn <- struct{}{}
	return e
}

func (b *Backend) list() []*entry {
	b.mu.Lock()
	defer b.mu.Unlock()
	list := make([]*entry, 0, len(b.entries))
	for _, e := range b.entries {
		list = append(list, e)
	}
	return list
}

func (b *Backend) entry(name string) *entry {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.entries[name]
}

// take waits for the turn of a workload, which it makes if wanted. It returns nil for one that is not there.
func (b *Backend) take(ctx context.Context, name string, wanted bool) (*entry, func(), error) {
	for {
		if err := errors.Join(ctx.Err(), b.ctx.Err()); err != nil {
			return nil, nil, err
		}
		b.mu.Lock()
		e := b.entries[name]
		if e == nil && wanted {
			e = b.fresh(name)
			b.entries[name] = e
		}
		b.mu.Unlock()
		if e == nil {
			return nil, func() {}, nil
		}
		select {
		case <-ctx.Done():
			return nil, nil, ctx.Err()
		case <-e.turn:
		}
		if !e.gone() {
			return e, func() { e.turn <- struct{}{} }, nil
		}
		e.turn <- struct{}{}
	}
}

func (e *entry) gone() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.cleared
}

// known says whether it is more than a name that was asked for.
func (e *entry) known() bool { return e.asked().Name != "" }

func (e *entry) asked() backends.Workload {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.workload
}

func (e *entry) imageID() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.image
}

func (e *entry) now() *program.Program {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.program
}

// change changes the record and saves it.
func (e *entry) change(f func(r *record)) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	f(&e.record)
	return e.save()
}

// save writes the record; mu is held. A power cut may leave an empty one, which recall survives: it costs a count of restarts, and hooks that
// are run once more.
func (e *entry) save() error {
	text, err := json.Marshal(e.record)
	if err == nil {
		err = os.MkdirAll(e.dir, 0o700)
	}
	if err == nil {
		err = monitor.Replace(filepath.Join(e.dir, "record.json"), text)
	}
	return err
}

// begin makes an entry that of a workload which has no container yet.
func (e *entry) begin(w backends.Workload, ports []int, image string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	w.Files = slices.Clone(w.Files)
	for i := range w.Files {
		w.Files[i].Content = nil // they lie where the container has them from
	}
	e.workload, e.ports, e.image, e.id, e.record = w, ports, image, "", record{}
	e.stuck, e.again, e.detail = false, false, ""
	return e.save()
}

// waits says whether it will be started again, whatever there is of its container.
func (e *entry) waits() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.again
}

func (e *entry) starts(now bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.starting = now
}

// startsAgain records a start that is about to be. However often it is tried, it is one answer to one end.
func (e *entry) startsAgain(c *seen) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.id, e.oom = c.id, false
	r := &e.record
	if r.Ended != nil && r.Ended.At != r.Answered {
		r.Restarts++
		r.Answered = r.Ended.At
	}
	r.Pending, r.Fault, r.Starting = len(e.workload.Hooks.PostInit) > 0, "", true
	return e.save()
}

// fail notes why it is not as it should be.
func (e *entry) fail(err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.detail = clip(err.Error())
	if e.running || errors.Is(err, secret.ErrGone) {
		e.stuck = !e.running
		e.record.Fault = e.detail
		_ = e.save() // a later process finds out by itself
	}
}

// leaving marks a workload as one that is being removed, and ends what nobody but the backend itself waits for.
func (e *entry) leaving() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.workload.Name == "" || e.cleared {
		return nil // asked for, and not there yet
	}
	if e.interrupt != nil {
		e.interrupt()
	}
	if e.record.Removing {
		return nil
	}
	e.record.Removing = true
	return e.save()
}

func (e *entry) removing() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.record.Removing
}

// unasked is the context of what is done with a workload of our own accord. It is ended by Close, by Remove, and by done, which the
// caller must call.
func (b *Backend) unasked(e *entry) (ctx context.Context, done func()) {
	ctx, cancel := context.WithTimeout(b.ctx, restartTime)
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

// adopt takes what runs in a container for the workload's program.
func (b *Backend) adopt(e *entry, c *seen) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.id, e.image = c.id, c.image
	same := e.program != nil && e.program.PID == c.pid && !e.program.Ended() && e.started.Equal(c.started)
	if e.cleared || same || !c.running || b.ctx.Err() != nil {
		return
	}
	e.program.Release()
	e.program, e.running, e.started, e.detail = program.Hold(c.pid, c.id), true, c.started, ""
	if p := e.program; p != nil {
		e.record.Held = &held{Started: c.started, PID: p.PID, Began: p.Began}
		if err := e.save(); err != nil {
			b.options.Logger.Warn("recording which process a program is", "workload", e.name, "err", err)
		}
		b.working.Go(func() {
			select {
			case <-p.Done:
				b.finish(e)
			case <-b.ctx.Done():
			}
		})
	}
}

// foreign says whether somebody else has started a workload's program, without the hooks that it has.
func (e *entry) foreign() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	hooks := len(e.workload.Hooks.PreInit)+len(e.workload.Hooks.PostInit) > 0
	return hooks && e.running && !e.starting && !e.record.Starting && !e.record.Removing && !e.cleared && !e.started.Equal(e.record.Started)
}

// repeat ends a program that somebody else has started, so that it is started again with its hooks.
func (b *Backend) repeat(e *entry) {
	taken, release, err := b.take(b.ctx, e.name, false)
	if err != nil || taken == nil {
		return
	}
	defer release()
	if taken != e || !e.foreign() {
		return
	}
	ctx, done := b.unasked(e)
	defer done()
	e.mu.Lock()
	id := e.id
	e.mu.Unlock()
	if err := b.signal(ctx, id, "SIGKILL"); err != nil {
		b.options.Logger.Warn("ending a program that was started without its hooks", "workload", e.name, "err", err)
	}
}

// asks says whether the caller is to ask how the program ended, and to call answered with it then.
func (e *entry) asks() (p *program.Program, ok bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	p = e.program
	if e.ending[p] || e.again && p == nil {
		return nil, false
	}
	e.ending[p] = true
	return p, true
}

func (e *entry) answered(p *program.Program) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.ending, p)
}

// finish waits until the engine knows of the end of a program, or has had the time to. If it does not answer, a later look finds it.
func (b *Backend) finish(e *entry) {
	ctx, cancel := context.WithTimeout(b.ctx, clearTime)
	defer cancel()
	p, ok := e.asks()
	if !ok {
		return // somebody else does, or has
	}
	defer e.answered(p)
	for pause := time.Millisecond; ctx.Err() == nil; pause = min(2*pause, 200*time.Millisecond) {
		e.mu.Lock()
		id, over := e.id, e.cleared || e.program != nil && !e.program.Ended()
		e.mu.Unlock()
		if over {
			return // somebody else has seen to it
		}
		c, err := b.final(ctx, id)
		switch {
		case err == nil && c == nil:
			b.nudge()
			return
		case err == nil && !c.running:
			b.ended(e, c)
			return
		case err == nil:
			b.adopt(e, c) // started again by whomever
			if e.foreign() {
				b.repeat(e)
			}
			return
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}

// ended records the end of a program, once, and sees that it is started again.
func (b *Backend) ended(e *entry, c *seen) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.cleared || c.status == container.StateCreated {
		return
	}
	e.id, e.image = c.id, c.image
	r := &e.record
	if r.Ended == nil || r.Ended.At != c.finished {
		r.Ended = &end{At: c.finished, Code: c.exit, OOM: c.exit == 137 && e.short(c), Untold: c.untold}
		if r.Quick++; e.started.IsZero() || time.Since(e.started) > quick {
			r.Quick = 0
		}
		r.Fault = ""
		e.detail = r.Ended.String()
		if err := e.save(); err != nil {
			b.options.Logger.Warn("recording an end", "workload", e.name, "err", err)
		}
	}
	e.program.Release()
	e.program, e.running = nil, false
	if e.again || e.stuck || r.Removing || b.ctx.Err() != nil {
		return
	}
	e.again = true
	pause := b.options.Backoff(max(r.Quick-1, 0))
	b.working.Go(func() {
		for {
			select {
			case <-time.After(pause):
			case <-b.ctx.Done():
				return
			}
			if pause = b.restart(e); pause == 0 {
				return
			}
		}
	})
}

// short says whether a program that was killed had no memory left.
func (e *entry) short(c *seen) bool {
	short, known := e.program.Short()
	return short || e.oom || !known && c.oom // what the engine says may be of an earlier program
}

// restart starts a workload again, unless somebody else has seen to it. It returns the pause before it is to be tried again, or 0.
func (b *Backend) restart(e *entry) time.Duration {
	select {
	case b.starts <- struct{}{}:
		defer func() { <-b.starts }()
	case <-b.ctx.Done():
		return 0
	}
	taken, release, err := b.take(b.ctx, e.name, false)
	if err != nil {
		return 0
	}
	defer release()
	e.mu.Lock()
	none := e.id == "" // any more: it is being replaced
	over := taken != e || e.cleared || !e.again || e.running || e.stuck || e.record.Removing
	e.again = false // from here on a new end is another's to answer
	e.mu.Unlock()
	if over {
		return 0
	}
	ctx, done := b.unasked(e)
	defer done()
	c, err := b.inspect(ctx, b.plan.Container(e.name))
	if err == nil && c == nil {
		if !none {
			b.nudge()
			return 0
		}
		c = &seen{untold: true}
	}
	if err == nil && c.running { // somebody else was quicker
		b.adopt(e, c)
		if e.foreign() {
			err = b.signal(ctx, c.id, "SIGKILL")
		}
		if err == nil {
			return 0
		}
	}
	if err == nil {
		err = b.start(ctx, e, c)
	}
	if err == nil {
		if err := b.postInit(ctx, e); err != nil {
			b.options.Logger.Warn("running a postInit hook", "workload", e.name, "err", err)
		}
		return 0
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.again || e.stuck || e.running {
		return 0
	}
	e.again = true
	var down *engine.DownError
	if !errors.As(err, &down) {
		e.record.Quick++
	}
	return max(b.options.Backoff(max(e.record.Quick-1, 0)), time.Millisecond)
}
