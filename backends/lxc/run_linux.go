package lxc

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/process/stage"
)

// run is one run of lxc-start, in the foreground.
type run struct {
	dir, name string
	lxc       *exec.Cmd
	ended     chan struct{} // closed when lxc-start has ended, and is reaped
	pid       int           // of the container's first process; 0 until it is seen
	init      int           // a pidfd of that
	last      int           // the exit code, if the container ended before it was seen to begin
	over      bool          // it did
}

// fault is why a program could not be executed.
type fault string

// Error is the reason.
func (f fault) Error() string { return string(f) }

// start runs a program in a container by the configuration in dir.
func start(dir, name string, argv []string) (*run, error) {
	path, err := exec.LookPath("lxc-start")
	if err != nil {
		return nil, err
	}
	r := &run{dir: dir, name: name, ended: make(chan struct{}), init: -1}
	args := append([]string{"-F", "-P", lxcPath(dir), "-n", name, "-f", filepath.Join(dir, configFile), "-o", r.logFile(), "-l", "INFO", "--"}, argv...)
	r.lxc = exec.Command(path, args...)
	// Without newuidmap in its PATH it writes the mappings itself, as root may; with it, it would ask /etc/subuid.
	r.lxc.Env, r.lxc.Dir = []string{"PATH=/nowhere"}, "/"
	r.lxc.Stdout, r.lxc.Stderr = os.Stdout, os.Stderr
	if err := errors.Join(os.MkdirAll(lxcPath(dir), 0o755), r.lxc.Start()); err != nil {
		return nil, err
	}
	go func() {
		_ = r.lxc.Wait() // how is in ProcessState
		close(r.ended)
	}()
	return r, nil
}

// lxcPath is where LXC has containers of a workload: a place that their root may see, and a name by which none else on this host has its
// command socket.
func lxcPath(dir string) string {
	return fmt.Sprintf("%s/%x", runDir, sha256.Sum256([]byte(dir)))[:len(runDir)+17]
}

func (r *run) logFile() string { return filepath.Join(r.dir, r.name+".log") }

// log is what LXC wrote, as far as it is to be had.
func (r *run) log() string {
	text, err := os.ReadFile(r.logFile())
	if err != nil {
		return ""
	}
	return string(text)
}

// begun waits until the program is executed. It returns a fault if it cannot be.
func (r *run) begun() error {
	for begun := time.Now(); ; {
		if r.pid == 0 {
			r.find()
		}
		if r.pid != 0 && r.executed() {
			return nil
		}
		select {
		case <-r.ended:
			return r.early()
		case <-patience(begun):
		}
	}
}

// patience is a pause before LXC is looked at again: the longer that takes the longer, as others want the processor then.
func patience(begun time.Time) <-chan time.Time {
	return time.After(max(time.Millisecond, time.Since(begun)/20))
}

// early judges a container that ended before it was seen to begin.
func (r *run) early() error {
	log := r.log()
	if _, reason, found := strings.Cut(log, "ailed to exec \""); found {
		before, _, _ := strings.Cut(log, " - Failed to exec")
		if i := strings.LastIndex(before, " - "); i >= 0 && strings.Contains(log, " - Failed to exec") {
			return fault(before[i+3:])
		}
		return fault("LXC could not execute \"" + strings.SplitN(reason, "\n", 2)[0])
	}
	_, after, started := strings.Cut(log, " - Started \"")
	if !r.lxc.ProcessState.Success() || !started {
		return fmt.Errorf("lxc-start ended with %v: %s", r.lxc.ProcessState, faults(log))
	}
	if _, text, found := strings.Cut(after, "with pid \""); found && r.pid == 0 {
		_, _ = fmt.Sscanf(text, "%d", &r.pid)
	}
	r.over = true
	r.last, _ = ended(log, r.pid)
	return nil
}

// find looks for the container's first process: a child of lxc-start that is process 1 of a namespace below ours.
func (r *run) find() {
	if r.pid = firstOf(r.lxc.Process.Pid); r.pid == 0 {
		return
	}
	fd, err := unix.PidfdOpen(r.pid, 0)
	if err != nil || firstOf(r.lxc.Process.Pid) != r.pid {
		if err == nil {
			_ = unix.Close(fd)
		}
		r.pid = 0
		return
	}
	r.init = fd
}

// executed says whether the container's first process is no longer LXC.
func (r *run) executed() bool {
	var lxc, now unix.Stat_t
	if unix.Stat(proc(r.lxc.Process.Pid, "exe"), &lxc) != nil || unix.Stat(proc(r.pid, "exe"), &now) != nil {
		return false
	}
	return lxc.Dev != now.Dev || lxc.Ino != now.Ino
}

// wait returns the exit code when the program has ended. LXC writes it down if it is not 0, before it does anything else: an init that
// restarts its machine is not waited for.
func (r *run) wait() int {
	if r.over {
		return r.last
	}
	over := make(chan struct{})
	go func() {
		for {
			if n, err := unix.Poll([]unix.PollFd{{Fd: int32(r.init), Events: unix.POLLIN}}, -1); n > 0 || err != nil && !errors.Is(err, unix.EINTR) {
				close(over)
				return
			}
		}
	}()
	select {
	case <-over:
	case <-r.ended:
	}
	for begun := time.Now(); ; {
		if code, ok := ended(r.log(), r.pid); ok {
			return code
		}
		select {
		case <-r.ended:
			if code, ok := ended(r.log(), r.pid); ok {
				return code
			}
			if r.lxc.ProcessState.Success() {
				return 0
			}
			return 128 + int(unix.SIGKILL) // somebody ended lxc-start, and the program with it
		case <-patience(begun):
		}
		if time.Since(begun) > 5*time.Second {
			return 128 + int(unix.SIGKILL)
		}
	}
}

// halt tells the program to stop, or ends it if it would not hear that.
func (r *run) halt(name string) {
	s := unix.SignalNum(name)
	if !stage.Catches(r.pid, s) {
		s = unix.SIGKILL
	}
	_ = unix.PidfdSendSignal(r.init, s, nil, 0) // it may have ended
}

// kill ends the container.
func (r *run) kill() {
	if pid := firstOf(r.lxc.Process.Pid); pid != 0 {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	_ = r.lxc.Process.Kill() // the rest dies with it
}

// attach runs a command in the container.
func attach(ctx context.Context, dir string, w backends.Workload, argv []string) (int, error) {
	path, err := exec.LookPath("lxc-attach")
	if err != nil {
		return 0, err
	}
	user := strconv.Itoa(w.Run.User)
	args := append([]string{"-P", lxcPath(dir), "-n", container, "-f", filepath.Join(dir, configFile), "-o", "/dev/stderr", "-l", "ERROR", "--clear-env", "-u", user, "-g", user, "--"}, argv...)
	lxc := exec.Command(path, args...)
	lxc.Env, lxc.Dir = []string{"PATH=/nowhere"}, "/"
	lxc.Stdout, lxc.Stderr = os.Stdout, os.Stderr
	if err := lxc.Start(); err != nil {
		return 0, err
	}
	over := make(chan struct{})
	defer close(over)
	go func() {
		select {
		case <-over:
			return
		case <-ctx.Done():
		}
		for ; ; time.Sleep(time.Millisecond) { // until it has ended, whatever it begins meanwhile
			select {
			case <-over:
				return
			default:
				killBelow(lxc.Process.Pid)
			}
		}
	}()
	err = lxc.Wait()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit) && !exit.Exited():
		return 0, fmt.Errorf("lxc-attach ended: %v", err)
	case errors.As(err, &exit):
		return exit.ExitCode(), nil
	}
	return 0, err
}

func proc(pid int, file string) string { return "/proc/" + strconv.Itoa(pid) + "/" + file }

// initOf is the first process of the workload's container, or 0: the child of a lxc-start that our own monitor, process 1, runs.
func initOf(dir string) int {
	mark := lxcPath(dir) + "\x00-n\x00" + container + "\x00"
	for _, pid := range processes() {
		line, err := os.ReadFile(proc(pid, "cmdline"))
		if err == nil && strings.Contains(string(line), mark) && parentOf(pid) == 1 {
			return firstOf(pid)
		}
	}
	return 0
}

// processes lists all that this namespace has.
func processes() (pids []int) {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil
	}
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// field is a line of a process's status.
func field(pid int, name string) string {
	text, err := os.ReadFile(proc(pid, "status"))
	if err != nil {
		return ""
	}
	_, rest, _ := strings.Cut("\n"+string(text), "\n"+name+":")
	line, _, _ := strings.Cut(rest, "\n")
	return strings.TrimSpace(line)
}

func parentOf(pid int) int {
	n, err := strconv.Atoi(field(pid, "PPid"))
	if err != nil {
		return 0
	}
	return n
}

// firstOf is the child of a process that is process 1 of a namespace just below ours, or 0.
func firstOf(parent int) int {
	for _, pid := range processes() {
		if parentOf(pid) != parent {
			continue
		}
		if numbers := strings.Fields(field(pid, "NSpid")); len(numbers) == 2 && numbers[1] == "1" {
			return pid
		}
	}
	return 0
}

// killBelow ends the children of a process.
func killBelow(parent int) {
	for _, pid := range processes() {
		if parentOf(pid) == parent {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
}
