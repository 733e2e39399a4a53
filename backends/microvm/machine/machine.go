// Package machine makes virtual machines by two programs: QEMU, and Firecracker by its API. Both boot the same kernel, first file system
// and disk, and both end with the process that made them.
package machine

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// VMM is one virtual machine, and the program that makes it. Its methods are called one after another, but Stop, which may come at any time.
type VMM interface {
	// Create starts the program and makes the machine, whose processor stands still.
	Create(context.Context, Config) error
	// Start lets the processor run.
	Start(context.Context) error
	// Connect returns the stream to the guest, which ends with the machine. It may wait until the guest has called.
	Connect(context.Context) (io.ReadWriteCloser, error)
	// State asks the program.
	State(context.Context) (State, error)
	// Stop ends the machine at once, and the program. It returns what the program said, if it said anything.
	Stop() string
}

// State is what a machine is doing.
type State string

// The states.
const (
	Created State = "created" // its processor has not run yet
	Running State = "running"
	Stopped State = "stopped"
)

// Config is a machine.
type Config struct {
	Dir      string // for sockets and what the program says; the working folder of this process, as a socket's path may be no longer than 107 bytes
	Kernel   string
	Initrd   string
	Command  string // what the kernel is told, beside what the program's machine needs
	CPUs     int
	Memory   int64  // MiB
	Disk     string // read-only; the guest's /dev/vda
	Forwards []Forward
	// Shares is a folder whose subfolders the guest sees, by virtiofs with the tag "kmo"; "" is none.
	Shares string
}

// Forward publishes a TCP port of the guest's.
type Forward struct {
	Address     string // of this host; "" is every one
	Host, Guest int
}

// Accelerated says whether this host's KVM can run a guest's kernel. That /dev/kvm is there and makes machines says nothing: a kernel without
// hardware virtualization may have it, too, and then emulates a guest for hours.
func Accelerated() bool {
	text, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return false
	}
	hardware := false
	for line := range strings.Lines(string(text)) {
		name, flags, _ := strings.Cut(line, ":")
		for _, flag := range strings.Fields(flags) {
			hardware = hardware || strings.TrimSpace(name) == "flags" && (flag == "vmx" || flag == "svm")
		}
	}
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return false
	}
	_ = f.Close()
	return hardware || !strings.Contains(string(text), "vendor_id") // other architectures have no such flag
}

// tail is the end of what a program wrote to a file.
func tail(path string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	const most = 2000
	return strings.TrimSpace(string(text[max(0, len(text)-most):]))
}

// inFolder is a file of a machine's own.
func (c Config) inFolder(name string) string { return filepath.Join(c.Dir, name) }
