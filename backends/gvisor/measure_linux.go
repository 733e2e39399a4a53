package gvisor

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"syscall"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func platform() string { return goruntime.GOOS + "/" + goruntime.GOARCH }

// measureTime is for one platform: one that this host does not let run may hang.
const measureTime = 20 * time.Second

// measure looks for runsc and slirp4netns, and runs a program of 3 instructions in a sandbox.
func measure(ctx context.Context, o Options) (r runtime, err error) {
	if r.Runsc, err = find(cmp.Or(o.Runsc, "runsc")); err != nil {
		return r, err
	}
	if r.Slirp, err = find(cmp.Or(o.Slirp, "slirp4netns")); err != nil {
		return r, err
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		return r, fmt.Errorf("a network for sandboxes: %v; want that device: modprobe tun", err)
	}
	said, err := exec.CommandContext(ctx, r.Runsc, "--version").Output()
	if err != nil {
		return r, fmt.Errorf("%s --version: %v", r.Runsc, err)
	}
	r.Version, _, _ = strings.Cut(string(said), "\n")
	if !strings.HasPrefix(r.Version, "runsc ") {
		return r, fmt.Errorf("%s --version says %.100q; want gVisor's runsc", r.Runsc, r.Version)
	}
	dir, err := os.MkdirTemp(o.State, "measure-")
	if err != nil {
		return r, err
	}
	var refused []error
	for _, r.Platform = range []string{"systrap", "ptrace"} {
		err := try(ctx, r, filepath.Join(dir, r.Platform))
		if err == nil {
			return r, os.RemoveAll(dir)
		}
		refused = append(refused, fmt.Errorf("%s: %v", r.Platform, err))
	}
	r.Platform = ""
	return r, fmt.Errorf("%s runs no sandbox on this host: %w", r.Runsc, errors.Join(append(refused, ctx.Err(), os.RemoveAll(dir))...))
}

// find looks for a program, whose Debian package has its name.
func find(program string) (string, error) {
	path, err := exec.LookPath(program)
	if err != nil {
		return "", fmt.Errorf("%v; install the package %s, or put it into PATH", err, filepath.Base(program))
	}
	return filepath.Abs(path)
}

// try runs a program that does nothing in a sandbox.
func try(ctx context.Context, r runtime, dir string) error {
	ctx, cancel := context.WithTimeout(ctx, measureTime)
	defer cancel()
	root := filepath.Join(dir, "root")
	program, err := nothing()
	if err != nil {
		return err
	}
	spec := specs.Spec{
		Version: "1.0.2", Root: &specs.Root{Path: root, Readonly: true}, Linux: &specs.Linux{},
		Process: &specs.Process{Args: []string{"/app"}, Cwd: "/", NoNewPrivileges: true},
	}
	if err := errors.Join(os.MkdirAll(root, 0o755), os.WriteFile(filepath.Join(root, "app"), program, 0o755)); err != nil {
		return err
	}
	if _, err := bundle(dir, spec, ""); err != nil {
		return err
	}
	s := sandbox{runtime: r, id: identify(dir), root: filepath.Join(dir, "runsc"), log: filepath.Join(dir, "log"), network: "none"}
	cmd := s.command(ctx, "run", "--bundle", dir, s.id)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Unshareflags: syscall.CLONE_NEWNS} // what it mounts goes with it
	cmd.WaitDelay = time.Second
	goruntime.LockOSThread() // its parent is a thread
	defer goruntime.UnlockOSThread()
	if said, err := cmd.CombinedOutput(); err != nil {
		return errors.Join(ctx.Err(), s.fault(err, said))
	}
	return nil
}

// nothing is an executable whose exit status is 0.
func nothing() ([]byte, error) {
	kinds := map[string]struct {
		machine uint16
		code    []byte
	}{
		"amd64": {62, []byte{0xb8, 60, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05}},                   // mov eax, 60; xor edi, edi; syscall
		"arm64": {183, []byte{0xa8, 0x0b, 0x80, 0xd2, 0, 0, 0x80, 0xd2, 0x01, 0, 0, 0xd4}}, // mov x8, 93; mov x0, 0; svc 0
	}
	kind, ok := kinds[goruntime.GOARCH]
	if !ok {
		return nil, fmt.Errorf("gVisor runs on amd64 and arm64, this is %s", goruntime.GOARCH)
	}
	const base, headers = 0x400000, 64 + 56
	size := uint64(headers + len(kind.code))
	var out bytes.Buffer
	for _, part := range []any{
		[16]byte{0x7f, 'E', 'L', 'F', 2, 1, 1}, uint16(2), kind.machine, uint32(1), uint64(base + headers), uint64(64), uint64(0), uint32(0),
		[6]uint16{64, 56, 1}, uint32(1), uint32(5), uint64(0), uint64(base), uint64(base), size, size, uint64(4096), kind.code,
	} {
		if err := binary.Write(&out, binary.LittleEndian, part); err != nil {
			return nil, err
		}
	}
	return out.Bytes(), nil
}
