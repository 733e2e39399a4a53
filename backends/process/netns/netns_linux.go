package netns

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Network is a network namespace. It is there until Close, or until this process and all who joined it have ended.
type Network struct {
	thread int
	calls  chan func()
	closed chan struct{}
	slirp  *exec.Cmd
	open   []io.Closer // listeners
}

// Open makes one, with its loopback up, in which every port may be listened on.
func Open() (*Network, error) {
	n := &Network{calls: make(chan func()), closed: make(chan struct{})}
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
	// Of the namespace of whoever opens it.
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_unprivileged_port_start", []byte("0"), 0); err != nil {
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
		_ = n.slirp.Wait()
	}
	close(n.closed)
	return err
}

// reachTime bounds how long slirp4netns takes to begin.
const reachTime = 10 * time.Second

// Reach gives the network a way out. It returns ErrNoWayOut where nothing makes one. What that says goes to log.
func (n *Network) Reach(ctx context.Context, log io.Writer) error {
	path, err := exec.LookPath(Slirp)
	if err != nil {
		return ErrNoWayOut
	}
	ready, tell, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	said := &strings.Builder{}
	n.slirp = exec.CommandContext(ctx, path, "--configure", "--mtu=65520", "--disable-host-loopback", "--ready-fd=3", "--netns-type=path", n.Path(), "tap0")
	n.slirp.Env, n.slirp.Dir = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}, "/"
	n.slirp.Stderr, n.slirp.ExtraFiles = io.MultiWriter(said, log), []*os.File{tell}
	err = n.slirp.Start()
	if err = errors.Join(err, tell.Close(), ready.SetReadDeadline(time.Now().Add(reachTime))); err != nil {
		return err
	}
	if _, err := ready.Read(make([]byte, 1)); err != nil {
		_ = n.slirp.Process.Kill()
		_ = n.slirp.Wait()
		n.slirp = nil
		return fmt.Errorf("%s: not ready: %v: %s", path, err, strings.TrimSpace(said.String()))
	}
	return nil
}
