package policy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/storage"
	"github.com/open-policy-agent/opa/v1/storage/inmem"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/registry/merkle"
	shipped "github.com/kindos/kmo/rego"
)

// source is one file of a layer, read once: what is judged is what is compiled.
type source struct {
	layer int
	path  string
	text  []byte
}

// name is what errors call the file: rego/… for the shipped layer, policy/… for a site's.
func (s source) name() string {
	if s.layer == 0 {
		return "rego/" + s.path
	}
	return "policy/" + s.path
}

func (s source) test() bool { return strings.HasSuffix(s.path, "_test.rego") }

type sources []source

// read takes every file of the layers but the shipped tests, in order.
func read(layers []fs.FS) (sources, error) {
	if len(layers) == 0 {
		return nil, &refusal.Error{Code: codeMissing, Subject: "policy", Got: "no layer of rules", Want: "the shipped rules as the first"}
	}
	var all sources
	for n, layer := range layers {
		files, err := readLayer(n, layer)
		if err != nil {
			return nil, err
		}
		all = append(all, files...)
	}
	return all, nil
}

func readLayer(n int, layer fs.FS) (sources, error) {
	var files sources
	var faults []error
	total := 0
	err := fs.WalkDir(layer, ".", func(name string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		file := source{layer: n, path: name}
		if !entry.Type().IsRegular() {
			return &refusal.Error{Code: codePath, Subject: file.name(), Got: "not a regular file", Want: "files and folders only"}
		}
		wanted, err := file.wanted()
		if err != nil || !wanted {
			faults = append(faults, err)
			return nil
		}
		if file.text, err = fs.ReadFile(layer, name); err != nil {
			return err
		}
		total += len(file.text)
		if files = append(files, file); len(files) > maxFiles || total > maxLayer {
			return &refusal.Error{Code: codeLimit, Subject: file.name(), Got: "more files or bytes of rules than are read",
				Want: fmt.Sprintf("at most %d files and %d bytes in all", maxFiles, maxLayer)}
		}
		return nil
	})
	if n > 0 && len(files) == 0 && errors.Is(err, fs.ErrNotExist) {
		return nil, nil // a site without a policy folder
	}
	return files, errors.Join(append(faults, err)...)
}

// wanted says whether the file belongs to the set. A site brings modules and texts for people, and nothing that looks like data for rules.
func (s source) wanted() (bool, error) {
	if s.layer == 0 {
		return !s.test() && (path.Ext(s.path) == ".rego" || s.path == "limits.json" || s.path == "capabilities.json"), nil
	}
	switch path.Ext(s.path) {
	case ".rego":
		return true, nil
	case ".md":
		return false, nil
	}
	return false, &refusal.Error{Code: codeCompile, Subject: s.name(), Got: "not a module", Want: "*.rego, and *.md for people"}
}

// digest is the content root of a folder that holds each layer as 0/, 1/, …
func (s sources) digest() (merkle.Digest, error) {
	entries := make([]merkle.Entry, 0, len(s))
	for _, file := range s {
		entries = append(entries, merkle.Entry{
			Type: merkle.File, Path: path.Join(strconv.Itoa(file.layer), file.path), Mode: 0o644,
			Size: uint64(len(file.text)), Blob: merkle.BlobRoot(file.text),
		})
	}
	slices.SortFunc(entries, func(a, b merkle.Entry) int { return strings.Compare(a.Path, b.Path) })
	root, err := merkle.SiteRoot(entries)
	if err != nil {
		return root, &refusal.Error{Code: codePath, Subject: "policy", Got: refusal.Clip(err.Error(), 200), Want: "plain file names"}
	}
	return root, nil
}

// shipped returns the text of one file of the first layer.
func (s sources) shipped(name string) ([]byte, error) {
	for _, file := range s {
		if file.layer == 0 && file.path == name {
			return file.text, nil
		}
	}
	return nil, &refusal.Error{Code: codeMissing, Subject: "rego/" + name, Got: "missing", Want: "the file as kMO ships it"}
}

// modules are a set's sources as OPA reads them.
type modules struct {
	sources      sources
	rules        map[string]*ast.Module // by file name: what judges
	tests        map[string]*ast.Module // of the site
	capabilities *ast.Capabilities
	limits       map[string]any // data.limits
}

// parse reads every module as Rego v1.
func (s sources) parse() (*modules, error) {
	p := &modules{sources: s, rules: map[string]*ast.Module{}, tests: map[string]*ast.Module{}}
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
			faults = append(faults, &refusal.Error{Code: codeMissing, Subject: file.name() + ":1:1", Got: "an empty file", Want: "a package with rules"})
			continue
		}
		module, err := ast.ParseModuleWithOpts(file.name(), string(file.text), options)
		switch {
		case err != nil:
			faults = append(faults, compileRefusal(codeCompile, file.name(), err))
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
		found[packageName(module)] = true
		if len(module.Rules) == 0 {
			faults = append(faults, &refusal.Error{Code: codeMissing, Subject: at(module.Package.Location), Got: "a module without rules", Want: "deny contains …"})
		}
		faults = append(faults, checkPackage(module), checkRules(module), checkWith(module))
	}
	for pkg, ids := range shipped.Required() {
		if !found[pkg] {
			faults = append(faults, &refusal.Error{Code: codeMissing, Subject: "package " + pkg, Got: "missing or renamed",
				Want: "the package with " + strings.Join(ids, ", ") + " as kMO ships it"})
		}
	}
	for _, name := range slices.Sorted(maps.Keys(p.tests)) {
		if pkg := packageName(p.tests[name]); !inSite(pkg) && !strings.HasPrefix(pkg, "site_test") {
			faults = append(faults, packageRefusal(p.tests[name], "site, site.… or site_test"))
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

func packageRefusal(module *ast.Module, want string) error {
	return &refusal.Error{Code: codeCompile, Subject: at(module.Package.Location), Got: "package " + refusal.Clip(packageName(module), 100), Want: "package " + want}
}

// checkPackage keeps each layer to its own packages.
func checkPackage(module *ast.Module) error {
	pkg, where := packageName(module), module.Package.Location
	if strings.HasPrefix(where.File, "policy/") {
		if !inSite(pkg) {
			return packageRefusal(module, "site or site.…: a site's rules can only add denials")
		}
		return nil
	}
	if _, ok := shipped.Required()[pkg]; !ok {
		return &refusal.Error{Code: codeMissing, Subject: at(where), Got: "package " + refusal.Clip(pkg, 100), Want: "a package that kMO ships"}
	}
	return nil
}

// checkRules refuses findings that are no partial sets, and rules by which an author would expect to allow something.
func checkRules(module *ast.Module) error {
	var faults []error
	for _, rule := range module.Rules {
		head := rule.Head.Ref()
		word := strings.Trim(head[0].Value.String(), `"`)
		where := at(rule.Location)
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
func checkWith(module *ast.Module) error {
	var faults []error
	ast.WalkExprs(module, func(expr *ast.Expr) bool {
		if len(expr.With) > 0 {
			faults = append(faults, &refusal.Error{Code: codeCompile, Subject: at(expr.Location), Got: "with", Want: "with in *_test.rego only"})
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

// compiler compiles strictly, with the builtins that are allowed and those given.
func (p *modules) compiler(more ...*ast.Builtin) *ast.Compiler {
	capabilities := *p.capabilities
	capabilities.Builtins = slices.Concat(capabilities.Builtins, more)
	return ast.NewCompiler().WithStrict(true).WithCapabilities(&capabilities).WithDefaultRegoVersion(ast.RegoV1)
}

// all are copies of the modules, which compiling changes; with tests, the site's tests too.
func (p *modules) all(tests bool) map[string]*ast.Module {
	all := map[string]*ast.Module{}
	for name, module := range p.rules {
		all[name] = module.Copy()
	}
	if tests {
		for name, module := range p.tests {
			all[name] = module.Copy()
		}
	}
	return all
}

func (p *modules) store() storage.Store {
	return inmem.NewFromObjectWithOpts(map[string]any{"limits": p.limits}, inmem.OptReturnASTValuesOnRead(true))
}

// at is a place as editors and terminals know it.
func at(place *ast.Location) string {
	return fmt.Sprintf("%s:%d:%d", place.File, place.Row, max(1, place.Col)) // the end of a file has none
}

// compileRefusal turns OPA's errors into one refusal each, with its place.
func compileRefusal(code refusal.Code, subject string, err error) error {
	var list ast.Errors
	if !errors.As(err, &list) {
		return &refusal.Error{Code: code, Subject: subject, Got: refusal.Clip(err.Error(), 300), Want: "Rego v1"}
	}
	var faults []error
	for _, one := range list {
		fault := &refusal.Error{Code: code, Subject: subject, Got: refusal.Clip(one.Message, 300), Want: "Rego v1 with the builtins of capabilities.json"}
		if one.Location != nil && one.Location.File != "" {
			fault.Subject = at(one.Location)
		}
		switch detail := one.Details.(type) {
		case *ast.RefErrInvalidDetail:
			fault.Got = refusal.Clip(fmt.Sprintf("undefined ref: %v", detail.Ref[:detail.Pos+1]), 300)
			fault.Want = refusal.Clip(fmt.Sprintf("one of %v there", detail.OneOf), 400)
		case *ast.UnificationErrDetail, *ast.ArgErrDetail:
			fault.Got, fault.Want = refusal.Clip(one.Message+": "+strings.Join(detail.Lines(), ", "), 300), "values of one type"
		}
		faults = append(faults, fault)
	}
	return errors.Join(faults...)
}
