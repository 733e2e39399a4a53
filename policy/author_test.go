package policy

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/kindos/kmo/policy/refusal"
	shipped "github.com/kindos/kmo/rego"
)

// begun is the scaffold with one file passed through edit.
func begun(t *testing.T, name string, edit func(string) string) fstest.MapFS {
	t.Helper()
	folder, err := Scaffold()
	if err != nil {
		t.Fatal(err)
	}
	layer := fstest.MapFS{}
	names, err := fs.Glob(folder, "*")
	if err != nil {
		t.Fatal(err)
	}
	for _, one := range names {
		text, err := fs.ReadFile(folder, one)
		if err != nil {
			t.Fatal(err)
		}
		if one == name {
			text = []byte(edit(string(text)))
		}
		layer[one] = &fstest.MapFile{Data: text}
	}
	return layer
}

func TestScaffold(t *testing.T) {
	layer := begun(t, "", nil)
	if _, err := Check(shipped.Rules(), layer); err != nil {
		t.Error(err)
	}
	if changed, err := Format(layer); err != nil || len(changed) > 0 {
		t.Errorf("not formatted: %v, %v", changed, err)
	}
	tests, err := RunTests(context.Background(), "", shipped.Rules(), layer)
	if err != nil || len(tests) != 2 || !tests[0].Passed || !tests[1].Passed {
		t.Errorf("got %+v, %v; want two tests that pass", tests, err)
	}
	covered, err := Cover(context.Background(), "", shipped.Rules(), layer)
	if err != nil || covered.Percent != 100 || covered.Lines == 0 {
		t.Errorf("got %+v, %v; want everything covered", covered, err)
	}
}

// The shipped rules read nothing but what the schema of the input has: so the schema has what they read.
func TestShippedRulesFitTheSchema(t *testing.T) {
	if _, err := Check(shipped.Rules()); err != nil {
		t.Error(err)
	}
}

// linted is what Check refuses before it loads anything.
func linted(t *testing.T, module string) error {
	t.Helper()
	p, err := parsed([]fs.FS{shipped.Rules(), site(module)})
	if err != nil {
		t.Fatal(err)
	}
	return errors.Join(p.check(), p.lint())
}

func TestCheckFinds(t *testing.T) {
	rule := func(body string) string {
		return "package site\n\ndeny contains {\"id\": \"S1\", \"unit\": \"\", \"path\": \"\", \"msg\": \"a; want b\"} if {\n\t" + body + "\n}\n"
	}
	head := func(finding string) string {
		return "package site\n\ndeny contains " + finding + " if input.site.name == \"none\"\n"
	}
	for _, c := range []struct{ name, module, code, where, text string }{
		{"a member that is not there", rule("count(input.unts) > 5"), "E_POLICY_LINT", "policy/site.rego:4:", "undefined ref: input.unts; want one of"},
		{"one of a unit", rule("some unit in input.units\n\tunit.after.intent.tickt"), "E_POLICY_LINT", "policy/site.rego:5:", `"ticket"`},
		{"one of a workload", rule("input.units[_].workloads[_].resources.cpus"), "E_POLICY_LINT", "policy/site.rego:4:", `"cpuMin"`},
		{"one of an image", rule("input.units[_].images[_].signr"), "E_POLICY_LINT", "policy/site.rego:4:", `"signer"`},
		{"types that never agree", rule(`input.units[_].after.tier == "3"`), "E_POLICY_LINT", "policy/site.rego:4:", "number"},
		{"a builtin with another type", rule(`startswith(input.units[_].after.tier, "3")`), "E_POLICY_LINT", "policy/site.rego:4:", "startswith"},
		{"no such function is no lint", rule(`strtswith("a", "b")`), "E_POLICY_COMPILE", "policy/site.rego:4:", "undefined function strtswith"},
		{"a finding without a path", head(`{"id": "S1", "unit": "", "msg": "a; want b"}`), "E_POLICY_LINT", "policy/site.rego:3:15", "a finding without path"},
		{"a finding with more", head(`{"id": "S1", "unit": "", "path": "", "msg": "a; want b", "severity": "high"}`), "E_POLICY_LINT", "policy/site.rego:3:", `a finding with "severity"`},
		{"an id of the tripwires", head(`{"id": "KT099", "unit": "", "path": "", "msg": "a; want b"}`), "E_POLICY_LINT", "policy/site.rego:3:22", `an id "KT099"`},
		{"a message without a way out", head(`{"id": "S1", "unit": "", "path": "", "msg": "no"}`), "E_POLICY_LINT", "policy/site.rego:3:", "does not say what would pass"},
	} {
		t.Run(c.name, func(t *testing.T) {
			refused(t, linted(t, c.module), c.code, c.where, c.text)
		})
	}
	t.Run("all faults at once", func(t *testing.T) {
		err := linted(t, "package site\n\nallow if input.unts\n\ndeny contains {\"id\": \"S1\"} if input.hst\n")
		if got := len(refusal.All(err)); got != 4 {
			t.Errorf("got %d refusals, want 4: %v", got, err)
		}
		layer := site(rule("input.unts"))
		layer["site_test.rego"].Data = []byte("package site_test\n\ntest_it if false\n")
		_, err = Check(shipped.Rules(), layer)
		refused(t, err, "E_POLICY_LINT", "input.unts")
		refused(t, err, "E_POLICY_COMPILE", "data.site_test.test_it: the test does not pass")
	})
	t.Run("what is right is no fault", func(t *testing.T) {
		module := "package site\n"
		for i, body := range []string{
			"input.units[_].before == null", "null = input.units[_].after", "some unit in input.units\n\tunit.before == null\n\tunit.after != null",
			"input.units[_].images == null", "input.host.labels.site == \"north\"", "input.units[_].after.run.env[name] == \"1\"\n\tstartswith(name, \"X\")",
			"object.get(input.units[_].after, [\"intent\", \"anything\"], \"\") == \"\"", "time.weekday(time.parse_rfc3339_ns(input.time)) == \"Friday\"",
			"units.parse_bytes(input.units[_].after.resources.memory.max) > 1000", "input.rules[1]", "input.change.units[_].counted[_].principal == input.change.author",
		} {
			module += fmt.Sprintf("\nwarn contains {\"id\": \"S%d\", \"unit\": \"\", \"path\": \"\", \"msg\": \"a; want b\"} if {\n\t%s\n}\n", i, body)
		}
		if err := linted(t, module); err != nil {
			t.Error(err)
		}
	})
	t.Run("what a host loads it goes on loading", func(t *testing.T) {
		if _, err := Load(shipped.Rules(), site(rule("input.unts"))); err != nil {
			t.Error(err)
		}
	})
}

func TestRunTestsSaysWhatWasCompared(t *testing.T) {
	layer := begun(t, "site_test.rego", func(text string) string {
		return text + "\ntest_wrong if {\n\tsome_count := count(site.deny) with input as example.good\n\tsome_count == 1\n}\n" +
			"\ntest_cases[note] if {\n\tsome note, n in {\"one\": 1, \"two\": 2}\n\tn == 1\n}\n\ntodo_test_later if false\n\ntest_error if to_number(\"x\")\n"
	})
	tests, err := RunTests(context.Background(), "", shipped.Rules(), layer)
	if err != nil {
		t.Fatal(err)
	}
	by := map[string]Test{}
	for _, test := range tests {
		by[test.Name] = test
	}
	wrong := by["data.site_test.test_wrong"]
	if why := strings.Join(wrong.Why, "\n"); wrong.Passed || !strings.HasPrefix(why, "policy/site_test.rego:17:2\n") || !strings.Contains(why, "some_count == 1") || !strings.HasSuffix(why, "\n0") {
		t.Errorf("got %+v; want where, the expression and the 0", wrong)
	}
	if why := strings.Join(by["data.site_test.test_cases"].Why, "\n"); !strings.HasPrefix(why, "case two: policy/site_test.rego:22:2\n") {
		t.Errorf("got %q; want the case that fails", why)
	}
	if later := by["data.site_test.todo_test_later"]; !later.Todo || later.Passed {
		t.Errorf("got %+v; want it left for later", later)
	}
	if why := by["data.site_test.test_error"].Why; len(why) != 1 || !strings.Contains(why[0], "to_number") {
		t.Errorf("got %q; want the builtin's error", why)
	}
	some, err := RunTests(context.Background(), "test_debug$", shipped.Rules(), layer)
	if err != nil || len(some) != 1 || some[0].Name != "data.site_test.test_debug" {
		t.Errorf("got %+v, %v; want the one that matches", some, err)
	}
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := RunTests(ended, "", shipped.Rules(), layer); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v; want tests that were not run to be an error", err)
	}
	covered, err := Cover(context.Background(), "test_good$", shipped.Rules(), layer)
	if err != nil || covered.Percent > 90 || !slices.Contains(covered.Missed, "policy/site.rego:9") {
		t.Errorf("got %+v, %v; want line 9 missed", covered, err)
	}
}

func TestFormatFinds(t *testing.T) {
	layer := begun(t, "site.rego", func(text string) string { return strings.ReplaceAll(text, "\tsome", "  some") })
	changed, err := Format(layer)
	if err != nil || len(changed) != 1 || !strings.Contains(string(changed["site.rego"]), "\n\tsome") {
		t.Errorf("got %s, %v; want site.rego with tabs", changed, err)
	}
	_, err = Format(site("package site\n\ndeny contains {\n"))
	refused(t, err, "E_POLICY_COMPILE", "policy/site.rego:4:")
}

func TestTripwires(t *testing.T) {
	all, err := Tripwires()
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, one := range all {
		ids = append(ids, one.ID)
		if one.Title == "" || one.Description == "" || one.Passes == "" {
			t.Errorf("%+v: something is not said", one)
		}
	}
	var want []string
	for n := range 28 {
		want = append(want, fmt.Sprintf("KT%03d", n+1))
	}
	if ruled := slices.DeleteFunc(slices.Clone(ids), func(id string) bool { return id == "KT021" || id == "KT023" }); !slices.Equal(ids, want) || !slices.Equal(ruled, shipped.IDs()) {
		t.Errorf("got %v, of which with a rule %v; want %v, %v", ids, ruled, want, shipped.IDs())
	}
}

func TestTrace(t *testing.T) {
	input, err := readCorpus()
	if err != nil {
		t.Fatal(err)
	}
	document, err := input.input(input.cases["KT001"].Trip["privileged in the template"])
	if err != nil {
		t.Fatal(err)
	}
	set, err := Load(shipped.Rules(), begun(t, "site.rego", func(text string) string {
		return text + `
deny contains {"id": "SITE002", "unit": unit.name, "path": "run.env.LOG_LEVEL", "msg": "debug; want info"} if {
	some unit in input.units
	unit.after.run.env.LOG_LEVEL == "debug"
}

warn contains {"id": "SITE003", "unit": "", "path": "", "msg": "x; want y"} if input.site.name == "south-sea"
`
	}))
	if err != nil {
		t.Fatal(err)
	}
	decision, said, err := set.Trace(context.Background(), document)
	if err != nil || len(decision.Denied) == 0 {
		t.Fatal(decision, err)
	}
	var found, failed []string
	for _, one := range said {
		if one.Finding != nil {
			found = append(found, one.Finding.ID)
			if one.Finding.ID == "SITE002" && !strings.HasPrefix(one.Values["unit"], `{"after": `) {
				t.Errorf("got %v, want the unit", one.Values)
			}
			continue
		}
		failed = append(failed, one.Rule+" "+one.Failed)
	}
	slices.Sort(found)
	if want := []string{"KT001", "KT010", "SITE002"}; !slices.Equal(found, want) {
		t.Errorf("found %v, want %v", found, want)
	}
	if len(failed) != 2 || !strings.Contains(failed[0], "unit.after.run.env.DEBUG") || !strings.Contains(failed[1], "input.site.name == \"south-sea\"\n|\ninput.site.name: \"north-sea\"") {
		t.Errorf("got %q, want the two rules that did not hold, and where", failed)
	}
	if again, err := set.Replay(context.Background(), document); err != nil || !slices.Equal(again.Denied, decision.Denied) {
		t.Errorf("it answers %v and %v, %v: otherwise than without a trace", decision.Denied, again.Denied, err)
	}
	_, _, err = set.Trace(context.Background(), []byte("{}"))
	refused(t, err, "E_DECODE")
}
