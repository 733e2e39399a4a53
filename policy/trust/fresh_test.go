package trust

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/kindos/kmo/policy/refusal"
)

// state signs a head statement of a commit by somebody, good for an hour from now; alter may change what is signed.
func (w *world) state(c Commit, who string, alter func(*HeadStatement)) Commit {
	w.t.Helper()
	s := HeadStatement{Site: "north-sea", Branch: "main", Commit: c.ID, Issued: w.now, Expires: w.now.Add(time.Hour)}
	if alter != nil {
		alter(&s)
	}
	file, err := SignHead(s, w.keys[who])
	if err != nil {
		w.t.Fatal(err)
	}
	c.Stated = file
	return c
}

func freshWorld(t *testing.T, age string) *world {
	return newWorld(t, func(w *world, r *Root) {
		r.Freshness = age
		r.Roles = append(r.Roles, Role{Name: RoleHead, Threshold: 1, Members: []string{"clock"}})
		r.Principals = append(r.Principals, Principal{Name: "clock", Class: "robot", Keys: []Key{w.key("clock", RoleHead)}})
	})
}

func (w *world) fresh(c Commit, want string) {
	w.t.Helper()
	_, err := w.v.Fresh(context.Background(), c, w)
	got := ""
	if r := refusal.Of(err); r != nil {
		got = string(r.Code)
	} else if err != nil {
		got = err.Error()
	}
	if got != want {
		w.t.Errorf("got %v, want %q", err, want)
	}
}

// T31, T33: a head whose statement is missing, another's, or out of its time is not accepted.
func TestFreshness(t *testing.T) {
	for name, one := range map[string]struct {
		who   string
		alter func(*HeadStatement)
		want  string
	}{
		"good":                  {"clock", nil, ""},
		"T33 another site":      {"clock", func(s *HeadStatement) { s.Site = "south-sea" }, "E_CHAIN"},
		"T33 another branch":    {"clock", func(s *HeadStatement) { s.Branch = "test" }, "E_CHAIN"},
		"T33 another commit":    {"clock", func(s *HeadStatement) { s.Commit = strings.Repeat("a", 40) }, "E_CHAIN"},
		"T33 without the role":  {"alice", nil, "E_CHAIN"},
		"T31 expired":           {"clock", func(s *HeadStatement) { s.Expires = s.Issued }, "E_FREEZE"},
		"T31 too old":           {"clock", func(s *HeadStatement) { s.Issued = s.Issued.Add(-2 * time.Hour) }, "E_FREEZE"},
		"T31 expires years off": {"clock", func(s *HeadStatement) { s.Issued, s.Expires = s.Issued.Add(-2*time.Hour), s.Expires.AddDate(9, 0, 0) }, "E_FREEZE"},
	} {
		t.Run(name, func(t *testing.T) {
			w := freshWorld(t, "1h")
			a := w.commit("alice", "", "a head")
			facts, err := w.v.Verify(context.Background(), Commit{}, a, w)
			if err != nil {
				t.Fatal(err)
			}
			if err := w.v.Accept(context.Background(), a, facts); codeOf(err) != "E_FREEZE" {
				t.Errorf("it is accepted unasked: %v", err)
			}
			w.fresh(a, "E_FREEZE") // none
			a = w.state(a, one.who, one.alter)
			w.fresh(a, one.want)
			err = w.v.Accept(context.Background(), a, facts)
			if (err == nil) != (one.want == "") {
				t.Errorf("accepting: %v", err)
			}
		})
	}
}

// T29, T38: statements only move forward, over a restart too, and the trusted time with them: a clock that is set back does not make an old one good.
func TestFreshnessOnlyForward(t *testing.T) {
	w := freshWorld(t, "1h")
	accept := func(running, c Commit) {
		t.Helper()
		w.fresh(c, "")
		w.accept(running, c)
	}
	a := w.commit("alice", "", "a head")
	old := w.state(a, "clock", func(s *HeadStatement) { s.Expires = s.Expires.AddDate(1, 0, 0) })
	accept(Commit{}, old)
	w.now = w.now.Add(30 * time.Minute)
	w.fresh(w.state(a, "clock", nil), "")
	w.v = w.verifier()
	w.fresh(old, "E_ROLLBACK") // T29

	w.files["README"] = "b"
	b := w.commit("alice", "", "a head")
	w.now = w.now.Add(10 * time.Minute)
	before := w.now
	w.now = w.now.AddDate(1, 0, 0)
	stated := w.state(b, "clock", nil)
	w.now = before // the clock is a year behind what is stated
	accept(a, stated)
	if behind, err := w.v.Behind(); err != nil || behind.Before(before.AddDate(1, 0, -1)) {
		t.Errorf("T38: trusted time %v, %v", behind, err)
	}
	w.fresh(w.state(b, "clock", nil), "E_ROLLBACK")
	w.fresh(w.state(a, "clock", func(s *HeadStatement) { s.Issued = s.Issued.AddDate(2, 0, 0) }), "E_ROLLBACK")
}

// T28: a root that has expired leaves what runs alone, and nothing new is accepted under it.
func TestExpiredRoot(t *testing.T) {
	until := time.Time{}
	w := newWorld(t, func(w *world, r *Root) {
		until = w.now.Add(time.Hour)
		r.Expires = &until
	})
	a := w.commit("alice", "", "a head")
	w.fresh(a, "")
	w.accept(Commit{}, a)
	t.Run("T28 expired", func(*testing.T) {
		w.now = until
		w.fresh(a, "E_FREEZE")
	})
}
