// Package lxc runs LXC root file systems, and OCI images, in unprivileged containers by the lxc-* tools (LXC 4 or later; Debian package
// lxc). What keeps them and finds them again is package process.
//
// Each workload has a monitor: this very binary in mount, pid, ipc and uts namespaces of its own, in the workload's cgroup. It builds
// the root, writes a configuration and runs lxc-start in the foreground. A command's main must, before anything else:
//
//	if len(os.Args) > 1 && os.Args[1] == lxc.GuestArg {
//		os.Exit(lxc.Guest(os.Args[2:]))
//	}
//
// and the same for process.StageArg. Whatever ends the monitor ends the container; nothing of it stays on the host, for it has no
// bridge, no mount, no cgroup and no state that others see.
//
// # What is run
//
// The image's entrypoint with Run.Args or its Cmd is process 1 of the container. Where neither names a command, content of the format
// lxc is a system container: its /sbin/init is run, and told to stop in its own way, by SIGUSR1 for busybox, SIGPWR for others. systemd is
// refused, as it needs cgroups of its own. As user 0 an init has the capabilities of its own user namespace; every other program has none,
// and can gain none. An init that restarts its machine ends, and is started again as any program is, with its hooks.
//
// # What it gets
//
// The root is the content under a layer with files, kept paths, mounts, doors and devices, as package process/stage builds it; with
// Overlay.Size all of it can be written, in a tmpfs of that size, otherwise nothing but kept paths. /proc is there, its sysctls
// read-only, /sys is not.
//
// Users: uid n inside is n in a range of 65536 of the host that nobody else has; root inside is nobody outside. What
// lies in the content, in kept paths, mounts and doors has inside the owners that it has on disk, by idmapped mounts: Linux 5.19 for the
// content, and for each file system what it takes (tmpfs: 6.3). Where one of them cannot be mapped the container has the host's users,
// with no capability all the same, and its status says so in Unapplied; a system container is refused then.
//
// Network: a namespace of its own, by package process/netns, in which every port can be listened on; security.host network shares
// the host's instead. Ports are published by the monitor, and seem to come from the loopback inside; a program must listen there or
// on every IPv4 address.
//
// Cgroups: the keeper bounds the monitor, lxc-start and the container together, by what version this host has, so the configuration has
// neither lxc.cgroup nor lxc.cgroup2 keys; hierarchies are hidden from LXC, which makes no cgroups then. The bounds of memory and of
// processes are larger than asked by what that costs. What is not used of that memory the program may use, and Unapplied says so; its processes are
// bounded by RLIMIT_NPROC as well.
//
// A hook before the program is a container of its own, in the same root, network and configuration; other hooks and Exec are lxc-attach,
// which begins in /.
package lxc

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/process"
	"github.com/kindos/kmo/backends/process/netns"
)

// Name is the backend's name.
const Name = "lxc"

// GuestArg as its first argument makes a process a container's monitor, or a command beside it.
const GuestArg = "lxc-guest"

// What keeping a container costs beside its program: the monitor, lxc-start, slirp4netns, and commands beside them. Measured: 5 MiB and 12
// threads, 4 MiB and 11 threads for each command at once; four times the memory in a binary with the race detector.
const (
	memoryShare = 64 << 20
	pidsShare   = 64
)

// Options are what a Backend needs. State is.
type Options struct {
	State   string                           // the state folder; made if there is none
	Tools   string                           // the folder of lxc-start and lxc-attach; "" looks in PATH
	Logger  *slog.Logger                     // nil is silent
	Backoff func(restarts int) time.Duration // as process.Options has it
}

// Backend is backends.Backend and backends.Execer.
type Backend struct {
	*process.Keeper
	tools string
	users users

	mu      sync.Mutex     // guards what follows
	version string         // of LXC; "" until it has been asked
	planned map[string]int // where the users of workloads begin that this process has planned
	taken   map[int]bool   // where those of everybody's containers did at takenAt
	takenAt time.Time
}

// Open goes on with what an earlier process left in the state folder. It does not need LXC to be there.
func Open(o Options) (*Backend, error) {
	b := &Backend{tools: o.Tools, planned: map[string]int{}}
	state, err := filepath.Abs(o.State)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(state, 0o700); err != nil {
		return nil, err
	}
	b.users = measure(state)
	b.Keeper, err = process.Open(process.Options{
		Backend: Name, State: state, Plan: b.plan, Gone: b.forget, Features: features, Usage: usage, Publishes: true, Logger: o.Logger, Backoff: o.Backoff,
	})
	if err != nil {
		return nil, errors.Join(err, b.users.close())
	}
	return b, nil
}

// Close ends this process's part. No container notices.
func (b *Backend) Close() error { return errors.Join(b.Keeper.Close(), b.users.close()) }

// features are those of the keeper, and a published port.
func features(have []backends.Feature) []backends.Feature { return append(have, backends.PortMap) }

// usage takes what keeping it costs from what a workload of inner's uses.
func usage(w backends.Workload, u backends.Usage) backends.Usage {
	const idle = 12
	if u.PIDs = max(u.PIDs-idle, 1); own(w) > 0 {
		u.PIDs = min(u.PIDs, own(w)) // more are those of a command's keeping
	}
	return u
}

// tool finds one of LXC's commands.
func (b *Backend) tool(name string) (string, error) {
	if b.tools != "" {
		name = filepath.Join(b.tools, name)
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", errors.New(filepath.Base(name) + " is not to be found: install LXC, which is the package lxc in Debian and others: " + err.Error())
	}
	return filepath.Abs(path)
}

// lxcVersion asks LXC once.
func (b *Backend) lxcVersion(ctx context.Context) (string, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	path, err := b.tool("lxc-start")
	if err != nil {
		b.version = ""
		return "", err
	}
	if b.version != "" {
		return b.version, nil
	}
	text, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return "", errors.Join(ctx.Err(), errors.New("asking "+path+" for its version: "+err.Error()))
	}
	b.version = strings.TrimSpace(string(text))
	return b.version, nil
}

// Fingerprint says what was measured when the backend was opened. It is an error when LXC is not installed.
func (b *Backend) Fingerprint(ctx context.Context) (backends.Fingerprint, error) {
	version, err := b.lxcVersion(ctx)
	if err != nil {
		return backends.Fingerprint{}, err
	}
	print := backends.Fingerprint{
		Backend: Name, Version: "lxc " + version, Platforms: []string{runtime.GOOS + "/" + runtime.GOARCH},
		Isolation: backends.IsolationContainer, Features: b.Features(), Missing: b.missing(),
	}
	if b.Mounts() && print.Has(backends.Overlays) {
		print.Formats = []backends.Format{backends.OCI, backends.LXC}
	}
	return print, nil
}

// missing is what the keeper lacks that counts here, and what LXC does.
func (b *Backend) missing() []string {
	list := slices.DeleteFunc(b.Missing(), func(line string) bool {
		return len(backends.Concerning([]string{line}, "landlock", "seccomp", "network", "low-ports", "process groups")) > 0
	})
	if b.users.lacks != "" {
		list = append(list, "users: "+b.users.lacks)
	}
	return append(append(list, b.lacks()...), looseness())
}

// looseness is by how much the bound of a container's memory is wider than its program's.
func looseness() string {
	return fmt.Sprintf("bounds: what keeping a container does not use of its %d MiB of memory, the program may", memoryShare>>20)
}

// lacks is what a container has not of its confinement, and of its network. It needs no keeper: plan is asked before there is one.
func (*Backend) lacks() (list []string) {
	for _, needed := range []string{seccompProfile, "/proc/sys/kernel/seccomp"} {
		if _, err := os.Stat(needed); err != nil {
			list = append(list, "seccomp: "+needed+" is not there")
		}
	}
	if _, err := exec.LookPath(netns.Slirp); err != nil {
		list = append(list, "network: none beyond published ports: "+netns.ErrNoWayOut.Error())
	}
	return append(list, "apparmor: none is applied")
}

// unapplied is what of that concerns a workload.
func (b *Backend) unapplied(w backends.Workload) []string {
	list := b.lacks()
	if slices.Contains(w.Security.Host, "network") {
		list = backends.Concerning(list, "seccomp", "apparmor")
	}
	if w.Resources.Memory > 0 {
		list = append(list, looseness())
	}
	return list
}

// Apply starts the workload's container.
func (b *Backend) Apply(ctx context.Context, w backends.Workload) error {
	return b.Keeper.Apply(ctx, inner(w))
}

// inner is the workload that the keeper is asked for: bounded so that it has what it asked for beside its monitor. It is what is recorded.
func inner(w backends.Workload) backends.Workload {
	if w.Resources.Memory > 0 {
		w.Resources.Memory += memoryShare
	}
	if w.Resources.PIDs > 0 {
		w.Resources.PIDs += pidsShare
	}
	return w
}

// plan is the monitor of a workload of inner's.
func (b *Backend) plan(_ context.Context, w backends.Workload, place process.Place) (p process.Program, err error) {
	start, err := b.tool("lxc-start")
	if err != nil {
		return p, err
	}
	if err := admit(w); err != nil {
		return p, err
	}
	first, unapplied := b.firstUser(w.Name), b.unapplied(w)
	if lacks := b.users.maps(w, place); lacks != "" {
		if system(w) {
			return p, &backends.FeatureError{Backend: Name, Feature: "system-container", Detail: "it needs users of its own: " + lacks}
		}
		first, unapplied = 0, append(unapplied, "users of its own: "+lacks, fmt.Sprintf("bounds: without those, what keeping it does not use of its %d threads, the program may", pidsShare))
	}
	at, err := placeText(place)
	if err != nil {
		return p, err
	}
	return process.Program{
		Monitor: true, Unapplied: unapplied,
		Argv: []string{GuestArg, runArg, strconv.Itoa(first), at},
		Env:  map[string]string{"PATH": filepath.Dir(start) + ":/usr/sbin:/usr/bin:/sbin:/bin"},
		Command: func(argv []string) []string {
			return append([]string{GuestArg, execArg, at}, argv...)
		},
	}, nil
}

// admit refuses what cannot be written down, or is not there.
func admit(w backends.Workload) error {
	fault := func(stage, cause string) error {
		return &backends.StartError{Workload: w.Name, Stage: stage, Cause: cause}
	}
	if w.Format != backends.LXC && w.Format != backends.OCI {
		return &backends.FeatureError{Backend: Name, Feature: backends.Feature(w.Format), Detail: "it runs the formats lxc and image only"}
	}
	if stat, err := os.Stat(w.Image.Content); w.Image.Content == "" || err != nil || !stat.IsDir() {
		return errors.New(w.Name + ": its content " + strconv.Quote(w.Image.Content) + " is no folder")
	}
	if len(w.Argv()) == 0 && !system(w) {
		return fault("exec", "neither the image nor the unit names a command")
	}
	for name, value := range w.Env() {
		if strings.ContainsAny(name+value, "\n\x00") || strings.TrimSpace(name) != name || strings.ContainsAny(name, "=\"'") {
			return fault("writing its configuration", "the variable "+strconv.Quote(name)+" has a line break in its value or a quote in its name; LXC has no words for that")
		}
	}
	if strings.ContainsAny(w.Run.Dir+w.Image.Config.Dir, "\n\x00") {
		return fault("writing its configuration", "its folder has a line break in its name")
	}
	return nil
}

// system says whether a workload is a system container: nothing names what is to be run, so its init is.
func system(w backends.Workload) bool { return w.Format == backends.LXC && len(w.Argv()) == 0 }

// firstUser is where the users of a workload begin on this host: above those of people and services, below 2³¹, at a place that depends on
// its name, or the next at which nobody else's do.
func (b *Backend) firstUser(name string) int {
	const first, span, count = 1 << 30, 1 << 17, 1 << 12
	b.mu.Lock()
	defer b.mu.Unlock()
	if at, ok := b.planned[name]; ok {
		return at
	}
	if time.Since(b.takenAt) > time.Second { // for that every process of this host is read
		b.taken, b.takenAt = mapped(), time.Now()
	}
	taken := maps.Clone(b.taken)
	for _, at := range b.planned {
		taken[at] = true
	}
	hash := fnv.New32a()
	_, _ = io.WriteString(hash, name)
	slot := hash.Sum32()
	for taken[first+int(slot%count)*span] && len(taken) < count {
		slot++
	}
	b.planned[name] = first + int(slot%count)*span
	return b.planned[name]
}

// forget lets the users of a workload be another's.
func (b *Backend) forget(name string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.planned, name)
}
