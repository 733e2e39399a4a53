package process

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/process/cgroup"
	"github.com/kindos/kmo/backends/process/secret"
	"github.com/kindos/kmo/backends/process/stage"
	"golang.org/x/sys/unix"
)

// Keeper keeps the programs of one state folder. All its methods may be called concurrently.
type Keeper struct {
	measured
	options Options
	lock    *os.File     // held on the state folder: one keeper at a time
	step    func(string) // called at each step of a start; a test ends this process there

	hookTime time.Duration

	ctx     context.Context // of watching and restarting; ended by Close
	cancel  context.CancelFunc
	working sync.WaitGroup
	starts  chan struct{} // bounds how many programs are started again at once

	mu      sync.Mutex // guards what follows
	entries map[string]*entry
	ports   map[int]string // chosen ports, and whose they are
	next    int            // where in the list of workloads reading their usage goes on
}

// measured is what this host lets a keeper do.
type measured struct {
	support stage.Support
	groups  cgroup.Groups
	secrets secret.Store
	boot    string
}

// entry is one workload. Whoever holds its turn may change it; mu is for what others look at meanwhile.
type entry struct {
	name, dir string
	turn      chan struct{} // holds one token

	mu      sync.Mutex // guards what follows
	record  record
	state   backends.State
	detail  string
	program *program // nil when there is none
	last    *program // the newest there was; only its watcher starts another; written under the turn
	plan    *Program // of the present program; nil if an earlier process started it and nobody has asked since
	cleared bool     // gone from the keeper: who waited for its turn must look again
	usage   backends.Usage
	read    time.Time // of usage

	interrupt context.CancelFunc // ends what the keeper does under the turn of its own accord; nil when it does nothing
}

// Open takes the state folder, which no other process may have, and goes on with what an earlier one left there: programs that run are
// kept, programs that are gone are started again, half-made ones are undone, removals are finished.
func Open(o Options) (*Keeper, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Backoff == nil {
		o.Backoff = func(restarts int) time.Duration { return min(time.Second<<min(restarts, 6), time.Minute) }
	}
	if o.LogSize == 0 {
		o.LogSize = 8 << 20
	}
	state, err := filepath.Abs(o.State)
	if err != nil {
		return nil, err
	}
	o.State = state
	k := &Keeper{options: o, entries: map[string]*entry{}, ports: map[int]string{}, hookTime: hookTime, starts: make(chan struct{}, 4), step: func(string) {}}
	if k.boot, err = bootID(); err != nil {
		return nil, fmt.Errorf("boot id: %v", err)
	}
	for _, dir := range []string{"", "work", "kept", "probe"} {
		if err := os.MkdirAll(filepath.Join(state, dir), 0o700); err != nil {
			return nil, err
		}
	}
	if k.lock, err = Lock(state); err != nil {
		return nil, err
	}
	k.support = stage.Measure(filepath.Join(state, "probe"))
	if err := os.Remove(filepath.Join(state, "probe")); err != nil {
		return nil, errors.Join(err, k.lock.Close())
	}
	if k.support.Mounts {
		own := fmt.Sprintf("%s-%x", o.Backend, sha256.Sum256([]byte(state)))[:len(o.Backend)+9]
		k.groups, k.secrets = cgroup.Find("/sys/fs/cgroup", "kmo/"+own), secret.Open(o.Memory, own)
	}
	k.ctx, k.cancel = context.WithCancel(context.Background())
	if err := k.find(); err != nil {
		return nil, errors.Join(err, k.Close())
	}
	k.working.Go(k.trimLogs)
	return k, nil
}

// Close ends this process's part. The programs go on, and the next Open finds them.
func (k *Keeper) Close() error {
	k.cancel()
	k.mu.Lock()
	for _, e := range k.entries {
		e.mu.Lock()
		if e.program != nil {
			e.program.release()
		}
		e.mu.Unlock()
	}
	k.mu.Unlock()
	k.working.Wait()
	k.secrets.Close()
	return k.lock.Close()
}

func (k *Keeper) trimLogs() {
	sizes := map[string]int64{} // as the last look left them
	for wait := time.Nanosecond; ; {
		select {
		case <-k.ctx.Done():
			return
		case <-time.After(wait):
		}
		wait = trimEvery
		left := map[string]int64{}
		for _, e := range k.list() {
			before, after, err := trim(e.dir, k.options.LogSize)
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				k.options.Logger.Warn("trimming a log", "workload", e.name, "err", err)
			}
			if before-sizes[e.name] > k.options.LogSize/2 {
				wait = trimSoon
			}
			left[e.name] = after
		}
		sizes = left
	}
}

// Mounts says whether programs get a root of their own. Without, they see the host's paths, as far as landlock lets them.
func (k *Keeper) Mounts() bool { return k.support.Mounts }

// Confines says whether programs can be kept from what is not theirs. Without, none is run.
func (k *Keeper) Confines() bool {
	return k.support.Mounts || k.support.Landlock > 0 && k.support.Seccomp
}

// Bounds says whether this host bounds "memory", "cpu" or "pids".
func (k *Keeper) Bounds(kind string) bool { return k.groups.Has(kind) }

// Kernel is the release of the kernel, which is the runtime.
func (k *Keeper) Kernel() string {
	var name unix.Utsname
	if unix.Uname(&name) != nil {
		return ""
	}
	return unix.ByteSliceToString(name.Release[:])
}

// Features lists what workloads may ask for on this host, sorted.
func (k *Keeper) Features() []backends.Feature {
	list := []backends.Feature{backends.Exec, backends.Hooking, backends.HostNetwork}
	if k.support.Mounts {
		list = append(list, backends.Keep, backends.Mounts, backends.Files, backends.MemoryPool, backends.Sockets, backends.Devices)
	}
	if k.secrets.Has() {
		list = append(list, backends.Secrets)
	}
	if k.support.Overlay {
		list = append(list, backends.Overlays, backends.OverlayRoot, backends.LimitDisk)
	}
	if k.options.Publishes {
		list = append(list, backends.OwnNetwork)
	}
	if k.options.Publishes || unprivilegedPorts() < 1024 {
		list = append(list, backends.LowPorts)
	}
	for name, feature := range map[string]backends.Feature{
		"cpu": backends.LimitCPU, "memory": backends.LimitMemory, "pids": backends.LimitPIDs,
	} {
		if k.groups.Has(name) {
			list = append(list, feature)
		}
	}
	if k.options.Features != nil {
		list = k.options.Features(list)
	}
	slices.Sort(list)
	return slices.Compact(list)
}

// Missing says in words what this host does not let the keeper apply.
func (k *Keeper) Missing() []string {
	var list []string
	for _, one := range []struct {
		lacks bool
		words string
	}{
		{!k.support.Mounts, "namespaces, a root and a user of its own: needs root with the right to mount; landlock keeps files of the host away, seccomp all unix sockets"},
		{!k.Confines(), "programs: without root they need landlock and seccomp to be kept from the files and sockets of their user; none is run"},
		{k.kin() == kinNumber, "process groups: what a program started may outlive it when it ends after a restart of this backend; the kernel is older than 6.9"},
		{k.support.Mounts && !k.support.Overlay, "overlay: the kernel has no overlayfs"},
		{k.support.Landlock == 0, "landlock: the kernel has none"},
		{k.support.Landlock > 0 && k.support.Landlock < 6, fmt.Sprintf("landlock: version %d does not keep abstract sockets of the host away, 6 does", k.support.Landlock)},
		{k.support.HoldsPorts(), "network: the host's is shared: a program reaches what listens on it, and may use any UDP port; TCP ports it binds are its own only"},
		{!k.support.HoldsPorts(), "network: the host's is shared: a program reaches what listens on it, and may use any port, a neighbour's too; landlock 4 and seccomp would hold TCP ports"},
		{!k.support.Seccomp, "seccomp: the kernel or this architecture has none"},
		{!k.options.Publishes && unprivilegedPorts() > 1, fmt.Sprintf("low-ports: numbers below %d need a capability, and a program here has none", unprivilegedPorts())},
		{k.secrets.Has() && secret.Swaps(), secret.SwapWords},
		{k.support.Mounts && !k.secrets.Has(), "secrets: neither /run/kmo nor /dev/shm/kmo is on storage that is memory, and this user's own"},
	} {
		if one.lacks {
			list = append(list, one.words)
		}
	}
	for _, kind := range []string{"memory", "cpu", "pids"} {
		switch {
		case !k.support.Mounts:
			list = append(list, "limit-"+kind+": a keeper that is not root, with the right to mount, makes no cgroups")
		case !k.groups.Has(kind):
			list = append(list, "limit-"+kind+": no "+kind+" cgroup takes a bound on this host")
		}
	}
	return list
}

// now is the workload's program, or nil.
func (e *entry) now() *program {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.program
}

// change changes the record and saves it, against a program's end at the same time.
func (e *entry) change(f func(r *record)) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	f(&e.record)
	return e.record.save(e.dir)
}

func (k *Keeper) list() []*entry {
	k.mu.Lock()
	defer k.mu.Unlock()
	list := make([]*entry, 0, len(k.entries))
	for _, e := range k.entries {
		list = append(list, e)
	}
	return list
}

func (k *Keeper) entry(name string) *entry {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.entries[name]
}

// take waits for the turn of a workload, which it makes if wanted. It returns nil for one that is not there.
func (k *Keeper) take(ctx context.Context, name string, wanted bool) (*entry, func(), error) {
	for {
		if err := errors.Join(ctx.Err(), k.ctx.Err()); err != nil {
			return nil, nil, err
		}
		k.mu.Lock()
		e := k.entries[name]
		if e == nil && wanted {
			e = k.fresh(name)
			k.entries[name] = e
		}
		k.mu.Unlock()
		if e == nil {
			return nil, func() {}, nil
		}
		select {
		case <-ctx.Done():
			return nil, nil, ctx.Err()
		case <-e.turn:
		}
		if !e.cleared { // written under the turn
			return e, func() { e.turn <- struct{}{} }, nil
		}
		e.turn <- struct{}{}
	}
}

func (k *Keeper) fresh(name string) *entry {
	e := &entry{name: name, dir: filepath.Join(k.options.State, "work", name), turn: make(chan struct{}, 1), state: backends.Starting}
	e.turn <- struct{}{}
	return e
}

// Observe lists the workloads, sorted by name, from memory. Usage is read again when it is a second old, but for no longer
// than readTime in one call: of very many workloads some then have an older one.
func (k *Keeper) Observe(ctx context.Context) ([]backends.Status, error) {
	entries := k.list()
	slices.SortFunc(entries, func(a, b *entry) int { return strings.Compare(a.name, b.name) })
	k.measure(entries)
	list := make([]backends.Status, 0, len(entries))
	for _, e := range entries {
		if s, ok := e.status(); ok {
			list = append(list, s)
		}
	}
	return list, ctx.Err()
}

// readTime bounds how long one Observe reads cgroups.
const readTime = 5 * time.Millisecond

// measure reads what the workloads use, and begins where the last call had to stop.
func (k *Keeper) measure(entries []*entry) {
	k.mu.Lock()
	defer k.mu.Unlock()
	began := time.Now()
	for i := range entries {
		now := time.Now()
		if now.Sub(began) > readTime {
			k.next += i
			return
		}
		e := entries[(k.next+i)%len(entries)]
		e.mu.Lock()
		if e.program != nil && now.Sub(e.read) > time.Second {
			e.usage, e.read = k.groups.Usage(e.name), now
			if k.options.Usage != nil {
				e.usage = k.options.Usage(e.record.Workload, e.usage)
			}
		}
		e.mu.Unlock()
	}
}

func (e *entry) status() (backends.Status, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	r := &e.record
	if r.Workload.Name == "" || e.cleared {
		return backends.Status{}, false // only asked for so far
	}
	s := backends.Status{Name: e.name, Spec: r.Workload.Spec, State: e.state, Content: r.Workload.Image.Content, Restarts: r.Restarts, Unapplied: r.Unapplied, Detail: e.detail}
	for i, p := range r.Workload.Run.Ports {
		s.Addresses = append(s.Addresses, backends.Address{Port: p.Name, Address: fmt.Sprintf("127.0.0.1:%d", r.Ports[i])})
	}
	if r.Ended != nil {
		s.ExitCode, s.OOM = r.Ended.Code, r.Ended.OOM
		if !r.Ended.Known && s.Detail == "" {
			s.Detail = unknownEnd
		}
	}
	if e.program != nil {
		s.PID, s.Started, s.Usage = e.program.pid, r.Started, e.usage
	}
	return s, true
}

// Logs returns what a workload wrote.
func (k *Keeper) Logs(ctx context.Context, name string, options backends.LogOptions) (io.ReadCloser, error) {
	e := k.entry(name)
	if e == nil {
		return nil, backends.ErrNotFound
	}
	return readLog(ctx, k.ctx, e.dir, options)
}

// Exec runs a command inside a running workload, confined and bounded as its program is. It returns the first 64 KiB of its output.
func (k *Keeper) Exec(ctx context.Context, name string, argv []string) (int, []byte, error) {
	e := k.entry(name)
	if e == nil {
		return 0, nil, backends.ErrNotFound
	}
	if len(argv) == 0 {
		return 0, nil, fmt.Errorf("%s: no command is named", name)
	}
	var said words
	status, err := k.join(ctx, e, argv, &said)
	return status, said, err
}
