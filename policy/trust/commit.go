// Package trust says who signed what, whether that is enough, and whether it is new.
//
// A [Verifier] judges one change: from the content that runs on this host to the content of a head commit. It establishes facts and
// refuses what no rule may allow: a head without a valid signature of a known key, a head that does not descend from the last
// accepted commit, a changed trust root, a false revert, a host state that went back. Too few approvals are no refusal here:
// they are [Facts], and a rule refuses them.
//
//	v := &trust.Verifier{Site: "north-sea", Branch: "main", Pin: pin, State: trust.StateFile{Path: path}, Describe: describe}
//	facts, err := v.Verify(ctx, running, head, history) // err: *refusal.Error, or the world did not answer
//	…the rules decide over facts…
//	_, err = v.Fresh(ctx, head, history)                // it is the newest, where the root asks for that
//	err = v.Accept(ctx, head, facts)                    // durable; from here the host may change
//	err = v.Passed(ctx, head.ID)                        // its gate has passed: a revert may come back to it
//
// # Bytes
//
// A commit is verified over its raw bytes, by [ParseCommit], which knows one order of headers: tree, parents, author, committer, gpgsig. What
// is signed is the object without its gpgsig lines, in the SSHSIG namespace "git".
//
// A trust root, trust/N.root.json, and an approval, approvals/<unit>/<to>/<key>.dsse.json, are DSSE envelopes whose signatures are SSHSIG
// blobs over the envelope's PAE; one payload type and one namespace a purpose:
//
//	application/vnd.kmo.root.v1+json      kmo.root.v1
//	application/vnd.kmo.approval.v1+json  kmo.approval.v1
//	application/vnd.kmo.head.v1+json      kmo.head.v1
//
// <to> is the 64 hex digits of the unit's new content root (64 zeros for a removed unit), <key> the signer's key id with "/" as "_", "+" as "-"
// and ":" as "-". Paths are only where to look: the signed payload alone says what is approved.
//
// Keys are SSH keys: ed25519, ecdsa p256 and p384, their sk- forms with a touch, RSA of 3072 bits or more with SHA-2. A key's id is its
// OpenSSH fingerprint, "SHA256:…", always computed from the key. For commits a root may also pin OpenPGP keys: docs/decisions/024-openpgp.md.
package trust

import (
	"bytes"
	"context"
	"crypto/sha1" // Git's object ids are SHA-1; content is bound by kmo1 roots besides
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/crypto/ssh"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/policy/trust/signature"
)

// Bounds of a commit object.
const (
	maxCommit  = 1 << 20
	maxParents = 16
)

// Identity is who an author or committer line claims to be.
type Identity struct {
	Name, Email string
	When        time.Time
}

// Parsed is a commit object taken apart.
type Parsed struct {
	Tree      string
	Parents   []string
	Author    Identity
	Committer Identity
	Message   string
	Signature string // armoured, "" if the commit is unsigned
	Payload   []byte // what the signature covers: the object without its gpgsig lines
}

// ParseCommit reads a commit object strictly. Anything but the one order of headers that Git writes, a header twice, an unknown header
// (mergetag and encoding among them), a NUL or CR anywhere, bytes that are not UTF-8, or two signature blocks is E_OBJ_MALFORMED.
func ParseCommit(raw []byte) (Parsed, error) {
	var p Parsed
	if len(raw) > maxCommit {
		return p, &refusal.Error{Code: "E_LIMIT", Subject: "commit object", Got: fmt.Sprintf("%d bytes", len(raw)), Want: fmt.Sprintf("at most %d", maxCommit)}
	}
	if i := bytes.IndexAny(raw, "\x00\r"); i >= 0 {
		return p, malformed(fmt.Sprintf("byte %#02x at offset %d", raw[i], i), "neither NUL nor CR")
	}
	if !utf8.Valid(raw) {
		return p, malformed("bytes that are not UTF-8", "UTF-8 text")
	}
	s := &scanner{rest: string(raw)}
	p.Tree = s.id("tree")
	for strings.HasPrefix(s.rest, "parent ") && s.err == nil {
		p.Parents = append(p.Parents, s.id("parent"))
	}
	p.Author = s.identity("author")
	p.Committer = s.identity("committer")
	before := len(raw) - len(s.rest)
	if strings.HasPrefix(s.rest, "gpgsig ") {
		p.Signature = s.signature()
	}
	after := len(raw) - len(s.rest)
	if s.err == nil && !strings.HasPrefix(s.rest, "\n") {
		line, _, _ := strings.Cut(s.rest, "\n")
		s.err = malformed(fmt.Sprintf("%q", refusal.Clip(line, 80)), "headers tree, parent…, author, committer, gpgsig, once and in this order, then an empty line")
	}
	if len(p.Parents) > maxParents {
		s.err = malformed(fmt.Sprintf("%d parents", len(p.Parents)), fmt.Sprintf("at most %d", maxParents))
	}
	if s.err != nil {
		return Parsed{}, s.err
	}
	p.Message = s.rest[1:]
	p.Payload = append(append([]byte{}, raw[:before]...), raw[after:]...)
	return p, nil
}

// Trailers returns the values of the trailers of that name, in order. Trailers are the message's last paragraph, and never its first, when each
// of its lines is "Name: value".
func (p Parsed) Trailers(name string) []string {
	paragraphs := strings.Split(strings.TrimRight(p.Message, "\n"), "\n\n")
	if len(paragraphs) < 2 {
		return nil
	}
	var values []string
	for line := range strings.SplitSeq(paragraphs[len(paragraphs)-1], "\n") {
		key, value, ok := strings.Cut(line, ": ")
		if !ok || key == "" || strings.ContainsAny(key, " \t") {
			return nil
		}
		if key == name {
			values = append(values, value)
		}
	}
	return values
}

// ObjectID is the Git object id of a commit's raw bytes.
func ObjectID(raw []byte) string {
	sum := sha1.Sum(append(fmt.Appendf(nil, "commit %d\x00", len(raw)), raw...))
	return hex.EncodeToString(sum[:])
}

// scanner reads headers from the front of rest; the first fault stays in err.
type scanner struct {
	rest string
	err  error
}

// value takes the line that starts with "key ".
func (s *scanner) value(key string) string {
	if s.err != nil {
		return ""
	}
	line, rest, ok := strings.Cut(s.rest, "\n")
	value, has := strings.CutPrefix(line, key+" ")
	if !ok || !has {
		s.err = malformed(fmt.Sprintf("%q", refusal.Clip(line, 80)), "the header "+key)
		return ""
	}
	s.rest = rest
	return value
}

func (s *scanner) id(key string) string {
	value := s.value(key)
	if s.err == nil && !isObjectID(value) {
		s.err = malformed(fmt.Sprintf("%s %q", key, refusal.Clip(value, 80)), "40 lower-case hex digits")
	}
	return value
}

// identity takes "name <email> seconds ±hhmm".
func (s *scanner) identity(key string) Identity {
	value := s.value(key)
	if s.err != nil {
		return Identity{}
	}
	name, rest, ok1 := strings.Cut(value, " <")
	email, when, ok2 := strings.Cut(rest, "> ")
	seconds, zone, ok3 := strings.Cut(when, " ")
	unix, err := strconv.ParseUint(seconds, 10, 40)
	digits := len(zone) == 5 && (zone[0] == '+' || zone[0] == '-') && strings.Trim(zone[1:], "0123456789") == ""
	if !ok1 || !ok2 || !ok3 || err != nil || !digits || strings.ContainsAny(name+email, "<>") {
		s.err = malformed(fmt.Sprintf("%s %q", key, refusal.Clip(value, 120)), "name <email> seconds +hhmm")
		return Identity{}
	}
	return Identity{Name: name, Email: email, When: time.Unix(int64(unix), 0).UTC()}
}

// signature takes the gpgsig header with its continuation lines: one armoured block.
func (s *scanner) signature() string {
	lines := []string{s.value("gpgsig")}
	for strings.HasPrefix(s.rest, " ") && s.err == nil {
		lines = append(lines, s.value(""))
	}
	armoured := strings.Join(lines, "\n") + "\n"
	if n := strings.Count(armoured, "-----BEGIN "); s.err == nil && n != 1 {
		s.err = malformed(fmt.Sprintf("%d signature blocks", n), "exactly one")
	}
	return armoured
}

func malformed(got, want string) error {
	return &refusal.Error{Code: "E_OBJ_MALFORMED", Subject: "commit object", Got: got, Want: want}
}

func isObjectID(text string) bool {
	return len(text) == 40 && strings.Trim(text, "0123456789abcdef") == ""
}

// wrote finds for each unit who wrote part of its change: whom those commits name, and who signed them, that give the unit a content which
// does not run and which none of their parents has. A commit that only carries approvals, or a merge that takes one side as it is, writes nothing:
// whoever wrote that side did. Where nobody among the commits did, for it is a content from before what runs, on a branch that was cut there, whoever
// brings it to what comes after what runs has written the way back to it.
//
// Only the head must be signed, so below it names are claims. A false one excludes somebody who wrote nothing; who writes under a stranger's name
// is not excluded. To ask for a name of the root would not mend that, for a colleague's name will do, and to ask for signatures would refuse
// histories that need none. So where a commit that wrote is not signed by a key for commits, the head's signer is an author too: it takes its
// approvals from others than the one who let the change in. Nobody is counted by this.
func (j *judgement) wrote(ctx context.Context, commits []Commit, h History) (authors map[string]map[string]bool, err error) {
	authors = make(map[string]map[string]bool)
	trees, err := j.trees(ctx, commits, h)
	if err != nil {
		return nil, err
	}
	afterRunning := j.after(j.running.ID, commits)
	for i := range j.facts.Units {
		u := &j.facts.Units[i]
		who := map[string]bool{}
		authors[u.Unit] = who
		is := make(map[string]string, len(trees))
		for id, tree := range trees {
			if tree != nil {
				is[id] = content(tree, u)
			}
		}
		from, after := j.running.ID, afterRunning
		if (u.Unit == unitPolicy || strings.HasPrefix(u.Unit, unitRoot)) && j.state.Accepted.Commit != "" { // that is what these changes are counted from
			from = j.state.Accepted.Commit
			after = j.after(from, commits)
		}
		differs := func(c Commit, counts func(parent string) bool) bool { // from each of the parents that count
			return !slices.ContainsFunc(c.Parents, func(parent string) bool { return counts(parent) && is[parent] == is[c.ID] })
		}
		var wrote, brought []Commit
		written := map[string]bool{}
		for _, c := range commits {
			switch {
			case is[c.ID] == is[from]:
			case differs(c, func(string) bool { return true }):
				wrote = append(wrote, c)
				written[is[c.ID]] = true
			case after[c.ID] && differs(c, func(parent string) bool { return after[parent] }):
				brought = append(brought, c) // from another branch
			}
		}
		wrote = append(wrote, slices.DeleteFunc(brought, func(c Commit) bool { return written[is[c.ID]] })...)
		for _, c := range wrote {
			if !j.writers(c, who) && j.facts.Signer != "" {
				who[j.facts.Signer] = true
			}
		}
	}
	return authors, nil
}

// trees are those of what runs, of the commits since, and of what these stand on: a branch may have been cut before what runs.
func (j *judgement) trees(ctx context.Context, commits []Commit, h History) (map[string]Tree, error) {
	trees := map[string]Tree{j.running.ID: j.running.Tree}
	for _, c := range commits {
		trees[c.ID] = c.Tree
	}
	for _, c := range commits {
		for _, parent := range c.Parents {
			if _, known := trees[parent]; known {
				continue
			}
			before, err := h.At(ctx, parent)
			if err != nil {
				return nil, fmt.Errorf("history of %s: %w", c.ID, err)
			}
			trees[parent] = before.Tree
		}
	}
	return trees, nil
}

// after finds a commit and which of the others come after it. The head does in any case.
func (j *judgement) after(from string, commits []Commit) map[string]bool {
	after := map[string]bool{from: true, j.head.ID: true}
	for grown := true; grown; {
		grown = false
		for _, c := range slices.Backward(commits) { // parents first, as far as they are in order
			if !after[c.ID] && slices.ContainsFunc(c.Parents, func(parent string) bool { return after[parent] }) {
				after[c.ID], grown = true, true
			}
		}
	}
	return after
}

// writers adds whom a commit names as author and committer, and who signed it; signed says whether that was a key that may sign commits: a
// host's, which signs reverts, says nothing of who wrote.
func (j *judgement) writers(c Commit, who map[string]bool) (signed bool) {
	p, by, unsigned := j.root.openCommit(c.Raw, c.ID, j.facts.Time)
	for _, email := range []string{p.Author.Email, p.Committer.Email} {
		if name := j.root.principalOf(email); name != "" {
			who[name] = true
		}
	}
	if unsigned != nil {
		return false
	}
	principal, _ := j.root.keyOf(by.Key())
	if principal == nil || by.Verify() != nil {
		return false
	}
	who[principal.Name] = true
	_, err := j.root.allowed(by.Key(), RoleCommit, j.facts.Time, c.ID)
	return err == nil
}

// burned finds what of the change must not run whoever approves it: what a commit brought that is burned on this host, or that was signed with a
// key which is revoked with all that it signed. What another commit brings in its place is no longer that.
func (j *judgement) burned(ctx context.Context) error {
	suspects, err := j.suspects(ctx)
	if err != nil || len(suspects) == 0 {
		return err
	}
	trees, err := j.trees(ctx, suspects, j.history)
	if err != nil {
		return err
	}
	for _, c := range suspects {
		why := j.root.burns(c)
		if why == "" {
			why = "burned on this host"
		}
		for i := range j.facts.Units {
			u := &j.facts.Units[i]
			is := content(j.head.Tree, u)
			had := func(parent string) bool { return trees[parent] != nil && content(trees[parent], u) == is }
			if !u.To.IsZero() && content(c.Tree, u) == is && !slices.ContainsFunc(c.Parents, had) {
				j.facts.Burned = append(j.facts.Burned, Burned{Unit: u.Unit, Commit: c.ID, Why: why})
			}
		}
	}
	return nil
}

// suspects are the commits that may have brought what is burned.
func (j *judgement) suspects(ctx context.Context) (all []Commit, err error) {
	if j.root.rebad() {
		commits, err := j.history.Between(ctx, j.running.ID, j.head.ID)
		if err != nil {
			return nil, fmt.Errorf("history since %s: %w", j.running.ID, err)
		}
		all = slices.DeleteFunc(commits, func(c Commit) bool { return j.root.burns(c) == "" })
	}
	for _, id := range j.state.Burned {
		c, err := j.history.At(ctx, id)
		if err != nil {
			return nil, fmt.Errorf("the burned commit: %w", err)
		}
		all = append(all, c)
	}
	return all, nil
}

// past is what this host has accepted of a unit whose images change.
type past struct {
	facts    *UnitFacts
	now, was []string
	folder   string         // Git id of the folder that was looked at last
	first    map[string]int // by image, the first entry of the log that has it; -1 where it came as a way back from before the log
}

// older finds the units that go back: an image comes that this host accepted before one that it replaces. A unit that is gone is replaced as it was last.
func (j *judgement) older(ctx context.Context) error {
	var units []*past
	from, to := j.v.side(j.running.Tree), j.v.side(j.head.Tree)
	for i := range j.facts.Units {
		u := &j.facts.Units[i]
		was, err := from.unit(u.Unit)
		if err != nil {
			return fmt.Errorf("unit %s of the base: %w", u.Unit, err)
		}
		now, err := to.unit(u.Unit)
		if err != nil {
			return err
		}
		if slices.ContainsFunc(now.Images, func(image string) bool { return !slices.Contains(was.Images, image) }) {
			units = append(units, &past{facts: u, now: now.Images, was: was.Images, first: map[string]int{}})
		}
	}
	for n := 0; n < len(j.state.Log) && len(units) > 0; n++ { // by commit, for to read one is more than to compare all units of it
		commit, err := j.history.At(ctx, j.state.Log[n].Commit)
		if err != nil {
			return fmt.Errorf("an accepted commit: %w", err)
		}
		for _, u := range units {
			if err := u.look(commit, j.v.side(commit.Tree), n); err != nil {
				return err
			}
		}
	}
	for _, u := range units {
		u.judge(j.state.Log)
	}
	return nil
}

// look notes the images that are new in an entry.
func (u *past) look(commit Commit, tree side, n int) error {
	folder := tree.object(unitPath(u.facts.Unit))
	if folder == "" || folder == u.folder {
		return nil
	}
	u.folder = folder
	then, err := tree.unit(u.facts.Unit)
	if refusal.Of(err) != nil { // a file that another version of kMO could read
		return nil
	}
	if parsed, err := ParseCommit(commit.Raw); then.Rollback || err == nil && len(parsed.Trailers(TrailerReverts)) > 0 {
		n = -1
	}
	for _, image := range then.Images {
		if _, known := u.first[image]; !known {
			u.first[image] = n
		}
	}
	if u.facts.From.IsZero() {
		u.was = then.Images
	}
	return err
}

func (u *past) judge(log []Entry) {
	newest := -1
	for _, image := range u.was {
		if n, known := u.first[image]; known {
			newest = max(newest, n)
		}
	}
	for _, image := range u.now {
		if n, known := u.first[image]; known && n < newest && !slices.Contains(u.was, image) {
			u.facts.Back = log[max(n, 0)].Commit
		}
	}
}

// SignCommit signs an unsigned commit object, so that `git verify-commit` and Verify accept the result.
func SignCommit(unsigned []byte, signer ssh.Signer) (signed []byte, err error) {
	p, err := ParseCommit(unsigned)
	if err != nil {
		return nil, fmt.Errorf("signing a commit: %w", err)
	}
	if p.Signature != "" {
		return nil, errors.New("signing a commit: it is signed already")
	}
	blob, err := signature.Sign(unsigned, signer, namespaceCommit)
	if err != nil {
		return nil, fmt.Errorf("signing a commit: %w", err)
	}
	header := "gpgsig " + strings.ReplaceAll(strings.TrimSuffix(signature.Armour(blob), "\n"), "\n", "\n ") + "\n"
	end := bytes.Index(unsigned, []byte("\n\n")) + 1
	return slices.Concat(unsigned[:end], []byte(header), unsigned[end:]), nil
}

// SignedBy says whether a commit carries a good signature of that very key, whoever's it is.
func SignedBy(raw []byte, key ssh.PublicKey) bool {
	_, signed, err := openCommit(raw, "commit")
	return err == nil && bytes.Equal(signed.Key().Marshal(), key.Marshal()) && signed.Verify() == nil
}
