package trust

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/registry/merkle"
)

const (
	actionWaiver = "waiver"
	maxWaived    = 32 // rules in one
)

// MaxWaiver is how far away the end of a waiver may be.
const MaxWaiver = 14 * 24 * time.Hour

// Waiver is what was established about letting one rule's denials of one unit's content pass. It takes what a change of tier 0 takes. Which
// rules can be waived is for the policy.
type Waiver struct {
	ID        string     `json:"id"`
	Missing   int        `json:"missing"` // approvals; 0: it is granted
	Counted   []Approval `json:"counted"`
	Uncounted []Approval `json:"uncounted"`
	Reason    string     `json:"reason"` // that was signed last
}

// Waiving is the predicate that lets some rules' denials of the same change pass. It must expire within [MaxWaiver].
func (p Predicate) Waiving(ids []string, reason string) Predicate {
	p.Action, p.Tier, p.Waives, p.Reason = actionWaiver, 0, ids, reason
	return p
}

// waiverFault says why a predicate is no good waiver, or waives although it is none; "" if it is good.
func (p Predicate) waiverFault(now time.Time) string {
	switch {
	case p.Action != actionWaiver && (len(p.Waives) > 0 || p.Reason != ""):
		return "it waives rules, and its action is " + refusal.Clip(p.Action, 20) + "; want " + actionWaiver
	case p.Action != actionWaiver:
	case len(p.Waives) == 0 || len(p.Waives) > maxWaived || p.Reason == "":
		return fmt.Sprintf("it waives %d rules for the reason %q; want 1 to %d, and a reason", len(p.Waives), refusal.Clip(p.Reason, 40), maxWaived)
	case p.Expires.Sub(now) > MaxWaiver:
		return fmt.Sprintf("it is good until %s; want at most %v from now", p.Expires.UTC().Format(time.RFC3339), MaxWaiver)
	}
	return ""
}

// waiver is what an approval of a waiver for a unit's change is compared with.
func (q *quorum) waiver(u *UnitFacts) *UnitFacts {
	return &UnitFacts{Unit: u.Unit, Action: actionWaiver, From: u.From, To: u.To, Need: q.root.Tiers[0].Need, ProfileChanges: u.ProfileChanges}
}

// waiving is one rule that somebody wants to let pass: who counts for that, and the newest reason.
type waiving struct {
	UnitFacts
	reason string
}

// waive counts an approval for each rule that it waives.
func (q *quorum) waive(u *UnitFacts, p Predicate, a Approval) {
	for _, id := range p.Waives[:min(len(p.Waives), maxWaived)] {
		id = refusal.Clip(id, 40)
		if q.waived[id] == nil {
			q.waived[id] = &waiving{UnitFacts: *q.waiver(u)}
		}
		q.waived[id].reason = refusal.Clip(p.Reason, 200)
		q.add(&q.waived[id].UnitFacts, a)
	}
}

// waivers are what the unit's waivers came to.
func (q *quorum) waivers(u *UnitFacts) {
	for _, id := range slices.Sorted(maps.Keys(q.waived)) {
		w := q.waived[id]
		q.organisations(&w.UnitFacts)
		u.Waivers = append(u.Waivers, Waiver{ID: id, Missing: w.Missing(), Reason: w.reason, Counted: append([]Approval{}, w.Counted...), Uncounted: append([]Approval{}, w.Uncounted...)})
	}
}

// Cooling is a change whose approvals are complete and whose tier makes it wait.
type Cooling struct {
	Unit   string        `json:"unit"`
	Change merkle.Digest `json:"change"` // over what was approved
	Since  time.Time     `json:"since"`
}

// change is over all that an approval of the unit's change names.
func (u *UnitFacts) change() merkle.Digest {
	return merkle.BlobRoot(fmt.Append(nil, u.Unit, " ", u.Action, " ", u.Tier, " ", u.From, " ", u.To, " ", u.ProfileChanges))
}

// cool says since when a change of a tier with a cool-down has all its approvals, and until when it waits. On a host that has accepted nothing
// nothing waits: there is nothing that could be kept meanwhile.
func (j *judgement) cool(root *Root, u *UnitFacts) {
	wait, err := time.ParseDuration(root.Tiers[u.Tier].CoolDown)
	if err != nil || u.Missing() > 0 || j.state.Accepted.Commit == "" { // no error but that of none: the root was checked
		return
	}
	u.Complete = j.facts.Time
	for _, c := range j.state.Cooling {
		if c.Unit == u.Unit && c.Change == u.change() {
			u.Complete = c.Since
		}
	}
	if until := u.Complete.Add(wait); j.facts.Time.Before(until) {
		u.Cools = until
	}
}

// Cool notes since when the changes of a head wait. One whose approvals are no longer complete, or that is gone from the head, begins anew when
// it comes again: who objects takes an approval or the change away.
func (v *Verifier) Cool(_ context.Context, facts Facts) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	s, err := v.load()
	if err != nil || s.Accepted.Commit == "" {
		return err
	}
	var cooling []Cooling
	for _, u := range facts.Units {
		if !u.Complete.IsZero() {
			cooling = append(cooling, Cooling{u.Unit, u.change(), u.Complete.UTC()})
		}
	}
	if slices.EqualFunc(cooling, s.Cooling, func(a, b Cooling) bool { return a.Unit == b.Unit && a.Change == b.Change && a.Since.Equal(b.Since) }) {
		return nil
	}
	s.Cooling = cooling
	return v.write(s)
}
