package gvisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends/process/stage"
)

// network is a network namespace of one sandbox with slirp4netns behind it. runsc takes the addresses off what is in it: each sandbox
// needs one of its own.
type network struct {
	namespace *os.File
	folder    *os.File
	slirp     *exec.Cmd
	gone      chan error // gets how slirp4netns ended
}

// path is the namespace's, for runsc and slirp4netns.
func (n *network) path() string {
	return "/proc/" + strconv.Itoa(os.Getpid()) + "/fd/" + strconv.Itoa(int(n.namespace.Fd()))
}

const (
	inside     = "10.0.2.100" // the sandbox's address, as slirp4netns has it
	apiSocket  = "slirp.sock"
	slirpWords = "slirp.log"
	readyTime  = 20 * time.Second
)

// openNetwork makes a network whose things lie in a folder. It ends with the calling thread's process.
func openNetwork(r runtime, dir string) (n *network, err error) {
	n = &network{gone: make(chan error, 1)}
	defer func() {
		if err != nil {
			n.close()
		}
	}()
	shown := false
	stage.OnThread(func() {
		if err = unix.Unshare(unix.CLONE_NEWNET); err == nil {
			n.namespace, err = os.Open("/proc/thread-self/ns/net")
			shown = unix.Access(rootMark, unix.F_OK) == nil
		}
	})
	if err == nil && shown {
		err = hide()
	}
	if err == nil {
		n.folder, err = os.Open(dir)
	}
	if err != nil {
		return n, fmt.Errorf("making a network namespace: %v", err)
	}
	return n, n.connect(r, dir)
}

// rootMark was in the host's network namespace alone until Linux 6.9. By it runsc knows that namespace, which it refuses.
const rootMark = "/proc/sys/net/core/rmem_default"

// hide keeps runsc from taking any namespace for the host's. Below /proc/sys/net every namespace has folders of its own, so that
// nothing less can be covered for all.
func hide() error {
	return unix.Mount("tmpfs", "/proc/sys/net", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_RDONLY, "mode=0555")
}

// connect starts slirp4netns and waits until it is ready.
func (n *network) connect(r runtime, dir string) error {
	words, err := os.Create(filepath.Join(dir, slirpWords))
	if err != nil {
		return err
	}
	defer words.Close()
	ready, readied, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	n.slirp = exec.CommandContext(context.Background(), r.Slirp, "--configure", "--mtu=65520", "--disable-host-loopback", "--enable-sandbox", "--enable-seccomp",
		"--ready-fd=3", "--api-socket="+apiSocket, "--netns-type=path", n.path(), "tap0")
	n.slirp.Dir, n.slirp.Env = dir, []string{} // the path of a socket is to be short
	n.slirp.Stdout, n.slirp.Stderr, n.slirp.ExtraFiles = words, words, []*os.File{readied}
	n.slirp.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	err = n.slirp.Start()
	_ = readied.Close()
	if err != nil {
		n.slirp = nil
		return err
	}
	go func() {
		err := n.slirp.Wait()
		text, _ := os.ReadFile(words.Name())
		n.gone <- fmt.Errorf("slirp4netns ended: %v: %s", err, lastLine(text))
	}()
	if err := ready.SetReadDeadline(time.Now().Add(readyTime)); err != nil {
		return err
	}
	if _, err := ready.Read(make([]byte, 1)); errors.Is(err, io.EOF) {
		return <-n.gone
	} else if err != nil {
		return fmt.Errorf("waiting for slirp4netns: %v", err)
	}
	return nil
}

func lastLine(text []byte) string {
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return lines[len(lines)-1]
}

// publish makes a port of the sandbox one of this host's.
func (n *network) publish(public bool, host, port int) error {
	address := "127.0.0.1"
	if public {
		address = "0.0.0.0"
	}
	request, err := json.Marshal(map[string]any{"execute": "add_hostfwd", "arguments": map[string]any{
		"proto": "tcp", "host_addr": address, "host_port": host, "guest_addr": inside, "guest_port": port,
	}})
	if err != nil {
		return err
	}
	// By the folder's descriptor: the path of a socket has 107 bytes at most.
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Net: "unix", Name: fmt.Sprintf("/proc/self/fd/%d/%s", n.folder.Fd(), apiSocket)})
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }() // what matters has been answered
	_, err = conn.Write(request)
	if err = errors.Join(conn.SetDeadline(time.Now().Add(readyTime)), err, conn.CloseWrite()); err != nil {
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

// close ends a network before its process ends.
func (n *network) close() {
	if n.slirp != nil {
		_ = n.slirp.Process.Kill()
	}
	_, _ = n.namespace.Close(), n.folder.Close()
}
