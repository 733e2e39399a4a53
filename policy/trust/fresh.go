package trust

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/policy/trust/signature"
)

// HeadRef is where a remote has the head statement: a reference to a blob.
const HeadRef = "refs/kmo/head"

// RoleHead signs head statements.
const RoleHead = "head"

var headPurpose = signature.Purpose{Type: "application/vnd.kmo.head.v1+json", Namespace: "kmo.head.v1"}

// HeadStatement says which commit a branch was at, and until when that may be taken for the newest. Where the root asks for one, a remote that
// goes on showing an old branch is found out when the last statement it has expires.
type HeadStatement struct {
	Site    string    `json:"site"`
	Branch  string    `json:"branch"`
	Commit  string    `json:"commit"`
	Issued  time.Time `json:"issued"`
	Expires time.Time `json:"expires"`
}

// SignHead makes the file of a head statement.
func SignHead(s HeadStatement, signer ssh.Signer) ([]byte, error) {
	s.Issued, s.Expires = s.Issued.UTC(), s.Expires.UTC()
	payload, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("signing a head statement: %v", err)
	}
	return signature.Seal(payload, headPurpose, signer)
}

// MayState refuses a key whose head statements do not count now.
func (r *Root) MayState(key ssh.PublicKey, now time.Time) error {
	_, err := r.allowed(key, RoleHead, now, "head statement")
	return err
}

// Age is how old a head statement may be; 0 where the root asks for none.
func (r *Root) Age() time.Duration {
	age, err := time.ParseDuration(r.Freshness)
	if err != nil {
		return 0
	}
	return age
}

func (r *Root) freshnessFaults() (faults []string) {
	age, err := time.ParseDuration(r.Freshness)
	switch {
	case r.Freshness != "" && (err != nil || age < time.Second):
		faults = append(faults, fmt.Sprintf("freshness %q, want a duration such as 36h", refusal.Clip(r.Freshness, 40)))
	case r.Freshness != "" && !r.hasRole(RoleHead):
		faults = append(faults, "freshness is set, and no role head signs head statements")
	}
	return faults
}

// asked is what Fresh found of a head, for Accept to know.
type asked struct {
	head   string
	stated *HeadStatement // nil where the root asks for none
	until  time.Time
}

// Fresh refuses a head of which nobody who may say so says that it is the newest, where the root asks for that: with E_FREEZE where there
// is no head statement or it has expired, E_ROLLBACK where a newer one was seen, E_CHAIN where it is another's. It remembers the newest
// statement, durably: with it the trusted time goes on. seq is the number of the state that has it, 0 where none was written. Accept wants to
// have been preceded by it.
func (v *Verifier) Fresh(ctx context.Context, head Commit, h History) (seq uint64, err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	s, a, err := v.fresh(ctx, head, h)
	v.asked = a
	if err != nil || a.stated == nil || s.Accepted.Commit == "" || s.Head != nil && !a.stated.Issued.After(s.Head.Issued) {
		return 0, err
	}
	s.Head = a.stated
	err = v.write(s)
	return v.seq, err
}

// CheckFresh is Fresh for whoever only asks: it remembers nothing.
func (v *Verifier) CheckFresh(ctx context.Context, head Commit, h History) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	_, _, err := v.fresh(ctx, head, h)
	return err
}

// fresh returns the state, and the head's statement where the root asks for one.
func (v *Verifier) fresh(ctx context.Context, head Commit, h History) (s State, a asked, err error) {
	defer func() { // as in Verify
		if fault := recover(); fault != nil {
			err = &refusal.Error{Code: "E_INTERNAL", Subject: "commit " + head.ID, Got: refusal.Clip(fmt.Sprint(fault), 200), Want: "a verifier that does not fall over this commit"}
		}
	}()
	if s, err = v.load(); err != nil {
		return s, asked{}, err
	}
	j := &judgement{v: v, state: s, head: head, history: h, facts: Facts{Time: v.now(s)}}
	if chain, err := v.chain(head.Tree); err != nil {
		return s, asked{}, err
	} else if s.Accepted.Commit != "" && len(chain) > s.Root { // which one judges depends on what was before
		if j.running, err = h.At(ctx, s.Accepted.Commit); err != nil {
			return s, asked{}, fmt.Errorf("the last accepted commit: %w", err)
		}
	}
	if err := j.trusted(ctx); err != nil {
		return s, asked{}, err
	}
	if newest := j.chain.Newest(); newest.Expires != nil && !j.facts.Time.Before(*newest.Expires) { // an older one may have: it only hands on
		return s, asked{}, frozen(RootPath(newest.Version), "it expired "+newest.Expires.UTC().Format(time.RFC3339)+"; it is "+j.facts.Time.Format(time.RFC3339), "a newer version of the trust root")
	}
	if j.root.Age() == 0 {
		return s, asked{head: head.ID}, nil
	}
	if err := j.descent(ctx); err != nil {
		return s, asked{}, err
	}
	stated, until, err := j.statement(ctx)
	if err != nil {
		return s, asked{}, err
	}
	return s, asked{head.ID, stated, until}, nil
}

// stillFresh wants Fresh to have been asked of a head that is to be accepted, and its statement not to have expired since.
func (v *Verifier) stillFresh(s *State, head Commit, root *Root) error {
	a := v.asked
	switch {
	case a.head != head.ID && root.Age() == 0:
		return nil
	case a.head != head.ID:
		return frozen(statementSubject, "nobody has asked whether "+head.ID+" is the newest commit", "that it is asked")
	case a.stated == nil:
		return nil
	}
	if now := v.now(*s); !now.Before(a.until) {
		return expired(a.until, now)
	}
	s.Head = a.stated
	return nil
}

func expired(until, now time.Time) error {
	return frozen(statementSubject, "it expired "+until.UTC().Format(time.RFC3339)+"; it is "+now.Format(time.RFC3339), "a newer one (kmo head sign --push)")
}

func frozen(subject, got, want string) error {
	return &refusal.Error{Code: "E_FREEZE", Subject: subject, Got: got, Want: want + "; until then what runs goes on, and nothing new is accepted"}
}

const statementSubject = "head statement"

// statement reads the statement that came with the head, and judges it: whose it is, of what, and when. It is good until a time.
func (j *judgement) statement(ctx context.Context) (stated *HeadStatement, until time.Time, err error) {
	if j.head.Stated == nil {
		return nil, until, frozen(statementSubject, "no "+HeadRef+" at the remote", "one for "+j.head.ID+" (kmo head sign --push)")
	}
	sealed, err := signature.Open(j.head.Stated, headPurpose, statementSubject)
	if err != nil {
		return nil, until, err
	}
	if err := j.stater(sealed); err != nil {
		return nil, until, err
	}
	stated = &HeadStatement{}
	if err := signature.Decode(sealed.Payload, stated, signature.MaxEnvelope, statementSubject); err != nil {
		return nil, until, err
	}
	if err := j.ofThis(ctx, stated); err != nil {
		return nil, until, err
	}
	until, err = j.inTime(stated)
	return stated, until, err
}

// stater wants a good signature by a key of the role head.
func (j *judgement) stater(sealed signature.Sealed) error {
	var last error
	for i := range sealed.Len() {
		signed, err := sealed.Signature(i)
		if err == nil {
			_, err = j.root.allowed(signed.Key(), RoleHead, j.facts.Time, statementSubject)
			if r := refusal.Of(err); r != nil && r.Code == "E_SIG_UNKNOWN_KEY" {
				r.Code = "E_CHAIN"
			}
		}
		if err == nil {
			err = signed.Verify()
		}
		if err == nil {
			return nil
		}
		last = err
	}
	return last
}

// ofThis wants a statement of this head, or of the one before it if the head is a host's revert of that: nobody is asked for those.
func (j *judgement) ofThis(ctx context.Context, stated *HeadStatement) error {
	for _, pair := range []struct{ name, got, want string }{
		{"site", stated.Site, j.v.Site}, {"branch", stated.Branch, j.v.Branch},
	} {
		if pair.got != pair.want {
			return &refusal.Error{Code: "E_CHAIN", Subject: statementSubject, Got: fmt.Sprintf("of %s %q", pair.name, refusal.Clip(pair.got, 60)), Want: pair.want}
		}
	}
	if stated.Commit == j.head.ID {
		return nil
	}
	if err := j.signer(ctx); err == nil && j.facts.Revert && len(j.parsed.Parents) == 1 && j.parsed.Parents[0] == stated.Commit {
		return nil
	}
	return &refusal.Error{Code: "E_CHAIN", Subject: statementSubject, Got: fmt.Sprintf("of commit %s, issued %s", refusal.Clip(stated.Commit, 60), stated.Issued.UTC().Format(time.RFC3339)),
		Want: "one of commit " + j.head.ID + ", which the branch is at (kmo head sign --push)"}
}

// inTime refuses a statement that is older than one that was seen, and one that has expired by the trusted time, which it is part of.
func (j *judgement) inTime(stated *HeadStatement) (until time.Time, err error) {
	if seen := j.state.Head; seen != nil && (stated.Issued.Before(seen.Issued) || stated.Issued.Equal(seen.Issued) && stated.Commit != seen.Commit) {
		return until, &refusal.Error{Code: "E_ROLLBACK", Subject: statementSubject, Got: fmt.Sprintf("of commit %s, issued %s", stated.Commit, stated.Issued.UTC().Format(time.RFC3339)),
			Want: fmt.Sprintf("one issued after %s, as was seen here, of commit %s", seen.Issued.UTC().Format(time.RFC3339), seen.Commit)}
	}
	if stated.Issued.After(j.v.latest) {
		j.v.latest = stated.Issued
	}
	until = stated.Issued.Add(j.root.Age())
	if stated.Expires.Before(until) {
		until = stated.Expires
	}
	if now := j.v.now(j.state); !now.Before(until) {
		return until, expired(until, now)
	}
	return until, nil
}
