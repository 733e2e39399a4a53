package machine

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/kindos/kmo/backends/microvm/channel"
)

// Firecracker makes a machine by its API, HTTP on a unix socket: everything is PUT before the action InstanceStart. It has virtio devices, a
// vsock, by which the guest calls the host, and neither user networking nor shared folders: ports are published over the vsock.
type Firecracker struct {
	Program string

	environment []string // more of it, for a test

	config  Config
	words   words
	client  *http.Client
	calls   *net.UnixListener
	ports   []net.Listener
	mu      sync.Mutex // guards what follows
	started *exec.Cmd
	stopped bool
}

// The names of sockets in Firecracker's own folder, which is one in the machine's. The guest's port of the host's is vsock, an underscore
// and the number.
const (
	apiSocket = "firecracker.sock"
	vsock     = "vsock"
	ownFolder = "vmm"
)

// guestCID is the guest's number on its vsock, of which each machine has its own.
const guestCID = 3

// request is one call of the API.
type request struct {
	method, path string
	body         any
}

// Requests are what makes a machine, in order.
func (f *Firecracker) requests(c Config) []request {
	type object = map[string]any
	return []request{
		{http.MethodPut, "/machine-config", object{"vcpu_count": c.CPUs, "mem_size_mib": c.Memory}},
		{http.MethodPut, "/boot-source", object{
			"kernel_image_path": byFD(3), "initrd_path": byFD(4), "boot_args": "console=ttyS0 quiet reboot=k panic=-1 " + c.Command,
		}},
		{http.MethodPut, "/drives/base", object{"drive_id": "base", "path_on_host": byFD(5), "is_root_device": false, "is_read_only": true}},
		{http.MethodPut, "/vsock", object{"guest_cid": guestCID, "uds_path": vsock}},
	}
}

// Create starts Firecracker and tells it of the machine.
func (f *Firecracker) Create(ctx context.Context, c Config) error {
	if c.Shares != "" {
		return errors.New("firecracker has no shared folders")
	}
	f.config = c
	calls := filepath.Join(ownFolder, fmt.Sprintf("%s_%d", vsock, channel.Vsock))
	err := os.Mkdir(ownFolder, 0o700)
	if err == nil {
		f.calls, err = net.ListenUnix("unix", &net.UnixAddr{Name: calls, Net: "unix"})
	}
	if err == nil && c.User != 0 {
		err = errors.Join(os.Chown(ownFolder, c.User, Group), os.Chown(calls, c.User, Group))
	}
	if err != nil {
		return err
	}
	f.client = &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(ownFolder, apiSocket))
	}}}
	if err := f.launch(); err != nil {
		return err
	}
	for f.ask(ctx, request{http.MethodGet, "/", nil}) != nil {
		if !f.lives() || ctx.Err() != nil {
			return errors.Join(ctx.Err(), fmt.Errorf("%s does not answer: %s", f.Program, f.Stop()))
		}
		time.Sleep(5 * time.Millisecond) // its socket appears when it listens
	}
	for _, r := range f.requests(c) {
		if err := f.ask(ctx, r); err != nil {
			return err
		}
	}
	return nil
}

func (f *Firecracker) launch() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.stopped {
		return errors.New("the machine is to be stopped")
	}
	files, err := lent(f.config)
	if err != nil {
		return err
	}
	cmd := command(filepath.Join(f.config.Dir, ownFolder), f.Program, []string{"--api-sock", apiSocket, "--id", "kmo"}, files, &f.words, f.environment...)
	if err := errors.Join(begin(cmd, f.config, true), closed(files)); err != nil {
		return err
	}
	f.started = cmd
	return nil
}

func (f *Firecracker) lives() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.started == nil {
		return false
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", f.started.Process.Pid))
	return err == nil && !strings.Contains(string(text), ") Z ")
}

// ask makes one call. What is no success is an error with what Firecracker says.
func (f *Firecracker) ask(ctx context.Context, r request) error {
	body, err := json.Marshal(r.body)
	if err != nil {
		return err
	}
	reader := io.Reader(bytes.NewReader(body))
	if r.body == nil {
		reader = nil
	}
	call, err := http.NewRequestWithContext(ctx, r.method, "http://firecracker"+r.path, reader)
	if err != nil {
		return err
	}
	call.Header.Set("Content-Type", "application/json")
	call.Header.Set("Accept", "application/json")
	answer, err := f.client.Do(call)
	if err != nil {
		return fmt.Errorf("%s %s: %v", r.method, r.path, err)
	}
	defer answer.Body.Close()
	said, err := io.ReadAll(io.LimitReader(answer.Body, 1<<20))
	switch {
	case err != nil:
		return fmt.Errorf("%s %s: %v", r.method, r.path, err)
	case answer.StatusCode/100 != 2:
		var fault struct {
			Message string `json:"fault_message"`
		}
		_ = json.Unmarshal(said, &fault) // what is no JSON has no message
		return fmt.Errorf("%s %s: %s: %s", r.method, r.path, answer.Status, fault.Message)
	}
	return nil
}

// Start lets the processor run.
func (f *Firecracker) Start(ctx context.Context) error {
	return f.ask(ctx, request{http.MethodPut, "/actions", map[string]any{"action_type": "InstanceStart"}})
}

// Connect waits until the guest calls, and publishes the ports from then on.
func (f *Firecracker) Connect(ctx context.Context) (io.ReadWriteCloser, error) {
	defer context.AfterFunc(ctx, func() { _ = f.calls.Close() })()
	gone := make(chan struct{})
	defer close(gone)
	go func() {
		for f.lives() {
			select {
			case <-gone:
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
		_ = f.calls.Close()
	}()
	stream, err := f.calls.Accept()
	if err != nil {
		return nil, errors.Join(ctx.Err(), fmt.Errorf("waiting for the guest's call: %v", err))
	}
	for _, forward := range f.config.Forwards {
		listener, err := net.Listen("tcp", net.JoinHostPort(forward.Address, fmt.Sprint(forward.Host)))
		if err != nil {
			return nil, errors.Join(err, stream.Close())
		}
		f.ports = append(f.ports, listener)
		go f.publish(listener, forward.Guest)
	}
	return stream, nil
}

// publish carries connections of a port to the guest, which is asked for the port by its number, in one line.
func (f *Firecracker) publish(listener net.Listener, port int) {
	for {
		from, err := listener.Accept()
		if err != nil {
			return
		}
		go func() {
			defer from.Close()
			to, err := f.call(channel.Publish)
			if err != nil {
				return
			}
			defer to.Close()
			if _, err := fmt.Fprintf(to, "%d\n", port); err != nil {
				return
			}
			splice(from, to)
		}()
	}
}

// call connects to a port of the guest's, as Firecracker has it: CONNECT and the port, answered by OK and a number.
func (f *Firecracker) call(port int) (net.Conn, error) {
	conn, err := net.Dial("unix", filepath.Join(ownFolder, vsock))
	if err != nil {
		return nil, err
	}
	line := make([]byte, 0, 32)
	_, err = fmt.Fprintf(conn, "CONNECT %d\n", port)
	for one := make([]byte, 1); err == nil && len(line) < cap(line) && !bytes.HasSuffix(line, []byte("\n")); {
		if _, err = conn.Read(one); err == nil {
			line = append(line, one[0]) // no more than the line: what follows is the guest's
		}
	}
	if err == nil && !bytes.HasPrefix(line, []byte("OK ")) {
		err = fmt.Errorf("vsock port %d: %q", port, line)
	}
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}

// splice carries both ways, and the end of each.
func splice(a, b net.Conn) {
	done := make(chan struct{})
	carry := func(to, from net.Conn) {
		_, _ = io.Copy(to, from) // an end, however it comes
		if half, ok := to.(interface{ CloseWrite() error }); ok {
			_ = half.CloseWrite()
		}
	}
	go func() { carry(a, b); close(done) }()
	carry(b, a)
	<-done
}

// Stop kills what Create has started.
func (f *Firecracker) Stop() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.stopped = true
	if f.started != nil {
		_ = f.started.Process.Kill()
		_ = f.started.Wait()
		f.started = nil
	}
	if f.calls != nil {
		_ = f.calls.Close()
	}
	for _, listener := range f.ports {
		_ = listener.Close()
	}
	return f.words.String()
}
