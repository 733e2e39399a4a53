package machine

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends/process/stage"
)

// A VMM has a device that nobody else may use on the host, and no file of the host's that is not everybody's.
func TestDeviceIsLent(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can give a program another user")
	}
	const device = "/dev/full"
	var before, after unix.Stat_t
	if err := unix.Stat(device, &before); err != nil {
		t.Fatal(err)
	}
	c := Config{Dir: t.TempDir(), User: Group + 7}
	said := &words{}
	cmd := command(c.Dir, "/bin/sh", []string{"-c", "stat -c '%u %a %t %T' " + device + "; : <>" + device + " && echo opened; cat /etc/shadow; ls " + c.Dir + "; id -u; id -G"}, nil, said)
	var err error
	stage.OnThread(func() {
		if err = reduce(cmd, c, device); err == nil {
			err = cmd.Start()
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v: %s", err, said)
	}
	for _, want := range []string{fmt.Sprintf("%d 600 1 7\nopened\n", c.User), fmt.Sprintf("\n%d\n%d", c.User, Group), "/etc/shadow: Permission denied", c.Dir + "': Permission denied"} {
		if !strings.Contains(said.String(), want) {
			t.Errorf("it says %q, want %q", said, want)
		}
	}
	if err := unix.Stat(device, &after); err != nil || after.Mode != before.Mode || after.Uid != before.Uid {
		t.Errorf("on the host it is of mode %#o and user %d now, %v; was %#o and %d", after.Mode, after.Uid, err, before.Mode, before.Uid)
	}
}

func TestSeparates(t *testing.T) {
	if os.Geteuid() == 0 && !Separates(Group+1) {
		text, err := exec.Command("cat", "/proc/self/uid_map").Output()
		t.Errorf("there is no user for a VMM: %s %v", text, err)
	}
	if Separates(-1) {
		t.Error("-1 is taken for a user")
	}
}
