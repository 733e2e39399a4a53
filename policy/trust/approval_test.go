package trust

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"net"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/policy/trust/signature"
	"github.com/kindos/kmo/registry/merkle"
)

// tiered is a world with a running unit "bus" of a tier, and a head that changes it.
func tiered(t *testing.T, tier string, change func(w *world, r *Root)) (w *world, running, head Commit) {
	t.Helper()
	w = newWorld(t, func(w *world, r *Root) {
		r.Tiers[0].Need, r.Tiers[0].Orgs = 3, 2
		if change != nil {
			change(w, r)
		}
	})
	w.files["units/bus/unit.yaml"] = "tier: " + tier + "\nv: 1\n"
	running = w.commit("alice", "", "begin")
	w.accept(Commit{}, running)
	w.files["units/bus/unit.yaml"] = "tier: " + tier + "\nv: 2\n"
	return w, running, w.commit("alice", "", "change")
}

func TestQuorum(t *testing.T) {
	tests := []struct {
		name, tier string
		change     func(w *world, r *Root)
		alter      func(*Predicate)
		names      []string
		counted    []string
		missing    int
		uncounted  []string
		why        string // part of the first Why
	}{
		{name: "enough for tier 0", tier: "0", names: []string{"bob", "carol", "dave"}, counted: []string{"bob", "carol", "dave"}},
		{name: "nobody", tier: "1", missing: 2},
		{name: "tier 2 counts its author", tier: "2", names: []string{"alice"}, counted: []string{"alice"}},
		{name: "tier 3 needs nobody", tier: "3"},
		{name: "T13 author approves own tier-0 change", tier: "0", names: []string{"alice", "bob", "dave"}, counted: []string{"bob", "dave"}, missing: 1,
			uncounted: []string{"E_QUORUM"}, why: "alice wrote or committed part of this change"},
		{name: "T14 a robot in tier 1", tier: "1", names: []string{"robot", "carol"}, counted: []string{"carol"}, missing: 1, uncounted: []string{"E_QUORUM"}, why: "robot is a robot"},
		{name: "T75 one organisation where two are asked for", tier: "0", change: func(w *world, r *Root) {
			r.Principals = append(r.Principals, Principal{Name: "frank", Class: "human", Org: "kos", Keys: []Key{w.key("frank", "approve")}})
			for i := range r.Roles {
				if r.Roles[i].Name == RoleApprove {
					r.Roles[i].Members = append(r.Roles[i].Members, "frank")
				}
			}
		}, names: []string{"bob", "carol", "frank"}, counted: []string{"", ""}, missing: 1, uncounted: []string{"E_QUORUM"}, why: "tier 0 asks for 2 organisations, and there are approvals of kos only"},
		{name: "T10 U-20 one person, two keys", tier: "1", change: func(w *world, r *Root) {
			for i := range r.Principals {
				if r.Principals[i].Name == "carol" {
					r.Principals[i].Keys = append(r.Principals[i].Keys, w.key("carol2", "approve"))
				}
			}
		}, names: []string{"carol", "carol2"}, counted: []string{"carol"}, missing: 1, uncounted: []string{"E_QUORUM"}, why: "carol counts once already"},
		{name: "T15 another site", tier: "1", alter: func(p *Predicate) { p.Site = "south-sea" }, names: []string{"bob"}, missing: 2, uncounted: []string{"E_APPROVAL_CONTEXT"}, why: `it is for site "south-sea"; want "north-sea"`},
		{name: "T15 another branch", tier: "1", alter: func(p *Predicate) { p.Branch = "next" }, names: []string{"bob"}, missing: 2, uncounted: []string{"E_APPROVAL_CONTEXT"}, why: "branch"},
		{name: "T15 another action", tier: "1", alter: func(p *Predicate) { p.Action = "downgrade" }, names: []string{"bob"}, missing: 2, uncounted: []string{"E_APPROVAL_CONTEXT"}, why: "action"},
		{name: "another tier", tier: "1", alter: func(p *Predicate) { p.Tier = 3 }, names: []string{"bob"}, missing: 2, uncounted: []string{"E_APPROVAL_CONTEXT"}, why: "tier"},
		{name: "another content before", tier: "1", alter: func(p *Predicate) { p.From = merkle.BlobRoot([]byte("x")) }, names: []string{"bob"}, missing: 2, uncounted: []string{"E_APPROVAL_CONTEXT"}, why: "from"},
		{name: "another profile", tier: "1", alter: func(p *Predicate) {
			p.Profiles = append(p.Profiles, ProfileChange{Name: "x", To: merkle.BlobRoot([]byte("x"))})
		}, names: []string{"bob"}, missing: 2, uncounted: []string{"E_APPROVAL_CONTEXT"}, why: "profiles"},
		{name: "T18 past its expiry", tier: "1", alter: func(p *Predicate) { p.Expires = day0 }, names: []string{"bob"}, missing: 2, uncounted: []string{"E_APPROVAL_EXPIRED"}, why: "it expired 2026-11-01T12:00:00Z; it is 2026-11-01T12:00:00Z"},
		{name: "T18 a base that is no ancestor", tier: "1", alter: func(p *Predicate) { p.Base = strings.Repeat("ab", 20) }, names: []string{"bob"}, missing: 2, uncounted: []string{"E_APPROVAL_CONTEXT"}, why: "no ancestor"},
		{name: "a base that is no commit id", tier: "1", alter: func(p *Predicate) { p.Base = "--help" }, names: []string{"bob"}, missing: 2, uncounted: []string{"E_APPROVAL_CONTEXT"}, why: "want a commit id"},
		{name: "a key that may not approve", tier: "1", names: []string{"host"}, missing: 2, uncounted: []string{"E_SIG_UNKNOWN_KEY"}, why: "has not the role and use approve"},
		{name: "T25 an approver's key that has not begun", tier: "1", change: func(w *world, r *Root) { r.Principals[2].Keys[0].From = day0.Add(time.Second) }, names: []string{"carol"}, missing: 2, uncounted: []string{"E_KEY_NOT_YET"}, why: "good from 2026-11-01T12:00:01Z"},
		{name: "T24 an approver's revoked key", tier: "1", change: func(w *world, r *Root) { r.Principals[2].Keys[0].Revoked = &Revoked{Reason: "lost"} }, names: []string{"carol"}, missing: 2, uncounted: []string{"E_KEY_REVOKED"}, why: "revoked: lost"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w, running, head := tiered(t, tt.tier, tt.change)
			w.approve(running, head, "bus", tt.alter, tt.names...)
			got := w.verify(running, w.commit("alice", "", "approvals"), "bus")
			if len(got.Counted) != len(tt.counted) || got.Missing() != tt.missing {
				t.Errorf("counted %+v, missing %d; want %v and %d", got.Counted, got.Missing(), tt.counted, tt.missing)
			}
			for _, name := range tt.counted {
				if name != "" && !slices.ContainsFunc(got.Counted, func(a Approval) bool { return a.Principal == name }) {
					t.Errorf("%s does not count: %+v", name, got)
				}
			}
			if diff := cmp.Diff(tt.uncounted, codes(got)); diff != "" {
				t.Errorf("codes: %s\n%+v", diff, got.Uncounted)
			} else if len(got.Uncounted) > 0 && !strings.Contains(got.Uncounted[0].Why, tt.why) {
				t.Errorf("why %q, want %q", got.Uncounted[0].Why, tt.why)
			}
		})
	}
}

func TestT13HiddenAuthor(t *testing.T) {
	w, running, _ := tiered(t, "1", nil)
	// bob's change stands below a head that alice signs; it is unsigned, and bob approves it.
	w.files["units/bus/unit.yaml"] = "tier: 1\nv: 3\n"
	hidden := w.commit("", "bob", "bob's change")
	w.approve(running, hidden, "bus", nil, "bob", "carol")
	got := w.verify(running, w.commit("alice", "", "approvals"), "bus")
	if got.Missing() != 1 || len(got.Uncounted) != 1 || got.Uncounted[0].Principal != "bob" {
		t.Errorf("the author of a commit between counts: %+v", got)
	}
}

// TestT13StrangersName: who wrote a change under a name that is nobody's is not known, and who signs the head never counts.
func TestT13StrangersName(t *testing.T) {
	w, running, _ := tiered(t, "1", nil)
	w.git("reset", "-q", "--hard", running.ID)
	w.files["units/bus/unit.yaml"] = "tier: 1\nv: 3\n"
	nameless := w.commit("", "mallory", "somebody's change")
	w.approve(running, nameless, "bus", nil, "alice", "bob", "carol")
	got := w.verify(running, w.commit("bob", "", "approvals"), "bus")
	if got.Missing() != 0 || len(got.Counted) != 2 || len(got.Uncounted) != 1 || got.Uncounted[0].Principal != "bob" {
		t.Errorf("counted %+v, uncounted %+v; want all but the signer", got.Counted, got.Uncounted)
	}
}

// TestT13WhoWrote: who carries an approval in, or merges a side as it is, has written nothing; who wrote is known on a new host too.
func TestT13WhoWrote(t *testing.T) {
	t.Run("a head that only carries approvals", func(t *testing.T) {
		w, running, head := tiered(t, "1", nil)
		w.approve(running, head, "bus", nil, "bob", "carol")
		if got := w.verify(running, w.commit("bob", "", "approvals"), "bus"); got.Missing() != 0 {
			t.Errorf("%+v; want both, who wrote nothing of the unit", got)
		}
	})
	t.Run("a merge that takes a side as it is", func(t *testing.T) {
		w, running, _ := tiered(t, "1", nil)
		w.git("reset", "-q", "--hard", running.ID)
		w.git("checkout", "-q", "-b", "side")
		w.files["units/bus/unit.yaml"] = "tier: 1\nv: 4\n"
		w.approve(running, w.commit("alice", "", "change"), "bus", nil, "bob", "carol")
		w.commit("alice", "", "approvals")
		w.git("checkout", "-q", "main")
		w.git("-c", "user.signingkey="+w.keyFile("bob"), "-c", "user.email=bob@example.org", "merge", "-q", "-S", "--no-ff", "-m", "merge", "side")
		if got := w.verify(running, w.at(w.git("rev-parse", "HEAD")), "bus"); got.Missing() != 0 {
			t.Errorf("%+v; want bob to count, who only merged", got)
		}
	})
	t.Run("under a key that says nothing of who wrote", func(t *testing.T) {
		w, running, _ := tiered(t, "1", nil)
		w.git("reset", "-q", "--hard", running.ID)
		w.files["units/bus/unit.yaml"] = "tier: 1\nv: 5\n"
		w.approve(running, w.commit("host", "stranger", "content"), "bus", nil, "alice", "carol")
		got := w.verify(running, w.commit("alice", "", "approvals"), "bus")
		if got.Missing() != 1 || len(got.Uncounted) != 1 || got.Uncounted[0].Principal != "alice" {
			t.Errorf("%+v; want alice not to count, who let in what a host's key signed", got)
		}
	})
	t.Run("who takes back a policy that was accepted and has not passed", func(t *testing.T) {
		w := newWorld(t, nil)
		w.files["units/bus/unit.yaml"] = "tier: 1\nv: 1\n"
		running := w.commit("bob", "", "begin")
		w.accept(Commit{}, running)
		w.files["policy/site.rego"] = "package site\n"
		accepted := w.commit("bob", "", "a policy")
		facts, err := w.v.Verify(context.Background(), running, accepted, w)
		if err == nil {
			err = w.v.Accept(context.Background(), accepted, facts)
		}
		if err != nil {
			t.Fatal(err)
		}
		delete(w.files, "policy/site.rego")
		facts, err = w.v.Verify(context.Background(), running, w.commit("alice", "", "and away"), w)
		if err != nil || !facts.Policy || !slices.Contains(facts.Authors, "alice") {
			t.Errorf("authors %v, policy %v, %v; want alice among those who wrote it", facts.Authors, facts.Policy, err)
		}
	})
	t.Run("on a new host", func(t *testing.T) {
		w := newWorld(t, nil)
		w.files["units/bus/unit.yaml"] = "tier: 1\nv: 1\n"
		begin := w.commit("alice", "", "begin")
		w.approve(Commit{}, begin, "bus", nil, "alice", "carol")
		w.commit("alice", "", "approvals")
		got := w.verify(Commit{}, w.commit("bob", "", "nothing"), "bus")
		if got.Missing() != 1 || len(got.Uncounted) != 1 || got.Uncounted[0].Principal != "alice" {
			t.Errorf("%+v; want alice not to count, who wrote it", got)
		}
	})
	t.Run("a folder among the approvals", func(t *testing.T) {
		w, running, head := tiered(t, "1", nil)
		w.approve(running, head, "bus", nil, "bob", "carol")
		for file := range w.files {
			if strings.HasPrefix(file, "approvals/") {
				w.files[path.Join(path.Dir(file), "folder", "x")] = "x"
			}
		}
		if got := w.verify(running, w.commit("alice", "", "approvals"), "bus"); got.Missing() != 0 || !slices.Contains(codes(got), "E_PATH") {
			t.Errorf("%+v; want the folder not to count and the others to", got)
		}
	})
}

// TestT13OlderBranch merges branches that were cut before what runs: what they left alone they did not write, and who takes what they left for
// what runs has.
func TestT13OlderBranch(t *testing.T) {
	var w *world
	bus := func(v string) { w.files["units/bus/unit.yaml"] = "tier: 1\nv: " + v + "\n" }
	commit := func(who, message string) Commit {
		w.now = w.now.Add(time.Second)
		return w.commit(who, "", message)
	}
	merge := func(who, other string, args ...string) Commit {
		w.git(append([]string{"-c", "user.signingkey=" + w.keyFile(who), "-c", "user.name=" + who, "-c", "user.email=" + who + "@kos.dev", "merge", "-q", "-S", "--no-ff", "-m", "merge", other}, args...)...)
		return w.at(w.git("rev-parse", "HEAD"))
	}
	// older makes main run v2 over v1 and v0, and a branch "side" of bob's that was cut at v0 and has taken v1 from main since; v2 is checked out.
	older := func(t *testing.T) (running Commit) {
		w = newWorld(t, nil)
		bus("0")
		w.accept(Commit{}, commit("alice", "v0"))
		w.git("checkout", "-q", "-b", "side")
		w.files["units/lamp/unit.yaml"] = "tier: 3\n"
		commit("bob", "a lamp")
		delete(w.files, "units/lamp/unit.yaml")
		w.git("checkout", "-q", "main")
		bus("1")
		commit("alice", "v1")
		w.git("checkout", "-q", "side")
		merge("bob", "main")
		w.git("checkout", "-q", "main")
		bus("2")
		running = commit("alice", "v2")
		w.accept(w.at(running.Parents[0]), running)
		return running
	}
	// counted says whose approvals count, of alice, bob and carol, for the change of bus to the head.
	carrier, since := "robot", func(*Predicate) {} // who signs the head that brings the approvals, and what they begin at, if not what runs
	counted := func(t *testing.T, running, head Commit, want ...string) {
		t.Helper()
		w.files = map[string]string{}
		for name, file := range head.Tree.(gitTree).MapFS {
			w.files[name] = string(file.Data)
		}
		w.approve(running, head, "bus", since, "alice", "bob", "carol")
		var got []string
		for _, a := range w.verify(running, commit(carrier, "approvals"), "bus").Counted {
			got = append(got, a.Principal)
		}
		slices.Sort(got)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	}
	t.Run("its unit is left as main has it", func(t *testing.T) {
		running := older(t)
		bus("3")
		commit("alice", "v3")
		counted(t, running, merge("alice", "side"), "bob", "carol")
	})
	t.Run("its unit comes back", func(t *testing.T) {
		running := older(t)
		w.git("checkout", "-q", "side")
		w.git("checkout", "-q", "-b", "back")
		counted(t, running, merge("alice", "main", "-s", "ours"), "bob", "carol")
	})
	t.Run("its unit comes back over a change", func(t *testing.T) {
		running := older(t)
		bus("3")
		commit("bob", "v3")
		w.git("checkout", "-q", "-b", "back", "side")
		counted(t, running, merge("alice", "main", "-s", "ours"), "carol")
	})
	t.Run("its unit is removed, which it never had", func(t *testing.T) {
		w = newWorld(t, nil)
		none := commit("alice", "begin")
		w.accept(Commit{}, none)
		w.git("checkout", "-q", "-b", "side")
		w.files["README"] = "of bob's"
		commit("bob", "readme")
		delete(w.files, "README")
		w.git("checkout", "-q", "main")
		bus("1")
		running := commit("carol", "v1")
		w.git("checkout", "-q", "side")
		w.v.State = StateFile{} // carol signs no commits
		counted(t, running, merge("alice", "main", "-s", "ours"), "bob", "carol")
	})
	t.Run("a merge of what runs already", func(t *testing.T) {
		running := older(t)
		id := w.git("-c", "user.signingkey="+w.keyFile("bob"), "-c", "user.email=bob@kos.dev", "commit-tree", "-S", "-m", "v1 again", "-p", running.ID, "-p", running.Parents[0], running.Parents[0]+"^{tree}")
		w.git("reset", "-q", "--hard", id)
		counted(t, running, w.at(id), "alice", "carol")
	})
	t.Run("it changes the unit", func(t *testing.T) {
		running := older(t)
		w.git("checkout", "-q", "side")
		bus("4")
		commit("bob", "v4")
		w.git("checkout", "-q", "-b", "forth", "main")
		counted(t, running, merge("alice", "side", "-X", "theirs"), "alice", "carol")
	})
	t.Run("the merge changes the unit", func(t *testing.T) {
		running := older(t)
		merge("bob", "side", "-s", "ours", "--no-commit")
		bus("5")
		head := commit("bob", "merge with a change")
		if len(head.Parents) != 2 {
			t.Fatal(head.Parents)
		}
		counted(t, running, head, "alice", "carol")
	})
	t.Run("it comes instead of what runs", func(t *testing.T) {
		running := older(t)
		w.v.State, carrier = StateFile{}, "bob" // a host with a state refuses a fork
		since = func(p *Predicate) { p.Base = w.git("rev-parse", "main~2") }
		w.git("checkout", "-q", "-b", "instead", "main~1")
		counted(t, running, w.at(running.Parents[0]), "alice", "carol")
	})
}

// TestT16ChangedAfterReview also shows that an approval is of a content: another commit with the same content keeps it.
func TestT16ChangedAfterReview(t *testing.T) {
	w, running, head := tiered(t, "1", nil)
	w.approve(running, head, "bus", nil, "bob", "carol")
	w.files["README"] = "moved on"
	if got := w.verify(running, w.commit("alice", "", "unrelated"), "bus"); got.Missing() != 0 {
		t.Errorf("an unrelated file takes approvals away: %+v", got)
	}
	w.files["units/bus/relay.toml"] = "late = true"
	changed := w.commit("alice", "", "one more file")
	if got := w.verify(running, changed, "bus"); got.Missing() != 2 || len(got.Counted) != 0 {
		t.Errorf("T16 approvals for X count for X': %+v", got)
	}
	t.Run("copied beside the new content", func(t *testing.T) {
		units, _, err := w.v.Compare(context.Background(), running, changed, w)
		if err != nil {
			t.Fatal(err)
		}
		for file, text := range w.files {
			if strings.HasPrefix(file, "approvals/") {
				w.files[path.Join(approvalFolder("bus", units[0].To), path.Base(file))] = text
			}
		}
		got := w.verify(running, w.commit("alice", "", "copied"), "bus")
		if diff := cmp.Diff([]string{"E_APPROVAL_CONTEXT", "E_APPROVAL_CONTEXT"}, codes(got)); diff != "" || got.Missing() != 2 {
			t.Error(diff, got)
		}
	})
}

func TestU27MergeBringsContent(t *testing.T) {
	w, running, _ := tiered(t, "1", nil)
	w.git("checkout", "-q", "-b", "second-parent", running.ID)
	w.files["units/bus/unit.yaml"] = "tier: 1\nv: hidden\n"
	w.commit("", "x", "not approved")
	w.git("checkout", "-q", "main")
	w.git("-c", "user.signingkey="+w.keyFile("alice"), "merge", "-q", "-S", "-X", "theirs", "--no-ff", "-m", "merge", "second-parent")
	merge := w.at(w.git("rev-parse", "HEAD"))
	if got := w.verify(running, merge, "bus"); len(merge.Parents) != 2 || got.Missing() != 2 {
		t.Errorf("content from the second parent passes: %+v", got)
	}
}

func TestT17Consumed(t *testing.T) {
	w, a, head := tiered(t, "1", nil)
	w.approve(a, head, "bus", nil, "bob", "carol")
	b := w.commit("alice", "", "approved")
	w.accept(a, b)
	approvals := w.files
	t.Run("T17 approval offered again after a revert", func(t *testing.T) {
		w.files = map[string]string{}
		for file, text := range approvals {
			w.files[file] = text
		}
		w.files["units/bus/unit.yaml"] = "tier: 1\nv: 1\n"
		back := w.commit("alice", "", "back\n\nKmo-Reverts: "+a.ID+".."+b.ID)
		w.files["units/bus/unit.yaml"] = "tier: 1\nv: 2\n"
		again := w.commit("alice", "", "again")
		got := w.verify(back, again, "bus")
		if diff := cmp.Diff([]string{"E_APPROVAL_CONSUMED", "E_APPROVAL_CONSUMED"}, codes(got)); diff != "" || got.Missing() != 2 {
			t.Error(diff, got)
		}
		w.approve(a, head, "bus", func(p *Predicate) { p.Base = b.ID }, "bob", "dave") // a base from which the coming cannot be seen, only the going
		offered := w.commit("alice", "", "offered with a later base")
		if got := w.verify(back, offered, "bus"); got.Missing() != 2 || !slices.Contains(codes(got), "E_APPROVAL_CONSUMED") || slices.Contains(codes(got), "E_APPROVAL_CONTEXT") {
			t.Errorf("a later base: %+v", got)
		}
		w.approve(back, again, "bus", nil, "bob", "dave")
		if got := w.verify(back, w.commit("alice", "", "approved again"), "bus"); got.Missing() != 0 {
			t.Errorf("new approvals after a revert do not count: %+v", got)
		}
	})
	t.Run("a base that has the approved content already", func(t *testing.T) {
		w.git("reset", "-q", "--hard", b.ID)
		w.files["units/bus/unit.yaml"] = "tier: 1\nv: 5\n"
		c := w.commit("alice", "", "c")
		w.approve(b, c, "bus", func(p *Predicate) { p.Base = c.ID }, "bob", "carol")
		got := w.verify(b, w.commit("alice", "", "approved"), "bus")
		if diff := cmp.Diff([]string{"E_APPROVAL_CONTEXT", "E_APPROVAL_CONTEXT"}, codes(got)); diff != "" {
			t.Error(diff, got)
		}
	})
}

// TestNoBase merges two sides on each of which a content has come and gone: an approval from any commit would be consumed.
func TestNoBase(t *testing.T) {
	w, running, _ := tiered(t, "1", nil)
	version := func(v string) Commit {
		w.files["units/bus/unit.yaml"] = "tier: 1\nv: " + v + "\n"
		w.now = w.now.Add(time.Second) // or the two sides would be one
		return w.commit("alice", "", v)
	}
	base := func(head Commit) (string, error) {
		units, _, err := w.v.Compare(context.Background(), running, head, w)
		if err != nil {
			t.Fatal(err)
		}
		u := factsOf(t, Facts{Units: units}, "bus")
		return Base(context.Background(), running, head, &u, w)
	}
	w.git("checkout", "-q", "-b", "side", running.ID)
	version("2")
	side := version("1")
	w.git("checkout", "-q", "-B", "main", running.ID)
	version("2")
	gone := version("1")
	version("2")
	w.git("-c", "user.signingkey="+w.keyFile("alice"), "merge", "-q", "-S", "-s", "ours", "-m", "merge", "side")
	head := w.at(w.git("rev-parse", "HEAD"))
	id, err := base(head)
	if r := refusal.Of(err); id != "" || r == nil || r.Code != "E_APPROVAL_CONSUMED" || !strings.Contains(r.Got, gone.ID) && !strings.Contains(r.Got, side.ID) {
		t.Errorf("got %s, %v; want E_APPROVAL_CONSUMED with the commit that is a way back", id, err)
	}
	for _, from := range []string{running.ID, gone.ID, side.ID} {
		w.approve(running, head, "bus", func(p *Predicate) { p.Base = from }, "bob", "carol")
		if got := w.verify(running, w.commit("alice", "", "approved from "+from), "bus"); got.Missing() != 2 {
			t.Errorf("from %s it does count: %+v", from, got)
		}
	}
	between := version("1") // what the refusal says would pass
	head = version("2")
	if id, err = base(head); id != between.ID || err != nil {
		t.Errorf("got %s, %v; want %s", id, err, between.ID)
	}
	w.approve(running, head, "bus", func(p *Predicate) { p.Base = id }, "bob", "carol")
	if got := w.verify(running, w.commit("alice", "", "approved"), "bus"); got.Missing() != 0 {
		t.Errorf("%+v", got)
	}
}

// TestEnvelopes alters one approval's file, and says what it then is.
func TestEnvelopes(t *testing.T) {
	w, running, head := tiered(t, "1", nil)
	w.approve(running, head, "bus", nil, "bob", "carol")
	clean := w.files
	var file string
	for name, text := range clean {
		if strings.HasPrefix(name, "approvals/") && strings.Contains(text, signature.KeyID(w.keys["bob"].PublicKey())) {
			file = name
		}
	}
	var e signature.Envelope
	if err := json.Unmarshal([]byte(clean[file]), &e); err != nil {
		t.Fatal(err)
	}
	payload, err := base64.StdEncoding.DecodeString(e.Payload)
	if err != nil {
		t.Fatal(err)
	}
	reseal := func(purpose signature.Purpose, names ...string) string {
		var signers []ssh.Signer
		for _, name := range names {
			signers = append(signers, w.keys[name])
		}
		out, err := signature.Seal(payload, purpose, signers...)
		if err != nil {
			t.Fatal(err)
		}
		return string(out)
	}
	edit := func(change func(e *signature.Envelope)) string {
		copied := e
		copied.Signatures = slices.Clone(e.Signatures)
		change(&copied)
		out, err := json.Marshal(copied)
		if err != nil {
			t.Fatal(err)
		}
		return string(out)
	}
	tests := []struct {
		name, file string
		missing    int
		codes      []string
	}{
		{"unaltered", clean[file], 0, nil},
		{"T12 same signature twice in one envelope", edit(func(e *signature.Envelope) { e.Signatures = append(e.Signatures, e.Signatures[0]) }), 0, []string{"E_QUORUM"}},
		{"two people in one envelope", reseal(approvalPurpose, "bob", "dave"), 0, nil},
		{"T19 foreign payload type", reseal(signature.Purpose{Type: "application/vnd.in-toto+json", Namespace: approvalPurpose.Namespace}, "bob"), 1, []string{"E_PAYLOAD_TYPE"}},
		{"T19 payload type of a root", reseal(signature.Purpose{Type: rootPurpose.Type, Namespace: approvalPurpose.Namespace}, "bob"), 1, []string{"E_PAYLOAD_TYPE"}},
		{"T04 U-23 namespace git on an approval", reseal(signature.Purpose{Type: approvalPurpose.Type, Namespace: namespaceCommit}, "bob"), 1, []string{"E_SIG_NAMESPACE"}},
		{"T20 key id of another key", edit(func(e *signature.Envelope) { e.Signatures[0].KeyID = signature.KeyID(w.keys["dave"].PublicKey()) }), 1, []string{"E_SIG_BAD"}},
		{"no key id is no fault", edit(func(e *signature.Envelope) { e.Signatures[0].KeyID = "" }), 0, nil},
		{"U-21 signature over another payload", edit(func(e *signature.Envelope) {
			e.Payload = base64.StdEncoding.EncodeToString([]byte(strings.Replace(string(payload), "north-sea", "north-see", 1)))
		}), 1, []string{"E_SIG_BAD"}},
		{"no signature", edit(func(e *signature.Envelope) { e.Signatures = nil }), 1, []string{"E_DECODE"}},
		{"33 signatures", edit(func(e *signature.Envelope) { e.Signatures = slices.Repeat(e.Signatures, 33) }), 1, []string{"E_LIMIT"}},
		{"a good signature and a bad one", edit(func(e *signature.Envelope) {
			e.Signatures = append([]signature.EnvelopeSignature{{Sig: "AAAA"}}, e.Signatures...)
		}), 0, []string{"E_SIG_BAD"}},
		{"not JSON", "hello", 1, []string{"E_DECODE"}},
		{"larger than 1 MiB", clean[file] + strings.Repeat(" ", signature.MaxEnvelope), 1, []string{"E_LIMIT"}},
		{"duplicate key", strings.Replace(clean[file], `"payloadType"`, `"payload": "x", "payloadType"`, 1), 1, []string{"E_DECODE"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w.files[file] = tt.file
			got := w.verify(running, w.commit("alice", "", tt.name), "bus")
			if diff := cmp.Diff(tt.codes, codes(got)); diff != "" || got.Missing() != tt.missing {
				t.Errorf("missing %d, want %d; %s%+v", got.Missing(), tt.missing, diff, got)
			}
		})
	}
	t.Run("65 approvals", func(t *testing.T) {
		for i := range 65 {
			w.files[path.Join(path.Dir(file), string(rune('a'+i/26))+string(rune('a'+i%26)))] = "x"
		}
		w.refused(running, w.commit("alice", "", "many"), "E_LIMIT")
	})
}

func TestPredicateIsStrict(t *testing.T) {
	w := newWorld(t, nil)
	for name, payload := range map[string]string{
		"unknown field":   `{"site":"x","also":1}`,
		"other case":      `{"Site":"x"}`,
		"duplicate":       `{"site":"x","site":"y"}`,
		"null":            `{"site":null}`,
		"fraction":        `{"tier":1.0}`,
		"exponent":        `{"tier":1e0}`,
		"trailing":        `{"site":"x"}{}`,
		"lone surrogate":  `{"site":"\ud800"}`,
		"not UTF-8":       "{\"site\":\"\xff\"}",
		"deep":            `{"profiles":` + strings.Repeat("[", 40) + strings.Repeat("]", 40) + `}`,
		"two digests":     `{"from":"kmo1:sha3-256:00"}`,
		"array at top":    `[]`,
		"string for tier": `{"tier":"1"}`,
	} {
		t.Run(name, func(t *testing.T) {
			var p Predicate
			if r := refusal.Of(signature.Decode([]byte(payload), &p, signature.MaxEnvelope, "test")); r == nil || r.Code != "E_DECODE" {
				t.Errorf("%s: %v, want E_DECODE", payload, r)
			}
		})
	}
	file, data, err := SignApproval(NewApproval("north-sea", "main", strings.Repeat("a", 40), UnitFacts{Unit: "bus"}, day0, Intent{}), w.keys["bob"])
	if err != nil || !strings.HasPrefix(file, "approvals/bus/"+strings.Repeat("0", 64)+"/SHA256-") || strings.ContainsAny(path.Base(file), ":+/") {
		t.Error(file, err)
	}
	s, err := signature.Open(data, approvalPurpose, file)
	if err != nil {
		t.Fatal(err)
	}
	var p Predicate
	if err := signature.Decode(s.Payload, &p, signature.MaxEnvelope, file); err != nil {
		t.Errorf("what is signed is not what is read: %v", err)
	}
}

// TestAgentSigns signs an approval and a commit with a key that only an agent on a socket has.
func TestAgentSigns(t *testing.T) {
	w, running, head := tiered(t, "2", nil)
	raw := w.keyring(t, "bob")
	socket := filepath.Join(t.TempDir(), "agent")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := listener.Accept()
		if err == nil {
			agent.ServeAgent(raw, conn)
			conn.Close()
		}
	}()
	a, err := signature.DialAgent(socket)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := a.Signer(signature.KeyID(w.keys["bob"].PublicKey()))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Signer("SHA256:other"); err == nil || !strings.Contains(err.Error(), "holds 0 keys") {
		t.Error("an agent without the key:", err)
	}
	w.keys["bob"] = signer
	w.approve(running, head, "bus", nil, "bob")
	if got := w.verify(running, w.commit("alice", "", "approved"), "bus"); len(got.Counted) != 1 || got.Counted[0].Principal != "bob" {
		t.Errorf("an agent's approval: %+v", got)
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	listener.Close()
	<-done
}

func TestCompareSeesTiers(t *testing.T) {
	w := newWorld(t, nil)
	w.files["units/kernel-net/unit.yaml"] = "tier: 3\n"
	w.files["units/silent/unit.yaml"] = "x: y\n"
	w.files["units/app/unit.yaml"] = "tier: 3\nprofile: core-a\nneeds: [relay]\n"
	w.files["units/plain/unit.yaml"] = "tier: 3\nprofile: edge\n"
	w.files["profiles/core-a.yaml"] = "v: 1\n"
	w.files["profiles/edge.yaml"] = "tier: 2\n"
	first := w.commit("alice", "", "begin")
	tiers := func(running, head Commit) map[string]int {
		t.Helper()
		facts, err := w.v.Verify(context.Background(), running, head, w)
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]int{}
		for _, u := range facts.Units {
			got[u.Unit] = u.Tier
		}
		return got
	}
	want := map[string]int{"@site": 1, "kernel-net": 0, "silent": 1, "app": 0, "plain": 2, "relay": 3}
	if diff := cmp.Diff(want, tiers(Commit{}, first)); diff != "" {
		t.Error("T68 tier-3 unit with a tier-0 profile, path patterns, defaults:", diff)
	}
	w.accept(Commit{}, first)

	for unit, tier := range map[string]int{"kernel-net": 0, "silent": 1, "relay": 3, "nothing": -1} {
		if got, err := w.v.Tier(first.Tree, unit); err != nil || got != tier {
			t.Errorf("the tier of %s, which nobody changes: %d, %v; want %d", unit, got, err, tier)
		}
	}
	w.files["units/kernel-net/unit.yaml"] += "v: 2\n"
	w.files["units/relay/unit.yaml"] = "tier: 3\nneeds: [middle]\n"
	w.files["units/middle/unit.yaml"] = "tier: 3\nneeds: [kernel-net]\n"
	needs := w.commit("alice", "", "needs")
	if diff := cmp.Diff(map[string]int{"kernel-net": 0, "relay": 0, "middle": 0}, tiers(first, needs)); diff != "" {
		t.Error("T68 tier-3 unit that needs a tier-0 change:", diff)
	}
	w.accept(first, needs)

	w.files["profiles/edge.yaml"] = "tier: 2\nv: 2\n"
	profile := w.commit("alice", "", "profile")
	facts := w.accept(needs, profile)
	got := factsOf(t, facts, "plain")
	if len(facts.Units) != 1 || got.From != got.To || got.Tier != 2 || len(got.ProfileChanges) != 1 || got.ProfileChanges[0].From == got.ProfileChanges[0].To || got.Profiles[0] != "edge" {
		t.Errorf("a changed profile is a change of its units alone: %+v", facts.Units)
	}

	delete(w.files, "units/kernel-net/unit.yaml")
	w.files["units/harmless/unit.yaml"] = "tier: 3\nv: 2\n"
	w.files["units/middle/unit.yaml"] = "tier: 3\n"
	moved := w.commit("alice", "", "moved")
	facts, err := w.v.Verify(context.Background(), profile, moved, w)
	if err != nil {
		t.Fatal(err)
	}
	if gone := factsOf(t, facts, "kernel-net"); gone.Tier != 0 || !gone.To.IsZero() || gone.TierBefore != 0 {
		t.Errorf("a removed unit is judged by its base tier: %+v", gone)
	}
	if new := factsOf(t, facts, "harmless"); new.Tier != 0 || new.Need != 3 {
		t.Errorf("T68 folder moved to dodge its tier: %+v", new)
	}

	w.files["units/silent/unit.yaml"] = "tier: 3\n"
	w.files["units/kernel-net/unit.yaml"] = "tier: 3\nv: 2\n"
	lowered := w.commit("alice", "", "lowered")
	if got := w.verify(profile, lowered, "silent"); got.Tier != 1 || got.TierBefore != 1 {
		t.Errorf("a tier lowered by the change itself: %+v", got)
	}
	w.files["units/relay/unit.yaml"] = "tier: 3\nintent: rollback\n"
	if got := w.verify(profile, w.commit("alice", "", "rollback"), "relay"); got.Action != "downgrade" {
		t.Errorf("intent rollback: %+v", got)
	}
}

// TestBaseDecidesTier lowers a tier that the last accepted commit had raised, while older content still runs.
func TestBaseDecidesTier(t *testing.T) {
	w := newWorld(t, nil)
	a := w.commit("alice", "", "begin")
	w.accept(Commit{}, a)
	w.files["units/relay/unit.yaml"] = "tier: 1\n"
	raised := w.commit("alice", "", "raised")
	w.accept(a, raised)
	w.files["units/relay/unit.yaml"] = "tier: 3\nv: 2\n"
	if got := w.verify(a, w.commit("alice", "", "lowered"), "relay"); got.Tier != 1 || got.TierBefore != 1 || got.Need != 2 {
		t.Errorf("%+v", got)
	}
}

func (w *world) keyring(t *testing.T, name string) agent.Agent {
	t.Helper()
	keyring := agent.NewKeyring()
	if err := keyring.Add(agent.AddedKey{PrivateKey: w.raw[name]}); err != nil {
		t.Fatal(err)
	}
	return keyring
}
