package trust

import (
	"context"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kindos/kmo/policy/trust/signature"
)

func TestVerifyHead(t *testing.T) {
	w := newWorld(t, nil)
	first := w.commit("alice", "", "begin")
	facts := w.accept(Commit{}, first)
	if facts.Signer != "alice" || facts.Class != "human" || facts.Key != signature.KeyID(w.keys["alice"].PublicKey()) || facts.Author != "alice" || facts.Base != "" || !facts.Other || facts.Policy {
		t.Errorf("facts of the first commit: %+v", facts)
	}
	if got := factsOf(t, facts, "relay"); got.Tier != 3 || got.TierBefore != -1 || got.Need != 0 || !got.From.IsZero() || got.To.IsZero() || got.Action != "upgrade" {
		t.Errorf("facts of the new unit: %+v", got)
	}
	again := w.accept(first, first)
	if len(again.Units) != 0 || again.Other || again.Base != first.ID {
		t.Errorf("facts of the same commit again: %+v", again)
	}

	w.files["units/relay/unit.yaml"] = "unit: relay\ntier: 3\nv: 2\n"
	second := w.commit("bob", "", "second")
	facts = w.accept(first, second)
	if got := factsOf(t, facts, "relay"); facts.Base != first.ID || got.TierBefore != 3 || got.From.IsZero() || got.From == got.To {
		t.Errorf("facts of a change: %+v", facts)
	}

	t.Run("T01 unsigned head", func(t *testing.T) {
		text := w.refused(second, w.commit("", "x", "unsigned"), "E_SIG_MISSING")
		if !strings.Contains(text, "no signature; want a commit signed with an SSH key") {
			t.Error(text)
		}
	})
	t.Run("T02 a stranger's key", func(t *testing.T) {
		w.key("mallory")
		w.refused(second, w.commit("mallory", "", "stranger"), "E_SIG_UNKNOWN_KEY")
	})
	t.Run("T09 a maintainer's e-mail and a stranger's key", func(t *testing.T) {
		w.refused(second, w.commit("mallory", "alice", "spoofed"), "E_SIG_UNKNOWN_KEY")
	})
	t.Run("a key of the root without the role commit", func(t *testing.T) {
		w.refused(second, w.commit("carol", "", "only an approver"), "E_SIG_UNKNOWN_KEY")
	})
	t.Run("T29 an older commit", func(t *testing.T) { w.refused(second, first, "E_ROLLBACK") })
	t.Run("T35 the swarm names an older commit", func(t *testing.T) { w.refused(second, first, "E_ROLLBACK") })
	t.Run("T30 a commit beside the accepted one", func(t *testing.T) {
		w.git("checkout", "-q", "-b", "side", first.ID)
		w.refused(second, w.commit("alice", "", "side"), "E_FORK")
	})
	t.Run("T34 history rewritten below the accepted commit", func(t *testing.T) {
		w.git("checkout", "-q", "--orphan", "rewritten")
		w.refused(second, w.commit("alice", "", "begin, rewritten"), "E_FORK")
	})
	if diff := cmp.Diff([]string{second.ID}, []string{w.v.mustAccepted(t)}); diff != "" {
		t.Error("refusals moved the state:", diff)
	}
}

func (v *Verifier) mustAccepted(t *testing.T) string {
	s, err := v.State.Load()
	if err != nil {
		t.Fatal(err)
	}
	return s.Accepted.Commit
}

// TestPolicyApart brings a new policy and a new unit to a host in one head: they are two changes if the history had one of them alone.
func TestPolicyApart(t *testing.T) {
	w := newWorld(t, nil)
	set := func(rules, unit string) {
		w.files["policy/site.rego"] = "package site\n# " + rules + "\n"
		w.files["units/relay/unit.yaml"] = "unit: relay\ntier: 3\nv: " + unit + "\n"
	}
	commit := func(rules, unit string) Commit {
		t.Helper()
		set(rules, unit)
		return w.commit("alice", "", rules+" "+unit)
	}
	base := commit("old", "1")
	w.accept(Commit{}, base)
	for _, tt := range []struct {
		name  string
		steps [][2]string // rules and unit of each commit after the base
		apart bool
	}{
		{"the policy first", [][2]string{{"new", "1"}, {"new", "2"}}, true},
		{"the unit first", [][2]string{{"old", "2"}, {"new", "2"}}, true},
		{"the policy between two changes of the unit", [][2]string{{"old", "2"}, {"new", "2"}, {"new", "3"}}, true},
		{"T64 in one commit", [][2]string{{"new", "2"}}, false},
		{"T64 in one commit under another", [][2]string{{"new", "2"}, {"new", "3"}}, false},
		{"T64 in one commit, by way of a third policy", [][2]string{{"third", "1"}, {"new", "2"}}, false},
		{"in one commit that was then taken apart", [][2]string{{"new", "2"}, {"new", "1"}, {"new", "2"}}, true},
		{"the policy alone", [][2]string{{"new", "1"}}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w.git("reset", "-q", "--hard", base.ID)
			var head Commit
			for _, step := range tt.steps {
				head = commit(step[0], step[1])
			}
			facts, err := w.v.Verify(context.Background(), base, head, w)
			if err != nil || !facts.Policy || facts.Apart != tt.apart {
				t.Errorf("policy %v, apart %v, want %v: %v", facts.Policy, facts.Apart, tt.apart, err)
			}
		})
	}
	t.Run("each with its own quorum", func(t *testing.T) {
		w.git("reset", "-q", "--hard", base.ID)
		w.approve(base, commit("new", "1"), "@policy", nil, "bob", "carol", "dave")
		head := commit("new", "2")
		if policy, unit := w.verify(base, head, "@policy"), w.verify(base, head, "relay"); policy.Missing() != 0 || len(policy.Counted) != 3 || unit.Need != 0 {
			t.Errorf("policy %+v, unit %+v", policy, unit)
		}
	})
	t.Run("merged from two branches", func(t *testing.T) {
		w.git("checkout", "-q", "-b", "side", base.ID)
		commit("old", "2")
		w.git("checkout", "-q", "-b", "rules", base.ID)
		commit("new", "1")
		w.git("-c", "user.signingkey="+w.keyFile("alice"), "merge", "-q", "-S", "-m", "merge", "side")
		facts, err := w.v.Verify(context.Background(), base, w.at(w.git("rev-parse", "HEAD")), w)
		if err != nil || !facts.Policy || !facts.Other || !facts.Apart {
			t.Errorf("%+v: %v", facts, err)
		}
	})
	t.Run("nothing runs, for the first commit failed its gate", func(t *testing.T) {
		w.git("reset", "-q", "--hard", base.ID)
		commit("new", "1")
		facts, err := w.v.Verify(context.Background(), Commit{}, commit("new", "2"), w)
		if err != nil || !facts.Policy || !facts.Other || !facts.Apart {
			t.Errorf("%+v: %v", facts, err)
		}
	})
}

func TestU25PanicDenies(t *testing.T) {
	w := newWorld(t, nil)
	w.files["units/relay/unit.yaml"] = "panic: now\n"
	w.refused(Commit{}, w.commit("alice", "", "begin"), "E_INTERNAL")
	if _, err := w.v.Verify(context.Background(), Commit{}, w.commit("alice", "", "again"), w); err == nil {
		t.Error("a second call after a panic is not refused")
	}
}

// TestKT024Burned: content that a commit brought whose signer is burned, or which is burned here, is named whoever signs and approves it, until
// it is other content.
func TestKT024Burned(t *testing.T) {
	w := newWorld(t, func(w *world, r *Root) {
		member(r, "bob").Keys = append(member(r, "bob").Keys, w.key("stolen", "commit"))
		member(r, "bob").Keys[1].Revoked = &Revoked{Reason: "stolen", Rebad: true}
		member(r, "carol").Keys = append(member(r, "carol").Keys, w.key("lost", "commit"))
		member(r, "carol").Keys[1].Revoked = &Revoked{Reason: "lost"}
	})
	burned := func(running, head Commit) string {
		t.Helper()
		facts, err := w.v.Verify(context.Background(), running, head, w)
		if err != nil {
			t.Fatal(err)
		}
		var all []string
		for _, b := range facts.Burned {
			all = append(all, b.Unit+" "+b.Why)
		}
		return strings.Join(all, "\n")
	}
	w.files["units/relay/unit.yaml"] = "tier: 3\nv: 0\n"
	first := w.commit("alice", "", "begin")
	w.accept(Commit{}, first)

	w.files["units/relay/unit.yaml"] = "tier: 3\nv: 1\n"
	w.commit("stolen", "bob", "by a stolen key")
	w.files["README"] = "more\n"
	head := w.commit("alice", "", "on top of it")
	if got := burned(first, head); !strings.HasPrefix(got, "relay signed with key SHA256:") || !strings.HasSuffix(got, "of bob, which is revoked with all that it signed: stolen") {
		t.Errorf("content of a burned signer: %q", got)
	}
	w.files["units/relay/unit.yaml"] = "tier: 3\nv: 2\n"
	other := w.commit("alice", "", "in its place")
	if got := burned(first, other); got != "" {
		t.Errorf("other content: %q", got)
	}
	w.files["units/relay/unit.yaml"] = "tier: 3\nv: 3\n"
	w.commit("lost", "carol", "by a lost key")
	lost := w.commit("alice", "", "on top of it")
	if got := burned(first, lost); got != "" {
		t.Errorf("content of a key that is only lost: %q", got)
	}

	w.accept(first, lost)
	if err := w.v.Burn(context.Background(), lost.ID); err != nil { // which has brought nothing itself
		t.Fatal(err)
	}
	w.files["units/relay/unit.yaml"] = "tier: 3\nv: 4\n"
	bad := w.commit("alice", "", "v4")
	w.accept(lost, bad)
	if err := w.v.Burn(context.Background(), bad.ID); err != nil {
		t.Fatal(err)
	}
	w.files["units/relay/unit.yaml"] = "tier: 3\nv: 5\n"
	good := w.commit("alice", "", "v5")
	if got := burned(bad, good); got != "" {
		t.Errorf("away from burned content: %q", got)
	}
	w.accept(bad, good)
	w.files["units/relay/unit.yaml"] = "tier: 3\nv: 4\n"
	if got := burned(good, w.commit("alice", "", "v4 again")); got != "relay burned on this host" {
		t.Errorf("burned content again: %q", got)
	}
}

// TestKT028Back: an image that was accepted before the one it replaces is a way back, however the unit looks else.
func TestKT028Back(t *testing.T) {
	w := newWorld(t, nil)
	step := func(text string) Commit {
		delete(w.files, "units/relay/unit.yaml")
		if text != "" {
			w.files["units/relay/unit.yaml"] = "tier: 3\n" + text
		}
		w.files["README"] += "."
		return w.commit("alice", "", "step: "+text)
	}
	w.files["units/ledger/unit.yaml"] = "tier: 3\n"
	var running Commit
	accepted := map[string]string{}
	for _, images := range []string{"a1", "a2", "a2 b1", ""} {
		head := step("images: " + images + "\n")
		if images == "" {
			head = step("")
		}
		if facts := w.accept(running, head); slices.ContainsFunc(facts.Units, func(u UnitFacts) bool { return u.Back != "" }) {
			t.Errorf("images %q: %+v, want no way back", images, facts.Units)
		}
		running, accepted[images] = head, head.ID
	}
	for images, want := range map[string]string{"a1": accepted["a1"], "a1 c1": accepted["a1"], "a2": "", "b1": "", "c1": ""} { // after a2 b1, and none
		if u := w.verify(running, step("images: "+images+"\n"), "relay"); u.Back != want || u.Action != "upgrade" {
			t.Errorf("again as %s: back to %q, want %q", images, u.Back, want)
		}
	}
	if u := w.verify(running, step("images: a1\nintent: rollback\n"), "relay"); u.Back != accepted["a1"] || u.Action != "downgrade" {
		t.Errorf("as a rollback: %+v", u)
	}
	head := step("images: a1\nintent: rollback\n")
	w.accept(running, head)
	if u := w.verify(head, step("images: a2\n"), "relay"); u.Back != "" {
		t.Errorf("forward again: back to %q", u.Back)
	}
	if u := w.verify(head, step("images: a1\nv: 2\n"), "relay"); u.Back != "" {
		t.Errorf("the same image: back to %q", u.Back)
	}
}

// TestKT028LongAgo: what came back is older than what it replaced, though the log remembers nothing of its first time any more.
func TestKT028LongAgo(t *testing.T) {
	w := newWorld(t, nil)
	step := func(text string) Commit {
		w.files["units/relay/unit.yaml"] = "tier: 3\n" + text
		w.files["README"] += "."
		return w.commit("alice", "", "step: "+text)
	}
	good := step("images: a1\n")
	w.accept(Commit{}, good)
	bad := step("images: a2\n")
	w.begin(good, bad) // and its gate fails
	back := w.takeBack("host", good, bad, reverts(good, bad))
	w.accept(bad, back)
	w.git("reset", "-q", "--hard", back.ID)
	state, err := w.v.State.Load()
	if err != nil {
		t.Fatal(err)
	}
	state.Log = state.Log[1:] // as it is when there were too many since
	if err := w.v.State.save(state); err != nil {
		t.Fatal(err)
	}
	if u := w.verify(back, step("images: a2\nv: 2\n"), "relay"); u.Back != "" {
		t.Errorf("what was taken back comes again: back to %q", u.Back)
	}
	newer := step("images: a3\n")
	w.accept(back, newer)
	if u := w.verify(newer, step("images: a1\n"), "relay"); u.Back == "" {
		t.Error("an image from before the log comes in place of a newer one, and is no way back")
	}
}
