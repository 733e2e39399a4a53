package reconciler

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/reconciler/gate"
)

const (
	maxRepairs   = 5                // of one workload, in a row
	calmRun      = time.Minute      // of a program, after which it is no longer taken to crash over and over
	calmAfter    = 10 * time.Minute // without a repair, after which the count begins anew
	checkPerPass = time.Minute      // between two checks of a base's bytes, unless Reconciler.Every says otherwise
)

// trouble is what keeps the good commit from being what runs, and well. The zero value is none.
type trouble struct {
	outcome Outcome
	reason  string
}

// vitals is what the reconciler remembers, while it lives, of the good commit's workloads.
type vitals struct {
	repairs map[string]repairs   // by operation and workload
	asked   map[string]time.Time // when each was last probed
	failing map[string]*failing
	checked int       // index of the workload whose base was last checked
	when    time.Time // of that check
	ailing  Outcome   // what the last probes came to; "" if nothing is wrong
}

// failing is a workload that does not pass. It is over with the first pass while it has failed less than Failures times; after that with as
// many passes in a row, and once its program, if that has ended more than once meanwhile, has run for calmRun: one that crashes
// over and over does not pass in between.
type failing struct {
	count    int // failures since the last pass
	passes   int // in a row, since it failed Failures times
	restarts int // of its program when it began
	finding  gate.Finding
}

func (f *failing) inWords() string {
	text := fmt.Sprintf("%s of the good commit does not pass: %s: %s", f.finding.Unit, f.finding.Gate, f.finding.Evidence)
	if f.passes > 0 {
		text = fmt.Sprintf("%s of the good commit passes again, not for long enough yet; before, %s: %s", f.finding.Unit, f.finding.Gate, f.finding.Evidence)
	}
	return text
}

// over says whether one more pass ends it.
func (f *failing) over(status backends.Status, failures int, now time.Time) bool {
	if f.count < failures {
		return true
	}
	f.passes++
	return f.passes >= failures && (status.Restarts <= f.restarts+1 || now.Sub(status.Started) >= calmRun)
}

type repairs struct {
	count int
	last  time.Time
}

func newVitals() vitals {
	return vitals{repairs: map[string]repairs{}, asked: map[string]time.Time{}, failing: map[string]*failing{}}
}

// again counts one more repair and says whether it is one too many.
func (v *vitals) again(step Step, now time.Time) bool {
	of := string(step.Op) + " " + step.Name
	seen := v.repairs[of]
	if now.Sub(seen.last) > calmAfter {
		seen = repairs{}
	}
	if seen.count >= maxRepairs {
		return true
	}
	seen.count, seen.last = seen.count+1, now
	v.repairs[of] = seen
	return false
}

// repair makes the host run the good commit, whatever it runs now, and says what is wrong with it. When nothing is, it changes
// nothing and costs one look at each backend. Of a unit that cannot run as it should, what runs is left as it is.
func (r *Reconciler) repair(ctx context.Context, rec *Record) (trouble, error) {
	if r.vitals.repairs == nil { // there is no good commit yet
		r.vitals = newVitals()
	}
	if rec.Good == "" && len(rec.Bad) == 0 { // nothing is known of what should run, so what runs is nobody's to remove
		return trouble{}, nil
	}
	good, err := r.goodPlan(ctx, rec)
	if err != nil {
		return r.noAnswer(ctx, "rendering the good commit", err)
	}
	left := good.left()
	if err := r.checkBase(ctx, good); err != nil {
		left = errors.Join(left, fmt.Errorf("checking what runs: %w", err))
	}
	found, err := r.mend(ctx, *rec, good)
	if err != nil || found.reason != "" || left == nil {
		return found, err
	}
	return r.noAnswer(ctx, "keep", left)
}

// mend does what makes the host what the good plan says.
func (r *Reconciler) mend(ctx context.Context, rec Record, good *desired) (trouble, error) {
	have, err := r.observe(ctx)
	if err != nil {
		return r.noAnswer(ctx, "keep", err)
	}
	steps := slices.DeleteFunc(Diff(good.plan.Workloads, have, exclusive(good, good)), func(step Step) bool { return good.withheld[step.Unit] != nil })
	if len(steps) == 0 {
		return r.health(ctx, good, have), nil
	}
	worn := ""
	steps = slices.DeleteFunc(steps, func(step Step) bool {
		tooOften := r.vitals.again(step, time.Now())
		if tooOften {
			worn = fmt.Sprintf("%s: %s repeated %d times, and needed again: %s", step.Name, step.Op, maxRepairs, step.Reason)
		}
		return tooOften
	})
	if len(steps) > 0 {
		if err := r.recordNews("repair", RepairEntry{r.about(rec.Good), steps}); err != nil {
			return trouble{}, err
		}
	}
	finding, err := r.converge(ctx, good, steps, false)
	if err == nil {
		delete(r.news, "repair") // done; the next one is another, whatever it does
	}
	switch {
	case err != nil:
		return r.noAnswer(ctx, "repair", err)
	case ctx.Err() != nil:
		return trouble{}, context.Cause(ctx)
	case worn != "":
		return trouble{Stuck, worn}, nil
	case finding.Verdict == gate.Fail:
		return trouble{Stuck, fmt.Sprintf("%s of the good commit does not pass: %s: %s", finding.Unit, finding.Gate, finding.Evidence)}, nil
	case finding.Verdict == gate.NoData:
		return trouble{Waiting, fmt.Sprintf("no data from %s: %s", finding.Unit, finding.Evidence)}, nil
	}
	return trouble{}, nil
}

// RepairEntry is what the audit log keeps of a repair: every step with its reason.
type RepairEntry struct {
	About
	Steps []Step `json:"steps"`
}

// noAnswer is the trouble of a world that does not answer, or the end of the context.
func (r *Reconciler) noAnswer(ctx context.Context, doing string, err error) (trouble, error) {
	if ctx.Err() != nil {
		return trouble{}, context.Cause(ctx)
	}
	if refusal.Of(err) != nil {
		return trouble{Stuck, doing + ": " + err.Error()}, nil
	}
	return trouble{Waiting, doing + ": " + err.Error()}, nil
}

// health probes the good commit's workloads whose time has come. One that fails often enough is trouble, not a reason to go back.
func (r *Reconciler) health(ctx context.Context, good *desired, have []Have) trouble {
	now := time.Now()
	var due []gate.Target
	for _, target := range good.all() {
		if now.Sub(r.vitals.asked[target.Workload]) >= target.Probe.Every {
			r.vitals.asked[target.Workload] = now
			due = append(due, target)
		}
	}
	seen := byName(have)
	g := gate.Gate{Observe: func(context.Context) (map[string]backends.Status, error) { return seen, nil }, Exec: r.exec}
	failed := make(map[string]gate.Finding)
	for _, finding := range g.Once(ctx, due) {
		failed[finding.Workload] = finding
	}
	if ctx.Err() != nil {
		return trouble{} // probes that were cut short count for nothing
	}
	worst := trouble{}
	for _, target := range due {
		finding, bad := failed[target.Workload]
		status, ill := seen[target.Workload], r.vitals.failing[target.Workload]
		switch {
		case bad && finding.Verdict == gate.Fail:
			if ill == nil {
				ill = &failing{restarts: status.Restarts}
				r.vitals.failing[target.Workload] = ill
			}
			ill.count, ill.passes, ill.finding = ill.count+1, 0, finding
		case !bad && ill != nil && ill.over(status, target.Probe.Failures, now):
			delete(r.vitals.failing, target.Workload)
		}
	}
	for _, target := range good.all() {
		if f, bad := r.vitals.failing[target.Workload]; bad && f.count >= target.Probe.Failures {
			worst = trouble{Stuck, f.inWords()}
			break
		}
	}
	r.vitals.ailing = worst.outcome
	return worst
}

// Due is how long it is until a probe of the good commit is to be made; ok is false where none is, and while another commit is being tried.
func (r *Reconciler) Due() (wait time.Duration, ok bool) {
	if r.good == nil || !r.good.ready || r.saved.Trying != "" {
		return 0, false
	}
	for _, target := range r.good.all() {
		left := time.Until(r.vitals.asked[target.Workload].Add(target.Probe.Every))
		if !ok || left < wait {
			wait, ok = left, true
		}
	}
	return max(wait, 0), ok
}

// Probe makes the probes that are due between two looks at the branch: it asks no remote and mends nothing. news says that they come to
// something else than those before, which is for Reconcile to tell and to act on.
func (r *Reconciler) Probe(ctx context.Context) (news bool, err error) {
	if _, due := r.Due(); !due {
		return false, nil
	}
	have, err := r.observe(ctx)
	if err != nil {
		return false, err
	}
	before := r.vitals.ailing
	return r.health(ctx, r.good, have).outcome != before, nil
}

// checkBase reads the base of one workload again, each time another one's. If a byte has changed, every workload that has this base goes, and
// the difference starts it again from a good copy. One that could not be read or made good is the next one too.
func (r *Reconciler) checkBase(ctx context.Context, good *desired) error {
	every := r.Every
	if every == 0 {
		every = checkPerPass
	}
	list := good.plan.Workloads
	if len(list) == 0 || time.Since(r.vitals.when) < every {
		return nil
	}
	next := (r.vitals.checked + 1) % len(list)
	workload := &list[next]
	err := r.Images.Check(ctx, workload.Image)
	if err == nil {
		r.vitals.when, r.vitals.checked = time.Now(), next
	}
	if refusal.Of(err) == nil {
		return err
	}
	var users []*backends.Workload // all that have this base
	var steps []Step
	for i := range list {
		if user := &list[i]; user.Image.SHA256 == workload.Image.SHA256 && user.Image.Root == workload.Image.Root && user.Format == workload.Format {
			users = append(users, user)
			steps = append(steps, Step{Op: Apply, Unit: user.Unit, Name: user.Name, Backend: user.Backend, Reason: "its base changed: " + err.Error()})
		}
	}
	if err := r.recordNews("repair", RepairEntry{r.about(good.commit.ID), steps}); err != nil {
		return err
	}
	r.Logger.Warn("drift", "commit", good.commit.ID, "unit", workload.Name, "backend", workload.Backend, "stage", "keep", "err", err)
	image, err := r.Images.Repair(ctx, workload.Image, workload.Format)
	if err != nil {
		return err
	}
	for i, user := range users { // one that cannot be removed keeps its old base here as well, which is found changed again
		if err := r.remove(ctx, user.Backend, user.Name, steps[i].Reason); err != nil {
			return err
		}
		user.Image.Content, user.Image.ContentRoot, user.Image.Config = image.Content, image.ContentRoot, image.Config
	}
	r.vitals.when, r.vitals.checked = time.Now(), next
	delete(r.news, "repair")
	return nil
}
