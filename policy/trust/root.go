package trust

import (
	"crypto"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/policy/trust/signature"
	"github.com/kindos/kmo/registry/merkle"
)

// Root is who may do what in one site. It is trust/N.root.json, signed by its role root.
type Root struct {
	Version    int         `json:"version"` // 1, 2, …: N of the file's name
	Site       string      `json:"site"`
	Principals []Principal `json:"principals,omitempty"`
	Roles      []Role      `json:"roles,omitempty"`
	Tiers      []Tier      `json:"tiers,omitempty"`     // four, tier 0 first
	Units      []Pattern   `json:"units,omitempty"`     // the most sensitive of all that match holds
	Tripwires  []string    `json:"tripwires,omitempty"` // rule ids that every decision must have evaluated
	Floors     []string    `json:"floors,omitempty"`    // commits that every head and every revert's target must descend from, or be
	Freshness  string      `json:"freshness,omitempty"` // how old a head statement may be
	Expires    *time.Time  `json:"expires,omitempty"`
}

// Principal is a person or a machine. It counts once, however many keys it has.
type Principal struct {
	Name    string   `json:"name"`
	Class   string   `json:"class"` // human or robot
	Org     string   `json:"org,omitempty"`
	Emails  []string `json:"emails,omitempty"` // whose author and committer lines are this principal's
	Keys    []Key    `json:"keys,omitempty"`
	Keyless string   `json:"keyless,omitempty"` // an issuer and exact subject
}

// Key is one key of a principal, an SSH one, or an OpenPGP one for commits.
type Key struct {
	Public  string    `json:"public"`            // "ssh-ed25519 AAAA…", as in an authorized_keys file, without a comment; or "openpgp mQEN…"
	Uses    []string  `json:"uses,omitempty"`    // roles it may be used for
	From    time.Time `json:"from,omitzero"`     // it signs nothing before this trusted time
	Revoked *Revoked  `json:"revoked,omitempty"` // it signs nothing any more, whatever date is written on it
}

// Revoked says why a key is no longer good.
type Revoked struct {
	Reason string `json:"reason"`
	Rebad  bool   `json:"rebad,omitempty"` // what it has signed is bad too
}

// Role is who may act, and how many of them it takes.
type Role struct {
	Name      string   `json:"name"` // root, commit, approve, revert, image, head, custody
	Threshold int      `json:"threshold"`
	Members   []string `json:"members,omitempty"` // principals
}

// Tier is what a change of a tier needs.
type Tier struct {
	Tier          int    `json:"tier"`
	Need          int    `json:"need"` // approvals by distinct principals
	ExcludeAuthor bool   `json:"excludeAuthor,omitempty"`
	ExcludeRobots bool   `json:"excludeRobots,omitempty"`
	Orgs          int    `json:"orgs,omitempty"`      // distinct organisations among them
	Hardware      bool   `json:"hardware,omitempty"`  // only approvals of security keys count (sk-), each touched
	CoolDown      string `json:"coolDown,omitempty"`  // how long a change waits once its approvals are complete: "24h", at most 720h
	Statement     string `json:"statement,omitempty"` // role whose statement of every image of a unit it asks for: image

	// Custody are the steps that the custody chain of such a statement must have, each by a member of the role custody.
	Custody []string `json:"custody,omitempty"`
}

// maxCoolDown is the longest a root may make a change wait.
const maxCoolDown = 30 * 24 * time.Hour

// Pattern gives a tier to paths, with path.Match's signs: "units/kernel-*", "profiles/edge-*.yaml", "site.yaml".
type Pattern struct {
	Path string `json:"path"`
	Tier int    `json:"tier"`
}

// Pin is what a host is given at install: the digests of the first root's file.
type Pin struct {
	SHA256 string        `json:"sha256"` // 64 hex digits
	Root   merkle.Digest `json:"root"`   // kmo1 blob root
}

// PinOf is the pin of a root file.
func PinOf(file []byte) Pin {
	sum := sha256.Sum256(file)
	return Pin{SHA256: hex.EncodeToString(sum[:]), Root: merkle.BlobRoot(file)}
}

// What envelopes are for.
var (
	rootPurpose     = signature.Purpose{Type: "application/vnd.kmo.root.v1+json", Namespace: "kmo.root.v1"}
	approvalPurpose = signature.Purpose{Type: "application/vnd.kmo.approval.v1+json", Namespace: "kmo.approval.v1"}
)

// namespaceCommit is that of Git's own signatures.
const namespaceCommit = "git"

// The roles this build acts on.
const (
	RoleRoot    = "root"
	RoleCommit  = "commit"
	RoleApprove = "approve"
	RoleRevert  = "revert"
	RoleImage   = "image"   // seals images
	RoleCustody = "custody" // takes the steps by which images come to be
)

// DefaultTiers needs 3, 2, 1 and 0 approvals; tiers 0 and 1 exclude the author and robots.
func DefaultTiers() []Tier {
	return []Tier{
		{Tier: 0, Need: 3, ExcludeAuthor: true, ExcludeRobots: true},
		{Tier: 1, Need: 2, ExcludeAuthor: true, ExcludeRobots: true},
		{Tier: 2, Need: 1},
		{Tier: 3},
	}
}

// RootPath is where a root of that version lies in the site.
func RootPath(version int) string { return fmt.Sprintf("trust/%d.root.json", version) }

// SignRoot makes the file of a valid root. More people sign it with CosignRoot.
func SignRoot(root Root, signers ...ssh.Signer) ([]byte, error) {
	payload, err := json.MarshalIndent(root, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("signing a trust root: %v", err)
	}
	if _, err := decodeRoot(payload); err != nil {
		return nil, fmt.Errorf("signing a trust root: %w", err)
	}
	return signature.Seal(payload, rootPurpose, signers...)
}

// CosignRoot adds a signature to a root's file, over the same payload bytes. The command that rotates the root will call it, for the people who
// sign on other machines.
func CosignRoot(file []byte, signer ssh.Signer) ([]byte, error) {
	return signature.Cosign(file, rootPurpose, "trust root", signer)
}

// ParseRoot reads a root's file and checks that its own role root signed it by threshold. Whether it is the right root, the pin says.
func ParseRoot(file []byte) (*Root, error) {
	s, err := signature.Open(file, rootPurpose, "trust root")
	if err != nil {
		return nil, err
	}
	root, err := decodeRoot(s.Payload)
	if err != nil {
		return nil, err
	}
	signers, err := root.signers(file)
	if err != nil {
		return nil, err
	}
	if want := root.role(RoleRoot).Threshold; len(signers) < want {
		return nil, &refusal.Error{Code: "E_ROOT_THRESHOLD", Subject: RootPath(root.Version), Got: fmt.Sprintf("good signatures of %d members of its role root", len(signers)), Want: fmt.Sprintf("%d", want)}
	}
	return root, nil
}

func decodeRoot(payload []byte) (*Root, error) {
	var root Root
	if err := signature.Decode(payload, &root, signature.MaxEnvelope, "trust root"); err != nil {
		return nil, err
	}
	var faults []error
	for _, check := range []func() []string{root.doors, root.principalFaults, root.roleFaults, root.tierFaults, root.patternFaults, root.freshnessFaults} {
		for _, fault := range check() {
			faults = append(faults, &refusal.Error{Code: "E_ROOT_INVALID", Subject: "trust root", Got: fault})
		}
	}
	return &root, errors.Join(faults...)
}

// doors is the one table of what a root may hold and this build does not act on yet. Each is refused by name, never ignored.
func (r *Root) doors() []string {
	keyless := false
	for _, p := range r.Principals {
		keyless = keyless || p.Keyless != ""
	}
	var set []string
	for _, door := range []struct {
		name string
		set  bool
	}{
		{"keyless", keyless},
	} {
		if door.set {
			set = append(set, door.name+" is set, and not acted on yet: leave it out")
		}
	}
	return set
}

func (r *Root) principalFaults() (faults []string) {
	names, keys, emails := map[string]bool{}, map[string]string{}, map[string]string{}
	if r.Version < 1 || r.Site == "" {
		faults = append(faults, "no version or no site")
	}
	for _, p := range r.Principals {
		if p.Name == "" || names[p.Name] {
			faults = append(faults, fmt.Sprintf("principal %q has no name, or it is there twice", refusal.Clip(p.Name, 60)))
		}
		names[p.Name] = true
		if p.Class != "human" && p.Class != "robot" {
			faults = append(faults, fmt.Sprintf("principal %s has class %q, want human or robot", p.Name, refusal.Clip(p.Class, 20)))
		}
		if len(p.Keys) == 0 {
			faults = append(faults, "principal "+p.Name+" has no key")
		}
		for _, email := range p.Emails {
			folded := strings.ToLower(email)
			if owner, taken := emails[folded]; taken || email == "" {
				faults = append(faults, fmt.Sprintf("e-mail %q of %s is empty or belongs to %s", refusal.Clip(email, 60), p.Name, owner))
			}
			emails[folded] = p.Name
		}
		for _, k := range p.Keys {
			public, err := signature.ParseKey(k.Public)
			if err != nil {
				faults = append(faults, fmt.Sprintf("a key of %s: %v", p.Name, err))
				continue
			}
			if owner, taken := keys[signature.KeyID(public)]; taken {
				faults = append(faults, fmt.Sprintf("key %s belongs to %s and to %s", signature.KeyID(public), owner, p.Name))
			}
			keys[signature.KeyID(public)] = p.Name
			if _, openpgp := public.(*signature.Certificate); openpgp && !slices.Equal(k.Uses, []string{RoleCommit}) {
				faults = append(faults, fmt.Sprintf("key %s of %s has uses %v, want commit alone: an OpenPGP key signs nothing else", signature.KeyID(public), p.Name, k.Uses))
			}
			for _, use := range k.Uses {
				if !slices.Contains([]string{RoleRoot, RoleCommit, RoleApprove, RoleRevert, RoleImage, RoleHead, RoleCustody}, use) {
					faults = append(faults, fmt.Sprintf("key %s of %s has use %q, want root, commit, approve, revert, image, head or custody", signature.KeyID(public), p.Name, refusal.Clip(use, 20)))
				}
			}
		}
	}
	return faults
}

func (r *Root) roleFaults() (faults []string) {
	seen := map[string]bool{}
	for _, role := range r.Roles {
		if seen[role.Name] || !slices.Contains([]string{RoleRoot, RoleCommit, RoleApprove, RoleRevert, RoleImage, RoleHead, RoleCustody}, role.Name) {
			faults = append(faults, fmt.Sprintf("role %q is unknown or there twice", refusal.Clip(role.Name, 40)))
		}
		seen[role.Name] = true
		for i, member := range role.Members {
			if r.principal(member) == nil || slices.Index(role.Members, member) != i {
				faults = append(faults, fmt.Sprintf("role %s: member %q is no principal or there twice", role.Name, refusal.Clip(member, 60)))
			}
		}
		if n := len(r.eligible(role.Name)); role.Threshold < 1 || role.Threshold > n {
			faults = append(faults, fmt.Sprintf("role %s: threshold %d with %d principals that have a good key for it", role.Name, role.Threshold, n))
		}
		if role.Name != RoleRoot && role.Threshold > 1 {
			faults = append(faults, fmt.Sprintf("role %s: threshold %d, want 1: tiers say how many approve", role.Name, role.Threshold))
		}
	}
	for _, name := range []string{RoleRoot, RoleCommit} {
		if !seen[name] {
			faults = append(faults, "no role "+name)
		}
	}
	return faults
}

func (r *Root) tierFaults() (faults []string) {
	if len(r.Tiers) != 4 {
		return []string{fmt.Sprintf("%d tiers, want 4", len(r.Tiers))}
	}
	for i, t := range r.Tiers {
		eligible := r.eligible(RoleApprove)
		if t.ExcludeRobots {
			eligible = slices.DeleteFunc(eligible, func(p Principal) bool { return p.Class == "robot" })
		}
		if t.Hardware {
			eligible = slices.DeleteFunc(eligible, func(p Principal) bool {
				return !slices.ContainsFunc(p.Keys, func(k Key) bool {
					return k.Revoked == nil && r.may(&p, &k, RoleApprove) && strings.HasPrefix(k.Public, "sk-")
				})
			})
		}
		if wait, err := time.ParseDuration(t.CoolDown); t.CoolDown != "" && (err != nil || wait <= 0 || wait > maxCoolDown) {
			faults = append(faults, fmt.Sprintf("tier %d has a cool-down of %q, want a time as 24h, at most %v", i, refusal.Clip(t.CoolDown, 20), maxCoolDown))
		}
		orgs := map[string]bool{}
		for _, p := range eligible {
			if p.Org != "" {
				orgs[p.Org] = true
			}
		}
		if t.Tier != i || t.Need < 0 || t.Need == 0 && i < 3 || i > 0 && t.Need > r.Tiers[i-1].Need {
			faults = append(faults, fmt.Sprintf("tier %d in place %d needs %d approvals; want tiers 0 to 3 in order, at least 1 for tiers 0 to 2, none needing more than the one before", t.Tier, i, t.Need))
		}
		if t.Need > len(eligible) {
			faults = append(faults, fmt.Sprintf("tier %d needs %d approvals and only %d principals may give one", i, t.Need, len(eligible)))
		}
		if t.Statement != "" && (t.Statement != RoleImage || !r.hasRole(RoleImage)) || t.Statement == "" && i < 3 && r.Tiers[i+1].Statement != "" {
			faults = append(faults, fmt.Sprintf("tier %d asks for a statement of role %q; want image, which has members, for the tiers up to one, or none", i, refusal.Clip(t.Statement, 20)))
		}
		if fault := r.custodyFault(i); fault != "" {
			faults = append(faults, fault)
		}
		if t.Orgs < 0 || t.Orgs > t.Need || t.Orgs > len(orgs) {
			faults = append(faults, fmt.Sprintf("tier %d asks for %d organisations of %d approvals, and the approvers have %d", i, t.Orgs, t.Need, len(orgs)))
		}
	}
	return faults
}

func (r *Root) patternFaults() (faults []string) {
	for _, p := range r.Units {
		if _, err := path.Match(p.Path, "x"); err != nil || p.Path == "" || p.Tier < 0 || p.Tier > 3 {
			faults = append(faults, fmt.Sprintf("unit pattern %q with tier %d: want a path.Match pattern and a tier of 0 to 3", refusal.Clip(p.Path, 80), p.Tier))
		}
	}
	for _, id := range r.Floors {
		if !isObjectID(id) {
			faults = append(faults, fmt.Sprintf("floor %q, want a commit id of 40 hex digits", refusal.Clip(id, 60)))
		}
	}
	return faults
}

// tier is the most sensitive tier that a pattern gives to a path, -1 if none matches.
func (r *Root) tier(name string) int {
	tier := -1
	for _, p := range r.Units {
		if ok, _ := path.Match(p.Path, name); ok {
			tier = stronger(tier, p.Tier)
		}
	}
	return tier
}

func (r *Root) role(name string) Role {
	for _, role := range r.Roles {
		if role.Name == name {
			return role
		}
	}
	return Role{}
}

func (r *Root) hasRole(name string) bool { return r.role(name).Name != "" }

func (r *Root) principal(name string) *Principal {
	for i := range r.Principals {
		if r.Principals[i].Name == name {
			return &r.Principals[i]
		}
	}
	return nil
}

// principalOf is the name of the principal whose e-mail that is, "" if nobody's.
func (r *Root) principalOf(email string) string {
	for _, p := range r.Principals {
		if slices.ContainsFunc(p.Emails, func(e string) bool { return strings.EqualFold(e, email) }) {
			return p.Name
		}
	}
	return ""
}

// Owner names the principal that a key belongs to, "" if it is nobody's.
func (r *Root) Owner(key ssh.PublicKey) string {
	if p, _ := r.keyOf(key); p != nil {
		return p.Name
	}
	return ""
}

// keyOf finds a key by what it is, never by a name that somebody wrote beside it.
func (r *Root) keyOf(public ssh.PublicKey) (*Principal, *Key) {
	for i := range r.Principals {
		for j := range r.Principals[i].Keys {
			known, err := signature.ParseKey(r.Principals[i].Keys[j].Public)
			if err == nil && string(known.Marshal()) == string(public.Marshal()) {
				return &r.Principals[i], &r.Principals[i].Keys[j]
			}
		}
	}
	return nil, nil
}

// certificates are the OpenPGP keys. A root without any takes no OpenPGP signature.
func (r *Root) certificates() (all []*signature.Certificate) {
	for _, p := range r.Principals {
		for _, k := range p.Keys {
			if public, err := signature.ParseKey(k.Public); err == nil {
				if c, ok := public.(*signature.Certificate); ok {
					all = append(all, c)
				}
			}
		}
	}
	return all
}

// may says whether the principal has the role and the key its use.
func (r *Root) may(p *Principal, k *Key, role string) bool {
	return slices.Contains(r.role(role).Members, p.Name) && slices.Contains(k.Uses, role)
}

// eligible lists the members of a role that have a key for it that is not revoked.
func (r *Root) eligible(role string) (members []Principal) {
	for _, p := range r.Principals {
		if slices.ContainsFunc(p.Keys, func(k Key) bool { return k.Revoked == nil && r.may(&p, &k, role) }) {
			members = append(members, p)
		}
	}
	return members
}

// rebad says whether there is a key whose signatures are revoked with it.
func (r *Root) rebad() bool {
	return slices.ContainsFunc(r.Principals, func(p Principal) bool {
		return slices.ContainsFunc(p.Keys, func(k Key) bool { return k.Revoked != nil && k.Revoked.Rebad })
	})
}

// burns says why what a commit brings must not run: it is signed with such a key. "" says that it is not.
func (r *Root) burns(c Commit) string {
	_, signed, err := r.openCommit(c.Raw, c.ID, time.Time{}) // whatever has become of an OpenPGP key since
	if err != nil {
		return ""
	}
	principal, key := r.keyOf(signed.Key())
	if key == nil || key.Revoked == nil || !key.Revoked.Rebad || signed.Verify() != nil {
		return ""
	}
	return fmt.Sprintf("signed with key %s of %s, which is revoked with all that it signed: %s", signed.KeyID(), principal.Name, refusal.Clip(key.Revoked.Reason, 80))
}

// sealers are the keys whose statements of images count now. One whose signatures come from a security key makes none.
func (r *Root) sealers(now time.Time) (keys []crypto.PublicKey) {
	r.plain(RoleImage, now, func(_ *Principal, key crypto.PublicKey) { keys = append(keys, key) })
	return keys
}

// plain calls use for each key that is good now for a role and signs by itself, not in a security key.
func (r *Root) plain(role string, now time.Time, use func(*Principal, crypto.PublicKey)) {
	for _, p := range r.Principals {
		for _, k := range p.Keys {
			public, err := signature.ParseKey(k.Public)
			if err != nil || k.Revoked != nil || now.Before(k.From) || !r.may(&p, &k, role) {
				continue
			}
			if plain, ok := public.(ssh.CryptoPublicKey); ok && !strings.HasPrefix(public.Type(), "sk-") {
				use(&p, plain.CryptoPublicKey())
			}
		}
	}
}

// stronger is the more sensitive of two tiers; -1 is none.
func stronger(a, b int) int {
	if a < 0 || b >= 0 && b < a {
		return b
	}
	return a
}
