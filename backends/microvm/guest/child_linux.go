package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends/process/stage"
)

// child is a stage, and then what it becomes.
type child struct {
	pid      int
	to, from *os.File // orders and report
	output   *os.File
	copied   chan struct{} // closed when all output has been sent

	mu    sync.Mutex // guards what follows
	pidfd int        // -1 once it has been waited for
}

// spawn clones a stage, in namespaces of its own or in those of the process that pidfd in holds.
func spawn(orders stage.Orders, joins []string, in int) (*child, error) {
	orders.Cgroups = len(joins)
	text, err := json.Marshal(orders)
	if err != nil {
		return nil, err
	}
	c := &child{pidfd: -1, copied: make(chan struct{})}
	if err := c.clone(joins, in); err != nil {
		c.close()
		return nil, err
	}
	if _, err := io.Copy(c.to, bytes.NewReader(text)); err != nil {
		close(c.copied) // nobody copies
		_ = unix.Kill(c.pid, unix.SIGKILL)
		c.wait()
		return nil, err
	}
	return c, nil
}

// clone starts the stage with its ends of the pipes, and has ours.
func (c *child) clone(joins []string, in int) error {
	null, err := os.OpenFile(os.DevNull, os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	theirs := []*os.File{null}
	defer func() {
		for _, f := range theirs {
			_ = f.Close() // they are the stage's
		}
	}()
	pipe := func(write bool) (*os.File, error) {
		other, ours, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		if !write {
			other, ours = ours, other
		}
		theirs = append(theirs, other)
		return ours, nil
	}
	var failed [3]error
	c.output, failed[0] = pipe(false)
	c.to, failed[1] = pipe(true)
	c.from, failed[2] = pipe(false)
	if err := errors.Join(failed[:]...); err != nil {
		return err
	}
	files := []uintptr{null.Fd(), theirs[1].Fd(), theirs[1].Fd(), theirs[2].Fd(), theirs[3].Fd(), ^uintptr(0)} // the last is closed
	for _, path := range joins {
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		theirs, files = append(theirs, f), append(files, f.Fd())
	}
	sys := &syscall.SysProcAttr{Setsid: true, PidFD: &c.pidfd}
	if in >= 0 {
		files = append(files, uintptr(in))
	} else {
		sys.Cloneflags = unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS
	}
	stage.OnThread(func() {
		if in >= 0 {
			err = unix.Setns(in, unix.CLONE_NEWPID)
		}
		if err == nil {
			c.pid, err = syscall.ForkExec("/proc/self/exe", []string{"kmo", stage.Arg}, &syscall.ProcAttr{Dir: "/", Env: []string{}, Files: files, Sys: sys})
		}
	})
	return err
}

// close closes what is ours. What is closed already is of no consequence.
func (c *child) close() {
	for _, f := range []*os.File{c.to, c.from, c.output} {
		_ = f.Close() // one that was never made is an error, too
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pidfd >= 0 {
		_ = unix.Close(c.pidfd)
		c.pidfd = -1
	}
}

// hold returns a descriptor of the process, for the caller to close, as long as it has not been waited for.
func (c *child) hold() (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return unix.FcntlInt(uintptr(c.pidfd), unix.F_DUPFD_CLOEXEC, 0)
}

// copy sends what it writes to w.
func (c *child) copy(w io.Writer) {
	defer close(c.copied)
	_, _ = io.Copy(w, c.output) // ends with the child, or with the monitor
}

// built waits until the stage has built the root.
func (c *child) built() *stage.Failure {
	var first [1]byte
	if n, err := c.from.Read(first[:]); err == nil && n == 1 && first[0] == stage.Built {
		return nil
	}
	return c.said(first[:])
}

// begin lets the stage go on, and waits until it has executed its program.
func (c *child) begin() *stage.Failure {
	_, _ = c.to.Write([]byte{'.'}) // one that does not wait reads no more
	defer c.to.Close()
	return c.said(nil)
}

func (c *child) said(first []byte) *stage.Failure {
	rest, err := io.ReadAll(io.LimitReader(c.from, 1<<16))
	if err = errors.Join(err, c.from.Close()); err != nil {
		return &stage.Failure{Step: "the stage", Cause: err.Error()}
	}
	if f, ok := stage.Report(append(bytes.TrimRight(first, "\x00"), rest...)); !ok {
		return &f
	}
	return nil
}

// wait returns the status of what has ended and whose output has been sent, and lets go of it. What it left behind does not hold it up.
func (c *child) wait() int {
	code := stage.Wait(c.pid)
	_ = unix.Kill(-c.pid, unix.SIGKILL) // its group
	_ = c.output.SetReadDeadline(time.Now().Add(time.Second))
	<-c.copied
	c.close()
	return code
}

// signal reaches the child, and its group if it has one. SIGTERM ends a process 1 that does not catch it, as it would end any other.
func (c *child) signal(number unix.Signal, group bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pidfd < 0 {
		return // the number may be another's
	}
	if group {
		_ = unix.Kill(-c.pid, number)
		return
	}
	if number == unix.SIGTERM && !stage.Catches(c.pid, number) {
		number = unix.SIGKILL
	}
	_ = unix.PidfdSendSignal(c.pidfd, number, nil, 0)
}
