package trust

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kindos/kmo/policy/refusal"
)

// content commits a version of the unit relay.
func (w *world) version(signer, v string) Commit {
	w.t.Helper()
	w.files["units/relay/unit.yaml"] = "tier: 3\nv: " + v + "\n"
	return w.commit(signer, "", "version "+v)
}

// takeBack makes a revert commit: the tree of good on head, signed by name, with these trailers.
func (w *world) takeBack(name string, good, head Commit, trailers string) Commit {
	w.t.Helper()
	tree := w.git("rev-parse", good.ID+"^{tree}")
	stamp := w.now.Unix()
	unsigned := fmt.Sprintf("tree %s\nparent %s\nauthor host <host@kos.dev> %d +0000\ncommitter host <host@kos.dev> %d +0000\n\nTake back\n\n%s", tree, head.ID, stamp, stamp, trailers)
	signed, err := SignCommit([]byte(unsigned), w.keys[name])
	if err != nil {
		w.t.Fatal(err)
	}
	return w.write(signed)
}

// write stores a commit object as it is.
func (w *world) write(raw []byte) Commit {
	w.t.Helper()
	id, err := w.tryGit(raw, "hash-object", "-t", "commit", "-w", "--stdin", "--literally")
	if err != nil {
		w.t.Fatal(err, id)
	}
	return w.at(strings.TrimSpace(id))
}

func reverts(good, head Commit) string {
	return "Kmo-Reverts: " + good.ID + ".." + head.ID + "\nKmo-Unit: relay\nKmo-Gate: http /healthz\nKmo-Evidence: 500: again\nKmo-Host: edge-1\n"
}

func TestRevert(t *testing.T) {
	w := newWorld(t, nil)
	a := w.version("alice", "1")
	w.accept(Commit{}, a)
	b := w.version("alice", "2")
	w.accept(a, b)
	c := w.version("alice", "3")
	w.begin(b, c) // and its gate fails
	good := w.takeBack("host", b, c, reverts(b, c))
	out, err := w.tryGit(nil, "-c", "gpg.ssh.allowedSignersFile="+w.signers("host"), "verify-commit", good.ID)
	if err != nil {
		t.Errorf("git refuses the revert commit: %v %s", err, out)
	}
	for _, tt := range []struct {
		name string
		head Commit
		code string
		text string
	}{
		{"T37 the tree of no accepted commit", w.takeBack("host", w.version("alice", "9"), c, reverts(b, c)), "E_REVERT", "content root"},
		{"T37 further back than the newest change", w.takeBack("host", a, c, reverts(a, c)), "E_REVERT", "a range that begins after " + a.ID},
		{"T37 the tree of another than the named commit", w.takeBack("host", a, c, reverts(b, c)), "E_REVERT", "content root"},
		{"T37 back to what never passed its gate", w.takeBack("host", c, c, reverts(c, c)), "E_REVERT", "a range that begins after"},
		{"a range that does not end at the parent", w.takeBack("host", b, c, reverts(b, b)), "E_REVERT", "want the one parent"},
		{"two ranges", w.takeBack("host", b, c, reverts(b, c)+"Kmo-Reverts: x..y\n"), "E_REVERT", "want one range"},
		{"no range", w.takeBack("host", b, c, "Kmo-Reverts: all\n"), "E_REVERT", "want one range"},
		{"no trailer at all", w.takeBack("host", b, c, "no trailers"), "E_SIG_UNKNOWN_KEY", "has not the role and use commit"},
		{"a key without the role", w.takeBack("carol", b, c, reverts(b, c)), "E_SIG_UNKNOWN_KEY", "role and use commit"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if text := w.refused(c, tt.head, tt.code); !strings.Contains(text, tt.text) {
				t.Errorf("%s; want %s in it", text, tt.text)
			}
		})
	}
	facts := w.accept(c, good)
	if got := factsOf(t, facts, "relay"); !facts.Revert || facts.Signer != "host" || got.Need != 0 || got.From.IsZero() || got.To == got.From {
		t.Errorf("facts of a revert: %+v", facts)
	}
	if again := w.accept(good, good); !again.Revert {
		t.Errorf("the same revert again: %+v", again)
	}
	t.Run("T37 a stolen host key cannot go on", func(t *testing.T) {
		for _, older := range []Commit{a, c} {
			w.refused(good, w.takeBack("host", older, good, reverts(older, good)), "E_REVERT")
		}
	})
	t.Run("a commit by a person with the trailer is judged as any other", func(t *testing.T) {
		head := w.takeBack("alice", a, good, reverts(a, good))
		facts, err := w.v.Verify(context.Background(), good, head, w)
		if err != nil || facts.Revert {
			t.Errorf("%+v, %v", facts, err)
		}
	})
	t.Run("another host that never had the bad commit takes its revert", func(t *testing.T) {
		other := w.verifier()
		other.State.Path = filepath.Join(t.TempDir(), "state")
		w.v, other = other, w.v
		defer func() { w.v = other }()
		w.accept(Commit{}, a)
		w.accept(a, b)
		if facts := w.accept(b, good); !facts.Revert || len(facts.Units) != 0 {
			t.Errorf("%+v", facts)
		}
	})
}

// TestRevertOfPassed undoes a commit that had passed: a host's key cannot bring it back, nor go further.
func TestRevertOfPassed(t *testing.T) {
	w := newWorld(t, nil)
	a := w.version("alice", "1")
	w.accept(Commit{}, a)
	b := w.version("alice", "2")
	w.accept(a, b)
	c := w.version("alice", "3")
	w.accept(b, c)
	back := w.takeBack("host", b, c, reverts(b, c))
	w.accept(c, back)
	for _, good := range []Commit{a, c} {
		w.refused(back, w.takeBack("host", good, back, reverts(good, back)), "E_REVERT")
	}
}

func TestRevertBounds(t *testing.T) {
	w := newWorld(t, nil)
	w.v.RevertsPerDay = 1
	a := w.version("alice", "1")
	w.accept(Commit{}, a)
	step := func(running Commit, v string) (bad, back Commit) {
		bad = w.version("alice", v)
		w.begin(running, bad)
		back = w.takeBack("host", running, bad, reverts(running, bad))
		w.git("reset", "-q", "--hard", back.ID)
		return bad, back
	}
	bad, back := step(a, "2")
	w.accept(bad, back)
	bad2, back2 := step(back, "3")
	t.Run("T37 one more revert than the bound", func(t *testing.T) {
		if text := w.refused(bad2, back2, "E_REVERT"); !strings.Contains(text, "1 reverts in the last 24 hours; want at most 1") {
			t.Error(text)
		}
	})
	w.now = w.now.Add(24 * time.Hour)
	w.accept(bad2, back2)

	t.Run("T37 burned", func(t *testing.T) {
		w.now = w.now.Add(24 * time.Hour)
		bad, burned := step(back2, "4")
		if err := w.v.Burn(context.Background(), back2.ID); err != nil {
			t.Fatal(err)
		}
		if text := w.refused(bad, burned, "E_REVERT"); !strings.Contains(text, "burned") {
			t.Error(text)
		}
	})
}

func TestFloors(t *testing.T) {
	w := newWorld(t, nil)
	a := w.version("alice", "1")
	b := w.version("alice", "2")
	w.root.Floors = []string{b.ID}
	file, err := SignRoot(w.root, w.keys["alice"])
	if err != nil {
		t.Fatal(err)
	}
	w.v.Pin = PinOf(file)
	w.git("reset", "-q", "--hard", a.ID)
	w.files["trust/1.root.json"] = string(file)
	below := w.commit("alice", "", "beside the floor")
	w.refused(Commit{}, below, "E_ROLLBACK")
	w.git("reset", "-q", "--hard", b.ID)
	above := w.commit("alice", "", "above the floor")
	w.accept(Commit{}, above)
}

func TestState(t *testing.T) {
	w := newWorld(t, nil)
	ctx := context.Background()
	a := w.version("alice", "1")
	if seq, err := w.v.Seq(); seq != 0 || err != nil {
		t.Fatal(seq, err)
	}
	w.accept(Commit{}, a)
	old, err := os.ReadFile(w.v.State.Path)
	if err != nil {
		t.Fatal(err)
	}
	b := w.version("alice", "2")
	w.accept(a, b)
	seq, err := w.v.Seq()
	if seq != 4 || err != nil { // accepted and passed, twice
		t.Fatal(seq, err)
	}
	alarm := func(t *testing.T, v *Verifier, text string) {
		t.Helper()
		_, err := v.Verify(ctx, b, b, w)
		if r := refusal.Of(err); r == nil || r.Code != "E_STATE" || !strings.Contains(err.Error(), text) {
			t.Errorf("got %v, want E_STATE with %q", err, text)
		}
		if err := v.Accept(ctx, b, Facts{Commit: b.ID, Base: b.ID, Key: "x"}); refusal.Of(err) == nil {
			t.Errorf("accepting on a false state: %v", err)
		}
	}
	now, err := os.ReadFile(w.v.State.Path)
	if err != nil {
		t.Fatal(err)
	}
	set := func(t *testing.T, file []byte) {
		t.Helper()
		if err := os.WriteFile(w.v.State.Path, file, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("T39 restored from a backup under a running agent", func(t *testing.T) {
		set(t, old)
		alarm(t, w.v, "seq 2; want seq 4 or more")
	})
	t.Run("T39 restored from a backup", func(t *testing.T) {
		v := w.verifier()
		v.MinSeq = seq
		alarm(t, v, "seq 2; want seq 4 or more")
	})
	t.Run("T39 cut short", func(t *testing.T) {
		set(t, now[:len(now)/2])
		alarm(t, w.verifier(), "name the commit to go on from: kmo state anchor")
	})
	t.Run("T39 emptied", func(t *testing.T) {
		set(t, nil)
		alarm(t, w.verifier(), "name the commit to go on from: kmo state anchor")
	})
	t.Run("T39 changed under a running agent", func(t *testing.T) {
		set(t, now)
		v := w.verifier()
		if seq, err := v.Seq(); seq != 4 || err != nil { // it has parsed the state once
			t.Fatal(seq, err)
		}
		set(t, []byte(strings.Replace(string(now), "north-sea", "south-sea", 1)))
		alarm(t, v, "south-sea")
	})
	t.Run("T39 another site's", func(t *testing.T) {
		set(t, []byte(strings.Replace(string(now), "north-sea", "south-sea", 1)))
		alarm(t, w.verifier(), "south-sea")
	})
	t.Run("T39 deleted", func(t *testing.T) {
		if err := os.Remove(w.v.State.Path); err != nil {
			t.Fatal(err)
		}
		alarm(t, w.v, "no such file; want seq 4 or more")
		v := w.verifier()
		v.MustExist = true
		alarm(t, v, "no such file; want seq 1 or more")
	})
	set(t, now)
	w.accept(b, b)
	if err := w.v.Passed(ctx, strings.Repeat("0", 40)); err == nil || refusal.Of(err) != nil {
		t.Errorf("passing a commit that was never accepted: %v", err)
	}
	if err := w.v.Accept(ctx, a, Facts{Commit: a.ID, Base: a.ID, Key: "x"}); err == nil {
		t.Error("facts over another base are accepted")
	}
	t.Run("the state that is written is the state that is read", func(t *testing.T) {
		s, err := w.v.State.Load()
		if err != nil {
			t.Fatal(err)
		}
		if err := w.v.State.save(s); err != nil {
			t.Fatal(err)
		}
		again, err := w.v.State.Load()
		if diff := cmp.Diff(s, again); diff != "" || err != nil {
			t.Error(diff, err)
		}
		if len(s.Log) != 2 || !s.Log[1].Passed || s.Log[1].Commit != b.ID || len(s.Accepted.Units) != 1 || s.Accepted.Units[0].Tier != 3 {
			t.Errorf("%+v", s)
		}
	})
}

func TestTrustedTime(t *testing.T) {
	w, running, head := tiered(t, "2", nil)
	w.approve(running, head, "bus", nil, "bob") // good for a day
	w.now = w.now.Add(48 * time.Hour)
	approved := w.commit("alice", "", "approved")
	w.accept(running, w.at(running.ID))
	if err := w.v.Burn(context.Background(), running.ID); err != nil { // any write keeps the time
		t.Fatal(err)
	}
	late := w.now
	t.Run("T38 clock set back a year", func(t *testing.T) {
		w.now = w.now.AddDate(-1, 0, 0)
		w.v = w.verifier() // a new process knows the time from the state only
		facts, err := w.v.Verify(context.Background(), running, approved, w)
		if err != nil {
			t.Fatal(err)
		}
		if behind, err := w.v.Behind(); !behind.Equal(late) || err != nil {
			t.Errorf("behind %v, %v; want %v", behind, err, late)
		}
		if !facts.Time.Equal(late) || len(facts.Warnings) != 1 || !strings.HasPrefix(facts.Warnings[0], "E_TIME: the clock is 8760h0m0s behind") {
			t.Errorf("time %v, warnings %q", facts.Time, facts.Warnings)
		}
		if diff := cmp.Diff([]string{"E_APPROVAL_EXPIRED"}, codes(factsOf(t, facts, "bus"))); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("T38 clock ahead", func(t *testing.T) {
		w.now = late.AddDate(1, 0, 0)
		facts, err := w.v.Verify(context.Background(), running, approved, w)
		if err != nil || !facts.Time.Equal(w.now) || len(facts.Warnings) != 0 {
			t.Errorf("%+v %v", facts, err)
		}
		w.now = late
		facts, err = w.v.Verify(context.Background(), running, approved, w)
		if err != nil || !facts.Time.Equal(late.AddDate(1, 0, 0)) || len(facts.Warnings) != 1 {
			t.Errorf("T38 time went back: %+v %v", facts, err)
		}
	})
	t.Run("a few minutes are no alarm", func(t *testing.T) {
		w.v = w.verifier()
		w.now = late.Add(-4 * time.Minute)
		facts, err := w.v.Verify(context.Background(), running, approved, w)
		if err != nil || !facts.Time.Equal(late) || len(facts.Warnings) != 0 {
			t.Errorf("%+v %v", facts, err)
		}
		if behind, err := w.v.Behind(); !behind.IsZero() || err != nil {
			t.Errorf("behind %v, %v", behind, err)
		}
	})
}

func TestT24T25Keys(t *testing.T) {
	w := newWorld(t, func(w *world, r *Root) {
		r.Principals[0].Keys = append(r.Principals[0].Keys, w.key("lost", "commit"), w.key("next", "commit"))
		r.Principals[0].Keys[1].Revoked = &Revoked{Reason: "laptop stolen"}
		r.Principals[0].Keys[2].From = day0.Add(time.Hour)
	})
	a := w.version("alice", "1")
	w.accept(Commit{}, a)
	t.Run("T24 U-22 revoked key with an old commit date", func(t *testing.T) {
		now := w.now
		w.now = now.AddDate(-2, 0, 0)
		head := w.version("lost", "2")
		w.now = now
		if text := w.refused(a, head, "E_KEY_REVOKED"); !strings.Contains(text, "laptop stolen") {
			t.Error(text)
		}
		w.git("reset", "-q", "--hard", a.ID)
	})
	t.Run("T25 U-22 key before it begins", func(t *testing.T) {
		head := w.version("next", "3")
		w.refused(a, head, "E_KEY_NOT_YET")
		w.now = w.now.Add(time.Hour)
		w.accept(a, head)
	})
}

func TestT40OtherContentUnderOneID(t *testing.T) {
	w := newWorld(t, nil)
	a := w.version("alice", "1")
	w.accept(Commit{}, a)
	other := a
	tree := gitTree{fstest.MapFS{}, map[string]string{}}
	for name, file := range a.Tree.(gitTree).MapFS {
		tree.MapFS[name] = file
	}
	for name, id := range a.Tree.(gitTree).ids {
		tree.ids[name] = id
	}
	tree.MapFS["units/relay/unit.yaml"] = &fstest.MapFile{Data: []byte("tier: 3\nv: evil\n")}
	tree.ids["units/relay"], tree.ids["units"] = strings.Repeat("e", 40), strings.Repeat("f", 40)
	other.Tree = tree
	w.refused(a, other, "E_TREE_DIGEST")
	w.refused(other, a, "E_TREE_DIGEST")
}

func TestTrustAndPolicyChanges(t *testing.T) {
	w := newWorld(t, nil)
	w.files["policy/site.rego"] = "package site\n"
	a := w.version("alice", "1")
	facts := w.accept(Commit{}, a)
	if facts.Policy || facts.Trust || !facts.Other {
		t.Errorf("the first commit changes no policy: %+v", facts)
	}
	w.files["policy/site.rego"] = "package site\n# weaker\n"
	alone := w.commit("alice", "", "policy alone")
	facts, err := w.v.Verify(context.Background(), a, alone, w)
	if got := factsOf(t, facts, "@policy"); err != nil || !facts.Policy || facts.Other || got.Tier != 0 || got.Need != 3 || got.Action != "policy" || got.From == got.To {
		t.Errorf("T64 a policy change needs tier 0: %+v %v", facts, err)
	}
	mixed := w.version("alice", "2")
	facts, err = w.v.Verify(context.Background(), a, mixed, w)
	if err != nil || !facts.Policy || !facts.Other || len(facts.Units) != 2 {
		t.Errorf("T64 policy and a unit in one change: %+v %v", facts, err)
	}
	w.approve(a, alone, "@policy", nil, "bob", "carol", "dave")
	if got := w.verify(a, w.commit("alice", "", "approved"), "@policy"); got.Missing() != 0 {
		t.Errorf("approvals of a policy: %+v", got)
	}

	clean := w.files["trust/1.root.json"]
	for _, tt := range []struct{ name, file, text, code string }{
		{"T27 the same version with other bytes", "trust/1.root.json", clean + " ", "E_ROOT_VERSION"},
		{"T27 a root N+2", "trust/3.root.json", clean, "E_ROOT_VERSION"},
		{"T27 a root N+1 that says it is N", "trust/2.root.json", clean, "E_ROOT_VERSION"},
		{"T27 something beside the roots", "trust/notes.txt", clean, "E_ROOT_VERSION"},
		{"T32 a tree without the accepted root", "trust/0.root.json", clean, "E_MIXMATCH"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.code == "E_MIXMATCH" {
				delete(w.files, "trust/1.root.json")
			}
			w.files[tt.file] = tt.text
			w.refused(a, w.commit("alice", "", tt.name), tt.code)
			delete(w.files, tt.file)
			w.files["trust/1.root.json"] = clean
		})
	}
	t.Run("the pin decides on a new host", func(t *testing.T) {
		v := w.verifier()
		v.State.Path, v.Pin.SHA256 = "", strings.Repeat("0", 64)
		if _, err := v.Verify(context.Background(), Commit{}, a, w); refusal.Of(err) == nil || refusal.Of(err).Code != "E_ROOT_VERSION" {
			t.Error(err)
		}
	})
}

// signers writes an allowed signers file for git.
func (w *world) signers(names ...string) string {
	w.t.Helper()
	var lines strings.Builder
	for _, name := range names {
		fmt.Fprintf(&lines, "%s@kos.dev %s\n", name, publicLine(w.keys[name].PublicKey()))
	}
	file := filepath.Join(w.dir, "allowed.signers")
	if err := os.WriteFile(file, []byte(lines.String()), 0o600); err != nil {
		w.t.Fatal(err)
	}
	return file
}
