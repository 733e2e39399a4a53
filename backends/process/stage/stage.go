// Package stage is what happens between a clone and the program: a process that reads its orders, builds its root, gives up
// its rights and executes. Everything here runs in the process that will be the workload, never in its keeper.
//
// Descriptors: 1 and 2 the log, [OrdersFD] the orders as JSON, [ReportFD] the report, [AnnounceFD] what the program inherits if
// the orders say Announce, then the cgroup files, one a hierarchy,
// to which the thread writes "0", and, when joining, the pidfd of the workload. The report is, if the orders say Pause, [Built],
// upon which a byte on the orders' descriptor lets the stage go on; then [Ready] before execve and nothing after it, or, at any
// time, a [Failure] as JSON. End of file on the orders' descriptor ends a stage that waits.
package stage

import (
	"bytes"
	"encoding/json"
	"os"
)

// Arg is the argument that makes a process a stage.
const Arg = "kmo-stage"

// The descriptors a stage starts with.
const (
	OrdersFD = 3
	ReportFD = 4
	firstFD  = 6

	AnnounceFD = 5
)

// Built is what a stage reports when its root is there and hooks may run in it; Ready, when only execve is left.
const (
	Built = 'B'
	Ready = 'R'
)

// Orders are all a stage does.
type Orders struct {
	Cgroups int      `json:"cgroups"`         // how many cgroup files there are
	Join    bool     `json:"join,omitempty"`  // enter the namespaces of the pidfd
	Root    *Root    `json:"root,omitempty"`  // nil: no mounts; stay where we are
	Pause   bool     `json:"pause,omitempty"` // wait before the program
	Confine Confine  `json:"confine"`
	Argv    []string `json:"argv"`
	Env     []string `json:"env"`
	Dir     string   `json:"dir"`

	Announce bool `json:"announce,omitempty"`
	// Monitor: no root, nothing given up; the program is package monitor's, goes on with the orders and the report, and sees this binary
	// as Argv[0]. A command that joins one gets neither.
	Monitor bool `json:"monitor,omitempty"`
}

// Root is what the program will see as /.
type Root struct {
	Scratch  string `json:"scratch"` // an empty folder to mount on
	Hostname string `json:"hostname"`
	Content  string `json:"content,omitempty"` // a folder, or "" for an empty root
	Size     int64  `json:"size,omitempty"`    // of what may be written; 0 is read-only
	Owner    int    `json:"owner"`             // uid and gid of Files
	Files    []File `json:"files,omitempty"`
	Binds    []Bind `json:"binds,omitempty"`
	// Nodes are device nodes of the host. The program gets nodes of the same devices, which are its own.
	Nodes []string `json:"nodes,omitempty"`
	// Users says whom the owners of all of it are to be, for Mount; nil leaves them who they are.
	Users *Users `json:"-"`
}

// idCount is how many ids a range has.
const idCount = 1 << 16

// UserCount is how many ids of the host Users take: a range, and one more for a user that is not in it.
const UserCount = idCount + 1

// Users are the users of a user namespace: id n inside is First+n on the host, for 65536 of them, and a larger one is the next.
type Users struct {
	First, Extra int      // Extra is a user of the workload that may be larger
	space        *os.File // a user namespace in which that holds
}

// File is a file made in the root, read-only.
type File struct {
	To      string `json:"to"`
	Mode    uint32 `json:"mode"`
	Content []byte `json:"content"`
}

// Bind makes a file or folder of the host visible.
type Bind struct {
	From     string `json:"from"`
	To       string `json:"to"`
	Writable bool   `json:"writable,omitempty"`
	Strict   bool   `json:"strict,omitempty"` // no component of From may be a link
}

// Confine is what a program may not do.
type Confine struct {
	User    int      `json:"user"` // uid and gid; with Bare it is who we are already
	Bare    bool     `json:"bare"` // no root and no namespaces: it may not leave its process group, signal others or reach a unix socket
	Write   []string `json:"write,omitempty"`
	Execute []string `json:"execute,omitempty"`
	// Ports are the TCP ports it may bind, beside what the kernel gives whoever asks for any: others are another workload's. Landlock
	// holds this from version 4 on; see Support.HoldsPorts.
	Ports []int `json:"ports,omitempty"`
	// FileSize is the bytes that a file it writes may have, its log among them; 0 is no bound.
	FileSize int64 `json:"fileSize,omitempty"`
}

// Failure is why there is no program.
type Failure struct {
	Step   string `json:"step"` // "exec /app", "building the root"
	Cause  string `json:"cause"`
	Blames bool   `json:"blames"` // the workload is at fault, not this host
}

// Support is what this kernel and this user allow; measured by Measure.
type Support struct {
	Mounts   bool // root, with the right to mount
	Overlay  bool // overlayfs
	Landlock int  // ABI; 0 is none
	Seccomp  bool
	Groups   bool // a pidfd signals its whole process group: Linux 6.9
}

// HoldsPorts says whether Confine.Ports is kept: landlock's rules are, by the filter, all there is of TCP.
func (s Support) HoldsPorts() bool { return s.Landlock >= 4 && s.Seccomp }

// Report reads what a stage reported. It is ok when the program was about to be executed and nothing contradicts it.
func Report(said []byte) (f Failure, ok bool) {
	rest, ready := bytes.CutPrefix(said, []byte{Ready})
	if ready && len(rest) == 0 {
		return Failure{}, true
	}
	if len(rest) == 0 || json.Unmarshal(rest, &f) != nil {
		return Failure{Step: "the stage", Cause: "ended without a word"}, false
	}
	return f, false
}
