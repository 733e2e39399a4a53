package reconciler

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/fake"
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
		w.push("v1")
		w.reconcile(Converged)
		started := w.fake.Calls("Apply")
		for _, workload := range w.fake.Workloads() {
			w.images.drift[workload.Image.Ref] = true
		}
		time.Sleep(2 * time.Minute)
		w.faults.armed = &fault{call: "images.Fetch"}
		w.reconcile(Waiting)
		w.reconcile(Converged)
		if got := w.fake.Calls("Apply"); got != started+1 || len(w.images.drift) != 1 {
			t.Errorf("%d starts at the next look, want 1; drift left: %v", got-started, w.images.drift)
		}
	})
}

func TestADecisionIsOnRecordOnce(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.unit("relay", "1", "")
		head := w.push("v1")
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
