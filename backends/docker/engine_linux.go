package docker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/system"
	"github.com/moby/moby/client"
	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/docker/engine"
	"github.com/kindos/kmo/backends/docker/plan"
	"github.com/kindos/kmo/backends/process"
	"github.com/kindos/kmo/backends/process/secret"
)

// Backend runs containers. It is a backends.Backend and a backends.Execer, and its methods may be called concurrently.
type Backend struct {
	options  Options
	endpoint engine.Endpoint
	engine   *client.Client
	plan     plan.Plan
	lock     *os.File     // held on the state folder: one process at a time; nil if it only looks
	step     func(string) // called at each step of a start; a test ends this process there
	hookTime time.Duration
	dropTime time.Duration // for the removal of an image

	life
	images images
	server atomic.Pointer[string] // what answers, by its own words

	settling  chan struct{} // holds one token: who asks for the first time what there is
	measuring chan struct{} // holds one token: who asks for the first time what the engine can do

	mu sync.Mutex // guards what follows
	known
}

// life is what goes on until Close.
type life struct {
	ctx     context.Context // of watching and restarting; ended by Close
	cancel  context.CancelFunc
	working sync.WaitGroup
	wake    chan struct{} // holds one token: look at all containers again
	starts  chan struct{} // bounds how many programs are started again at once
}

// known is what the engine has said, and what has come of it.
type known struct {
	settled bool // it has said what there is
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
		options: o, plan: plan.Plan{Engine: o.Name, State: state}, endpoint: engine.Endpoint{Name: o.Name, Socket: o.Socket}, step: func(string) {}, hookTime: hookTime, dropTime: clearTime,
		life: life{wake: make(chan struct{}, 1), starts: make(chan struct{}, 4)}, images: newImages(), settling: make(chan struct{}, 1), measuring: make(chan struct{}, 1),
		known: known{entries: map[string]*entry{}, ports: map[int]string{}},
	}
	if !o.Look {
		if err := b.own(); err != nil {
			return nil, err
		}
	}
	if b.engine, err = b.endpoint.Client(func(server string) { b.server.Store(&server) }); err != nil {
		return nil, errors.Join(err, b.disown())
	}
	b.plan.Secrets = secret.Open(o.Memory, o.Name+"-"+b.plan.Instance)
	b.ctx, b.cancel = context.WithCancel(context.Background())
	if !o.Look {
		b.working.Go(b.watch)
		b.working.Go(b.listen)
	}
	return b, nil
}

// own takes the state folder.
func (b *Backend) own() (err error) {
	state := b.options.State
	for _, dir := range []string{"", "work", "images", "kept"} {
		if err := os.MkdirAll(filepath.Join(state, dir), 0o700); err != nil {
			return err
		}
	}
	if b.lock, err = process.Lock(state); err != nil {
		return err
	}
	if b.plan.Instance, err = backends.Instance(state, "work", "images"); err != nil {
		return errors.Join(err, b.disown())
	}
	return nil
}

// disown lets the state folder go.
func (b *Backend) disown() error {
	if b.lock == nil {
		return nil
	}
	return b.lock.Close()
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
	b.plan.Secrets.Close()
	return errors.Join(b.engine.Close(), b.disown())
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
	case client.IsErrConnectionFailed(err), errors.Is(err, unix.ECONNRESET), errors.Is(err, unix.EPIPE), errors.Is(err, io.EOF):
		return b.endpoint.Down(ctx, err)
	}
	return err
}

// mine selects this instance's things.
func (b *Backend) mine() client.Filters {
	return client.Filters{}.Add("label", plan.LabelInstance+"="+b.plan.Instance)
}

// absent says that an engine speaks of a container that is not there. Podman has no status of its own for one that goes while it is asked.
func absent(err error) bool {
	return errdefs.IsNotFound(err) || err != nil && strings.Contains(err.Error(), "no such container")
}

// containers lists all of this instance's, running or not.
func (b *Backend) containers(ctx context.Context) ([]container.Summary, error) {
	for try := 0; ; try++ {
		found, err := b.engine.ContainerList(ctx, client.ContainerListOptions{All: true, Filters: b.mine()})
		if err == nil {
			return found.Items, nil
		}
		// Podman looks at them one after the other, and gives up if one has been removed meanwhile, whosever it was.
		if try == 50 || !absent(err) {
			return nil, b.plain(ctx, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// seen is a container as the engine says it is.
type seen struct {
	id, image string
	labels    map[string]string
	status    container.ContainerState
	running   bool // paused too
	untold    bool // its process has ended, and the engine does not know
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
	if absent(err) {
		return nil, nil
	}
	if err != nil {
		return nil, b.plain(ctx, err)
	}
	c := found.Container
	if c.State == nil || c.Config == nil || c.Config.Labels[plan.LabelInstance] != b.plan.Instance {
		return nil, nil
	}
	s := &seen{
		id: c.ID, image: imageID(c.Image), labels: c.Config.Labels, status: c.State.Status, running: c.State.Running || c.State.Paused, paused: c.State.Paused,
		finished: c.State.FinishedAt, exit: c.State.ExitCode, oom: c.State.OOMKilled, fault: c.State.Error,
	}
	if s.started, err = time.Parse(time.RFC3339Nano, c.State.StartedAt); err != nil {
		return nil, fmt.Errorf("%s: container %s says it was started %q: %v", b.options.Name, c.ID, c.State.StartedAt, err)
	}
	if s.running {
		s.pid = c.State.Pid
	}
	if e := b.entry(s.labels[plan.LabelName]); e != nil && e.lost(s.started, c.State.Pid) && (s.running || s.status == stopping) {
		s.untold, s.running, s.exit, s.finished = true, false, 0, "after "+c.State.StartedAt
	}
	return s, nil
}

// final is inspect, which gives the engine the time to learn how a program ended.
func (b *Backend) final(ctx context.Context, id string) (*seen, error) {
	for late := time.After(tellTime); ; {
		c, err := b.inspect(ctx, id)
		if err != nil || c == nil || !c.untold {
			return c, err
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-late:
			return c, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// improper says that Podman takes a container for something that it is not, which nothing but a forced removal mends.
func improper(err error) bool {
	return err != nil && strings.Contains(err.Error(), "container state improper")
}

// stopping is what Podman alone says of a container that it is about to end.
const stopping container.ContainerState = "stopping"

// imageID is an image's id as Docker says it: Podman leaves out what kind of digest it is.
func imageID(id string) string { return "sha256:" + strings.TrimPrefix(id, "sha256:") }

// discard removes a container, running or not. It is nil if there is none.
func (b *Backend) discard(ctx context.Context, id string) error {
	for pause := 5 * time.Millisecond; ; pause *= 2 {
		_, err := b.engine.ContainerRemove(ctx, id, client.ContainerRemoveOptions{Force: true, RemoveVolumes: true})
		if err == nil || absent(err) {
			return nil
		}
		_, inspectErr := b.engine.ContainerInspect(ctx, id, client.ContainerInspectOptions{})
		if absent(inspectErr) {
			return nil
		}
		if ctx.Err() != nil || pause > time.Second { // someone else is removing it, or a mount is still busy
			return b.plain(ctx, err)
		}
		time.Sleep(pause)
	}
}

// Fingerprint asks the engine what it can do now. It is one question: Podman takes seconds for each that makes it ask others for their versions.
func (b *Backend) Fingerprint(ctx context.Context) (backends.Fingerprint, error) {
	found, err := b.engine.Info(ctx, client.InfoOptions{})
	if err != nil {
		return backends.Fingerprint{}, b.plain(ctx, err)
	}
	info, server := found.Info, ""
	if heard := b.server.Load(); heard != nil {
		server = *heard
	}
	if want := map[string]string{Docker: "Docker/", Podman: "Libpod/"}[b.options.Name]; !strings.HasPrefix(server, want) {
		return backends.Fingerprint{}, fmt.Errorf("%s: what answers at %s is %.100q; want %s", b.options.Name, strings.Join(b.endpoint.Sockets(), ", "), server, want)
	}
	able := backends.Fingerprint{
		Backend: b.options.Name, Version: info.ServerVersion, Isolation: backends.IsolationContainer,
		Formats: []backends.Format{backends.OCI}, Platforms: []string{"linux/" + engine.Arch(info.Architecture)},
	}
	b.measure(&able, info)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.able = &able
	return able, nil
}

// abilities are those that were found last, or else are found now, once for all who want them.
func (b *Backend) abilities(ctx context.Context) (backends.Fingerprint, error) {
	select {
	case b.measuring <- struct{}{}:
		defer func() { <-b.measuring }()
	case <-ctx.Done():
		return backends.Fingerprint{}, ctx.Err()
	}
	b.mu.Lock()
	able := b.able
	b.mu.Unlock()
	if able != nil {
		return *able, nil
	}
	return b.Fingerprint(ctx)
}

// measure fills in what the engine has and what it lacks.
func (b *Backend) measure(able *backends.Fingerprint, info system.Info) {
	has := func(f backends.Feature) { able.Features = append(able.Features, f) }
	lacks := func(words string) { able.Missing = append(able.Missing, words) }
	for _, f := range []backends.Feature{
		backends.OwnNetwork, backends.PortMap, backends.LowPorts, backends.LimitDisk, backends.Overlays, backends.MemoryPool, backends.Sockets, backends.Hooking, backends.HostNetwork,
		backends.Exec, backends.Mounts, backends.Capabilities, backends.HostNamespace, backends.WritableBase, backends.Unconfined,
	} {
		has(f)
	}
	for _, limit := range []struct {
		feature backends.Feature
		has     bool
	}{{backends.LimitCPU, info.CPUCfsQuota}, {backends.LimitMemory, info.MemoryLimit}, {backends.LimitPIDs, info.PidsLimit}} {
		if limit.has {
			has(limit.feature)
		} else {
			lacks(string(limit.feature) + ": the engine says that this host's cgroups take no such bound")
		}
	}
	mapped := os.Geteuid() != 0 || slices.ContainsFunc(info.SecurityOptions, func(o string) bool {
		return strings.Contains(o, "name=userns") || strings.Contains(o, "name=rootless")
	})
	switch {
	case mapped:
		for _, f := range []backends.Feature{backends.Keep, backends.Files, backends.Devices, backends.Secrets} {
			lacks(string(f) + ": the engine maps user ids, so that what is made for a user here is another's inside")
		}
	default:
		has(backends.Keep)
		has(backends.Files)
		has(backends.Devices)
		if b.plan.Secrets.Has() {
			has(backends.Secrets)
			if secret.Swaps() {
				lacks(secret.SwapWords)
			}
		} else {
			lacks("secrets: neither /run/kmo nor /dev/shm/kmo is on storage that is memory, and this user's own")
		}
	}
	if why := b.unprivileged(mapped); why == "" {
		has(backends.Privileged)
	} else {
		lacks("privileged: " + why)
	}
	if !slices.ContainsFunc(info.SecurityOptions, func(o string) bool { return strings.Contains(o, "name=seccomp") }) {
		lacks("seccomp: the engine has no filter")
	}
	if !slices.ContainsFunc(info.SecurityOptions, func(o string) bool {
		return strings.Contains(o, "name=apparmor") || strings.Contains(o, "name=selinux")
	}) {
		lacks("apparmor, selinux: the kernel has neither, or the engine does not use them")
	}
	if b.options.Name == Docker {
		lacks("capabilities: for a user that is not 0 they count only beside escalation, through a file's own")
	}
	lacks("overlay-root: what may be written is /tmp and /dev/shm, each a tmpfs of its own")
	lacks("content: the engine's own copy of an image is not looked at again while it is used")
	slices.Sort(able.Features)
}

// unapplied is what the engine leaves out of a workload's bounds and of the confinement that it did not ask to be without.
func unapplied(able backends.Fingerprint, w backends.Workload) (list []string) {
	if !w.Security.Unconfined && !w.Security.Privileged {
		list = backends.Concerning(able.Missing, "seccomp", "apparmor")
	}
	if w.Resources.Disk > 0 && len(w.Overlay.Keep) > 0 {
		list = append(list, "disk bound of kept paths: they share the file system of the state folder")
	}
	return list
}

// unprivileged says why all of the host cannot be given, or nothing if it can. Docker gives every capability the kernel knows, and cannot
// give what it has not itself; Podman gives what it has.
func (b *Backend) unprivileged(mapped bool) string {
	if mapped {
		return "the engine itself has not all of the host"
	}
	if b.options.Name == Podman {
		return ""
	}
	lacking, err := b.endpoint.Lacking(b.ctx)
	if err != nil {
		return "which capabilities the engine itself has cannot be told: " + err.Error()
	}
	if len(lacking) > 0 {
		return "the engine itself has no " + lacking[0]
	}
	return ""
}
