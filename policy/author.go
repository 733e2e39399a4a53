package policy

import (
	"bytes"
	"cmp"
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/format"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/topdown"
	"github.com/open-policy-agent/opa/v1/types"

	"github.com/kindos/kmo/policy/refusal"
	shipped "github.com/kindos/kmo/rego"
)

//go:embed input.schema.json scaffold
var embedded embed.FS

// Schema is the JSON Schema of the input document, made of [Input], of what the reconciler puts where Input says any, and of what the rules take
// for granted.
func Schema() ([]byte, error) { return embedded.ReadFile("input.schema.json") }

// Scaffold is the files of a policy folder to begin with: a rule, its tests, an example of the input and a README.
func Scaffold() (fs.FS, error) { return fs.Sub(embedded, "scaffold") }

// Check is Load, and refuses beside that what a host would load and is probably wrong: a rule that reads what the input document does not
// have, and a finding in another form than a decision takes.
func Check(layers ...fs.FS) (*Set, error) {
	p, err := parsed(layers)
	if err != nil {
		return nil, err
	}
	faults := errors.Join(p.check(), p.lint())
	if slices.ContainsFunc(refusal.All(faults), func(e *refusal.Error) bool { return e.Code != codeLint }) {
		return nil, faults
	}
	set, err := p.load()
	if err := errors.Join(faults, err); err != nil {
		return nil, err
	}
	return set, nil
}

// Draft is a set of layers that are being written: no test was run, and nothing says that it still denies what it must. It is good for asking what it
// would say, and for nothing else.
func Draft(layers ...fs.FS) (*Set, error) {
	p, err := checked(layers)
	if err != nil {
		return nil, err
	}
	return p.set()
}

func (p *modules) lint() error {
	text, err := Schema()
	if err != nil {
		return err
	}
	var raw map[string]any
	if err := json.Unmarshal(text, &raw); err != nil {
		return err
	}
	delete(raw, "$schema") // OPA knows older drafts, which have the same words
	delete(raw, "$id")
	schemas := ast.NewSchemaSet()
	schemas.Put(ast.SchemaRootRef, raw)
	code, loose, strict := codeCompile, p.compiler(), p.compiler().WithSchemas(schemas).SetErrorLimit(0)
	if loose.Compile(p.all(true)); !loose.Failed() {
		code = codeLint
	}
	var faults []error
	strict.Compile(p.all(true))
	found := slices.DeleteFunc(strict.Errors, func(e *ast.Error) bool { // OPA reads no null out of a schema, and any object may be null
		detail, is := e.Details.(*ast.UnificationErrDetail)
		return is && (types.Compare(detail.Left, types.Nl) == 0 || types.Compare(detail.Right, types.Nl) == 0)
	})
	if len(found) > 0 {
		faults = append(faults, compileRefusal(code, "the rules together", found))
	}
	for _, name := range slices.Sorted(maps.Keys(p.rules)) {
		for _, rule := range p.rules[name].Rules {
			if word := rule.Head.Name; inSite(packageName(p.rules[name])) && (word == "deny" || word == "warn") {
				faults = append(faults, lintFinding(rule))
			}
		}
	}
	return errors.Join(faults...)
}

// lintFinding looks at as much of a rule's finding as is written out.
func lintFinding(rule *ast.Rule) error {
	if rule.Head.Key == nil {
		return nil
	}
	finding, is := rule.Head.Key.Value.(ast.Object)
	if !is {
		return nil
	}
	probably := func(term *ast.Term, got, want string) error {
		return &refusal.Error{Code: codeLint, Subject: at(term.Location), Got: refusal.Clip(got, 200), Want: want}
	}
	var faults []error
	missing := []string{"id", "unit", "path", "msg"}
	finding.Foreach(func(key, value *ast.Term) {
		name, _ := key.Value.(ast.String)
		text, literal := value.Value.(ast.String)
		if !slices.Contains(missing, string(name)) {
			faults = append(faults, probably(key, "a finding with "+key.String(), `{"id", "unit", "path", "msg"} and nothing else`))
		}
		missing = slices.DeleteFunc(missing, func(one string) bool { return one == string(name) })
		switch {
		case literal && name == "id" && (!plainID(string(text)) || strings.HasPrefix(string(text), "KT")):
			faults = append(faults, probably(value, "an id "+value.String(), "2 to 32 of A-Z, 0-9, _ and -, a letter first, without KT or E_ before it"))
		case literal && name == "msg" && !strings.Contains(string(text), "; want "):
			faults = append(faults, probably(value, "a message that does not say what would pass: "+value.String(), `"what was found; want what would pass"`))
		}
	})
	if len(missing) > 0 {
		faults = append(faults, probably(rule.Head.Key, "a finding without "+strings.Join(missing, ", "), `{"id", "unit", "path", "msg"}`))
	}
	return errors.Join(faults...)
}

// Format is the modules of a site's folder as opa fmt writes them, by path: those that are not written so.
func Format(site fs.FS) (map[string][]byte, error) {
	files, err := readLayer(1, site)
	if err != nil {
		return nil, err
	}
	changed := map[string][]byte{}
	var faults []error
	for _, file := range files {
		text, err := format.SourceWithOpts(file.name(), file.text, format.Opts{RegoVersion: ast.RegoV1})
		if err != nil {
			faults = append(faults, compileRefusal(codeCompile, file.name(), err))
		} else if !bytes.Equal(text, file.text) {
			changed[file.path] = text
		}
	}
	return changed, errors.Join(faults...)
}

// Tripwire is what a shipped rule says of itself.
type Tripwire struct {
	ID          string `json:"id"`
	Title       string `json:"title"`
	Description string `json:"description"`
	Passes      string `json:"passes"`   // what it lets pass
	Waivable    bool   `json:"waivable"` // a waiver can let it pass
}

// ruleless are the tripwires that are no rule over a change: without them none would be judged, or it would not get here.
func ruleless() []Tripwire {
	return []Tripwire{
		{ID: string(codeMissing), Title: "required rule missing, package renamed, or no rules",
			Description: `Every shipped rule, and every one that the trust root requires, has to say that it looked at a change. Rules in which one of
them is missing, renamed, emptied or without effect on what it must deny do not come into force, and a change at which
one did not look is refused.`,
			Passes: "the shipped rules whole, and a site's own that have at least one deny or warn"},
		{ID: string(codePlugin), Title: "plugin not pinned by checksum, or in a writable place",
			Description: `A plugin is a program that the agent runs with its own rights. It is started only if agent.yaml pins its sha256, and nobody
but root and the agent's user can write to it, to its folder or to a folder above. It is looked at when the agent starts and
whenever the plugin does, not at each change: no change can bring one.`,
			Passes: "pins in agent.yaml for each file of the plugins' folder, all of it owned by root or the agent's user and writable by nobody else"},
	}
}

// Tripwires lists what is refused whatever a site's rules say, sorted by id: from the annotations in the shipped modules, and what has no rule.
func Tripwires() ([]Tripwire, error) {
	files, err := readLayer(0, shipped.Rules())
	if err != nil {
		return nil, err
	}
	var all []*ast.Module
	for _, file := range files {
		if !strings.HasSuffix(file.path, ".rego") {
			continue
		}
		module, err := ast.ParseModuleWithOpts(file.name(), string(file.text), ast.ParserOptions{RegoVersion: ast.RegoV1, ProcessAnnotation: true})
		if err != nil {
			return nil, err
		}
		all = append(all, module)
	}
	annotated, errs := ast.BuildAnnotationSet(all)
	if len(errs) > 0 {
		return nil, errs
	}
	tripwires := ruleless()
	for _, ref := range annotated.Flatten() {
		a := ref.Annotations
		id, is := a.Custom["id"].(string)
		if !is { // of a package
			continue
		}
		waivable, _ := a.Custom["waivable"].(bool)
		tripwires = append(tripwires, Tripwire{ID: id, Title: a.Title, Description: strings.TrimSpace(a.Description), Passes: fmt.Sprint(a.Custom["passes"]), Waivable: waivable})
	}
	slices.SortFunc(tripwires, func(a, b Tripwire) int { return strings.Compare(a.ID, b.ID) })
	return tripwires, nil
}

// Said is one rule in a judgement: a finding of it, or what kept it from having one.
type Said struct {
	Rule    string            `json:"rule"` // data.site.deny
	At      string            `json:"at"`   // file:line:column
	Finding *Denial           `json:"finding,omitempty"`
	Values  map[string]string `json:"values,omitempty"` // its variables where it found that
	Failed  string            `json:"failed,omitempty"` // of a rule without a finding: where the expression stands that it got to, and that with its values

	place *ast.Location
}

// Trace judges as Replay does, and says beside that of each rule that has findings what they are, and of each of the site's rules that
// has none why.
func (s *Set) Trace(ctx context.Context, input []byte) (Decision, []Said, error) {
	decision, err := s.Replay(ctx, input)
	if err != nil {
		return decision, nil, err
	}
	value, err := decode(input)
	if err != nil {
		return decision, nil, err
	}
	var all []Said
	for set := s; set != nil; set = set.also {
		t := &tracer{rules: map[uint64]*ast.Rule{}, furthest: map[*ast.Rule]topdown.Event{}, fired: map[*ast.Rule]bool{}}
		bounded, cancel := context.WithTimeout(ctx, 10*s.limit)
		_, err := set.query.Eval(bounded, rego.EvalParsedInput(value), rego.EvalQueryTracer(t), rego.EvalRuleIndexing(false))
		cancel()
		if err != nil {
			return decision, nil, fmt.Errorf("tracing: %w", err)
		}
		all = append(all, t.told()...)
	}
	slices.SortStableFunc(all, func(a, b Said) int {
		return cmp.Or(strings.Compare(a.place.File, b.place.File), cmp.Compare(a.place.Row, b.place.Row), strings.Compare(fmt.Sprint(a.Finding), fmt.Sprint(b.Finding)))
	})
	return decision, all, nil
}

// tracer keeps of a judgement what its deny and warn rules found, and how far the others got.
type tracer struct {
	rules    map[uint64]*ast.Rule // by query
	furthest map[*ast.Rule]topdown.Event
	fired    map[*ast.Rule]bool
	said     []Said
}

// Enabled is true.
func (*tracer) Enabled() bool { return true }

// Config asks for the values of variables.
func (*tracer) Config() topdown.TraceConfig { return topdown.TraceConfig{PlugLocalVars: true} }

// TraceEvent takes what the evaluation tells.
func (t *tracer) TraceEvent(event topdown.Event) {
	switch node := event.Node.(type) {
	case *ast.Rule:
		if word := node.Head.Name; word != "deny" && word != "warn" {
			return
		}
		if event.Op == topdown.EnterOp {
			t.rules[event.QueryID] = node
		}
		if event.Op == topdown.ExitOp {
			t.exit(node, &event)
		}
	case *ast.Expr:
		rule := t.rules[event.QueryID]
		if rule == nil || event.Op != topdown.FailOp {
			return
		}
		if before, is := t.furthest[rule].Node.(*ast.Expr); !is || before.Index <= node.Index {
			t.furthest[rule] = event
		}
	}
}

func (t *tracer) exit(rule *ast.Rule, event *topdown.Event) {
	t.fired[rule] = true
	said := Said{Rule: rule.Ref().String(), At: at(rule.Location), place: rule.Location, Values: map[string]string{}}
	if found, err := ast.JSON(event.Plug(rule.Head.Key).Value); err == nil {
		if denial, ok := denialFrom(found); ok {
			said.Finding = &denial
		}
	}
	event.Locals.Iter(func(name, value ast.Value) bool {
		v, _ := name.(ast.Var)
		if named := event.LocalMetadata[v].Name; named != "" && !named.IsGenerated() && !strings.HasPrefix(string(named), "$") {
			said.Values[string(named)] = refusal.Clip(value.String(), 400)
		}
		return false
	})
	t.said = append(t.said, said)
}

// told adds the site's rules that found nothing.
func (t *tracer) told() []Said {
	for rule, event := range t.furthest {
		if !t.fired[rule] && inSite(packageName(rule.Module)) {
			t.said = append(t.said, Said{Rule: rule.Ref().String(), At: at(rule.Location), place: rule.Location, Failed: at(event.Location) + "\n" + pretty(&event)})
		}
	}
	return t.said
}
