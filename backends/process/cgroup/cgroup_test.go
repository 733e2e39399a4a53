package cgroup

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/kindos/kmo/backends"
)

const folder = "kmo/native-0011223344"

// tree makes files as the kernel would, in every place where a test looks.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		at := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(at, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// written reads back what is in a workload's folder.
func written(t *testing.T, dir string) map[string]string {
	t.Helper()
	found, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for _, f := range found {
		text, err := os.ReadFile(filepath.Join(dir, f.Name()))
		if err != nil {
			t.Fatal(err)
		}
		files[f.Name()] = strings.TrimSpace(string(text))
	}
	return files
}

var wanted = backends.Resources{CPUMin: 250, CPU: 1500, Memory: 64 << 20, PIDs: 32} // never changed

func TestVersionTwo(t *testing.T) {
	root := tree(t, map[string]string{"cgroup.controllers": "cpuset cpu io memory hugetlb pids\n", "cgroup.subtree_control": ""})
	g := Find(root, folder)
	if !g.Has("memory") || !g.Has("cpu") || !g.Has("pids") {
		t.Fatalf("found %+v", g.kinds)
	}
	if err := g.Make("relay-1", wanted); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(root, folder, "relay-1")
	want := map[string]string{
		"memory.max": "67108864", "memory.swap.max": "0", "cpu.max": "150000 100000", "cpu.weight": "25", "pids.max": "32",
	}
	if diff := cmp.Diff(want, written(t, dir)); diff != "" {
		t.Error(diff)
	}
	for _, above := range []string{"", "kmo", folder} {
		if text, err := os.ReadFile(filepath.Join(root, above, "cgroup.subtree_control")); err != nil || len(text) == 0 {
			t.Errorf("%q does not delegate: %q, %v", above, text, err)
		}
	}
	if got, want := g.Joins("relay-1"), []string{filepath.Join(dir, "cgroup.procs")}; !slices.Equal(got, want) {
		t.Errorf("joins %q, want %q", got, want)
	}
	for name, text := range map[string]string{
		"memory.current": "4096\n", "pids.current": "3\n", "cpu.stat": "usage_usec 1500000\nuser_usec 1\n",
		"memory.events": "low 0\nhigh 0\nmax 9\noom 2\noom_kill 1\noom_group_kill 0\n", "cgroup.procs": "17\n23\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(backends.Usage{Memory: 4096, PIDs: 3, CPU: 1500 * time.Millisecond}, g.Usage("relay-1")); diff != "" {
		t.Error(diff)
	}
	if got := g.OOMs("relay-1"); got != 1 {
		t.Errorf("%d ends for want of memory, want 1", got)
	}
	if got := members(dir); !slices.Equal(got, []int{17, 23}) {
		t.Errorf("processes %v", got)
	}
	if err := os.WriteFile(filepath.Join(dir, "cgroup.kill"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	g.Kill("relay-1") // by the file: 17 and 23 are nobody here
	if text, err := os.ReadFile(filepath.Join(dir, "cgroup.kill")); err != nil || string(text) != "1" {
		t.Errorf("cgroup.kill has %q, %v", text, err)
	}
	if got := g.Names(); !slices.Equal(got, []string{"relay-1"}) {
		t.Errorf("names %q", got)
	}
}

func TestVersionOne(t *testing.T) {
	root := tree(t, map[string]string{"memory/tasks": "", "cpu/tasks": "", "cpuacct/tasks": "", "pids/tasks": "", "unified/cgroup.controllers": "hugetlb\n"})
	g := Find(root, folder)
	if err := g.Make("relay-1", wanted); err != nil {
		t.Fatal(err)
	}
	for controller, want := range map[string]map[string]string{
		"memory":  {"memory.limit_in_bytes": "67108864", "memory.memsw.limit_in_bytes": "67108864"},
		"cpu":     {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "150000", "cpu.shares": "256"},
		"cpuacct": {},
		"pids":    {"pids.max": "32"},
	} {
		if diff := cmp.Diff(want, written(t, filepath.Join(root, controller, folder, "relay-1"))); diff != "" {
			t.Errorf("%s: %s", controller, diff)
		}
	}
	for name, text := range map[string]string{
		"memory/memory.usage_in_bytes": "8192", "memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
		"cpuacct/cpuacct.usage": "2000000000", "pids/pids.current": "5",
	} {
		controller, file, _ := strings.Cut(name, "/")
		if err := os.WriteFile(filepath.Join(root, controller, folder, "relay-1", file), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(backends.Usage{Memory: 8192, PIDs: 5, CPU: 2 * time.Second}, g.Usage("relay-1")); diff != "" {
		t.Error(diff)
	}
	if got := g.OOMs("relay-1"); got != 2 {
		t.Errorf("%d ends for want of memory, want 2", got)
	}
}

// A host with nothing of it: what is to be bounded is not made.
func TestNone(t *testing.T) {
	g := Find(t.TempDir(), folder)
	for name, r := range map[string]backends.Resources{"memory": {Memory: 1}, "cpu": {CPU: 1}, "pids": {PIDs: 1}} {
		if err := g.Make("relay-1", r); err == nil || !strings.HasPrefix(err.Error(), name+" bound: ") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := g.Make("relay-1", backends.Resources{}); err != nil {
		t.Error(err)
	}
	if len(g.Joins("relay-1")) > 0 || !g.Hold("relay-1", "") || g.Remove("relay-1") != nil {
		t.Errorf("joins %q, hold %t", g.Joins("relay-1"), g.Hold("relay-1", ""))
	}
}

// A controller that is named, in folders that may be written, and whose bound the kernel does not take: version 2 below a folder with
// processes in it.
func TestNamedButNotHandedDown(t *testing.T) {
	root := tree(t, map[string]string{
		"cgroup.controllers": "cpu memory pids\n", "memory/tasks": "", "pids/tasks": "",
		filepath.Join(folder, trial, "memory.max/in the way"): "", filepath.Join(folder, trial, "pids.max/in the way"): "",
		filepath.Join("memory", folder, trial, "memory.limit_in_bytes/in the way"): "",
	})
	g := Find(root, folder)
	if g.Has("memory") || !g.Has("cpu") || !g.Has("pids") {
		t.Errorf("found %+v, want cpu, and pids of version 1", g.kinds)
	}
	if names := g.Names(); len(names) > 0 {
		t.Errorf("names %q", names)
	}
}

func TestHold(t *testing.T) {
	one := Find(tree(t, map[string]string{"memory/tasks": "", "cpu/tasks": ""}), folder)
	two := Find(tree(t, map[string]string{"cgroup.controllers": "memory\n"}), folder)
	for _, test := range []struct {
		name string
		g    Groups
		text string
		want bool
	}{
		{"all", one, "2:cpu,cpuacct:/kmo/native-0011223344/a-1\n1:memory:/kmo/native-0011223344/a-1\n0::/\n", true},
		{"below a namespace's root", one, "2:cpu:/x/kmo/native-0011223344/a-1\n1:memory:/x/kmo/native-0011223344/a-1\n", true},
		{"one of two", one, "2:cpu:/kmo/native-0011223344/a-1\n1:memory:/\n", false},
		{"another workload", one, "2:cpu:/kmo/native-0011223344/a-12\n1:memory:/kmo/native-0011223344/a-12\n", false},
		{"another state folder", one, "2:cpu:/kmo/native-ffffffffff/a-1\n1:memory:/kmo/native-ffffffffff/a-1\n", false},
		{"version 2", two, "0::/kmo/native-0011223344/a-1\n", true},
		{"version 2, elsewhere", two, "0::/user.slice\n", false},
		{"nothing", two, "", false},
	} {
		if got := test.g.Hold("a-1", test.text); got != test.want {
			t.Errorf("%s: %t, want %t", test.name, got, test.want)
		}
	}
}

// What a runtime made below a workload's cgroup goes with it.
func TestRemoveNested(t *testing.T) {
	root := t.TempDir()
	g := Groups{folder: folder, kinds: []kind{{"memory", root, true}}}
	at := filepath.Join(root, folder, "relay-1")
	if err := os.MkdirAll(filepath.Join(at, "payload", "init.scope"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(at, "monitor"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := g.Remove("relay-1"); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(at); !os.IsNotExist(err) {
		t.Errorf("%s is still there: %v", at, err)
	}
}
