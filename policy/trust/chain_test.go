package trust

import (
	"context"
	"encoding/json"
	"slices"
	"strings"
	"testing"
)

// rotate makes the next trust root, which change alters, and puts it into the work tree with the signatures of names.
func (w *world) rotate(version int, change func(r *Root), names ...string) {
	w.t.Helper()
	text, err := json.Marshal(w.root) // what change does is not done to the version before
	if err != nil {
		w.t.Fatal(err)
	}
	next := Root{}
	if err := json.Unmarshal(text, &next); err != nil {
		w.t.Fatal(err)
	}
	next.Version = version
	change(&next)
	file, err := SignRoot(next)
	for _, name := range names {
		if err == nil {
			file, err = CosignRoot(file, w.keys[name])
		}
	}
	if err != nil {
		w.t.Fatal(err)
	}
	w.root = next
	w.files[RootPath(version)] = string(file)
}

// rotated commits the work tree as alice and adds the approvals of the new version.
func (w *world) rotated(before Commit, unit string, names ...string) Commit {
	w.t.Helper()
	w.approve(before, w.commit("alice", "", "a new root, not approved"), unit, nil, names...)
	w.git("reset", "-q", "--hard", "HEAD^")
	return w.commit("alice", "", "a new root")
}

// twoRoots is a world in which alice and frank hold the role root, and one of them is enough.
func twoRoots(t *testing.T) *world {
	return newWorld(t, func(w *world, r *Root) {
		r.Principals = append(r.Principals, Principal{Name: "frank", Class: "human", Emails: []string{"frank@kos.dev"}, Keys: []Key{w.key("frank", RoleRoot, RoleCommit)}})
		for i := range r.Roles {
			if slices.Contains([]string{RoleRoot, RoleCommit}, r.Roles[i].Name) {
				r.Roles[i].Members = append(r.Roles[i].Members, "frank")
			}
		}
	})
}

// renew takes alice's key away and gives her another.
func renew(w *world) func(*Root) {
	return func(r *Root) {
		alice := member(r, "alice")
		alice.Keys[0].Revoked = &Revoked{Reason: "lost"}
		alice.Keys = append(alice.Keys, w.key("alice-2", RoleRoot, RoleCommit, RoleApprove))
	}
}

func TestRotation(t *testing.T) {
	w := twoRoots(t)
	a := w.commit("alice", "", "one")
	w.accept(Commit{}, a)
	w.rotate(2, renew(w), "alice", "frank")
	facts, err := w.v.Verify(context.Background(), a, w.commit("alice", "", "not approved"), w)
	if u := factsOf(t, facts, "@root-2"); err != nil || !facts.Trust || facts.Other || u.Action != "root" || u.Tier != 0 || u.Missing() != 3 {
		t.Fatalf("a root that nobody has approved: %+v %v", facts, err)
	}
	w.git("reset", "-q", "--hard", "HEAD^")
	b := w.rotated(a, "@root-2", "bob", "carol", "dave")
	if u := w.verify(a, b, "@root-2"); u.Missing() != 0 {
		t.Fatalf("approved: %+v", u)
	}
	w.accept(a, b)
	if s, err := w.v.State.Load(); err != nil || s.Root != 2 || s.Current != PinOf([]byte(w.files["trust/2.root.json"])) {
		t.Errorf("state %+v %v", s, err)
	}
	w.refused(b, w.version("alice", "2"), "E_KEY_REVOKED")
	w.git("reset", "-q", "--hard", "HEAD^")
	c := w.version("alice-2", "2")
	w.accept(b, c)

	t.Run("T32 without the accepted root", func(t *testing.T) {
		file := w.files["trust/2.root.json"]
		delete(w.files, "trust/2.root.json")
		w.refused(c, w.commit("frank", "", "back to root 1"), "E_ROLLBACK")
		w.git("reset", "-q", "--hard", "HEAD^")
		w.files["trust/2.root.json"] = file
	})
	t.Run("T27 another root of the accepted version", func(t *testing.T) {
		file, root := w.files["trust/2.root.json"], w.root
		first, err := ParseRoot([]byte(w.files["trust/1.root.json"]))
		if err != nil {
			t.Fatal(err)
		}
		w.root = *first
		w.rotate(2, func(*Root) {}, "alice", "frank")
		w.refused(c, w.commit("frank", "", "another root 2"), "E_ROOT_VERSION")
		w.git("reset", "-q", "--hard", "HEAD^")
		w.files["trust/2.root.json"], w.root = file, root
	})
	t.Run("a new host walks from its pin", func(t *testing.T) {
		v := w.verifier()
		v.State.Path = ""
		facts, err := v.Verify(context.Background(), Commit{}, c, w)
		if err != nil || facts.Trust || facts.Signer != "alice" {
			t.Errorf("%+v %v", facts, err)
		}
		w.refused(c, w.version("alice", "3"), "E_KEY_REVOKED")
		w.git("reset", "-q", "--hard", "HEAD^")
	})
}

// carols gives the role root to carol alone.
func carols(_ *world, r *Root) {
	member(r, "carol").Keys[0].Uses = append(member(r, "carol").Keys[0].Uses, RoleRoot)
	roleOf(r, RoleRoot).Members = []string{"carol"}
}

// TestRotationTakesBothSides: T26, and roots that jump.
func TestRotationTakesBothSides(t *testing.T) {
	for _, tt := range []struct {
		name, code string
		version    int
		change     func(w *world, r *Root)
		names      []string
	}{
		{"by the new side alone", "E_ROOT_THRESHOLD", 2, carols, []string{"carol"}},
		{"by the old side alone", "E_ROOT_THRESHOLD", 2, carols, []string{"alice"}},
		{"with a key that the new side revokes", "E_ROOT_THRESHOLD", 2, func(w *world, r *Root) { renew(w)(r) }, []string{"alice"}},
		{"by nobody", "E_LIMIT", 2, func(*world, *Root) {}, nil},
		{"a jump", "E_ROOT_VERSION", 3, func(*world, *Root) {}, []string{"alice", "frank"}},
		{"another site's", "E_ROOT_INVALID", 2, func(_ *world, r *Root) { r.Site = "south-sea" }, []string{"alice", "frank"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := twoRoots(t)
			a := w.commit("alice", "", "one")
			w.accept(Commit{}, a)
			w.rotate(tt.version, func(r *Root) { tt.change(w, r) }, tt.names...)
			w.refused(a, w.commit("alice", "", tt.name), tt.code)
		})
	}
}

// TestRotationWhileAway: a host that was away meets two new roots, new rules and a change of a unit at once, in commits of their own or not.
func TestRotationWhileAway(t *testing.T) {
	w := twoRoots(t)
	a := w.commit("alice", "", "one")
	w.accept(Commit{}, a)
	w.rotate(2, renew(w), "alice", "frank")
	b := w.rotated(a, "@root-2", "bob", "carol", "dave")
	w.version("alice-2", "2")
	w.files["policy/site.rego"] = "package site\n"
	w.commit("alice-2", "", "rules")
	w.rotate(3, func(r *Root) { r.Floors = []string{a.ID} }, "frank")
	last := w.commit("frank", "", "root 3")
	facts, err := w.v.Verify(context.Background(), a, last, w)
	if err != nil || !facts.Trust || !facts.Policy || !facts.Other || !facts.Apart {
		t.Fatalf("one after the other: %+v %v", facts, err)
	}
	if two, three := factsOf(t, facts, "@root-2"), factsOf(t, facts, "@root-3"); two.Missing() != 0 || three.Missing() != 3 {
		t.Errorf("approvals of 2: %+v, of 3: %+v", two, three)
	}
	w.git("reset", "-q", "--hard", b.ID)
	for name := range w.files {
		if strings.HasPrefix(name, "trust/3") || strings.HasPrefix(name, "policy/") {
			delete(w.files, name)
		}
	}
	w.files["site.yaml"] = "site: north-sea\n# changed\n"
	w.rotate(3, func(r *Root) { r.Floors = []string{a.ID} }, "frank")
	mixed := w.commit("frank", "", "root 3 and more")
	if facts, err := w.v.Verify(context.Background(), a, mixed, w); err != nil || facts.Apart {
		t.Errorf("mixed: %+v %v", facts, err)
	}
}

// TestRotationIsInForceAfterIt: the commit that brings a root is judged by the one before.
func TestRotationIsInForceAfterIt(t *testing.T) {
	w := twoRoots(t)
	a := w.commit("alice", "", "one")
	w.accept(Commit{}, a)
	w.rotate(2, renew(w), "alice", "frank")
	w.refused(a, w.commit("alice-2", "alice", "by a key of root 2"), "E_SIG_UNKNOWN_KEY")
	for _, signer := range []string{"alice-2", "alice"} { // nothing but the root is new: either may bring its approvals
		if _, err := w.v.Verify(context.Background(), a, w.commit(signer, "alice", "after it"), w); err != nil {
			t.Error(err)
		}
	}
	w.refused(a, w.version("alice", "2"), "E_KEY_REVOKED")
}

func roleOf(r *Root, name string) *Role {
	for i := range r.Roles {
		if r.Roles[i].Name == name {
			return &r.Roles[i]
		}
	}
	return nil
}

// TestRotationWhereNothingRuns: what was accepted first never passed its gate, and a new root comes before the mend.
func TestRotationWhereNothingRuns(t *testing.T) {
	w := twoRoots(t)
	a := w.commit("alice", "", "one")
	w.begin(Commit{}, a)
	w.rotate(2, renew(w), "alice", "frank")
	w.rotated(a, "@root-2", "bob", "carol", "dave")
	c := w.version("alice-2", "2")
	facts, err := w.v.Verify(context.Background(), Commit{}, c, w)
	if err != nil || !facts.Trust || factsOf(t, facts, "@root-2").Missing() != 0 {
		t.Errorf("%+v %v", facts, err)
	}
	w.refused(Commit{}, w.version("alice", "3"), "E_KEY_REVOKED")
}
