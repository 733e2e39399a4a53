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
	calmLeast    = time.Minute      // that what fails again and again must pass before it is well
	calmAfter    = 10 * time.Minute // without a repair or a failure, after which the count begins anew
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
	starts  map[string]int       // Restarts of each when it was last probed
	failing map[string]*failing  // by workload, also those that are well again
	checked int                  // index of the workload whose base was last checked
	when    time.Time            // of that check
	ailing  Outcome              // what the last probes came to; "" if nothing is wrong
}

// failing is a workload that does not pass, and is stuck from Failures failures on. Each end of its program is a failure, seen or not: one that
// crashes over and over does not pass in between. A failure or two are over with the next pass, unless the program ended. Anything else is
// over with Failures passes in a row that have gone on for as long as calm: nothing the first time, unless the program ended more than once,
// then a minute, and twice as long each time, so that the status of what comes and goes does not come and go with it.
type failing struct {
	count    int           // failures; 0 is over, and remembered for the next time
	passes   int           // in a row
	since    time.Time     // of the first of them
	restarts int           // of its program when it began
	last     time.Time     // of its failures
	calm     time.Duration // that it needs
	finding  gate.Finding
}

// inWords is the same while it comes and goes.
func (f *failing) inWords() string {
	return fmt.Sprintf("%s of the good commit does not pass, or not for long enough yet: %s: %s", f.finding.Unit, f.finding.Gate, f.finding.Evidence)
}

// fail counts failures, of which the finding tells. That of an end stands against what the program says, or does not say, in between.
func (f *failing) fail(times int, finding gate.Finding, status backends.Status, before int, now time.Time) {
	if f.count == 0 {
		f.restarts, f.finding = before, finding
		if now.Sub(f.last) > calmAfter {
			f.calm = 0
		}
	}
	f.count, f.passes, f.last = f.count+times, 0, now
	if status.Restarts == f.restarts || status.State == backends.Backoff {
		f.finding = finding
	}
}

// pass counts a pass.
func (f *failing) pass(status backends.Status, failures int, now time.Time) {
	if f.passes++; f.passes == 1 {
		f.since = now
	}
	calm := f.calm
	if status.Restarts > f.restarts+1 {
		calm = max(calm, calmLeast)
	}
	switch {
	case f.count < failures && status.Restarts == f.restarts:
		f.count = 0
	case f.count > 0 && f.passes >= failures && now.Sub(f.since) >= calm:
		f.count, f.calm = 0, min(max(2*calm, calmLeast), calmAfter)
	}
}

type repairs struct {
	count int
	last  time.Time
}

func newVitals() vitals {
	return vitals{repairs: map[string]repairs{}, asked: map[string]time.Time{}, starts: map[string]int{}, failing: map[string]*failing{}}
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
	steps := slices.DeleteFunc(good.steps(have, exclusive(good, good)), func(step Step) bool { return good.withheld[step.Unit] != nil })
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
		if err := r.recordNews("repair", &RepairEntry{r.about(rec.Good), steps}); err != nil {
			return trouble{}, err
		}
	}
	for _, step := range steps {
		if step.Op == Remove && good.unit(step.Unit) != nil && good.placed(step.Unit) < 0 { // a change of this host does that, and no commit
			r.Logger.Warn("remove", "commit", rec.Good, "unit", step.Name, "backend", step.Backend, "stage", "keep", "reason", step.Reason)
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
	return r.vitals.worst(good), nil
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
	for _, target := range due {
		finding, bad := failed[target.Workload]
		if finding.Verdict != gate.NoData {
			r.vitals.count(target, seen[target.Workload], finding, bad, now)
		}
	}
	worst := r.vitals.worst(good)
	r.vitals.ailing = worst.outcome
	return worst
}

// count notes the answer to a probe, and the ends of the program since the one before. An end that a probe has seen is counted already.
func (v *vitals) count(target gate.Target, status backends.Status, finding gate.Finding, bad bool, now time.Time) {
	before, known := v.starts[target.Workload]
	if !known {
		before = status.Restarts
	}
	v.starts[target.Workload] = status.Restarts
	ill, times := v.failing[target.Workload], max(status.Restarts-before, 0)
	if ill != nil && ill.count > 0 && ill.passes == 0 {
		times = max(times-1, 0)
	}
	if bad {
		times++
	} else if times > 0 {
		finding = gate.Finding{Unit: target.Unit, Gate: target.Probe.String(), Evidence: "its program ended and was started again"}
	}
	if times > 0 && ill == nil {
		ill = new(failing)
		v.failing[target.Workload] = ill
	}
	switch {
	case times > 0:
		ill.fail(times, finding, status, before, now)
	case ill != nil:
		ill.pass(status, target.Probe.Failures, now)
	}
}

// worst is the first of the good commit's workloads that has failed too often.
func (v *vitals) worst(good *desired) trouble {
	for _, target := range good.all() {
		if f := v.failing[target.Workload]; f != nil && f.count >= target.Probe.Failures {
			return trouble{Stuck, f.inWords()}
		}
	}
	return trouble{}
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

// checkBase reads the base of one workload again, each time another one's. If a byte has changed, every workload that stands on this copy is to
// have another, and the difference starts it again from that. One that could not be read or made good is the next one too.
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
	workload := list[next]
	err := r.Images.Check(ctx, workload.Image)
	if refusal.Of(err) != nil {
		err = r.replaceBase(ctx, good, workload, err)
	}
	if err == nil {
		r.vitals.when, r.vitals.checked = time.Now(), next
	}
	return err
}

// replaceBase gives every workload that stands on the same copy as this one another copy.
func (r *Reconciler) replaceBase(ctx context.Context, good *desired, workload backends.Workload, changed error) error {
	entry := &DriftEntry{About: r.about(good.commit.ID), Content: workload.Image.Content, Reason: changed.Error()}
	list := good.plan.Workloads
	var users []*backends.Image
	for i := range list {
		if list[i].Image.Content == workload.Image.Content {
			users, entry.Workloads = append(users, &list[i].Image), append(entry.Workloads, list[i].Name)
		}
	}
	if err := r.recordNews("drift", entry); err != nil {
		return err
	}
	r.Logger.Warn("drift", "commit", good.commit.ID, "unit", workload.Name, "backend", workload.Backend, "stage", "keep", "err", changed)
	image, err := r.Images.Repair(ctx, workload.Image, workload.Format)
	if err != nil {
		return err
	}
	for _, user := range users {
		user.Content, user.ContentRoot, user.Config = image.Content, image.ContentRoot, image.Config
	}
	r.clearAt = time.Time{}
	return nil
}

// DriftEntry is what the audit log keeps of a base that is not what was fetched any more.
type DriftEntry struct {
	About
	Content   string   `json:"content"`   // path of the copy
	Workloads []string `json:"workloads"` // that stand on it
	Reason    string   `json:"reason"`    // the first difference
}

// clear has everything of images removed that the good commit does not need, nor the one before, to which a person may go back, and that nothing
// runs from. Nothing is being tried.
func (r *Reconciler) clear(ctx context.Context, rec Record) ([]string, error) {
	keep := slices.Clone(r.good.plan.Workloads)
	var inUse []string
	for _, workload := range keep {
		inUse = append(inUse, workload.Image.Content)
	}
	if rec.Before != "" {
		commit, err := r.Source.At(ctx, rec.Before)
		if err != nil {
			return nil, err
		}
		before, err := r.render(ctx, commit)
		if err == nil {
			keep = append(keep, before.plan.Workloads...)
		} else if refusal.Of(err) == nil { // a commit that fits this host no more needs nothing
			return nil, err
		}
	}
	have, err := r.observe(ctx)
	if err != nil {
		return nil, err
	}
	for _, status := range have {
		inUse = append(inUse, status.Content)
	}
	return r.Images.Clear(ctx, keep, inUse)
}
