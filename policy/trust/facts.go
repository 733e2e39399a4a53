package trust

import (
	"cmp"
	"crypto"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/policy/trust/signature"
	"github.com/kindos/kmo/registry/merkle"
)

// Facts is what was established about one change: who signed it, which units it touches, and which approvals count.
// Whether that is enough is for the rules to say.
type Facts struct {
	Commit string      `json:"commit"`
	Base   string      `json:"base"`   // the last accepted commit, whose root and policy judge this one; "" for the pinned root alone
	Signer string      `json:"signer"` // principal
	Key    string      `json:"key"`    // id of the key that signed
	Class  string      `json:"class"`  // human or robot
	Author string      `json:"author"` // principal the author's line belongs to; "" if none
	Revert bool        `json:"revert"` // it is a revert that needs no quorum
	Trust  bool        `json:"trust"`  // there is a newer trust root than the accepted one
	Policy bool        `json:"policy"` // files under policy/ differ
	Other  bool        `json:"other"`  // anything else that is judged differs: units, profiles, site.yaml
	Apart  bool        `json:"apart"`  // of trust, policy and other more than one differ, and along the history trust/ and policy/ changed while the rest stood still
	Time   time.Time   `json:"time"`   // trusted time
	Units  []UnitFacts `json:"units"`  // sorted by name; a change of policy is the unit "@policy", one of site.yaml "@site", trust root 2 "@root-2"

	Authors    []string           `json:"authors"`            // principals that wrote or committed any of the change; sorted
	Tripwires  []string           `json:"tripwires"`          // rule ids that the trust root requires
	Statements []string           `json:"statements"`         // by tier: the role whose statement of each image it asks for; "" for none
	Sealers    []crypto.PublicKey `json:"-"`                  // keys of that role that are good now
	Custody    *Custody           `json:"custody,omitempty"`  // what the tiers ask of images' custody; nil if none asks
	Burned     []Burned           `json:"burned"`             // what must not run, whoever approves it
	Warnings   []string           `json:"warnings,omitempty"` // alarms that refuse nothing by themselves: "E_TIME: …"
}

// UnitFacts is what was established about one changed unit.
type UnitFacts struct {
	Unit       string        `json:"unit"`
	Back       string        `json:"back"`       // the accepted commit that had an image which comes again in place of a newer one; "" if none does
	Action     string        `json:"action"`     // upgrade, downgrade, policy or root
	Tier       int           `json:"tier"`       // the most sensitive of root, template and what it needs, from the trusted base
	TierBefore int           `json:"tierBefore"` // as the base has it; -1 for a new unit
	From       merkle.Digest `json:"from"`       // content that runs; none for a new unit
	To         merkle.Digest `json:"to"`         // content that would run; none for a removed one
	Profiles   []string      `json:"profiles"`
	Need       int           `json:"need"`              // distinct principals
	Counted    []Approval    `json:"counted"`           // one a principal
	Uncounted  []Approval    `json:"uncounted"`         // with the reason in Why
	Waivers    []Waiver      `json:"waivers,omitempty"` // asked for, sorted by id
	Cools      time.Time     `json:"cools,omitzero"`    // until when the change waits although its approvals are complete; none if it does not
	Complete   time.Time     `json:"-"`                 // since when they are, of a tier with a cool-down

	ProfileChanges []ProfileChange `json:"profileChanges"` // the contents of Profiles, sorted by name; part of what is approved
}

// Burned is a unit whose content must not run: that commit brought it.
type Burned struct {
	Unit   string `json:"unit"`
	Commit string `json:"commit"`
	Why    string `json:"why"`
}

// ProfileChange is a profile that a unit uses, before or after, and its content on both sides: kmo1 blob roots, none where it is not used.
type ProfileChange struct {
	Name string        `json:"name"`
	From merkle.Digest `json:"from"`
	To   merkle.Digest `json:"to"`
}

// Missing is how many approvals are still needed; never below 0.
func (u UnitFacts) Missing() int { return max(0, u.Need-len(u.Counted)) }

// Approval is one signed "from this content to that content", as it was judged.
type Approval struct {
	Principal string    `json:"principal"` // "" if no key of the root signed it
	Key       string    `json:"key"`
	File      string    `json:"file"`
	Expires   time.Time `json:"expires,omitzero"`
	Why       string    `json:"why,omitempty"`  // why it does not count
	Code      string    `json:"code,omitempty"` // the refusal's code for that

	Hardware bool `json:"-"` // a security key made it
}

// WaysOut are the facts of what takes the policy away again that a head brings: the removal of policy/ alone, under each key that may sign
// it, written by its owner or by another, with the approvals of all who may approve that; and a host's revert, under each key that may sign
// that. facts are the head's. The rules can be asked of them before they are in force, and cannot tell them
// from what will come by the id of the commit.
//
// Each is there on every weekday at every other hour, spread over a year that is ten years away: rules that wait for a time of the week let it
// pass at one of them, and rules that close from a time on, before that year, at none.
func (v *Verifier) WaysOut(head Commit, facts Facts) (removals, reverts []Facts, err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	root, err := v.newest(head.Tree)
	if err != nil {
		return nil, nil, err
	}
	u := UnitFacts{Unit: unitPolicy, Action: "policy"}
	if i := slices.IndexFunc(facts.Units, func(u UnitFacts) bool { return u.Unit == unitPolicy }); i >= 0 {
		u.To = facts.Units[i].From // else it is the first policy, which is no change
	}
	if u.From, err = v.side(head.Tree).root("policy", folderRoot); err != nil {
		return nil, nil, err
	}
	next := sha256.Sum256([]byte(head.ID))
	way := Facts{Commit: hex.EncodeToString(next[:20]), Base: head.ID, Policy: true, Tripwires: facts.Tripwires, Statements: facts.Statements}
	removal := u
	removal.To, removal.Need = merkle.Digest{}, root.Tiers[0].Need
	for _, p := range root.eligible(RoleApprove) {
		for _, key := range p.Keys {
			if public, err := signature.ParseKey(key.Public); err == nil && key.Revoked == nil && root.may(&p, &key, RoleApprove) {
				removal.Counted = append(removal.Counted, Approval{Principal: p.Name, Key: signature.KeyID(public)})
				break
			}
		}
	}
	year := facts.Time.UTC().Truncate(24*time.Hour).AddDate(10, 0, 0)
	for n := range 7 * 12 {
		way.Time = year.AddDate(0, 0, 7*(5*n%52)+n%7).Add(time.Duration(n/7) * 2 * time.Hour)
		way.Revert, way.Units = false, []UnitFacts{removal}
		removals = append(removals, root.signed(way, RoleCommit)...)
		way.Revert, way.Units = true, []UnitFacts{u}
		reverts = append(reverts, root.signed(way, RoleRevert)...)
	}
	return removals, reverts, nil
}

// signed are the facts of a change under each key that may sign it. What somebody signs is in part their own, unless a commit below has it all:
// of those who can have made that, one who approves nothing takes away the fewest approvals.
func (r *Root) signed(change Facts, role string) (all []Facts) {
	others := r.eligible(RoleCommit)
	approves := func(p Principal) bool { return slices.Contains(r.role(RoleApprove).Members, p.Name) }
	slices.SortStableFunc(others, func(a, b Principal) int {
		if approves(a) == approves(b) {
			return 0
		}
		return map[bool]int{true: 1, false: -1}[approves(a)]
	})
	for _, p := range r.Principals {
		for _, key := range p.Keys {
			public, err := signature.ParseKey(key.Public)
			if err != nil || key.Revoked != nil || !r.may(&p, &key, role) {
				continue
			}
			type hands struct{ author, wrote string } // whom the head names as its author, and whose the change is
			ways := []hands{{"", p.Name}}             // an author whom the root does not know, such as a host
			if !change.Revert {
				ways = append(ways, hands{p.Name, p.Name})
				if i := slices.IndexFunc(others, func(q Principal) bool { return q.Name != p.Name }); i >= 0 {
					ways = append(ways, hands{p.Name, others[i].Name})
				}
			}
			for _, by := range ways {
				f := change
				f.Signer, f.Key, f.Class, f.Author, f.Units = p.Name, signature.KeyID(public), p.Class, by.author, slices.Clone(change.Units)
				sortUnits(&f, map[string]map[string]bool{unitPolicy: {by.wrote: true}})
				if r.Tiers[0].ExcludeAuthor {
					u := &f.Units[0]
					u.Counted = slices.DeleteFunc(u.Counted, func(a Approval) bool { return a.Principal == by.wrote })
				}
				all = append(all, f)
			}
		}
	}
	return all
}

// Declared is what a unit says of itself in one tree.
type Declared struct {
	Tier     int      // the more sensitive of unit.yaml and its profile; -1 if neither has one
	Profile  string   // "" if none
	Needs    []string // units
	Images   []string // sha256 of each variant's
	Rollback bool     // intent.kind is rollback: the change is a downgrade
}

// The units that are no folder under units/.
const (
	unitPolicy = "@policy"
	unitSite   = "@site"
)

// defaultTier is that of a unit to which neither the root nor its own files give one.
const defaultTier = 1

// side is one tree of a change with what was computed from it. The caches are keyed by Git object id, so an unchanged folder costs nothing.
type side struct {
	Tree
	roots    map[string]merkle.Digest
	declared map[string]Declared
	describe func(fs.FS, string) (Declared, error)
}

// object is the object id of a path, "" on the side of no commit at all.
func (s side) object(path string) string {
	if s.Tree == nil {
		return ""
	}
	return s.ObjectID(path)
}

// root is the kmo1 root of a folder or file, none if it is not there.
func (s side) root(path string, compute func(fs.FS, string) (merkle.Digest, error)) (merkle.Digest, error) {
	id := s.object(path)
	if id == "" {
		return merkle.Digest{}, nil
	}
	if d, ok := s.roots[id]; ok {
		return d, nil
	}
	d, err := compute(s.Tree, path)
	var bad *merkle.PathError
	if errors.As(err, &bad) {
		return d, &refusal.Error{Code: "E_PATH", Subject: path, Got: refusal.Clip(bad.Error(), 200), Want: "regular files and folders with plain names"}
	}
	if err != nil {
		return d, fmt.Errorf("content root of %s: %w", path, err)
	}
	s.roots[id] = d
	return d, nil
}

func folderRoot(tree fs.FS, path string) (merkle.Digest, error) {
	sub, err := fs.Sub(tree, path)
	if err != nil {
		return merkle.Digest{}, err
	}
	return merkle.FolderRoot(sub)
}

func fileRoot(tree fs.FS, path string) (merkle.Digest, error) {
	file, err := fs.ReadFile(tree, path)
	return merkle.BlobRoot(file), err
}

func unitPath(unit string) string { return "units/" + unit }

func profilePath(profile string) string { return "profiles/" + profile + ".yaml" }

// units lists the unit folders, sorted.
func (s side) units() ([]string, error) {
	if s.object("units") == "" {
		return nil, nil
	}
	entries, err := fs.ReadDir(s.Tree, "units")
	if err != nil {
		return nil, fmt.Errorf("listing units: %w", err)
	}
	var names []string
	for _, entry := range entries {
		if strings.HasPrefix(entry.Name(), "@") {
			return nil, &refusal.Error{Code: "E_PATH", Subject: unitPath(refusal.Clip(entry.Name(), 60)), Got: "a name that starts with @", Want: "a unit's own name"}
		}
		if strings.HasPrefix(entry.Name(), ".") && !entry.IsDir() {
			continue // .gitkeep and its like
		}
		if !entry.IsDir() {
			return nil, &refusal.Error{Code: "E_PATH", Subject: unitPath(refusal.Clip(entry.Name(), 60)), Got: "a file", Want: "a folder a unit"}
		}
		names = append(names, entry.Name())
	}
	return names, nil
}

// unit is what a unit declares on this side; the zero value with tier -1 if it is not there.
func (s side) unit(name string) (Declared, error) {
	id := s.object(unitPath(name))
	if id == "" {
		return Declared{Tier: -1}, nil
	}
	key := name + " " + id + " " + s.object("profiles")
	if d, ok := s.declared[key]; ok {
		return d, nil
	}
	d, err := s.describe(s.Tree, name)
	if err != nil {
		return d, err
	}
	if d.Tier < -1 || d.Tier > 3 {
		return d, &refusal.Error{Code: "E_DECODE", Subject: unitPath(name) + "/unit.yaml: tier", Got: fmt.Sprint(d.Tier), Want: "0 to 3"}
	}
	s.declared[key] = d
	return d, nil
}

// tier is a unit's own tier on this side, without what it needs: the most sensitive of the root's patterns and its declaration; -1 if it is not there.
func (s side) tier(root *Root, name string) (int, error) {
	if s.object(unitPath(name)) == "" {
		return -1, nil
	}
	d, err := s.unit(name)
	if err != nil {
		return 0, err
	}
	tier := stronger(d.Tier, root.tier(unitPath(name)))
	if d.Profile != "" {
		tier = stronger(tier, root.tier(profilePath(d.Profile)))
	}
	if tier < 0 {
		tier = defaultTier
	}
	return tier, nil
}

// comparison is two sides under one root.
type comparison struct {
	root     *Root
	from, to side
	recorded map[string]int // tiers of the last accepted commit's units
}

// units compares every unit: what differs in its folder or in a profile it uses, sorted by name, with its tier and need.
func (c comparison) units() ([]UnitFacts, error) {
	before, err := c.from.units()
	if err != nil {
		return nil, err
	}
	after, err := c.to.units()
	if err != nil {
		return nil, err
	}
	names := slices.Compact(slices.Sorted(slices.Values(slices.Concat(before, after))))
	var changed []UnitFacts
	for _, name := range names {
		u, differs, err := c.unit(name)
		if err != nil {
			return nil, err
		}
		if differs {
			changed = append(changed, u)
		}
	}
	if err := c.spread(changed); err != nil {
		return nil, err
	}
	for i := range changed {
		changed[i].Need = c.root.Tiers[changed[i].Tier].Need
	}
	return changed, nil
}

func (c comparison) unit(name string) (u UnitFacts, differs bool, err error) {
	path := unitPath(name)
	same := c.from.object(path) == c.to.object(path)
	if same && c.from.object("profiles") == c.to.object("profiles") {
		return u, false, nil
	}
	u = UnitFacts{Unit: name, Action: "upgrade"}
	old, err := c.from.unit(name)
	if err != nil {
		return u, false, fmt.Errorf("unit %s of the base: %w", name, err)
	}
	now, err := c.to.unit(name)
	if err != nil {
		return u, false, err
	}
	if err := c.profiles(&u, old.Profile, now.Profile); err != nil {
		return u, false, err
	}
	if same && !slices.ContainsFunc(u.ProfileChanges, func(p ProfileChange) bool { return p.From != p.To }) {
		return u, false, nil
	}
	if now.Rollback {
		u.Action = "downgrade"
	}
	if u.From, err = c.from.root(path, folderRoot); err != nil {
		return u, false, err
	}
	if u.To, err = c.to.root(path, folderRoot); err != nil {
		return u, false, err
	}
	if u.TierBefore, err = c.from.tier(c.root, name); err != nil {
		return u, false, err
	}
	if recorded, ok := c.recorded[name]; ok {
		u.TierBefore = stronger(u.TierBefore, recorded)
	}
	after, err := c.to.tier(c.root, name)
	u.Tier = stronger(u.TierBefore, after)
	return u, true, err
}

func (c comparison) profiles(u *UnitFacts, old, now string) error {
	for _, name := range slices.Compact(slices.Sorted(slices.Values([]string{old, now}))) {
		if name == "" {
			continue
		}
		p := ProfileChange{Name: name}
		var err1, err2 error
		if name == old {
			p.From, err1 = c.from.root(profilePath(name), fileRoot)
		}
		if name == now {
			p.To, err2 = c.to.root(profilePath(name), fileRoot)
		}
		if err := errors.Join(err1, err2); err != nil {
			return err
		}
		u.Profiles = append(u.Profiles, name)
		u.ProfileChanges = append(u.ProfileChanges, p)
	}
	return nil
}

// spread gives to each changed unit the most sensitive tier of the changed units that it needs, however far, and to each new unit that
// of the units that vanish beside it: a move to a weaker place is a change of the stronger one.
func (c comparison) spread(changed []UnitFacts) error {
	own, removed := map[string]int{}, -1
	for _, u := range changed {
		own[u.Unit] = u.Tier
		if c.to.object(unitPath(u.Unit)) == "" {
			removed = stronger(removed, u.Tier)
		}
	}
	for i := range changed {
		u := &changed[i]
		if u.TierBefore < 0 {
			u.Tier = stronger(u.Tier, removed)
		}
		reached, todo := map[string]bool{}, []string{u.Unit}
		for len(todo) > 0 {
			name := todo[0]
			todo = todo[1:]
			if reached[name] {
				continue
			}
			reached[name] = true
			if tier, ok := own[name]; ok {
				u.Tier = stronger(u.Tier, tier)
			}
			d, err := c.to.unit(name)
			if err != nil {
				return err
			}
			todo = append(todo, d.Needs...)
		}
	}
	return nil
}

// site adds the change of site.yaml, and finds what kinds of change there are.
func (c comparison) site(f *Facts) error {
	f.Other = c.from.object("units") != c.to.object("units") || c.from.object("profiles") != c.to.object("profiles")
	if c.from.object("site.yaml") == c.to.object("site.yaml") {
		return nil
	}
	f.Other = true
	u := UnitFacts{Unit: unitSite, Action: "upgrade", TierBefore: -1, Tier: c.root.tier("site.yaml")}
	if u.Tier < 0 {
		u.Tier = defaultTier
	}
	if c.from.object("site.yaml") != "" {
		u.TierBefore = u.Tier
	}
	var err1, err2 error
	u.From, err1 = c.from.root("site.yaml", fileRoot)
	u.To, err2 = c.to.root("site.yaml", fileRoot)
	u.Need = c.root.Tiers[u.Tier].Need
	f.Units = append(f.Units, u)
	return errors.Join(err1, err2)
}

// sortUnits puts units in order, and leaves no list null for the rules.
func sortUnits(f *Facts, authors map[string]map[string]bool) {
	slices.SortFunc(f.Units, func(a, b UnitFacts) int { return cmp.Compare(a.Unit, b.Unit) })
	all := map[string]bool{}
	for _, who := range authors {
		maps.Copy(all, who)
	}
	f.Authors = append([]string{}, slices.Sorted(maps.Keys(all))...)
	f.Burned = append([]Burned{}, f.Burned...)
	f.Tripwires, f.Statements = append([]string{}, f.Tripwires...), append([]string{}, f.Statements...)
	f.Units = append([]UnitFacts{}, f.Units...)
	for i := range f.Units {
		u := &f.Units[i]
		u.Profiles = append([]string{}, u.Profiles...)
		u.ProfileChanges = append([]ProfileChange{}, u.ProfileChanges...)
		u.Counted = append([]Approval{}, u.Counted...)
		u.Uncounted = append([]Approval{}, u.Uncounted...)
	}
}
