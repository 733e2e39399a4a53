package policy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/open-policy-agent/opa/v1/rego"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/registry/merkle"
	shipped "github.com/kindos/kmo/rego"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// golden compares got with the file, or rewrites it.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s differs; -update rewrites it (-want +got):\n%s", path, diff)
	}
}

func readFixtures(t testing.TB) *corpus {
	t.Helper()
	c, err := readCorpus()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestFixtures runs every fixture with nothing but the shipped rules: what must trip is denied by its rule and by few others, a near
// miss passes altogether. What each is told is in a golden file, so that a change of words or of OPA shows.
func TestFixtures(t *testing.T) {
	set, c := load(t), readFixtures(t)
	also := map[string][]string{"KT001": {"KT010"}, "KT010": {"KT001"}, "KT007": {"KT008"}, "KT009": {"KT006"}, "KT003": {"KT012", "KT022"}, "KT022": {"KT003", "KT012"}, "KT005": {"KT012"}, "KT012": {"KT003", "KT005", "KT027"}}
	var transcript bytes.Buffer
	for _, id := range shipped.IDs() {
		for _, name := range slices.Sorted(maps.Keys(c.cases[id].Trip)) {
			t.Run("T63 "+id+" trips on "+name, func(t *testing.T) {
				decision := replay(t, set, c, c.cases[id].Trip[name])
				fmt.Fprintf(&transcript, "%s: %s\n", id, name)
				for _, d := range decision.Denied {
					fmt.Fprintf(&transcript, "\t%v\n", d.refusal())
					if d.ID != id && !slices.Contains(also[id], d.ID) {
						t.Errorf("got %v beside %s", d, id)
					}
				}
				refused(t, decision.Refusal(), id)
			})
		}
		for _, name := range slices.Sorted(maps.Keys(c.cases[id].Near)) {
			t.Run("T63 "+id+" passes "+name, func(t *testing.T) {
				if err := replay(t, set, c, c.cases[id].Near[name]).Refusal(); err != nil {
					t.Errorf("got %v, want none", err)
				}
			})
		}
	}
	t.Run("U-35 golden decisions", func(t *testing.T) { golden(t, "decisions.txt", transcript.Bytes()) })
}

// TestFixturesSayWhatTheyMean: a patch does what is written or nothing at all, and no fixture adds a key that no rule looks at: a near miss
// that is misspelt would pass for that alone.
func TestFixturesSayWhatTheyMean(t *testing.T) {
	c := readFixtures(t)
	for name, op := range map[string]operation{
		"U-32 unknown operation":     {Op: "ad", Path: "/version", Value: 1},
		"U-32 operation of no kind":  {Path: "/version", Value: 1},
		"U-32 replace of nothing":    {Op: "replace", Path: "/change/polcy", Value: true},
		"U-32 remove of nothing":     {Op: "remove", Path: "/change/polcy"},
		"U-32 add below nothing":     {Op: "add", Path: "/unit/0/after", Value: 1},
		"U-32 add beyond the end":    {Op: "add", Path: "/units/9", Value: 1},
		"U-32 test of another value": {Op: "test", Path: "/version", Value: 2},
	} {
		t.Run(name, func(t *testing.T) {
			if text, err := c.input([]operation{op}); err == nil {
				t.Errorf("got %.60s, want an error", text)
			}
		})
	}
	inserted, err := c.input([]operation{{Op: "add", Path: "/site/registries/0", Value: "first.example"}})
	if err != nil || len(many(t, 1).Site.Registries) != 2 || !bytes.Contains(inserted, []byte(`["first.example","reg.example:5000","mirror.example/edge"]`)) {
		t.Errorf("add at a place of a list does not insert: %s, %v", inserted, err)
	}
	known := unlookedAt(plain(t, c.base), inputShape(), "")
	for _, meant := range []string{"/units/after/overlay", "/units/after/health/http/port", "/units/before/resources", "/change/units/uncounted/code"} {
		known[meant] = true
	}
	for id, v := range c.cases {
		for _, patches := range []map[string][]operation{v.Trip, v.Near} {
			for name, patch := range patches {
				input, err := c.input(patch)
				if err != nil {
					t.Fatalf("%s, %s: %v", id, name, err)
				}
				for path := range unlookedAt(plain(t, input), inputShape(), "") {
					if !known[path] {
						t.Errorf("%s, %s: no rule looks at %s", id, name, path)
					}
				}
			}
		}
	}
}

// unlookedAt are the keys of a document that no rule looks at, with those above them; places in lists do not count.
func unlookedAt(node any, s *shape, path string) map[string]bool {
	found, free := map[string]bool{}, &shape{}
	switch node := node.(type) {
	case map[string]any:
		for key, value := range node {
			below, _ := s.field(key, free)
			if below == free {
				found[path+"/"+key] = true
				continue
			}
			maps.Copy(found, unlookedAt(value, below, path+"/"+key))
		}
	case []any:
		for _, value := range node {
			if s.elem != nil {
				maps.Copy(found, unlookedAt(value, s.elem, path))
			}
		}
	}
	return found
}

func replay(t *testing.T, set *Set, c *corpus, patch []operation) Decision {
	t.Helper()
	input, err := c.input(patch)
	if err != nil {
		t.Fatal(err)
	}
	decision, err := set.Replay(context.Background(), input)
	if err != nil {
		t.Fatal(err)
	}
	return decision
}

// op sets a field of the input.
func op(path string, value any) operation { return operation{Op: "add", Path: path, Value: value} }

// TestThreats puts the attacks that come in combination to the set.
func TestThreats(t *testing.T) {
	set, c := load(t), readFixtures(t)
	privileged := op("/units/0/after/security", map[string]any{"privileged": true})
	policyFacts := map[string]any{"unit": "@policy", "back": "", "action": "policy", "to": "", "tier": 0, "tierBefore": 0, "need": 3, "counted": nil}
	for _, one := range []struct {
		name  string
		patch []operation
		want  []string
	}{
		{"T64 disabled and violated in one commit", []operation{op("/change/policy", true), privileged}, []string{"KT001", "KT010", "KT020"}},
		{"T64 disabled without quorum", []operation{op("/change/policy", true), op("/change/other", false), op("/change/units", []any{policyFacts}), op("/units", []any{})}, []string{"KT018"}},
		{"T45 tag and sha256", []operation{op("/units/0/after/variants/0/image", "reg.example:5000/edge/relay:1@sha256:"+strings.Repeat("ab", 32))}, []string{"KT006"}},
		{"T68 tier-3 unit that needs a tier-0 change", []operation{op("/change/units/1/tier", 0), op("/change/units/1/need", 3)}, []string{"KT018"}},
		{"T68 tier lowered", []operation{op("/change/units/0/tierBefore", 0)}, []string{"KT019"}},
		{"T69 an action does not make a waiver, the tripwire stands", []operation{op("/change/units/0/action", "waiver"), op("/units/0/workloads/0/hooks/exit", []any{[]any{"sh"}})}, []string{"KT027"}},
		{"T70 path put together at render time", []operation{op("/units/0/workloads/0/mounts", []any{map[string]any{"from": "/srv/x/../../etc", "to": "/x"}})}, []string{"KT003"}},
	} {
		t.Run(one.name, func(t *testing.T) {
			got := idsOf(replay(t, set, c, one.patch))
			if got = slices.Compact(got); !slices.Equal(got, one.want) {
				t.Errorf("got %v, want %v", got, one.want)
			}
		})
	}
}

const siteRules = `package site

deny contains {"id": "SITE1", "unit": unit.name, "path": "intent.ticket", "msg": "no ticket; want intent: {ticket: …}"} if {
	some unit in input.units
	not unit.after.intent.ticket
}

warn contains {"id": "SITE2", "unit": unit.name, "path": "tier", "msg": "tier 3 is rarely right; want a second look"} if {
	some unit in input.units
	unit.after.tier == 3
}

evaluated contains "KT027" if input.commit
`

// TestDecision fixes whole decisions: what the audit log will keep.
func TestDecision(t *testing.T) {
	set, err := Load(shipped.Rules(), site(siteRules))
	if err != nil {
		t.Fatal(err)
	}
	c := readFixtures(t)
	ticket := operation{Op: "add", Path: "/units/0/after/intent", Value: map[string]any{"ticket": "EDGE-12"}}
	for name, patch := range map[string][]operation{
		"accepted": {ticket, {Op: "add", Path: "/units/1/after/intent", Value: map[string]any{"ticket": "EDGE-12"}}},
		"refused":  {ticket, {Op: "add", Path: "/units/0/after/security", Value: map[string]any{"host": []any{"network"}}}},
	} {
		t.Run("U-35 "+name, func(t *testing.T) {
			text, err := c.input(patch)
			if err != nil {
				t.Fatal(err)
			}
			var input Input
			if err := json.Unmarshal(text, &input); err != nil {
				t.Fatal(err)
			}
			decision, err := set.Decide(context.Background(), input)
			if err != nil {
				t.Fatal(err)
			}
			again, err := set.Replay(context.Background(), decision.Input)
			if err != nil {
				t.Fatal(err)
			}
			decision.Took, again.Took = 0, 0
			if diff := cmp.Diff(decision, again); diff != "" {
				t.Errorf("the replay differs:\n%s", diff)
			}
			if decision.Policy != set.Digest() {
				t.Errorf("got policy %v, want %v", decision.Policy, set.Digest())
			}
			decision.Policy = [32]byte{} // changes with every rule
			written, err := json.MarshalIndent(decision, "", " ")
			if err != nil {
				t.Fatal(err)
			}
			golden(t, name+".json", append(written, '\n'))
		})
	}
}

// TestT64BothSetsJudge judges a change that brings a new policy besides: no finding of the old rules or of the new gets lost, and the order does
// not matter.
func TestT64BothSetsJudge(t *testing.T) {
	rule := func(id, text string) *Set {
		t.Helper()
		set, err := Load(shipped.Rules(), site(fmt.Sprintf("package site\n\ndeny contains {\"id\": %q, \"unit\": \"\", \"path\": \"\", \"msg\": %q} if input.site.branch == %q\n", id, text, text)))
		if err != nil {
			t.Fatal(err)
		}
		return set
	}
	old, next := rule("OLD", "old"), rule("NEW", "new")
	both := old.And(next)
	for branch, want := range map[string]string{"old": "OLD", "new": "NEW", "main": ""} {
		input := many(t, 1)
		input.Site.Branch, input.Change.Policy, input.Change.Apart = branch, true, true
		decision, err := both.Decide(context.Background(), input)
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(idsOf(decision), " "); got != want {
			t.Errorf("branch %s: denied by %q, want %q", branch, got, want)
		}
		again, err := both.Replay(context.Background(), decision.Input)
		if err != nil || !cmp.Equal(decision.Denied, again.Denied) || decision.Policy != old.Digest() || len(decision.Evaluated) != len(shipped.IDs())+2 {
			t.Errorf("branch %s: %+v, again %+v: %v", branch, decision, again, err)
		}
		input.Rules = []merkle.Digest{old.Digest(), next.Digest()} // whatever the caller says
		if decision, err = old.Decide(context.Background(), input); err != nil || !slices.Contains(idsOf(decision), "KT020") {
			t.Errorf("branch %s before the old rules alone: %v, %v", branch, idsOf(decision), err)
		}
	}
	silent := *next
	silent.query = rego.PreparedEvalQuery{}
	if decision, err := old.And(&silent).Decide(context.Background(), many(t, 1)); err == nil || decision.Refusal() == nil {
		t.Errorf("a second set that does not judge: %+v, %v", decision, err)
	}
}

func idsOf(d Decision) (ids []string) {
	for _, denial := range d.Denied {
		ids = append(ids, denial.ID)
	}
	return ids
}

// TestNoJudgement is every way in which a judgement does not come about: each is a denial, none an approval.
func TestNoJudgement(t *testing.T) {
	set, err := Load(shipped.Rules(), site(`package site

deny contains {"id": "S1", "unit": "", "path": "", "msg": sprintf("%v", [x])} if {
	input.site.name == "error"
	x := to_number(input.commit)
}

deny contains {"id": "S2", "unit": "", "path": "", "msg": "x"} if {
	input.site.name == "loop"
	some x in numbers.range(1, 1000000)
	some y in numbers.range(1, 1000000)
	x + y < 0
}

deny contains 1 if {
	input.site.name == "conflict"
	two
}

two := input.host.name

two := input.host.zone

deny contains {"id": "S4", "unit": "", "path": "", "text": "x"} if input.site.name == "form"
`))
	if err != nil {
		t.Fatal(err)
	}
	hasty := *set
	hasty.limit = 100 * time.Millisecond
	named := func(name string) Input { input := many(t, 1); input.Site.Name = name; return input }
	large := many(t, 1)
	large.Site.Branch = strings.Repeat("x", 9<<20)
	panics := many(t, 1)
	panics.Units[0].After = panicking{}
	channel := many(t, 1)
	channel.Units[0].After = make(chan int)
	twice := many(t, 1)
	twice.Units = append(twice.Units, twice.Units[0])
	typed := many(t, 1)
	typed.Units[0].After = map[string]any{"security": map[string]any{"privileged": "yes"}}
	unknown := many(t, 1)
	unknown.Units[0].After = map[string]any{"security": map[string]any{"sysctls": []string{"kernel.x"}}}
	version := many(t, 1)
	version.Version = 2
	required := many(t, 1)
	required.Change.Tripwires = []string{"KT001", "KT021", "KT023", "KT999"}
	other := many(t, 1)
	other.Change.Commit = "another"
	for _, c := range []struct {
		name       string
		input      Input
		code, text string
	}{
		{"U-33 runtime error", named("error"), "E_POLICY_ERROR", "to_number"},
		{"U-33 conflicting rules", named("conflict"), "E_POLICY_ERROR", "conflict"},
		{"U-11 cartesian loop", named("loop"), "E_POLICY_ERROR", "timeout"},
		{"finding without a form", named("form"), "E_POLICY_ERROR", "a finding"},
		{"U-11 input too large", large, "E_LIMIT", "policy input"},
		{"U-25 panic", panics, "E_POLICY_ERROR", "panic: no JSON today"},
		{"value that is no JSON", channel, "E_POLICY_ERROR", "policy input"},
		{"unit twice", twice, "E_DECODE", "input.units[1].name"},
		{"text where true or false is wanted", typed, "E_DECODE", `input.units[0].after.security.privileged: "yes"; want true or false`},
		{"field that no rule knows", unknown, "E_DECODE", "input.units[0].after.security.sysctls"},
		{"T63 KT021 trips on a rule that the root requires and nobody ships", required, "KT021", "KT999 did not look"},
		{"another version", version, "E_DECODE", "input.version: 2; want 1"},
		{"facts of another commit", other, "E_DECODE", "input.change.commit"},
		{"nothing at all", Input{}, "E_DECODE", "input."},
	} {
		t.Run(c.name, func(t *testing.T) {
			judge := set
			if c.text == "timeout" {
				judge = &hasty
			}
			decision, err := judge.Decide(context.Background(), c.input)
			refused(t, err, c.code, c.text)
			refused(t, decision.Refusal(), c.code, c.text)
			if len(decision.Denied) != 1 || decision.Evaluated != nil {
				t.Errorf("got %+v, want the one denial", decision)
			}
			if len(decision.Input) > maxInput {
				t.Errorf("the decision keeps %d bytes, which the audit log would have to", len(decision.Input))
			}
		})
	}
	t.Run("T65 100 MB input", func(t *testing.T) {
		_, err := set.Replay(context.Background(), bytes.Repeat([]byte(" "), 100<<20))
		refused(t, err, "E_LIMIT", "104857600 bytes")
	})
	t.Run("the zero decision", func(t *testing.T) { refused(t, Decision{}.Refusal(), "KT021", "did not look") })
	t.Run("U-33 undefined result", func(t *testing.T) {
		refused(t, findings{}.into(&Decision{}, nil), "KT021", "KT001, KT002")
	})
	t.Run("a cancelled context judges nothing", func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		decision, err := set.Decide(ctx, many(t, 1))
		if !errors.Is(err, context.Canceled) || refusal.Of(err) != nil {
			t.Errorf("got %v, want a cancelled context and no refusal", err)
		}
		if decision.Refusal() == nil {
			t.Error("got an approval")
		}
	})
}

type panicking struct{}

func (panicking) MarshalJSON() ([]byte, error) { panic("no JSON today") }

// TestDecode refuses what encoding/json or OPA would take with a meaning of its own.
func TestDecode(t *testing.T) {
	c := readFixtures(t)
	base := string(c.base)
	for name, edit := range map[string]func(string) string{
		"member twice":          replace(`"revert": false`, `"revert": true, "revert": false`),
		"member twice, escaped": replace(`"revert": false`, `"rev\u0065rt": true, "revert": false`),
		"member missing":        replace(`"revert": false,`, ``),
		"null where needed":     replace(`"revert": false`, `"revert": null`),
		"more after it":         func(s string) string { return s + "{}" },
		"cut short":             func(s string) string { return s[:len(s)-3] },
		"empty":                 func(string) string { return "" },
		"a list":                func(s string) string { return "[" + s + "]" },
		"huge exponent":         replace(`"cpu": 4000`, `"cpu": 1e999999`),
		"huge exponent unread":  replace(`"name": "h1"`, `"name": 1e-99999999`),
		"fraction":              replace(`"need": 1`, `"need": 0.5`),
		"beyond 64 bits":        replace(`"need": 1`, `"need": 18446744073709551616`),
	} {
		t.Run(name, func(t *testing.T) {
			text := edit(base)
			if text == base {
				t.Fatal("the edit changes nothing")
			}
			_, err := decode([]byte(text))
			refused(t, err, "E_DECODE")
		})
	}
	t.Run("escapes and other letters", func(t *testing.T) {
		input := many(t, 1)
		input.Site.Branch = "a\"\\/\b\f\n\r\t\u00e9\u2028\U0001F600<>&"
		text, err := json.Marshal(input)
		if err != nil {
			t.Fatal(err)
		}
		value, err := decode(text)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(plain(t, text), fromValue(t, value)); diff != "" {
			t.Error(diff)
		}
	})
}

// TestDecideConcurrently shares one set, as the agent and its web page do.
func TestDecideConcurrently(t *testing.T) {
	set := load(t)
	set.limit = time.Minute // the race detector and a busy machine are slow
	good, bad := many(t, 10), many(t, 10)
	bad.Change.Units[7].Counted = nil
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			for range 3 {
				accepted, err := set.Decide(context.Background(), good)
				if err = errors.Join(err, accepted.Refusal()); err != nil {
					t.Error(err)
				}
				denied, err := set.Decide(context.Background(), bad)
				if err != nil || len(denied.Denied) != 1 || denied.Denied[0].Unit != "relay-0007" {
					t.Errorf("got %v and %v, want one denial of relay-0007", denied.Denied, err)
				}
			}
		})
	}
	group.Wait()
}

// TestWaived: T69, a waiver passes one rule of one unit, if enough people have signed it and the rule can be waived.
func TestWaived(t *testing.T) {
	set, c := load(t), readFixtures(t)
	hook := op("/units/0/workloads/0/hooks/exit", []any{[]any{"sh"}})
	waiver := func(id string, missing any) []any {
		return []any{map[string]any{"id": id, "missing": missing, "counted": []any{}, "uncounted": []any{}, "reason": "x"}}
	}
	for _, one := range []struct {
		name           string
		patch          []operation
		denied, waived []string
	}{
		{"granted", []operation{hook, op("/change/units/0/waivers", waiver("KT027", 0))}, nil, []string{"KT027"}},
		{"one missing", []operation{hook, op("/change/units/0/waivers", waiver("KT027", 1))}, []string{"KT027"}, nil},
		{"of nothing said about it", []operation{hook, op("/change/units/0/waivers", waiver("KT027", nil))}, []string{"KT027"}, nil},
		{"of another rule", []operation{hook, op("/change/units/0/waivers", waiver("KT026", 0))}, []string{"KT027"}, nil},
		{"of another unit", []operation{hook, op("/change/units/1/waivers", waiver("KT027", 0))}, []string{"KT027"}, nil},
		{"of the quorum", []operation{op("/change/units/0/need", 9), op("/change/units/0/waivers", waiver("KT018", 0))}, []string{"KT018"}, nil},
		{"of a tier lowered", []operation{op("/change/units/0/tierBefore", 0), op("/change/units/0/waivers", waiver("KT019", 0))}, []string{"KT019"}, nil},
	} {
		t.Run(one.name, func(t *testing.T) {
			decision := replay(t, set, c, one.patch)
			var waived []string
			for _, denial := range decision.Waived {
				waived = append(waived, denial.ID)
			}
			if denied := slices.Compact(idsOf(decision)); !slices.Equal(denied, one.denied) || !slices.Equal(slices.Compact(waived), one.waived) || (decision.Refusal() == nil) != (one.denied == nil) {
				t.Errorf("denied %v, waived %v; want %v, %v", denied, waived, one.denied, one.waived)
			}
		})
	}
}
