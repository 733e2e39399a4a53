package reconciler

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/fake"
	"github.com/kindos/kmo/policy"
	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/reconciler/template"
)

// away is a backend that does not answer when it is asked to apply a unit.
type away struct {
	backends.Backend
	unit string
}

func (b away) Apply(ctx context.Context, w backends.Workload) error {
	if w.Unit == b.unit {
		return errFault
	}
	return b.Backend.Apply(ctx, w)
}

func TestATryIsLeftAloneWhileTheHeadMustNotRun(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.unit("bus", "1", "")
		w.unit("relay", "1", "needs: [bus]\n")
		v1 := w.push("v1")
		w.reconcile(Converged)
		w.unit("bus", "2", "")
		w.unit("relay", "2", "needs: [bus]\n")
		v2 := w.push("v2")
		whole := w.r.Backends["fake"]
		w.r.Backends["fake"] = away{whole, "relay"}
		w.reconcile(Waiting)
		const both = "bus=1 bus=2 relay=1"
		w.wantRunning(both)

		w.commit(nil, "alice@example.org", "unsigned", w.files)
		w.reconcile(Refused)
		w.wantRunning(both)
		records, saves := w.records(), w.journal.rec.Seq
		for range 5 {
			w.reconcile(Refused)
		}
		if w.records() != records || w.journal.rec.Seq != saves {
			t.Errorf("%d records and %d saves while nothing changed", w.records()-records, w.journal.rec.Seq-saves)
		}
		w.head = v1 // the branch was set back
		if rec := w.reconcile(Refused); !strings.Contains(rec.Reason, "E_ROLLBACK") || rec.Trying != v2 {
			t.Errorf("trying %s, reason %q, want E_ROLLBACK while v2 is tried", rec.Trying, rec.Reason)
		}
		w.wantRunning(both)
		w.faults.armed = &fault{call: "source.Head"}
		w.reconcile(Waiting)
		w.wantRunning(both)

		w.r.Backends["fake"] = whole
		w.head = v2
		w.reconcile(Converged)
		w.wantRunning("bus=2 relay=2")
	})
}

func TestNoCommitIsBlamedForWhatItDoesNotChange(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.unit("bus", "bus-1", "")
		w.unit("relay", "1", "needs: [bus]\n")
		w.push("v1")
		w.reconcile(Converged)
		w.failing("bus-1")
		w.fake.Kill(w.only("bus"))
		w.unit("relay", "2", "needs: [bus]\n")
		v2 := w.push("v2")
		rec := w.reconcile(Stuck)
		if len(rec.Bad) != 0 || w.pushes != 0 || !strings.HasPrefix(rec.Reason, "bus, which the commit does not change") {
			t.Fatalf("record %+v, %d pushes; want bus to be named and nothing blamed", rec, w.pushes)
		}
		w.wantRunning("bus=bus-1 relay=1")

		w.failing("none")
		time.Sleep(time.Hour) // its backend starts it again
		if rec = w.reconcile(Converged); rec.Good != v2 {
			t.Errorf("good %s, want v2", rec.Good)
		}
	})
}

func TestNothingIsTakenBackWhileTheGoodCommitFails(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		run := func(version string) { w.unit("relay", version, "overlay: {size: 1Mi, keep: [/data]}\n") }
		run("1")
		w.push("v1")
		w.reconcile(Converged)
		w.fake.Program = func(*fake.Process) (int, bool) { return 5, true } // the disk is broken
		run("2")
		v2 := w.push("v2")
		rec := w.reconcile(Stuck)
		if w.pushes != 0 || len(rec.Bad) != 1 || rec.Bad[0].Commit != v2 {
			t.Fatalf("record %+v, %d pushes; want v2 remembered and not taken back", rec, w.pushes)
		}
		w.failing("none")
		time.Sleep(time.Hour)
		w.reconcile(Reverted)
		w.wantRunning("relay=1")
		if w.pushes != 1 {
			t.Errorf("%d pushes once the good commit passes, want 1", w.pushes)
		}
	})
}

func TestOneBrokenUnitKeepsNoOtherDown(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.unit("bus", "bus-1", "")
		w.unit("relay", "1", "needs: [bus]\n")
		w.unit("sink", "1", "needs: [relay]\n")
		w.unit("web", "1", "")
		w.push("v1")
		w.reconcile(Converged)
		for _, workload := range w.fake.Workloads() { // the host was wiped
			if err := w.fake.Remove(t.Context(), workload.Name); err != nil {
				t.Fatal(err)
			}
		}
		w.failing("bus-1")
		if rec := w.reconcile(Stuck); !strings.HasPrefix(rec.Reason, "bus of the good commit does not pass") {
			t.Errorf("reason %q, want bus to be named", rec.Reason)
		}
		w.wantRunning("bus=bus-1 web=1")
		w.failing("none")
		time.Sleep(time.Hour)
		w.reconcile(Converged)
		w.wantRunning("bus=bus-1 relay=1 sink=1 web=1")

		whole := w.r.Backends["fake"]
		w.r.Backends["fake"] = away{whole, "bus"}
		for _, workload := range w.fake.Workloads() {
			if err := w.fake.Remove(t.Context(), workload.Name); err != nil {
				t.Fatal(err)
			}
		}
		w.reconcile(Waiting)
		w.wantRunning("web=1")
	})
}

func TestP03RepairsEndWhateverTheirReason(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.unit("relay", "1", "")
		w.push("v1")
		w.reconcile(Converged)
		for i := range maxRepairs {
			w.fake.Damage(w.only("relay"), fmt.Sprintf("pid %d is gone", i))
			w.reconcile(Converged)
		}
		w.fake.Damage(w.only("relay"), "another pid is gone")
		w.reconcile(Stuck)
	})
}

func TestT56ABaseThatCannotBeMadeGoodIsNotForgotten(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.unit("relay", "1", "")
		w.unit("web", "1", "")
		w.files["units/web/unit.yaml"] = strings.Replace(w.files["units/web/unit.yaml"], fmt.Sprintf("sha256:%064x", 7), fmt.Sprintf("sha256:%064x", 9), 1)
		w.push("v1")
		w.reconcile(Converged)
		started := w.fake.Calls("Apply")
		for _, workload := range w.fake.Workloads() {
			w.images.drift[workload.Image.Content] = true
		}
		time.Sleep(2 * time.Minute)
		w.faults.armed = &fault{call: "images.Fetch"}
		w.reconcile(Waiting)
		w.reconcile(Converged)
		if got := w.fake.Calls("Apply"); got != started+1 || len(w.onChanged()) != 1 {
			t.Errorf("%d starts at the next look, want 1; still on what changed: %v", got-started, w.onChanged())
		}
	})
}

func TestADecisionIsOnRecordOnce(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.unit("relay", "1", "")
		head := w.push("v1")
		whole := w.r.Rules
		w.r.Rules = func(fs.FS) (*policy.Set, error) { return nil, &refusal.Error{Code: "E_POLICY_COMPILE"} }
		w.reconcile(Refused) // at the same stage as what is allowed below
		w.r.Rules = whole
		for range 3 {
			w.faults.armed = &fault{call: "images.Fetch"}
			w.reconcile(Waiting)
		}
		w.reconcile(Converged)
		records, err := w.log.ByCommit(head)
		if err != nil {
			t.Fatal(err)
		}
		decisions := 0
		for _, record := range records {
			if record.Kind == "decision" {
				decisions++
			}
		}
		if decisions != 1 {
			t.Errorf("%d decisions on record, want 1", decisions)
		}
	})
}

// placed gives the host a label, as an operator does: with a new agent.
func (w *world) placed(site string) {
	w.start()
	w.r.Host.Labels = map[string]string{"site": site}
}

func TestWhatTheHostNewlyPlacesIsJudged(t *testing.T) {
	const north = "place: {on: {labels: {site: north}}}\n"
	large := func(w *world) { // more cores than the host has
		w.unit("cam", "1", north)
		w.files["units/cam/unit.yaml"] = strings.Replace(w.files["units/cam/unit.yaml"], "cpu: {max: 100m}", "cpu: {max: 9}", 1)
	}
	t.Run("allowed", func(t *testing.T) {
		story(t, func(t *testing.T, w *world) {
			w.unit("relay", "1", "")
			w.unit("cam", "1", north)
			w.push("v1")
			w.reconcile(Converged)
			w.wantRunning("relay=1")
			before := w.records()
			w.placed("north")
			w.reconcile(Converged)
			w.wantRunning("cam=1 relay=1")
			if got := w.records() - before; got != 2 {
				t.Errorf("%d records, want the decision and the repair", got)
			}
			before = w.records()
			w.placed("north")
			w.reconcile(Converged)
			if got := w.records() - before; got != 0 {
				t.Errorf("%d records of a host that did not change", got)
			}
		})
	})
	t.Run("denied", func(t *testing.T) {
		story(t, func(t *testing.T, w *world) {
			w.unit("relay", "1", "")
			large(w)
			w.push("v1")
			w.reconcile(Converged)
			w.placed("north")
			for range 2 {
				if rec := w.reconcile(Stuck); !strings.Contains(rec.Reason, "KT013") {
					t.Errorf("reason %q, want KT013", rec.Reason)
				}
				w.wantRunning("relay=1")
			}
			w.fake.Damage(w.only("relay"), "test")
			w.reconcile(Stuck)
			if list, err := w.fake.Observe(t.Context()); err != nil || list[0].State != backends.Running {
				t.Errorf("what may run is not repaired: %+v (%v)", list, err)
			}
			w.placed("south")
			w.reconcile(Converged)
		})
	})
	t.Run("denied with a new head", func(t *testing.T) {
		story(t, func(t *testing.T, w *world) {
			w.unit("relay", "1", "")
			large(w)
			w.push("v1")
			w.reconcile(Converged)
			w.placed("north")
			w.unit("relay", "2", "")
			w.push("v2")
			w.reconcile(Stuck)
			w.wantRunning("relay=1")
		})
	})
	t.Run("denied in the middle of a try", func(t *testing.T) {
		story(t, func(t *testing.T, w *world) {
			w.unit("relay", "1", "")
			large(w)
			w.push("v1")
			w.reconcile(Converged)
			w.unit("relay", "2", "")
			v2 := w.push("v2")
			w.faults.armed = &fault{call: "backend.Apply", after: true}
			w.reconcile(Waiting)
			w.placed("north")
			w.reconcile(Stuck)
			w.wantRunning("relay=1")
			w.placed("south")
			if rec := w.reconcile(Converged); rec.Good != v2 {
				t.Errorf("good %s, want v2", rec.Good)
			}
			w.wantRunning("relay=2")
		})
	})
}

func TestAGoodCommitWithoutItsImagesStopsNobody(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.unit("relay", "1", "")
		w.unit("web", "1", "")
		w.push("v1")
		w.reconcile(Converged)
		for _, workload := range w.fake.Workloads() {
			if workload.Unit == "relay" {
				w.images.broken[workload.Image.Ref] = errFault
			} else if err := w.fake.Remove(t.Context(), workload.Name); err != nil {
				t.Fatal(err)
			}
		}
		w.start()
		if rec := w.reconcile(Waiting); !strings.Contains(rec.Reason, errFault.Error()) {
			t.Errorf("reason %q", rec.Reason)
		}
		w.wantRunning("relay=1 web=1")

		w.start()
		w.unit("relay", "2", "")
		w.files["units/relay/unit.yaml"] = strings.Replace(w.files["units/relay/unit.yaml"], fmt.Sprintf("%064x", 7), fmt.Sprintf("%064x", 9), 1)
		w.push("v2")
		w.reconcile(Converged)
		w.wantRunning("relay=2 web=1")
	})
}

// on adds or changes the unit relay, for these backends in this order.
func (w *world) on(version, backends, more string) {
	w.unit("relay", version, more)
	w.files["units/relay/unit.yaml"] = strings.Replace(w.files["units/relay/unit.yaml"], "resources:", "    backends: ["+backends+"]\nresources:", 1)
}

func TestAGoodCommitThatFitsNoMoreStopsNoOther(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		other := &fake.Backend{}
		w.r.Backends["other"] = other
		w.on("1", "other", "")
		w.push("v1")
		w.reconcile(Converged)
		w.start() // without the other backend
		if rec := w.reconcile(Stuck); !strings.Contains(rec.Reason, "E_FIT") {
			t.Errorf("reason %q", rec.Reason)
		}
		w.on("2", "fake", "")
		w.push("v2")
		w.reconcile(Converged)
		w.wantRunning("relay=2")
	})
}

// TestWhatFailedOnOneBackendMayRunOnAnother: the very same workload, and nothing of it stays on the backend where it failed.
func TestWhatFailedOnOneBackendMayRunOnAnother(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		other := &fake.Backend{}
		w.r.Backends["other"] = other
		w.on("1", "fake", "")
		w.push("v1")
		w.reconcile(Converged)
		w.failing("2")
		w.on("2", "fake", "")
		w.push("v2")
		w.reconcile(Reverted)
		w.reconcile(Reverted)
		w.on("2", "other", "")
		w.push("v2, elsewhere")
		w.reconcile(Converged)
		w.wantRunning("")
		if list := other.Workloads(); len(list) != 1 || list[0].Run.Args[0] != "2" {
			t.Errorf("the other backend has %v, want relay 2", list)
		}
		w.on("2", "fake", "")
		w.push("v2, back where it failed")
		if rec := w.reconcile(Refused); !strings.Contains(rec.Reason, "E_FAILED_BEFORE") {
			t.Errorf("reason %q", rec.Reason)
		}
		for i := range w.journal.rec.Bad { // as an earlier version has left it, which counted any backend
			w.journal.rec.Bad[i].Backend = ""
		}
		w.unit("other", "1", "")
		w.push("v2, with something else")
		if rec := w.reconcile(Refused); !strings.Contains(rec.Reason, "E_FAILED_BEFORE") {
			t.Errorf("reason %q", rec.Reason)
		}
	})
}

// TestNoMoveWithoutWhatIsKept: neither a commit nor a change of the host has a unit begin elsewhere without its kept paths.
func TestNoMoveWithoutWhatIsKept(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		const keep = "overlay: {size: 1Mi, keep: [/var/lib/relay]}\n"
		other := &fake.Backend{}
		w.r.Backends["other"] = other
		w.on("1", "fake, other", keep)
		w.push("v1")
		w.reconcile(Converged)
		w.on("1", "other", keep)
		w.push("moved")
		if rec := w.reconcile(Refused); !strings.Contains(rec.Reason, "E_KEEP: unit relay: it runs on fake, which has what is in /var/lib/relay; on other it would begin without; want backends: [fake]") {
			t.Errorf("reason %q", rec.Reason)
		}
		w.on("2", "fake, other", keep)
		w.push("v2")
		w.reconcile(Converged)

		w.start() // on a host whose backend does not run images any more
		w.r.Backends["other"] = other
		print := fake.Able()
		print.Formats = []backends.Format{backends.Native}
		w.fake.Print = print
		if rec := w.reconcile(Stuck); !strings.Contains(rec.Reason, "E_KEEP") || len(other.Workloads()) > 0 {
			t.Errorf("reason %q, the other backend has %v", rec.Reason, other.Workloads())
		}
		w.wantRunning("relay=2")
		w.fake.Print = fake.Able()

		w.start()
		w.r.Backends["other"] = other
		w.on("2", "other", "")
		w.push("moved, and keeps nothing")
		w.reconcile(Converged)
		w.on("2", "other", keep)
		w.push("keeps anew")
		w.reconcile(Converged)
	})
}

func TestPreviewSaysWhatQuarantineRefuses(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.unit("relay", "1", "")
		w.push("v1")
		w.reconcile(Converged)
		w.failing("2")
		w.unit("relay", "2", "")
		v2 := w.push("v2")
		w.reconcile(Reverted)
		preview, err := w.r.Preview(t.Context(), v2)
		if err != nil || preview.Stage != "quarantine" || len(preview.Refusals) != 1 || preview.Refusals[0].Code != "E_FAILED_BEFORE" {
			t.Errorf("preview at %q: %v (%v), want E_FAILED_BEFORE", preview.Stage, preview.Refusals, err)
		}
	})
}

// TestAProbeAloneIsJudged: a commit that changes only what is asked of a unit is not good before the unit has answered that.
func TestAProbeAloneIsJudged(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.unit("relay", "1", "")
		v1 := w.push("v1")
		w.reconcile(Converged)
		w.fake.Program = func(p *fake.Process) (int, bool) { return 7, len(p.Argv) > 0 && p.Argv[0] == "/check" }
		w.files["units/relay/unit.yaml"] = strings.Replace(w.files["units/relay/unit.yaml"], "health: {process: {},", "health: {exec: {argv: [/check]},", 1)
		v2 := w.push("asked wrongly")
		rec := w.reconcile(Reverted)
		if rec.Good != v1 || len(rec.Bad) != 1 || rec.Bad[0].Commit != v2 {
			t.Fatalf("record %+v, want v2 bad", rec)
		}
		if rec = w.reconcile(Reverted); rec.Good != w.head {
			t.Errorf("good %s, want the revert", rec.Good)
		}
		w.wantRunning("relay=1")
	})
}

func TestEveryFieldOfAProbeIsAsked(t *testing.T) {
	seen := map[string]bool{}
	for _, health := range []template.Health{
		{HTTP: &template.HTTPProbe{Port: "http", Path: "/"}},
		{HTTP: &template.HTTPProbe{Port: "http", Path: "/", Status: 204}},
		{HTTP: &template.HTTPProbe{Port: "admin", Path: "/"}},
		{HTTP: &template.HTTPProbe{Port: "http", Path: "/"}, Failures: 9},
		{HTTP: &template.HTTPProbe{Port: "http", Path: "/"}, Every: template.Duration(time.Second)},
	} {
		seen[asked(template.Check{Health: health})] = true
	}
	if len(seen) != 5 {
		t.Errorf("%d digests of 5 different probes", len(seen))
	}
}

// live does for a while what an agent does: it looks at the branch every ten seconds, and at once when a probe that is due brings news.
func (w *world) live(d time.Duration) (last Record) {
	w.t.Helper()
	end, look := time.Now().Add(d), time.Now()
	for time.Now().Before(end) {
		wait, probes := w.r.Due()
		if left := time.Until(look); !probes || left < wait {
			wait = max(left, 0)
		}
		time.Sleep(wait)
		news, err := w.r.Probe(w.t.Context())
		if err != nil {
			w.t.Fatal(err)
		}
		if news || !time.Now().Before(look) {
			last, look = w.look(), time.Now().Add(10*time.Second)
		}
	}
	return last
}

// TestCrashingOverAndOver: a program that runs well between two ends is not well in between, whatever the pace of its ends and of its probes.
// That is told once. It is well again once it has run for a while.
func TestCrashingOverAndOver(t *testing.T) {
	for _, test := range []struct {
		name, probe string
		lives, down time.Duration
	}{
		{"seen at each end", "every: 200ms, start: 1s, failures: 3", 4 * time.Second, time.Second},
		{"seen at each end, which comes when it seemed calm", "every: 200ms, start: 1s, failures: 3", 70 * time.Second, time.Second},
		{"never seen while it is down", "every: 5s, failures: 3", 4 * time.Second, 0},
		{"never seen while it is down, at the pace of the probes", "every: 5s, failures: 3", 8 * time.Second, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			story(t, func(t *testing.T, w *world) {
				w.unit("relay", "1", "")
				w.files["units/relay/unit.yaml"] = strings.Replace(w.files["units/relay/unit.yaml"], "every: 1s, start: 2s, failures: 2", test.probe, 1)
				w.push("v1")
				w.reconcile(Converged)
				w.live(10 * time.Minute)
				crash := func(times int) (last Record) {
					for range times {
						w.fake.Kill(w.only("relay"))
						last = w.live(test.lives + test.down)
					}
					return last
				}
				w.fake.Pause = max(test.down>>10, 1) // doubled ten times
				crash(20)
				before := w.records()
				if rec := crash(int(time.Hour / (test.lives + test.down))); rec.Outcome != Stuck || !strings.Contains(rec.Reason, "relay of the good commit does not pass") {
					t.Errorf("%s: %q after an hour of crashes, want stuck", rec.Outcome, rec.Reason)
				}
				if got := w.records() - before; got > 1 {
					t.Errorf("%d records more within an hour, want one at most", got)
				}
				if rec := w.live(30 * time.Minute); rec.Outcome != Converged {
					t.Errorf("%s: %q after half an hour of calm", rec.Outcome, rec.Reason)
				}
				if got := w.records() - before; got > 2 {
					t.Errorf("%d records more, want one when it was calm", got)
				}
			})
		})
	}
}

// TestAnswersThatComeAndGo: what passes and fails by turns is told of less and less often.
func TestAnswersThatComeAndGo(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.unit("relay", "1", "")
		w.files["units/relay/unit.yaml"] = strings.Replace(w.files["units/relay/unit.yaml"], "process: {}", "exec: {argv: [/check]}", 1)
		comesAndGoes, begun := false, time.Now()
		w.fake.Program = func(p *fake.Process) (int, bool) {
			if len(p.Argv) == 0 || p.Argv[0] != "/check" {
				return 0, false
			}
			if comesAndGoes && time.Since(begun)%(90*time.Second) < 10*time.Second {
				return 1, true
			}
			return 0, true
		}
		w.push("v1")
		w.reconcile(Converged)
		before := w.records()
		comesAndGoes = true
		if rec := w.live(time.Hour); rec.Outcome != Stuck {
			t.Errorf("%s: %q, want stuck", rec.Outcome, rec.Reason)
		}
		if got := w.records() - before; got > 5 {
			t.Errorf("%d records within an hour of %v, want five at most: stuck, converged, stuck, converged, stuck", got, 90*time.Second)
		}
		comesAndGoes = false
		if rec := w.live(time.Hour); rec.Outcome != Converged {
			t.Errorf("%s: %q after an hour of calm", rec.Outcome, rec.Reason)
		}
	})
}

// TestARepairOfOneEndsNoTroubleOfAnother: what is stuck is told all the same while something else was just repaired.
func TestARepairOfOneEndsNoTroubleOfAnother(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.unit("relay", "1", "")
		w.unit("web", "1", "")
		w.push("v1")
		w.reconcile(Converged)
		w.fake.Pause = time.Hour
		w.fake.Kill(w.only("relay"))
		if rec := w.live(time.Minute); rec.Outcome != Stuck {
			t.Fatalf("%s, want stuck", rec.Outcome)
		}
		w.fake.Damage(w.only("web"), "test")
		if rec := w.reconcile(Stuck); !strings.HasPrefix(rec.Reason, "relay of the good commit") {
			t.Errorf("reason %q, want relay's", rec.Reason)
		}
	})
}

// forgets is a backend that can do nothing any more from the second time on that it is asked.
type forgets struct {
	backends.Backend
	asked *int
}

func (b forgets) Fingerprint(ctx context.Context) (backends.Fingerprint, error) {
	able, err := b.Backend.Fingerprint(ctx)
	if *b.asked++; *b.asked > 1 {
		able.Features = nil
	}
	return able, err
}

// TestNothingIsStoppedForWhatCannotStart: the old copy of a unit that cannot stand beside the new one runs on while the backend does not answer,
// or says that it cannot run the new one.
func TestNothingIsStoppedForWhatCannotStart(t *testing.T) {
	begin := func(w *world) {
		run := func(version string) { w.unit("relay", version, "overlay: {size: 1Mi, keep: [/data]}\n") }
		run("1")
		w.push("v1")
		w.reconcile(Converged)
		run("2")
		w.push("v2")
	}
	t.Run("no answer", func(t *testing.T) {
		story(t, func(t *testing.T, w *world) {
			begin(w)
			w.faults.armed = &fault{call: "backend.Fingerprint", times: 2}
			w.reconcile(Waiting)
			w.wantRunning("relay=1")
			w.reconcile(Converged)
			w.wantRunning("relay=2")
		})
	})
	t.Run("cannot", func(t *testing.T) {
		story(t, func(t *testing.T, w *world) {
			begin(w)
			w.r.Backends["fake"] = forgets{w.r.Backends["fake"], new(int)}
			if rec := w.reconcile(Reverted); !strings.Contains(rec.Reason, "fake has no limit-cpu here") {
				t.Errorf("reason %q", rec.Reason)
			}
			w.wantRunning("relay=1")
			if got := w.fake.Calls("Remove"); got != 0 {
				t.Errorf("%d times something was stopped", got)
			}
		})
	})
}

// TestWhatTheHostNoLongerPlaces: that a change of the host took a unit away is said so, in the plan, on record and as a warning.
func TestWhatTheHostNoLongerPlaces(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.unit("relay", "1", "")
		w.unit("cam", "1", "place: {on: {labels: {site: north}}}\n")
		w.placed("north")
		v1 := w.push("v1")
		w.reconcile(Converged)
		w.wantRunning("cam=1 relay=1")

		w.placed("south")
		var log bytes.Buffer
		w.r.Logger = slog.New(slog.NewTextHandler(&log, nil))
		const reason = "this host is not asked for it any more: label site is "
		preview, err := w.r.Preview(t.Context(), v1)
		if err != nil || len(preview.Steps) != 1 || preview.Steps[0].Reason != reason+`"south"; want north` {
			t.Errorf("plan %+v (%v), want %q", preview.Steps, err, reason)
		}
		w.reconcile(Converged)
		w.wantRunning("relay=1")
		records, err := w.log.ByCommit(v1)
		if err != nil {
			t.Fatal(err)
		}
		told := ""
		for _, record := range records {
			if record.Kind == "repair" {
				told += string(record.Body)
			}
		}
		if !strings.Contains(told, reason) || strings.Count(log.String(), "level=WARN") != 1 || !strings.Contains(log.String(), reason) {
			t.Errorf("want %q\non record: %s\nlog: %s", reason, told, &log)
		}
	})
}

// TestReasonsOfRemoval: each removal has the reason that holds.
func TestReasonsOfRemoval(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.unit("relay", "1", "")
		w.unit("web", "1", "")
		w.push("v1")
		w.reconcile(Converged)
		delete(w.files, "units/web/unit.yaml")
		w.unit("relay", "2", "")
		v2 := w.push("v2")
		preview, err := w.r.Preview(t.Context(), v2)
		if err != nil || len(preview.Steps) != 3 {
			t.Fatalf("%+v (%v)", preview.Steps, err)
		}
		for i, want := range []string{"its spec changed from ", "the site does not ask for it", "the site asks for another copy of it, " + preview.Steps[0].Name} {
			if got := preview.Steps[i].Reason; !strings.HasPrefix(got, want) {
				t.Errorf("%s %s: %q, want %q", preview.Steps[i].Op, preview.Steps[i].Name, got, want)
			}
		}
	})
}

// TestSilentRegistries: how long a look takes does not depend on how many images are waited for.
func TestSilentRegistries(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		for i := range 30 {
			w.unit(fmt.Sprint("unit-", i), "1", "")
		}
		w.push("v1")
		w.reconcile(Converged)
		for i := range 30 {
			w.unit(fmt.Sprint("unit-", i), "2", "")
		}
		w.push("v2")
		w.start() // of the good commit nothing is known either
		w.r.Wait = 10 * time.Second
		w.images.silent = true
		begun := time.Now()
		w.reconcile(Waiting)
		if took := time.Since(begun); took > 15*time.Second {
			t.Errorf("the look took %v, want about 10 s", took)
		}
		w.images.silent = false
		w.reconcile(Converged)
	})
}

// TestImagesAreCleared: what is kept is the good commit's and the one's before, over a start of the agent too, and what is run from. It is looked
// through when a commit is good, when a base was made good, and once a day.
func TestImagesAreCleared(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		cleared := func(want ...string) {
			t.Helper()
			if got := strings.Join(w.images.kept, " "); got != strings.Join(want, " ") {
				t.Errorf("kept %q, want %q", got, want)
			}
			w.images.kept = nil
		}
		image := func(version string) string {
			w.unit("relay", version, "")
			path := "units/relay/unit.yaml"
			w.files[path] = strings.Replace(w.files[path], "reg.example/relay@", "reg.example/relay-"+version+"@", 1)
			w.push(version)
			return fmt.Sprintf("reg.example/relay-%s@sha256:%064x", version, 7)
		}
		v1 := image("1")
		w.reconcile(Converged)
		cleared(v1)
		v2 := image("2")
		w.faults.armed = &fault{call: "backend.Apply"}
		w.reconcile(Waiting)
		cleared() // while v2 is tried
		w.reconcile(Converged)
		cleared(v2, v1)
		if got, want := w.images.inUse, w.fake.Workloads()[0].Image.Content; !slices.Contains(got, want) {
			t.Errorf("in use %v, want %s among it", got, want)
		}
		w.reconcile(Converged)
		cleared()
		w.start()
		w.faults.armed = &fault{call: "images.Clear"}
		w.reconcile(Converged) // that it fails is no trouble
		w.reconcile(Converged)
		cleared()
		time.Sleep(2 * time.Hour)
		w.reconcile(Converged)
		cleared(v2, v1)
		time.Sleep(25 * time.Hour)
		w.reconcile(Converged)
		cleared(v2, v1)
		w.images.drift[w.fake.Workloads()[0].Image.Content] = true
		time.Sleep(2 * time.Minute)
		w.reconcile(Converged)
		cleared(v2, v1)
		w.failing("3")
		image("3")
		w.reconcile(Reverted)
		cleared() // the head is one that failed
		w.reconcile(Reverted)
		cleared(v2, v1)
		v4 := image("4")
		w.reconcile(Converged)
		cleared(v4, v2)
	})
}
