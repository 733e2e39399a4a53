package trust

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/renameio/v2"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/policy/trust/signature"
	"github.com/kindos/kmo/registry/merkle"
)

// maxEntries is how many accepted commits a state remembers.
const maxEntries = 64

const maxState = 64 << 20 // bytes of its file

// State is what a host remembers of trust. It only moves forward.
type State struct {
	Version  int            `json:"version"` // of this file: 1
	Seq      uint64         `json:"seq"`     // grows by one with each write
	Site     string         `json:"site"`
	Branch   string         `json:"branch"`
	Root     int            `json:"root"` // version of the trust root
	Pin      Pin            `json:"pin"`
	Current  Pin            `json:"current,omitzero"` // of that version's file; the pin if it is not there
	Time     time.Time      `json:"time"`             // trusted time of the last write
	Accepted Accepted       `json:"accepted"`
	Log      []Entry        `json:"log"`     // accepted commits, oldest first, at most 64
	Burned   []string       `json:"burned"`  // commits that no revert may come back to
	Reverts  []Entry        `json:"reverts"` // accepted in the 24 hours before Time
	Cooling  []Cooling      `json:"cooling,omitempty"`
	Head     *HeadStatement `json:"head,omitempty"` // the newest that was seen; none where the root asks for none
}

// Accepted is the last accepted commit with the roots of its content.
type Accepted struct {
	Commit   string        `json:"commit"`
	Content  merkle.Digest `json:"content"`  // over the units, profiles, policy, trust and site.yaml
	Policy   merkle.Digest `json:"policy"`   // of the folder policy/, none if there is none
	Profiles string        `json:"profiles"` // Git id of the folder profiles/
	Units    []UnitContent `json:"units"`    // sorted by name
}

// UnitContent is one unit of the last accepted commit.
type UnitContent struct {
	Name   string        `json:"name"`
	Object string        `json:"object"` // Git id of its folder, to know it again without hashing
	Digest merkle.Digest `json:"digest"`
	Tier   int           `json:"tier"` // its own, without what it needs
}

// Entry is one accepted commit.
type Entry struct {
	Commit  string        `json:"commit"`
	Tree    string        `json:"tree"`
	Content merkle.Digest `json:"content"`
	Passed  bool          `json:"passed"` // its gate has passed here, and it was not taken back
	When    time.Time     `json:"when"`
}

// StateFile keeps a State on disk. It is trusted storage.
type StateFile struct{ Path string }

// Load reads the state. It returns fs.ErrNotExist, wrapped, if there is none, and a *refusal.Error with E_STATE if the file is not one.
func (f StateFile) Load() (State, error) {
	file, err := os.ReadFile(f.Path)
	if err != nil {
		return State{}, fmt.Errorf("trust state: %w", err)
	}
	return f.parse(file)
}

func (f StateFile) parse(file []byte) (State, error) {
	var s State
	if err := signature.Decode(file, &s, maxState, f.Path); err != nil {
		return s, stateAlarm(f.Path, refusal.Of(err).Got, "a state that this program wrote")
	}
	if s.Version != 1 || s.Seq == 0 || s.Accepted.Commit == "" {
		return s, stateAlarm(f.Path, fmt.Sprintf("version %d, seq %d", s.Version, s.Seq), "version 1 with an accepted commit")
	}
	return s, nil
}

// save makes the state durable before it returns; after a crash Load returns the old one or the new one whole.
func (f StateFile) save(s State) error {
	if f.Path == "" {
		return errors.New("trust state: no path is set")
	}
	data, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("trust state: %v", err)
	}
	folder := filepath.Dir(f.Path)
	if err := renameio.WriteFile(f.Path, data, 0o600, renameio.WithTempDir(folder)); err != nil {
		return fmt.Errorf("trust state: %w", err)
	}
	dir, err := os.Open(folder)
	if err != nil {
		return fmt.Errorf("trust state: %w", err)
	}
	defer dir.Close()
	if err := dir.Sync(); err != nil {
		return fmt.Errorf("trust state: %w", err)
	}
	return nil
}

// WayOut is what an operator can do whose host has lost its memory for good.
const WayOut = "if it cannot be had as it was, stop the agent and name the commit to go on from: kmo state anchor"

func stateAlarm(path, got, want string) error {
	return &refusal.Error{Code: "E_STATE", Subject: "trust state " + path, Got: got, Want: want + "; find out who changed it; " + WayOut}
}

// load reads the state and refuses one that is missing, older or another host's.
func (v *Verifier) load() (State, error) {
	if v.State.Path == "" && !v.MustExist {
		return State{}, nil
	}
	s, err := v.read()
	if errors.Is(err, fs.ErrNotExist) {
		if v.MustExist || v.MinSeq > 0 || v.seq > 0 {
			return s, stateAlarm(v.State.Path, "no such file", fmt.Sprintf("seq %d or more", max(v.MinSeq, v.seq, 1)))
		}
		return State{}, nil
	}
	if err != nil {
		return s, err
	}
	if least := max(v.MinSeq, v.seq); s.Seq < least {
		return s, stateAlarm(v.State.Path, fmt.Sprintf("seq %d", s.Seq), fmt.Sprintf("seq %d or more", least))
	}
	if s.Site != v.Site || s.Branch != v.Branch || s.Pin != v.Pin {
		return s, stateAlarm(v.State.Path, fmt.Sprintf("site %s, branch %s, root %v", s.Site, s.Branch, s.Pin.Root), fmt.Sprintf("site %s, branch %s, root %v", v.Site, v.Branch, v.Pin.Root))
	}
	v.caches()
	v.seq = s.Seq
	for _, u := range s.Accepted.Units {
		v.roots[u.Object] = u.Digest
	}
	return s, nil
}

// read is State.Load, which parses the file only if its bytes are not those that were parsed last: with a thousand units that is most of
// the work, and a change asks four times.
func (v *Verifier) read() (State, error) {
	file, err := os.ReadFile(v.State.Path)
	if err != nil {
		return State{}, fmt.Errorf("trust state: %w", err)
	}
	if v.parsed.file == nil || !bytes.Equal(file, v.parsed.file) { // an empty file equals none
		s, err := v.State.parse(file)
		if err != nil {
			return s, err
		}
		v.parsed = parsed{file, s}
	}
	s := v.parsed.state // whoever asks may change what is returned
	s.Log, s.Burned, s.Reverts, s.Accepted.Units = slices.Clone(s.Log), slices.Clone(s.Burned), slices.Clone(s.Reverts), slices.Clone(s.Accepted.Units)
	return s, nil
}

// parsed is a state with the bytes that it was made of.
type parsed struct {
	file  []byte
	state State
}

func (v *Verifier) caches() {
	if v.roots == nil {
		v.roots, v.declared = map[string]merkle.Digest{}, map[string]Declared{}
	}
}

func (v *Verifier) side(tree Tree) side {
	v.caches()
	return side{Tree: tree, roots: v.roots, declared: v.declared, describe: v.Describe}
}

func (v *Verifier) clock() time.Time {
	if v.Clock == nil {
		return time.Now().UTC()
	}
	return v.Clock().UTC()
}

// now is the trusted time: it never goes back.
func (v *Verifier) now(s State) time.Time {
	for _, t := range []time.Time{v.clock(), s.Time} {
		if t.After(v.latest) {
			v.latest = t
		}
	}
	return v.latest.UTC()
}

// content computes the roots of one side: each unit's, the policy's, and one over everything that is judged. Tiers stay unset.
func (v *Verifier) content(s side) (Accepted, error) {
	a := Accepted{Profiles: s.object("profiles")}
	names, err := s.units()
	if err != nil {
		return a, err
	}
	var all strings.Builder
	for _, name := range names {
		u := UnitContent{Name: name, Object: s.object(unitPath(name))}
		if u.Digest, err = s.root(unitPath(name), folderRoot); err != nil {
			return a, err
		}
		a.Units = append(a.Units, u)
		fmt.Fprintf(&all, "%s %v\n", unitPath(name), u.Digest)
	}
	for _, folder := range []string{"policy", "profiles", "trust"} {
		d, err := s.root(folder, folderRoot)
		if err != nil {
			return a, err
		}
		if folder == "policy" {
			a.Policy = d
		}
		fmt.Fprintf(&all, "%s %v\n", folder, d)
	}
	site, err := s.root("site.yaml", fileRoot)
	if err != nil {
		return a, err
	}
	fmt.Fprintf(&all, "site.yaml %v\n", site)
	a.Content = merkle.BlobRoot([]byte(all.String()))
	return a, nil
}

// tiers sets the units' own tiers, reading only units that differ from the last accepted commit's.
func (v *Verifier) tiers(s side, root *Root, a *Accepted, last Accepted) error {
	known := map[string]UnitContent{}
	if last.Profiles == a.Profiles {
		for _, u := range last.Units {
			known[u.Name] = u
		}
	}
	for i := range a.Units {
		u := &a.Units[i]
		if old, ok := known[u.Name]; ok && old.Object == u.Object {
			u.Tier = old.Tier
			continue
		}
		tier, err := s.tier(root, u.Name)
		if err != nil {
			return err
		}
		u.Tier = tier
	}
	return nil
}

// Accept makes the head the last accepted commit. It is durable when it returns, and must have returned before anything of the head is applied.
// facts are what Verify returned for this head, and the rules have allowed. Accepting the same head again writes nothing.
func (v *Verifier) Accept(ctx context.Context, head Commit, facts Facts) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	s, err := v.load()
	if err != nil {
		return err
	}
	if facts.Commit != head.ID || facts.Base != s.Accepted.Commit || facts.Key == "" || ctx.Err() != nil {
		return fmt.Errorf("accepting %s over %s: the facts are of %s over %s (%v)", head.ID, s.Accepted.Commit, facts.Commit, facts.Base, ctx.Err())
	}
	if s.Accepted.Commit == head.ID {
		return nil
	}
	chain, err := v.chain(head.Tree)
	if err != nil {
		return err
	}
	root := chain.Newest()
	if err := v.stillFresh(&s, head, root); err != nil {
		return err
	}
	parsed, err := ParseCommit(head.Raw)
	if err != nil {
		return err
	}
	accepted, err := v.content(v.side(head.Tree))
	if err != nil {
		return err
	}
	if err := v.tiers(v.side(head.Tree), root, &accepted, s.Accepted); err != nil {
		return err
	}
	accepted.Commit = head.ID
	entry := Entry{Commit: head.ID, Tree: parsed.Tree, Content: accepted.Content, When: facts.Time}
	if facts.Revert {
		good, _, _ := strings.Cut(parsed.Trailers(TrailerReverts)[0], "..")
		s.takeBack(good)
		s.Reverts = append(s.Reverts, entry)
	}
	s.Accepted, s.Cooling = accepted, nil
	s.Log = append(s.Log, entry)
	s.Log = s.Log[max(0, len(s.Log)-maxEntries):]
	s.Version, s.Site, s.Branch, s.Pin, s.Root, s.Current = 1, v.Site, v.Branch, v.Pin, root.Version, chain[len(chain)-1].Pin
	return v.write(s)
}

// Passed notes that an accepted commit's gate has passed: a revert may come back to it.
func (v *Verifier) Passed(_ context.Context, id string) error {
	return v.amend(id, func(s *State, e *Entry) bool {
		changed := !e.Passed
		e.Passed = true
		return changed
	})
}

// Burn notes that no revert may ever come back to an accepted commit. What it brought must not come again either (KT024). No
// command of this version calls it; a key that is revoked with all that it signed burns what it signed without it.
func (v *Verifier) Burn(_ context.Context, id string) error {
	return v.amend(id, func(s *State, e *Entry) bool {
		if slices.Contains(s.Burned, id) {
			return false
		}
		s.Burned = append(s.Burned, id)
		return true
	})
}

// Seq is the number of the newest state, for the journal and the audit log to remember; 0 if there is none.
func (v *Verifier) Seq() (uint64, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	s, err := v.load()
	return s.Seq, err
}

// late is how far the clock is behind the trusted time.
func (v *Verifier) late(s State) time.Duration { return v.now(s).Sub(v.clock()) }

// Behind is the trusted time if the clock is so far behind it that it is an alarm, and the zero time if it is not.
func (v *Verifier) Behind() (time.Time, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	s, err := v.load()
	if err != nil || v.late(s) <= clockSlack {
		return time.Time{}, err
	}
	return v.now(s), nil
}

func (v *Verifier) amend(id string, change func(*State, *Entry) bool) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	s, err := v.load()
	if err != nil {
		return err
	}
	for i := range s.Log {
		if s.Log[i].Commit == id {
			if !change(&s, &s.Log[i]) {
				return nil
			}
			return v.write(s)
		}
	}
	return fmt.Errorf("trust state %s: commit %s is not among the accepted ones", v.State.Path, refusal.Clip(id, 60))
}

// write saves the next state.
func (v *Verifier) write(s State) error {
	s.Seq++
	s.Time = v.now(s)
	s.Reverts = slices.DeleteFunc(s.Reverts, func(e Entry) bool { return s.Time.Sub(e.When) >= 24*time.Hour })
	s.Log, s.Burned, s.Reverts = append([]Entry{}, s.Log...), append([]string{}, s.Burned...), append([]Entry{}, s.Reverts...)
	s.Accepted.Units = append([]UnitContent{}, s.Accepted.Units...)
	if err := v.State.save(s); err != nil {
		return err
	}
	v.seq = s.Seq
	return nil
}

// reverts counts those in the 24 hours before a time.
func (s *State) reverts(now time.Time) (n int) {
	for _, e := range s.Reverts {
		if now.Sub(e.When) < 24*time.Hour {
			n++
		}
	}
	return n
}

// revertible returns the entry of a commit if a revert may come back to it: the newest that passed before the newest accepted change, or the
// newest accepted commit itself, if it passed and what is reverted was never accepted here.
func (s *State) revertible(commit string) *Entry {
	for _, i := range s.candidates() {
		if s.Log[i].Commit == commit {
			return &s.Log[i]
		}
	}
	return nil
}

func (s *State) candidates() (found []int) {
	last := len(s.Log) - 1
	if last >= 0 && s.Log[last].Passed {
		found = append(found, last)
	}
	for i := last - 1; i >= 0; i-- {
		if s.Log[i].Passed {
			return append(found, i)
		}
	}
	return found
}

func (s *State) targets() string {
	var ids []string
	for _, i := range s.candidates() {
		ids = append(ids, s.Log[i].Commit)
	}
	if len(ids) == 0 {
		return "there is none"
	}
	return strings.Join(ids, " or ")
}

// takeBack clears the verdict of everything that was accepted after a commit.
func (s *State) takeBack(good string) {
	for i := len(s.Log) - 1; i >= 0 && s.Log[i].Commit != good; i-- {
		s.Log[i].Passed = false
	}
}
