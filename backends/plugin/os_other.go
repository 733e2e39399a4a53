//go:build !linux

package plugin

import (
	"net"
	"os"
	"os/exec"
	"syscall"
)

func own(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} }

func reap(p *process) error {
	err := p.cmd.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.reaped = true
	return err
}

func killGroup(p *os.Process) {
	p.Kill() //nolint:errcheck // it may have ended
}

func resident(*os.Process) int64 { return 0 }

func checkPeer(*net.UnixConn, int) error { return nil }

func runFile(cmd *exec.Cmd, f *os.File) { cmd.Path = f.Name() }

func pathOf(f *os.File) string { return f.Name() }
