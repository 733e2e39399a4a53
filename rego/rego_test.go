package rego

import (
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/cover"
	"github.com/open-policy-agent/opa/v1/format"
	"github.com/open-policy-agent/opa/v1/storage"
	"github.com/open-policy-agent/opa/v1/storage/inmem"
	"github.com/open-policy-agent/opa/v1/tester"
)

// sources reads every module of this folder, tests too.
func sources(t *testing.T) map[string]string {
	t.Helper()
	names, err := fs.Glob(os.DirFS("."), "*.rego")
	if err != nil {
		t.Fatal(err)
	}
	texts := map[string]string{}
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		texts[name] = string(text)
	}
	return texts
}

func parse(t *testing.T) map[string]*ast.Module {
	t.Helper()
	modules := map[string]*ast.Module{}
	for name, text := range sources(t) {
		module, err := ast.ParseModuleWithOpts(name, text, ast.ParserOptions{RegoVersion: ast.RegoV1, ProcessAnnotation: true})
		if err != nil {
			t.Fatal(err)
		}
		modules[name] = module
	}
	return modules
}

// TestRules runs the modules' own tests and refuses a rule that they do not reach.
func TestRules(t *testing.T) {
	const floor = 95.0
	text, err := fs.ReadFile(Rules(), "limits.json")
	if err != nil {
		t.Fatal(err)
	}
	var limits map[string]any
	if err := json.Unmarshal(text, &limits); err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	store := inmem.NewFromObject(map[string]any{"limits": limits})
	modules, coverage := parse(t), cover.New()
	runner := tester.NewRunner().SetStore(store).SetModules(modules).SetCoverageQueryTracer(coverage).RaiseBuiltinErrors(true).SetTimeout(30 * time.Second)
	results := 0
	err = storage.Txn(ctx, store, storage.TransactionParams{}, func(txn storage.Transaction) error {
		done, err := runner.RunTests(ctx, txn)
		if err != nil {
			return err
		}
		for result := range done {
			if results++; !result.Pass() {
				t.Errorf("%s: %v", result, result.Error)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if results < 40 {
		t.Errorf("got %d tests, want 40 or more: not all were found", results)
	}
	report := coverage.Report(modules)
	covered, all := 0, 0
	for name, file := range report.Files {
		if strings.HasSuffix(name, "_test.rego") {
			continue
		}
		covered, all = covered+file.CoveredLines, all+file.CoveredLines+file.NotCoveredLines
		for _, lines := range file.NotCovered {
			t.Logf("%s:%d-%d is not reached", name, lines.Start.Row, lines.End.Row)
		}
	}
	if got := 100 * float64(covered) / float64(all); all < 150 || got < floor {
		t.Errorf("tests reach %.1f %% of %d lines, want %v %%", got, all, floor)
	} else {
		t.Logf("%d tests reach %.1f %% of %d lines", results, got, all)
	}
}

// TestAnnotations holds every rule to saying what it is for: documents are made from it.
func TestAnnotations(t *testing.T) {
	found := map[string]bool{}
	for name, module := range parse(t) {
		if strings.HasSuffix(name, "_test.rego") {
			continue
		}
		for _, a := range module.Annotations {
			if a.Scope != "rule" {
				continue
			}
			id, passes, waivable := fmt.Sprint(a.Custom["id"]), fmt.Sprint(a.Custom["passes"]), a.Custom["waivable"]
			if a.Title == "" || a.Description == "" || len(passes) < 10 {
				t.Errorf("%s:%d: title %q, description %q, passes %q: all must be said", name, a.Location.Row, a.Title, a.Description, passes)
			}
			if found[id] {
				t.Errorf("%s: %s is explained twice", name, id)
			}
			if want := id < "KT016" || id > "KT024"; waivable != want { // no waiver passes KT016–KT024
				t.Errorf("%s: %s: waivable is %v, want %v", name, id, waivable, want)
			}
			found[id] = true
		}
	}
	if got, want := slices.Sorted(maps.Keys(found)), IDs(); !slices.Equal(got, want) {
		t.Errorf("explained are %v, want %v", got, want)
	}
}

// TestCapabilities sorts every builtin of the OPA that is built in: allowed or cut. One that is in neither list came with an upgrade, and
// somebody must look at it.
func TestCapabilities(t *testing.T) {
	text, err := fs.ReadFile(Rules(), "capabilities.json")
	if err != nil {
		t.Fatal(err)
	}
	var lists struct{ Allow, Cut []string }
	if err := json.Unmarshal(text, &lists); err != nil {
		t.Fatal(err)
	}
	var known []string
	for _, builtin := range ast.CapabilitiesForThisVersion().Builtins {
		known = append(known, builtin.Name)
		if builtin.Nondeterministic && slices.Contains(lists.Allow, builtin.Name) {
			t.Errorf("%s is allowed, and does not answer the same twice", builtin.Name)
		}
	}
	sorted := slices.Concat(lists.Allow, lists.Cut)
	slices.Sort(known)
	slices.Sort(sorted)
	if !slices.Equal(known, sorted) {
		t.Errorf("builtins are %v, want %v", known, sorted)
	}
	for _, name := range []string{"http.send", "net.lookup_ip_addr", "opa.runtime", "rand.intn", "time.now_ns", "uuid.rfc4122", "trace"} {
		if !slices.Contains(lists.Cut, name) {
			t.Errorf("%s is not cut", name)
		}
	}
}

// TestFormat keeps the modules as opa fmt writes them. KMO_FORMAT=1 rewrites them.
func TestFormat(t *testing.T) {
	for name, text := range sources(t) {
		want, err := format.SourceWithOpts(name, []byte(text), format.Opts{RegoVersion: ast.RegoV1})
		if err != nil {
			t.Fatal(err)
		}
		if text == string(want) {
			continue
		}
		if os.Getenv("KMO_FORMAT") == "" {
			t.Errorf("%s is not formatted; KMO_FORMAT=1 go test ./rego rewrites it", name)
		} else if err := os.WriteFile(name, want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
