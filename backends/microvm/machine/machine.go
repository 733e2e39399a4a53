// Package machine makes virtual machines by two programs: QEMU, and Firecracker by its API. Both boot the same kernel, first file system
// and disk, and both end with the process that made them.
package machine

import (
	"context"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"
)

// VMM is one virtual machine, and the program that makes it. Its methods are called one after another, but Stop, which may come at any time.
type VMM interface {
	// Create starts the program and makes the machine, whose processor stands still.
	Create(context.Context, Config) error
	// Start lets the processor run.
	Start(context.Context) error
	// Connect returns the stream to the guest, which ends with the machine. It may wait until the guest has called.
	Connect(context.Context) (io.ReadWriteCloser, error)
	// Stop ends the machine at once, and the program. It returns the last that the program and the guest's kernel said.
	Stop() string
}

// Config is a machine.
type Config struct {
	Dir      string // for sockets; the working folder of this process, as a socket's path may be no longer than 107 bytes
	Kernel   string // this and what follows lie in folders that nobody else may enter
	Initrd   string
	Command  string // what the kernel is told, beside what the program's machine needs
	CPUs     int
	Memory   int64  // MiB
	Disk     string // read-only; the guest's /dev/vda
	Forwards []Forward
	// Shares is a folder whose subfolders the guest sees, by virtiofs with the tag "kmo"; "" is none.
	Shares string
	// Network is the path of the network namespace that the program is to be in, whose loopback it lets its guest reach; "" is this one.
	Network string
	// User is the program's own: of what is not everybody's it has what is named here and nothing else; 0 leaves it this process's.
	User int
}

// Forward publishes a TCP port of the guest's.
type Forward struct {
	Address     string // of the program's network for QEMU, of this host for Firecracker; "" is every one
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

// words are the last that programs and the guest's kernel said: no more is kept of them, and none on a disk.
type words struct {
	mu   sync.Mutex
	text []byte
}

const wordsKept = 2000

// Write keeps the end of what there is.
func (w *words) Write(text []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.text = append(w.text, text...)
	w.text = append([]byte{}, w.text[max(0, len(w.text)-wordsKept):]...)
	return len(text), nil
}

// String is what there is.
func (w *words) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.TrimSpace(string(w.text))
}

// command is a program in a folder whose words are kept.
func command(dir, program string, args []string, files []*os.File, said *words, environment ...string) *exec.Cmd {
	cmd := exec.Command(program, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = dir, said, said, files
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH")}, environment...)
	cmd.WaitDelay = time.Second // for what it has left behind
	return cmd
}
