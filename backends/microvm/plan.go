package microvm

import (
	"cmp"
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/microvm/boot"
	"github.com/kindos/kmo/backends/microvm/machine"
	"github.com/kindos/kmo/backends/process"
)

// built holds the guest, if this binary was built with one.
//
//go:embed built
var built embed.FS

const architecture = runtime.GOARCH

// tools are what machines are made with on this host.
type tools struct {
	options     Options
	vmm         string // "" where there is none
	firecracker bool   // that it is that
	sharer      string // virtiofsd; "" where there is none
	kvm         bool
}

// find looks for programs, some of which distributions do not put where commands are.
func find(o Options) tools {
	t := tools{options: o, kvm: machine.Accelerated(), vmm: o.VMM}
	emulator := "qemu-system-" + map[string]string{"amd64": "x86_64"}[architecture]
	if t.vmm == "" {
		t.vmm = look(emulator)
	}
	if t.vmm == "" && t.kvm {
		t.vmm = look("firecracker")
	}
	t.firecracker = strings.Contains(filepath.Base(t.vmm), "firecracker")
	if !t.firecracker {
		t.sharer = cmp.Or(look("virtiofsd"), look("/usr/libexec/virtiofsd"), look("/usr/lib/qemu/virtiofsd"))
	}
	return t
}

func look(name string) string {
	path, err := exec.LookPath(name)
	if err != nil {
		return ""
	}
	return path
}

// check says what is to be installed.
func (t tools) check() error {
	switch {
	case architecture != "amd64":
		return fmt.Errorf("no machine is known here for linux/%s", architecture)
	case t.vmm == "":
		return errors.New("neither qemu-system-x86_64 nor, with KVM, firecracker is installed (Debian: qemu-system-x86)")
	case t.firecracker && !t.kvm:
		return fmt.Errorf("%s needs KVM, which this host has not", t.vmm)
	case look(boot.Tool) == "":
		return fmt.Errorf("%s is not installed; it makes the disk of an image (Debian: e2fsprogs)", boot.Tool)
	}
	return nil
}

// kernel is what machines boot.
func (t tools) kernel() (boot.Kernel, error) {
	root := cmp.Or(t.options.Kernel, "/")
	found, err := os.Stat(root)
	if err == nil && !found.IsDir() {
		return boot.Named(root)
	}
	if err != nil {
		return boot.Kernel{}, err
	}
	return boot.Find(filepath.Join(root, "boot"), filepath.Join(root, "lib/modules"))
}

// guest is the program that is process 1 in a machine.
func (t tools) guest() ([]byte, error) {
	if t.options.Guest != "" {
		return os.ReadFile(t.options.Guest)
	}
	text, err := built.ReadFile("built/guest-" + architecture)
	if err != nil {
		return nil, errors.New("this kmo was built without the guest of its machines; build it by make build, or go install github.com/kindos/kmo/backends/microvm/guest and name that to this backend")
	}
	return text, nil
}

// version is that of the VMM and of the kernel, or an error that says what to install.
func (t tools) version(ctx context.Context) (string, error) {
	k, err := t.kernel()
	if err = errors.Join(t.check(), err); err != nil {
		return "", err
	}
	if _, err := t.guest(); err != nil {
		return "", err
	}
	said, err := exec.CommandContext(ctx, t.vmm, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("%s --version: %v", t.vmm, err)
	}
	first, _, _ := strings.Cut(string(said), "\n")
	how := "KVM"
	if !t.kvm {
		how = "emulated"
	}
	return fmt.Sprintf("%s, %s, kernel %s", strings.TrimSpace(first), how, strings.TrimPrefix(filepath.Base(k.Image), "vmlinuz-")), nil
}

// modules are what the guest needs of its kernel.
func (t tools) modules() []string {
	if t.firecracker {
		return []string{"virtio_mmio", "virtio_blk", "vmw_vsock_virtio_transport", "overlay"}
	}
	return []string{"virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "overlay", "virtiofs"}
}

// inner is the workload that the keeper is asked for: with bounds for the machine as well. It is what is recorded.
func (t tools) inner(w backends.Workload) backends.Workload {
	if !t.kvm { // starved, an emulated processor loses the ticks of its clock, and takes minutes to boot
		w.Resources.CPUMin = max(w.Resources.CPUMin, cmp.Or(w.Resources.CPU, 1000))
	}
	if w.Resources.Memory > 0 {
		w.Resources.Memory += guestCost + hostCost
	}
	if w.Resources.PIDs > 0 {
		w.Resources.PIDs += hostPIDs
	}
	return w
}

// inside are the bounds of an inner workload's program.
func inside(w backends.Workload) backends.Resources {
	r := backends.Resources{Memory: w.Resources.Memory, PIDs: w.Resources.PIDs}
	if r.Memory > 0 {
		r.Memory -= guestCost + hostCost
	}
	if r.PIDs > 0 {
		r.PIDs -= hostPIDs
	}
	return r
}

// orders are what a monitor is told beside its place.
type orders struct {
	Boot        boot.Artifacts `json:"boot"`
	Base        string         `json:"base,omitempty"` // the disk; "" is to be made
	VMM         string         `json:"vmm"`
	Firecracker bool           `json:"firecracker,omitempty"`
	Sharer      string         `json:"sharer,omitempty"`
	KVM         bool           `json:"kvm,omitempty"`
	User        int            `json:"user,omitempty"` // of the VMM; 0 is the monitor's
}

// vmmUser is the user of the VMM that a workload's machine is made by, by the workload's name. It is not the workload's own.
func vmmUser(w backends.Workload) int {
	const first, count = machine.Group + 1, 1 << 24
	hash := fnv.New32a()
	_, _ = io.WriteString(hash, w.Name)
	user := first + int(hash.Sum32()%count)
	if !machine.Separates(user) {
		return 0
	}
	if user == w.Run.User {
		user++
	}
	return user
}

// plan is what package process runs for a workload of inner's, with its ports resolved.
func (b *Backend) plan(ctx context.Context, w backends.Workload, place process.Place) (p process.Program, err error) {
	if found, err := os.Stat(w.Image.Content); err != nil || !found.IsDir() {
		return p, fmt.Errorf("%s: its image's content is not at %q: %v; want a folder", w.Name, w.Image.Content, err)
	}
	if len(w.Argv()) == 0 {
		return p, &backends.StartError{Workload: w.Name, Stage: "exec", Cause: "neither the image nor the unit names a command"}
	}
	t := find(b.options)
	k, err := t.kernel()
	if err = errors.Join(t.check(), err); err != nil {
		return p, err
	}
	guest, err := t.guest()
	if err != nil {
		return p, err
	}
	o := orders{VMM: t.vmm, Firecracker: t.firecracker, Sharer: t.sharer, KVM: t.kvm, User: vmmUser(w)}
	if o.Boot, err = b.cache.Boot(ctx, k, guest, t.modules()); err != nil {
		return p, err
	}
	if !w.Image.ContentRoot.IsZero() {
		if o.Base, err = b.cache.Base(ctx, w.Image.Content, w.Image.ContentRoot.Hex()); err != nil {
			return p, err
		}
	}
	what, err := json.Marshal(o)
	if err != nil {
		return p, err
	}
	where, err := json.Marshal(place)
	return process.Program{
		Monitor: true, WritesLog: true, Argv: []string{MonitorArg, runArg, string(what), string(where)},
		Env:     map[string]string{"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
		Command: func(argv []string) []string { return append([]string{MonitorArg, commandArg, string(where)}, argv...) },
	}, err
}

// What a monitor's first argument says.
const runArg, commandArg = "run", "command"

// usageFile is where a monitor says what its program uses.
const usageFile = "usage.json"

func usage(dir string) (u backends.Usage) {
	text, err := os.ReadFile(filepath.Join(dir, usageFile))
	if err != nil || json.Unmarshal(text, &u) != nil {
		return backends.Usage{}
	}
	return u
}
