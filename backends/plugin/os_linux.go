package plugin

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// own puts a command into a process group of its own, which dies with the thread that starts it.
func own(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}

// reap waits until the child has ended, kills what is left of its group, and only then gives its number back to the system.
func reap(p *process) error {
	for {
		var found unix.Siginfo
		if err := unix.Waitid(unix.P_PID, p.cmd.Process.Pid, &found, unix.WEXITED|unix.WNOWAIT, nil); err != unix.EINTR {
			break
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	killGroup(p.cmd.Process)
	p.reaped = true
	return p.cmd.Wait()
}

// killGroup kills the group of a child that is not reaped yet.
func killGroup(p *os.Process) {
	unix.Kill(-p.Pid, unix.SIGKILL) //nolint:errcheck // the group may be empty but for the child
}

// resident is how many bytes of memory a process uses, 0 if there is none. It is only looked at, so a stale number does no harm but a late kill.
func resident(p *os.Process) int64 {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(p.Pid) + "/statm")
	if err != nil {
		return 0
	}
	var size, pages int64
	if _, err := fmt.Sscan(string(text), &size, &pages); err != nil {
		return 0
	}
	return pages * int64(os.Getpagesize())
}

// checkPeer makes sure that the other end of a connection listens in process pid, under our own uid.
func checkPeer(conn *net.UnixConn, pid int) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var peer *unix.Ucred
	var asked error
	if err := raw.Control(func(fd uintptr) {
		peer, asked = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return err
	}
	if asked != nil {
		return asked
	}
	if int(peer.Pid) != pid || int(peer.Uid) != os.Geteuid() {
		return fmt.Errorf("plugin socket: process %d of uid %d listens there, want %d of uid %d", peer.Pid, peer.Uid, pid, os.Geteuid())
	}
	return nil
}

// runFile has a command run an open file: what was checked is what runs, whatever has come to its path since. The command has it as
// descriptor 3, where the interpreter of a script finds it.
func runFile(cmd *exec.Cmd, f *os.File) {
	cmd.Path, cmd.ExtraFiles = "/proc/self/fd/3", []*os.File{f}
}

// pathOf names an open file to this process.
func pathOf(f *os.File) string { return "/proc/self/fd/" + strconv.Itoa(int(f.Fd())) }
