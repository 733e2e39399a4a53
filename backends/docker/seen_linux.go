package docker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/docker/engine"
	"github.com/kindos/kmo/backends/docker/plan"
	"github.com/kindos/kmo/backends/docker/program"
	"github.com/kindos/kmo/policy/refusal"
)

const (
	maxOutput = 64 << 10               // of Exec
	maxWords  = 4 << 10                // of a hook that failed
	lookEvery = 100 * time.Millisecond // how often a log that is followed is looked at
)

func clip(text string) string { return refusal.Clip(text, 400) }

// Observe lists the workloads, sorted by name: one question to the engine, and one more for each container that has changed.
func (b *Backend) Observe(ctx context.Context) ([]backends.Status, error) {
	if err := b.ready(ctx); err != nil {
		return nil, err
	}
	able, err := b.abilities(ctx)
	if err != nil {
		return nil, err
	}
	found, err := b.containers(ctx)
	if err != nil {
		return nil, err
	}
	list := make([]backends.Status, 0, len(found))
	for _, c := range found {
		e := b.entry(c.Labels[plan.LabelName])
		if c.Labels[plan.LabelRole] != plan.RoleWorkload || e == nil {
			continue // being made or removed
		}
		s, err := b.status(ctx, e, c)
		if err != nil {
			return nil, err
		}
		if s != nil {
			s.Unapplied = unapplied(able, e.asked())
			list = append(list, *s)
		}
	}
	slices.SortFunc(list, func(x, y backends.Status) int { return strings.Compare(x.Name, y.Name) })
	return list, ctx.Err()
}

// status is a workload as it is, or nil if it has gone meanwhile.
func (b *Backend) status(ctx context.Context, e *entry, c container.Summary) (*backends.Status, error) {
	runs, untold := c.State == container.StateRunning || c.State == container.StatePaused, ""
	if e.doubtful(c.ID, runs) && c.State != container.StateCreated {
		found, err := b.takeUp(ctx, e, c.ID)
		if found == nil {
			return nil, err
		}
		if runs = found.running; found.untold {
			untold = found.finished
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.cleared || e.workload.Name == "" {
		return nil, nil
	}
	s := &backends.Status{Name: e.name, Spec: e.workload.Spec, State: backends.Backoff, Restarts: e.record.Restarts, Detail: e.detail}
	for i, p := range e.workload.Run.Ports {
		s.Addresses = append(s.Addresses, backends.Address{Port: p.Name, Address: fmt.Sprintf("127.0.0.1:%d", e.ports[i])})
	}
	if last := e.record.Ended; last != nil {
		s.ExitCode, s.OOM = last.Code, last.OOM
		if last.Untold && s.Detail == "" {
			s.Detail = last.String()
		}
	}
	// How it ended may be told in a moment: until that is given up it is shown as the engine does.
	runs = runs || untold != "" && (e.record.Ended == nil || e.record.Ended.At != untold)
	switch {
	case e.record.Removing && !runs:
		s.State, s.Detail = backends.Exited, "being removed"
	case c.State == container.StatePaused && runs:
		s.State, s.Detail = backends.Damaged, "somebody has paused its container"
	case e.record.Fault != "":
		s.State, s.Detail = backends.Damaged, e.record.Fault
	case runs:
		s.State = backends.Running
	case c.State == container.StateCreated && !e.again, e.starting:
		s.State = backends.Starting
	}
	if e.record.Removing {
		s.Detail = "being removed"
	}
	if runs && untold == "" {
		s.Started, s.Usage = e.started, e.program.Usage()
		if e.program != nil {
			s.PID = e.program.PID
		}
	}
	return s, nil
}

// takeUp goes on with what has become of a workload's container, which is nil if it has gone.
func (b *Backend) takeUp(ctx context.Context, e *entry, id string) (*seen, error) {
	found, err := b.inspect(ctx, id)
	switch {
	case found == nil:
	case found.running:
		b.adopt(e, found)
		if e.foreign() && b.ctx.Err() == nil {
			b.working.Go(func() { b.repeat(e) })
		}
	case !found.untold:
		b.ended(e, found)
	case b.ctx.Err() == nil:
		b.working.Go(func() { b.finish(e) })
	}
	return found, err
}

// String says it in words.
func (e end) String() string {
	switch {
	case e.Untold:
		return "its last program ended with a status that the engine does not know"
	case e.OOM:
		return fmt.Sprintf("ended with status %d, for want of memory", e.Code)
	}
	return fmt.Sprintf("ended with status %d", e.Code)
}

// held is a program that was seen as a process in its container's cgroup. The engine may say that it runs when it does not any more.
type held struct {
	Started time.Time `json:"started"` // as the engine says it
	PID     int       `json:"pid"`
	Began   uint64    `json:"began"` // as program.Program has it
}

// lost says whether a program that was seen has ended, whatever the engine says.
func (e *entry) lost(started time.Time, pid int) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	h := e.record.Held
	return h != nil && h.Started.Equal(started) && h.PID == pid && !program.Lives(pid, h.Began)
}

// doubtful says whether what is known of a container may not be so any more.
func (e *entry) doubtful(id string, runs bool) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case e.id != id || runs != e.running:
		return true
	case runs:
		return e.program != nil && e.program.Ended()
	}
	return e.record.Ended == nil || !e.again && !e.starting
}

// Exec runs a command inside a running workload.
func (b *Backend) Exec(ctx context.Context, name string, argv []string) (int, []byte, error) {
	if err := b.ready(ctx); err != nil {
		return 0, nil, err
	}
	e := b.entry(name)
	if e == nil || len(argv) == 0 {
		return 0, nil, backends.ErrNotFound
	}
	e.mu.Lock()
	id, running := e.id, e.running && (e.program == nil || !e.program.Ended())
	e.mu.Unlock()
	if !running {
		return 0, nil, backends.ErrNotFound
	}
	return b.exec(ctx, e, id, argv, &engine.Output{Most: maxOutput})
}

// exec runs a command in the container of a workload. When ctx ends it ends the command, and what that has started; when this process
// ends before, the next one does.
func (b *Backend) exec(ctx context.Context, e *entry, id string, argv []string, out *engine.Output) (status int, text []byte, err error) {
	made, err := b.engine.ExecCreate(ctx, id, client.ExecCreateOptions{Cmd: argv, AttachStdout: true, AttachStderr: true})
	if absent(err) || errdefs.IsConflict(err) {
		return 0, nil, backends.ErrNotFound
	}
	if err != nil {
		return 0, nil, b.plain(ctx, err)
	}
	if err := e.executes(made.ID); err != nil {
		return 0, nil, err
	}
	over := false
	defer func() { e.executed(made.ID, over) }()
	attach, attached := context.WithCancel(ctx)
	stream, err := b.engine.ExecAttach(attach, made.ID, client.ExecAttachOptions{})
	attached() // the handshake is over: what follows is a stream
	if err != nil {
		return 0, nil, b.plain(ctx, err)
	}
	stop := context.AfterFunc(ctx, stream.Close)
	defer stream.Close()
	err = engine.Frames(stream.Reader, out.Add)
	if !stop() || ctx.Err() != nil { // it goes on, maybe
		over = b.endExec(ctx, made.ID, id) == nil
		return 0, nil, ctx.Err()
	}
	if err != nil {
		return 0, nil, b.plain(ctx, err)
	}
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		found, err := b.engine.ExecInspect(ctx, made.ID, client.ExecInspectOptions{})
		if err != nil {
			if ctx.Err() != nil {
				over = b.endExec(ctx, made.ID, id) == nil
			}
			return 0, nil, b.plain(ctx, err)
		}
		if over = !found.Running; over {
			return found.ExitCode, out.Text, nil
		}
		select { // it has closed its output, and goes on
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}

// inside is how a hook is run in a container that runs.
func (b *Backend) inside(e *entry, id string, argv []string) func(context.Context) (int, []byte, error) {
	return func(ctx context.Context) (int, []byte, error) {
		out := &engine.Output{Most: maxWords, Last: true}
		status, _, err := b.exec(ctx, e, id, argv, out)
		return status, out.Text, err
	}
}

// endExec ends a command that nobody waits for any longer. It is nil once the command is over.
func (b *Backend) endExec(ctx context.Context, exec, id string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), clearTime)
	defer cancel()
	found, err := b.engine.ExecInspect(ctx, exec, client.ExecInspectOptions{})
	if absent(err) {
		return nil
	}
	if err == nil && found.Running {
		program.KillSession(found.PID, id)
	}
	return b.plain(ctx, err)
}

// copyLog copies what a container has written, or its last lines.
func (b *Backend) copyLog(ctx context.Context, id string, lines int, each func([]byte) error) error {
	if b.options.Name == Docker {
		return b.streamLog(ctx, id, client.ContainerLogsOptions{Tail: tail(lines)}, each)
	}
	log, err := b.logFile(ctx, id)
	if err != nil {
		return err
	}
	var pieces [][]byte
	err = log.Next(func(piece []byte) error {
		pieces = append(pieces, piece)
		return nil
	})
	for _, piece := range engine.Tail(pieces, lines) {
		if err == nil {
			err = each(piece)
		}
	}
	return errors.Join(err, log.Close())
}

func tail(lines int) string {
	if lines > 0 {
		return strconv.Itoa(lines)
	}
	return "all"
}

func (b *Backend) logFile(ctx context.Context, id string) (*engine.LogFile, error) {
	found, err := b.engine.ContainerInspect(ctx, id, client.ContainerInspectOptions{})
	if absent(err) {
		return nil, backends.ErrNotFound
	}
	if err != nil {
		return nil, b.plain(ctx, err)
	}
	return engine.OpenLog(found.Container.LogPath), nil
}

// streamLog copies what the engine tells of a log.
func (b *Backend) streamLog(ctx context.Context, id string, options client.ContainerLogsOptions, each func([]byte) error) error {
	options.ShowStdout, options.ShowStderr = true, true
	log, err := b.engine.ContainerLogs(ctx, id, options)
	if absent(err) {
		return backends.ErrNotFound
	}
	if err != nil {
		return b.plain(ctx, err)
	}
	defer log.Close()
	return engine.Frames(log, each)
}

// Logs returns what a workload wrote. The engine's own following ends with each program: it is taken up again after the last that was seen.
func (b *Backend) Logs(ctx context.Context, name string, options backends.LogOptions) (io.ReadCloser, error) {
	if err := b.ready(ctx); err != nil {
		return nil, err
	}
	e := b.entry(name)
	if e == nil || !e.known() {
		return nil, backends.ErrNotFound
	}
	e.mu.Lock()
	id := e.id
	e.mu.Unlock()
	if !options.Follow {
		var text bytes.Buffer
		err := b.copyLog(ctx, id, options.Tail, func(piece []byte) error {
			if text.Len()+len(piece) > engine.MaxAnswer {
				return fmt.Errorf("%s: the log of %s is longer than %d bytes; want at most that, for the engine is told to keep less", b.options.Name, name, engine.MaxAnswer)
			}
			text.Write(piece)
			return nil
		})
		return io.NopCloser(&text), err
	}
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(b.ctx, cancel)
	r, w := io.Pipe()
	e.reads(1)
	go func() {
		defer stop()
		defer cancel()
		err := b.follow(ctx, e, id, options.Tail, w)
		e.reads(-1)
		_ = w.CloseWithError(err) // never fails
	}()
	return &following{r, cancel}, nil
}

// following ends following when it is closed, whether or not anything more is written.
type following struct {
	*io.PipeReader
	cancel context.CancelFunc
}

func (f *following) Close() error {
	f.cancel()
	return f.PipeReader.Close()
}

// follow copies a log until its workload is removed, or ctx ends.
func (b *Backend) follow(ctx context.Context, e *entry, id string, lines int, w io.Writer) error {
	next, done, err := b.followed(ctx, id, lines, w)
	if err != nil {
		return err
	}
	defer done()
	for ctx.Err() == nil {
		over := e.leftAlone() // asked before: what is written before the end is read then
		err := next()
		if errors.Is(err, backends.ErrNotFound) || err == nil && over {
			return nil
		}
		if err != nil && ctx.Err() == nil {
			return err
		}
		select {
		case <-time.After(lookEvery):
		case <-ctx.Done():
		}
	}
	return nil
}

// followed returns what copies the rest of a log, as far as it goes.
func (b *Backend) followed(ctx context.Context, id string, lines int, w io.Writer) (next func() error, done func(), err error) {
	if b.options.Name == Docker {
		ask, stamps := client.ContainerLogsOptions{Tail: tail(lines), Follow: true, Timestamps: true}, engine.Stamps{}
		return func() error {
			if last := stamps.Again(); last != "" {
				ask.Since, ask.Tail = last, "all"
			}
			return b.streamLog(ctx, id, ask, func(piece []byte) error {
				text, ok := stamps.New(piece)
				if !ok {
					return nil
				}
				_, err := w.Write(text)
				return err
			})
		}, func() {}, nil
	}
	log, err := b.logFile(ctx, id)
	if err != nil {
		return nil, nil, err
	}
	write := func(piece []byte) error {
		_, err := w.Write(piece)
		return err
	}
	begun := false
	return func() error {
		if begun {
			return log.Next(write)
		}
		begun = true
		var pieces [][]byte
		err := log.Next(func(piece []byte) error {
			pieces = append(pieces, piece)
			return nil
		})
		for _, piece := range engine.Tail(pieces, lines) {
			err = errors.Join(err, write(piece))
		}
		return err
	}, func() { _ = log.Close() }, nil
}

// leftAlone says that it runs no more and will not be started again.
func (e *entry) leftAlone() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.cleared || e.record.Removing && !e.running
}

func (e *entry) reads(n int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.readers += n
}

// heard waits a little until those who follow the log have read the end of it.
func (e *entry) heard(ctx context.Context) {
	deadline := time.Now().Add(lastWords)
	for ctx.Err() == nil && time.Now().Before(deadline) {
		e.mu.Lock()
		readers := e.readers
		e.running = false
		e.mu.Unlock()
		if readers == 0 {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
}
