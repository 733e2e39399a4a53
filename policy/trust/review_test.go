package trust

import (
	"context"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestReview: who asks before a push is told what a host will say after it, and who could still approve.
func TestReview(t *testing.T) {
	frank := func(w *world, r *Root) {
		r.Principals = append(r.Principals, Principal{Name: "frank", Class: "human", Org: "kos", Keys: []Key{w.key("frank", "approve")}})
		for i := range r.Roles {
			if r.Roles[i].Name == RoleApprove {
				r.Roles[i].Members = append(r.Roles[i].Members, "frank")
			}
		}
	}
	for _, tt := range []struct {
		name, tier string
		change     func(w *world, r *Root)
		names      []string
		open       []string
	}{
		{name: "nobody yet, and neither the author nor a robot", tier: "1", open: []string{"bob", "carol", "dave", "erin"}},
		{name: "all but who has approved", tier: "1", names: []string{"bob"}, open: []string{"carol", "dave", "erin"}},
		{name: "none when it is enough", tier: "1", names: []string{"bob", "carol"}, open: []string{}},
		{name: "none when none is asked for", tier: "3", open: []string{}},
		{name: "the author where the tier counts authors, and a robot", tier: "2", open: []string{"alice", "bob", "carol", "dave", "erin", "robot"}},
		{name: "only the other organisation, when one place is left", tier: "0", change: frank, names: []string{"bob", "carol"}, open: []string{"dave", "erin"}},
		{name: "not who has no good key", tier: "1", change: func(w *world, r *Root) { r.Principals[2].Keys[0].Revoked = &Revoked{Reason: "lost"} }, open: []string{"bob", "dave", "erin"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w, running, head := tiered(t, tt.tier, tt.change)
			w.approve(running, head, "bus", nil, tt.names...)
			head = w.commit("alice", "", "approvals")
			want := w.verify(running, head, "bus")
			got, err := w.v.Review(context.Background(), running, head, w)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, got.Units[0].UnitFacts); diff != "" {
				t.Errorf("a host says otherwise: %s", diff)
			}
			if diff := cmp.Diff(tt.open, got.Units[0].Open); diff != "" {
				t.Errorf("open: %s", diff)
			}
			if diff := cmp.Diff([]string{"alice"}, got.Units[0].Authors); diff != "" {
				t.Errorf("authors: %s", diff)
			}
		})
	}
}

// TestCustody: a tier asks for steps that there are, where somebody may take them, and no more sensitive tier asks for less.
func TestCustody(t *testing.T) {
	custodian := Principal{Name: "ann", Class: "human", Keys: []Key{{Uses: []string{RoleCustody}}}}
	members := []Role{{Name: RoleImage, Members: []string{"ann"}}, {Name: RoleCustody, Members: []string{"ann"}}}
	tiers := func(steps ...[]string) (all []Tier) {
		for i, s := range steps {
			all = append(all, Tier{Tier: i, Statement: RoleImage, Custody: s})
		}
		return all
	}
	for _, tt := range []struct {
		name  string
		tiers []Tier
		roles []Role
		want  string
	}{
		{"none", tiers(nil, nil, nil, nil), nil, ""},
		{"the more sensitive asks for more", tiers([]string{"author", "release"}, []string{"release"}, nil, nil), members, ""},
		{"the more sensitive asks for less", tiers(nil, []string{"release"}, nil, nil), members, "tier 0 asks for no custody step release"},
		{"an unknown step", tiers([]string{"bless"}, nil, nil, nil), members, `the custody step "bless"`},
		{"a step twice", tiers([]string{"author", "author"}, nil, nil, nil), members, `the custody step "author"`},
		{"nobody may", tiers([]string{"author"}, nil, nil, nil), members[:1], "a role custody with members"},
		{"without a statement", []Tier{{Custody: []string{"author"}}, {}, {}, {}}, members, "a statement too"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root := &Root{Principals: []Principal{custodian}, Roles: tt.roles, Tiers: tt.tiers}
			if got := root.custodyFault(0); got == "" != (tt.want == "") || !strings.Contains(got, tt.want) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}
