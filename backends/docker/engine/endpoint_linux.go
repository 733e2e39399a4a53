// Package engine is the way to a container engine: its socket, what it may do on this host, and its streams.
package engine

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/moby/moby/client"
	"golang.org/x/sys/unix"
)

// Endpoint is where an engine is asked.
type Endpoint struct {
	Name   string // docker or podman
	Socket string // "" is where it usually is
}

// Client asks the engine. It need not be there yet. Each answer tells heard, if that is not nil, what program gave it: "Libpod/4.3.1 (linux)".
// One that is longer than MaxAnswer is an error.
func (e Endpoint) Client(heard func(server string)) (*client.Client, error) {
	listen := func(r *http.Response) {
		if server := r.Header.Get("Server"); server != "" && heard != nil {
			heard(server)
		}
	}
	return client.New(client.WithHost("unix:///engine"), client.WithDialContext(e.line), client.WithHTTPRequestHook(e.bound), client.WithHTTPResponseHook(listen))
}

// Sockets are where the engine may be, likeliest first.
func (e Endpoint) Sockets() []string {
	user := os.Getenv("XDG_RUNTIME_DIR")
	mine := os.Geteuid() != 0 && user != ""
	switch {
	case e.Socket != "":
		return []string{e.Socket}
	case e.Name == "docker" && mine:
		return []string{filepath.Join(user, "docker.sock"), "/var/run/docker.sock"}
	case e.Name == "docker":
		return []string{"/var/run/docker.sock"}
	case mine:
		return []string{filepath.Join(user, "podman", "podman.sock")}
	}
	return []string{"/run/podman/podman.sock"}
}

func (e Endpoint) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	var all error
	for _, socket := range e.Sockets() {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
		if err == nil {
			return conn, nil
		}
		all = errors.Join(all, err)
	}
	return nil, &DownError{Endpoint: e, Cause: all}
}

// Down says why the engine does not answer: the client's own words speak of no socket.
func (e Endpoint) Down(ctx context.Context, err error) error {
	conn, dialErr := e.dial(ctx, "", "")
	if dialErr == nil {
		_ = conn.Close()
		return &DownError{Endpoint: e, Cause: fmt.Errorf("it was away just now: %w", err)}
	}
	return dialErr
}

// DownError says that the engine does not answer.
type DownError struct {
	Endpoint Endpoint
	Cause    error
}

// Error says where it was looked for, and what would help.
func (e *DownError) Error() string {
	how := "install Docker Engine (docker.io) and start dockerd"
	if e.Endpoint.Name == "podman" {
		how = "install podman and start its service: podman system service --time=0 unix://" + e.Endpoint.Sockets()[0]
	}
	return fmt.Sprintf("%s does not answer: %v; %s", e.Endpoint.Name, e.Cause, how)
}

// Unwrap returns the cause.
func (e *DownError) Unwrap() error { return e.Cause }

// Lacking names the capabilities of this kernel that the engine itself does not have, and so cannot give.
func (e Endpoint) Lacking(ctx context.Context) (names []string, err error) {
	pid, err := e.peer(ctx)
	if err != nil {
		return nil, err
	}
	have, err := bounding(pid)
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile("/proc/sys/kernel/cap_last_cap")
	if err != nil {
		return nil, err
	}
	last, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return nil, err
	}
	for left := (uint64(1)<<(last+1) - 1) &^ have; left != 0; left &= left - 1 {
		first := bits.TrailingZeros64(left)
		name := "capability " + strconv.Itoa(first)
		if known := Capabilities(); first < len(known) {
			name = known[first]
		}
		names = append(names, name)
	}
	return names, nil
}

// peer is the process that listens on the engine's socket.
func (e Endpoint) peer(ctx context.Context) (int, error) {
	conn, err := e.dial(ctx, "", "")
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	socket, ok := conn.(*net.UnixConn)
	if !ok {
		return 0, errors.New("no unix socket")
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return 0, err
	}
	var peer *unix.Ucred
	var inner error
	err = raw.Control(func(fd uintptr) { peer, inner = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(err, inner); err != nil {
		return 0, err
	}
	return int(peer.Pid), nil
}

// bounding is the bounding set of a process.
func bounding(pid int) (uint64, error) {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return 0, err
	}
	for line := range strings.SplitSeq(string(text), "\n") {
		if mask, ok := strings.CutPrefix(line, "CapBnd:"); ok {
			return strconv.ParseUint(strings.TrimSpace(mask), 16, 64)
		}
	}
	return 0, fmt.Errorf("process %d says no bounding set", pid)
}

// Arch is an architecture as Go names it.
func Arch(name string) string {
	switch name {
	case "x86_64":
		return "amd64"
	case "aarch64":
		return "arm64"
	}
	return name
}

// Capabilities are the kernel's, by number.
func Capabilities() []string {
	return strings.Fields(`CAP_CHOWN CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_FOWNER CAP_FSETID CAP_KILL CAP_SETGID CAP_SETUID CAP_SETPCAP
		CAP_LINUX_IMMUTABLE CAP_NET_BIND_SERVICE CAP_NET_BROADCAST CAP_NET_ADMIN CAP_NET_RAW CAP_IPC_LOCK CAP_IPC_OWNER CAP_SYS_MODULE
		CAP_SYS_RAWIO CAP_SYS_CHROOT CAP_SYS_PTRACE CAP_SYS_PACCT CAP_SYS_ADMIN CAP_SYS_BOOT CAP_SYS_NICE CAP_SYS_RESOURCE CAP_SYS_TIME
		CAP_SYS_TTY_CONFIG CAP_MKNOD CAP_LEASE CAP_AUDIT_WRITE CAP_AUDIT_CONTROL CAP_SETFCAP CAP_MAC_OVERRIDE CAP_MAC_ADMIN CAP_SYSLOG
		CAP_WAKE_ALARM CAP_BLOCK_SUSPEND CAP_AUDIT_READ CAP_PERFMON CAP_BPF CAP_CHECKPOINT_RESTORE`)
}
