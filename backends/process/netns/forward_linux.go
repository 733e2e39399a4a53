package netns

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Publish takes connections on an address of the host, "127.0.0.1:8080" or ":8080", and makes them on a port of the loopback inside.
func (n *Network) Publish(address string, port int) error {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	n.open = append(n.open, listener)
	go func() {
		for {
			outer, err := listener.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil { // out of descriptors, or the peer has gone
				time.Sleep(10 * time.Millisecond)
				continue
			}
			go n.forward(outer, port)
		}
	}()
	return nil
}

func (n *Network) forward(outer net.Conn, port int) {
	inner, err := n.dial(port)
	if err != nil {
		if tcp, ok := outer.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0) // the peer is to see that nobody was there
		}
		_ = outer.Close()
		return
	}
	var both sync.WaitGroup
	both.Go(func() { pour(inner, outer) })
	both.Go(func() { pour(outer, inner) })
	both.Wait()
	_, _ = outer.Close(), inner.Close()
}

// pour copies until the one ends, and tells the other. What is broken is broken for both.
func pour(to, from net.Conn) {
	_, err := io.Copy(to, from)
	half, ok := to.(*net.TCPConn)
	if err == nil && ok {
		_ = half.CloseWrite()
		return
	}
	_, _ = to.Close(), from.Close()
}

// dial connects to a port of the loopback inside. The socket is made on the thread in the namespace, and stays of there.
func (n *Network) dial(port int) (net.Conn, error) {
	fd := -1
	if err := n.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		return err
	}); err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "inner")
	defer f.Close() // the connection has a duplicate
	patience := unix.NsecToTimeval(int64(5 * time.Second))
	err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &patience) // of connect, too
	if err == nil {
		err = unix.Connect(fd, &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}})
	}
	if err != nil {
		return nil, fmt.Errorf("connecting to port %d inside: %v", port, err)
	}
	return net.FileConn(f)
}
