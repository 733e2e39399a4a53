// Package monitor is the inside of a program that keeps a workload in something of its own: a sandbox, a container, a virtual
// machine. The keeper of package process starts it as this very binary, with this host's root and rights, as process 1 of a pid
// namespace, in mount, ipc and uts namespaces of its own and in the workload's cgroup: whatever it starts or mounts ends with it.
//
// A command's main calls [Run] for it. Its order of things:
//
//	func keep(m *monitor.Monitor) (monitor.End, error) {
//		… make what the workload runs in        an error says that there will be no program, and whose fault it is
//		if err := m.Built(); err != nil {       meanwhile the keeper runs the preInit hooks, by Program.Command
//			return monitor.End{}, err
//		}
//		… start the program
//		m.Started()                             Apply returns now
//		… wait for it; SIGTERM is to be passed on
//		return monitor.End{Code: code}, nil
//	}
package monitor

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/process/stage"
)

// Place is where a workload's things lie on this host. All of it is trusted and of mode 0700, but for the kept folders.
type Place struct {
	Dir    string   `json:"dir"`            // a folder for the monitor's own, new at each start, cleared with the workload
	Memory string   `json:"memory"`         // the same on storage that is memory, for secrets; "" where this host has none
	Kept   []string `json:"kept,omitempty"` // kept folders, in the order of Overlay.Keep, made for Run.User
	Log    int64    `json:"log,omitempty"`  // bytes that the log may have while nobody trims it; 0 is no bound
	Bare   bool     `json:"-"`              // programs get no root of their own and see this host's paths: there are no monitors then
}

// Task is what a monitor is to keep.
type Task struct {
	Place
	// Workload has its ports resolved: Port is the number inside, Host the one on this host; where they differ the monitor publishes.
	// A port is to be published on every address if Public names it, otherwise on the loopback.
	Workload backends.Workload `json:"workload"`
	Public   []string          `json:"public,omitempty"`
}

// Root is what a workload there sees as /: the content under a layer with its files; kept paths, doors and mounts, in this order; its devices. Scratch is
// an empty folder to mount on. Content may be replaced by where it is seen.
func (p Place) Root(w backends.Workload, scratch string) *stage.Root {
	root := &stage.Root{
		Scratch: scratch, Hostname: w.Name[:min(len(w.Name), 63)], Content: w.Image.Content, Owner: w.Run.User, Size: w.Overlay.Size,
	}
	if w.Resources.Disk > 0 {
		root.Size = min(root.Size, w.Resources.Disk)
	}
	for i, keep := range w.Overlay.Keep {
		root.Binds = append(root.Binds, stage.Bind{From: p.Kept[i], To: keep, Writable: true})
	}
	for _, d := range w.Doors {
		root.Binds = append(root.Binds, stage.Bind{From: d.From, To: d.To, Writable: true})
	}
	for _, m := range w.Mounts {
		root.Binds = append(root.Binds, stage.Bind{From: m.From, To: m.To, Writable: !m.ReadOnly, Strict: true})
	}
	for _, f := range w.Files {
		root.Files = append(root.Files, stage.File{To: f.To, Mode: f.Mode, Content: f.Content})
	}
	for _, d := range w.Resources.Devices {
		root.Nodes = append(root.Nodes, d.Nodes...)
	}
	return root
}

const (
	taskFile = "task.json"
	endFile  = "end.json"

	begunFile = "begun"
)

// Write puts a task where Run finds it: in memory, as its files may be secret.
func (t Task) Write() error {
	text, err := json.Marshal(t)
	if err != nil {
		return err
	}
	return os.WriteFile(t.file(), text, 0o600)
}

func (p Place) file() string {
	if p.Memory != "" {
		return filepath.Join(p.Memory, taskFile)
	}
	return filepath.Join(p.Dir, taskFile)
}

// Read reads the task of a place, from within a monitor or from a command beside it.
func (p Place) Read() (t Task, err error) {
	text, err := os.ReadFile(p.file())
	if err != nil {
		return t, err
	}
	err = json.Unmarshal(text, &t)
	return t, err
}

// Output is this process's standard output. Where that is the log, what goes beyond Place.Log is lost until somebody trims it.
func (p Place) Output() io.Writer { return p.Onto(os.Stdout) }

// Onto is Output to another file.
func (p Place) Onto(file *os.File) io.Writer { return output{file, p.Log} }

type output struct {
	file *os.File
	most int64
}

// Write says that all was written: a log that is full, or a disk, ends no program.
func (o output) Write(text []byte) (int, error) {
	rest := text
	if found, err := o.file.Stat(); err == nil && found.Mode().IsRegular() && o.most > 0 {
		rest = text[:min(int64(len(text)), max(0, o.most-found.Size()))]
	}
	_, _ = o.file.Write(rest)
	return len(text), nil
}

// End is how a workload's program ended.
type End struct {
	Code int  `json:"code"` // 128 + signal
	OOM  bool `json:"oom,omitempty"`
}

// Replace puts a file in the place of another as a whole: a process killed at any instruction leaves the old or the new one. It is not synced,
// for it needs to outlive processes, not the machine.
func Replace(path string, text []byte) error {
	next := path + ".next"
	if err := os.WriteFile(next, text, 0o600); err != nil {
		return err
	}
	return os.Rename(next, path)
}

// Half says that there is a monitor whose program has not been started, as far as it has got round to saying so.
func (p Place) Half() bool {
	_, task := os.Stat(p.file())
	_, begun := os.Stat(filepath.Join(p.Dir, begunFile))
	return task == nil && errors.Is(begun, os.ErrNotExist)
}

// Ended reads how a monitor's workload ended, if it has said so.
func (p Place) Ended() (end End, ok bool) {
	text, err := os.ReadFile(filepath.Join(p.Dir, endFile))
	ok = err == nil && json.Unmarshal(text, &end) == nil
	return end, ok
}

// Blame makes an error the workload's fault, at a step such as "exec /app". Every other error of a monitor is the host's.
type Blame struct {
	Step  string
	Cause error
}

// Error is the cause.
func (b Blame) Error() string { return b.Cause.Error() }

// Monitor is this process, as its keeper sees it.
type Monitor struct {
	Task
	report, orders *os.File // nil once the program has been started
}

// Run is the main of a monitor, of which place is the JSON it was given. It returns the exit status.
func Run(place string, keep func(*Monitor) (End, error)) int {
	unix.CloseOnExec(stage.OrdersFD) // what the monitor starts must not hold them
	unix.CloseOnExec(stage.ReportFD)
	m := &Monitor{orders: os.NewFile(stage.OrdersFD, "orders"), report: os.NewFile(stage.ReportFD, "report")}
	var where Place
	err := json.Unmarshal([]byte(place), &where)
	if err == nil {
		m.Task, err = where.Read()
	}
	var end End
	if err == nil {
		end, err = keep(m)
	}
	if err != nil {
		m.fail(err)
		return 127
	}
	text, err := json.Marshal(end)
	if err == nil {
		err = Replace(filepath.Join(m.Dir, endFile), text)
	}
	if err != nil {
		_, _ = io.WriteString(os.Stderr, "recording how it ended: "+err.Error()+"\n")
	}
	return end.Code
}

// errGone says that the keeper is gone, or will not have the program started.
var errGone = errors.New("the keeper is gone")

// Built tells the keeper that what the workload runs in is there, and returns when the hooks before the program have been run.
func (m *Monitor) Built() error {
	if _, err := m.report.Write([]byte{stage.Built}); err != nil {
		return errGone
	}
	if n, err := m.orders.Read(make([]byte, 1)); err != nil || n != 1 {
		return errGone
	}
	return nil
}

// Started tells the keeper that the program has been started, and whoever keeps it later, too.
func (m *Monitor) Started() {
	if err := os.WriteFile(filepath.Join(m.Dir, begunFile), nil, 0o600); err != nil {
		_, _ = io.WriteString(os.Stderr, "recording that it has begun: "+err.Error()+"\n")
	}
	_, _ = m.report.Write([]byte{stage.Ready}) // nobody may be there to read it
	m.close()
}

func (m *Monitor) close() {
	_, _ = m.report.Close(), m.orders.Close()
	m.report, m.orders = nil, nil
}

// fail reports why there is no program, or no longer one.
func (m *Monitor) fail(err error) {
	if m.report == nil {
		_, _ = io.WriteString(os.Stderr, err.Error()+"\n") // the workload's log
		return
	}
	f := stage.Failure{Step: "keeping the workload", Cause: err.Error()}
	var blame Blame
	if errors.As(err, &blame) {
		f = stage.Failure{Step: blame.Step, Cause: blame.Cause.Error(), Blames: true}
	}
	if text, err := json.Marshal(f); err == nil {
		_, _ = m.report.Write(text)
	}
	m.close()
}
