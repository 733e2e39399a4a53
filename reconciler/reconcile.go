package reconciler

import (
	"cmp"
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/policy"
	"github.com/kindos/kmo/policy/audit"
	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/policy/trust"
	"github.com/kindos/kmo/reconciler/gate"
	"github.com/kindos/kmo/reconciler/template"
)

// Images turns what a unit pins into verified bytes on this host.
type Images interface {
	// Describe returns what the registry knows of an image, small and verified, as the rules shall see it. A statement of it counts that one of
	// the sealers signed.
	Describe(ctx context.Context, image backends.Image, format backends.Format, sealers []crypto.PublicKey) (any, error)
	// Fetch returns the image with Content, ContentRoot and Config set. A second call for the same pins touches no network.
	Fetch(ctx context.Context, image backends.Image, format backends.Format) (backends.Image, error)
	// Check reads the content again; it must return a *refusal.Error naming what differs if a byte is not what was fetched.
	Check(ctx context.Context, image backends.Image) error
	// Repair makes the content good again from stored or fetched blobs and returns where it is now.
	Repair(ctx context.Context, image backends.Image, format backends.Format) (backends.Image, error)
	// Clear removes what this host has of images that no workload of keep has, but never content that is in use, and returns the names
	// of what it removed.
	Clear(ctx context.Context, keep []backends.Workload, inUse []string) ([]string, error)
}

// Reconciler makes one host run what its site's branch says. Its methods must not run side by side.
type Reconciler struct {
	Host     template.Host // facts of this host, but the fingerprints
	State    string        // kMO's state folder, which policy keeps units away from
	Source   Source
	Trust    *trust.Verifier
	Images   Images
	Backends map[string]backends.Backend
	Journal  Journal
	Audit    *audit.Log
	Rules    func(site fs.FS) (*policy.Set, error) // the shipped rules with the site's own, nil for none
	Logger   *slog.Logger
	Every    time.Duration // between two checks of a base's bytes; 0 means one a minute
	Wait     time.Duration // for registries, in one look; what they say later is for a later one; 0 means until they answer

	memory // owned by the one goroutine that calls Reconcile
}

// memory is what a Reconciler keeps between two looks. All of it can be had again; losing it costs time.
type memory struct {
	loader       template.Loader
	fingerprints map[string]backends.Fingerprint
	waited       time.Duration // for registries, in this look
	good         *desired      // the good commit as it was last rendered; nil until it is asked for
	sets         ruleCache
	vitals       vitals
	decided      map[string]string // by commit, the decision last written to the audit log, in short
	news         map[string]string // by kind, what recordNews wrote last
	clock        string            // what the log was told of the clock
	clearAt      time.Time         // when images are to be looked through again
	watched      gate.Memory       // of the commit that is being tried
	saved        Record            // as it is in the journal
}

// Reconcile looks once and does what is to be done. The record says how it ended; the error is for what keeps kMO itself from going
// on: its journal, its audit log, a context that ended.
func (r *Reconciler) Reconcile(ctx context.Context) (Record, error) {
	rec, err := r.look(ctx)
	if err == nil {
		rec, err = r.tell(ctx, rec)
	}
	settled := rec.Trying == "" && rec.Head == rec.Good && (rec.Outcome == Converged || rec.Outcome == Reverted) && r.good != nil && r.good.ready
	if err != nil || !settled || time.Now().Before(r.clearAt) {
		return rec, err
	}
	r.clearAt = time.Now().Add(time.Hour)
	removed, err := r.clear(ctx, rec)
	if err == nil {
		r.clearAt = time.Now().Add(24 * time.Hour)
	}
	if err != nil || len(removed) > 0 {
		r.Logger.Info("clear", "commit", rec.Good, "stage", "keep", "count", len(removed), "removed", refusal.Clip(strings.Join(removed, " "), maxReason), "err", err)
	}
	return rec, context.Cause(ctx)
}

// look is Reconcile without what comes after.
func (r *Reconciler) look(ctx context.Context) (Record, error) {
	rec, err := r.load()
	if err != nil {
		return rec, err
	}
	r.saved = rec
	r.saved.Bad = slices.Clone(rec.Bad)
	r.fingerprints, r.waited = nil, 0
	behind, err := r.Trust.Behind()
	if err != nil { // an alarm, also when no new commit asks for the state: nothing is accepted, what is good is kept
		return r.hold(ctx, rec, rec.Head, "trust", err)
	}
	r.late(&rec, behind)
	if rec.Trying != "" {
		var ended bool
		rec, ended, err = r.resume(ctx, rec)
		if err != nil || ended {
			return rec, err
		}
	}
	return r.follow(ctx, rec)
}

// late notes in the record that the clock is behind the trusted time, and logs it once: what expires does so by that time.
func (r *Reconciler) late(rec *Record, behind time.Time) {
	rec.Clock = ""
	if !behind.IsZero() {
		rec.Clock = fmt.Sprintf("E_TIME: the clock is behind the trusted time %s, by which approvals and keys are judged; want the clock set right; if it is, approvals that are valid beyond that time", behind.Format(time.RFC3339))
	}
	if rec.Clock != r.clock && rec.Clock != "" {
		r.Logger.Warn(rec.Clock)
	}
	r.clock = rec.Clock
}

// follow looks at the branch.
func (r *Reconciler) follow(ctx context.Context, rec Record) (Record, error) {
	watched := rec.Trying != "" && rec.Stage == StageWatch // it goes on at once: no head that must not run, and no silence, may delay it
	head, err := r.Source.Head(ctx)
	if err != nil && watched && ctx.Err() == nil {
		return rec, nil
	}
	if err != nil {
		return r.hold(ctx, rec, cmp.Or(head.ID, rec.Head), "source", err)
	}
	if rec.Trying == head.ID {
		return rec, nil // it goes on at the next look; resume has said why
	}
	seen, err := r.Trust.Fresh(ctx, head, r.Source)
	rec.Trust = max(rec.Trust, seen)
	if err != nil && watched && ctx.Err() == nil {
		return rec, nil
	}
	if err != nil { // what cannot be known to be the newest is neither begun nor taken back
		return r.hold(ctx, rec, head.ID, "trust", err)
	}
	bad := rec.bad(head.ID)
	switch {
	case rec.Trying != "": // only a head that may run ends a try: what is judged next is whether this one may
	case rec.Good == head.ID:
		return r.keep(ctx, rec)
	case bad != nil:
		return r.keepReverted(ctx, rec, bad)
	}
	next, stage, err := r.judge(ctx, rec, head)
	if err != nil && watched && ctx.Err() == nil {
		return rec, nil
	}
	if err != nil {
		return r.hold(ctx, rec, head.ID, stage, r.withFailure(ctx, &rec, head, err))
	}
	return r.try(ctx, rec, next)
}

// hold keeps the good commit running and records why the head does not run. While a commit is being tried its copies are left alone.
func (r *Reconciler) hold(ctx context.Context, rec Record, head, stage string, cause error) (Record, error) {
	if rec.Trying != "" {
		return r.end(ctx, rec, head, meaning(cause), stage, cause.Error())
	}
	trouble, err := r.repair(ctx, &rec)
	switch {
	case err != nil:
		return rec, err
	case trouble.reason != "":
		return r.end(ctx, rec, head, trouble.outcome, "keep", trouble.reason+"; besides, "+stage+": "+cause.Error())
	}
	return r.end(ctx, rec, head, meaning(cause), stage, cause.Error())
}

// meaning is the one place that tells refused from waiting: a refusal is a value, anything else is the world not answering.
func meaning(err error) Outcome {
	if refusal.Of(err) != nil {
		return Refused
	}
	return Waiting
}

// keep repairs the good commit, which is the head.
func (r *Reconciler) keep(ctx context.Context, rec Record) (Record, error) {
	trouble, err := r.repair(ctx, &rec)
	switch {
	case err != nil:
		return rec, err
	case trouble.reason != "":
		return r.end(ctx, rec, rec.Good, trouble.outcome, "keep", trouble.reason)
	}
	for _, bad := range rec.Bad {
		if bad.Revert == rec.Good { // the head is the revert
			return r.end(ctx, rec, rec.Good, Reverted, "gate", bad.reason())
		}
	}
	return r.end(ctx, rec, rec.Good, Converged, "", "")
}

// keepReverted keeps the good commit while the head is one that failed here, and goes on trying to take that back in Git. Where the
// good commit does not pass either, the fault may be the host's, and nothing is taken back.
func (r *Reconciler) keepReverted(ctx context.Context, rec Record, bad *Bad) (Record, error) {
	trouble, err := r.repair(ctx, &rec)
	if err != nil {
		return rec, err
	}
	if bad.Revert == "" && rec.Good != "" && trouble.outcome != Stuck {
		if err := r.takeBack(ctx, &rec, bad); err != nil {
			return rec, err
		}
	}
	if trouble.reason != "" {
		return r.end(ctx, rec, bad.Commit, trouble.outcome, "keep", trouble.reason+"; besides, "+bad.reason())
	}
	return r.end(ctx, rec, bad.Commit, badOutcome(rec), "gate", bad.reason())
}

// badOutcome is what a failed head means: without a good commit there is nothing to go back to.
func badOutcome(rec Record) Outcome {
	if rec.Good == "" {
		return Stuck
	}
	return Reverted
}

func (b Bad) reason() string {
	text := fmt.Sprintf("%s: %s: %s", b.Unit, b.Gate, b.Evidence)
	switch {
	case b.Revert != "":
		text += "; taken back by " + b.Revert
	case b.Why != "":
		text += "; not taken back in Git: " + b.Why
	}
	return text
}

// try makes the host run a commit that may run, and watches it.
func (r *Reconciler) try(ctx context.Context, rec Record, next *desired) (Record, error) {
	if err := r.Trust.Accept(ctx, next.commit, next.facts); err != nil {
		return r.hold(ctx, rec, next.commit.ID, "accept", err)
	}
	seen, err := r.Trust.Seq()
	if err != nil {
		return rec, fmt.Errorf("trust state: %w", err)
	}
	// Head stays: the last outcome speaks of it.
	rec.Trust, rec.Trying, rec.Trial = seen, next.commit.ID, next.placements()
	r.watched = nil
	if err := r.save(&rec); err != nil { // commit point: from here the host may change
		return rec, err
	}
	return r.finish(ctx, rec, next)
}

// resume goes on with a try that was interrupted. What it tries was judged and accepted before the commit point; where the host has
// changed since, so that the commit would run something else here, the try is given up, and its commit is judged like any head. ended
// says that there is nothing more to do.
func (r *Reconciler) resume(ctx context.Context, rec Record) (_ Record, ended bool, err error) {
	commit, err := r.Source.At(ctx, rec.Trying)
	var next *desired
	if err == nil {
		next, err = r.render(ctx, commit)
	}
	other := func(w backends.Workload) bool { return !rec.permits(w) }
	if refusal.Of(err) != nil || err == nil && slices.ContainsFunc(next.plan.Workloads, other) {
		rec.Trying, rec.Trial = "", nil
		return rec, false, nil
	}
	if err == nil {
		err = r.fetch(ctx, next)
	}
	if err != nil {
		return rec.note(rec.Trying, Waiting, "resume", err.Error()), false, context.Cause(ctx)
	}
	next.compare(rec) // what the try changed is what the gate judges, also where it runs already
	rec, err = r.finish(ctx, rec, next)
	return rec, rec.Trying == "", err
}

// StageWatch is where a try waits that is watched and has no verdict yet: it goes on at once, with the next Reconcile.
const StageWatch = "watch"

// finish converges the host to next and does what the gate's verdict asks for. Where it has none, the outcome is only noted.
func (r *Reconciler) finish(ctx context.Context, rec Record, next *desired) (Record, error) {
	good, err := r.goodCommit(ctx, rec)
	if err != nil {
		return rec.note(rec.Trying, Waiting, "render", "the good commit: "+err.Error()), nil
	}
	have, err := r.observe(ctx)
	if err != nil {
		return rec.note(rec.Trying, Waiting, "observe", err.Error()), nil
	}
	if r.watched == nil {
		r.watched = make(gate.Memory)
	}
	finding, err := r.converge(ctx, next, next.steps(have, exclusive(good, next)), true)
	if ctx.Err() != nil {
		return rec, context.Cause(ctx) // judges nothing: the next Reconcile goes on
	}
	if err != nil {
		return rec.note(rec.Trying, Waiting, "apply", err.Error()), nil
	}
	if finding.Verdict == gate.Undecided {
		return rec.note(rec.Trying, Waiting, StageWatch, fmt.Sprintf("%s: %s: %s", finding.Unit, finding.Gate, finding.Evidence)), nil
	}
	r.watched = nil
	if err := r.recordNews("gate", &GateEntry{r.about(next.commit.ID), finding}); err != nil {
		return rec, err
	}
	switch finding.Verdict {
	case gate.Pass:
		return r.promote(ctx, rec, next)
	case gate.Fail:
		if !next.changed[finding.Unit] { // it ran before: no reason to go back, and none to call its workload bad
			return rec.note(rec.Trying, Stuck, "gate", fmt.Sprintf("%s, which the commit does not change, does not pass: %s: %s", finding.Unit, finding.Gate, finding.Evidence)), nil
		}
		return r.goBack(ctx, rec, next, finding)
	}
	return rec.note(rec.Trying, Waiting, "gate", fmt.Sprintf("no data from %s %s: %s", finding.Unit, finding.Gate, finding.Evidence)), nil
}

// promote makes next the good commit.
func (r *Reconciler) promote(ctx context.Context, rec Record, next *desired) (Record, error) {
	if err := r.Trust.Passed(ctx, next.commit.ID); err != nil {
		return rec, fmt.Errorf("remembering what passed: %w", err)
	}
	allowed := next.placements()
	if !maps.Equal(rec.Allowed, allowed) { // else both run the same, and the way back is still the one before
		rec.Before = rec.Good
	}
	rec.Good, rec.Allowed, rec.Trying, rec.Trial = next.commit.ID, allowed, "", nil
	next.ready = true
	r.good, r.vitals, r.clearAt = next, newVitals(), time.Time{}
	if bad := r.settle(ctx, &rec, next.commit); bad != nil {
		return r.end(ctx, rec, next.commit.ID, Reverted, "gate", bad.reason())
	}
	return r.end(ctx, rec, next.commit.ID, Converged, "", "")
}

// note sets the outcome. It is what the look came to unless something else follows that says more: a try that waits may stand on a head that
// is refused.
func (rec Record) note(head string, outcome Outcome, stage, reason string) Record {
	rec.Head, rec.Outcome, rec.Stage = head, outcome, stage
	rec.Reason = refusal.Clip(strings.ReplaceAll(reason, "\n", "; "), maxReason) // joined refusals in one line
	return rec
}

// end notes the outcome and tells of it.
func (r *Reconciler) end(ctx context.Context, rec Record, head string, outcome Outcome, stage, reason string) (Record, error) {
	return r.tell(ctx, rec.note(head, outcome, stage, reason))
}

// tell makes the outcome durable and tells of it, once: in the audit log and in one line of the log. A context that ended judges nothing.
func (r *Reconciler) tell(ctx context.Context, rec Record) (Record, error) {
	if ctx.Err() != nil {
		return rec, context.Cause(ctx)
	}
	if reflect.DeepEqual(rec, r.saved) {
		return rec, nil
	}
	last := r.saved.Ending
	last.When, last.Clock = rec.When, rec.Clock // which come and go without
	told := rec.Ending == last
	rec.When = time.Now().UTC()
	if !told {
		if err := r.record("outcome", &OutcomeEntry{About: r.about(rec.Head), Outcome: rec.Outcome, Stage: rec.Stage, Reason: rec.Reason, Good: rec.Good}); err != nil {
			return rec, err
		}
	}
	if err := r.save(&rec); err != nil {
		return rec, err
	}
	if !told {
		r.Logger.Info(string(rec.Outcome), "commit", rec.Head, "stage", rec.Stage, "err", rec.Reason)
	}
	return rec, nil
}

// OutcomeEntry is what the audit log keeps of how a reconcile ended, each time that changes.
type OutcomeEntry struct {
	About
	Outcome Outcome `json:"outcome"`
	Stage   string  `json:"stage,omitempty"`
	Reason  string  `json:"reason,omitempty"`
	Good    string  `json:"good,omitempty"`
}

// maxReason bounds a reason in bytes.
const maxReason = 2000

// save makes rec durable.
func (r *Reconciler) save(rec *Record) error {
	tree, err := r.Audit.Tree()
	if err != nil {
		return fmt.Errorf("audit log: %w", err)
	}
	rec.Seq, rec.Audit = rec.Seq+1, tree
	if err := r.Journal.Save(*rec); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	r.saved = *rec
	r.saved.Bad = slices.Clone(rec.Bad)
	return nil
}

// About is what every entry of the audit log begins with.
type About struct {
	Commit string `json:"commit"`
	Host   string `json:"host"`
	// Journal is the number of the host's record then: a journal that is older than the newest entry is an alarm. The record saved after that
	// entry can be lost unseen, and then what it tells of is done again.
	Journal uint64 `json:"journal"`
}

func (r *Reconciler) about(commit string) About { return About{Commit: commit, Host: r.Host.Name} }

func (a *About) stamp(journal uint64) { a.Journal = journal }

// entry is what goes into the audit log, with the number that it is stamped with there.
type entry interface{ stamp(journal uint64) }

// load reads the journal. One that is gone, or older than what this process or the audit log has seen, is an alarm: it would take the host back
// to what it knew then, or to nothing.
func (r *Reconciler) load() (Record, error) {
	least := r.saved.Seq
	if least == 0 {
		last, err := r.Audit.Last(1) // before the journal is read: whoever plans does so beside whoever writes both
		if err != nil {
			return Record{}, err
		}
		for _, record := range last {
			var about About
			if err := json.Unmarshal(record.Body, &about); err != nil {
				return Record{}, fmt.Errorf("audit record %d: %v", record.Index, err)
			}
			least = about.Journal
		}
	}
	rec, err := r.Journal.Load()
	if err != nil {
		return rec, err
	}
	if rec.Seq < least {
		return rec, &refusal.Error{Code: "E_STATE", Subject: "the journal", Got: fmt.Sprintf("record %d, or none", rec.Seq),
			Want: fmt.Sprintf("record %d or a later one, as this host has had; put back the newest copy", least)}
	}
	rec.Host = r.Host.Name
	return rec, nil
}

// record writes to the audit log, durably, before what it speaks of takes effect.
func (r *Reconciler) record(kind string, entry entry) error {
	entry.stamp(r.saved.Seq)
	if _, err := r.Audit.Append(kind, entry); err != nil {
		return fmt.Errorf("audit log: %w", err)
	}
	return nil
}

// recordNews is record for what is found again at every look: it writes only what is not what it wrote last of that kind.
func (r *Reconciler) recordNews(kind string, entry entry) error {
	entry.stamp(0)
	text, err := json.Marshal(entry)
	if err != nil {
		return fmt.Errorf("audit log: %w", err)
	}
	said := string(text)
	if r.news[kind] == said {
		return nil
	}
	if err := r.record(kind, entry); err != nil {
		return err
	}
	if r.news == nil {
		r.news = make(map[string]string)
	}
	r.news[kind] = said
	return nil
}

// errNoBackend says that a workload exists in, or is meant for, a backend this host does not have.
var errNoBackend = errors.New("this host has no such backend")
