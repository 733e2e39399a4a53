package lxc

import (
	"encoding/json"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/process"
)

// What a guest is told by its arguments.
const (
	runArg, execArg = "run", "exec"
)

// seccompProfile is LXC's own.
const seccompProfile = "/usr/share/lxc/config/common.seccomp"

// config is what a container's configuration says.
type config struct {
	workload backends.Workload
	root     string   // of what is built
	ids      [][3]int // id inside, id on the host, count; none: the host's users
	netns    int      // a process whose network it shares; 0: the host's
	seccomp  string   // the profile's file; "" is none
	halt     string   // the signal that tells it to stop
}

// text is the configuration as LXC reads it. Values are quoted: a line has one end.
func (c config) text() string {
	var lines strings.Builder
	set := func(key string, value any) { fmt.Fprintf(&lines, "lxc.%s = \"%v\"\n", key, value) }
	w := c.workload
	set("uts.name", hostname(w.Name))
	set("rootfs.path", "dir:"+c.root)
	set("mount.auto", "proc:mixed")
	set("autodev", 0)
	set("tty.max", 0)
	set("pty.max", 0)
	set("console.path", "none")
	set("apparmor.profile", "unconfined")
	set("no_new_privs", 1)
	set("signal.halt", c.halt)
	set("init.uid", w.Run.User)
	set("init.gid", w.Run.User)
	set("init.cwd", folder(w))
	set("proc.oom_score_adj", 300) // when memory runs out it is the program that goes, not what keeps it
	if system(w) && w.Run.User == 0 {
		set("cap.drop", "mac_admin mac_override sys_time sys_module sys_rawio")
	} else {
		set("cap.keep", "none")
	}
	if c.seccomp != "" {
		set("seccomp.profile", c.seccomp)
	}
	if c.netns != 0 {
		set("namespace.share.net", c.netns)
	}
	set("net.0.type", "none")
	if most := own(w); most > 0 && len(c.ids) > 0 { // it counts the processes of users that are this container's alone
		set("prlimit.nproc", most)
	}
	for _, e := range c.ids {
		for _, kind := range []string{"u", "g"} {
			set("idmap", fmt.Sprint(kind, " ", e[0], " ", e[1], " ", e[2]))
		}
	}
	env := w.Env()
	for _, name := range slices.Sorted(maps.Keys(env)) {
		set("environment", name+"="+env[name])
	}
	return lines.String()
}

// own is how many processes the program of a workload of inner's may have; 0 is not bounded.
func own(w backends.Workload) int64 { return max(w.Resources.PIDs-pidsShare, 0) }

// hostname is the name of a workload as far as one may be long.
func hostname(name string) string { return name[:min(len(name), 63)] }

// folder is where a workload's program begins.
func folder(w backends.Workload) string {
	for _, dir := range []string{w.Run.Dir, w.Image.Config.Dir} {
		if dir != "" {
			return dir
		}
	}
	return "/"
}

// argv is what a container runs.
func argv(w backends.Workload) []string {
	if system(w) {
		return []string{initPath}
	}
	return w.Argv()
}

const initPath = "/sbin/init"

// haltSignal is how an init, by what its path leads to, is told to stop.
func haltSignal(target string) string {
	if strings.HasPrefix(filepath.Base(target), "busybox") {
		return "SIGUSR1"
	}
	return "SIGPWR"
}

func placeText(p process.Place) (string, error) {
	text, err := json.Marshal(p)
	return string(text), err
}

// ended finds how a container's first process ended in what LXC wrote: a line of its log says so if that was not 0.
func ended(log string, pid int) (code int, ok bool) {
	_, rest, found := strings.Cut(log, fmt.Sprintf("Child <%d> ended on ", pid))
	if !found {
		return 0, false
	}
	line, _, _ := strings.Cut(rest, "\n") // "error (3)", "signal Killed(9)"
	_, number, _ := strings.Cut(line, "(")
	if _, err := fmt.Sscanf(number, "%d)", &code); err != nil {
		return 0, false
	}
	if strings.HasPrefix(line, "signal") {
		code += 128
	}
	return code, true
}

// faults are the errors in what LXC wrote, without their places in its source.
func faults(log string) string {
	var list []string
	for line := range strings.Lines(log) {
		if _, rest, found := strings.Cut(line, " ERROR "); found {
			if _, said, found := strings.Cut(rest, " - "); found {
				rest = said
			}
			if _, said, found := strings.Cut(rest, " - "); found {
				rest = said
			}
			list = append(list, strings.TrimSpace(rest))
		}
	}
	if len(list) == 0 {
		return "LXC says no more"
	}
	return strings.Join(list[:min(len(list), 4)], "; ")
}
