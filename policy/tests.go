package policy

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/cover"
	"github.com/open-policy-agent/opa/v1/storage"
	"github.com/open-policy-agent/opa/v1/tester"
	"github.com/open-policy-agent/opa/v1/topdown"

	"github.com/kindos/kmo/policy/refusal"
)

// Test is one of a site's tests, after it was run.
type Test struct {
	Name   string        `json:"name"` // data.site_test.test_ticket
	At     string        `json:"at"`   // file:line:column
	Passed bool          `json:"passed"`
	Todo   bool          `json:"todo,omitempty"` // named todo_test_…, and not run
	Took   time.Duration `json:"took"`           // ns
	Why    []string      `json:"why,omitempty"`  // of each case that failed: where, the expression that did not hold, and the values in it
}

// Coverage is how much of a site's rules its tests reach.
type Coverage struct {
	Percent float64  `json:"percent"` // of the lines that can be reached
	Lines   int      `json:"lines"`
	Missed  []string `json:"missed,omitempty"` // file:line or file:line-line, sorted
}

// RunTests runs the tests of the layers' sites whose names match the regular expression, sorted by place. A test that fails is no error.
func RunTests(ctx context.Context, match string, layers ...fs.FS) ([]Test, error) {
	p, err := checked(layers)
	if err != nil {
		return nil, err
	}
	results, err := p.test(ctx, tester.NewRunner().Filter(match).EnableTracing(true))
	tests := make([]Test, len(results))
	for i, result := range results {
		tests[i] = Test{Name: result.Package + "." + result.Name, At: at(result.Location), Passed: result.Pass(), Todo: result.Skip, Took: result.Duration}
		if !result.Pass() && !result.Skip {
			tests[i].Why = whyNot(result)
		}
	}
	return tests, err
}

// Cover runs the tests of the layers' sites whose names match, and says how much of the sites' rules they reach.
func Cover(ctx context.Context, match string, layers ...fs.FS) (Coverage, error) {
	p, err := checked(layers)
	if err != nil {
		return Coverage{}, err
	}
	tracer := cover.New()
	if _, err := p.test(ctx, tester.NewRunner().Filter(match).SetCoverageQueryTracer(tracer).SetCoverageRuns([]cover.Kind{cover.KindEarlyExit})); err != nil {
		return Coverage{}, err
	}
	rules := maps.Clone(p.rules)
	maps.DeleteFunc(rules, func(_ string, module *ast.Module) bool { return !inSite(packageName(module)) })
	var c Coverage
	reached := 0
	for name, file := range tracer.Report(rules).Files {
		if rules[name] == nil {
			continue
		}
		reached += file.CoveredLines
		c.Lines += file.CoveredLines + file.NotCoveredLines
		for _, lines := range file.NotCovered {
			where := fmt.Sprintf("%s:%d", name, lines.Start.Row)
			if lines.End.Row > lines.Start.Row {
				where += fmt.Sprintf("-%d", lines.End.Row)
			}
			c.Missed = append(c.Missed, where)
		}
	}
	slices.Sort(c.Missed)
	if c.Missed, c.Percent = slices.Compact(c.Missed), 100; c.Lines > 0 {
		c.Percent = 100 * float64(reached) / float64(c.Lines)
	}
	return c, nil
}

// runTests refuses a site one of whose tests does not pass, and one that has rules and no tests.
func (p *modules) runTests() error {
	rules := slices.ContainsFunc(slices.Collect(maps.Keys(p.rules)), func(name string) bool { return strings.HasPrefix(name, "policy/") })
	if !rules && len(p.tests) == 0 {
		return nil
	}
	results, err := p.test(context.Background(), tester.NewRunner())
	faults := []error{err}
	results = slices.DeleteFunc(results, func(result *tester.Result) bool { return result.Skip })
	if rules && len(results) == 0 && err == nil {
		return &refusal.Error{Code: codeCompile, Subject: "policy/", Got: "rules without tests", Want: "rules test_… in *_test.rego beside them"}
	}
	for _, result := range results {
		if result.Pass() {
			continue
		}
		fault := &refusal.Error{Code: codeCompile, Subject: at(result.Location) + ": " + result.Package + "." + result.Name, Got: "the test does not pass", Want: "true"}
		if result.Error != nil {
			fault.Got, fault.Want = refusal.Clip(result.Error.Error(), 300), "a test that comes to an end"
		}
		faults = append(faults, fault)
	}
	return errors.Join(faults...)
}

// test has the runner run the site's own tests, and sorts the results by place. All of them together may take ten times as long as a decision.
func (p *modules) test(ctx context.Context, runner *tester.Runner) ([]*tester.Result, error) {
	bounded, cancel := context.WithTimeout(ctx, 10*maxTime)
	defer cancel()
	store := p.store()
	runner.SetCompiler(p.compiler(ast.InternalTestCase)).SetModules(p.all(true)).SetStore(store).RaiseBuiltinErrors(true).SetTimeout(10 * maxTime)
	var results []*tester.Result
	err := storage.Txn(bounded, store, storage.TransactionParams{}, func(txn storage.Transaction) error {
		found, err := runner.RunTests(bounded, txn)
		if err != nil {
			return compileRefusal(codeCompile, "the rules together", err)
		}
		for result := range found {
			if p.tests[result.Location.File] != nil { // a rule that is called test_… and judges is none
				results = append(results, result)
			}
		}
		return nil
	})
	slices.SortFunc(results, func(a, b *tester.Result) int {
		return cmp.Or(strings.Compare(a.Location.File, b.Location.File), cmp.Compare(a.Location.Row, b.Location.Row))
	})
	switch { // the runner leaves out what it has no more time for
	case ctx.Err() != nil:
		err = errors.Join(err, context.Cause(ctx))
	case bounded.Err() != nil:
		err = errors.Join(err, &refusal.Error{Code: codeCompile, Subject: "policy/", Got: "tests that have not ended", Want: fmt.Sprintf("all of them to be done in %v", 10*maxTime)})
	}
	return results, err
}

// whyNot says of each case of a test that failed what did not hold.
func whyNot(result *tester.Result) []string {
	if result.Error != nil {
		return []string{refusal.Clip(result.Error.Error(), 1000)}
	}
	var why []string
	for name, sub := range result.SubResults.Iter {
		if sub.Fail && len(sub.SubResults) == 0 {
			why = append(why, "case "+strings.Join(name, ", ")+": "+unheld(sub.Trace))
		}
	}
	if len(why) == 0 {
		why = append(why, unheld(result.Trace))
	}
	return why
}

// unheld is the last expression of a trace that did not hold, with the values of what it is made of below it.
func unheld(trace []*topdown.Event) string {
	for _, event := range slices.Backward(trace) {
		expr, is := event.Node.(*ast.Expr)
		if !is || event.Op != topdown.FailOp || event.QueryID == 0 || event.Location == nil {
			continue
		}
		if _, every := expr.Terms.(*ast.Every); every { // what did not hold is in its body
			continue
		}
		return at(event.Location) + "\n" + pretty(event)
	}
	return "its value is not true"
}

// pretty is an expression with the values in it below, as OPA shows it to those who test.
func pretty(event *topdown.Event) string {
	shown := *event
	if input := event.Input(); input != nil { // a variable to those who read, and none to OPA, which would call it undefined
		shown.Locals, shown.LocalMetadata = ast.NewValueMap(), maps.Clone(event.LocalMetadata)
		event.Locals.Iter(func(name, value ast.Value) bool {
			shown.Locals.Put(name, value)
			return false
		})
		shown.Locals.Put(ast.InputRootDocument.Value, input.Value)
		if shown.LocalMetadata == nil {
			shown.LocalMetadata = map[ast.Var]topdown.VarMetadata{}
		}
		shown.LocalMetadata["input"] = topdown.VarMetadata{Name: "input", Location: event.Location}
	}
	var text bytes.Buffer
	_ = topdown.PrettyEvent(&text, &shown, topdown.PrettyEventOpts{PrettyVars: true}) // into memory
	lines := strings.Split(strings.TrimRight(text.String(), "\n"), "\n")
	indent := len(lines[0])
	for _, line := range lines {
		if rest := strings.TrimLeft(line, " \t"); rest != "" {
			indent = min(indent, len(line)-len(rest))
		}
	}
	for i, line := range lines {
		lines[i] = strings.TrimRight(refusal.Clip(strings.ReplaceAll(line[min(indent, len(line)):], "\t", "    "), 400), " ")
	}
	return strings.Join(lines, "\n")
}
