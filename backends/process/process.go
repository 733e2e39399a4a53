// Package process keeps confined programs that outlive whoever started them. The backends native, wasm, appimage, gvisor,
// lxc and microvm stand on it.
//
// A [Keeper] owns one state folder. Its process is the only supervisor; nothing stands beside a program. A start is a
// re-execution of this very binary with [StageArg] as its first argument: a command's main must call [Stage] then, before
// anything else.
//
//	if len(os.Args) > 1 && os.Args[1] == process.StageArg {
//		process.Stage()
//	}
//
// The order of a start makes an unrecorded program impossible:
//
//  1. the stage is cloned into its own mount, pid, ipc and uts namespaces, and waits for its orders on a pipe;
//  2. the record is written: workload, boot id, pid, start time;
//  3. the orders are sent. A stage that reads end of file instead ends itself;
//  4. the stage builds the root, waits while the keeper runs the preInit hooks in it, joins the cgroups, gives everything up and
//     executes the program.
//
// A record needs to outlive this process, not the machine: the programs it speaks of die with the kernel whose page cache
// holds it. So it is renamed into place but never synced. A record that cannot be read is cleared away, never obeyed.
//
// A hook, or a command of Exec, is noted by pid and start time before it has its orders. The next keeper ends one that is still noted, with
// its process group, before anything else: a hook that was interrupted is run again, and never beside itself.
//
// The folder, trusted, mode 0700, this user's own:
//
//	work/<workload>/record.json   what was asked, and proof of the process that answers it
//	work/<workload>/log, log.1    stdout and stderr, appended by the program itself, and for its hooks; log.1 is the older part
//	work/<workload>/command-…     one for each hook or command that runs beside the program: its pid and start time
//	work/<workload>/root          where the stage mounts, in a namespace of its own: empty for everyone else
//	work/<workload>/own           what a monitor makes for itself, new at each start
//	kept/<unit>/<path>            kept paths, which outlive their workloads
//
// Secret files lie in Options.Memory, one folder a workload, and in no record. When they are gone, because the host was started
// again, a workload is damaged until it is applied again.
//
// A program is found again by its boot id, pid, start time and cgroup together and held by a pidfd from then on. A process
// that differs in any of them is a stranger and gets no signal.
//
// The keeper trims a log of more than Options.LogSize. Without a keeper the kernel bounds it: no file that a program writes may
// be larger than 16 logs, or its overlay if that is larger. A write beyond answers EFBIG, and SIGXFSZ is ignored from the start
// on, so that a program which can do without its log goes on. The bound holds for every file, memfds and shared memory too, and
// room cannot be had beyond a file's end. A program with kept paths, writable mounts or doors has no such bound, as what it writes there
// may be of any size; its Status says so in Unapplied. Nor has what a monitor runs, unless that writes the log itself (Program.WritesLog).
// What a hook writes comes by the keeper, which drops what the log has no room for.
//
// No program is started while anybody listens on one of its ports, on whatever address. A port that the unit leaves open is chosen
// anew then. For one that it names Apply returns an error that blames nobody, for a stranger on the host is no fault of the
// workload's, and a restart is tried again.
//
// A program shares the host's network. Where landlock knows ports it binds no TCP port but its own; to make that hold, the filter
// answers that there is no multipath TCP, which landlock does not see. UDP ports and connections are not held.
//
// A program counts as running once it is executed, or, if its plan says Announces, once it has called [Announce]. One that an earlier
// keeper started counts as running.
//
// Inside, the root is the content, read-only, under a layer with the unit's files and the mount points; with Overlay.Size a
// tmpfs of that size takes what is written, and is new at each start (its pages count as the workload's memory). /proc is
// read-only, /dev has null, zero, full, random and urandom. The program has no capability and can gain none, and is its pid
// namespace's process 1: what it starts ends with it. A system call that would change the host's shape answers EPERM.
package process

import (
	"context"
	"log/slog"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/process/monitor"
	"github.com/kindos/kmo/backends/process/stage"
)

// StageArg as its first argument makes a process a stage.
const StageArg = stage.Arg

// Stage turns this process into the program it is sent. It never returns.
func Stage() { stage.Main() }

// Options are what a Keeper needs. Backend, State and Plan are.
type Options struct {
	Backend string // names errors, the cgroup folder and the log
	State   string // the state folder; made if there is none
	// Plan turns a workload into the program to run, and is asked once for each start; hooks and Exec go by the same answer. The
	// ports of the workload it is given are resolved: Port is the number the program listens on. It must return a
	// *backends.FeatureError for what it cannot give, soon after its context ends, and change nothing of a workload.
	Plan   func(context.Context, backends.Workload, Place) (Program, error)
	Logger *slog.Logger // nil is silent
	// Features adds to what the keeper itself can do here, or takes from it; nil changes nothing.
	Features func([]backends.Feature) []backends.Feature
	// Publishes says that the plan gives a workload a network of its own, unless it asks for the host's: Port is then the number inside,
	// Host the one at which the plan's program publishes it.
	Publishes bool
	// Usage corrects what a workload's cgroups say it uses, by what keeping it costs; nil changes nothing.
	Usage func(backends.Workload, backends.Usage) backends.Usage
	// Means says what a program's exit status stands for, where that is the backend's own word and not the workload's; nil: for itself.
	Means func(status int) (code int, oom bool)
	// Gone is told of each workload of which there is nothing left but its kept paths, whether it has run or not; nil is not told.
	Gone func(name string)
	// Memory is a folder on storage that is memory, for secrets; "" is the first of /run/kmo and /dev/shm/kmo that can be that.
	Memory string

	Backoff func(restarts int) time.Duration // pause before the next start; nil is 1 s doubling to 1 min
	LogSize int64                            // bytes of log and of log.1 each; 0 is 8 MiB
}

// Place is where a workload's things lie on this host.
type Place = monitor.Place

// Program is what a workload comes down to.
type Program struct {
	Root string // folder that becomes the read-only root; "" is a root with nothing in it
	// Binds are files and folders of this host to be seen inside. They are the backend's own and may be links.
	Binds []Bind
	Argv  []string // Argv[0] without a slash is looked up in the root's PATH
	Env   map[string]string
	Dir   string // "" is /
	// Announces says that the program calls [Announce] once it has begun. Until then the workload is starting, and its postInit hooks wait.
	Announces bool
	// Monitor says that Argv is this very binary as a [monitor.Monitor], Argv[1:] its arguments, the last of which is to be the place. It is
	// given this host's root and the keeper's rights, and places the workload's files, mounts and paths itself: none of the above counts
	// but Env. Command then turns a hook, or what Exec is to run, into arguments of this binary, which are run beside it in the same way.
	Monitor bool
	Command func(argv []string) []string
	// WritesLog says that a monitor and commands beside it write the log themselves, all of it by Place.Output, which bounds it.
	WritesLog bool
	// Unapplied is what this host does not let the program have, for the workload's status.
	Unapplied []string
}

// Bind makes From of this host visible at To inside. Without mounts (a keeper that is not root) the path inside is From.
type Bind struct {
	From, To string
	Writable bool
}
