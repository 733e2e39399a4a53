package netns

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

func open(t *testing.T) *Network {
	t.Helper()
	n, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

// inside listens in the network and answers each connection with what it said, in capitals.
func inside(t *testing.T, n *Network, address string) {
	t.Helper()
	var listener net.Listener
	if err := n.Do(func() (err error) {
		listener, err = net.Listen("tcp4", address)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				text, err := io.ReadAll(conn)
				if err == nil {
					_, _ = conn.Write(bytes.ToUpper(text))
				}
			}()
		}
	}()
}

func published(t *testing.T, n *Network, port int) string {
	t.Helper()
	if err := n.Publish("127.0.0.1:0", port); err != nil {
		t.Fatal(err)
	}
	listener, ok := n.open[len(n.open)-1].(net.Listener)
	if !ok {
		t.Fatal("no listener")
	}
	return listener.Addr().String()
}

func ask(address, text string) (string, error) {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if _, err := conn.Write([]byte(text)); err != nil {
		return "", err
	}
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		return "", err
	}
	said, err := io.ReadAll(conn)
	return string(said), err
}

// A port is reached from the host, with all that is said both ways, and a low one is as good as another.
func TestPublish(t *testing.T) {
	n := open(t)
	inside(t, n, "127.0.0.1:80")
	address := published(t, n, 80)
	long := strings.Repeat("relay", 1<<16)
	for range 3 {
		if said, err := ask(address, long); err != nil || said != strings.ToUpper(long) {
			t.Fatalf("answer of %d bytes, %v; want %d", len(said), err, len(long))
		}
	}
	if conn, err := net.Dial("tcp", "127.0.0.1:80"); err == nil {
		_ = conn.Close()
		t.Error("port 80 of the host answers, which is another network's")
	}
}

// What nobody listens to inside is seen as that outside.
func TestNobodyInside(t *testing.T) {
	n := open(t)
	if said, err := ask(published(t, n, 81), "hello"); err == nil {
		t.Errorf("answer %q, want the connection reset", said)
	}
}

func TestPortTaken(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	if err := open(t).Publish(taken.Addr().String(), 80); err == nil {
		t.Error("no error for a port that is another's")
	}
}

// A way out has an address, a route and nothing of the host's loopback.
func TestReach(t *testing.T) {
	if _, err := exec.LookPath(Slirp); err != nil {
		t.Fatal(ErrNoWayOut)
	}
	outside, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer outside.Close()
	n := open(t)
	if err := n.Reach(t.Context(), WayOut{}); err != nil {
		t.Fatal(err)
	}
	if err := n.Do(func() error {
		routes, err := os.ReadFile("/proc/thread-self/net/route")
		if !strings.Contains(string(routes), "tap0\t00000000") {
			t.Errorf("routes %q have no default by tap0", routes)
		}
		_, port, _ := net.SplitHostPort(outside.Addr().String())
		if conn, err := net.Dial("tcp4", "10.0.2.2:"+port); err == nil {
			_ = conn.Close()
			t.Error("the host's loopback is reached from inside")
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

// The way out is there after the call that made it, and tells when it ends.
func TestReachOutlivesItsContext(t *testing.T) {
	n := open(t)
	ctx, cancel := context.WithCancel(t.Context())
	if err := n.Reach(ctx, WayOut{}); err != nil {
		t.Fatal(err)
	}
	cancel()
	select {
	case err := <-n.Gone():
		t.Fatalf("it ended with its context: %v", err)
	case <-time.After(200 * time.Millisecond):
	}
	if err := n.slirp.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := <-n.Gone(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("it ended with %v, want that it was killed", err)
	}
}
