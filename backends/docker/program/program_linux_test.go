package program

import (
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/kindos/kmo/backends/process/stage"
)

// What has ended lives no longer, waited for or not, nor does what came before another of its number.
func TestLives(t *testing.T) {
	own, err := stage.ReadStat(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if !Lives(os.Getpid(), own.Began) || Lives(os.Getpid(), own.Began-1) {
		t.Error("this process lives, and one before it of its number does not; got another answer")
	}
	child := exec.Command("true")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	var found stage.Stat
	for deadline := time.Now().Add(time.Minute); found.State != "Z"; time.Sleep(time.Millisecond) {
		if found, err = stage.ReadStat(child.Process.Pid); err != nil || time.Now().After(deadline) {
			t.Fatal(found, err)
		}
	}
	if Lives(child.Process.Pid, found.Began) {
		t.Error("a process that has ended and was not waited for lives")
	}
	if err := child.Wait(); err != nil || Lives(child.Process.Pid, found.Began) {
		t.Error("a process that has ended and was waited for lives;", err)
	}
}

// A process that has ended and was not waited for is in the host's own cgroups, which are not its container's.
func TestGroupsOfContainer(t *testing.T) {
	const id = "0123456789abcdef"
	text := "4:memory:/\n8:pids:/\n2:cpuacct:/\n0::/" + id + " (deleted)\n"
	if found := groups(text, id); len(found) > 0 {
		t.Errorf("of\n%sgot %v, want none", strings.TrimSpace(text), found)
	}
}
