package trust

import (
	"context"
	"fmt"

	"github.com/kindos/kmo/policy/refusal"
)

// Alarm is why the host's state cannot be gone on from: it is missing although it must exist, older than it was, or no state. nil where nothing
// is the matter with it.
func (v *Verifier) Alarm() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	_, err := v.load()
	return err
}

// MayAnchor is Anchor that writes nothing.
func (v *Verifier) MayAnchor(ctx context.Context, at Commit, version int, head string, known []string, h History) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	_, err := v.anchored(ctx, at, version, head, known, h)
	return err
}

// Anchor makes a commit the last accepted one where the host's memory of that is lost, on the word of an operator. It never goes behind what is
// still known: what the state that is there has accepted, and the commits of known. The commit must be of the branch, whose head that is,
// signed by a key that may, above every floor, and have that version of the trust root. What else the state has is kept.
// It returns the number of the new state.
func (v *Verifier) Anchor(ctx context.Context, at Commit, version int, head string, known []string, h History) (seq uint64, err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	s, err := v.anchored(ctx, at, version, head, known, h)
	if err != nil {
		return 0, err
	}
	err = v.write(s)
	return v.seq, err
}

// anchored is the state that an anchor makes.
func (v *Verifier) anchored(ctx context.Context, at Commit, version int, head string, known []string, h History) (State, error) {
	s, err := v.read()
	if err != nil || s.Site != v.Site || s.Branch != v.Branch { // lost, damaged, or another's
		s = State{}
	}
	if s.Accepted.Commit != "" {
		known = append(known, s.Accepted.Commit)
	}
	if err := descends(ctx, at.ID, head, known, h); err != nil {
		return s, err
	}
	j := &judgement{v: v, head: at, history: h, facts: Facts{Time: v.now(s)}}
	for _, check := range []func(context.Context) error{j.trusted, j.signer, j.descent} {
		if err := check(ctx); err != nil {
			return s, err
		}
	}
	newest := j.chain[len(j.chain)-1]
	if newest.Root.Version != version {
		return s, &refusal.Error{Code: "E_ROOT_VERSION", Subject: "commit " + at.ID, Got: fmt.Sprintf("trust root %d", newest.Root.Version), Want: fmt.Sprintf("%d, as was named", version)}
	}
	accepted, err := v.content(v.side(at.Tree))
	if err != nil {
		return s, err
	}
	if err := v.tiers(v.side(at.Tree), newest.Root, &accepted, Accepted{}); err != nil {
		return s, err
	}
	accepted.Commit = at.ID
	if s.Accepted.Commit != at.ID {
		s.Log = append(s.Log, Entry{Commit: at.ID, Tree: j.parsed.Tree, Content: accepted.Content, Passed: true, When: j.facts.Time})
		s.Log = s.Log[max(0, len(s.Log)-maxEntries):]
	}
	s.Accepted = accepted
	s.Seq = max(s.Seq, v.MinSeq, v.seq, uint64(j.facts.Time.Unix())) // above that of every state that this host can have lost: those come back
	s.Version, s.Site, s.Branch, s.Pin, s.Root, s.Current = 1, v.Site, v.Branch, v.Pin, newest.Root.Version, newest.Pin
	return s, nil
}

// descends wants a commit to be of the branch, and not behind what is known.
func descends(ctx context.Context, at, head string, known []string, h History) error {
	of, err := h.Ancestor(ctx, at, head)
	if err != nil {
		return fmt.Errorf("history of %s: %w", head, err)
	}
	if !of {
		return &refusal.Error{Code: "E_FORK", Subject: "commit " + at, Got: "no commit of the branch, which is at " + head, Want: "one of the branch"}
	}
	for _, one := range known {
		after, err := h.Ancestor(ctx, one, at)
		if err != nil {
			return fmt.Errorf("history of %s: %w", at, err)
		}
		if !after {
			return &refusal.Error{Code: "E_ROLLBACK", Subject: "commit " + at, Got: "not after " + one + ", which this host still knows that it has accepted", Want: one + " or a commit after it"}
		}
	}
	return nil
}
