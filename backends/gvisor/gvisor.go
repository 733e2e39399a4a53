// Package gvisor runs OCI images in gVisor's sandbox: what a program calls is answered by runsc's own kernel, in user space, and
// hardly any of it reaches this host's.
//
// It needs two programs of this host, runsc and slirp4netns, and nothing that stays: no daemon, no bridge, no rule of the firewall. What
// keeps, restarts and finds sandboxes again is package process; inside its namespaces stands a monitor, kMO's own binary. A command's main
// must, before anything else:
//
//	if len(os.Args) > 1 && os.Args[1] == gvisor.GuestArg {
//		os.Exit(gvisor.Guest(os.Args[2:]))
//	}
//
// and the same for process.StageArg. The order of a start:
//
//  1. the monitor mounts the root: the content, a layer with the unit's files and mount points, and above both, where something may be
//     written, a tmpfs of Overlay.Size;
//  2. preInit hooks are run, each in a sandbox of its own with the same root and mounts, and a network of its own, as runsc runs nothing
//     in a sandbox whose program has not been started;
//  3. runsc creates the sandbox and starts the program.
//
// The sandbox is the monitor's child from then on, so that its end is seen at once and its status is the program's; of what `runsc state`
// says nothing is believed. postInit and exit hooks and Exec are `runsc exec`.
//
// # What a program gets
//
// Its user is Run.User, it has no capability and can gain none, it sees no device of this host. /proc, /sys and /dev are gVisor's own. Of
// the overlay's room /tmp and /dev/shm are parts. Kept paths, mounts and doors are read anew each time, as others may change them; what is
// mapped there is this host's page cache, so that a memory pool is one. Unix sockets of this host are out of reach but for a workload
// with a door via socket.
//
// # Network
//
// A workload has a network of its own: gVisor's TCP, and slirp4netns, a process of the workload's, between it and this host's sockets.
// It reaches what this host reaches, but not what listens on this host's loopback; names are asked of this host's resolver by
// 10.0.2.3, as [monitor.Resolver] says. Its own address is 10.0.2.100. Ports are published by slirp4netns, on every address of version 4 if the unit says Host, otherwise on the loopback. A connection to a published port is taken before the program listens: ask for
// an answer, not for a connection. With `host: [network]` its sockets are this host's.
//
// # Limits
//
// Resources.Memory and PIDs bound what is the program's; the bounds of the cgroup are larger by what the sandbox, its file server, the
// network and the monitor cost. Memory: 160 MiB more (measured: 22 to 26 MiB, as much again for a hook in a sandbox of its own, and the
// pages of the programs' files where the workload is the first to need them), so that a program may have the rest of it beyond what it asked for. PIDs are kept exactly, by the sandbox itself, for each user but 0; Usage.PIDs is not told.
// A sandbox that was killed for want of memory is told as 137 and OOM.
package gvisor

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/process"
)

// Name is the backend's name.
const Name = "gvisor"

// GuestArg as its first argument makes a process the monitor of a sandbox, or a command beside one.
const GuestArg = "gvisor-guest"

// What a guest is asked to do.
const runArg, commandArg = "run", "command"

// What the runtime costs beside the program.
const (
	memoryShare = 160 << 20
	pidsShare   = 192
	pidsTimes   = 4 // threads of this host that a thread inside may have
)

// Options are what a Backend needs. State is.
type Options struct {
	State   string                           // the state folder: trusted, made if there is none
	Runsc   string                           // "" is looked for in PATH
	Slirp   string                           // slirp4netns; "" is looked for in PATH
	Logger  *slog.Logger                     // nil is silent
	Backoff func(restarts int) time.Duration // as process.Options has it
}

// Backend is backends.Backend and backends.Execer.
type Backend struct {
	*process.Keeper
	options Options

	mu      sync.Mutex // guards what follows
	found   runtime    // as measured, and not again
	measure func(context.Context, Options) (runtime, error)
}

// runtime is what of this host's runs sandboxes. Guests are told it as JSON.
type runtime struct {
	Runsc    string `json:"runsc"`
	Slirp    string `json:"slirp"`
	Version  string `json:"version"`
	Platform string `json:"platform"` // how system calls are caught: systrap or ptrace
}

// Open goes on with what an earlier process left in the state folder. It needs Linux, but not yet runsc.
func Open(o Options) (*Backend, error) {
	state, err := filepath.Abs(o.State)
	if err != nil {
		return nil, err
	}
	o.State = state
	b := &Backend{options: o, measure: measure}
	if err := os.MkdirAll(state, 0o700); err != nil {
		return nil, err
	}
	b.Keeper, err = process.Open(process.Options{
		Backend: Name, State: state, Plan: b.plan, Publishes: true, Features: features, Logger: o.Logger, Backoff: o.Backoff,
	})
	if err != nil {
		return nil, err
	}
	return b, nil
}

// features adds what a network of its own gives, and leaves out what a sandbox has not.
func features(have []backends.Feature) []backends.Feature {
	return append(slices.DeleteFunc(have, func(f backends.Feature) bool { return f == backends.Devices }), backends.PortMap)
}

// Fingerprint says what was measured when it was first asked for. Without runsc or slirp4netns it is an error that says what to install.
func (b *Backend) Fingerprint(ctx context.Context) (backends.Fingerprint, error) {
	if !b.Mounts() {
		return backends.Fingerprint{}, errBare
	}
	r, err := b.runtime(ctx)
	if err != nil {
		return backends.Fingerprint{}, err
	}
	var formats []backends.Format
	if slices.Contains(b.Features(), backends.Overlays) {
		formats = []backends.Format{backends.OCI}
	}
	return backends.Fingerprint{
		Backend: Name, Version: r.Version + ", " + r.Platform, Formats: formats, Platforms: []string{platform()},
		Isolation: backends.IsolationSandbox, Features: b.Features(), Missing: b.missing(),
	}, nil
}

// missing is what the keeper lacks where that counts for a sandbox, and what a sandbox lacks.
func (b *Backend) missing() []string {
	list := slices.DeleteFunc(b.Missing(), func(line string) bool {
		return len(backends.Concerning([]string{line}, "landlock", "seccomp", "network", "low-ports", "process groups")) > 0
	})
	return append(list,
		"devices: a sandbox has none of this host's",
		looseness(),
		"network: TCP ports are published to addresses of version 4 only, and seem to be listened on before they are")
}

// looseness is by how much the bounds of a sandbox are wider than its program's.
func looseness() string {
	return fmt.Sprintf("bounds: what a sandbox does not use of its share, %d MiB, the program may; threads of user 0 are bounded with the sandbox only, at %d times their bound and %d",
		memoryShare>>20, pidsTimes, pidsShare)
}

var errBare = errors.New("runsc needs root, with the right to mount")

// runtime looks for what runs sandboxes, and once it is found not again.
func (b *Backend) runtime(ctx context.Context) (runtime, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.found.Platform != "" {
		return b.found, nil
	}
	found, err := b.measure(ctx, b.options)
	if err == nil {
		b.found = found
	}
	return found, err
}

// Apply makes the workload run as specified.
func (b *Backend) Apply(ctx context.Context, w backends.Workload) error {
	if w.Format != backends.OCI {
		return &backends.FeatureError{Backend: Name, Feature: backends.Feature(w.Format), Detail: "what runs is " + string(backends.OCI)}
	}
	if _, err := b.runtime(ctx); err != nil {
		return err
	}
	return b.Keeper.Apply(ctx, inner(w))
}

// inner is the workload that the keeper is asked for: the same, with what the runtime costs. It is what is recorded.
func inner(w backends.Workload) backends.Workload {
	if w.Resources.Memory > 0 {
		w.Resources.Memory += memoryShare
	}
	if w.Resources.PIDs > 0 {
		w.Resources.PIDs = pidsTimes*w.Resources.PIDs + pidsShare
	}
	return w
}

// pids is how many threads the program of an inner workload may have; 0 is not bounded.
func pids(w backends.Workload) int64 {
	return max(w.Resources.PIDs-pidsShare, 0) / pidsTimes
}

// Observe lists the workloads. How many threads a program has inside is not known here, and those of its sandbox are not its own.
func (b *Backend) Observe(ctx context.Context) ([]backends.Status, error) {
	list, err := b.Keeper.Observe(ctx)
	for i := range list {
		list[i].Usage.PIDs = 0
	}
	return list, err
}

// plan is what package process runs for a workload of inner's.
func (b *Backend) plan(ctx context.Context, w backends.Workload, place process.Place) (process.Program, error) {
	if place.Bare {
		return process.Program{}, errBare
	}
	r, err := b.runtime(ctx)
	if err != nil {
		return process.Program{}, err
	}
	if len(w.Argv()) == 0 {
		return process.Program{}, &backends.StartError{Workload: w.Name, Stage: "exec", Cause: "neither the image nor the unit names a command"}
	}
	how, err := json.Marshal(r)
	if err != nil {
		return process.Program{}, err
	}
	where, err := json.Marshal(place)
	if err != nil {
		return process.Program{}, err
	}
	var unapplied []string
	if w.Resources.Memory > 0 || w.Resources.PIDs > 0 {
		unapplied = append(unapplied, looseness())
	}
	return process.Program{
		Monitor: true, Unapplied: unapplied, Argv: []string{GuestArg, runArg, string(how), string(where)},
		Env: map[string]string{"PATH": cmp.Or(os.Getenv("PATH"), defaultPath)},
		Command: func(argv []string) []string {
			return append([]string{GuestArg, commandArg, string(how), string(where)}, argv...)
		},
	}, nil
}

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
