package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/microvm/channel"
	"github.com/kindos/kmo/backends/process/cgroup"
	"github.com/kindos/kmo/backends/process/stage"
)

// workload is the name of the one cgroup.
const workload = "workload"

// guest is the machine's one workload.
type guest struct {
	conn   *channel.Conn
	setup  channel.Setup
	groups cgroup.Groups

	mu      sync.Mutex // guards what follows
	running map[uint32]*child
}

// serve does what the monitor says, until it is gone.
func (g *guest) serve() error {
	if err := g.conn.Send(channel.Hello, 0, nil); err != nil {
		return err
	}
	for {
		f, err := g.conn.Receive()
		if err != nil {
			return err
		}
		switch f.Kind {
		case channel.Build:
			err = f.Decode(&g.setup)
			if err == nil {
				g.answer(channel.Built, g.build())
			}
		case channel.Run:
			go g.run()
		case channel.Exec:
			var argv []string
			if err = f.Decode(&argv); err == nil {
				go g.exec(f.ID, argv)
			}
		case channel.Signal:
			if len(f.Body) == 1 {
				g.signal(f.ID, unix.Signal(f.Body[0]))
			}
		}
		if err != nil {
			return err
		}
	}
}

// answer says that something is done, or why it is not.
func (g *guest) answer(done channel.Kind, fault *stage.Failure) {
	if fault != nil {
		_ = g.conn.Say(channel.Fault, 0, fault) // a monitor that is gone is found gone by serve
		return
	}
	_ = g.conn.Send(done, 0, nil)
}

// build makes the workload's root, in a process that waits to become the program.
func (g *guest) build() *stage.Failure {
	s := &g.setup
	for _, step := range []struct {
		what string
		do   func() error
	}{
		{"mounting the base", func() error { return mount(s.Disk, channel.Base, "ext4", unix.MS_RDONLY) }},
		{"mounting the shared folders", func() error {
			if !s.Shared {
				return nil
			}
			return mount(channel.Port, channel.Shares, "virtiofs", 0)
		}},
		{"bringing up the network", func() error { return network(s.Address, s.Gateway) }},
		{"setting the bounds", func() error {
			g.groups = cgroup.Find("/sys/fs/cgroup", "kmo")
			return g.groups.Make(workload, s.Resources)
		}},
		{"opening low ports", func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_unprivileged_port_start", []byte("0"), 0) }},
	} {
		if err := step.do(); err != nil {
			return &stage.Failure{Step: step.what, Cause: err.Error()}
		}
	}
	s.Stage.Pause = true
	c, err := spawn(s.Stage, g.groups.Joins(workload), -1)
	if err != nil {
		return &stage.Failure{Step: "starting a stage", Cause: err.Error()}
	}
	g.add(0, c)
	go c.copy(g.conn.Writer(0))
	return c.built()
}

// mount mounts what may not be there yet.
func mount(from, at, kind string, flags uintptr) (err error) {
	for range 200 {
		err = unix.Mount(from, at, kind, flags|unix.MS_NOSUID|unix.MS_NODEV, "")
		if !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENXIO) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	return err
}

func (g *guest) add(id uint32, c *child) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.running[id] = c
}

func (g *guest) find(id uint32) *child {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.running[id]
}

// run lets the program begin, and tells of its end.
func (g *guest) run() {
	c := g.find(0)
	if c == nil {
		return
	}
	fault := c.begin()
	g.answer(channel.Started, fault)
	if fault != nil {
		return
	}
	watched := make(chan struct{})
	go g.watch(watched)
	code := c.wait()
	close(watched)
	end := channel.End{Code: code, OOM: code == 128+int(unix.SIGKILL) && g.groups.OOMs(workload) > 0}
	unix.Sync()
	_ = g.conn.Say(channel.Ended, 0, end)
	time.Sleep(5 * time.Second) // the monitor ends the machine
	powerOff()
}

// watch tells what the workload uses, when that has changed.
func (g *guest) watch(ended chan struct{}) {
	var told backends.Usage
	for wait := 200 * time.Millisecond; ; wait = 2 * time.Second {
		select {
		case <-ended:
			return
		case <-time.After(wait):
		}
		now := g.groups.Usage(workload)
		now.CPU = 0 // the host knows
		if change := now.Memory - told.Memory; now.PIDs != told.PIDs || max(change, -change) > told.Memory/16 {
			told = now
			_ = g.conn.Say(channel.Usage, 0, now)
		}
	}
}

// exec runs a command beside the program, or before it.
func (g *guest) exec(id uint32, argv []string) {
	fault := func(f stage.Failure) { _ = g.conn.Say(channel.Fault, id, f) }
	program := g.find(0)
	if id == 0 || program == nil || len(argv) == 0 {
		fault(stage.Failure{Step: "exec", Cause: "there is nothing to run it in"})
		return
	}
	orders := g.setup.Stage
	orders.Root, orders.Pause, orders.Join, orders.Argv = nil, false, true, argv
	var c *child
	in, err := program.hold()
	if err == nil {
		c, err = spawn(orders, g.groups.Joins(workload), in)
		_ = unix.Close(in)
	}
	if err != nil {
		fault(stage.Failure{Step: "starting a stage", Cause: err.Error()})
		return
	}
	g.add(id, c)
	defer func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		delete(g.running, id)
	}()
	go c.copy(g.conn.Writer(id))
	f := c.begin()
	code := c.wait()
	if f != nil {
		fault(*f)
		return
	}
	_ = g.conn.Say(channel.Ended, id, channel.End{Code: code})
}

func (g *guest) signal(id uint32, number unix.Signal) {
	if c := g.find(id); c != nil {
		c.signal(number, id != 0)
	}
}

// network gives the machine its loopback and its one interface.
func network(address, gateway string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := interfaceUp(fd, "lo", netip.MustParsePrefix("127.0.0.1/8")); err != nil || address == "" {
		return err
	}
	prefix, err := netip.ParsePrefix(address)
	if err != nil {
		return err
	}
	for range 200 {
		if err = interfaceUp(fd, "eth0", prefix); !errors.Is(err, unix.ENODEV) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		return err
	}
	to, err := netip.ParseAddr(gateway)
	if err != nil {
		return err
	}
	return route(fd, to)
}

func interfaceUp(fd int, name string, address netip.Prefix) error {
	set := func(request uint, fill func(r *unix.Ifreq) error) error {
		r, err := unix.NewIfreq(name)
		if err == nil {
			err = fill(r)
		}
		if err == nil {
			err = unix.IoctlIfreq(fd, request, r)
		}
		return err
	}
	ip, mask := address.Addr().As4(), ^uint32(0)<<(32-address.Bits())
	for _, step := range []struct {
		request uint
		fill    func(r *unix.Ifreq) error
	}{
		{unix.SIOCSIFADDR, func(r *unix.Ifreq) error { return r.SetInet4Addr(ip[:]) }},
		{unix.SIOCSIFNETMASK, func(r *unix.Ifreq) error {
			return r.SetInet4Addr([]byte{byte(mask >> 24), byte(mask >> 16), byte(mask >> 8), byte(mask)})
		}},
		{unix.SIOCSIFFLAGS, func(r *unix.Ifreq) error { r.SetUint16(unix.IFF_UP | unix.IFF_RUNNING); return nil }},
	} {
		if err := set(step.request, step.fill); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// route sends everything that has no other way to a gateway.
func route(fd int, gateway netip.Addr) error {
	entry := struct { // rtentry, linux/route.h, of a 64-bit kernel
		_                  uint64
		dst, gateway, mask [16]byte
		flags              uint16
		_                  int16
		_                  [28]byte
		device             uintptr
		mtu, window        uint64
		_                  [8]byte
	}{flags: unix.RTF_UP | unix.RTF_GATEWAY}
	entry.dst[0], entry.gateway[0], entry.mask[0] = unix.AF_INET, unix.AF_INET, unix.AF_INET
	copy(entry.gateway[4:], gateway.AsSlice())
	if _, _, no := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCADDRT, uintptr(unsafe.Pointer(&entry))); no != 0 {
		return fmt.Errorf("route to %v: %v", gateway, no)
	}
	return nil
}
