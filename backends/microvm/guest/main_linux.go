// Guest is process 1 of a micro-VM: it loads the kernel's modules, builds what its monitor says, by package stage, as it would be built
// on the host, runs the workload in it, and tells the monitor what comes of it. Package channel is what the two say.
//
// It is a program of its own, of 3 MB, because a machine carries it in its memory. It has no arguments; called as a stage it is one.
package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends/microvm/channel"
	"github.com/kindos/kmo/backends/process/stage"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == stage.Arg {
		stage.Main()
	}
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "this is process 1 of a micro-VM, and of no use elsewhere")
		os.Exit(2)
	}
	fmt.Println("kmo:", run()) // on the console
	powerOff()
}

func powerOff() {
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	select {}
}

// run returns when there is no more to be done, and why.
func run() error {
	if err := load("/modules"); err != nil {
		return err
	}
	if err := settle(); err != nil {
		return err
	}
	stream, err := connect()
	if err != nil {
		return fmt.Errorf("connecting to the monitor: %v", err)
	}
	g := &guest{conn: channel.Open(stream, channel.MaxToGuest), running: map[uint32]*child{}}
	return g.serve()
}

// load loads the modules of a folder in the order of their names, and gives their memory back.
func load(dir string) error {
	list, err := filepath.Glob(filepath.Join(dir, "*.ko"))
	if err != nil {
		return err
	}
	slices.Sort(list)
	for _, file := range list {
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		if err = errors.Join(ignore(err, unix.EEXIST), f.Close(), os.Remove(file)); err != nil {
			return fmt.Errorf("loading %s: %v", filepath.Base(file), err)
		}
	}
	return nil
}

func ignore(err, this error) error {
	if errors.Is(err, this) {
		return nil
	}
	return err
}

// settle leaves the file system that the kernel unpacked, which no process can leave by pivot_root, for another.
func settle() error {
	const root = "/root"
	if err := os.MkdirAll(root, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", root, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755,size=1m"); err != nil {
		return fmt.Errorf("mounting the root: %v", err)
	}
	const strict = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	for _, m := range []struct {
		at, kind string
		flags    uintptr
	}{
		{"/proc", "proc", strict}, {"/sys", "sysfs", strict}, {"/dev", "devtmpfs", unix.MS_NOSUID}, {"/sys/fs/cgroup", "cgroup2", strict},
		{channel.Base, "", 0}, {channel.Shares, "", 0}, {channel.Scratch, "", 0},
	} {
		if err := os.MkdirAll(root+m.at, 0o700); err != nil {
			return err
		}
		if m.kind == "" {
			continue
		}
		if err := unix.Mount(m.kind, root+m.at, m.kind, m.flags, ""); err != nil {
			return fmt.Errorf("mounting %s: %v", m.at, err)
		}
	}
	if err := os.Chdir(root); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("moving the root: %v", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("entering the root: %v", err)
	}
	return os.Chdir("/")
}

// connect opens the port that QEMU gives the machine, or else calls the host by vsock, as Firecracker has it.
func connect() (*os.File, error) {
	for range 100 {
		if ports, err := filepath.Glob("/sys/class/virtio-ports/*"); err == nil {
			for _, port := range ports {
				name, err := os.ReadFile(filepath.Join(port, "name"))
				if err != nil || strings.TrimSpace(string(name)) != channel.Port {
					continue
				}
				fd, err := unix.Open("/dev/"+filepath.Base(port), unix.O_RDWR|unix.O_CLOEXEC, 0)
				if err == nil {
					return os.NewFile(uintptr(fd), "channel"), nil
				}
			}
		}
		if stream, err := call(); err == nil {
			return stream, publish()
		}
		time.Sleep(20 * time.Millisecond) // a device appears when its driver has looked at it
	}
	return nil, errors.New("there is no virtio-serial port " + channel.Port + ", and nobody answers by vsock")
}
