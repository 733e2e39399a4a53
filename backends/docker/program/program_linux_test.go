package program

import (
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// What has ended lives no longer, waited for or not, nor does what came before another of its number.
func TestLives(t *testing.T) {
	own, err := stat(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if !Lives(os.Getpid(), began(own)) || Lives(os.Getpid(), began(own)-1) {
		t.Error("this process lives, and one before it of its number does not; got another answer")
	}
	child := exec.Command("true")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	var fields []string
	for deadline := time.Now().Add(time.Minute); len(fields) == 0 || fields[0] != "Z"; time.Sleep(time.Millisecond) {
		if fields, err = stat(child.Process.Pid); err != nil || time.Now().After(deadline) {
			t.Fatal(fields, err)
		}
	}
	if Lives(child.Process.Pid, began(fields)) {
		t.Error("a process that has ended and was not waited for lives")
	}
	if err := child.Wait(); err != nil || Lives(child.Process.Pid, began(fields)) {
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
