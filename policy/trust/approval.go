package trust

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/policy/trust/signature"
	"github.com/kindos/kmo/registry/merkle"
)

// maxApprovals is how many approval files may lie beside one change of one unit.
const maxApprovals = 64

// Predicate is what an approval says. It names contents, not commits, so it survives a merge or a rebase and dies with the slightest change
// of content.
type Predicate struct {
	Site     string          `json:"site"`
	Branch   string          `json:"branch"`
	Unit     string          `json:"unit"`
	Action   string          `json:"action"` // upgrade, downgrade, policy, root or waiver
	Tier     int             `json:"tier"`
	From     merkle.Digest   `json:"from"` // "" for a new unit
	To       merkle.Digest   `json:"to"`   // "" for a removed unit
	Profiles []ProfileChange `json:"profiles"`
	Base     string          `json:"base"` // a commit that still has the old content, and that the approved commit descends from
	Expires  time.Time       `json:"expires"`
	Nonce    string          `json:"nonce"`
	Intent   Intent          `json:"intent"`
	Waives   []string        `json:"waives,omitempty"` // of a waiver: ids of the rules whose denial of this content it lets pass
	Reason   string          `json:"reason,omitempty"` // of a waiver: why
}

// Intent says in words why. Nothing is decided by it.
type Intent struct {
	Kind    string `json:"kind,omitempty"`
	Summary string `json:"summary,omitempty"`
	Ticket  string `json:"ticket,omitempty"`
	Risk    string `json:"risk,omitempty"`
}

// NewApproval is the predicate that approves one unit's change. base is the commit that the change was compared with: what runs.
func NewApproval(site, branch, base string, change UnitFacts, expires time.Time, intent Intent) Predicate {
	var nonce [16]byte
	rand.Read(nonce[:]) // never fails: it crashes the program instead
	return Predicate{
		Site: site, Branch: branch, Unit: change.Unit, Action: change.Action, Tier: change.Tier, From: change.From, To: change.To,
		Profiles: append([]ProfileChange{}, change.ProfileChanges...), Base: base, Expires: expires.UTC().Truncate(time.Second),
		Nonce: hex.EncodeToString(nonce[:]), Intent: intent,
	}
}

// Base is the commit that an approval of a unit's change begins at: what runs, or, where the approved content has come and gone again since,
// the newest commit after which it only came. Where nothing runs it is the head. Where there is none, because the content came and went on two
// branches that are merged, it is a *refusal.Error with E_APPROVAL_CONSUMED.
func Base(ctx context.Context, running, head Commit, u *UnitFacts, h History) (string, error) {
	if running.ID == "" {
		return head.ID, nil
	}
	commits, err := h.Between(ctx, running.ID, head.ID)
	if err != nil {
		return "", fmt.Errorf("history since %s: %w", running.ID, err)
	}
	want := content(head.Tree, u)
	has := func(t Tree) bool { return content(t, u) == want }
	by := comeAndGone(commits, has)
	if by == "" {
		return running.ID, nil
	}
	for _, c := range commits {
		if has(c.Tree) {
			continue
		}
		since, err := h.Between(ctx, c.ID, head.ID)
		if err != nil {
			return "", fmt.Errorf("history since %s: %w", c.ID, err)
		}
		if comeAndGone(since, has) == "" {
			return c.ID, nil
		}
	}
	return "", &refusal.Error{Code: "E_APPROVAL_CONSUMED", Subject: "unit " + u.Unit,
		Got:  "commit " + by + ", a way back from its content; and after each commit that could be the base of an approval there is one",
		Want: "another content of it, or two commits on top of " + head.ID + ": one that takes this content away, and one that brings it again"}
}

// MayApprove refuses a key whose approvals do not count now, whatever they are of.
func (r *Root) MayApprove(key ssh.PublicKey, now time.Time) error {
	_, err := r.allowed(key, RoleApprove, now, "approval")
	return err
}

// SignApproval returns the approval's path in the site and its bytes. The signer may be a file's or an ssh-agent's key.
func SignApproval(p Predicate, signer ssh.Signer) (file string, data []byte, err error) {
	payload, err := json.MarshalIndent(p, "", "  ")
	if err != nil {
		return "", nil, fmt.Errorf("signing an approval: %v", err)
	}
	data, err = signature.Seal(payload, approvalPurpose, signer)
	name := strings.NewReplacer("/", "_", "+", "-", ":", "-").Replace(signature.KeyID(signer.PublicKey()))
	if p.Action == actionWaiver {
		name += ".waiver"
	}
	return path.Join(approvalFolder(p.Unit, p.To), name+".dsse.json"), data, err
}

func approvalFolder(unit string, to merkle.Digest) string {
	return path.Join("approvals", unit, to.Hex())
}

// quorum counts the approvals of a change.
type quorum struct {
	root         *Root
	site, branch string
	now          time.Time
	running      Commit // whose content runs; the zero Commit if none
	head         Commit
	history      History
	authors      map[string]map[string]bool // by unit, principals that wrote any of its change
	since        map[string][]Commit        // by base: the commits after it, up to and with the head
	recent       map[string]Commit          // commits between what runs and the head, and both, by id
	verdicts     map[string]baseAnswer      // by base and unit
	waived       map[string]*waiving        // of the unit that is counted: by rule, who waives it
}

type baseAnswer struct{ code, why string }

// count fills Counted and Uncounted of one unit. Errors are the world's: whatever is wrong with an approval is recorded, and it does not count.
func (q *quorum) count(ctx context.Context, u *UnitFacts) error {
	q.waived = map[string]*waiving{}
	folder := approvalFolder(u.Unit, u.To)
	entries, err := fs.ReadDir(q.head.Tree, folder)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("listing %s: %w", folder, err)
	}
	if len(entries) > maxApprovals {
		return &refusal.Error{Code: "E_LIMIT", Subject: folder, Got: fmt.Sprintf("%d approvals", len(entries)), Want: fmt.Sprintf("at most %d", maxApprovals)}
	}
	for _, entry := range entries {
		file := path.Join(folder, entry.Name())
		if entry.IsDir() {
			q.add(u, Approval{File: file}.uncounted("E_PATH", "it is a folder; want one file for each signer"))
			continue
		}
		data, err := readBounded(q.head.Tree, file)
		if err != nil {
			return fmt.Errorf("reading %s: %w", file, err)
		}
		if err := q.file(ctx, u, file, data); err != nil {
			return err
		}
	}
	q.organisations(u)
	q.waivers(u)
	return nil
}

func readBounded(tree fs.FS, name string) ([]byte, error) {
	file, err := tree.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return io.ReadAll(io.LimitReader(file, signature.MaxEnvelope+1))
}

// file judges every signature of one envelope, and adds them to what the unit, or a waiver for it, has.
func (q *quorum) file(ctx context.Context, u *UnitFacts, file string, data []byte) error {
	s, err := signature.Open(data, approvalPurpose, file)
	if err != nil {
		q.add(u, (Approval{File: file}).without(err))
		return nil
	}
	var p Predicate
	bad := signature.Decode(s.Payload, &p, signature.MaxEnvelope, file)
	asked := u
	if bad == nil && p.Action == actionWaiver {
		asked = q.waiver(u)
	}
	for i := range s.Len() {
		a, principal := q.signer(s, i, Approval{File: file, Expires: p.Expires})
		switch {
		case a.Code != "":
		case bad != nil:
			a = a.without(bad)
		default:
			if a, err = q.context(ctx, asked, p, a); err != nil {
				return err
			}
			a = q.eligible(asked, principal, a)
		}
		if asked == u {
			q.add(u, a)
			continue
		}
		q.waive(u, p, a)
	}
	return nil
}

// without marks an approval as not counted for a refusal.
func (a Approval) without(err error) Approval {
	r := refusal.Of(err)
	a.Code, a.Why = string(r.Code), r.Got
	if r.Want != "" {
		a.Why += "; want " + r.Want
	}
	return a
}

func (a Approval) uncounted(code, why string) Approval {
	a.Code, a.Why = code, why
	return a
}

// signer finds whose key made the i'th signature, and whether it is good now.
func (q *quorum) signer(s signature.Sealed, i int, a Approval) (Approval, *Principal) {
	signed, err := s.Signature(i)
	if err != nil {
		return a.without(err), nil
	}
	a.Key = signed.KeyID()
	a.Hardware = strings.HasPrefix(signed.Key().Type(), "sk-")
	principal, err := q.root.allowed(signed.Key(), RoleApprove, q.now, a.File)
	if principal != nil {
		a.Principal = principal.Name
	}
	if err == nil {
		err = signed.Verify()
	}
	if err != nil {
		return a.without(err), nil
	}
	return a, principal
}

// allowed finds the principal whose key that is and refuses a key that is unknown, not for this role, not begun or revoked.
func (r *Root) allowed(public ssh.PublicKey, role string, now time.Time, subject string) (*Principal, error) {
	principal, key := r.keyOf(public)
	id := signature.KeyID(public)
	switch {
	case key == nil:
		return nil, &refusal.Error{Code: "E_SIG_UNKNOWN_KEY", Subject: subject, Got: "key " + id, Want: "a key of the trust root"}
	case key.Revoked != nil:
		return principal, &refusal.Error{Code: "E_KEY_REVOKED", Subject: subject, Got: fmt.Sprintf("key %s of %s, revoked: %s", id, principal.Name, refusal.Clip(key.Revoked.Reason, 80)), Want: "a key that is not revoked, whatever date is written"}
	case now.Before(key.From):
		return principal, &refusal.Error{Code: "E_KEY_NOT_YET", Subject: subject, Got: fmt.Sprintf("key %s of %s, good from %s", id, principal.Name, key.From.UTC().Format(time.RFC3339)), Want: "a key that has begun by " + now.Format(time.RFC3339)}
	case !r.may(principal, key, role):
		return principal, &refusal.Error{Code: "E_SIG_UNKNOWN_KEY", Subject: subject, Got: fmt.Sprintf("key %s of %s, which has not the role and use %s", id, principal.Name, role), Want: "a key for " + role}
	}
	return principal, nil
}

// context checks that the approval is for this change and no other, now.
func (q *quorum) context(ctx context.Context, u *UnitFacts, p Predicate, a Approval) (Approval, error) {
	for _, pair := range []struct{ name, got, want string }{
		{"site", p.Site, q.site},
		{"branch", p.Branch, q.branch},
		{"unit", p.Unit, u.Unit},
		{"action", p.Action, u.Action},
		{"tier", fmt.Sprint(p.Tier), fmt.Sprint(u.Tier)},
		{"from", p.From.String(), u.From.String()},
		{"to", p.To.String(), u.To.String()},
		{"profiles", fmt.Sprint(p.Profiles), fmt.Sprint(u.ProfileChanges)},
	} {
		if pair.got != pair.want {
			return a.uncounted("E_APPROVAL_CONTEXT", fmt.Sprintf("it is for %s %q; want %q", pair.name, refusal.Clip(pair.got, 120), refusal.Clip(pair.want, 120))), nil
		}
	}
	if bad := p.waiverFault(q.now); bad != "" {
		return a.uncounted("E_APPROVAL_CONTEXT", bad), nil
	}
	if !q.now.Before(p.Expires) {
		return a.uncounted("E_APPROVAL_EXPIRED", fmt.Sprintf("it expired %s; it is %s", p.Expires.UTC().Format(time.RFC3339), q.now.Format(time.RFC3339))), nil
	}
	if !isObjectID(p.Base) {
		return a.uncounted("E_APPROVAL_CONTEXT", fmt.Sprintf("its base is %q; want a commit id", refusal.Clip(p.Base, 60))), nil
	}
	answer, err := q.base(ctx, u, p.Base)
	return a.uncounted(answer.code, answer.why), err
}

// base says whether an approval that begins at a commit still holds: the commit is an ancestor of the head, does not have the approved content
// yet, and that content has not come and gone since.
func (q *quorum) base(ctx context.Context, u *UnitFacts, base string) (baseAnswer, error) {
	key := base + " " + u.Unit
	if answer, ok := q.verdicts[key]; ok {
		return answer, nil
	}
	answer, err := q.ask(ctx, u, base)
	if err == nil {
		q.verdicts[key] = answer
	}
	return answer, err
}

func (q *quorum) ask(ctx context.Context, u *UnitFacts, base string) (baseAnswer, error) {
	ok, err := q.history.Ancestor(ctx, base, q.head.ID)
	if err != nil {
		return baseAnswer{}, fmt.Errorf("history of %s: %w", base, err)
	}
	if !ok {
		return baseAnswer{"E_APPROVAL_CONTEXT", "its base " + base + " is no ancestor of the head"}, nil
	}
	want := content(q.head.Tree, u)
	if c, known := q.recent[base]; known && content(c.Tree, u) == want {
		return baseAnswer{"E_APPROVAL_CONTEXT", "its base " + base + " has the approved content already; want a commit before the change"}, nil
	}
	if _, known := q.since[base]; !known {
		if q.since[base], err = q.history.Between(ctx, base, q.head.ID); err != nil {
			return baseAnswer{}, fmt.Errorf("history since %s: %w", base, err)
		}
	}
	if by := comeAndGone(q.since[base], func(t Tree) bool { return content(t, u) == want }); by != "" {
		return baseAnswer{"E_APPROVAL_CONSUMED", "commit " + by + " is a way back from that content, and came after the approval's base " + base + "; want a new approval"}, nil
	}
	return baseAnswer{}, nil
}

// content is what a unit is in a tree, as Git ids: its folder and the profiles it uses.
func content(t Tree, u *UnitFacts) string {
	switch u.Unit {
	case unitPolicy:
		return t.ObjectID("policy")
	case unitSite:
		return t.ObjectID("site.yaml")
	}
	if version, is := strings.CutPrefix(u.Unit, unitRoot); is {
		return t.ObjectID("trust/" + version + ".root.json")
	}
	ids := []string{t.ObjectID(unitPath(u.Unit))}
	for _, p := range u.ProfileChanges {
		ids = append(ids, t.ObjectID(profilePath(p.Name)))
	}
	return strings.Join(ids, " ")
}

// comeAndGone returns a commit that has not the content while one of its ancestors among the commits had it, or that says of itself
// that it reverts and stands right on what is before them; "" if there is none.
func comeAndGone(commits []Commit, has func(Tree) bool) string {
	byID := map[string]Commit{}
	for _, c := range commits {
		byID[c.ID] = c
	}
	type step struct{ id, from string }
	var todo []step
	for _, c := range commits {
		if has(c.Tree) {
			continue
		}
		for _, parent := range c.Parents {
			todo = append(todo, step{parent, c.ID})
			p, err := ParseCommit(c.Raw)
			if _, inside := byID[parent]; !inside && err == nil && len(p.Trailers(TrailerReverts)) > 0 {
				return c.ID
			}
		}
	}
	seen := map[string]bool{}
	for len(todo) > 0 {
		s := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		c, inside := byID[s.id]
		if !inside || seen[s.id] {
			continue
		}
		seen[s.id] = true
		if has(c.Tree) {
			return s.from
		}
		for _, parent := range c.Parents {
			todo = append(todo, step{parent, s.from})
		}
	}
	return ""
}

// eligible drops the author and robots where the tier says so.
func (q *quorum) eligible(u *UnitFacts, p *Principal, a Approval) Approval {
	tier := q.root.Tiers[u.Tier]
	switch {
	case a.Code != "":
	case tier.ExcludeAuthor && q.authors[u.Unit][p.Name]:
		return a.uncounted("E_QUORUM", fmt.Sprintf("%s wrote or committed part of this change, and tier %d does not count authors", p.Name, u.Tier))
	case tier.ExcludeRobots && p.Class == "robot":
		return a.uncounted("E_QUORUM", fmt.Sprintf("%s is a robot, and tier %d counts humans only", p.Name, u.Tier))
	case tier.Hardware && !a.Hardware:
		return a.uncounted("E_QUORUM", fmt.Sprintf("key %s of %s is no security key, and tier %d counts those only", a.Key, p.Name, u.Tier))
	}
	return a
}

// add counts an approval unless its principal counts already.
func (q *quorum) add(u *UnitFacts, a Approval) {
	if a.Code == "" && slices.ContainsFunc(u.Counted, func(c Approval) bool { return c.Principal == a.Principal }) {
		a = a.uncounted("E_QUORUM", a.Principal+" counts once already")
	}
	if a.Code == "" {
		u.Counted = append(u.Counted, a)
	} else {
		u.Uncounted = append(u.Uncounted, a)
	}
}

// organisations leaves places free for the organisations that a tier still asks for: with two asked for and one seen, one place stays open
// however many of the first have approved.
func (q *quorum) organisations(u *UnitFacts) {
	tier := q.root.Tiers[u.Tier]
	members := map[string]int{}
	for _, a := range u.Counted {
		if org := q.root.principal(a.Principal).Org; org != "" {
			members[org]++
		}
	}
	places := u.Need - max(0, tier.Orgs-len(members))
	for i := len(u.Counted) - 1; i >= 0 && tier.Orgs > len(members) && len(u.Counted) > places; i-- {
		a := u.Counted[i]
		org := q.root.principal(a.Principal).Org
		if org != "" && members[org] == 1 {
			continue
		}
		if org != "" {
			members[org]--
		}
		u.Counted = slices.Delete(u.Counted, i, i+1)
		u.Uncounted = append(u.Uncounted, a.uncounted("E_QUORUM", fmt.Sprintf("tier %d asks for %d organisations, and there are approvals of %s only", u.Tier, tier.Orgs, strings.Join(slices.Sorted(maps.Keys(members)), ", "))))
	}
}
