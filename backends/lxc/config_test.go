package lxc

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/kindos/kmo/backends"
)

func TestConfig(t *testing.T) {
	w := backends.Workload{Name: "relay-00000001", Format: backends.LXC, Run: backends.Run{User: 65532, Env: map[string]string{"QUOTED": ` a "b" # c `}}}
	w.Image.Config.Entrypoint = []string{"/app"}
	text := config{workload: w, root: "/run/lxc/root/merged", ids: [][3]int{{0, 1 << 30, 65536}}, netns: 7, halt: "SIGTERM"}.text()
	for _, want := range []string{
		`lxc.environment = "QUOTED= a "b" # c "`, `lxc.idmap = "u 0 1073741824 65536"`, `lxc.idmap = "g 0 1073741824 65536"`,
		`lxc.namespace.share.net = "7"`, `lxc.cap.keep = "none"`, `lxc.no_new_privs = "1"`, `lxc.init.uid = "65532"`,
	} {
		if !slices.Contains(strings.Split(text, "\n"), want) {
			t.Errorf("no line %s in\n%s", want, text)
		}
	}
	if strings.Contains(text, "cgroup") {
		t.Errorf("there are keys of cgroups, which are the keeper's:\n%s", text)
	}
}

// What would be another line of the configuration is refused.
func TestLineBreakRefused(t *testing.T) {
	w := backends.Workload{Name: "relay-00000001", Format: backends.OCI, Image: backends.Image{Content: t.TempDir()}}
	w.Image.Config.Entrypoint = []string{"/app"}
	if err := admit(w); err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]string{"A": "b\nlxc.cap.keep = sys_admin", "A\nlxc.hook.start": "x", `"A`: "b", " A": "b"} {
		w.Run.Env = map[string]string{name: value}
		if err := admit(w); err == nil {
			t.Errorf("%q=%q: no error", name, value)
		}
	}
}

func TestEnded(t *testing.T) {
	for log, want := range map[string]struct {
		code int
		ok   bool
	}{
		"INFO error - lxc_error_set_and_log:31 - Child <20> ended on error (3)\n":           {3, true},
		"INFO error - lxc_error_set_and_log:34 - Child <20> ended on signal Killed(9)\n":    {137, true},
		"INFO error - lxc_error_set_and_log:34 - Child <20> ended on signal (15)\nmore (1)": {143, true},
		"INFO error - lxc_error_set_and_log:31 - Child <21> ended on error (3)\n":           {0, false},
		"INFO error - lxc_error_set_and_log:31 - Child <20> ended on err":                   {0, false},
		"": {0, false},
	} {
		if code, ok := ended(log, 20); code != want.code || ok != want.ok {
			t.Errorf("%q: %d, %t; want %d, %t", log, code, ok, want.code, want.ok)
		}
	}
}

func TestFaults(t *testing.T) {
	log := "lxc-start app 2 INFO start - a.c:b:1 - fine\nlxc-start app 2 ERROR    conf - ../src/lxc/conf.c:d:9 - No such file - Failed to mount\n"
	if got := faults(log); got != "No such file - Failed to mount" {
		t.Errorf("faults %q", got)
	}
}

// The users of workloads are nobody else's, and a workload's stay the same.
func TestFirstUser(t *testing.T) {
	b := &Backend{planned: map[string]int{}}
	seen := map[int]string{}
	for i := range 500 {
		name := fmt.Sprint("relay-", i)
		at := b.firstUser(name)
		if at < 1<<30 || at > 1<<31-1<<17 || seen[at] != "" || b.firstUser(name) != at {
			t.Fatalf("%s: %d, which %q has too; then %d", name, at, seen[at], b.firstUser(name))
		}
		seen[at] = name
	}
}
