// Package program holds the process of a container: by a pidfd, which is that process or none, and by its cgroups, which say what it uses
// and whether it ended for want of memory.
package program

import (
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/process/cgroup"
	"github.com/kindos/kmo/backends/process/stage"
)

// Program is one process, the first of its container. The nil Program is none.
type Program struct {
	PID   int
	Began uint64        // as stage.Stat has it
	Done  chan struct{} // closed when it has ended

	fd     *os.File          // the pidfd, in the runtime's poller: waiting costs no thread
	groups map[string]string // cgroup folder by controller; "" is version 2
	short  atomic.Bool       // of memory
	events *os.File          // an eventfd that the kernel signals when memory is short; nil if it does not
}

// root is where cgroups are mounted.
const root = "/sys/fs/cgroup"

// Hold takes hold of a process that is in a cgroup of the container with that id. It returns nil if it is not, or is not to be seen from
// here: then nothing but the engine tells of its end.
func Hold(pid int, id string) *Program {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil
	}
	p := &Program{PID: pid, Done: make(chan struct{}), fd: os.NewFile(uintptr(fd), "pidfd")}
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup") // after the pidfd was taken: it is of the same process, or of none
	found, statErr := stage.ReadStat(pid)
	if err != nil || statErr != nil || !strings.Contains(string(text), id) {
		_ = p.fd.Close()
		return nil
	}
	p.Began, p.groups = found.Began, groups(string(text), id)
	p.hear()
	go p.wait()
	return p
}

// Lives says whether the process of that number which began then is there, and has not ended.
func Lives(pid int, since uint64) bool {
	found, err := stage.ReadStat(pid)
	if err != nil { // one that cannot be looked at may well be there
		return !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ESRCH)
	}
	if found.Began != since {
		return false
	}
	if found.State != "Z" && found.State != "X" {
		return true
	}
	threads, _ := os.ReadDir("/proc/" + strconv.Itoa(pid) + "/task") // the first of several may end before the others
	return len(threads) > 1
}

// groups finds the folders of /proc/PID/cgroup that are of the container with that id: a process that has ended is in the host's own.
func groups(text, id string) map[string]string {
	found := map[string]string{}
	for line := range strings.SplitSeq(text, "\n") {
		parts := strings.SplitN(line, ":", 3)
		if len(parts) != 3 || !strings.Contains(parts[2], id) {
			continue
		}
		if parts[1] == "" {
			for _, base := range []string{root, filepath.Join(root, "unified")} {
				if _, err := os.Stat(filepath.Join(base, parts[2], "memory.current")); err == nil {
					found[""] = filepath.Join(base, parts[2])
				}
			}
			continue
		}
		for _, controller := range strings.Split(parts[1], ",") {
			for _, base := range []string{controller, parts[1]} {
				if at := filepath.Join(root, base, parts[2]); dir(at) {
					found[controller] = at
				}
			}
		}
	}
	return found
}

func dir(at string) bool {
	found, err := os.Stat(at)
	return err == nil && found.IsDir()
}

// hear asks the kernel to tell when the cgroup is short of memory. Version 1 can: what its files count is gone with the container, too
// soon to be read. Of version 2 the engines tell themselves.
func (p *Program) hear() {
	at, ok := p.groups["memory"]
	if !ok {
		return
	}
	control, err := os.Open(filepath.Join(at, "memory.oom_control"))
	if err != nil {
		return
	}
	defer control.Close()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return
	}
	events := os.NewFile(uintptr(fd), "eventfd")
	raw, err := control.SyscallConn()
	if err == nil {
		err = errors.Join(raw.Control(func(of uintptr) {
			err = os.WriteFile(filepath.Join(at, "cgroup.event_control"), []byte(strconv.Itoa(fd)+" "+strconv.Itoa(int(of))), 0)
		}), err)
	}
	if err != nil {
		_ = events.Close()
		return
	}
	p.events = events
	go func() {
		told := uint64(0)
		for count := make([]byte, 8); ; {
			if _, err := events.Read(count); err != nil {
				return
			}
			told += binary.NativeEndian.Uint64(count)
			if told > 1 || dir(at) { // it is signalled once more when the cgroup goes
				p.short.Store(true)
			}
		}
	}()
}

func (p *Program) wait() {
	raw, err := p.fd.SyscallConn()
	if err == nil {
		err = raw.Read(func(fd uintptr) bool {
			fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			n, err := unix.Poll(fds, 0)
			return n > 0 && err == nil
		})
	}
	if err == nil {
		close(p.Done)
	}
}

// Release lets go of the process. Done is then closed no more.
func (p *Program) Release() {
	if p != nil {
		_ = p.fd.Close()
		_ = p.events.Close()
	}
}

// Ended says whether it has.
func (p *Program) Ended() bool {
	select {
	case <-p.Done:
		return true
	default:
		return false
	}
}

// Short says whether its cgroup was short of memory, where the kernel tells so; where it does not, known is false. What the kernel has told it
// may hear a moment later.
func (p *Program) Short() (short, known bool) {
	if p == nil || p.events == nil {
		return false, false
	}
	for range 20 {
		if p.short.Load() {
			break
		}
		time.Sleep(time.Millisecond)
	}
	return p.short.Load(), true
}

// Catches is stage.Catches.
func (p *Program) Catches(s unix.Signal) bool { return p == nil || stage.Catches(p.PID, s) }

// Usage reads what the container uses. What cannot be read is 0.
func (p *Program) Usage() (u backends.Usage) {
	if p == nil {
		return u
	}
	if at, ok := p.groups[""]; ok {
		u.Memory, u.PIDs = cgroup.Number(at, "memory.current", ""), cgroup.Number(at, "pids.current", "")
		u.CPU = time.Duration(cgroup.Number(at, "cpu.stat", "usage_usec")) * time.Microsecond
	}
	if at, ok := p.groups["memory"]; ok {
		u.Memory = cgroup.Number(at, "memory.usage_in_bytes", "")
	}
	if at, ok := p.groups["pids"]; ok {
		u.PIDs = cgroup.Number(at, "pids.current", "")
	}
	if at, ok := p.groups["cpuacct"]; ok {
		u.CPU = time.Duration(cgroup.Number(at, "cpuacct.usage", ""))
	}
	return u
}

// KillSession ends the processes of the session that a process of the container with that id leads, or led: what a command was executed as,
// and what it has started.
func KillSession(leader int, id string) {
	if leader <= 1 || id == "" {
		return
	}
	for range 5 { // until nobody is left who could start another
		found, _ := filepath.Glob("/proc/[0-9]*/stat")
		killed := 0
		for _, path := range found {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			if err == nil && pid != 1 && killMember(pid, leader, id) {
				killed++
			}
		}
		if killed == 0 {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func killMember(pid, leader int, id string) bool {
	member := func() bool {
		found, err := stage.ReadStat(pid)
		return err == nil && found.Session == leader && found.State != "Z"
	}
	if !member() {
		return false
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	in, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	if err != nil || !strings.Contains(string(in), id) || !member() { // asked again: it is the process that the pidfd holds
		return false
	}
	return unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) == nil
}
