// Package policy decides whether a change may run here.
//
// [Load] makes a [Set] from the rules that kMO ships and the site's own; [Set.Decide] judges one [Input]. There is no rule that
// allows: a change passes if every required rule has looked at it and none denies it. Anything else is a refusal: silence, an
// error, a panic, a deadline. A set is made active only after it has compiled strictly, with the builtins of
// capabilities.json and no others, after the site's own tests have passed, after every shipped fixture has been denied or passed as
// it must, and, which is for the caller to ask, if it lets pass what takes it away again ([Set.WayOut]). A Load that fails leaves
// nothing behind: whoever holds a set keeps it and goes on with it.
//
//	set, err := policy.Load(rego.Rules(), sitePolicy)   // sitePolicy: the folder policy/ of the trusted base
//	decision, err := set.Decide(ctx, input)
//	if err == nil { err = decision.Refusal() }          // nil: the change may run
//
// The site's rules are Rego v1 modules of package site or site.…; they can only add findings:
//
//	package site
//
//	deny contains {"id": "SITE1", "unit": unit.name, "path": "intent.ticket", "msg": "no ticket; want intent: {ticket: …}"} if {
//		some unit in input.units
//		not unit.after.intent.ticket
//	}
//
// A site's ids are upper case, do not begin with KT or E_, and its modules have tests (*_test.rego beside them). What a rule says
// follows one form, "found; want what would pass", so that a refusal can show the two apart.
package policy

import (
	"context"
	"io/fs"
	"strings"
	"time"

	"github.com/open-policy-agent/opa/v1/rego"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/registry/merkle"
)

// Refusals of this package, beside the ids of the rules.
const (
	codeMissing = refusal.Code("KT021")            // a required rule is missing, renamed or without effect
	codePlugin  = refusal.Code("KT023")            // package plugin keeps it, before there is anything to judge
	codeCompile = refusal.Code("E_POLICY_COMPILE") // a module that must not be loaded
	codeLint    = refusal.Code("E_POLICY_LINT")    // a module that a host would load, and that is probably wrong
	codeError   = refusal.Code("E_POLICY_ERROR")   // a judgement that did not come to an end
	codeLimit   = refusal.Code("E_LIMIT")
	codeDecode  = refusal.Code("E_DECODE")
	codePath    = refusal.Code("E_PATH")
)

// Bounds.
const (
	maxInput = 8 << 20         // bytes of one input document
	maxTime  = 2 * time.Second // for one decision
	maxLayer = 4 << 20         // bytes of one layer's files
	maxFiles = 256             // in one layer
)

// Set is rules made ready to judge. It does not change and may be used by any number of goroutines.
type Set struct {
	digest merkle.Digest
	query  rego.PreparedEvalQuery
	limit  time.Duration // for one decision
	also   *Set          // judges too, nil if none does
}

// Load compiles the layers into one set and tries it. The first layer is the shipped rules; every further one is a site's policy
// folder, which may be empty or not exist. What is wrong with the layers is a *refusal.Error, all faults of a stage at once;
// any other error is a layer that could not be read.
func Load(layers ...fs.FS) (*Set, error) {
	p, err := checked(layers)
	if err != nil {
		return nil, err
	}
	return p.load()
}

// parsed reads the layers.
func parsed(layers []fs.FS) (*modules, error) {
	sources, err := read(layers)
	if err != nil {
		return nil, err
	}
	return sources.parse()
}

// checked reads the layers, and holds them against what a layer may be.
func checked(layers []fs.FS) (*modules, error) {
	p, err := parsed(layers)
	if err != nil {
		return nil, err
	}
	return p, p.check()
}

// load makes a set of modules that have been checked, and tries it.
func (p *modules) load() (set *Set, err error) {
	if err := p.runTests(); err != nil {
		return nil, err
	}
	if set, err = p.set(); err != nil {
		return nil, err
	}
	if err := set.try(); err != nil {
		return nil, err
	}
	return set, nil
}

// set compiles the modules.
func (p *modules) set() (set *Set, err error) {
	set = &Set{limit: maxTime}
	if set.digest, err = p.sources.digest(); err != nil {
		return nil, err
	}
	set.query, err = p.prepare()
	return set, err
}

// Digest is the kmo1 content root of the set's files, each under the number of its layer.
func (s *Set) Digest() merkle.Digest { return s.digest }

// And returns a set that judges by s and by the other: what either denies is denied. It judges a change that brings new rules with other
// things: s is the base's, the other the head's.
func (s *Set) And(other *Set) *Set {
	both := *s
	both.also = other
	return &both
}

// Rules are the digests of both sets where they are two, as an Input has them.
func (s *Set) Rules() []merkle.Digest {
	if s.also == nil {
		return nil
	}
	return []merkle.Digest{s.digest, s.also.digest}
}

// prepare compiles everything but tests and asks for the findings of each package in one query.
func (p *modules) prepare() (rego.PreparedEvalQuery, error) {
	compiler := p.compiler()
	if compiler.Compile(p.all(false)); compiler.Failed() {
		return rego.PreparedEvalQuery{}, compileRefusal(codeCompile, "the rules together", compiler.Errors)
	}
	ours := func(pkg string) bool { return !inSite(pkg) }
	terms := []string{p.terms("deny", ours), p.terms("deny", inSite), p.terms("warn", ours), p.terms("warn", inSite), p.terms("evaluated", ours)}
	query, err := rego.New(
		rego.Query("findings = ["+strings.Join(terms, ", ")+"]"),
		rego.Compiler(compiler),
		rego.Store(p.store()),
		rego.Capabilities(p.capabilities),
		rego.StrictBuiltinErrors(true),
	).PrepareForEval(context.Background())
	if err != nil {
		return query, compileRefusal(codeCompile, "the rules together", err)
	}
	return query, nil
}
