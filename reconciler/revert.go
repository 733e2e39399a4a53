package reconciler

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/policy/trust"
	"github.com/kindos/kmo/reconciler/gate"
)

const (
	maxBad    = 32  // failed commits remembered, newest first
	maxRange  = 256 // commits of a revert's range that are named in the audit log
	maxLeases = 5   // pushes of one revert before it is left to the next Reconcile
)

// noMoreReverts is why a host that has accepted as many reverts as it may does not push one.
const noMoreReverts = "this host accepts no more reverts today (trust.revertsPerDay in its file); a person must sign the way back"

// GateEntry is what the audit log keeps of a gate.
type GateEntry struct {
	About
	Finding gate.Finding `json:"finding"`
}

// newerRoot is why a host that was away while the trust root was changed does not push a revert of what came with it.
const newerRoot = "the range has a newer trust root, which no revert takes away; a person must sign the way back"

// RevertEntry is what the audit log keeps of a revert, before it is pushed.
type RevertEntry struct {
	About
	Range  []string `json:"range,omitempty"` // what else it takes back, newest first, at most 256: innocent commits too
	Revert Revert   `json:"revert"`
}

// bad returns the remembered failure of a commit, nil if it has not failed here.
func (rec *Record) bad(commit string) *Bad {
	for i := range rec.Bad {
		if rec.Bad[i].Commit == commit {
			return &rec.Bad[i]
		}
	}
	return nil
}

// settle notes that a commit which passed took back what failed in the range that it names, and returns the newest such failure, nil if
// there is none.
func (r *Reconciler) settle(ctx context.Context, rec *Record, commit Commit) *Bad {
	failed, err := r.failedIn(ctx, rec, commit)
	if err != nil {
		r.Logger.Warn("history of a revert", "commit", commit.ID, "stage", "gate", "err", err)
	}
	for _, bad := range failed {
		if bad.Revert == "" {
			bad.Revert, bad.Why = commit.ID, ""
		}
	}
	for i := range rec.Bad {
		if rec.Bad[i].Revert == commit.ID {
			return &rec.Bad[i]
		}
	}
	return nil
}

// failedIn returns what failed here of the ranges that a commit says it takes back, newest first.
func (r *Reconciler) failedIn(ctx context.Context, rec *Record, commit Commit) (failed []*Bad, err error) {
	parsed, err := trust.ParseCommit(commit.Raw)
	if err != nil {
		return nil, nil
	}
	for _, trailer := range parsed.Trailers(trust.TrailerReverts) {
		good, head, _ := strings.Cut(trailer, "..")
		taken, unknown := r.Source.Between(ctx, good, head)
		err = errors.Join(err, unknown)
		for _, one := range taken {
			if bad := rec.bad(one.ID); bad != nil {
				failed = append(failed, bad)
			}
		}
	}
	return failed, err
}

// withFailure adds to the refusal of a revert what failed here that it would take back: that is what a person must mend.
func (r *Reconciler) withFailure(ctx context.Context, rec *Record, head Commit, refused error) error {
	if one := refusal.Of(refused); one == nil || one.Code != "E_REVERT" {
		return refused
	}
	failed, _ := r.failedIn(ctx, rec, head) // for people: without it the refusal still says enough
	if len(failed) == 0 {
		return refused
	}
	return fmt.Errorf("%w; it would take back %s, which failed here: %s", refused, failed[0].Commit, failed[0].reason())
}

// goBack remembers that next is bad, durably and first, and then makes the host run the good commit again with the code that goes
// forward; last, it takes the bad commit back in Git. A crash in between is repaired like any drift.
func (r *Reconciler) goBack(ctx context.Context, rec Record, next *desired, finding gate.Finding) (Record, error) {
	bad := Bad{Commit: next.commit.ID, Unit: finding.Unit, Workload: finding.Workload, Placement: next.placements()[finding.Workload], Gate: finding.Gate, Evidence: finding.Evidence, When: time.Now().UTC()}
	if rec.Good == "" {
		bad.Why = "there is no earlier good commit"
	}
	rec.Bad = append([]Bad{bad}, rec.Bad[:min(len(rec.Bad), maxBad-1)]...)
	rec.Trying, rec.Trial = "", nil
	rec = rec.note(bad.Commit, Waiting, "revert", "it goes back: "+bad.reason())
	if err := r.save(&rec); err != nil {
		return rec, err
	}
	return r.keepReverted(ctx, rec, &rec.Bad[0])
}

// takeBack makes the revert commit and pushes it, anew from a fresh fetch while the branch moves on with the same fault in it.
// What came of it is noted in bad; the error is for what ends the Reconcile.
func (r *Reconciler) takeBack(ctx context.Context, rec *Record, bad *Bad) error {
	if may, err := r.Trust.MayRevert(); err != nil {
		return fmt.Errorf("trust state: %w", err)
	} else if !may {
		bad.Why = noMoreReverts
		return nil
	}
	if same, err := r.sameRoots(ctx, rec.Good, bad.Commit); err != nil {
		bad.Why = refusal.Clip(err.Error(), 500)
		return nil
	} else if !same {
		bad.Why = newerRoot
		return nil
	}
	revert := Revert{Good: rec.Good, Head: bad.Commit, Unit: bad.Unit, Gate: bad.Gate, Evidence: bad.Evidence, Host: rec.Host}
	told := bad.Why != "" && bad.Why != noMoreReverts // an earlier look has tried this push already
	for range maxLeases {
		if told {
			told = false
		} else if err := r.recordRevert(ctx, revert); err != nil {
			return err
		}
		commit, err := r.Source.Revert(ctx, revert)
		switch {
		case err == nil:
			bad.Revert, bad.Why = commit.ID, ""
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case !errors.Is(err, ErrMoved):
			bad.Why = refusal.Clip(err.Error(), 500)
			return nil
		}
		head, err := r.Source.Head(ctx)
		if err != nil {
			bad.Why = refusal.Clip(err.Error(), 500)
			return nil
		}
		if !r.hasFault(ctx, head, *bad) {
			bad.Why = fmt.Sprintf("the branch has moved on to %s, which does not have the fault", head.ID)
			return nil
		}
		revert.Head = head.ID
	}
	bad.Why = fmt.Sprintf("the branch moved %d times while the revert was pushed; it is tried again", maxLeases)
	return nil
}

// sameRoots says whether two commits have the same trust roots.
func (r *Reconciler) sameRoots(ctx context.Context, good, bad string) (bool, error) {
	a, err := r.Source.At(ctx, good)
	if err != nil {
		return false, err
	}
	b, err := r.Source.At(ctx, bad)
	return err == nil && a.Tree.ObjectID("trust") == b.Tree.ObjectID("trust"), err
}

// recordRevert writes to the audit log what a revert takes back.
func (r *Reconciler) recordRevert(ctx context.Context, revert Revert) error {
	entry := &RevertEntry{About: r.about(revert.Head), Revert: revert}
	taken, err := r.Source.Between(ctx, revert.Good, revert.Head)
	if err != nil { // the range is for people; going back does not wait for it
		r.Logger.Warn("history of a revert", "commit", revert.Head, "stage", "gate", "err", err)
	}
	for _, commit := range taken[:min(len(taken), maxRange)] {
		if commit.ID != revert.Head {
			entry.Range = append(entry.Range, commit.ID)
		}
	}
	return r.record("revert", entry)
}

// hasFault says whether a commit would run what failed once more.
func (r *Reconciler) hasFault(ctx context.Context, head Commit, bad Bad) bool {
	next, err := r.render(ctx, head)
	if err != nil {
		return false
	}
	return next.repeats(bad) != nil
}
