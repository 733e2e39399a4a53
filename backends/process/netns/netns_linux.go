package netns

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Network is a network namespace. It is there until Close, or until this process and all who joined it have ended.
type Network struct {
	thread int
	calls  chan func()
	closed chan struct{}
	open   []io.Closer // listeners

	slirp  *exec.Cmd
	folder *os.File      // of its socket
	gone   chan error    // gets how it ended
	ended  chan struct{} // closed then
}

// Open makes one, with its loopback up, in which every port may be listened on.
func Open() (*Network, error) {
	n := &Network{calls: make(chan func()), closed: make(chan struct{}), gone: make(chan error, 1), ended: make(chan struct{})}
	made := make(chan error)
	go func() {
		runtime.LockOSThread() // and ends with this goroutine
		err := n.enter()
		made <- err
		if err != nil {
			return
		}
		for {
			select {
			case call := <-n.calls:
				call()
			case <-n.closed:
				return
			}
		}
	}()
	return n, <-made
}

// enter makes the namespace this thread's.
func (n *Network) enter() error {
	n.thread = unix.Gettid()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("making a network namespace: %v", err)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	loopback, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	loopback.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, loopback); err != nil {
		return fmt.Errorf("bringing the loopback up: %v", err)
	}
	// Of the namespace of whoever opens it. Who has covered these files brings a TCP of its own.
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_unprivileged_port_start", []byte("0"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("opening low ports: %v", err)
	}
	return nil
}

// Thread is the thread whose namespace it is.
func (n *Network) Thread() int { return n.thread }

// Path is where the namespace can be joined, as long as it is open, by whoever sees this process in /proc.
func (n *Network) Path() string {
	return "/proc/" + strconv.Itoa(os.Getpid()) + "/task/" + strconv.Itoa(n.thread) + "/ns/net"
}

// Do calls f on the thread in the namespace, one call at a time: sockets it makes, and processes it starts, are in there.
func (n *Network) Do(f func() error) error {
	done := make(chan error, 1)
	select {
	case n.calls <- func() { done <- f() }:
		return <-done
	case <-n.closed:
		return net.ErrClosed
	}
}

// Close ends the forwarding and the way out.
func (n *Network) Close() error {
	var err error
	for _, c := range n.open {
		err = errors.Join(err, c.Close())
	}
	if n.slirp != nil {
		_ = n.slirp.Process.Kill() // it may have ended
		<-n.ended
	}
	if n.folder != nil {
		err = errors.Join(err, n.folder.Close())
	}
	close(n.closed)
	return err
}

// reachTime bounds how long slirp4netns takes to begin, and to answer.
const reachTime = 20 * time.Second

// WayOut is how a network reaches the world.
type WayOut struct {
	Slirp  string // the path of slirp4netns; "" is looked for in PATH
	Folder string // where its socket lies, by which Forward publishes; "" is none
	// Bound says that it is to end with the calling thread, which must be the caller's alone (runtime.LockOSThread).
	Bound bool
}

// socket is slirp4netns's own, in WayOut.Folder.
const socket = "slirp.sock"

// tail is the last of what is written to it.
type tail struct{ text []byte }

func (t *tail) Write(text []byte) (int, error) {
	const most = 1 << 10
	t.text = append(t.text, text...)
	t.text = append(t.text[:0], t.text[max(0, len(t.text)-most):]...)
	return len(text), nil
}

// device is what slirp4netns answers.
const device = "tap0"

// makeDevice makes the device, which then stays until its namespace goes. One that slirp4netns made would go with it, and whoever waits for
// its end would wait for that: 15 to 20 ms, while all CPUs forget the device.
func makeDevice() error {
	syscall.ForkLock.RLock() // a child would hold it a little longer, and slirp4netns find it busy
	defer syscall.ForkLock.RUnlock()
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("/dev/net/tun: %v", err)
	}
	defer unix.Close(fd)
	tap, err := unix.NewIfreq(device)
	if err != nil {
		return err
	}
	tap.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, tap); err != nil {
		return err
	}
	return unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1)
}

// Reach gives the network a way out until Close; ctx is of the beginning only. It returns ErrNoWayOut where nothing makes one.
func (n *Network) Reach(ctx context.Context, o WayOut) error {
	path, err := exec.LookPath(cmp.Or(o.Slirp, Slirp))
	if err != nil {
		return ErrNoWayOut
	}
	if err := n.Do(makeDevice); err != nil {
		return fmt.Errorf("making a device for slirp4netns: %v", err)
	}
	ready, tell, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	args := []string{"--configure", "--mtu=65520", "--disable-host-loopback", "--enable-sandbox", "--enable-seccomp", "--ready-fd=3", "--netns-type=path"}
	dir := "/"
	if o.Folder != "" {
		if n.folder, err = os.Open(o.Folder); err != nil {
			return errors.Join(err, tell.Close())
		}
		dir, args = o.Folder, append(args, "--api-socket="+socket) // relative: the path of a socket has 107 bytes at most
	}
	said := &tail{}
	slirp := exec.CommandContext(context.WithoutCancel(ctx), path, append(args, n.Path(), device)...)
	slirp.Env, slirp.Dir = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}, dir
	slirp.Stdout, slirp.Stderr, slirp.ExtraFiles = said, said, []*os.File{tell}
	if o.Bound {
		slirp.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	}
	if err := slirp.Start(); err != nil {
		return errors.Join(err, tell.Close())
	}
	n.slirp = slirp
	go func() {
		err := slirp.Wait()
		lines := strings.Split(strings.TrimSpace(string(said.text)), "\n")
		n.gone <- fmt.Errorf("slirp4netns ended: %v: %s", err, lines[len(lines)-1])
		close(n.ended)
	}()
	if err := errors.Join(tell.Close(), ready.SetReadDeadline(time.Now().Add(reachTime))); err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = ready.SetReadDeadline(time.Now()) })()
	if _, err := ready.Read(make([]byte, 1)); errors.Is(err, io.EOF) {
		return <-n.gone
	} else if ctx.Err() != nil {
		return ctx.Err()
	} else if err != nil {
		return fmt.Errorf("waiting for slirp4netns: %v", err)
	}
	return nil
}

// Gone gets how the way out ended, if it has one and that ends.
func (n *Network) Gone() <-chan error { return n.gone }

// Forward has the way out publish a port at the network's address, for what has taken that address off the device: the forwarder of Publish
// does not reach it. Connections are taken before anybody inside listens.
func (n *Network) Forward(public bool, host, port int) error {
	address := "127.0.0.1"
	if public {
		address = "0.0.0.0"
	}
	request, err := json.Marshal(map[string]any{"execute": "add_hostfwd", "arguments": map[string]any{
		"proto": "tcp", "host_addr": address, "host_port": host, "guest_addr": Address, "guest_port": port,
	}})
	if err != nil {
		return err
	}
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Net: "unix", Name: fmt.Sprintf("/proc/self/fd/%d/%s", n.folder.Fd(), socket)})
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }() // what matters has been answered
	_, err = conn.Write(request)
	if err = errors.Join(conn.SetDeadline(time.Now().Add(reachTime)), err, conn.CloseWrite()); err != nil {
		return err
	}
	var answer struct{ Error struct{ Desc string } }
	if err := json.NewDecoder(conn).Decode(&answer); err != nil {
		return err
	}
	if answer.Error.Desc != "" {
		return fmt.Errorf("publishing port %d as %s:%d: slirp4netns: %s", port, address, host, answer.Error.Desc)
	}
	return nil
}
