package trust

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/policy/trust/signature"
)

const maxRoots = 256 // versions of a site's trust root

// Chain is a site's trust roots, version 1 first. Each has the signatures that its own role root asks for, and each after the first
// those of the role root of the version before as well. Whether the first is the right one, the pin says.
type Chain []Link

// Link is one version.
type Link struct {
	Root *Root
	Pin  Pin // of its file
}

// Newest is the root in force after the commit that has the chain.
func (c Chain) Newest() *Root { return c[len(c)-1].Root }

// Roots reads the chain in a site's folder trust/: every version, and nothing else.
func Roots(tree fs.FS) (Chain, error) {
	entries, err := fs.ReadDir(tree, "trust")
	if errors.Is(err, fs.ErrNotExist) || err == nil && !slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return e.Name() == "1.root.json" }) {
		return nil, &refusal.Error{Code: "E_MIXMATCH", Subject: RootPath(1), Got: "no such file", Want: "the trust root that hosts are pinned to"}
	}
	if err != nil {
		return nil, fmt.Errorf("listing trust: %w", err)
	}
	if len(entries) > maxRoots {
		return nil, &refusal.Error{Code: "E_LIMIT", Subject: "trust/", Got: fmt.Sprintf("%d files", len(entries)), Want: fmt.Sprintf("at most %d", maxRoots)}
	}
	for _, e := range entries {
		var n int
		if _, err := fmt.Sscanf(e.Name(), "%d.root.json", &n); err != nil || "trust/"+e.Name() != RootPath(n) || n < 1 || n > len(entries) || e.IsDir() {
			return nil, &refusal.Error{Code: "E_ROOT_VERSION", Subject: "trust/" + refusal.Clip(e.Name(), 60), Got: fmt.Sprintf("%d files", len(entries)), Want: "1.root.json and each version after it, none left out, and nothing else"}
		}
	}
	var chain Chain
	for version := 1; version <= len(entries); version++ {
		file, err := readBounded(tree, RootPath(version))
		if err != nil {
			return nil, fmt.Errorf("reading %s: %w", RootPath(version), err)
		}
		if chain, err = chain.Then(file); err != nil {
			return nil, err
		}
	}
	return chain, nil
}

// Then adds the file of the next version.
func (c Chain) Then(file []byte) (Chain, error) {
	root, err := ParseRoot(file)
	if err != nil {
		return nil, err
	}
	name := RootPath(len(c) + 1)
	if root.Version != len(c)+1 {
		return nil, &refusal.Error{Code: "E_ROOT_VERSION", Subject: name, Got: fmt.Sprintf("version %d", root.Version), Want: fmt.Sprint(len(c) + 1)}
	}
	if len(c) > 0 {
		if before := c.Newest().Site; root.Site != before {
			return nil, &refusal.Error{Code: "E_ROOT_INVALID", Subject: name, Got: fmt.Sprintf("site %q", refusal.Clip(root.Site, 60)), Want: before}
		}
		if err := c.Newest().consents(file, name); err != nil {
			return nil, err
		}
	}
	return append(slices.Clip(c), Link{root, PinOf(file)}), nil
}

// consents refuses a root's file that has not the signatures that this root's role root asks for.
func (r *Root) consents(file []byte, name string) error {
	signers, err := r.signers(file)
	if err != nil {
		return err
	}
	if want := r.role(RoleRoot).Threshold; len(signers) < want {
		return &refusal.Error{Code: "E_ROOT_THRESHOLD", Subject: name, Got: fmt.Sprintf("good signatures of %d members of the role root of version %d", len(signers), r.Version), Want: fmt.Sprintf("%d: both the version before and the new one must be satisfied", want)}
	}
	return nil
}

// signers are the members of this root's role root that signed a root's file with a good key, sorted: each once, however many keys it has.
func (r *Root) signers(file []byte) ([]string, error) {
	s, err := signature.OpenDraft(file, rootPurpose, "trust root")
	if err != nil {
		return nil, err
	}
	signers := []string{}
	for i := range s.Len() {
		by, err := s.Signature(i)
		if err != nil {
			continue
		}
		principal, key := r.keyOf(by.Key())
		if key == nil || key.Revoked != nil || !r.may(principal, key, RoleRoot) || by.Verify() != nil {
			continue
		}
		signers = append(signers, principal.Name)
	}
	slices.Sort(signers)
	return slices.Compact(signers), nil
}

// unitRoot begins the name of the unit that a new version of the trust root is: "@root-2".
const unitRoot = "@root-"

// rootUnit is the change to a version, which the version before judges: tier 0 whatever it changes.
func (c Chain) rootUnit(version int) UnitFacts {
	return UnitFacts{Unit: fmt.Sprint(unitRoot, version), Action: "root", From: c[version-2].Pin.Root, To: c[version-1].Pin.Root, Need: c[version-2].Root.Tiers[0].Need}
}

// chain reads the trust roots out of a tree and checks the first against the pin: an untrusted carrier brings it, the pin decides.
func (v *Verifier) chain(tree Tree) (Chain, error) {
	if v.Describe == nil || v.Pin.Root.IsZero() {
		return nil, fmt.Errorf("verifier for %s: no Describe or no pin", v.Site)
	}
	if v.walked != nil && v.walkedAt == tree.ObjectID("trust") {
		return v.walked, nil
	}
	if first := tree.ObjectID(RootPath(1)); first != "" { // before anything in it is believed
		file, err := readBounded(tree, RootPath(1))
		if err != nil {
			return nil, fmt.Errorf("reading %s: %w", RootPath(1), err)
		}
		if got := PinOf(file); got != v.Pin {
			return nil, &refusal.Error{Code: "E_ROOT_VERSION", Subject: RootPath(1), Got: fmt.Sprintf("other bytes: sha256 %s, %v", got.SHA256, got.Root), Want: fmt.Sprintf("sha256 %s, %v, as pinned: what is to change is a version of its own", v.Pin.SHA256, v.Pin.Root)}
		}
	}
	chain, err := Roots(tree)
	if err != nil {
		return nil, err
	}
	if chain[0].Root.Site != v.Site {
		return nil, &refusal.Error{Code: "E_ROOT_INVALID", Subject: RootPath(1), Got: fmt.Sprintf("site %q", refusal.Clip(chain[0].Root.Site, 60)), Want: v.Site}
	}
	v.walked, v.walkedAt = chain, tree.ObjectID("trust")
	return chain, nil
}

// newest is the root in force after a commit with that tree.
func (v *Verifier) newest(tree Tree) (*Root, error) {
	chain, err := v.chain(tree)
	if err != nil {
		return nil, err
	}
	return chain.Newest(), nil
}

// trusted finds the root that judges the head: the newest that one of its parents has already, for a version is in force for the
// commits after the one that brings it; and never an older one than this host has accepted. Of a head that brings new versions and nothing else,
// whoever has added the approvals to them, the accepted one judges a key that it knows.
func (j *judgement) trusted(ctx context.Context) (err error) {
	if j.chain, err = j.v.chain(j.head.Tree); err != nil {
		return err
	}
	accepted := j.state.Root
	if accepted > len(j.chain) {
		return &refusal.Error{Code: "E_ROLLBACK", Subject: "trust/", Got: fmt.Sprintf("trust root %d", len(j.chain)), Want: fmt.Sprintf("version %d, which this host has accepted, or a newer one", accepted)}
	}
	if accepted > 0 {
		if got, want := j.chain[accepted-1].Pin, cmp.Or(j.state.Current, j.state.Pin); got != want {
			return &refusal.Error{Code: "E_ROOT_VERSION", Subject: RootPath(accepted), Got: fmt.Sprintf("other bytes: sha256 %s, %v", got.SHA256, got.Root), Want: fmt.Sprintf("sha256 %s, %v, as this host has accepted it", want.SHA256, want.Root)}
		}
	}
	version := max(accepted, 1)
	parsed, err := ParseCommit(j.head.Raw)
	if err != nil {
		refusal.Of(err).Subject = "commit " + j.head.ID
		return err
	}
	if version < len(j.chain) {
		for _, parent := range parsed.Parents {
			before, err := j.history.At(ctx, parent)
			if err != nil {
				return fmt.Errorf("history of %s: %w", j.head.ID, err)
			}
			version = max(version, shared(before.Tree, j.head.Tree, len(j.chain)))
		}
	}
	if accepted > 0 && accepted < version && j.running.Tree != nil && standing(j.running.Tree, "trust") == standing(j.head.Tree, "trust") {
		if _, signed, err := j.chain[accepted-1].Root.openCommit(j.head.Raw, j.head.ID, j.facts.Time); err == nil && j.chain[accepted-1].Root.Owner(signed.Key()) != "" {
			version = accepted
		}
	}
	j.root = j.chain[version-1].Root
	return nil
}

// shared is the newest version of the trust root, up to one, that both trees have.
func shared(a, b Tree, upTo int) int {
	for version := upTo; version > 0; version-- {
		if id := b.ObjectID(RootPath(version)); id != "" && a.ObjectID(RootPath(version)) == id {
			return version
		}
	}
	return 0
}

// roots adds a unit for each version of the trust root after one.
func (j *judgement) roots(after int) {
	for version := after + 1; version <= len(j.chain); version++ {
		j.facts.Trust = true
		j.facts.Units = append(j.facts.Units, j.chain.rootUnit(version))
	}
}

// judgeOf is the root that counts the approvals of a unit's change.
func (j *judgement) judgeOf(u *UnitFacts) *Root {
	var version int
	if _, err := fmt.Sscanf(u.Unit, unitRoot+"%d", &version); err == nil {
		return j.chain[version-2].Root
	}
	return j.root
}

// standing is everything that is judged but one folder, as Git ids.
func standing(t Tree, but string) string {
	var ids []string
	for _, name := range []string{"units", "profiles", "site.yaml", "policy", "trust"} {
		if name != but {
			ids = append(ids, t.ObjectID(name))
		}
	}
	return strings.Join(ids, " ")
}

// Side is one of the two roots whose role root must sign a new one.
type Side struct {
	Version int      `json:"version"`
	Need    int      `json:"need"`   // of its members
	Signed  []string `json:"signed"` // who have, sorted
	May     []string `json:"may"`    // who still can, sorted
}

// Missing is how many signatures the side still needs.
func (s Side) Missing() int { return max(0, s.Need-len(s.Signed)) }

// Draft reads the next version, which may lack signatures, and says of each side that must sign it who has.
func (c Chain) Draft(file []byte) (*Root, []Side, error) {
	s, err := signature.OpenDraft(file, rootPurpose, "draft of a trust root")
	if err != nil {
		return nil, nil, err
	}
	next, err := decodeRoot(s.Payload)
	if err != nil {
		return nil, nil, err
	}
	if next.Version != len(c)+1 {
		return nil, nil, &refusal.Error{Code: "E_ROOT_VERSION", Subject: "draft of a trust root", Got: fmt.Sprintf("version %d", next.Version), Want: fmt.Sprint(len(c) + 1)}
	}
	asked := []*Root{next}
	if len(c) > 0 {
		asked = []*Root{c.Newest(), next}
	}
	var sides []Side
	for _, root := range asked {
		side := Side{Version: root.Version, Need: root.role(RoleRoot).Threshold, May: []string{}}
		if side.Signed, err = root.signers(file); err != nil {
			return nil, nil, err
		}
		for _, p := range root.eligible(RoleRoot) {
			if !slices.Contains(side.Signed, p.Name) {
				side.May = append(side.May, p.Name)
			}
		}
		slices.Sort(side.May)
		sides = append(sides, side)
	}
	return next, sides, nil
}
