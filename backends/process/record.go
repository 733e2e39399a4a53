package process

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/kindos/kmo/backends"
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

// save replaces the record as a whole: a process killed at any instruction leaves the old or the new one.
func (r *record) save(dir string) error {
	text, err := json.Marshal(r)
	if err != nil {
		return err
	}
	next := filepath.Join(dir, recordFile+".next")
	if err := os.WriteFile(next, text, 0o600); err != nil {
		return err
	}
	return os.Rename(next, filepath.Join(dir, recordFile))
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

// resolved is the workload with its ports filled in.
func (r *record) resolved() backends.Workload {
	w := r.Workload
	w.Run.Ports = append([]backends.Port(nil), w.Run.Ports...)
	for i := range w.Run.Ports {
		w.Run.Ports[i].Port, w.Run.Ports[i].Host = r.Ports[i], r.Ports[i]
	}
	return w
}

func bootID() (string, error) {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(text)), err
}

// startTime is when a process was started, in ticks since boot.
func startTime(pid int) (uint64, error) {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, err
	}
	// The second field is the program's name in parentheses, and may hold anything.
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	if len(fields) < 20 {
		return 0, fmt.Errorf("/proc/%d/stat has %d fields after the name, want 20", pid, len(fields))
	}
	return strconv.ParseUint(fields[19], 10, 64)
}
