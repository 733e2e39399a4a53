// Package microvm runs OCI images in virtual machines of their own, with a kernel of their own: by QEMU, or by Firecracker.
//
// # What a workload gets
//
// One machine, which package process keeps as it keeps a program: a monitor, this binary again, starts the machine, and what both started
// ends with it. The machine boots the host's kernel, or one that Options name, with a first file system that holds the guest and nothing
// else of a workload; package boot makes that. The guest (folder guest) builds the workload's root by package stage, exactly as the backend
// native builds it on the host: the image, read-only, from a disk made of Content, which is cached and not looked at again; above it a
// bounded tmpfs, if there is an overlay; files and secrets, which come over the channel (package channel) and lie in the machine's memory
// alone. The program has no capability, can gain none, is held by seccomp and landlock, and is process 1 of a pid namespace.
//
// Kept paths and mounts are folders of this host, seen by virtiofs: the same to every copy of a unit, old and new. A lock that a program
// takes there holds in its own machine only. Firecracker has no such thing, and so neither keep nor mounts.
//
// The network is QEMU's own, of one machine, and QEMU is in a network of its own, too (package netns): the machine has 10.0.3.15, and
// reaches what this host reaches by slirp4netns, if that is installed, but nothing that listens on this host's loopback. 10.0.2.3 asks this
// host's resolver. Ports are published by the monitor and QEMU, which accept a connection before the program listens: that is the gate's
// business. A machine of Firecracker's has ports, by its vsock, and no way out.
//
// QEMU, or Firecracker, has a user of its own on this host, no capability and no way to gain one, and reads what it boots from by
// descriptors. virtiofsd stays root, as it makes files for every user, in namespaces of its own.
//
// # Bounds
//
// Resources.Memory and Resources.PIDs bound the program and its hooks in the machine, by the guest's kernel, which tells an end for want of
// memory from others. The machine has guestCost more, and the cgroup of this host has hostCost and hostPIDs beside that, for QEMU,
// virtiofsd, slirp4netns and the monitor. Resources.CPU bounds all of it on the host, from the first instruction of the boot on; where the
// processor is emulated it is the weight among others, too, if CPUMin is less. Usage is the program's own memory and processes, and
// everybody's processor time.
//
// The monitor writes the log, and no more of it than package process lets a program write while no agent trims it.
//
// # State
//
//	machines/      package process's
//	cache/boot-…   kernels and first file systems
//	cache/base-…   disks of images, by their content root
//
// A command's main must, before anything else, and the same for process.StageArg:
//
//	if len(os.Args) > 1 && os.Args[1] == microvm.MonitorArg {
//		os.Exit(microvm.Monitor(os.Args[2:]))
//	}
package microvm

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"slices"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/microvm/boot"
	"github.com/kindos/kmo/backends/microvm/machine"
	"github.com/kindos/kmo/backends/process"
	"github.com/kindos/kmo/backends/process/netns"
)

// Name is the backend's name.
const Name = "microvm"

// MonitorArg as its first argument makes a process the monitor of a machine, or a command beside one.
const MonitorArg = "microvm-monitor"

// What a machine costs beside its workload.
const (
	guestCost = 96 << 20  // bytes: kernel, first file system, guest; measured 72 MiB
	hostCost  = 192 << 20 // bytes: QEMU with 64 MiB of translated code, virtiofsd, slirp4netns, monitor; measured 90 MiB
	hostPIDs  = 128       // threads of QEMU, virtiofsd, slirp4netns, monitor and commands; measured 12
	unbounded = 512 << 20 // bytes of a machine whose workload has no bound
)

// Options are what a Backend needs. State is.
type Options struct {
	State string // the state folder; made if there is none
	// Kernel is a folder in which boot/vmlinuz-* are with their lib/modules, of which the newest is booted, or a kernel that needs no
	// modules; "" is this host's own.
	Kernel  string
	Guest   string                           // the guest, a static program; "" is the one in this binary
	VMM     string                           // path of qemu-system-<arch> or firecracker, which every user may execute; "" is the first of them in PATH
	Memory  string                           // as process.Options has it
	Logger  *slog.Logger                     // nil is silent
	Backoff func(restarts int) time.Duration // as process.Options has it
}

// Backend is backends.Backend and backends.Execer.
type Backend struct {
	*process.Keeper
	options Options
	cache   *boot.Cache
}

// Open makes or finds the state and takes over the machines that run. It needs Linux. What it boots and by what is looked for at each use.
func Open(o Options) (*Backend, error) {
	state, err := filepath.Abs(o.State)
	if err != nil {
		return nil, err
	}
	o.State = state
	b := &Backend{options: o}
	if b.cache, err = boot.Open(filepath.Join(state, "cache")); err != nil {
		return nil, err
	}
	b.Keeper, err = process.Open(process.Options{
		Backend: Name, State: filepath.Join(state, "machines"), Plan: b.plan, Features: b.features, Publishes: true,
		Logger: o.Logger, Backoff: o.Backoff, Memory: o.Memory,
	})
	if err != nil {
		return nil, err
	}
	return b, nil
}

// features adds what the guest's kernel does, and leaves out what does not reach into a machine.
func (b *Backend) features(have []backends.Feature) []backends.Feature {
	lacks := []backends.Feature{backends.HostNetwork, backends.MemoryPool, backends.Sockets, backends.Devices}
	if find(b.options).sharer == "" {
		lacks = append(lacks, backends.Keep, backends.Mounts)
	}
	have = slices.DeleteFunc(have, func(f backends.Feature) bool { return slices.Contains(lacks, f) })
	return append(have, backends.PortMap, backends.LowPorts, backends.Overlays, backends.OverlayRoot, backends.LimitDisk)
}

// Fingerprint says what this host can boot. It returns an error that says what to install where it can boot nothing.
func (b *Backend) Fingerprint(ctx context.Context) (backends.Fingerprint, error) {
	if !b.Mounts() {
		return backends.Fingerprint{}, errors.New("micro-VMs need root with the right to mount")
	}
	version, err := find(b.options).version(ctx)
	if err != nil {
		return backends.Fingerprint{}, err
	}
	return backends.Fingerprint{
		Backend: Name, Version: version, Formats: []backends.Format{backends.OCI}, Platforms: []string{"linux/" + architecture},
		Isolation: backends.IsolationMachine, Features: b.Features(), Missing: b.missing(),
	}, nil
}

// missing is what the keeper lacks where that counts for a machine, and what a machine lacks.
func (b *Backend) missing() []string {
	list := slices.DeleteFunc(b.Missing(), func(line string) bool {
		return len(backends.Concerning([]string{line}, "landlock", "seccomp", "network", "low-ports", "process groups", "overlay")) > 0
	})
	t := find(b.options)
	has := func(f backends.Feature) bool { return slices.Contains(b.Features(), f) }
	for _, one := range []struct {
		lacks bool
		words string
	}{
		{!t.kvm, "kvm: this host's processor does not run a guest's kernel; it is emulated, and ten times slower"},
		{!has(backends.Keep), "keep: a kept path is a folder that several copies of a unit see, for which QEMU and virtiofsd are needed"},
		{!has(backends.Mounts), "mounts: for a folder of this host QEMU and virtiofsd are needed"},
		{!machine.Separates(machine.Group + 1), "vmm-user: the user namespace that kmo is in has no user for a machine's program, which is kmo's then"},
		{!t.firecracker && look(netns.Slirp) == "", "network: none beyond published ports: " + netns.ErrNoWayOut.Error()},
		{t.firecracker, "network: none beyond published ports, by Firecracker"},
		{true, "content: the cached disk of an image is not looked at again while it is used"},
		{true, "memory-pool: a machine's memory is its own"},
		{true, "sockets: a unix socket does not reach out of a machine"},
		{true, "devices: no device of this host is given to a machine"},
		{true, "host-network: a machine has a network of its own"},
		{true, "host-namespace: a machine has a kernel of its own"},
		{true, "privileged: a machine has nothing of the host to give"},
	} {
		if one.lacks {
			list = append(list, one.words)
		}
	}
	return list
}

// Observe lists the workloads, with what they use inside.
func (b *Backend) Observe(ctx context.Context) ([]backends.Status, error) {
	list, err := b.Keeper.Observe(ctx)
	for i := range list {
		inside := usage(filepath.Join(b.options.State, "machines", "work", list[i].Name, "own"))
		if list[i].PID != 0 {
			list[i].Usage.Memory, list[i].Usage.PIDs = inside.Memory, inside.PIDs
		}
	}
	return list, err
}

// Apply starts a machine for the workload.
func (b *Backend) Apply(ctx context.Context, w backends.Workload) error {
	if w.Format != backends.OCI {
		return &backends.FeatureError{Backend: Name, Feature: backends.Feature(w.Format), Detail: "it runs the format image only"}
	}
	return b.Keeper.Apply(ctx, find(b.options).inner(w))
}
