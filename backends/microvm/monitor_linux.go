package microvm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/microvm/boot"
	"github.com/kindos/kmo/backends/microvm/channel"
	"github.com/kindos/kmo/backends/microvm/machine"
	"github.com/kindos/kmo/backends/process/monitor"
	"github.com/kindos/kmo/backends/process/netns"
	"github.com/kindos/kmo/backends/process/stage"
)

// bootTime is how long a machine may take to boot, and to build what its workload runs in: emulated, on a host that is busy.
const bootTime = 5 * time.Minute

// controlFile is the socket, in the monitor's own folder, at which commands are taken.
const controlFile = "control.sock"

// Monitor is the main of a monitor and of commands beside it. It returns the exit status.
func Monitor(args []string) int {
	if len(args) == 3 && args[0] == runArg {
		return monitor.Run(args[2], func(m *monitor.Monitor) (monitor.End, error) {
			var o orders
			if err := json.Unmarshal([]byte(args[1]), &o); err != nil {
				return monitor.End{}, err
			}
			return keep(m, o)
		})
	}
	if len(args) < 3 || args[0] != commandArg {
		return complain(errors.New("a monitor's arguments are not for people"))
	}
	status, err := command(args[1], args[2:])
	if err != nil {
		return complain(err)
	}
	return status
}

func complain(err error) int {
	_, _ = fmt.Fprintln(os.Stderr, err)
	return 127
}

// command asks the monitor at a place to run something in its machine, and is that to its keeper.
func command(where string, argv []string) (int, error) {
	var place monitor.Place
	if err := json.Unmarshal([]byte(where), &place); err != nil {
		return 0, err
	}
	if err := os.Chdir(place.Dir); err != nil {
		return 0, err
	}
	stream, err := net.Dial("unix", controlFile)
	if err != nil {
		return 0, err
	}
	defer stream.Close()
	conn, out := channel.Open(stream, channel.MaxToHost), place.Output()
	if err := conn.Say(channel.Exec, 0, argv); err != nil {
		return 0, err
	}
	for {
		f, err := conn.Receive()
		if err != nil {
			return 0, fmt.Errorf("%v: the machine has ended: %v", argv, err)
		}
		switch f.Kind {
		case channel.Output:
			_, _ = out.Write(f.Body)
		case channel.Ended:
			var end channel.End
			err := f.Decode(&end)
			return end.Code, err
		case channel.Fault:
			var fault stage.Failure
			if err := f.Decode(&fault); err != nil {
				return 0, err
			}
			return 0, fmt.Errorf("%s: %s", fault.Step, fault.Cause)
		}
	}
}

// keep is a machine's life.
func keep(m *monitor.Monitor, o orders) (monitor.End, error) {
	// A core of the machine would have its memory, and the secrets in it, on a disk.
	if err := errors.Join(os.Chdir(m.Dir), unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})); err != nil {
		return monitor.End{}, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), bootTime)
	defer cancel()
	network, err := connect(o)
	if err != nil {
		return monitor.End{}, err
	}
	defer func() { _ = network.Close() }() // the machine has ended
	v := vmm(o)
	defer v.Stop()
	h, err := raise(ctx, m, o, v, network)
	if err != nil {
		return monitor.End{}, err
	}
	if err := m.Built(); err != nil {
		return monitor.End{}, err
	}
	terminated := make(chan os.Signal, 1)
	signal.Notify(terminated, unix.SIGTERM)
	if err := h.conn.Send(channel.Run, 0, nil); err != nil {
		return monitor.End{}, h.lost(err)
	}
	if _, err := h.expect(ctx, channel.Started); err != nil {
		return monitor.End{}, err
	}
	m.Started()
	go func() {
		for range terminated {
			_ = h.conn.Send(channel.Signal, 0, []byte{byte(unix.SIGTERM)}) // a machine that has ended needs none
		}
	}()
	f, err := h.expect(context.Background(), channel.Ended)
	if err != nil {
		_, _ = fmt.Fprintln(h.log, err)
		return monitor.End{Code: 128 + int(unix.SIGKILL)}, nil
	}
	var end channel.End
	if err := f.Decode(&end); err != nil {
		return monitor.End{Code: 128 + int(unix.SIGKILL)}, nil
	}
	return monitor.End{Code: end.Code & 0xff, OOM: end.OOM}, nil
}

func vmm(o orders) machine.VMM {
	if o.Firecracker {
		return &machine.Firecracker{Program: o.VMM}
	}
	return &machine.QEMU{Program: o.VMM, Sharer: o.Sharer, KVM: o.KVM}
}

// raise boots a machine and has its guest build what the workload runs in.
func raise(ctx context.Context, m *monitor.Monitor, o orders, v machine.VMM, network *netns.Network) (*host, error) {
	setup := channel.Setup{
		Stage: stageOrders(m), Resources: inside(m.Workload), Disk: "/dev/vda",
	}
	if !o.Firecracker {
		setup.Address, setup.Gateway = machine.GuestAddress, machine.Gateway
		setup.Stage.Root.Files = append(setup.Stage.Root.Files, monitor.Resolver(m.Workload, netns.Resolver)...)
	}
	c := machine.Config{
		Dir: m.Dir, Kernel: o.Boot.Kernel, Initrd: o.Boot.Initrd, Disk: o.Base, CPUs: processors(m.Workload.Resources.CPU),
		Memory: unbounded >> 20, Forwards: forwards(m, o), Command: kernelCommand, Network: network.Path(), User: o.User,
	}
	if setup.Resources.Memory > 0 {
		c.Memory = (setup.Resources.Memory + guestCost + 1<<20 - 1) >> 20
	}
	if c.Disk == "" {
		c.Disk = filepath.Join(m.Dir, "base")
		if err := boot.Disk(ctx, m.Workload.Image.Content, c.Disk); err != nil {
			return nil, err
		}
	}
	var err error
	if c.Shares, err = share(m); err != nil {
		return nil, err
	}
	setup.Shared = c.Shares != ""
	if err := v.Create(ctx, c); err != nil {
		return nil, err
	}
	if !o.Firecracker {
		if err := publish(m, network); err != nil {
			return nil, err
		}
	}
	if err := v.Start(ctx); err != nil {
		return nil, err
	}
	stream, err := v.Connect(ctx)
	if err != nil {
		return nil, err
	}
	h := &host{machine: v, conn: channel.Open(stream, channel.MaxToHost), dir: m.Dir, log: m.Output(), said: make(chan channel.Frame, 16), gone: network.Gone(), commands: map[uint32]*channel.Conn{}}
	go h.listen()
	if _, err := h.expect(ctx, channel.Hello); err != nil {
		return nil, err
	}
	control, err := net.Listen("unix", controlFile)
	if err != nil {
		return nil, err
	}
	go h.serve(control)
	if err := h.conn.Say(channel.Build, 0, setup); err != nil {
		return nil, h.lost(err)
	}
	_, err = h.expect(ctx, channel.Built)
	return h, err
}

// host is the monitor's end of a channel.
type host struct {
	machine machine.VMM
	conn    *channel.Conn
	dir     string
	log     io.Writer          // the workload's
	said    chan channel.Frame // of the program; closed when the machine has ended
	gone    <-chan error       // tells when its way out has ended

	mu       sync.Mutex // guards what follows
	next     uint32
	commands map[uint32]*channel.Conn
}

// listen takes in what the guest says, until the machine ends.
func (h *host) listen() {
	defer close(h.said)
	for {
		f, err := h.conn.Receive()
		if err != nil {
			return
		}
		switch {
		case f.Kind == channel.Output && f.ID == 0:
			_, _ = h.log.Write(f.Body)
		case f.Kind == channel.Usage:
			var u backends.Usage
			if f.Decode(&u) == nil {
				h.note(u)
			}
		case f.ID != 0:
			h.pass(f)
		default:
			h.said <- f
		}
	}
}

// note says where the backend looks what the program uses.
func (h *host) note(u backends.Usage) {
	text, err := json.Marshal(u)
	if err == nil {
		_ = monitor.Replace(filepath.Join(h.dir, usageFile), text) // the next one comes soon
	}
}

// pass hands a frame to the command that it is for.
func (h *host) pass(f channel.Frame) {
	h.mu.Lock()
	conn := h.commands[f.ID]
	h.mu.Unlock()
	if conn != nil && (f.Kind == channel.Output || f.Kind == channel.Ended || f.Kind == channel.Fault) {
		_ = conn.Send(f.Kind, 0, f.Body) // one that is gone is found gone by serve
	}
}

// expect waits for a word of the guest's.
func (h *host) expect(ctx context.Context, want channel.Kind) (channel.Frame, error) {
	select {
	case f, ok := <-h.said:
		switch {
		case !ok:
			return f, h.lost(errors.New("it ended by itself"))
		case f.Kind == want:
			return f, nil
		case f.Kind == channel.Fault:
			var fault stage.Failure
			if err := f.Decode(&fault); err != nil {
				return f, h.lost(err)
			}
			if fault.Blames {
				return f, monitor.Blame{Step: fault.Step, Cause: errors.New(fault.Cause)}
			}
			return f, fmt.Errorf("in the machine: %s: %s", fault.Step, fault.Cause)
		}
		return f, h.lost(fmt.Errorf("the guest said %q, want %q", f.Kind, want))
	case err := <-h.gone:
		return channel.Frame{}, h.lost(err)
	case <-ctx.Done():
		return channel.Frame{}, h.lost(fmt.Errorf("the guest has not said %q within %v", want, bootTime))
	}
}

// lost ends the machine and tells of it, with the last words on its console.
func (h *host) lost(err error) error {
	if words := h.machine.Stop(); words != "" {
		return fmt.Errorf("the machine: %v: %s", err, words)
	}
	return fmt.Errorf("the machine: %v", err)
}

// serve takes commands, each on a connection of its own, and ends one whose connection does.
func (h *host) serve(listener net.Listener) {
	for {
		stream, err := listener.Accept()
		if err != nil {
			return
		}
		go h.attend(stream)
	}
}

func (h *host) attend(stream net.Conn) {
	defer stream.Close()
	conn := channel.Open(deadlined{stream}, channel.MaxToGuest)
	f, err := conn.Receive()
	if err != nil || f.Kind != channel.Exec {
		return
	}
	h.mu.Lock()
	h.next++
	id := h.next
	h.commands[id] = conn
	h.mu.Unlock()
	if h.conn.Send(channel.Exec, id, f.Body) == nil {
		_, _ = conn.Receive() // it says nothing more: this is its end
		_ = h.conn.Send(channel.Signal, id, []byte{byte(unix.SIGKILL)})
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.commands, id)
}

// deadlined lets nobody hold up the machine's other words by not reading.
type deadlined struct{ net.Conn }

func (d deadlined) Write(text []byte) (int, error) {
	if err := d.SetWriteDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return 0, err
	}
	n, err := d.Conn.Write(text)
	if err != nil {
		_ = d.Close()
	}
	return n, err
}
