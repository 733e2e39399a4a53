package reconciler

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/fake"
	"github.com/kindos/kmo/policy"
	"github.com/kindos/kmo/policy/audit"
	"github.com/kindos/kmo/policy/trust"
	"github.com/kindos/kmo/reconciler/template"
	"github.com/kindos/kmo/rego"
)

// world is one host with everything around it in memory but its trust state and its audit log, which are real.
type world struct {
	*memSource
	t       *testing.T
	dir     string
	files   map[string]string
	alice   ssh.Signer
	images  *memImages
	journal *memJournal
	fake    *fake.Backend
	faults  *faults
	r       *Reconciler
	log     *audit.Log
	root    []byte
}

func key(t *testing.T, seed byte) ssh.Signer {
	t.Helper()
	signer, err := ssh.NewSignerFromKey(ed25519.NewKeyFromSeed(slices.Repeat([]byte{seed}, ed25519.SeedSize)))
	if err != nil {
		t.Fatal(err)
	}
	return signer
}

func public(signer ssh.Signer) string {
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(signer.PublicKey())))
}

// newWorld is a site with no unit, on a host that has accepted nothing.
func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir(), alice: key(t, 1), faults: &faults{}, fake: &fake.Backend{}}
	host := key(t, 9)
	w.root = w.found(nil)
	w.files = map[string]string{
		"site.yaml":         "site: north-sea\nbranch: main\nzones: [edge]\nregistries: [reg.example]\n",
		"trust/1.root.json": string(w.root),
	}
	w.memSource = &memSource{t: t, faults: w.faults, host: host, commits: map[string]Commit{}, clock: time.Now()}
	w.images = &memImages{faults: w.faults, broken: map[string]error{}, copies: map[string]int{}, drift: map[string]bool{}}
	w.journal = &memJournal{faults: w.faults}
	w.start()
	return w
}

// found signs the trust root; change may alter it before.
func (w *world) found(change func(*trust.Root)) []byte {
	w.t.Helper()
	root := trust.Root{
		Version: 1, Site: "north-sea", Tiers: []trust.Tier{{Tier: 0, Need: 1}, {Tier: 1, Need: 1}, {Tier: 2, Need: 1}, {Tier: 3}},
		Principals: []trust.Principal{
			{Name: "alice", Class: "human", Emails: []string{"alice@example.org"}, Keys: []trust.Key{{Public: public(w.alice), Uses: []string{trust.RoleRoot, trust.RoleCommit, trust.RoleApprove}}}},
			{Name: "edge-1", Class: "robot", Keys: []trust.Key{{Public: public(key(w.t, 9)), Uses: []string{trust.RoleRevert}}}},
		},
		Units: []trust.Pattern{{Path: "site.yaml", Tier: 3}},
		Roles: []trust.Role{
			{Name: trust.RoleRoot, Threshold: 1, Members: []string{"alice"}},
			{Name: trust.RoleCommit, Threshold: 1, Members: []string{"alice"}},
			{Name: trust.RoleApprove, Threshold: 1, Members: []string{"alice"}},
			{Name: trust.RoleRevert, Threshold: 1, Members: []string{"edge-1"}},
		},
	}
	if change != nil {
		change(&root)
	}
	file, err := trust.SignRoot(root, w.alice)
	if err != nil {
		w.t.Fatal(err)
	}
	return file
}

// start makes a new agent over what the old one left.
func (w *world) start() {
	w.t.Helper()
	if w.log != nil {
		_ = w.log.Close()
	}
	log, err := audit.Open(audit.Options{Dir: filepath.Join(w.dir, "audit"), Name: "edge-1/kmo-audit", Key: ed25519.NewKeyFromSeed(make([]byte, 32))})
	if err != nil {
		w.t.Fatal(err)
	}
	w.log = log
	w.t.Cleanup(func() { _ = log.Close() })
	w.r = &Reconciler{
		Host:   template.Host{Name: "edge-1", Zone: "edge", OS: "linux", Arch: "amd64", CPU: 8000, Memory: 16 << 30, PIDs: 30000, Disk: 100 << 30},
		State:  "/var/lib/kmo",
		Source: w.memSource,
		Trust: &trust.Verifier{Site: "north-sea", Branch: "main", Pin: trust.PinOf(w.root), State: trust.StateFile{Path: filepath.Join(w.dir, "trust.json")},
			Clock: time.Now, Describe: Declare()},
		Images:   w.images,
		Backends: map[string]backends.Backend{"fake": faulty{w.fake, w.faults}},
		Journal:  w.journal,
		Audit:    log,
		Rules:    testRules,
		Logger:   slog.New(slog.NewTextHandler(io.Discard, nil)),
	}
}

// shipped is loaded outside every bubble: a set does not change.
var shipped = sync.OnceValues(func() (*policy.Set, error) { return policy.Load(rego.Rules()) })

func testRules(fs.FS) (*policy.Set, error) { return shipped() }

func TestMain(m *testing.M) {
	if _, err := shipped(); err != nil {
		panic(err)
	}
	m.Run()
}

// unit adds or changes a unit; text follows the lines that every unit has.
func (w *world) unit(name, version, text string) {
	w.files["units/"+name+"/unit.yaml"] = fmt.Sprintf(`unit: %s
tier: 3
variants:
  - image: reg.example/%s@sha256:%064x
    merkle: kmo1:sha3-256:%064x
resources: {cpu: {max: 100m}, memory: {max: 32Mi}, pids: {max: 16}, disk: {max: 16Mi}}
run: {args: [%q], user: 65532}
health: {process: {}, every: 1s, start: 2s, failures: 2}
%s`, name, name, 7, 8, version, text)
}

// push commits the files as they are.
func (w *world) push(message string) string {
	return w.commit(w.alice, "alice@example.org", message, w.files)
}

// reconcile runs a pass, and what of it is watched, and checks how it ended.
func (w *world) reconcile(want Outcome) Record {
	w.t.Helper()
	rec := w.look()
	for rec.Stage == StageWatch {
		rec = w.look()
	}
	if rec.Outcome != want {
		w.t.Fatalf("outcome %s at %s: %s; want %s", rec.Outcome, rec.Stage, rec.Reason, want)
	}
	return rec
}

// look runs one pass.
func (w *world) look() Record {
	w.t.Helper()
	rec, err := w.r.Reconcile(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	return rec
}

// running lists the arguments of the workloads that exist, as "unit=version".
func (w *world) running() string {
	w.t.Helper()
	var list []string
	for _, workload := range w.fake.Workloads() {
		list = append(list, workload.Unit+"="+workload.Run.Args[0])
	}
	slices.Sort(list)
	return strings.Join(list, " ")
}

func (w *world) wantRunning(want string) {
	w.t.Helper()
	if got := w.running(); got != want {
		w.t.Fatalf("running %q, want %q", got, want)
	}
}

// failing makes every program started with that argument end at once, with status 3.
func (w *world) failing(version string) {
	w.fake.Program = func(p *fake.Process) (int, bool) { return 3, p.Workload.Run.Args[0] == version }
}

// onChanged lists the workloads whose base has changed since it was fetched.
func (w *world) onChanged() []string {
	var list []string
	for _, workload := range w.fake.Workloads() {
		if w.images.drift[workload.Image.Content] {
			list = append(list, workload.Name)
		}
	}
	return list
}

// only is the one workload of a unit.
func (w *world) only(unit string) string {
	w.t.Helper()
	for _, workload := range w.fake.Workloads() {
		if workload.Unit == unit {
			return workload.Name
		}
	}
	w.t.Fatalf("no workload of %s", unit)
	return ""
}

// story runs a test in a bubble, where waiting costs nothing.
func story(t *testing.T, f func(t *testing.T, w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { f(t, newWorld(t)) })
}

func TestForwardAndBack(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.unit("relay", "1", "")
		v1 := w.push("v1")
		rec := w.reconcile(Converged)
		if rec.Good != v1 || rec.Trying != "" {
			t.Fatalf("record %+v, want good %s", rec, v1)
		}
		w.wantRunning("relay=1")

		seq := w.journal.rec.Seq
		w.faults.seen = nil
		w.reconcile(Converged)
		if got := strings.Join(w.faults.seen, " "); got != "source.Head backend.Observe" || w.journal.rec.Seq != seq {
			t.Errorf("a reconcile with nothing to do made the calls %q and %d saves", got, w.journal.rec.Seq-seq)
		}

		w.failing("2")
		w.unit("relay", "2", "")
		v2 := w.push("v2")
		rec = w.reconcile(Reverted)
		w.wantRunning("relay=1")
		if rec.Good != v1 || len(rec.Bad) != 1 || rec.Bad[0].Commit != v2 || rec.Bad[0].Revert != w.head || !strings.Contains(rec.Reason, "ended with status 3") {
			t.Fatalf("record %+v, want v2 bad, taken back by %s", rec, w.head)
		}
		revert := w.head
		rec = w.reconcile(Reverted)
		if rec.Good != revert || rec.Head != revert {
			t.Fatalf("record %+v, want the revert to be the good commit", rec)
		}
		w.reconcile(Reverted)
		w.wantRunning("relay=1")
		if w.pushes != 1 {
			t.Errorf("%d reverts were pushed, want 1", w.pushes)
		}

		w.unit("relay", "3", "")
		w.push("v3")
		w.reconcile(Converged)
		w.wantRunning("relay=3")
	})
}

func TestOldCopyServesUntilTheNewOnePasses(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.unit("relay", "1", "gate: {bake: 30s}\n")
		w.push("v1")
		w.reconcile(Converged)
		w.unit("relay", "2", "gate: {bake: 30s}\n")
		w.push("v2")
		go func() {
			time.Sleep(15 * time.Second)
			if got := w.running(); got != "relay=1 relay=2" {
				t.Errorf("P-04 while it bakes %q runs, want both copies", got)
			}
		}()
		w.reconcile(Converged)
		w.wantRunning("relay=2")
	})
}

// TestLongBake: a commit may bake for hours. Meanwhile the host is kept, one record tells of it, and what is pushed takes its place.
func TestLongBake(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.unit("other", "1", "")
		w.unit("relay", "1", "gate: {bake: 2h}\n")
		w.push("v1")
		begun := time.Now()
		w.reconcile(Converged)
		if took := time.Since(begun); took < 2*time.Hour || took > 2*time.Hour+time.Minute {
			t.Errorf("baked for %v, want two hours", took)
		}
		w.unit("relay", "2", "gate: {bake: 2h}\n")
		v2 := w.push("v2")
		if rec := w.look(); rec.Trying != v2 || rec.Outcome != Waiting || rec.Reason != "relay: process: passed, and baking for 2h0m0s" {
			t.Errorf("%+v, want v2 baking", rec)
		}
		records := w.records()
		w.fake.Damage(w.only("other"), "test")
		for range 10 {
			w.look()
		}
		if status, err := w.fake.Observe(t.Context()); err != nil || slices.ContainsFunc(status, func(s backends.Status) bool { return s.State == backends.Damaged }) {
			t.Errorf("%+v (%v): nothing is repaired while a commit bakes", status, err)
		}
		if got := w.records(); got != records {
			t.Errorf("%d records more while nothing changed", got-records)
		}
		good := w.head
		w.commit(nil, "alice@example.org", "unsigned", w.files)
		for range 3 {
			if rec := w.look(); rec.Trying != v2 || rec.Stage != StageWatch {
				t.Errorf("%+v: a head that must not run ends or delays the watch", rec)
			}
		}
		w.head = good
		w.start() // a new agent begins the bake anew, for it has seen nothing of it
		w.look()
		w.unit("relay", "3", "")
		v3 := w.push("v3")
		begun = time.Now()
		if rec := w.reconcile(Converged); rec.Good != v3 || time.Since(begun) > time.Minute {
			t.Errorf("%+v after %v, want v3 at once", rec, time.Since(begun))
		}
		w.wantRunning("other=1 relay=3")
	})
}

func TestExclusiveCopiesReplaceEachOther(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		run := func(version string) { w.unit("relay", version, "overlay: {size: 1Mi, keep: [/data]}\n") }
		run("1")
		w.push("v1")
		w.reconcile(Converged)
		run("2")
		id := w.push("v2")
		preview, err := w.r.Preview(t.Context(), id)
		if err != nil || len(preview.Steps) != 2 || len(preview.Steps[0].Replaces) != 1 || !slices.Contains(preview.Steps[0].Because, "kept path /data") {
			t.Fatalf("P-04 plan %+v (%v), want a replacement because of the kept path", preview.Steps, err)
		}
		w.reconcile(Converged)
		w.wantRunning("relay=2")
		w.failing("3")
		run("3")
		w.push("v3")
		w.reconcile(Reverted)
		w.wantRunning("relay=2")
	})
}

func TestRefusals(t *testing.T) {
	for _, test := range []struct {
		name, stage, code string
		change            func(w *world)
	}{
		{"T01 unsigned head", "trust", "E_SIG_MISSING", func(w *world) { w.commit(nil, "alice@example.org", "x", w.files) }},
		{"T02 stranger's key", "trust", "E_SIG_UNKNOWN_KEY", func(w *world) { w.commit(key(w.t, 77), "alice@example.org", "x", w.files) }},
		{"T63 privileged", "policy", "KT001", func(w *world) { w.unit("relay", "2", "security: {privileged: true}\n"); w.push("x") }},
		{"T16 no quorum", "policy", "KT018", func(w *world) {
			w.unit("relay", "2", "")
			w.files["units/relay/unit.yaml"] = strings.Replace(w.files["units/relay/unit.yaml"], "tier: 3", "tier: 1", 1)
			w.push("x")
		}},
		{"T67 unknown field", "trust", "E_DECODE", func(w *world) { w.unit("relay", "2", "priviledged: true\n"); w.push("x") }},
		{"needs nobody", "trust", "E_GRAPH", func(w *world) { w.unit("relay", "2", "needs: [nobody]\n"); w.push("x") }},
	} {
		t.Run(test.name, func(t *testing.T) {
			story(t, func(t *testing.T, w *world) {
				w.unit("relay", "1", "")
				v1 := w.push("v1")
				w.reconcile(Converged)
				files := w.files
				w.files = map[string]string{}
				for name, text := range files {
					w.files[name] = text
				}
				test.change(w)
				rec := w.reconcile(Refused)
				if rec.Stage != test.stage || !strings.Contains(rec.Reason, test.code) || rec.Good != v1 {
					t.Fatalf("refused at %s: %s; want %s at %s", rec.Stage, rec.Reason, test.code, test.stage)
				}
				w.wantRunning("relay=1")
				before := w.records()
				w.reconcile(Refused)
				if after := w.records(); after != before {
					t.Errorf("looking again at the same refused head wrote %d audit records", after-before)
				}
				w.fake.Damage(w.only("relay"), "test")
				w.reconcile(Refused)
				list, err := w.fake.Observe(t.Context())
				if err != nil || len(list) != 1 || list[0].State != backends.Running {
					t.Errorf("drift beside a refused head: %+v (%v), want one running workload", list, err)
				}
			})
		})
	}
}

func (w *world) records() int {
	w.t.Helper()
	list, err := w.log.Last(1 << 20)
	if err != nil {
		w.t.Fatal(err)
	}
	return len(list)
}

// TestEveryCommitIsToldOf: an outcome is told anew for each commit, also when it is the same outcome for the same reason.
func TestEveryCommitIsToldOf(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.unit("relay", "1", "")
		v1 := w.push("v1")
		w.reconcile(Converged)
		w.unit("relay", "2", "")
		v2 := w.push("v2")
		w.reconcile(Converged)
		w.failing("3")
		w.unit("relay", "3", "")
		v3 := w.push("v3")
		w.reconcile(Reverted)
		w.reconcile(Reverted)
		for _, commit := range []string{v1, v2, v3, w.head} {
			records, err := w.log.ByCommit(commit)
			if err != nil {
				t.Fatal(err)
			}
			told := slices.IndexFunc(records, func(r audit.Record) bool { return r.Kind == "outcome" })
			if told < 0 {
				t.Errorf("the audit log has no outcome of %s, only %d other records", commit, len(records))
			}
		}
	})
}

// TestSiteRulesCanGo: what is active judges its own removal and the host's reverts, so rules that let neither pass never become active.
func TestSiteRulesCanGo(t *testing.T) {
	rule := func(body string) string {
		return "package site\n\ndeny contains {\"id\": \"LOCK1\", \"unit\": \"\", \"path\": \"\", \"msg\": \"found; want nothing\"} if {\n\t" + body + "\n}\n"
	}
	for _, c := range []struct{ name, body, denies string }{
		{"all that is no beginning", `input.change.base != ""`, "LOCK1 denies the removal of policy/"},
		{"a change of policy", "input.change.policy", "LOCK1 denies the removal of policy/"},
		{"its removal, whoever approves", "some unit in input.change.units\n\tunit.to == \"\"", "LOCK1 denies the removal of policy/"},
		{"what no human signs", `input.change.class != "human"`, "LOCK1 denies a host's revert"},
		{"policy that others sign", "input.change.policy\n\tnot input.change.revert\n\tinput.change.signer != \"alice\"", ""},
		{"policy without an approval of alice", "some unit in input.change.units\n\tunit.unit == \"@policy\"\n\tnot input.change.revert\n\tevery a in unit.counted { a.principal != \"alice\" }", ""},
		{"a change of policy, from a day on", "input.change.policy\n\tnot input.change.revert\n\ttime.parse_rfc3339_ns(input.time) > time.parse_rfc3339_ns(\"2003-01-01T00:00:00Z\")", "LOCK1 denies the removal of policy/"},
		{"a change of policy, up to a day", "input.change.base != \"\"\n\tinput.change.policy\n\ttime.parse_rfc3339_ns(input.time) < time.parse_rfc3339_ns(\"2000-02-01T00:00:00Z\")", ""},
		{"a change of policy, but on one day of the week", "input.change.base != \"\"\n\tinput.change.policy\n\tnot input.change.revert\n\ttime.weekday(time.parse_rfc3339_ns(input.time)) != \"Wednesday\"", ""},
		{"what cannot be judged", "some unit in input.change.units\n\tunit.to == \"\"\n\tto_number(input.change.signer) > 0", "no judgement of the removal of policy/"},
		{"what its author signs", "input.change.base != \"\"\n\tinput.change.policy\n\tnot input.change.revert\n\tinput.change.signer == input.change.author", ""},
		{"many units at once", "count(input.units) > 5", ""},
		{"units with two workloads here", "some unit in input.units\n\tcount(unit.workloads) + count(unit.images) + count(input.host.labels) > 10", ""},
		{"units without a ticket", "some unit in input.units\n\tnot unit.after.intent.ticket", ""},
	} {
		folder := fstest.MapFS{"lock.rego": {Data: []byte(rule(c.body))}, "lock_test.rego": {Data: []byte("package site_test\n\ntest_it if true\n")}}
		own, err := policy.Load(rego.Rules(), folder)
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		for _, first := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, from the first commit %v", c.name, first), func(t *testing.T) {
				story(t, func(t *testing.T, w *world) {
					w.r.Rules = func(site fs.FS) (*policy.Set, error) {
						if site == nil {
							return shipped()
						}
						return own, nil
					}
					if !first {
						w.push("begin")
						w.reconcile(Converged)
					}
					for name, file := range folder {
						w.files["policy/"+name] = string(file.Data)
					}
					w.push("rules")
					if !first {
						w.approvePolicy()
					}
					if c.denies != "" {
						if rec := w.reconcile(Refused); rec.Stage != "policy" || !strings.Contains(rec.Reason, c.denies) {
							t.Fatalf("refused at %s: %s; want that %s", rec.Stage, rec.Reason, c.denies)
						}
						return
					}
					w.reconcile(Converged)
					if c.name == "what its author signs" {
						return // alice is alone here
					}
					time.Sleep(60 * 24 * time.Hour)
					for name := range folder {
						delete(w.files, "policy/"+name)
					}
					w.push("no rules")
					w.approvePolicy()
					w.reconcile(Converged)
				})
			})
		}
	}
}

// TestBadRulesLeaveTheOnesBefore: rules that do not load, however they do not, are refused, and those before them judge what comes next.
func TestBadRulesLeaveTheOnesBefore(t *testing.T) {
	const good = "package site\n\ndeny contains {\"id\": \"SITE1\", \"unit\": u.name, \"path\": \"run.args\", \"msg\": \"debug; want it left out\"} if {\n" +
		"\tsome u in input.units\n\tsome \"debug\" in u.after.run.args\n}\n"
	const test = "package site_test\n\nimport data.site\n\ntest_it if count(site.deny) == 1 with input as {\"units\": [{\"name\": \"x\", \"after\": {\"run\": {\"args\": [\"debug\"]}}}]}\n"
	for _, c := range []struct{ name, rule, test, code string }{
		{"it is no Rego", "package site\n\ndeny contains {\n", test, "E_POLICY_COMPILE"},
		{"its test fails", strings.ReplaceAll(good, `"debug" in`, `"trace" in`), test, "E_POLICY_COMPILE"},
		{"it has no tests", good, "", "E_POLICY_COMPILE"},
		{"it asks the network", good + "\nwarn contains x if x := http.send({})\n", test, "E_POLICY_COMPILE"},
		{"it would allow", good + "\nallow if true\n", test, "E_POLICY_COMPILE"},
		{"it is of the shipped package", strings.Replace(good, "package site", "package kmo.tiers", 1), test, "E_POLICY_COMPILE"},
		{"it judges nothing", "package site\n\nx := 1\n", "package site_test\n\ntest_it if true\n", "KT021"},
		{"it errs on a fixture", good + "\nwarn contains x if x := to_number(input.commit)\n", test, "E_POLICY_ERROR"},
	} {
		t.Run(c.name, func(t *testing.T) {
			story(t, func(t *testing.T, w *world) {
				w.r.Rules = func(site fs.FS) (*policy.Set, error) {
					if site == nil {
						return shipped()
					}
					return policy.Load(rego.Rules(), site)
				}
				put := func(rule, test, version string) string {
					for name, text := range map[string]string{"policy/site.rego": rule, "policy/site_test.rego": test} {
						if w.files[name] = text; text == "" {
							delete(w.files, name)
						}
					}
					w.unit("relay", version, "")
					return w.push(version)
				}
				v1 := put(good, test, "1")
				w.reconcile(Converged)
				put(c.rule, c.test, "1")
				if rec := w.reconcile(Refused); rec.Stage != "policy" || rec.Good != v1 || !strings.Contains(rec.Reason, c.code) {
					t.Fatalf("refused at %s with %s good: %s; want %s", rec.Stage, rec.Good, rec.Reason, c.code)
				}
				put(good, test, "debug")
				if rec := w.reconcile(Refused); !strings.Contains(rec.Reason, "SITE1: relay, run.args") {
					t.Fatalf("%s; want what the rules before it deny", rec.Reason)
				}
				put(good, test, "2")
				w.reconcile(Converged)
				w.wantRunning("relay=2")
			})
		})
	}
}

// approvePolicy pushes alice's approval of how the head changes the policy of the good commit.
func (w *world) approvePolicy() {
	w.t.Helper()
	before, after := w.commits[w.journal.rec.Good], w.commits[w.head]
	changed, _, err := w.r.Trust.Compare(context.Background(), before, after, w.r.Source)
	if err != nil || len(changed) != 1 || changed[0].Unit != "@policy" {
		w.t.Fatal(changed, err)
	}
	name, data, err := trust.SignApproval(trust.NewApproval("north-sea", "main", before.ID, changed[0], time.Now().Add(time.Hour), trust.Intent{}), w.alice)
	if err != nil {
		w.t.Fatal(err)
	}
	w.files[name] = string(data)
	w.push("approved")
}

// TestClockBehind: a clock that was ahead once leaves the trusted time there, and whoever looks at the host is told.
func TestClockBehind(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		var log strings.Builder
		var ahead time.Duration
		w.r.Logger = slog.New(slog.NewTextHandler(&log, nil))
		w.r.Trust.Clock = func() time.Time { return time.Now().Add(ahead) }
		w.unit("relay", "1", "")
		w.push("v1")
		if rec := w.reconcile(Converged); rec.Clock != "" {
			t.Errorf("%q of a clock that is right", rec.Clock)
		}
		ahead = time.Hour
		w.unit("relay", "2", "")
		w.push("v2")
		w.reconcile(Converged)
		ahead = 0
		for range 3 {
			if rec := w.reconcile(Converged); !strings.HasPrefix(rec.Clock, "E_TIME: ") || rec.Clock != w.journal.rec.Clock {
				t.Errorf("%q, in the journal %q; want E_TIME", rec.Clock, w.journal.rec.Clock)
			}
		}
		if n := strings.Count(log.String(), "level=WARN"); n != 1 || !strings.Contains(log.String(), "E_TIME: the clock is behind the trusted time ") {
			t.Errorf("%d warnings, want one of E_TIME:\n%s", n, log.String())
		}
		time.Sleep(time.Hour)
		if rec := w.reconcile(Converged); rec.Clock != "" || w.journal.rec.Clock != "" {
			t.Errorf("%q of a clock that has come to it", rec.Clock)
		}
	})
}

// TestNoJudgementIsOnRecord: rules that come to no judgement refuse, and the audit log has that decision once for each head.
func TestNoJudgementIsOnRecord(t *testing.T) {
	broken, err := policy.Load(rego.Rules(), fstest.MapFS{"broken.rego": {Data: []byte(`package site

deny contains {"id": "S1", "unit": "", "path": "", "msg": sprintf("%v", [x])} if {
	some unit in input.units
	unit.after.run.args[0] == "two"
	x := to_number(unit.after.run.args[0])
}
`)}, "broken_test.rego": {Data: []byte(`package site_test

import data.site

test_others_pass if count(site.deny) == 0 with input as {"units": []}
`)}})
	if err != nil {
		t.Fatal(err)
	}
	story(t, func(t *testing.T, w *world) {
		w.r.Rules = func(fs.FS) (*policy.Set, error) { return broken, nil }
		w.unit("relay", "1", "")
		w.push("v1")
		w.reconcile(Converged)
		w.unit("relay", "two", "")
		for _, head := range []string{w.push("U-33 a rule that fails"), w.push("the same again")} {
			w.head = head
			for range 3 {
				if rec := w.reconcile(Refused); rec.Stage != "policy" || !strings.HasPrefix(rec.Reason, "E_POLICY_ERROR") {
					t.Fatalf("refused at %s: %s; want E_POLICY_ERROR", rec.Stage, rec.Reason)
				}
			}
			if got := w.decisions(head); len(got) != 1 || len(got[0].Denied) != 1 || got[0].Denied[0].ID != "E_POLICY_ERROR" || got[0].Policy != broken.Digest() || len(got[0].Input) == 0 {
				t.Errorf("the audit log has %+v, want one decision, denied with E_POLICY_ERROR, and its input", got)
			}
		}
	})
}

// decisions are those of a commit in the audit log.
func (w *world) decisions(id string) (list []policy.Decision) {
	w.t.Helper()
	records, err := w.log.ByCommit(id)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, record := range records {
		if record.Kind != "decision" {
			continue
		}
		var entry DecisionEntry
		if err := json.Unmarshal(record.Body, &entry); err != nil {
			w.t.Fatal(err)
		}
		list = append(list, entry.Decision)
	}
	return list
}

func TestTheWorldDoesNotAnswer(t *testing.T) {
	for _, call := range []string{"source.Head", "images.Describe", "images.Fetch", "backend.Observe", "backend.Apply"} {
		t.Run(call, func(t *testing.T) {
			story(t, func(t *testing.T, w *world) {
				w.unit("relay", "1", "")
				w.push("v1")
				w.reconcile(Converged)
				w.unit("relay", "2", "")
				v2 := w.push("v2")
				w.faults.armed = &fault{call: call}
				rec := w.reconcile(Waiting)
				if !strings.Contains(rec.Reason, errFault.Error()) {
					t.Errorf("reason %q does not say %q", rec.Reason, errFault)
				}
				if rec = w.reconcile(Converged); rec.Good != v2 {
					t.Errorf("good %s, want %s", rec.Good, v2)
				}
				w.wantRunning("relay=2")
			})
		})
	}
}

func TestFirstCommitFails(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.failing("1")
		w.unit("relay", "1", "")
		w.push("v1")
		rec := w.reconcile(Stuck)
		w.wantRunning("")
		if !strings.Contains(rec.Reason, "no earlier good commit") {
			t.Errorf("reason %q", rec.Reason)
		}
		w.reconcile(Stuck)
		w.unit("relay", "2", "")
		w.push("v2")
		w.reconcile(Converged)
		w.wantRunning("relay=2")
	})
}

func TestP05AFailedVersionIsNeverPlacedAgain(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.unit("relay", "1", "")
		w.push("v1")
		w.reconcile(Converged)
		w.failing("2")
		w.unit("relay", "2", "")
		w.push("v2")
		w.reconcile(Reverted)
		w.reconcile(Reverted)
		w.unit("other", "1", "")
		w.push("v2 once more, with something else")
		w.faults.seen = nil
		rec := w.reconcile(Refused)
		if !strings.Contains(rec.Reason, "E_FAILED_BEFORE") || slices.Contains(w.faults.seen, "backend.Apply") {
			t.Errorf("reason %q, calls %v", rec.Reason, w.faults.seen)
		}
	})
}

func TestAMendedProbeIsAnotherTry(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.unit("relay", "1", "")
		w.push("v1")
		w.reconcile(Converged)
		w.fake.Program = func(p *fake.Process) (int, bool) { return 7, len(p.Argv) > 0 && p.Argv[0] == "/check" }
		probe := func(text string) {
			w.files["units/relay/unit.yaml"] = strings.Replace(w.files["units/relay/unit.yaml"], "health: {process: {},", "health: {"+text+",", 1)
		}
		w.unit("relay", "2", "")
		probe("exec: {argv: [/check]}")
		w.push("v2, asked wrongly")
		w.reconcile(Reverted)
		w.reconcile(Reverted)
		w.unit("relay", "2", "")
		w.push("v2, asked rightly")
		w.reconcile(Converged)
		w.wantRunning("relay=2")
	})
}

func TestRevertWhileTheBranchMoves(t *testing.T) {
	begin := func(w *world) string {
		w.unit("relay", "1", "")
		w.push("v1")
		w.reconcile(Converged)
		w.failing("2")
		w.unit("relay", "2", "")
		return w.push("v2")
	}
	t.Run("to a commit with the same fault", func(t *testing.T) {
		story(t, func(t *testing.T, w *world) {
			begin(w)
			w.moved = func(*memSource) { w.files["README"] = "hello"; w.push("words") }
			w.reconcile(Reverted)
			w.reconcile(Reverted)
			w.wantRunning("relay=1")
			if w.pushes != 1 {
				t.Errorf("%d pushes, want 1", w.pushes)
			}
		})
	})
	t.Run("to the mended version", func(t *testing.T) {
		story(t, func(t *testing.T, w *world) {
			begin(w)
			w.moved = func(*memSource) { w.unit("relay", "3", ""); w.push("v3") }
			rec := w.reconcile(Reverted)
			if w.pushes != 0 || !strings.Contains(rec.Reason, "moved on") {
				t.Errorf("%d pushes, reason %q: a mended branch must not be taken back", w.pushes, rec.Reason)
			}
			w.reconcile(Converged)
			w.wantRunning("relay=3")
		})
	})
	t.Run("and the remote takes no push", func(t *testing.T) {
		story(t, func(t *testing.T, w *world) {
			v2 := begin(w)
			w.refuse = true
			rec := w.reconcile(Reverted)
			if !strings.Contains(rec.Reason, "protected branch") || rec.Bad[0].Commit != v2 {
				t.Errorf("reason %q", rec.Reason)
			}
			w.reconcile(Reverted)
			w.wantRunning("relay=1")
			w.refuse = false
			w.reconcile(Reverted)
			if w.pushes != 1 {
				t.Errorf("%d pushes once it may, want 1", w.pushes)
			}
		})
	})
}

// TestT37NoRevertThatWouldNotBeAccepted: beyond the bound of a day the host goes back and pushes nothing, and still says what failed.
func TestT37NoRevertThatWouldNotBeAccepted(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.unit("relay", "good", "")
		w.push("good")
		w.reconcile(Converged)
		w.fake.Program = func(p *fake.Process) (int, bool) { return 3, p.Workload.Run.Args[0] != "good" }
		for n := range 11 {
			w.unit("relay", fmt.Sprint("bad-", n), "")
			w.push("bad")
			rec := w.reconcile(Reverted)
			if n < 10 {
				w.reconcile(Reverted)
			} else if w.pushes != 10 || !strings.Contains(rec.Reason, "relay: process: ") || !strings.Contains(rec.Reason, "accepts no more reverts today") {
				t.Errorf("%d pushes, reason %q", w.pushes, rec.Reason)
			}
			w.wantRunning("relay=good")
		}
	})
}

// TestBeyondTheBoundTheReasonStays: what failed is told also once another host has taken it back and this one may not follow; and a revert that
// waited for the next day is on record before it is pushed.
func TestBeyondTheBoundTheReasonStays(t *testing.T) {
	begin := func(w *world) (bad string) {
		w.r.Trust.RevertsPerDay = 1
		w.unit("relay", "good", "")
		w.push("good")
		w.reconcile(Converged)
		w.fake.Program = func(p *fake.Process) (int, bool) { return 3, p.Workload.Run.Args[0] != "good" }
		w.unit("relay", "bad-1", "")
		w.push("bad")
		w.reconcile(Reverted)
		w.reconcile(Reverted)
		w.unit("relay", "bad-2", "")
		bad = w.push("bad too")
		w.reconcile(Reverted)
		w.wantRunning("relay=good")
		return bad
	}
	t.Run("another host takes it back", func(t *testing.T) {
		story(t, func(t *testing.T, w *world) {
			bad := begin(w)
			if _, err := w.Revert(t.Context(), Revert{Good: w.journal.rec.Good, Head: bad, Host: "edge-2"}); err != nil {
				t.Fatal(err)
			}
			rec := w.reconcile(Refused)
			for _, part := range []string{"E_REVERT", "1 reverts in the last 24 hours", "it would take back " + bad + ", which failed here", "relay: process: ", "ended with status 3"} {
				if !strings.Contains(rec.Reason, part) {
					t.Errorf("reason %q, want %q in it", rec.Reason, part)
				}
			}
			w.wantRunning("relay=good")
		})
	})
	t.Run("a day later", func(t *testing.T) {
		story(t, func(t *testing.T, w *world) {
			bad := begin(w)
			time.Sleep(25 * time.Hour)
			w.reconcile(Reverted)
			records, err := w.log.ByCommit(bad)
			if err != nil || w.pushes != 2 {
				t.Fatalf("%d pushes (%v), want the second", w.pushes, err)
			}
			if !slices.ContainsFunc(records, func(r audit.Record) bool { return r.Kind == "revert" }) {
				t.Errorf("the revert of %s was pushed and is not on record", bad)
			}
		})
	})
}

func TestNeedsComeFirst(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.unit("app", "1", "needs: [bus]\n")
		w.unit("bus", "1", "")
		w.push("both")
		w.fake.Program = func(p *fake.Process) (int, bool) {
			if p.Workload.Unit != "bus" {
				t.Errorf("%s was started although what it needs is not healthy", p.Workload.Unit)
			}
			return 1, true
		}
		rec := w.reconcile(Stuck)
		if !strings.HasPrefix(rec.Reason, "bus: ") {
			t.Errorf("reason %q, want bus to be blamed", rec.Reason)
		}
	})
}

func TestStuckOnTheGoodCommit(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.unit("relay", "1", "")
		v1 := w.push("v1")
		w.reconcile(Converged)
		w.failing("1")
		w.fake.Kill(w.only("relay"))
		for range 2 {
			time.Sleep(2 * time.Second)
			if _, err := w.r.Reconcile(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		rec := w.reconcile(Stuck)
		if rec.Good != v1 || len(rec.Bad) != 0 || w.pushes != 0 {
			t.Errorf("record %+v: the good commit was blamed", rec)
		}
		w.failing("none")
		time.Sleep(time.Hour) // its backend starts it again
		w.reconcile(Stuck)    // one pass is not enough
		time.Sleep(10 * time.Second)
		w.reconcile(Stuck)
		time.Sleep(time.Minute)
		w.reconcile(Converged)
	})
}

func TestP03RepairsEnd(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.unit("relay", "1", "")
		w.push("v1")
		w.reconcile(Converged)
		name := w.fake.Workloads()[0].Name
		for range maxRepairs {
			w.fake.Damage(name, "test")
			w.reconcile(Converged)
		}
		w.fake.Damage(name, "test")
		if rec := w.reconcile(Stuck); !strings.Contains(rec.Reason, "repeated 5 times") {
			t.Errorf("reason %q", rec.Reason)
		}
	})
}

func TestT56ChangedBase(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.unit("relay", "1", "")
		w.push("v1")
		w.reconcile(Converged)
		started := w.fake.Calls("Apply")
		w.images.drift[w.fake.Workloads()[0].Image.Content] = true
		time.Sleep(2 * time.Minute)
		w.reconcile(Converged)
		w.wantRunning("relay=1")
		if w.fake.Calls("Apply") != started+1 || len(w.onChanged()) != 0 {
			t.Errorf("%d calls of Apply after the base changed, want one more than %d; still on it: %v", w.fake.Calls("Apply"), started, w.onChanged())
		}
	})
}

// TestT56ADriftIsOnRecordOnce: also when it cannot be mended for long.
func TestT56ADriftIsOnRecordOnce(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.unit("relay", "1", "")
		w.push("v1")
		w.reconcile(Converged)
		image := w.fake.Workloads()[0].Image
		w.images.drift[image.Content], w.images.broken[image.Ref] = true, errFault
		time.Sleep(2 * time.Minute)
		w.reconcile(Waiting)
		records := w.records()
		for range 5 {
			w.reconcile(Waiting)
			time.Sleep(2 * time.Minute)
		}
		if got := w.records(); got != records {
			t.Errorf("%d records more while nothing changed", got-records)
		}
	})
}

// TestT56AllUsersOfAChangedBase has two units with one image: neither may go on with the copy that was replaced, even if starting one of them
// again fails at first; and none is started again more often than that takes.
func TestT56AllUsersOfAChangedBase(t *testing.T) {
	for _, fails := range []bool{false, true} {
		story(t, func(t *testing.T, w *world) {
			w.unit("relay", "1", "")
			w.unit("web", "1", "")
			w.push("v1")
			w.reconcile(Converged)
			w.images.drift[w.fake.Workloads()[0].Image.Content] = true
			started := w.fake.Calls("Apply")
			time.Sleep(2 * time.Minute)
			if fails {
				w.faults.armed = &fault{call: "backend.Apply", times: 2}
				w.reconcile(Waiting)
			}
			for range 5 {
				w.reconcile(Converged)
				time.Sleep(2 * time.Minute)
			}
			if got := w.fake.Calls("Apply") - started; got != 2 {
				t.Errorf("starting fails %v: %d starts, want 2", fails, got)
			}
			w.wantRunning("relay=1 web=1")
			if on := w.onChanged(); len(on) != 0 {
				t.Errorf("starting fails %v: %v still have the copy that was replaced", fails, on)
			}
		})
	}
}

// TestT56ReplacedWhileAway: the image's copy is replaced while no agent runs; what was started from the old one is started again.
func TestT56ReplacedWhileAway(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.unit("relay", "1", "")
		w.push("v1")
		w.reconcile(Converged)
		old := w.fake.Workloads()[0].Image
		w.images.drift[old.Content] = true
		w.images.copies[old.SHA256]++
		w.start()
		w.reconcile(Converged)
		if on := w.onChanged(); len(on) != 0 {
			t.Errorf("%v still stand on the copy that was replaced", on)
		}
	})
}

// TestCrashTable fails each outside call before and after its effect and ends the agent there, as a kill would; a new agent must come to
// the same end, with one revert and nothing half-done.
func TestCrashTable(t *testing.T) {
	calls := []string{"source.Head", "source.At", "source.Between", "images.Describe", "images.Fetch", "images.Clear", "backend.Fingerprint", "backend.Observe",
		"journal.Save trying", "backend.Apply", "backend.Remove", "backend.Exec"}
	ends := map[string][]string{
		"good": {"journal.Save " + string(Converged)},
		"ends": {"journal.Save " + string(Reverted), "source.Revert"},
		"ill":  {"journal.Save " + string(Reverted), "source.Revert"},
	}
	for version, own := range ends {
		for _, call := range slices.Concat(calls, own) {
			for _, after := range []bool{false, true} {
				hit := true
				for nth := 1; hit && nth <= 3; nth++ { // the last is one more than there are, and tests nothing
					t.Run(fmt.Sprintf("%s/%s/after=%v/%d", version, call, after, nth), func(t *testing.T) {
						story(t, func(t *testing.T, w *world) { hit = crash(t, w, version, fault{call: call, after: after, times: nth}) })
					})
					if nth == 1 && !hit {
						t.Errorf("%s/%s: no such call was made", version, call)
					}
				}
			}
		}
	}
}

// crash plays one row: version 2 is good, or its programs end at once, or all of it runs and the last answers that it is ill. hit says
// whether the call was made.
func crash(t *testing.T, w *world, version string, at fault) (hit bool) {
	unit := func(name, version, text string) {
		w.unit(name, version, text)
		path := "units/" + name + "/unit.yaml"
		w.files[path] = strings.Replace(w.files[path], "process: {}", "exec: {argv: [/check]}", 1)
	}
	w.fake.Program = func(p *fake.Process) (int, bool) {
		second := p.Workload.Run.Args[0] == "2"
		if slices.Equal(p.Argv, []string{"/check"}) {
			return map[bool]int{true: 1}[second && version == "ill" && p.Workload.Unit == "relay"], true
		}
		return 3, second && version == "ends"
	}
	unit("relay", "1", "")
	unit("bus", "1", "")
	w.push("v1")
	w.reconcile(Converged)
	unit("relay", "2", "needs: [bus]\n")
	unit("bus", "2", "")
	w.push("v2")
	bad, want, outcome := version != "good", "bus=2 relay=2", Converged
	if bad {
		want, outcome = "bus=1 relay=1", Reverted
	}
	ctx, cancel := context.WithCancel(t.Context())
	w.faults.armed, w.faults.cancel = &at, cancel
	for range 3 {
		if _, err := w.r.Reconcile(ctx); ctx.Err() != nil && err == nil {
			t.Error("a pass whose context ended gave no error")
		}
	}
	hit = w.faults.armed == nil
	w.faults.armed, w.faults.cancel = nil, nil
	w.start()
	var rec Record
	var err error
	for range 4 {
		if rec, err = w.r.Reconcile(t.Context()); err != nil && !errors.Is(err, errFault) {
			t.Fatal(err)
		}
	}
	if rec.Outcome != outcome || rec.Trying != "" {
		t.Errorf("ended %s (%s: %s), trying %q; want %s", rec.Outcome, rec.Stage, rec.Reason, rec.Trying, outcome)
	}
	w.wantRunning(want)
	if reverts := w.pushes; bad && reverts != 1 || !bad && reverts != 0 {
		t.Errorf("%d reverts were pushed", reverts)
	}
	cancel()
	return hit
}
