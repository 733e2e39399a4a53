package process

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/process/secret"
	"github.com/kindos/kmo/backends/process/stage"
	"github.com/kindos/kmo/policy/refusal"
	"golang.org/x/sys/unix"
)

const namespaces = unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS

// start makes the program of a workload that has none, by a plan for it if there is one already. Whatever it returns, there is a
// recorded program or nothing. The turn is held.
func (k *Keeper) start(ctx context.Context, e *entry, p *Program) (err error) {
	defer func() {
		if err != nil {
			e.mu.Lock()
			e.state, e.detail = backends.Backoff, refusal.Clip(err.Error(), 400)
			if errors.Is(err, secret.ErrGone) {
				e.state = backends.Damaged
			}
			e.mu.Unlock()
		}
	}()
	r := &e.record
	if p, err = k.settle(ctx, e, p); err != nil {
		return err
	}
	orders, hooks, err := k.prepare(e, p)
	if err != nil {
		return err
	}
	log, err := openLog(e.dir)
	if err != nil {
		return err
	}
	defer log.Close()
	before, err := log.Stat()
	if err != nil {
		return err
	}
	k.step("clone")
	c, err := spawn(orders, k.groups.Joins(e.name), log, -1, k.kin())
	if err != nil {
		return errors.Join(fmt.Errorf("%s: starting a stage: %v", e.name, err), k.groups.Remove(e.name))
	}
	k.step("cloned")
	if err := k.recordStart(e, c, k.unapplied(r.Workload, p, orders)); err != nil {
		c.abandon()
		return errors.Join(err, k.groups.Remove(e.name))
	}
	k.step("recorded")
	fault, err := c.instruct(ctx, func() { k.step("ordered") }, k.preInit(ctx, e, c.program, hooks, log))
	if err != nil || fault != nil {
		c.abandon()
		if fault != nil && fault.Blames {
			err = &backends.StartError{Workload: e.name, Stage: fault.Step, Cause: fault.Cause, Output: since(e.dir, before.Size())}
		} else if fault != nil {
			err = fmt.Errorf("%s: %s: %s", e.name, fault.Step, fault.Cause)
		}
		return errors.Join(err, k.groups.Remove(e.name))
	}
	k.step("started")
	k.adopt(e, c.program)
	return nil
}

// prepare makes on this host what a start needs: the secrets, the workload's folders, a cgroup that counts from 0.
func (k *Keeper) prepare(e *entry, p *Program) (o stage.Orders, hooks [][]string, err error) {
	r := &e.record
	files, err := k.secrets.Reveal(r.Workload)
	if err != nil {
		return o, nil, err
	}
	e.mu.Lock()
	r.Workload.Files = files
	e.mu.Unlock()
	if o, hooks, err = k.orders(k.resolved(r), *p, e.dir); err != nil {
		return o, nil, err
	}
	if err := os.MkdirAll(filepath.Join(e.dir, "root"), 0o700); err != nil {
		return o, nil, err
	}
	if p.Monitor {
		t, err := k.task(r)
		if err = errors.Join(err, t.Write()); err != nil {
			return o, nil, err
		}
	}
	if err := k.groups.Remove(e.name); err != nil {
		return o, nil, fmt.Errorf("%s: removing its old cgroup: %v", e.name, err)
	}
	if err := k.groups.Make(e.name, r.Workload.Resources); err != nil {
		return o, nil, errors.Join(fmt.Errorf("%s: making its cgroup: %v", e.name, err), k.groups.Remove(e.name))
	}
	return o, hooks, nil
}

// preInit is what runs the hooks before a program, inside what its stage has built, or nil if there are none.
func (k *Keeper) preInit(ctx context.Context, e *entry, stage *program, hooks [][]string, log *os.File) func() error {
	if len(hooks) == 0 {
		return nil
	}
	return func() error {
		for _, argv := range hooks {
			if err := k.hook(ctx, e, "preInit", argv, log, func(ctx context.Context, out io.Writer) (int, error) {
				return k.inside(ctx, e, k.resolved(&e.record), stage, argv, out)
			}); err != nil {
				return err
			}
		}
		return nil
	}
}

// hook runs a hook and turns how it ended into an error with what it wrote. One that does not end in its time is at fault itself. What it
// writes while the log is as long as it may get is lost.
func (k *Keeper) hook(ctx context.Context, e *entry, moment string, argv []string, log *os.File, run func(context.Context, io.Writer) (int, error)) error {
	before, err := log.Stat()
	if err != nil {
		return err
	}
	within, cancel := context.WithTimeout(ctx, k.hookTime)
	defer cancel()
	status, err := run(within, k.place(&e.record.Workload).Onto(log))
	fault := &backends.StartError{Workload: e.name, Stage: fmt.Sprintf("%s %v", moment, argv)}
	var cause *backends.StartError
	switch {
	case err != nil && ctx.Err() == nil && within.Err() != nil:
		fault.Cause = fmt.Sprintf("has not ended within %v", k.hookTime)
	case errors.As(err, &cause):
		fault.Cause = cause.Stage + ": " + cause.Cause
	case err != nil:
		return err
	case status != 0:
		fault.Cause = fmt.Sprintf("exit status %d", status)
	default:
		return nil
	}
	fault.Output = since(e.dir, before.Size())
	return fault
}

// orders is what the stage is told.
func (k *Keeper) orders(w backends.Workload, p Program, dir string) (o stage.Orders, preInit [][]string, err error) {
	o = stage.Orders{Argv: slices.Clone(p.Argv), Dir: p.Dir, Confine: stage.Confine{User: w.Run.User}}
	if o.Dir == "" {
		o.Dir = "/"
	}
	o.Announce = p.Announces
	for _, name := range slices.Sorted(maps.Keys(p.Env)) {
		o.Env = append(o.Env, name+"="+p.Env[name])
	}
	if p.Monitor {
		o.Monitor, o.Argv = true, append([]string{"kmo"}, p.Argv...)
		return o, w.Hooks.PreInit, nil
	}
	for _, p := range w.Run.Ports {
		o.Confine.Ports = append(o.Confine.Ports, p.Port)
	}
	for _, device := range stage.Devices() {
		o.Confine.Write = append(o.Confine.Write, "/dev/"+device)
	}
	if !k.support.Mounts {
		bare(&o, p)
		k.boundFiles(&o, slices.ContainsFunc(p.Binds, func(b Bind) bool { return b.Writable }), 0)
		for _, argv := range w.Hooks.PreInit {
			preInit = append(preInit, append([]string{outside(p, argv[0])}, argv[1:]...))
		}
		return o, preInit, nil
	}
	root, err := k.root(w, p, dir)
	if err != nil {
		return o, nil, err
	}
	o.Confine.Write = append(o.Confine.Write, root.Nodes...)
	o.Root = root
	o.Confine.Execute = []string{"/"}
	for _, b := range root.Binds {
		if b.Writable {
			o.Confine.Write = append(o.Confine.Write, b.To)
		}
	}
	k.boundFiles(&o, slices.ContainsFunc(root.Binds, func(b stage.Bind) bool { return b.Writable }), root.Size)
	if root.Size > 0 {
		o.Confine.Write = append(o.Confine.Write, "/")
	}
	return o, w.Hooks.PreInit, nil
}

// root is what the program will see. The kept folders are made here.
func (k *Keeper) root(w backends.Workload, p Program, dir string) (*stage.Root, error) {
	kept, err := k.kept(w)
	if err != nil {
		return nil, err
	}
	root := Place{Kept: kept}.Root(w, filepath.Join(dir, "root"))
	root.Content = p.Root
	var binds []stage.Bind
	for _, b := range p.Binds {
		binds = append(binds, stage.Bind{From: b.From, To: b.To, Writable: b.Writable})
	}
	root.Binds = append(binds, root.Binds...)
	return root, nil
}

// child is a stage that waits for its orders, and may become a program.
type child struct {
	*program
	orders   stage.Orders
	to, from *os.File // orders and report
}

// spawn clones a stage. It joins the namespaces of the process that pidfd in holds, or, if they are to be its kin's, gets new ones.
func spawn(orders stage.Orders, joins []string, out *os.File, in int, how kin) (c *child, err error) {
	orders.Cgroups = len(joins)
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	closing := []*os.File{null}
	defer func() { _ = closeAll(closing) }()
	ordersRead, ordersWrite, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	closing = append(closing, ordersRead)
	reportRead, reportWrite, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, ordersWrite.Close())
	}
	closing = append(closing, reportWrite)
	files := []uintptr{null.Fd(), out.Fd(), out.Fd(), ordersRead.Fd(), reportWrite.Fd(), ^uintptr(0)} // the last is closed
	if orders.Announce {
		heard, announce, err := os.Pipe()
		if err != nil {
			return nil, errors.Join(err, ordersWrite.Close(), reportRead.Close())
		}
		closing = append(closing, announce)
		files[stage.AnnounceFD] = announce.Fd()
		defer func() {
			if c == nil {
				_ = heard.Close()
				return
			}
			c.heard, c.announced = heard, make(chan struct{})
		}()
	}
	for _, path := range joins {
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return nil, errors.Join(err, ordersWrite.Close(), reportRead.Close())
		}
		closing = append(closing, f)
		files = append(files, f.Fd())
	}
	pidfd := -1
	sys := &syscall.SysProcAttr{Setsid: true, PidFD: &pidfd}
	if how == kinSpace && in < 0 {
		sys.Cloneflags = namespaces
	}
	if in >= 0 {
		orders.Join = true
		files = append(files, uintptr(in))
	}
	pid, err := syscall.ForkExec("/proc/self/exe", []string{"kmo", stage.Arg}, &syscall.ProcAttr{Dir: "/", Env: []string{}, Files: files, Sys: sys})
	if err != nil {
		return nil, errors.Join(err, ordersWrite.Close(), reportRead.Close())
	}
	return &child{program: hold(pid, pidfd, how), orders: orders, to: ordersWrite, from: reportRead}, nil
}

// instruct sends the orders, runs hooks when the stage has built what they need, if there are any, and waits until the program is
// executed, or is not.
func (c *child) instruct(ctx context.Context, sent func(), hooks func() error) (*stage.Failure, error) {
	if !c.orders.Join {
		defer context.AfterFunc(ctx, func() { c.signal(unix.SIGKILL) })()
	}
	c.orders.Pause = hooks != nil || c.orders.Monitor && !c.orders.Join
	text, err := json.Marshal(c.orders)
	if err == nil {
		_, err = io.Copy(c.to, bytes.NewReader(text))
	}
	if err != nil {
		return nil, errors.Join(ctx.Err(), err)
	}
	sent()
	var first [1]byte
	if n, err := c.from.Read(first[:]); c.orders.Pause && err == nil && n == 1 && first[0] == stage.Built {
		if hooks != nil {
			if err := hooks(); err != nil {
				return nil, err
			}
		}
		if _, err := c.to.Write([]byte{'.'}); err != nil {
			return nil, errors.Join(ctx.Err(), err)
		}
		first = [1]byte{}
	}
	said, err := io.ReadAll(io.LimitReader(c.from, 1<<16))
	if first[0] != 0 {
		said = append(first[:], said...)
	}
	if err = errors.Join(err, c.to.Close(), c.from.Close(), ctx.Err()); err != nil {
		return nil, err
	}
	if f, ok := stage.Report(said); !ok {
		return &f, nil
	}
	return nil, nil
}

// abandon kills what has not become a program.
func (c *child) abandon() {
	_, _ = c.to.Close(), c.from.Close()
	c.signal(unix.SIGKILL)
	c.reap()
}

// reap takes the status of an ended child. Who would signal it afterwards reaches nobody.
func (c *child) reap() int {
	defer c.release()
	return stage.Wait(c.pid)
}

// join runs a command in the namespaces of a running workload. Its output goes to out.
func (k *Keeper) join(ctx context.Context, e *entry, argv []string, out io.Writer) (int, error) {
	e.mu.Lock()
	p, w := e.program, e.record.Workload
	if p != nil {
		w = k.resolved(&e.record)
	}
	e.mu.Unlock()
	if p == nil {
		return 0, backends.ErrNotFound
	}
	return k.inside(ctx, e, w, p, argv, out)
}

// inside runs a command in the namespaces of a program, or of a stage that waits.
func (k *Keeper) inside(ctx context.Context, e *entry, w backends.Workload, p *program, argv []string, out io.Writer) (int, error) {
	in, err := p.duplicate()
	if err != nil {
		return 0, err
	}
	defer unix.Close(in)
	plan, err := k.planned(ctx, e)
	if err != nil {
		return 0, err
	}
	w.Hooks.PreInit = [][]string{argv}
	orders, hooks, err := k.orders(w, *plan, e.dir)
	if err != nil {
		return 0, err
	}
	orders.Root, orders.Argv, orders.Announce = nil, hooks[0], false
	if plan.Monitor {
		orders.Argv = append([]string{"kmo"}, plan.Command(argv)...)
	}
	output, theirs, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer output.Close()
	c, err := spawnInside(in, orders, k.groups.Joins(e.name), theirs)
	if err = errors.Join(err, theirs.Close()); err != nil {
		return 0, fmt.Errorf("%s: %v: %v", e.name, argv, err)
	}
	forget, err := k.noteCommand(e, c)
	if err != nil {
		c.abandon()
		return 0, fmt.Errorf("%s: %v: noting it: %v", e.name, argv, err)
	}
	defer forget()
	return c.finish(ctx, e.name, output, out)
}

// spawnInside clones a stage into the pid namespace of a program, by a thread that enters it.
func spawnInside(in int, orders stage.Orders, joins []string, out *os.File) (c *child, err error) {
	if orders.Confine.Bare {
		return spawn(orders, nil, out, -1, kinNumber) // our child until it is reaped
	}
	stage.OnThread(func() {
		if err = unix.Setns(in, unix.CLONE_NEWPID); err == nil {
			c, err = spawn(orders, joins, out, in, kinNumber)
		}
	})
	return c, err
}

// finish waits for a command and copies its output.
func (c *child) finish(ctx context.Context, name string, output *os.File, out io.Writer) (int, error) {
	defer context.AfterFunc(ctx, func() {
		if c.orders.Monitor { // it has to end what it runs inside
			c.signal(unix.SIGTERM)
			time.Sleep(commandGrace)
		}
		c.signal(unix.SIGKILL)
	})()
	copied := make(chan struct{})
	go func() {
		defer close(copied)
		_, _ = io.Copy(out, output) // out takes everything
	}()
	fault, err := c.instruct(ctx, func() {}, nil)
	if err == nil {
		err = c.wait() // the end of ctx kills it
	}
	c.kill()
	status := c.reap()
	// Something it left behind may hold the other end for ever.
	err = errors.Join(err, output.SetReadDeadline(time.Now().Add(100*time.Millisecond)))
	<-copied
	switch {
	case ctx.Err() != nil:
		return 0, ctx.Err()
	case err != nil:
		return 0, err
	case fault != nil && fault.Blames:
		return 0, &backends.StartError{Workload: name, Stage: fault.Step, Cause: fault.Cause}
	case fault != nil:
		return 0, fmt.Errorf("%s: %s: %s", name, fault.Step, fault.Cause)
	}
	return status, nil
}

// commandGrace is how long a command beside a monitor has to end what it runs.
const commandGrace = time.Second

// words are the first 64 KiB of what is written.
type words []byte

// Write takes everything.
func (w *words) Write(text []byte) (int, error) {
	*w = append(*w, text[:min(len(text), max(0, 64<<10-len(*w)))]...)
	return len(text), nil
}
