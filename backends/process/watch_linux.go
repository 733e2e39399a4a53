package process

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
	"unsafe"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/process/stage"
	"github.com/kindos/kmo/policy/refusal"
	"golang.org/x/sys/unix"
)

// program is a process of ours, held by a pidfd: a signal reaches it or nobody, also one that comes after its end, when the number of
// the process or of the pidfd is another's.
type program struct {
	pid  int
	fd   *os.File      // the pidfd, in the runtime's poller: waiting costs no thread
	kin  kin           // how what it started ends with it
	done chan struct{} // closed when it has ended and that is recorded

	heard     *os.File      // where it announces itself; nil if it does not, or was found again
	announced chan struct{} // closed when it has; nil with heard
}

// Announce says that this program has begun, once, if its plan says Announces.
func Announce() {
	_, _ = unix.Write(stage.AnnounceFD, []byte{'.'}) // nobody may be there to read it
	_ = unix.Close(stage.AnnounceFD)
}

// kin is how what a program started ends with it.
type kin int

const (
	kinSpace  kin = iota // as process 1 of its namespace
	kinGroup             // by its process group, through the pidfd
	kinNumber            // by its process group's number, where the kernel is older than 6.9
)

// hold takes over a pidfd.
func hold(pid, pidfd int, how kin) *program {
	_ = unix.SetNonblock(pidfd, true)
	return &program{pid: pid, fd: os.NewFile(uintptr(pidfd), "pidfd"), kin: how, done: make(chan struct{})}
}

// kin is what holds together a program and what it starts.
func (k *Keeper) kin() kin {
	switch {
	case k.support.Mounts:
		return kinSpace
	case k.support.Groups:
		return kinGroup
	}
	return kinNumber
}

// control calls f with the pidfd, and does not if it was released.
func (p *program) control(f func(fd int) error) error {
	raw, err := p.fd.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	err = raw.Control(func(fd uintptr) { inner = f(int(fd)) })
	return errors.Join(err, inner)
}

// signal is without effect on a program that has ended.
func (p *program) signal(s unix.Signal) {
	_ = p.control(func(fd int) error { return unix.PidfdSendSignal(fd, s, nil, 0) })
}

// kill ends the program and all it started.
func (p *program) kill() {
	p.killGroup()
	p.signal(unix.SIGKILL)
}

// killGroup ends what a bare program started. It is false if that may go on: its group's number says nothing any more.
func (p *program) killGroup() bool {
	how := func(fd int) error {
		return unix.PidfdSendSignal(fd, unix.SIGKILL, nil, unix.PIDFD_SIGNAL_PROCESS_GROUP)
	}
	switch p.kin {
	case kinSpace:
		return true
	case kinNumber:
		how = func(fd int) error {
			// While it is not reaped the number is its own. We reap our children ourselves, later; of what others reap it is known
			// while it runs, and numbers are given out in turn: the next moment's is no other's.
			ours := unix.Waitid(unix.P_PIDFD, fd, nil, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil) == nil
			if !ours && over(fd) {
				return unix.ESTALE
			}
			return unix.Kill(-p.pid, unix.SIGKILL)
		}
	}
	err := p.control(how)
	return err == nil || errors.Is(err, unix.ESRCH)
}

// dismiss ends a command of an earlier keeper's and what it began. One beside a monitor has to end what it runs inside, and is told.
func (p *program) dismiss() {
	defer p.release()
	for _, s := range []unix.Signal{unix.SIGTERM, unix.SIGKILL} {
		p.signal(s)
		if p.fd.SetReadDeadline(time.Now().Add(dismissTime)) == nil && p.wait() == nil {
			break
		}
	}
	_ = unix.Kill(-p.pid, unix.SIGKILL) // numbers are given out in turn: that of a group which has just become empty is no other's
}

func (p *program) release() { _, _ = p.fd.Close(), p.heard.Close() }

func (p *program) duplicate() (fd int, err error) {
	err = p.control(func(own int) error {
		fd, err = unix.FcntlInt(uintptr(own), unix.F_DUPFD_CLOEXEC, 0)
		return err
	})
	return fd, err
}

// catches says whether a SIGKILL is no better than a signal: whether the program catches that, or is no process 1, which others end.
func (p *program) catches(s unix.Signal) bool { return p.kin != kinSpace || stage.Catches(p.pid, s) }

// wait returns nil when the program has ended, and an error when it was released before.
func (p *program) wait() error {
	raw, err := p.fd.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Read(func(fd uintptr) bool { return over(int(fd)) })
}

func over(pidfd int) bool {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, 0)
	return n > 0 && err == nil
}

// adopt makes a program the workload's and watches it.
func (k *Keeper) adopt(e *entry, p *program) {
	e.mu.Lock()
	e.program, e.last, e.state, e.detail = p, p, backends.Running, ""
	if p.announced != nil {
		e.state = backends.Starting
	}
	if e.record.Removing {
		e.detail = "being removed"
	}
	e.mu.Unlock()
	if k.ctx.Err() != nil {
		p.release() // Close may have been here already
		return
	}
	k.working.Go(func() { k.watch(e, p) })
	if p.announced != nil {
		k.working.Go(func() { e.hear(p) })
	}
}

// hear waits until a program announces itself. It ends with the program, too, and when that is released.
func (e *entry) hear(p *program) {
	defer p.heard.Close()
	if n, _ := p.heard.Read(make([]byte, 1)); n == 0 {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.program == p && e.state == backends.Starting {
		e.state = backends.Running
	}
	close(p.announced)
}

// begun waits, as long as for a hook, until a program that announces itself has. One that ends before is for the hooks to find gone.
func (k *Keeper) begun(ctx context.Context, e *entry) error {
	p := e.now()
	if p == nil || p.announced == nil {
		return nil
	}
	select {
	case <-p.announced:
	case <-p.done:
	case <-ctx.Done():
	case <-k.ctx.Done():
	case <-time.After(k.hookTime):
		return &backends.StartError{Workload: e.name, Stage: "postInit", Cause: fmt.Sprintf("the program has not begun within %v", k.hookTime)}
	}
	return errors.Join(ctx.Err(), k.ctx.Err())
}

// watch waits for the end of a program, records it, and after a pause starts the workload again.
func (k *Keeper) watch(e *entry, p *program) {
	if p.wait() != nil || k.ctx.Err() != nil {
		return // closing: whoever comes next sees to it
	}
	pause := k.ended(e, p)
	close(p.done)
	for {
		timer := time.NewTimer(pause)
		select {
		case <-k.ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
		if pause = k.restart(e, p); pause == 0 {
			return
		}
	}
}

// ended records how a program ended and returns the pause before the next start.
func (k *Keeper) ended(e *entry, p *program) time.Duration {
	how := end{}
	if !p.killGroup() {
		k.options.Logger.Warn("ending what a program left behind: it was not our child, and this kernel knows its group by number only", "workload", e.name, "group", p.pid)
	}
	_ = p.control(func(fd int) error {
		how.Known, how.Code = collect(fd, p.pid)
		return nil
	})
	if how.Known && k.options.Means != nil {
		how.Code, how.OOM = k.options.Means(how.Code)
	}
	if said, ok := k.place(&e.record.Workload).Ended(); ok {
		how = end{Known: true, Code: said.Code, OOM: said.OOM}
	}
	short := k.groups.OOMs(e.name) > 0 // of a cgroup as old as the program: it may have been a child
	how.OOM = how.OOM || short && how.Known && how.Code == 128+int(unix.SIGKILL)
	p.release()

	e.mu.Lock()
	defer e.mu.Unlock()
	e.program = nil
	e.record.Ended = &how
	e.state = backends.Backoff
	if e.record.Quick++; time.Since(e.record.Started) > quick {
		e.record.Quick = 0
	}
	words := fmt.Sprintf("ended with status %d", how.Code)
	if !how.Known {
		words = unknownEnd
	}
	if how.OOM || short && !how.Known {
		words += ", for want of memory"
	}
	pause := k.options.Backoff(max(e.record.Quick-1, 0))
	e.detail = words // not when the next start is: a text that changes by itself is news to whoever compares
	if e.record.Removing {
		e.state, e.detail = backends.Exited, "being removed"
	}
	if err := e.record.save(e.dir); err != nil {
		k.options.Logger.Warn("recording an end", "workload", e.name, "err", err)
	}
	return max(pause, time.Nanosecond)
}

// unknownEnd is the detail of a workload whose last program ended as nobody knows: its ExitCode says 0, and does not mean it.
const unknownEnd = "its last program ended with a status that went to the process that had started it"

// collect reaps an ended process if it is our child, and says its status if that is to be had.
func collect(pidfd, pid int) (known bool, exit int) {
	if unix.Waitid(unix.P_PIDFD, pidfd, nil, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil) != nil {
		return exitOf(pidfd) // the child of an earlier process
	}
	var status unix.WaitStatus
	if _, err := unix.Wait4(pid, &status, unix.WNOHANG, nil); err != nil {
		return false, 0
	}
	return true, stage.Code(status)
}

// exitOf asks the kernel for the status of a process that was not our child. Kernels since 6.15 know it, once it is reaped.
func exitOf(pidfd int) (known bool, exit int) {
	for range 20 {
		state := struct {
			mask, cgroup uint64
			_            [12]uint32
			exit         int32
			_            [4]uint32
		}{mask: unix.PIDFD_INFO_EXIT}
		// PIDFD_GET_INFO with the size of the first version, which ends with the exit code.
		const getInfo = 3<<30 | unix.PIDFD_INFO_SIZE_VER0<<16 | 0xff<<8 | 11
		_, _, no := unix.Syscall(unix.SYS_IOCTL, uintptr(pidfd), getInfo, uintptr(unsafe.Pointer(&state)))
		if no == 0 && state.mask&unix.PIDFD_INFO_EXIT != 0 {
			return true, stage.Code(unix.WaitStatus(state.exit))
		}
		if no != 0 && no != unix.ESRCH {
			return false, 0
		}
		time.Sleep(time.Millisecond) // whoever inherited it reaps it any moment
	}
	return false, 0
}

// restart starts a workload again whose program p has ended, unless somebody else has seen to it. It returns the pause before it is
// to be tried again, or 0.
func (k *Keeper) restart(e *entry, p *program) time.Duration {
	select {
	case k.starts <- struct{}{}:
		defer func() { <-k.starts }()
	case <-k.ctx.Done():
		return 0
	}
	taken, release, err := k.take(k.ctx, e.name, false)
	if err != nil || taken == nil {
		return 0
	}
	defer release()
	if taken != e || e.last != p || e.now() != nil || e.removing() {
		return 0
	}
	e.mu.Lock()
	e.record.Restarts++
	e.record.Pending = len(e.record.Workload.Hooks.PostInit) > 0
	e.mu.Unlock()
	ctx, done := k.unasked(e, restartTime)
	defer done()
	if err = k.start(ctx, e, nil); err == nil {
		if err := k.postInit(ctx, e); err != nil {
			k.options.Logger.Warn("running a postInit hook", "workload", e.name, "err", err)
		}
		return 0
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.record.Quick++
	return max(k.options.Backoff(e.record.Quick-1), time.Nanosecond)
}

// find takes up what is in the state folder.
func (k *Keeper) find() error {
	found, err := os.ReadDir(filepath.Join(k.options.State, "work"))
	if err != nil {
		return err
	}
	for _, dir := range found {
		e := k.fresh(dir.Name())
		e.record, err = loadRecord(e.dir)
		if err != nil {
			k.options.Logger.Warn("clearing a workload without a readable record", "workload", dir.Name(), "err", err)
			if err := os.RemoveAll(e.dir); err != nil {
				return err
			}
			continue
		}
		k.entries[e.name] = e
		for i, p := range e.record.Workload.Run.Ports {
			if k.hostPort(e.record.Workload, p) == 0 && i < len(e.record.Ports) {
				k.ports[e.record.Ports[i]] = e.name
			}
		}
	}
	known := k.list()
	k.secrets.Keep(func(name string) bool { return k.entry(name) != nil })
	for _, name := range k.groups.Names() {
		if k.entries[name] == nil {
			k.undo(name)
		}
	}
	var ending sync.WaitGroup
	for _, e := range known {
		ending.Go(func() { k.endCommands(e) })
	}
	ending.Wait()
	for _, e := range known {
		k.resume(e)
	}
	return nil
}

// undo ends what is left of a start that was never recorded: the cgroup is ours alone. One that cannot be removed is shown, damaged,
// for as long as Remove does not succeed, and is in nobody else's way.
func (k *Keeper) undo(name string) {
	k.groups.Kill(name)
	err := k.groups.Remove(name)
	if err == nil {
		return
	}
	k.options.Logger.Warn("removing the cgroup of an unrecorded start", "workload", name, "err", err)
	e := k.fresh(name)
	e.record.Workload.Name = name
	e.state, e.detail = backends.Damaged, refusal.Clip("its cgroup is left of a start that was never recorded, and cannot be removed: "+err.Error(), 400)
	k.entries[name] = e
}

// resume goes on with one workload of an earlier process.
func (k *Keeper) resume(e *entry) {
	p, half := k.reattach(e)
	if half { // a stage: undone, and then as if it had ended
		p.kill()
		p.release()
		p = nil
	}
	if p != nil {
		k.adopt(e, p)
		if e.record.Pending && !e.record.Removing {
			k.working.Go(func() { _ = k.finishHooks(e) })
		}
	} else {
		e.state = backends.Backoff
		if e.detail = "gone while nobody watched; starting it again"; e.record.Removing {
			e.state, e.detail = backends.Exited, "being removed"
		}
	}
	if e.record.Removing {
		k.working.Go(func() {
			if err := k.Remove(k.ctx, e.name); err != nil && k.ctx.Err() == nil {
				k.options.Logger.Warn("finishing a removal", "workload", e.name, "err", err)
			}
		})
		return
	}
	if p == nil {
		k.working.Go(func() {
			for pause := time.Nanosecond; pause > 0; {
				select {
				case <-k.ctx.Done():
					return
				case <-time.After(pause):
				}
				pause = k.restart(e, nil)
			}
		})
	}
}

func (k *Keeper) finishHooks(e *entry) error {
	taken, release, err := k.take(k.ctx, e.name, false)
	if err != nil || taken != e {
		return err
	}
	defer release()
	ctx, done := k.unasked(e, restartTime)
	defer done()
	return k.postInit(ctx, e)
}

// same holds the process of an identity, if it is beyond doubt that one.
func (k *Keeper) same(id identity, how kin) *program {
	if id.Boot != k.boot || id.PID <= 0 {
		return nil
	}
	fd, err := unix.PidfdOpen(id.PID, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil
	}
	p := hold(id.PID, fd, how)
	// Asked after the pidfd was taken: if the number still means the same process now, the pidfd does.
	if started, err := startTime(id.PID); err != nil || started != id.Start {
		p.release()
		return nil
	}
	return p
}

// reattach finds the process of a record, if it is beyond doubt the same; half says that it had not become the program yet, or, as a
// monitor, has not started it: what it is about to do nobody would see to.
func (k *Keeper) reattach(e *entry) (p *program, half bool) {
	id := e.record.Process
	if p = k.same(id, k.kin()); p == nil {
		return nil, false
	}
	if line, err := os.ReadFile("/proc/" + strconv.Itoa(id.PID) + "/cmdline"); err == nil {
		if words := strings.Split(string(line), "\x00"); len(words) > 1 && words[1] == stage.Arg {
			return p, true
		}
	}
	groups, err := os.ReadFile("/proc/" + strconv.Itoa(id.PID) + "/cgroup")
	if err != nil || !k.groups.Hold(e.name, string(groups)) {
		p.release()
		return nil, false
	}
	return p, k.place(&e.record.Workload).Half()
}
