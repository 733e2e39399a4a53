package process

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/kindos/kmo/backends"
)

func listen(t *testing.T, address string) (l net.Listener, port int) {
	t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l, l.Addr().(*net.TCPAddr).Port
}

func TestTakenPort(t *testing.T) {
	for _, host := range []string{"127.0.0.1", "0.0.0.0", ""} {
		t.Run("on "+host, func(t *testing.T) {
			k := fresh(t)
			stranger, port := listen(t, host+":0")
			w := workload("web", "wait")
			w.Run.Ports = []backends.Port{{Name: "other"}, {Name: "http", Port: port}}
			want := fmt.Sprintf("port http: port %d is taken by another program", port)
			err := k.Apply(t.Context(), w)
			var fault *backends.StartError
			if err == nil || errors.As(err, &fault) || !strings.Contains(err.Error(), want) {
				t.Fatalf("apply: %v, want an error that blames nobody with %q", err, want)
			}
			if s := status(t, k, w.Name); s.Name != "" {
				t.Errorf("it is there: %+v", s)
			}
			if err := stranger.Close(); err != nil {
				t.Fatal(err)
			}
			apply(t, k, w)

			again, _ := listen(t, fmt.Sprintf("%s:%d", host, port))
			if err := syscall.Kill(status(t, k, w.Name).PID, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			until(t, "no start beside a stranger", func() (string, bool) {
				s := status(t, k, w.Name)
				return s.Detail, s.State == backends.Backoff && s.PID == 0 && strings.Contains(s.Detail, want)
			})
			if err := again.Close(); err != nil {
				t.Fatal(err)
			}
			until(t, "a start without it", func() (string, bool) {
				s := status(t, k, w.Name)
				return s.Detail, s.State == backends.Running
			})
		})
	}
}

// A connection that the port's last owner closed lingers for a minute, and is in nobody's way.
func TestLingeringPort(t *testing.T) {
	k := fresh(t)
	l, port := listen(t, "127.0.0.1:0")
	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	_ = server.Close() // first: it is the one that waits
	if _, err := io.ReadAll(client); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(client.Close(), l.Close()); err != nil {
		t.Fatal(err)
	}
	until(t, "a connection in TIME_WAIT", func() (string, bool) {
		text, err := os.ReadFile("/proc/net/tcp")
		for line := range strings.SplitSeq(string(text), "\n") {
			if fields := strings.Fields(line); len(fields) > 3 && fields[1] == fmt.Sprintf("0100007F:%04X", port) && fields[3] == "06" {
				return "", true
			}
		}
		return "", err != nil
	})
	w := workload("web", "wait")
	w.Run.Ports = []backends.Port{{Name: "http", Host: port}}
	apply(t, k, w)
}

// Whoever observes a workload that is just applied sees all of it or nothing.
func TestObserveBesideApply(t *testing.T) {
	k := fresh(t)
	w := workload("web")
	w.Image.Config.Entrypoint = []string{"/none"} // starts nothing, so that there are many first moments
	for i := range 50 {
		w.Run.Ports = append(w.Run.Ports, backends.Port{Name: fmt.Sprint("port-", i)})
	}
	ctx, cancel := context.WithCancel(t.Context())
	var observers sync.WaitGroup
	for range 16 {
		observers.Go(func() {
			for ctx.Err() == nil {
				if list, err := k.Observe(t.Context()); err != nil || len(list) == 1 && len(list[0].Addresses) != len(w.Run.Ports) {
					t.Errorf("%+v, %v", list, err)
				}
			}
		})
	}
	for range 8 {
		if err := k.Apply(t.Context(), w); err == nil {
			t.Error("a program that is not there was started")
		}
	}
	cancel()
	observers.Wait()
}

// What is applied again with another base keeps its ports.
func TestChosenPortStays(t *testing.T) {
	k := fresh(t)
	w := workload("web", "wait")
	w.Format, w.Image.Content = backends.OCI, oci(t)
	w.Run.Ports = []backends.Port{{Name: "a"}, {Name: "b"}}
	apply(t, k, w)
	before := status(t, k, w.Name).Addresses
	w.Image.Content = oci(t)
	apply(t, k, w)
	if after := status(t, k, w.Name).Addresses; !slices.Equal(after, before) {
		t.Errorf("addresses %v, were %v", after, before)
	}
}

// A port that the unit left open is another one when a stranger has taken the first.
func TestChosenPortIsTaken(t *testing.T) {
	k := fresh(t)
	w := workload("web", "env", "wait")
	w.Run.Ports = []backends.Port{{Name: "http"}}
	apply(t, k, w)
	first := status(t, k, w.Name).Addresses[0].Address
	listen(t, first)
	if err := syscall.Kill(status(t, k, w.Name).PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	until(t, "a start on another port", func() (string, bool) {
		s := status(t, k, w.Name)
		_, port, _ := strings.Cut(s.Addresses[0].Address, ":")
		return s.Detail, s.State == backends.Running && s.Addresses[0].Address != first && strings.Contains(logOf(k, w.Name), "KMO_PORT_HTTP="+port+"|")
	})
}

// Where a stranger has both, the port that the unit names is waited for, though another could be chosen for the first.
func TestNamedPortIsTakenToo(t *testing.T) {
	k := fresh(t)
	free, port := listen(t, "127.0.0.1:0")
	if err := free.Close(); err != nil {
		t.Fatal(err)
	}
	w := workload("web", "wait")
	w.Run.Ports = []backends.Port{{Name: "other"}, {Name: "http", Port: port}}
	apply(t, k, w)
	first := status(t, k, w.Name)
	listen(t, first.Addresses[0].Address)
	stranger, _ := listen(t, first.Addresses[1].Address)
	if err := syscall.Kill(first.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	until(t, "no start beside a stranger", func() (string, bool) {
		s := status(t, k, w.Name)
		return s.Detail, s.State == backends.Backoff && s.PID == 0 && strings.Contains(s.Detail, fmt.Sprintf("port http: port %d is taken", port))
	})
	if err := stranger.Close(); err != nil {
		t.Fatal(err)
	}
	until(t, "a start on another port and the named one", func() (string, bool) {
		s := status(t, k, w.Name)
		return fmt.Sprint(s.Addresses, s.Detail), s.State == backends.Running && s.Addresses[0] != first.Addresses[0] && s.Addresses[1] == first.Addresses[1]
	})
}

// A program binds its own ports, or one that the kernel gives it. Go's listeners are of multipath TCP where there is such a thing.
func TestPortsOfOthers(t *testing.T) {
	k := fresh(t)
	if !k.support.HoldsPorts() {
		t.Skip("landlock is older than 4")
	}
	free, port := listen(t, "127.0.0.1:0")
	if err := free.Close(); err != nil {
		t.Fatal(err)
	}
	own := fmt.Sprintf("listen 127.0.0.1:%d", port)
	w := workload("web", own, "listen 127.0.0.1:23456", "listen 127.0.0.1:0", "wait")
	w.Run.Ports = []backends.Port{{Name: "http", Port: port}}
	apply(t, k, w)
	for step, want := range map[string]string{own: "ok", "listen 127.0.0.1:23456": "error: listen tcp 127.0.0.1:23456: bind: permission denied", "listen 127.0.0.1:0": "ok"} {
		if got := said(t, k, w.Name, step); got != want {
			t.Errorf("%s: got %q, want %q", step, got, want)
		}
	}
	if code, output, err := k.Exec(t.Context(), w.Name, []string{"/app", "listen 127.0.0.1:23456"}); err != nil || !strings.Contains(string(output), "permission denied") {
		t.Errorf("exec: %d, %q, %v", code, output, err)
	}
	if list := k.Missing(); len(list) != 2 || !strings.HasPrefix(list[0], "network: ") || !strings.HasPrefix(list[1], "low-ports: ") {
		t.Errorf("missing is %q, want the network and the low ports", list)
	}
}
