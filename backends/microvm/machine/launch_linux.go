package machine

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends/process/stage"
)

// Group is the group that every VMM with a user of its own has, and nobody else: what they boot from is readable to it. It is above those of
// people and services, and below 2³¹.
const Group = 3 << 29

// kvm is the device of machines whose processor is not emulated.
const kvm = "/dev/kvm"

// begin starts a VMM in its machine's network, as its user, with no capability and no way to gain one.
func begin(cmd *exec.Cmd, c Config, accelerated bool) (err error) {
	stage.OnThread(func() {
		if c.Network != "" {
			err = join(c.Network)
		}
		if err == nil && c.User != 0 {
			device := ""
			if accelerated {
				device = kvm
			}
			err = reduce(cmd, c, device)
		}
		if err == nil {
			err = cmd.Start()
		}
	})
	return err
}

// join makes a network this thread's.
func join(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		defer unix.Close(fd)
		err = unix.Setns(fd, unix.CLONE_NEWNET)
	}
	if err != nil {
		return fmt.Errorf("entering the machine's network: %v", err)
	}
	return nil
}

// reduce takes from what this thread starts all that a VMM does not need, and gives it a device, if any.
func reduce(cmd *exec.Cmd, c Config, device string) error {
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return err
	}
	if device != "" {
		if err := lend(device, c.Dir, c.User); err != nil {
			return fmt.Errorf("giving the VMM %s: %v", device, err)
		}
	}
	if _, err := os.Stat(cmd.Path); err != nil {
		return err // which its user might not be told
	}
	if err := unix.Chdir(cmd.Dir); err != nil { // by us: its user may not get there
		return fmt.Errorf("entering %s: %v", cmd.Dir, err)
	}
	cmd.Dir = ""
	for capability := uintptr(0); ; capability++ {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, capability, 0, 0, 0); errors.Is(err, unix.EINVAL) {
			break // past the last one the kernel knows
		} else if err != nil {
			return fmt.Errorf("dropping capability %d: %v", capability, err)
		}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %v", err)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(c.User), Gid: Group}}
	return nil
}

// lend replaces a device by one that is the user's alone, for this thread: no group of the host's is needed, whoever has the device there.
func lend(device, dir string, user int) error {
	var found unix.Stat_t
	err := unix.Stat(device, &found)
	if errors.Is(err, unix.ENOENT) {
		return nil // the VMM says it better
	}
	if err == nil {
		err = unix.Unshare(unix.CLONE_NEWNS)
	}
	if err == nil {
		err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	}
	if err == nil {
		err = unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "mode=0700,size=64k")
	}
	if err != nil {
		return err
	}
	node := filepath.Join(dir, "device")
	if err = unix.Mknod(node, unix.S_IFCHR|0o600, int(found.Rdev)); err == nil {
		err = unix.Chown(node, user, Group)
	}
	if err == nil {
		err = unix.Mount(node, device, "", unix.MS_BIND, "")
	}
	return errors.Join(err, unix.Unmount(dir, unix.MNT_DETACH))
}

// Separates says whether VMMs can have a user of their own: the user namespace that this process is in must know it.
func Separates(user int) bool {
	for _, file := range []string{"uid_map", "gid_map"} {
		text, err := os.ReadFile("/proc/self/" + file)
		known := false
		for line := range strings.Lines(string(text)) {
			var inside, outside, count int
			if n, _ := fmt.Sscan(line, &inside, &outside, &count); n == 3 {
				known = known || user >= inside && user < inside+count && Group >= inside && Group < inside+count
			}
		}
		if err != nil || !known {
			return false
		}
	}
	return true
}
