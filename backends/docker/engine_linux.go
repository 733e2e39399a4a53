package docker

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/docker/engine"
	"github.com/kindos/kmo/backends/process/secret"
)

// Backend runs containers. It is a backends.Backend and a backends.Execer, and its methods may be called concurrently.
type Backend struct {
	options  Options
	door     engine.Door
	engine   *client.Client
	instance string
	secrets  secret.Store
	lock     *os.File     // held on the state folder: one process at a time
	step     func(string) // called at each step of a start; a test ends this process there
	hookTime time.Duration

	ctx     context.Context // of watching and restarting; ended by Close
	cancel  context.CancelFunc
	working sync.WaitGroup
	wake    chan struct{} // holds one token: look at all containers again
	starts  chan struct{} // bounds how many programs are started again at once
	images  images

	settling chan struct{} // holds one token: who asks for the first time what there is

	mu      sync.Mutex // guards what follows
	settled bool       // the engine has said what there is
	able    *backends.Fingerprint
	entries map[string]*entry
	ports   map[int]string // numbers that were chosen, and whose they are
}

// Open takes the state folder, which no other process may have. The engine need not be there: what an earlier process left is gone on
// with as soon as it answers.
func Open(o Options) (*Backend, error) {
	if o.Name != Docker && o.Name != Podman {
		return nil, fmt.Errorf("backend %q: want %s or %s", o.Name, Docker, Podman)
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Backoff == nil {
		o.Backoff = func(restarts int) time.Duration { return min(time.Second<<min(restarts, 6), time.Minute) }
	}
	state, err := filepath.Abs(o.State)
	if err != nil {
		return nil, err
	}
	o.State = state
	b := &Backend{
		options: o, door: engine.Door{Name: o.Name, Socket: o.Socket}, step: func(string) {}, hookTime: hookTime, wake: make(chan struct{}, 1), starts: make(chan struct{}, 4),
		settling: make(chan struct{}, 1), entries: map[string]*entry{}, ports: map[int]string{}, images: newImages(),
	}
	for _, dir := range []string{"", "work", "images", "kept"} {
		if err := os.MkdirAll(filepath.Join(state, dir), 0o700); err != nil {
			return nil, err
		}
	}
	if err := trusted(state); err != nil {
		return nil, err
	}
	if b.lock, err = lock(state); err != nil {
		return nil, err
	}
	if b.instance, err = instance(filepath.Join(state, "instance")); err == nil {
		b.engine, err = b.door.Client()
	}
	if err != nil {
		return nil, errors.Join(err, b.lock.Close())
	}
	b.secrets = secret.Open(o.Memory, o.Name+"-"+b.instance)
	b.ctx, b.cancel = context.WithCancel(context.Background())
	b.working.Go(b.watch)
	b.working.Go(b.listen)
	return b, nil
}

// Close ends this process's part. The programs go on, and the next Open finds them.
func (b *Backend) Close() error {
	b.cancel()
	for _, e := range b.list() {
		e.mu.Lock()
		e.program.Release()
		e.mu.Unlock()
	}
	b.working.Wait()
	return errors.Join(b.engine.Close(), b.lock.Close())
}

// trusted sees that nobody else can write the state folder: whoever writes there says what is mounted.
func trusted(state string) error {
	var found unix.Stat_t
	if err := unix.Stat(state, &found); err != nil {
		return err
	}
	if int(found.Uid) != os.Geteuid() || found.Mode&0o022 != 0 {
		return fmt.Errorf("%s: owner %d, mode %#o; want owner %d and nobody else to write: chown %d, chmod 0700", state, found.Uid, found.Mode&0o7777, os.Geteuid(), os.Geteuid())
	}
	return nil
}

// lock takes the state folder for this process alone. A process that was just killed may hold it a little longer.
func lock(state string) (*os.File, error) {
	f, err := os.Open(state)
	if err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(3 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == nil {
			return f, nil
		}
		if time.Now().After(deadline) {
			return nil, errors.Join(fmt.Errorf("%s: another process keeps the containers of this folder; end it first: %v", state, err), f.Close())
		}
	}
}

// instance reads what tells this folder's containers from others', or makes it up.
func instance(path string) (string, error) {
	text, err := os.ReadFile(path)
	if err == nil && len(text) == 16 {
		return string(text), nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	var id [8]byte
	_, _ = rand.Read(id[:]) // never fails
	name := hex.EncodeToString(id[:])
	return name, durable(path, []byte(name))
}

// durable replaces a file as a whole: whoever is killed, or loses power, leaves the old or the new one.
func durable(path string, text []byte) error {
	next, err := os.OpenFile(path+".next", os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = next.Write(text)
	if err := errors.Join(err, next.Sync(), next.Close()); err != nil {
		return err
	}
	return os.Rename(path+".next", path)
}

// plain says what an error of the engine means where it matters: that it is down, or that the caller's context has ended.
func (b *Backend) plain(ctx context.Context, err error) error {
	var down *engine.DownError
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case b.ctx.Err() != nil:
		return b.ctx.Err()
	case errors.As(err, &down):
		return down
	}
	return err
}

// mine selects this instance's things.
func (b *Backend) mine() client.Filters {
	return client.Filters{}.Add("label", labelInstance+"="+b.instance)
}

// containers lists all of this instance's, running or not.
func (b *Backend) containers(ctx context.Context) ([]container.Summary, error) {
	found, err := b.engine.ContainerList(ctx, client.ContainerListOptions{All: true, Filters: b.mine()})
	if err != nil {
		return nil, b.plain(ctx, err)
	}
	return found.Items, nil
}

// seen is a container as the engine says it is.
type seen struct {
	id, image string
	labels    map[string]string
	status    container.ContainerState
	running   bool // paused too
	paused    bool
	pid       int
	started   time.Time
	finished  string
	exit      int
	oom       bool
	fault     string // of its last start
}

// inspect returns nil for a container that is not there, or not this instance's.
func (b *Backend) inspect(ctx context.Context, id string) (*seen, error) {
	found, err := b.engine.ContainerInspect(ctx, id, client.ContainerInspectOptions{})
	if errdefs.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, b.plain(ctx, err)
	}
	c := found.Container
	if c.State == nil || c.Config == nil || c.Config.Labels[labelInstance] != b.instance {
		return nil, nil
	}
	s := &seen{
		id: c.ID, image: c.Image, labels: c.Config.Labels, status: c.State.Status, running: c.State.Running || c.State.Paused, paused: c.State.Paused,
		finished: c.State.FinishedAt, exit: c.State.ExitCode, oom: c.State.OOMKilled, fault: c.State.Error,
	}
	if !strings.HasPrefix(s.image, "sha256:") {
		s.image = "sha256:" + s.image
	}
	if s.started, err = time.Parse(time.RFC3339Nano, c.State.StartedAt); err != nil {
		return nil, fmt.Errorf("%s: container %s says it was started %q: %v", b.options.Name, c.ID, c.State.StartedAt, err)
	}
	if s.running {
		s.pid = c.State.Pid
	}
	return s, nil
}

// discard removes a container, running or not. It is nil if there is none.
func (b *Backend) discard(ctx context.Context, id string) error {
	for pause := 5 * time.Millisecond; ; pause *= 2 {
		_, err := b.engine.ContainerRemove(ctx, id, client.ContainerRemoveOptions{Force: true, RemoveVolumes: true})
		if err == nil || errdefs.IsNotFound(err) {
			return nil
		}
		gone, inspectErr := b.engine.ContainerInspect(ctx, id, client.ContainerInspectOptions{})
		if errdefs.IsNotFound(inspectErr) {
			return nil
		}
		_ = gone
		if ctx.Err() != nil || pause > time.Second { // someone else is removing it, or a mount is still busy
			return b.plain(ctx, err)
		}
		time.Sleep(pause)
	}
}
