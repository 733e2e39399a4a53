//go:build linux

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/policy/audit"
	"github.com/kindos/kmo/policy/trust"
	"github.com/kindos/kmo/reconciler"
)

// scene is one push to a host whose agent is killed, and all that is known of it from outside.
type scene struct {
	*world
	bad    bool
	before string // good when it was pushed
	pushed string
	name   string // of its relay's workload; known once it is made
}

// step is a moment between two durable writes of the line, as the files show it.
type step struct {
	name string
	bad  bool                 // it comes in the way back only
	good bool                 // it comes in the way forward only
	now  func(s *scene) bool  // true from the write before it on
	at   func(s *scene) error // nil if the files say that the agent was killed between the two
}

// steps are the moments at which an agent is killed, in their order.
func steps() []step {
	return []step{
		{"unseen", false, false, func(*scene) bool { return true }, func(s *scene) error {
			return all(!s.fetched(), !s.accepted())
		}},
		{"fetched", false, false, (*scene).fetched, func(s *scene) error {
			return all(s.fetched(), !s.accepted())
		}},
		{"accepted", false, false, (*scene).accepted, func(s *scene) error {
			return all(s.accepted(), !s.trying(), !s.good(), s.failure() == nil)
		}},
		{"trying", false, false, (*scene).trying, func(s *scene) error {
			return all(s.trying(), !s.applied(), !s.judged())
		}},
		{"applied", false, false, (*scene).applied, func(s *scene) error {
			return all(s.trying(), s.applied(), !s.judged())
		}},
		{"judged", false, false, (*scene).judged, func(s *scene) error {
			return all(s.trying(), s.judged())
		}},
		{"passed", false, true, (*scene).passed, func(s *scene) error {
			return all(s.passed(), s.trying())
		}},
		{"good", false, true, (*scene).good, func(s *scene) error {
			return all(s.good())
		}},
		{"failed", true, false, func(s *scene) bool { return s.failure() != nil }, func(s *scene) error {
			return all(s.failure() != nil, !s.reverting())
		}},
		{"reverting", true, false, (*scene).reverting, func(s *scene) error {
			return all(s.reverting(), s.tip() == s.pushed)
		}},
		{"reverted", true, false, (*scene).reverted, func(s *scene) error {
			return all(s.reverted(), s.failure() == nil || s.failure().Revert == "", s.record().Trying == "")
		}},
		{"noted", true, false, func(s *scene) bool { f := s.failure(); return f != nil && f.Revert != "" }, func(s *scene) error {
			return all(s.failure() != nil && s.failure().Revert != "", s.record().Good == s.before, s.record().Trying == "")
		}},
		{"trying the revert", true, false, func(s *scene) bool { return s.failure() != nil && s.record().Trying != "" }, func(s *scene) error {
			return all(s.failure() != nil, s.record().Trying != "")
		}},
	}
}

func all(conditions ...bool) error {
	for i, one := range conditions {
		if !one {
			return fmt.Errorf("condition %d does not hold", i)
		}
	}
	return nil
}

// TestKill9 kills the agent at each step of the journal, in turn, under load, in some iterations its plugin first and in some again while it
// recovers; what it comes to after that must be what it would have come to undisturbed.
func TestKill9(t *testing.T) {
	rounds := 50
	if testing.Short() {
		rounds = 3
	}
	w := newWorld(t, "  revertsPerDay: 100\nbackends: [native]\n")
	w.start()
	files := kept(w.pins["relay-1"])
	for name, text := range revision(w.pins["relay-1"], 0) {
		files[name] = text
	}
	w.write("v0", files)
	w.push()
	w.converged(w.accept())
	untouched := w.pid("keep")
	load(t)

	hits, reverts := map[string]int{}, 0
	for i := range rounds {
		s := &scene{world: w, bad: i%2 == 1}
		target := next(hits, s.bad)
		program := "relay-1"
		if s.bad {
			program = "relay-2"
		}
		s.before = s.record().Good
		old := s.workloads()
		s.pushed = s.write(fmt.Sprintf("version %d", i+1), revision(s.pins[program], i+1))
		begun := time.Now()
		pushed := make(chan error, 2)
		go func() {
			_, err := s.git(context.Background(), "push", "-q", "origin", "main")
			pushed <- err
			pushed <- err
		}()
		s.strike(old, target, i, pushed)
		if err := <-pushed; err != nil {
			t.Fatal(err)
		}
		landed := s.landed()
		hits[landed]++
		s.start()
		if i%3 == 2 { // again, while it recovers
			time.Sleep(rand.N(400 * time.Millisecond))
			s.kill()
			s.start()
		}
		s.settle()
		if s.bad {
			reverts++
		}
		s.check(reverts)
		if got := s.pid("keep"); got != untouched {
			t.Fatalf("iteration %d: keep runs as process %d, want %d as from the start", i, got, untouched)
		}
		t.Logf("%2d bad=%-5v aimed at %-18s killed at %-18s settled after %4d ms", i, s.bad, target.name, landed, time.Since(begun).Milliseconds())
		if s.bad {
			s.must("pull", "-q", "--ff-only", "origin", "main")
		}
	}
	w.stop()
	w.audited(rounds)
	if testing.Short() {
		return
	}
	for _, one := range steps() {
		if hits[one.name] == 0 {
			t.Errorf("no kill fell on the step %q: %v", one.name, hits)
		}
	}
}

// revision is the unit that is changed; keep is never touched.
func revision(pin string, n int) map[string]string {
	return map[string]string{"units/relay/unit.yaml": fmt.Sprintf(`unit: relay
tier: 3
intent: {kind: feature, summary: "version %[2]d"}
needs: [keep]
variants:
%[1]sresources: {cpu: {max: 1}, memory: {max: 64Mi}, pids: {max: 64}, disk: {max: 16Mi}}
run: {ports: [{name: http}], user: 65532, env: {N: "%[2]d"}}
health: {http: {port: http, path: /healthz}, every: 100ms, start: 3s, failures: 3}
gate: {bake: 100ms}
`, pin, n)}
}

func kept(pin string) map[string]string {
	return map[string]string{"units/keep/unit.yaml": fmt.Sprintf(`unit: keep
tier: 3
intent: {kind: feature, summary: "never touched"}
variants:
%sresources: {cpu: {max: 500m}, memory: {max: 64Mi}, pids: {max: 64}, disk: {max: 16Mi}}
run: {ports: [{name: http}], user: 65532}
health: {http: {port: http, path: /healthz}, every: 1s, start: 5s, timeout: 1s}
gate: {bake: 100ms}
`, pin)}
}

// load keeps every core busy until the test ends.
func load(t *testing.T) {
	for range runtime.NumCPU() {
		cmd := exec.CommandContext(t.Context(), "sh", "-c", "while :; do :; done")
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	}
}

// next is the step that was hit least, of those that a push of its kind comes through.
func next(hits map[string]int, bad bool) step {
	fit := slices.DeleteFunc(steps(), func(s step) bool { return s.bad && !bad || s.good && bad })
	rand.Shuffle(len(fit), func(i, j int) { fit[i], fit[j] = fit[j], fit[i] })
	return slices.MinFunc(fit, func(a, b step) int { return hits[a.name] - hits[b.name] })
}

// strike kills the agent as soon as the files show that it has come to a step. Its thread goes before the load's.
func (s *scene) strike(old []string, target step, i int, pushed <-chan error) {
	s.t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), -15); err != nil && i == 0 {
		s.t.Logf("without more priority than the load, a kill may fall late: %v", err)
	}
	defer func() { _ = unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), 0) }()
	for deadline := time.Now().Add(30 * time.Second); !target.now(s) && !s.ended(s.record()); { // a step that goes by unseen is aimed at again
		if s.name == "" {
			for _, name := range s.workloads() {
				if !slices.Contains(old, name) {
					s.name = name
				}
			}
		}
		select {
		case err := <-pushed:
			if err != nil {
				s.t.Fatal(err)
			}
			pushed = nil
		default:
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("%s has not come to %q; the branch is at %s, the journal says %+v", s.pushed, target.name, s.tip(), s.record())
		}
		time.Sleep(20 * time.Microsecond)
	}
	if i%5 == 4 {
		time.Sleep(rand.N(20 * time.Millisecond)) // or somewhere after it
	}
	if i%3 == 1 {
		for _, pid := range s.plugins() {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	s.kill()
}

// kill is kill -9.
func (s *scene) kill() {
	_ = s.agent.Process.Kill()
	_ = s.agent.Wait()
}

// plugins are the agent's children that are kmo: git, which pushes a revert, is the remote's, and a lock of its own that it left would be too.
func (s *scene) plugins() (pids []int) {
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", s.agent.Process.Pid))
	for _, list := range lists {
		text, _ := os.ReadFile(list)
		for _, field := range strings.Fields(string(text)) {
			if exe, err := os.Readlink("/proc/" + field + "/exe"); err == nil && exe == s.self {
				pid, _ := strconv.Atoi(field)
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// landed is the last step that fits what the killed agent left.
func (s *scene) landed() string {
	for _, one := range slices.Backward(steps()) {
		if (!one.bad || s.bad) && (!one.good || !s.bad) && one.at(s) == nil {
			return one.name
		}
	}
	return "between"
}

// ended says that a record is the last of what was pushed.
func (s *scene) ended(rec reconciler.Record) bool {
	if !s.bad {
		return rec.Good == s.pushed && rec.Head == s.pushed && rec.Trying == "" && rec.Outcome == reconciler.Converged
	}
	return rec.Trying == "" && rec.Outcome == reconciler.Reverted && len(rec.Bad) > 0 && rec.Bad[0].Commit == s.pushed && rec.Bad[0].Revert != "" &&
		rec.Good == rec.Bad[0].Revert && rec.Head == rec.Good
}

// settle waits until the host has come to its end.
func (s *scene) settle() {
	s.t.Helper()
	s.until(fmt.Sprintf("end of %s (bad: %v)", s.pushed, s.bad), 40*time.Second, s.ended)
	if err := until(func() bool { _, err := s.status(); return err == nil }); err != nil {
		s.t.Fatal(err)
	}
}

// check compares what is on the host and in Git with what must be.
func (s *scene) check(reverts int) {
	s.t.Helper()
	out, err := s.run(s.t.Context(), s.dir, s.self, "status", "--config", filepath.Join(s.dir, "agent.yaml"), "--state", s.state(), "-o", "json")
	var said Status
	if err == nil || strings.Contains(err.Error(), "exit status 4") {
		said, err = s.status()
	}
	if err != nil {
		s.t.Fatalf("kmo status: %v\n%s", err, out)
	}
	rec := s.record()
	if said.Record.Good != rec.Good || said.Record.Outcome != rec.Outcome || said.Record.Trying != "" || !said.Agent || said.Trouble != "" {
		s.t.Errorf("status says %+v, want what the journal says: %+v", said, rec)
	}
	var names []string
	pids := map[int]string{}
	for _, have := range said.Workloads {
		names = append(names, have.Name)
		pids[have.PID] = have.Name
		if have.State != backends.Running || !strings.HasPrefix(have.Name, have.Unit()+"-") {
			s.t.Errorf("workload %+v, want it running", have)
		}
	}
	if len(said.Workloads) != 2 || said.Workloads[0].Unit() != "keep" || said.Workloads[1].Unit() != "relay" {
		s.t.Fatalf("workloads %v, want one of keep and one of relay", names)
	}
	if got, err := s.get("relay", "/"); err != nil || got != "relay 1" {
		s.t.Errorf("relay answers %q (%v), want relay 1: relay 2 is what goes back", got, err)
	}
	if got := s.workloads(); !slices.Equal(got, names) {
		s.t.Errorf("folders of workloads %v, want %v", got, names)
	}
	s.processes(pids)
	s.groups(names)
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err != nil || bytes.Contains(mounts, []byte(s.dir)) {
		s.t.Errorf("mounts of %s are left (%v)", s.dir, err)
	}
	var half []string
	if err := until(func() bool {
		half, _ = filepath.Glob(filepath.Join(s.state(), ".*"))
		more, _ := filepath.Glob(filepath.Join(s.state(), "audit", ".*"))
		half = append(half, more...)
		return len(half) == 0
	}); err != nil {
		s.t.Errorf("half-written files are left: %v", half)
	}
	s.history(rec, reverts)
	if s.t.Failed() {
		s.t.FailNow()
	}
}

// processes compares the processes of this host's cgroups, and those that show its folder, with the workloads'.
func (s *scene) processes(want map[int]string) {
	s.t.Helper()
	plugins := s.plugins()
	known := append([]int{s.agent.Process.Pid}, plugins...)
	group := s.group()
	found := 0
	folders, _ := filepath.Glob("/proc/[0-9]*")
	for _, folder := range folders {
		pid, _ := strconv.Atoi(filepath.Base(folder))
		groups, _ := os.ReadFile(folder + "/cgroup")
		line, _ := os.ReadFile(folder + "/cmdline")
		stat, _ := os.ReadFile(folder + "/stat")
		ours := strings.Contains(string(groups), group)
		switch {
		case ours && want[pid] == "":
			s.t.Errorf("process %d (%q) runs in %s, and belongs to no workload", pid, line, groups)
		case ours:
			found++
		case strings.Contains(string(line), s.state()) && !slices.Contains(known, pid) && strings.Contains(string(line), s.self):
			s.t.Errorf("process %d (%q) is left", pid, strings.ReplaceAll(string(line), "\x00", " "))
		}
		_, rest, _ := strings.Cut(string(stat), ") ")
		if fields := strings.Fields(rest); len(fields) > 1 && fields[0] == "Z" {
			if parent, _ := strconv.Atoi(fields[1]); slices.Contains(known, parent) {
				s.t.Errorf("process %d is a zombie of %d", pid, parent)
			}
		}
	}
	if found != len(want) {
		s.t.Errorf("%d processes of %v run", found, want)
	}
	if len(plugins) != 1 {
		s.t.Errorf("plugins %v, want one", plugins)
	}
}

// group is where the native backend's cgroups are, below each hierarchy.
func (s *scene) group() string {
	return fmt.Sprintf("kmo/native-%x", sha256.Sum256([]byte(filepath.Join(s.state(), "backends", "native"))))[:len("kmo/native-")+8]
}

// groups compares the cgroups with the workloads.
func (s *scene) groups(want []string) {
	s.t.Helper()
	bases, _ := filepath.Glob(filepath.Join("/sys/fs/cgroup", "*", s.group()))
	if len(bases) == 0 {
		bases, _ = filepath.Glob(filepath.Join("/sys/fs/cgroup", s.group()))
	}
	if len(bases) == 0 {
		s.t.Errorf("no cgroup %s", s.group())
	}
	for _, base := range bases {
		var names []string
		found, _ := filepath.Glob(filepath.Join(base, "*", "cgroup.procs"))
		for _, path := range found {
			names = append(names, filepath.Base(filepath.Dir(path)))
		}
		if !slices.Equal(names, want) {
			s.t.Errorf("cgroups %v in %s, want %v", names, base, want)
		}
	}
}

// history looks for exactly one revert of each bad push, and for nothing else but pushes.
func (s *scene) history(rec reconciler.Record, reverts int) {
	s.t.Helper()
	log := func(args ...string) []string {
		out, err := s.run(s.t.Context(), filepath.Join(s.dir, "site.git"), "git", append([]string{"log", "--format=%H %P"}, args...)...)
		if err != nil {
			s.t.Fatal(err)
		}
		return strings.Split(strings.TrimSpace(out), "\n")
	}
	if got := log("--grep=^Kmo-Reverts:", "main"); len(got) != reverts && (reverts > 0 || got[0] != "") {
		s.t.Errorf("%d reverts in the branch, want %d:\n%s", len(got), reverts, strings.Join(got, "\n"))
	}
	if got := log("-1", "main")[0]; s.bad && got != rec.Good+" "+s.pushed {
		s.t.Errorf("the branch ends with %s, want the revert %s on %s", got, rec.Good, s.pushed)
	} else if !s.bad && !strings.HasPrefix(got, s.pushed) {
		s.t.Errorf("the branch ends with %s, want %s", got, s.pushed)
	}
}

// audited checks the log from the disk, and that every push was decided, judged, and if it failed, taken back.
func (w *world) audited(rounds int) {
	w.t.Helper()
	key, err := auditKey(w.state(), false)
	if err != nil {
		w.t.Fatal(err)
	}
	log, err := audit.Open(audit.Options{Dir: filepath.Join(w.state(), "audit"), Name: "edge-1.north-sea/kmo-audit", Key: key})
	if err != nil {
		w.t.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	if err := log.Verify(); err != nil {
		w.t.Error(err)
	}
	out := w.must("log", "--format=%H %s", "-n", strconv.Itoa(2*rounds))
	for line := range strings.Lines(out) {
		id, subject, _ := strings.Cut(strings.TrimSpace(line), " ")
		var number int
		if _, err := fmt.Sscanf(subject, "version %d", &number); err != nil {
			continue
		}
		records, err := log.ByCommit(id)
		if err != nil {
			w.t.Fatal(err)
		}
		var kinds []string
		for _, record := range records {
			kinds = append(kinds, record.Kind)
		}
		wanted := []string{"decision", "gate", "outcome"}
		if number%2 == 0 {
			wanted = []string{"decision", "gate", "revert"}
		}
		at := 0
		for _, kind := range kinds {
			if at < len(wanted) && kind == wanted[at] {
				at++
			}
		}
		if at < len(wanted) {
			w.t.Errorf("%s (%s): audit records %v, want %v in that order among them", subject, id, kinds, wanted)
		}
	}
}

func (s *scene) record() reconciler.Record {
	rec, err := reconciler.FileJournal{Path: filepath.Join(s.state(), "journal.json")}.Load()
	if err != nil {
		s.t.Fatal(err)
	}
	return rec
}

func (s *scene) trust() trust.State {
	state, err := trust.StateFile{Path: filepath.Join(s.state(), "trust.json")}.Load()
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		s.t.Fatal(err)
	}
	return state
}

// workloads are those that the native backend has a folder for, sorted.
func (s *scene) workloads() (names []string) {
	found, _ := os.ReadDir(filepath.Join(s.state(), "backends", "native", "work"))
	for _, one := range found {
		names = append(names, one.Name())
	}
	return names
}

// tip is where the remote's branch is.
func (s *scene) tip() string {
	text, _ := os.ReadFile(filepath.Join(s.dir, "site.git", "refs", "heads", "main"))
	return strings.TrimSpace(string(text))
}

func (s *scene) fetched() bool {
	text, _ := os.ReadFile(filepath.Join(s.state(), "site", "refs", "heads", "main"))
	return strings.TrimSpace(string(text)) == s.pushed
}

func (s *scene) accepted() bool {
	return slices.ContainsFunc(s.trust().Log, func(e trust.Entry) bool { return e.Commit == s.pushed })
}

func (s *scene) passed() bool {
	return slices.ContainsFunc(s.trust().Log, func(e trust.Entry) bool { return e.Commit == s.pushed && e.Passed })
}

func (s *scene) trying() bool { return s.record().Trying == s.pushed }

func (s *scene) good() bool { return s.record().Good == s.pushed }

func (s *scene) applied() bool {
	return s.name != "" && slices.Contains(s.workloads(), s.name)
}

// judged says that the log holds the gate's verdict.
func (s *scene) judged() bool { return s.logged("gate") }

// reverting says that the log holds what is about to be pushed.
func (s *scene) reverting() bool { return s.logged("revert") }

// reverted says that a commit has come on top of a push that failed.
func (s *scene) reverted() bool {
	return s.failure() != nil && s.tip() != s.pushed
}

// logged says that the audit log holds a record of a kind about the push.
func (s *scene) logged(kind string) bool {
	text, _ := os.ReadFile(filepath.Join(s.state(), "audit", "records"))
	for line := range bytes.Lines(text[max(0, len(text)-64<<10):]) {
		var record audit.Record
		if json.Unmarshal(line, &record) == nil && record.Kind == kind && record.Commit == s.pushed {
			return true
		}
	}
	return false
}

// failure is what the journal remembers of the push, nil if it has not failed.
func (s *scene) failure() *reconciler.Bad {
	rec := s.record()
	for i := range rec.Bad {
		if rec.Bad[i].Commit == s.pushed {
			return &rec.Bad[i]
		}
	}
	return nil
}

// pid is the process of a unit's one workload.
func (w *world) pid(unit string) int {
	w.t.Helper()
	said, err := w.status()
	if err != nil {
		w.t.Fatal(err)
	}
	for _, have := range said.Workloads {
		if have.Unit() == unit {
			return have.PID
		}
	}
	w.t.Fatalf("no workload of %s: %+v", unit, said.Workloads)
	return 0
}
