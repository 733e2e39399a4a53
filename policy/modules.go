package policy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/storage"
	"github.com/open-policy-agent/opa/v1/storage/inmem"

	"github.com/kindos/kmo/policy/refusal"
	shipped "github.com/kindos/kmo/rego"
)

// modules are a set's sources as OPA reads them.
type modules struct {
	rules        map[string]*ast.Module // by file name: what judges
	tests        map[string]*ast.Module // of the site
	capabilities *ast.Capabilities
	limits       map[string]any // data.limits
}

// parse reads every module as Rego v1.
func (s sources) parse() (*modules, error) {
	p := &modules{rules: map[string]*ast.Module{}, tests: map[string]*ast.Module{}}
	var err error
	if p.capabilities, err = s.capabilities(); err != nil {
		return nil, err
	}
	text, err := s.shipped("limits.json")
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(text, &p.limits); err != nil {
		return nil, &refusal.Error{Code: codeMissing, Subject: "rego/limits.json", Got: refusal.Clip(err.Error(), 200), Want: "one JSON object"}
	}
	options := ast.ParserOptions{RegoVersion: ast.RegoV1, Capabilities: p.capabilities}
	var faults []error
	for _, file := range s {
		if !strings.HasSuffix(file.path, ".rego") {
			continue
		}
		if len(bytes.TrimSpace(file.text)) == 0 {
			faults = append(faults, &refusal.Error{Code: codeMissing, Subject: file.name(), Got: "an empty file", Want: "a package with rules"})
			continue
		}
		module, err := ast.ParseModuleWithOpts(file.name(), string(file.text), options)
		switch {
		case err != nil:
			faults = append(faults, compileRefusal(file.name(), err))
		case file.test():
			p.tests[file.name()] = module
		default:
			p.rules[file.name()] = module
		}
	}
	return p, errors.Join(faults...)
}

// capabilities are the builtins that capabilities.json allows, with the declarations of the OPA that is built in.
func (s sources) capabilities() (*ast.Capabilities, error) {
	text, err := s.shipped("capabilities.json")
	if err != nil {
		return nil, err
	}
	var names struct {
		Allow []string `json:"allow"`
		Cut   []string `json:"cut"` // known and not allowed; here so that a test can tell what is new
	}
	if err := json.Unmarshal(text, &names); err != nil {
		return nil, &refusal.Error{Code: codeMissing, Subject: "rego/capabilities.json", Got: refusal.Clip(err.Error(), 200), Want: "lists allow and cut"}
	}
	known := map[string]*ast.Builtin{}
	for _, builtin := range ast.CapabilitiesForThisVersion().Builtins {
		known[builtin.Name] = builtin
	}
	allowed := &ast.Capabilities{Features: []string{ast.FeatureRegoV1, "template_strings"}, AllowNet: []string{}}
	for _, name := range names.Allow {
		if known[name] == nil {
			return nil, &refusal.Error{Code: codeCompile, Subject: "rego/capabilities.json", Got: name, Want: "builtins that this build has"}
		}
		allowed.Builtins = append(allowed.Builtins, known[name])
	}
	return allowed, nil
}

// check holds the modules against what a layer may be, before anything is compiled.
func (p *modules) check() error {
	var faults []error
	found := map[string]bool{}
	for _, name := range slices.Sorted(maps.Keys(p.rules)) {
		module := p.rules[name]
		pkg := packageName(module)
		found[pkg] = true
		if len(module.Rules) == 0 {
			faults = append(faults, &refusal.Error{Code: codeMissing, Subject: name, Got: "a module without rules", Want: "deny contains …"})
		}
		faults = append(faults, checkPackage(name, pkg), checkRules(name, module), checkWith(name, module))
	}
	for pkg, ids := range shipped.Required() {
		if !found[pkg] {
			faults = append(faults, &refusal.Error{Code: codeMissing, Subject: "package " + pkg, Got: "missing or renamed",
				Want: "the package with " + strings.Join(ids, ", ") + " as kMO ships it"})
		}
	}
	for _, name := range slices.Sorted(maps.Keys(p.tests)) {
		if pkg := packageName(p.tests[name]); !inSite(pkg) && !strings.HasPrefix(pkg, "site_test") {
			faults = append(faults, packageRefusal(name, pkg, "site, site.… or site_test"))
		}
	}
	if err := errors.Join(faults...); err != nil {
		return err
	}
	if len(p.judging("deny", inSite)) == 0 && len(p.judging("warn", inSite)) == 0 && slices.ContainsFunc(slices.Collect(maps.Keys(found)), inSite) {
		return &refusal.Error{Code: codeMissing, Subject: "policy/", Got: "modules without a deny or a warn rule", Want: "deny contains … or no modules"}
	}
	return nil
}

// packageName is the module's package without "data.".
func packageName(module *ast.Module) string {
	return strings.TrimPrefix(module.Package.Path.String(), "data.")
}

func inSite(pkg string) bool {
	return pkg == "site" || strings.HasPrefix(pkg, "site.") || strings.HasPrefix(pkg, "site[")
}

func packageRefusal(name, pkg, want string) error {
	return &refusal.Error{Code: codeCompile, Subject: name, Got: "package " + refusal.Clip(pkg, 100), Want: "package " + want}
}

// checkPackage keeps each layer to its own packages.
func checkPackage(name, pkg string) error {
	if strings.HasPrefix(name, "policy/") {
		if !inSite(pkg) {
			return packageRefusal(name, pkg, "site or site.…: a site's rules can only add denials")
		}
		return nil
	}
	if _, ok := shipped.Required()[pkg]; !ok {
		return &refusal.Error{Code: codeMissing, Subject: name, Got: "package " + refusal.Clip(pkg, 100), Want: "a package that kMO ships"}
	}
	return nil
}

// checkRules refuses findings that are no partial sets, and rules by which an author would expect to allow something.
func checkRules(name string, module *ast.Module) error {
	var faults []error
	for _, rule := range module.Rules {
		head := rule.Head.Ref()
		word := strings.Trim(head[0].Value.String(), `"`)
		where := fmt.Sprintf("%s:%d", name, rule.Location.Row)
		switch word {
		case "allow", "exception", "exceptions", "exempt", "waive", "waiver":
			faults = append(faults, &refusal.Error{Code: codeCompile, Subject: where, Got: "a rule " + word, Want: "deny and warn only: nothing can allow"})
		case "deny", "warn", "evaluated":
			if len(head) != 1 || rule.Head.RuleKind() != ast.MultiValue || len(rule.Head.Args) > 0 {
				faults = append(faults, &refusal.Error{Code: codeCompile, Subject: where, Got: "rule " + word + " in another form", Want: word + " contains …"})
			}
		}
	}
	return errors.Join(faults...)
}

// checkWith refuses "with": a rule that judges another input than the one at hand says nothing about it.
func checkWith(name string, module *ast.Module) error {
	var faults []error
	ast.WalkExprs(module, func(expr *ast.Expr) bool {
		if len(expr.With) > 0 {
			faults = append(faults, &refusal.Error{Code: codeCompile, Subject: fmt.Sprintf("%s:%d", name, expr.Location.Row),
				Got: "with", Want: "with in *_test.rego only"})
		}
		return false
	})
	return errors.Join(faults...)
}

// judging lists the packages that have the rule, sorted.
func (p *modules) judging(rule string, of func(pkg string) bool) []string {
	var packages []string
	for _, module := range p.rules {
		has := slices.ContainsFunc(module.Rules, func(r *ast.Rule) bool { return r.Head.Ref()[0].Value.Compare(ast.Var(rule)) == 0 })
		if pkg := packageName(module); has && of(pkg) {
			packages = append(packages, pkg)
		}
	}
	slices.Sort(packages)
	return slices.Compact(packages)
}

// terms is a Rego array of one rule of every package that has it.
func (p *modules) terms(rule string, of func(pkg string) bool) string {
	packages := p.judging(rule, of)
	for i, pkg := range packages {
		packages[i] = "data." + pkg + "." + rule
	}
	return "[" + strings.Join(packages, ", ") + "]"
}

// compile compiles strictly. With tests, the site's tests are compiled with the rules.
func (p *modules) compile(tests bool) (*ast.Compiler, error) {
	compiler := ast.NewCompiler().WithStrict(true).WithCapabilities(p.capabilities).WithDefaultRegoVersion(ast.RegoV1)
	all := map[string]*ast.Module{}
	for name, module := range p.rules {
		all[name] = module.Copy()
	}
	if tests {
		maps.Copy(all, p.tests)
	}
	if compiler.Compile(all); compiler.Failed() {
		return nil, compileRefusal("the rules together", compiler.Errors)
	}
	return compiler, nil
}

func (p *modules) store() storage.Store {
	return inmem.NewFromObjectWithOpts(map[string]any{"limits": p.limits}, inmem.OptReturnASTValuesOnRead(true))
}

// compileRefusal turns OPA's errors into one refusal each, with file and line.
func compileRefusal(subject string, err error) error {
	var list ast.Errors
	if !errors.As(err, &list) {
		return &refusal.Error{Code: codeCompile, Subject: subject, Got: refusal.Clip(err.Error(), 300), Want: "Rego v1"}
	}
	var faults []error
	for _, one := range list {
		where := subject
		if one.Location != nil && one.Location.File != "" {
			where = fmt.Sprintf("%s:%d", one.Location.File, one.Location.Row)
		}
		faults = append(faults, &refusal.Error{Code: codeCompile, Subject: where, Got: refusal.Clip(one.Message, 300),
			Want: "Rego v1 with the builtins of capabilities.json"})
	}
	return errors.Join(faults...)
}
