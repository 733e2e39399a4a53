package trust

import (
	"cmp"
	"context"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/policy/trust/signature"
	"github.com/kindos/kmo/registry/merkle"
)

// The trailers of a revert commit.
const (
	TrailerReverts  = "Kmo-Reverts" // <good>..<head>: every commit reachable from head but not from good
	TrailerGate     = "Kmo-Gate"
	TrailerEvidence = "Kmo-Evidence"
	TrailerHost     = "Kmo-Host"
)

// Commit is a commit as Git has it. Nothing in it is trusted until Verify has said so.
type Commit struct {
	ID      string    // 40 lower-case hex digits
	Parents []string  // ids
	When    time.Time // the committer's claim; never used to decide
	Raw     []byte    // the object's bytes as stored, without Git's "commit <size>\0" header: what its signature covers
	Tree    Tree
	Stated  []byte // the head statement that the remote has beside the branch, nil for none
}

// Tree is the files of a commit: regular files and folders only, clean paths, read-only.
type Tree interface {
	fs.FS
	// ObjectID returns the Git object id of the file or folder at path, "" if there is none. Within one repository, equal ids
	// are equal content: the object store never replaces an object.
	ObjectID(path string) string
}

// History answers questions about the commits between two others. A path is never trusted for being in it.
type History interface {
	// At returns a commit that the store has.
	At(ctx context.Context, id string) (Commit, error)
	// Ancestor says whether old is new or an ancestor of it. A commit that the store does not have is nobody's ancestor.
	Ancestor(ctx context.Context, old, new string) (bool, error)
	// Between lists the commits reachable from new but not from old, newest first, along every parent.
	Between(ctx context.Context, old, new string) ([]Commit, error)
}

// Verifier judges changes on one host. Its exported fields are set once, before the first call; its methods may be called concurrently.
type Verifier struct {
	Site, Branch string
	Pin          Pin       // of the trust root
	State        StateFile // the host's memory; without a path every change is judged as on a new host, and Accept is an error
	Clock        func() time.Time

	// Describe reads what a unit declares in a tree. A *refusal.Error says that its files must not be had.
	Describe func(tree fs.FS, unit string) (Declared, error)

	MustExist     bool   // this host has accepted a commit before: a missing state is an alarm
	MinSeq        uint64 // the journal or the audit log have seen this state: an older one is an alarm
	RevertsPerDay int    // how many reverts are accepted in 24 hours; 0 means 10

	mu sync.Mutex // guards what follows
	known
	asked  asked     // what Fresh was last asked
	seq    uint64    // newest state seen by this value
	latest time.Time // trusted time seen by this value
}

// known is what was computed before. Git object ids are the keys, so an unchanged folder costs nothing.
type known struct {
	roots    map[string]merkle.Digest
	declared map[string]Declared
	walked   Chain // of the folder trust/ with this Git id
	walkedAt string
	parsed   parsed
}

const (
	defaultReverts = 10
	clockSlack     = 5 * time.Minute // a clock that is further behind the trusted time is an alarm
)

// judgement is one call of Verify.
type judgement struct {
	v       *Verifier
	state   State
	chain   Chain // of the head
	root    *Root // that judges: one of the chain
	running Commit
	head    Commit
	parsed  Parsed
	history History
	facts   Facts
}

// Verify establishes the facts of the change from the commit whose content runs (the zero Commit if none does) to a head. A *refusal.Error
// says that the head must not run; any other error, that the world did not answer. It writes nothing.
func (v *Verifier) Verify(ctx context.Context, running, head Commit, h History) (facts Facts, err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	defer func() { // a fault of ours must deny, whatever the head holds
		if fault := recover(); fault != nil {
			facts, err = Facts{}, &refusal.Error{Code: "E_INTERNAL", Subject: "commit " + head.ID, Got: refusal.Clip(fmt.Sprint(fault), 200), Want: "a verifier that does not fall over this commit"}
		}
	}()
	state, err := v.load()
	if err != nil {
		return Facts{}, err
	}
	j := &judgement{v: v, state: state, running: running, head: head, history: h}
	j.facts = Facts{Commit: head.ID, Base: state.Accepted.Commit, Time: v.now(state)}
	if late := v.late(state); late > clockSlack {
		j.facts.Warnings = append(j.facts.Warnings, fmt.Sprintf("E_TIME: the clock is %v behind the trusted time %s", late.Round(time.Second), j.facts.Time.Format(time.RFC3339)))
	}
	if err := j.trusted(ctx); err != nil {
		return Facts{}, err
	}
	j.facts.Tripwires, j.facts.Sealers = j.root.Tripwires, j.root.sealers(j.facts.Time)
	j.facts.Custody = j.root.custody(j.facts.Time)
	for _, tier := range j.root.Tiers {
		j.facts.Statements = append(j.facts.Statements, tier.Statement)
	}
	for _, check := range []func(context.Context) error{j.signer, j.descent, j.change, j.apart, j.revert, j.burned, j.older, j.counted} {
		if err := check(ctx); err != nil {
			return Facts{}, err
		}
	}
	return j.facts, nil
}

// Compare finds the units that differ between two commits (the first may be the zero Commit), with their tiers, contents and needs, and
// the root that judges the second where the first is accepted. It asks for no signature or state: it is what an approver signs over.
func (v *Verifier) Compare(ctx context.Context, running, head Commit, h History) ([]UnitFacts, *Root, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	j, err := v.compare(ctx, running, head, h)
	if err != nil {
		return nil, nil, err
	}
	sortUnits(&j.facts, nil)
	return j.facts.Units, j.root, nil
}

// compare is a judgement as far as the change.
func (v *Verifier) compare(ctx context.Context, running, head Commit, h History) (*judgement, error) {
	j := &judgement{v: v, running: running, head: head, history: h}
	var old Chain
	if running.ID != "" {
		var err error
		if old, err = v.chain(running.Tree); err != nil {
			return nil, err
		}
		j.state = State{Root: len(old), Current: old[len(old)-1].Pin}
	}
	if err := j.trusted(ctx); err != nil {
		return nil, err
	}
	if err := j.change(ctx); err != nil {
		return nil, err
	}
	if running.ID != "" {
		j.roots(len(old))
	}
	return j, nil
}

// Tier is a unit's own tier in a tree whose root is the pinned one: of a unit that no change touches, and that is new on this host.
func (v *Verifier) Tier(tree Tree, unit string) (int, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	root, err := v.newest(tree)
	if err != nil {
		return 0, err
	}
	return v.side(tree).tier(root, unit)
}

// signer checks the head's own signature: by a key of the root, good now, for the role commit or revert.
func (j *judgement) signer(context.Context) error {
	subject := "commit " + j.head.ID
	if got := ObjectID(j.head.Raw); got != j.head.ID {
		return &refusal.Error{Code: "E_OBJ_MALFORMED", Subject: subject, Got: "bytes whose object id is " + got, Want: j.head.ID}
	}
	parsed, signed, err := j.root.openCommit(j.head.Raw, subject, j.facts.Time)
	if err != nil {
		return err
	}
	j.parsed = parsed
	role := RoleCommit
	if principal, key := j.root.keyOf(signed.Key()); key != nil && len(j.parsed.Trailers(TrailerReverts)) > 0 && j.root.may(principal, key, RoleRevert) {
		role = RoleRevert
	}
	principal, err := j.root.allowed(signed.Key(), role, j.facts.Time, subject)
	if err != nil {
		return err
	}
	if err := signed.Verify(); err != nil {
		return err
	}
	j.facts.Revert = role == RoleRevert
	j.facts.Signer, j.facts.Class, j.facts.Key = principal.Name, principal.Class, signed.KeyID()
	j.facts.Author = j.root.principalOf(j.parsed.Author.Email)
	return nil
}

// openCommit reads a commit object and its signature, which is yet to be verified. Where the object is good and the
// signature is not, what was parsed is returned beside the refusal.
func openCommit(raw []byte, subject string) (Parsed, *signature.Signature, error) {
	p, err := ParseCommit(raw)
	if err != nil {
		refusal.Of(err).Subject = subject
		return p, nil, err
	}
	if p.Signature == "" {
		return p, nil, &refusal.Error{Code: "E_SIG_MISSING", Subject: subject, Got: "no signature", Want: "a commit signed with an SSH key of the trust root (git commit -S)"}
	}
	blob, err := signature.Unarmour(p.Signature, subject)
	if err != nil {
		return p, nil, err
	}
	signed, err := signature.Parse(p.Payload, blob, namespaceCommit, subject)
	return p, signed, err
}

// openCommit also reads OpenPGP signatures, if the root has such keys: they are judged at that trusted time, or, at none, by who made them alone.
func (r *Root) openCommit(raw []byte, subject string, now time.Time) (Parsed, *signature.Signature, error) {
	p, signed, err := openCommit(raw, subject)
	certificates := r.certificates()
	if err == nil || !signature.IsOpenPGP(p.Signature) || len(certificates) == 0 {
		return p, signed, err
	}
	signed, err = signature.ParseOpenPGP(p.Payload, p.Signature, certificates, now, subject)
	return p, signed, err
}

// descent checks that the head is the last accepted commit or comes after it, and after every floor.
func (j *judgement) descent(ctx context.Context) error {
	subject := "commit " + j.head.ID
	accepted := j.state.Accepted.Commit
	if accepted != "" && accepted != j.head.ID {
		after, err := j.history.Ancestor(ctx, accepted, j.head.ID)
		if err != nil {
			return fmt.Errorf("history of %s: %w", accepted, err)
		}
		before := false
		if !after {
			if before, err = j.history.Ancestor(ctx, j.head.ID, accepted); err != nil {
				return fmt.Errorf("history of %s: %w", accepted, err)
			}
		}
		switch {
		case before:
			return &refusal.Error{Code: "E_ROLLBACK", Subject: subject, Got: "an ancestor of " + accepted + ", which this host has accepted", Want: "a descendant of it"}
		case !after:
			return &refusal.Error{Code: "E_FORK", Subject: subject, Got: "a commit beside " + accepted + ", which this host has accepted", Want: "a descendant of it"}
		}
	}
	for _, floor := range j.root.Floors {
		ok, err := j.history.Ancestor(ctx, floor, j.head.ID)
		if err != nil {
			return fmt.Errorf("history of %s: %w", floor, err)
		}
		if !ok {
			return &refusal.Error{Code: "E_ROLLBACK", Subject: subject, Got: "a commit that does not descend from the floor " + floor, Want: "a descendant of it"}
		}
	}
	return nil
}

// change compares the two contents, and policy with what the last accepted commit had.
func (j *judgement) change(context.Context) error {
	c := comparison{root: j.root, from: j.v.side(j.running.Tree), to: j.v.side(j.head.Tree), recorded: map[string]int{}}
	for _, u := range j.state.Accepted.Units {
		c.recorded[u.Name] = u.Tier
	}
	var err error
	if j.facts.Units, err = c.units(); err != nil {
		return err
	}
	if err := c.site(&j.facts); err != nil {
		return err
	}
	if j.state.Accepted.Commit != "" { // a new host walks from its pin, and asks no approvals of that
		j.roots(j.state.Root)
	}
	if err := j.policy(c); err != nil {
		return err
	}
	return j.collisions(c)
}

// policy adds a changed policy folder as the unit @policy. A host that has accepted nothing takes the first policy as it is: it can only deny more.
func (j *judgement) policy(c comparison) error {
	from, err := c.from.root("policy", folderRoot)
	if err != nil {
		return err
	}
	if j.state.Accepted.Commit != "" {
		from = j.state.Accepted.Policy
	} else if c.from.Tree == nil {
		return nil
	}
	to, err := c.to.root("policy", folderRoot)
	if err != nil || from == to {
		return err
	}
	j.facts.Policy = true
	j.facts.Units = append(j.facts.Units, UnitFacts{Unit: unitPolicy, Action: "policy", From: from, To: to, Need: j.root.Tiers[0].Need})
	return nil
}

// apart finds out whether changes of trust/, policy/ and the rest, which this host sees as one, were made one after the other: since what
// runs, one state of all else has stood before and after each new trust root, and under the accepted policy and the head's. Nobody signs
// the history, so this is about form; what a change may do is for the rules, which are asked before and after (KT020).
func (j *judgement) apart(ctx context.Context) error {
	f := &j.facts
	if (!f.Trust || !f.Policy) && (!f.Trust && !f.Policy || !f.Other) { // one of them at most
		return nil
	}
	commits, err := j.history.Between(ctx, j.running.ID, j.head.ID)
	if err != nil {
		return fmt.Errorf("history since %s: %w", cmp.Or(j.running.ID, "the beginning"), err)
	}
	if j.running.ID != "" {
		commits = append(commits, j.running)
	}
	at := slices.IndexFunc(commits, func(c Commit) bool { return c.ID == j.state.Accepted.Commit })
	if at < 0 {
		return nil
	}
	stood := func(but string, before, after func(Commit) bool) bool {
		shapes := map[string]bool{}
		for _, c := range commits {
			shapes[standing(c.Tree, but)] = shapes[standing(c.Tree, but)] || before(c)
		}
		return slices.ContainsFunc(commits, func(c Commit) bool { return after(c) && shapes[standing(c.Tree, but)] })
	}
	has := func(id string) func(Commit) bool {
		return func(c Commit) bool { return c.Tree.ObjectID("policy") == id }
	}
	f.Apart = !f.Policy || stood("policy", has(commits[at].Tree.ObjectID("policy")), has(j.head.Tree.ObjectID("policy")))
	for version := j.state.Root; f.Trust && version < len(j.chain); version++ {
		of := func(version int) func(Commit) bool {
			return func(c Commit) bool { return shared(c.Tree, j.head.Tree, len(j.chain)) == version }
		}
		f.Apart = f.Apart && stood("trust", of(version), of(version+1))
	}
	return nil
}

// collisions refuses a commit id that now stands for another content than the one that was accepted under it.
func (j *judgement) collisions(c comparison) error {
	accepted := j.state.Accepted
	for _, one := range []struct {
		id   string
		side side
	}{{j.running.ID, c.from}, {j.head.ID, c.to}} {
		if accepted.Commit == "" || one.id != accepted.Commit {
			continue
		}
		got, err := j.v.content(one.side)
		if err != nil {
			return err
		}
		if got.Content != accepted.Content {
			return &refusal.Error{Code: "E_TREE_DIGEST", Subject: "commit " + one.id, Got: "content root " + got.Content.String(), Want: accepted.Content.String() + ", as it was accepted"}
		}
	}
	return nil
}

// counted finds who wrote the change and counts its approvals.
func (j *judgement) counted(ctx context.Context) error {
	q, err := j.quorum(ctx)
	if err != nil {
		return err
	}
	return j.approvals(ctx, q)
}

// approvals counts the quorum of each unit.
func (j *judgement) approvals(ctx context.Context, q *quorum) error {
	for i := range j.facts.Units {
		u := &j.facts.Units[i]
		if j.facts.Revert {
			u.Need = 0
			continue
		}
		q.root = j.judgeOf(u)
		if err := q.count(ctx, u); err != nil {
			return err
		}
		j.cool(q.root, u)
	}
	sortUnits(&j.facts, q.authors)
	return nil
}

// quorum finds who wrote the change, and what came between, for counting approvals.
func (j *judgement) quorum(ctx context.Context) (*quorum, error) {
	q := &quorum{
		root: j.root, site: j.v.Site, branch: j.v.Branch, now: j.facts.Time, running: j.running, head: j.head, history: j.history,
		since: map[string][]Commit{}, recent: map[string]Commit{j.head.ID: j.head}, verdicts: map[string]baseAnswer{},
	}
	if j.running.ID == j.head.ID || j.running.ID == "" && !slices.ContainsFunc(j.facts.Units, func(u UnitFacts) bool { return j.judgeOf(&u).Tiers[u.Tier].ExcludeAuthor }) {
		return q, nil
	}
	commits, err := j.history.Between(ctx, j.running.ID, j.head.ID)
	if err != nil {
		return nil, fmt.Errorf("history since %s: %w", j.running.ID, err)
	}
	if q.authors, err = j.wrote(ctx, commits, j.history); err != nil {
		return nil, err
	}
	if j.running.ID != "" {
		q.recent[j.running.ID] = j.running
		for _, c := range commits {
			q.recent[c.ID] = c
		}
	}
	return q, nil
}

// revert holds a commit signed with the role revert to its one right: to undo the newest change, as a whole.
func (j *judgement) revert(ctx context.Context) error {
	if !j.facts.Revert || j.head.ID == j.state.Accepted.Commit {
		return nil
	}
	refuse := func(got, want string) error {
		return &refusal.Error{Code: "E_REVERT", Subject: "commit " + j.head.ID, Got: got, Want: want}
	}
	trailers := j.parsed.Trailers(TrailerReverts)
	from, to, ok := strings.Cut(trailers[0], "..")
	if len(trailers) != 1 || !ok || !isObjectID(from) || !isObjectID(to) {
		return refuse(fmt.Sprintf("%s: %q", TrailerReverts, refusal.Clip(strings.Join(trailers, " | "), 120)), "one range <good>..<head>")
	}
	if len(j.parsed.Parents) != 1 || j.parsed.Parents[0] != to {
		return refuse("parents "+strings.Join(j.parsed.Parents, " "), "the one parent "+to+", the end of the range")
	}
	target := j.state.revertible(from)
	if target == nil {
		return refuse("a range that begins after "+from, "one that begins right after the newest commit that passed its gate here before the newest change: "+j.state.targets())
	}
	if slices.Contains(j.state.Burned, from) {
		return refuse(from+", which is burned", "a commit that is not")
	}
	if j.root.rebad() {
		commit, err := j.history.At(ctx, from)
		if err != nil {
			return fmt.Errorf("history of %s: %w", from, err)
		}
		if why := j.root.burns(commit); why != "" {
			return refuse(from+", which is "+why, "a commit that is not")
		}
	}
	for _, floor := range j.root.Floors {
		above, err := j.history.Ancestor(ctx, floor, from)
		if err != nil {
			return fmt.Errorf("history of %s: %w", from, err)
		}
		if !above {
			return refuse(from+", which is below the floor "+floor, "a commit that is not")
		}
	}
	got, err := j.v.content(j.v.side(j.head.Tree))
	if err != nil {
		return err
	}
	if j.parsed.Tree != target.Tree || got.Content != target.Content {
		return refuse(fmt.Sprintf("tree %s with content root %v", j.parsed.Tree, got.Content), fmt.Sprintf("tree %s with content root %v, as %s had", target.Tree, target.Content, from))
	}
	if n, limit := j.state.reverts(j.facts.Time), j.v.bound(); n >= limit {
		return refuse(fmt.Sprintf("%d reverts in the last 24 hours", n), fmt.Sprintf("at most %d; a person must sign the way back", limit))
	}
	return nil
}

// bound is how many reverts are accepted in 24 hours.
func (v *Verifier) bound() int { return cmp.Or(v.RevertsPerDay, defaultReverts) }

// MayRevert says whether one more revert would be accepted here now: one that would not need not be pushed.
func (v *Verifier) MayRevert() (bool, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	state, err := v.load()
	return err == nil && state.reverts(v.now(state)) < v.bound(), err
}
