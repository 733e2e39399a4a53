package trust

import (
	"context"
	"slices"
	"testing"
	"time"
)

// waive puts names' waivers of the change of a unit into the work tree; alter may change what is signed.
func (w *world) waive(running, head Commit, unit string, ids []string, alter func(*Predicate), names ...string) {
	w.t.Helper()
	w.approve(running, head, unit, func(p *Predicate) {
		*p = p.Waiving(ids, "the vendor mends it in May")
		if alter != nil {
			alter(p)
		}
	}, names...)
}

func TestWaiver(t *testing.T) {
	w := newWorld(t, nil)
	a := w.commit("alice", "", "one")
	w.accept(Commit{}, a)
	b := w.version("alice", "2")
	w.waive(a, b, "relay", []string{"KT010", "KT011"}, nil, "bob", "carol", "dave")
	w.waive(a, b, "relay", []string{"KT013"}, nil, "erin")
	w.approve(a, b, "relay", nil, "bob")
	u := w.verify(a, w.commit("alice", "", "waived"), "relay")
	var got []string
	for _, waiver := range u.Waivers {
		if waiver.Missing == 0 && waiver.Reason == "the vendor mends it in May" {
			got = append(got, waiver.ID)
		}
	}
	if !slices.Equal(got, []string{"KT010", "KT011"}) || len(u.Waivers) != 3 || u.Waivers[2].Missing != 2 {
		t.Errorf("granted %v of %+v", got, u.Waivers)
	}
	if len(u.Counted) != 1 || len(u.Uncounted) != 0 {
		t.Errorf("waivers among the approvals: %+v %+v", u.Counted, u.Uncounted)
	}
	w.now = w.now.Add(25 * time.Hour)
	if u := w.verify(a, w.commit("alice", "", "later"), "relay"); u.Waivers[0].Missing != 3 || u.Waivers[0].Uncounted[0].Code != "E_APPROVAL_EXPIRED" {
		t.Errorf("after they have expired: %+v", u.Waivers)
	}
}

// TestWaiverNotCounted: whoever is not counted in tier 0 is not here, and a waiver is for one content.
func TestWaiverNotCounted(t *testing.T) {
	for _, tt := range []struct {
		name, who, code string
		alter           func(*Predicate)
	}{
		{"T13 the author's", "alice", "E_QUORUM", nil},
		{"T14 a robot's", "robot", "E_QUORUM", nil},
		{"for more than 14 days", "bob", "E_APPROVAL_CONTEXT", func(p *Predicate) { p.Expires = day0.Add(MaxWaiver + time.Hour) }},
		{"without a reason", "bob", "E_APPROVAL_CONTEXT", func(p *Predicate) { p.Reason = "" }},
		{"T16 for other content", "bob", "E_APPROVAL_CONTEXT", func(p *Predicate) { p.To = p.From }},
		{"of another tier", "bob", "E_APPROVAL_CONTEXT", func(p *Predicate) { p.Tier = 3 }},
		{"T15 for another branch", "bob", "E_APPROVAL_CONTEXT", func(p *Predicate) { p.Branch = "next" }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t, nil)
			a := w.commit("alice", "", "one")
			w.accept(Commit{}, a)
			b := w.version("alice", "2")
			to := w.verify(a, b, "relay").To
			w.waive(a, b, "relay", []string{"KT010"}, tt.alter, tt.who)
			for name, text := range w.files { // where it would be looked for
				if alteredTo := approvalFolder("relay", w.verify(a, b, "relay").From); len(name) > len(alteredTo) && name[:len(alteredTo)] == alteredTo {
					delete(w.files, name)
					w.files[approvalFolder("relay", to)+name[len(alteredTo):]] = text
				}
			}
			u := w.verify(a, w.commit("alice", "", tt.name), "relay")
			if len(u.Waivers) != 1 || u.Waivers[0].Missing != 3 || len(u.Waivers[0].Uncounted) != 1 || u.Waivers[0].Uncounted[0].Code != tt.code {
				t.Errorf("%+v", u.Waivers)
			}
		})
	}
	t.Run("an approval that waives", func(t *testing.T) {
		w := newWorld(t, nil)
		a := w.commit("alice", "", "one")
		w.accept(Commit{}, a)
		w.approve(a, w.version("alice", "2"), "relay", func(p *Predicate) { p.Waives = []string{"KT010"} }, "bob")
		if u := w.verify(a, w.commit("alice", "", "both"), "relay"); len(u.Waivers) != 0 || len(u.Counted) != 0 || !slices.Equal(codes(u), []string{"E_APPROVAL_CONTEXT"}) {
			t.Errorf("%+v", u)
		}
	})
}

// TestCoolDown: a change waits once its approvals are complete, and no push makes it wait less.
func TestCoolDown(t *testing.T) {
	w := newWorld(t, func(_ *world, r *Root) { r.Tiers[0].CoolDown = "24h" })
	w.files["units/kernel-a/unit.yaml"] = "tier: 0\n"
	a := w.commit("alice", "", "one")
	w.accept(Commit{}, a)
	w.files["units/kernel-a/unit.yaml"] = "tier: 0\nv: 2\n"
	b := w.commit("alice", "", "two")
	look := func(head Commit) UnitFacts {
		t.Helper()
		facts, err := w.v.Verify(context.Background(), a, head, w)
		if err == nil {
			err = w.v.Cool(context.Background(), facts)
		}
		if err != nil {
			t.Fatal(err)
		}
		return factsOf(t, facts, "kernel-a")
	}
	if u := look(b); !u.Cools.IsZero() {
		t.Errorf("without approvals nothing cools: %+v", u)
	}
	week := func(p *Predicate) { p.Expires = day0.Add(7 * 24 * time.Hour) }
	w.approve(a, b, "kernel-a", week, "bob", "carol", "dave")
	c := w.commit("alice", "", "approved")
	until := w.now.Add(24 * time.Hour)
	if u := look(c); !u.Cools.Equal(until) {
		t.Errorf("it cools until %v, want %v", u.Cools, until)
	}
	w.now = w.now.Add(23 * time.Hour)
	w.files["README"] = "pushed again"
	d := w.commit("alice", "", "the same again")
	if u := look(d); !u.Cools.Equal(until) {
		t.Errorf("pushed again it cools until %v, want %v", u.Cools, until)
	}
	w.now = until
	if u := look(d); !u.Cools.IsZero() || u.Missing() != 0 {
		t.Errorf("after its time: %+v", u)
	}

	// Somebody takes an approval away, and brings it again: it begins anew.
	gone := approvalFolder("kernel-a", look(d).To)
	kept := map[string]string{}
	for name, text := range w.files {
		if len(name) > len(gone) && name[:len(gone)] == gone {
			kept[name] = text
			delete(w.files, name)
		}
	}
	if u := look(w.commit("bob", "", "I object")); !u.Cools.IsZero() || u.Missing() == 0 {
		t.Errorf("without approvals: %+v", u)
	}
	for name, text := range kept {
		w.files[name] = text
	}
	e := w.commit("alice", "", "again")
	if u := look(e); !u.Cools.Equal(w.now.Add(24 * time.Hour)) {
		t.Errorf("it begins anew: %v", u.Cools)
	}
}

// TestHardware: a tier that asks for security keys counts no other.
func TestHardware(t *testing.T) {
	w := newWorld(t, nil)
	w.root.Tiers[2].Hardware = true
	if _, err := SignRoot(w.root, w.keys["alice"]); codeOf(err) != "E_ROOT_INVALID" {
		t.Errorf("a tier that nobody can satisfy: %v", err)
	}
	q := &quorum{root: &w.root}
	bob := w.root.principal("bob")
	if a := q.eligible(&UnitFacts{Tier: 2}, bob, Approval{Key: "SHA256:x"}); a.Code != "E_QUORUM" {
		t.Errorf("a key in a file: %+v", a)
	}
	if a := q.eligible(&UnitFacts{Tier: 2}, bob, Approval{Key: "SHA256:x", Hardware: true}); a.Code != "" {
		t.Errorf("a security key: %+v", a)
	}
}
