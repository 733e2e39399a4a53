// Package wasm runs WebAssembly modules that speak WASI preview 1, on any architecture, with nothing installed.
//
// Each guest is a process of its own: kMO's own binary, re-executed as the guest's runner under the confinement of package
// process, with wazero inside. A guest outlives whoever started it, is stopped by a signal, has the kernel's limits, and
// takes nobody with it (docs/decisions/003 has the figures). A command's main must, before anything else:
//
//	if len(os.Args) > 1 && os.Args[1] == wasm.GuestArg {
//		os.Exit(wasm.Guest(os.Args[2:]))
//	}
//
// and the same for process.StageArg. The binary must be static, as CGO_ENABLED=0 makes it: a guest's root holds nothing else.
//
// # What a guest gets
//
// The content is one core module that exports _start and imports functions of wasi_snapshot_preview1 alone. Its arguments are
// the image's entrypoint, then Run.Args or the image's Cmd. A hook is the same module with the hook's words as its arguments,
// and so is a command by Exec.
//
// Files, kept paths, mounts and the overlay are one tree, pre-opened as descriptor 3, "/". Nothing else of the host is in it,
// and a symbolic link that leads out of it is refused. Without an overlay only kept paths can be written.
//
// Each port is a listening socket, opened for the guest beforehand: descriptor 4, 5, … in the order of Run.Ports, told as
// KMO_FD_<NAME> beside KMO_PORT_<NAME>. A port without a number is on the loopback, the others on every address. A guest
// need not listen on any number, so every port can be published under another. In Go:
//
//	fd, err := strconv.Atoi(os.Getenv("KMO_FD_HTTP"))
//	err = syscall.SetNonblock(fd, true) // or every other goroutine waits with Accept
//	listener, err := net.FileListener(os.NewFile(uintptr(fd), "http"))
//
// # Limits and ends
//
// Resources.Memory bounds the guest's linear memory; the cgroup's bound is larger by what running it costs, and a hook or Exec
// beside it: twice the sum of its machine code, twice its module, and 32 MiB. A guest that asks for more is told so by memory.grow; if
// it ends then, the status says OOM and 137, as for one that the kernel killed. Resources.PIDs is always kept: a guest has one thread,
// and those of its runner are not its own. WASI has no signals: a guest is told nothing before its end, so exit hooks are the place for
// last things.
//
// A guest is starting until its machine code is loaded and its module instantiated, and running from _start on.
//
// Time is bounded for hooks and compiling, not for a guest: one that spins has its share of the processor, from its start on.
//
// A status is the guest's own, but 247 is told as 246. 134 is a trap, told in the log, 70 an error of the runner.
//
// # State
//
//	guests/                       package process's
//	modules/<sha256>-<version>/   machine code of one module, made by wazero <version> for this machine, and its own SHA-256,
//	                              which every runner checks; the newest 32
//	base/                         the tree that is below every guest's, with /tmp and nothing else
//
// A module is compiled once, and one at a time, by a process without rights or a network, which landlock keeps to one empty folder; that folder
// is then renamed into place. Runners may only read it. The newest is the most recently started.
package wasm

import (
	"cmp"
	"context"
	"errors"
	"io"
	"log/slog"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/process"
)

// Name is the backend's name.
const Name = "wasm"

// GuestArg as its first argument makes a process the runner of a guest, or its compiler.
const GuestArg = "wasm-guest"

// Where things are inside a runner's root.
const (
	insideTree    = "/guest"
	insideModule  = "/kmo/module.wasm"
	insideCode    = "/kmo/code"
	insideProgram = "/kmo/run"
)

const (
	pageSize    = 64 << 10 // of WebAssembly
	runnerShare = 32 << 20 // bytes of a runner that grow with nothing
	runnerPIDs  = 64       // threads of a runner; a guest has one
)

// Options are what a Backend needs. State is.
type Options struct {
	State   string                           // the state folder; made if there is none
	Program string                           // a static binary that answers GuestArg; "" is this one
	Logger  *slog.Logger                     // nil is silent
	Backoff func(restarts int) time.Duration // as process.Options has it
}

// Backend is backends.Backend and backends.Execer.
type Backend struct {
	keeper  *process.Keeper
	cache   *cache
	program string
	base    string
}

// Open makes or finds the state and takes over the guests that run. It needs Linux.
func Open(o Options) (*Backend, error) {
	b := &Backend{program: o.Program}
	var err error
	if b.program == "" {
		if b.program, err = os.Executable(); err != nil {
			return nil, err
		}
	}
	if err := static(b.program); err != nil {
		return nil, err
	}
	state, err := filepath.Abs(o.State)
	if err != nil {
		return nil, err
	}
	b.base = filepath.Join(state, "base")
	tree := filepath.Join(b.base, insideTree)
	tmp := filepath.Join(tree, "tmp")
	for _, dir := range []string{state, b.base, tree, tmp} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	// What a guest may write is decided by the mounts above this tree, not by its modes.
	for dir, mode := range map[string]os.FileMode{b.base: 0o755, tree: 0o777, tmp: 0o777 | os.ModeSticky} {
		if err := os.Chmod(dir, mode); err != nil {
			return nil, err
		}
	}
	if b.cache, err = openCache(filepath.Join(state, "modules"), b.program); err != nil {
		return nil, err
	}
	b.keeper, err = process.Open(process.Options{
		Backend: Name, State: filepath.Join(state, "guests"), Plan: b.plan, Features: features, Means: means, Logger: o.Logger, Backoff: o.Backoff,
	})
	if err != nil {
		return nil, err
	}
	return b, nil
}

// features adds what a guest needs no host for, and leaves out what WASI has no words for.
func features(have []backends.Feature) []backends.Feature {
	have = slices.DeleteFunc(have, func(f backends.Feature) bool { return f == backends.Devices || f == backends.Sockets })
	return append(have, backends.PortMap, backends.LimitPIDs)
}

// Close ends this process's part. No guest notices.
func (b *Backend) Close() error { return b.keeper.Close() }

// Fingerprint says what the host lets the keeper do, and what a guest needs no host for.
func (b *Backend) Fingerprint(context.Context) (backends.Fingerprint, error) {
	var formats []backends.Format
	if b.keeper.Confines() {
		formats = []backends.Format{backends.WASM}
	}
	return backends.Fingerprint{
		Backend: Name, Version: "wazero " + wazeroVersion(), Formats: formats,
		Platforms: []string{"wasip1/wasm"}, Isolation: backends.IsolationSandbox,
		Features: b.keeper.Features(), Missing: b.keeper.Missing(),
	}, nil
}

// Observe lists the guests.
func (b *Backend) Observe(ctx context.Context) ([]backends.Status, error) {
	return b.keeper.Observe(ctx)
}

// means says of a runner's exit status what it stands for.
func means(status int) (code int, oom bool) {
	if status == statusMemory {
		return 137, true
	}
	return status, false
}

// Apply checks the module, compiles it if that was not done before, and starts it.
func (b *Backend) Apply(ctx context.Context, w backends.Workload) error {
	if w.Format != backends.WASM {
		return &backends.FeatureError{Backend: Name, Feature: backends.Feature(w.Format), Detail: "what runs is " + string(backends.WASM)}
	}
	if err := inspect(w.Image.Content); err != nil {
		return startError(w, "reading "+w.Image.Content, err)
	}
	inner, err := b.inner(ctx, w)
	if err != nil {
		return startError(w, "compiling "+w.Image.Content, err)
	}
	err = b.keeper.Apply(ctx, inner)
	var start *backends.StartError
	if errors.As(err, &start) { // in the words of the unit
		start.Stage = strings.ReplaceAll(start.Stage, strings.Join(b.hook(nil), " ")+" ", "")
	}
	return err
}

// startError makes a fault of the module the workload's fault, and leaves every other error what it is.
func startError(w backends.Workload, stage string, err error) error {
	var module *moduleError
	if errors.As(err, &module) {
		return &backends.StartError{Workload: w.Name, Stage: stage, Cause: module.Error()}
	}
	return err
}

// Remove runs the exit hooks, stops the guest and clears everything of it but kept paths and the machine code.
func (b *Backend) Remove(ctx context.Context, name string) error { return b.keeper.Remove(ctx, name) }

// Logs returns what the guest wrote.
func (b *Backend) Logs(ctx context.Context, name string, options backends.LogOptions) (io.ReadCloser, error) {
	return b.keeper.Logs(ctx, name, options)
}

// Exec runs the guest's module again, beside it, with argv as its arguments and without its listeners.
func (b *Backend) Exec(ctx context.Context, name string, argv []string) (int, []byte, error) {
	return b.keeper.Exec(ctx, name, b.hook(argv))
}

// inner is the workload that the keeper is asked for: the same, as the runner's process needs it. It is what is recorded.
func (b *Backend) inner(ctx context.Context, w backends.Workload) (backends.Workload, error) {
	code, err := b.cache.ready(ctx, w.Image.Content, w.Run.User)
	if err != nil {
		return w, err
	}
	w.Run.Env = maps.Clone(w.Run.Env)
	if w.Run.Env == nil {
		w.Run.Env = map[string]string{}
	}
	w.Run.Ports = slices.Clone(w.Run.Ports)
	for i := range w.Run.Ports {
		innerPort(&w.Run.Ports[i], w.Run.Env)
	}
	delete(w.Run.Env, memoryVariable)
	if w.Resources.Memory > 0 {
		w.Run.Env[memoryVariable] = strconv.FormatInt(w.Resources.Memory/pageSize*pageSize, 10)
		w.Resources.Memory += 2 * (runnerShare + code.cost)
	}
	if w.Resources.PIDs > 0 {
		w.Resources.PIDs = max(w.Resources.PIDs, runnerPIDs)
		if !b.keeper.Bounds("pids") {
			w.Resources.PIDs = 0 // kept all the same: a guest has one thread
		}
	}
	w.Files, w.Mounts, w.Doors, w.Overlay.Keep = slices.Clone(w.Files), slices.Clone(w.Mounts), slices.Clone(w.Doors), slices.Clone(w.Overlay.Keep)
	for i := range w.Files {
		w.Files[i].To = inTree(w.Files[i].To)
	}
	for i := range w.Mounts {
		w.Mounts[i].To = inTree(w.Mounts[i].To)
	}
	for i := range w.Doors {
		w.Doors[i].To = inTree(w.Doors[i].To)
	}
	for i := range w.Overlay.Keep {
		w.Overlay.Keep[i] = inTree(w.Overlay.Keep[i])
	}
	w.Hooks = backends.Hooks{PreInit: b.hooks(w.Hooks.PreInit), PostInit: b.hooks(w.Hooks.PostInit), Exit: b.hooks(w.Hooks.Exit)}
	return w, nil
}

// innerPort makes a port one that the runner listens on, on the host. The number it has inside is recorded as the variable that
// tells it; a port without that variable is on the loopback.
func innerPort(p *backends.Port, env map[string]string) {
	variable := p.Variable()
	delete(env, variable)
	if inside := cmp.Or(p.Port, p.Host); inside != 0 {
		env[variable] = strconv.Itoa(inside)
	}
	if p.Host != 0 {
		p.Port = 0
	}
}

// inTree is where the runner sees a path of the guest. A path that is not clean stays as it is, and the keeper refuses it.
func inTree(to string) string {
	if !path.IsAbs(to) || path.Clean(to) != to || to == "/" {
		return to
	}
	return insideTree + to
}

func (b *Backend) hooks(list [][]string) [][]string {
	var hooks [][]string
	for _, argv := range list {
		hooks = append(hooks, b.hook(argv))
	}
	return hooks
}

func (b *Backend) hook(argv []string) []string {
	return append([]string{insideProgram, GuestArg, hookArg}, argv...)
}

// plan is what package process runs for a workload of inner's, with its ports resolved.
func (b *Backend) plan(ctx context.Context, w backends.Workload, place process.Place) (process.Program, error) {
	code, err := b.cache.ready(ctx, w.Image.Content, w.Run.User)
	if err != nil {
		return process.Program{}, startError(w, "compiling "+w.Image.Content, err)
	}
	guest := plan{Module: w.Image.Content, Code: code.dir, Sum: code.sum, Env: w.Env(), Announce: true}
	base := ""
	if !place.Bare {
		base = b.base
		guest.Module, guest.Code, guest.Root = insideModule, insideCode, insideTree
	}
	if err := guest.fill(w); err != nil {
		return process.Program{}, err
	}
	text, err := guest.encode()
	if err != nil {
		return process.Program{}, startError(w, "exec", err)
	}
	argv := w.Argv()
	if len(w.Image.Config.Entrypoint) == 0 {
		argv = append([]string{w.Unit}, argv...)
	}
	return process.Program{
		Root: base,
		Binds: []process.Bind{
			{From: w.Image.Content, To: insideModule}, {From: code.dir, To: insideCode}, {From: b.program, To: insideProgram},
		},
		Argv: append([]string{insideProgram, GuestArg, runArg}, argv...),
		Env:  map[string]string{planVariable: text, "GODEBUG": "multipathtcp=0"},

		Announces: true,
	}, nil
}
