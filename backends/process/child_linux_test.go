package process

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/kindos/kmo/backends/process/stage"
	"golang.org/x/sys/unix"
)

// What comes too late for a child, as its deadline may, reaches nobody: not the process whose pidfd has the child's number now.
func TestNoSignalAfterTheEnd(t *testing.T) {
	stranger := exec.Command(probe(), "wait")
	if err := stranger.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = stranger.Process.Kill()
		_ = stranger.Wait()
	}()
	out, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	c, err := spawn(stage.Orders{Argv: []string{"/none"}, Dir: "/"}, nil, out, -1, kinGroup)
	if err != nil {
		t.Fatal(err)
	}
	was := -1
	if err := c.control(func(fd int) error { was = fd; return nil }); err != nil {
		t.Fatal(err)
	}
	c.abandon()
	for number := -1; number < was; {
		if number, err = unix.PidfdOpen(stranger.Process.Pid, 0); err != nil {
			t.Fatal(err)
		}
		defer unix.Close(number)
	}
	c.signal(unix.SIGKILL)
	c.kill()
	if err := stranger.Process.Signal(syscall.Signal(0)); err != nil {
		t.Error(err)
	}
	if text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", stranger.Process.Pid)); err != nil || strings.Contains(string(text), ") Z ") {
		t.Errorf("the stranger was killed: %s, %v", text, err)
	}
}
