package process

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/process/monitor"
	"github.com/kindos/kmo/backends/process/stage"
	"golang.org/x/sys/unix"
)

// record is what is known of a workload beyond the life of this process. It is trusted: nobody else can write it.
type record struct {
	Workload  backends.Workload `json:"workload"`
	Ports     []int             `json:"ports,omitempty"` // as chosen, in the order of Run.Ports
	Process   identity          `json:"process,omitzero"`
	Started   time.Time         `json:"started,omitzero"`
	Restarts  int               `json:"restarts"`
	Quick     int               `json:"quick"` // ends in a row that came soon after the start
	Ended     *end              `json:"ended,omitempty"`
	Pending   bool              `json:"pending,omitempty"`  // the postInit hooks have not all ended 0
	Removing  bool              `json:"removing,omitempty"` // Remove has begun: never start it again
	Unapplied []string          `json:"unapplied,omitempty"`
}

// identity is one process of one boot. No other ever has the same three.
type identity struct {
	Boot  string `json:"boot"`
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // ticks since boot: field 22 of /proc/PID/stat
}

// end is how the last program ended.
type end struct {
	Known bool `json:"known"` // whether Code was to be had
	Code  int  `json:"code"`  // 128 + signal
	OOM   bool `json:"oom"`
}

const recordFile = "record.json"

// save replaces the record.
func (r *record) save(dir string) error {
	open := *r
	open.Workload.Files = backends.Veil(r.Workload.Files)
	text, err := json.Marshal(open)
	if err != nil {
		return err
	}
	return monitor.Replace(filepath.Join(dir, recordFile), text)
}

func loadRecord(dir string) (r record, err error) {
	text, err := os.ReadFile(filepath.Join(dir, recordFile))
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(text, &r); err != nil {
		return r, fmt.Errorf("reading %s: %v", filepath.Join(dir, recordFile), err)
	}
	if r.Workload.Name != filepath.Base(dir) {
		return r, fmt.Errorf("reading %s: it speaks of %q", filepath.Join(dir, recordFile), r.Workload.Name)
	}
	if len(r.Ports) != len(r.Workload.Run.Ports) {
		return r, fmt.Errorf("reading %s: %d ports, want %d", filepath.Join(dir, recordFile), len(r.Ports), len(r.Workload.Run.Ports))
	}
	return r, nil
}

// resolved is the workload with its ports filled in. If they are published, the number inside stays what the unit says.
func (r *record) resolved(publishes bool) backends.Workload {
	w := r.Workload
	w.Run.Ports = slices.Clone(w.Run.Ports)
	for i := range w.Run.Ports {
		p := &w.Run.Ports[i]
		p.Host = r.Ports[i]
		if !publishes || p.Port == 0 {
			p.Port = r.Ports[i]
		}
	}
	return w
}

func bootID() (string, error) {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(text)), err
}

// startTime is when a process was started, in ticks since boot.
func startTime(pid int) (uint64, error) {
	found, err := stage.ReadStat(pid)
	return found.Began, err
}

// task is what a monitor of a workload is told, and makes its folders anew.
func (k *Keeper) task(r *record) (monitor.Task, error) {
	t := monitor.Task{Place: k.place(&r.Workload), Workload: k.resolved(r)}
	for _, p := range r.Workload.Run.Ports {
		if p.Host != 0 {
			t.Public = append(t.Public, p.Name)
		}
	}
	_, err := k.kept(r.Workload)
	err = errors.Join(err, os.RemoveAll(t.Dir), os.Mkdir(t.Dir, 0o700))
	if t.Memory != "" {
		err = errors.Join(err, k.secrets.Make(r.Workload.Name))
	}
	return t, err
}

func (k *Keeper) recordStart(e *entry, c *child, unapplied []string) error {
	started, err := startTime(c.pid)
	if err != nil {
		return err
	}
	return e.change(func(r *record) {
		r.Process = identity{Boot: k.boot, PID: c.pid, Start: started}
		r.Started, r.Unapplied = time.Now(), unapplied
		e.state, e.detail = backends.Starting, ""
		e.usage, e.read = backends.Usage{}, time.Time{}
	})
}

// commandFile begins the name of an empty file that says who runs beside a program: a pid and its start time follow.
const commandFile = "command-"

// noteCommand writes down a command before that has its orders: the next keeper ends one that this keeper has not forgotten.
func (k *Keeper) noteCommand(e *entry, c *child) (forget func(), err error) {
	started, err := startTime(c.pid)
	if err != nil {
		return nil, err
	}
	at := filepath.Join(e.dir, fmt.Sprintf("%s%d-%d", commandFile, c.pid, started))
	return func() { _ = os.Remove(at) }, os.WriteFile(at, nil, 0o600)
}

// endCommands ends what an earlier keeper ran beside a program: nobody waits for it any more, and a hook is run again.
func (k *Keeper) endCommands(e *entry) {
	found, err := os.ReadDir(e.dir)
	if err != nil {
		return // there is nothing of it
	}
	for _, file := range found {
		id := identity{Boot: e.record.Process.Boot}
		if _, err := fmt.Sscanf(file.Name(), commandFile+"%d-%d", &id.PID, &id.Start); err != nil {
			continue
		}
		if p := k.same(id, kinNumber); p != nil {
			p.dismiss()
		}
		_ = os.Remove(filepath.Join(e.dir, file.Name())) // what it names has ended
	}
}

// unapplied says what this host and this keeper leave out of a workload's bounds and confinement.
func (k *Keeper) unapplied(w backends.Workload, p *Program, o stage.Orders) []string {
	list := slices.Clone(p.Unapplied)
	if !k.support.Mounts {
		list = append(list, "namespaces, a root and a user of its own: this keeper is not root")
	}
	if k.support.Landlock == 0 && !o.Monitor {
		list = append(list, "landlock: the kernel has none")
	}
	if !k.support.Seccomp && !o.Monitor {
		list = append(list, "seccomp: the kernel or this architecture has none")
	}
	if w.Resources.Disk > 0 && len(w.Overlay.Keep) > 0 {
		list = append(list, "disk bound of kept paths: they share the file system of the state folder")
	}
	switch {
	case p.Monitor && !p.WritesLog:
		list = append(list, "log bound without the agent: what runs this workload writes the log, which is bounded only while the agent runs")
	case !p.Monitor && o.Confine.FileSize == 0:
		list = append(list, "log bound without the agent: where kept paths, mounts or doors may be written, a log is bounded only while the agent runs")
	}
	return list
}

// boundFiles bounds every file, and so the log, of a program that writes nowhere but in its overlay of so many bytes and to devices. Elsewhere says that
// it may: in a folder of this host's that is bound into its root.
func (k *Keeper) boundFiles(o *stage.Orders, elsewhere bool, overlay int64) {
	if !elsewhere {
		o.Confine.FileSize = max(logTimes*k.options.LogSize, overlay)
	}
}

// bare adapts the orders to a keeper that cannot mount: the program runs where it lies, and landlock hides the rest.
func bare(o *stage.Orders, p Program) {
	o.Confine.Bare = true
	o.Argv[0] = outside(p, o.Argv[0])
	for _, b := range p.Binds {
		o.Confine.Execute = append(o.Confine.Execute, b.From)
		if b.Writable {
			o.Confine.Write = append(o.Confine.Write, b.From)
		}
	}
}

// outside is where a path of the program lies on this host.
func outside(p Program, path string) string {
	for _, b := range p.Binds {
		if rest, below := strings.CutPrefix(path, b.To+"/"); below {
			return filepath.Join(b.From, rest)
		}
		if b.To == path {
			return b.From
		}
	}
	return path
}

// unprivilegedPorts is the first port number of this host's network that needs no capability.
func unprivilegedPorts() int {
	text, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start")
	if err != nil {
		return 1024
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return 1024
	}
	return n
}

// choosePorts gives every port of a workload its number.
func (k *Keeper) choosePorts(w backends.Workload) (ports []int, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, p := range w.Run.Ports {
		port := k.hostPort(w, p)
		if port == 0 {
			if port, err = ChoosePort(w.Name, p.Name, func(candidate int) bool {
				return k.ports[candidate] == "" || k.ports[candidate] == w.Name && !slices.Contains(ports, candidate)
			}); err != nil {
				return nil, err
			}
			k.ports[port] = w.Name
		}
		ports = append(ports, port)
	}
	return ports, nil
}

// hostPort is the number that a port has on this host, or 0 if it is to be chosen.
func (k *Keeper) hostPort(w backends.Workload, p backends.Port) int {
	if k.publishes(w) {
		return p.Host
	}
	return max(p.Port, p.Host)
}

// publishes says whether a workload has a network of its own.
func (k *Keeper) publishes(w backends.Workload) bool {
	return k.options.Publishes && !slices.Contains(w.Security.Host, "network")
}

func (k *Keeper) resolved(r *record) backends.Workload { return r.resolved(k.publishes(r.Workload)) }

// settlePorts sees that every port of a workload is the program's to have: what answered there would pass for it. One that is taken
// is asked for a little longer, as what held it may just have ended. For one that the unit names there is nothing to do then but wait,
// and who holds it is no fault of the unit's. When all of those are free, the others are chosen anew if one of them is taken.
func (k *Keeper) settlePorts(ctx context.Context, e *entry) (changed bool, err error) {
	r := &e.record
	for i, p := range r.Workload.Run.Ports {
		port, chosen := r.Ports[i], k.hostPort(r.Workload, p) == 0
		if chosen && changed {
			continue // looked at when it is chosen
		}
		err := FreePort(port)
		for deadline := time.Now().Add(portTime); errors.Is(err, unix.EADDRINUSE) && time.Now().Before(deadline) && ctx.Err() == nil; err = FreePort(port) {
			time.Sleep(portTime / 10)
		}
		switch {
		case errors.Is(err, unix.EADDRINUSE) && chosen:
			changed = true
		case errors.Is(err, unix.EADDRINUSE):
			return false, fmt.Errorf("%s: port %s: port %d is taken by another program of this host", e.name, p.Name, port)
		case err != nil:
			return false, fmt.Errorf("%s: port %s: %v", e.name, p.Name, err)
		}
	}
	if !changed {
		return false, nil
	}
	ports, err := k.choosePorts(r.Workload)
	if err != nil {
		return false, err
	}
	e.mu.Lock()
	e.record.Ports = ports
	e.mu.Unlock()
	return true, nil
}

// FreePort returns EADDRINUSE for a port on which anybody listens, on whatever address.
func FreePort(port int) error {
	for _, address := range []net.IP{net.IPv4(127, 0, 0, 1), nil} {
		listener, err := net.ListenTCP("tcp", &net.TCPAddr{IP: address, Port: port})
		if err != nil {
			return err
		}
		if err := listener.Close(); err != nil {
			return err
		}
	}
	return nil
}

// ChoosePort chooses a port of this host that may be had and on which nobody listens. It lies below the range from which the kernel takes
// its own, and what is tried first depends on the names alone, so that it seldom changes.
func ChoosePort(workload, port string, may func(int) bool) (int, error) {
	const first, count = 20000, 12000
	hash := fnv.New32a()
	_, _ = hash.Write([]byte(workload + "/" + port))
	for i := range count {
		candidate := first + int((hash.Sum32()+uint32(i))%uint32(count))
		if may(candidate) && FreePort(candidate) == nil {
			return candidate, nil
		}
	}
	return 0, fmt.Errorf("%s: port %s: none of %d numbers from %d on is free", workload, port, count, first)
}

// Lock takes a state folder for this process alone, and sees that nobody else can write there: whoever writes a record says what is run.
// A process that was just killed may hold it a little longer.
func Lock(state string) (*os.File, error) {
	f, err := os.Open(state)
	if err != nil {
		return nil, err
	}
	var found unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &found); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if int(found.Uid) != os.Geteuid() || found.Mode&0o022 != 0 {
		return nil, errors.Join(fmt.Errorf("%s: owner %d, mode %#o; want owner %d and nobody else to write: chown %d, chmod 0700",
			state, found.Uid, found.Mode&0o7777, os.Geteuid(), os.Geteuid()), f.Close())
	}
	for deadline := time.Now().Add(3 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == nil {
			return f, nil
		}
		if time.Now().After(deadline) {
			return nil, errors.Join(fmt.Errorf("%s: another process keeps the workloads of this folder; end it first: %v", state, err), f.Close())
		}
	}
}
