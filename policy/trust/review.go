package trust

import (
	"context"
	"maps"
	"slices"

	"golang.org/x/crypto/ssh"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/policy/trust/signature"
)

// Review is one change as those who approve it need to see it.
type Review struct {
	Root  *Root // that judges the change, but for versions of the trust root, which the version before judges
	Units []Reviewed
}

// Reviewed is one changed unit with the approvals that are there and those that could still come.
type Reviewed struct {
	UnitFacts
	Authors []string `json:"authors"` // principals who wrote part of it, sorted; where the tier excludes authors, theirs do not count
	Open    []string `json:"open"`    // principals whose approval would count now, sorted; none if none is missing
}

// Review compares two commits as Compare does and counts the approvals of each unit that lie in the second. It asks for no state and for no
// good signature of the head, which may yet get another commit with approvals on top.
func (v *Verifier) Review(ctx context.Context, running, head Commit, h History) (*Review, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	j, err := v.compare(ctx, running, head, h)
	if err != nil {
		return nil, err
	}
	j.facts.Time = v.now(State{})
	if err := j.signer(ctx); err != nil && refusal.Of(err) == nil { // who signed it counts as an author where the author is unknown
		return nil, err
	}
	q, err := j.quorum(ctx)
	if err != nil {
		return nil, err
	}
	if err := j.approvals(ctx, q); err != nil {
		return nil, err
	}
	review := &Review{Root: j.root}
	for _, u := range j.facts.Units {
		q.root = j.judgeOf(&u)
		review.Units = append(review.Units, Reviewed{UnitFacts: u, Authors: append([]string{}, slices.Sorted(maps.Keys(q.authors[u.Unit]))...), Open: q.open(&u)})
	}
	return review, nil
}

// open lists the principals one more approval of whom would count: it is counted, for each of them, beside those that are there.
func (q *quorum) open(u *UnitFacts) []string {
	names := []string{}
	if u.Missing() == 0 {
		return names
	}
	counts := func(p *Principal, key ssh.PublicKey) bool {
		a := q.eligible(u, p, Approval{Principal: p.Name, Key: signature.KeyID(key)})
		with := *u
		with.Counted, with.Uncounted = slices.Clone(u.Counted), nil
		q.add(&with, a)
		q.organisations(&with)
		return slices.ContainsFunc(with.Counted, func(c Approval) bool { return c.Principal == p.Name })
	}
	for _, p := range q.root.eligible(RoleApprove) {
		counted := slices.ContainsFunc(u.Counted, func(c Approval) bool { return c.Principal == p.Name })
		if !counted && slices.ContainsFunc(p.Keys, func(k Key) bool {
			public, err := signature.ParseKey(k.Public)
			if err != nil {
				return false
			}
			_, err = q.root.allowed(public, RoleApprove, q.now, "approval")
			return err == nil && counts(&p, public)
		}) {
			names = append(names, p.Name)
		}
	}
	slices.Sort(names)
	return names
}
