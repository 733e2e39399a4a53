// Package rego holds the rules that kMO ships: the tripwires KT001… and the tier rules, which no repository can switch off.
//
// The modules are Rego v1, one package a theme under kmo. Each module has
//
//	deny contains {"id", "unit", "path", "msg"}   what must not be; the same for warn
//	evaluated contains id                         that the rule looked, and had what it needed to look
//
// and an annotation on each rule: title, description, the id, what passes, and whether a waiver can pass it. The input is
// policy.Input as JSON. Go code checks the input's shape before any rule sees it, so the rules may take types for granted.
//
// limits.json holds the numbers (data.limits), capabilities.json the names of the builtins that rules may call and of those that
// they may not; a builtin in neither list is new and not allowed. fixtures/ holds for each tripwire inputs that must trip
// it and near misses that must not, as JSON patches of base.json; they run whenever a set of rules is made active.
package rego

import (
	"embed"
	"io/fs"
	"slices"
)

//go:embed confinement.rego freeze.rego hooks.rego images.rego kernel.rego mounts.rego network.rego past.rego plan.rego removal.rego resources.rego secrets.rego separation.rego tiers.rego
//go:embed limits.json capabilities.json
var rules embed.FS

//go:embed fixtures
var fixtures embed.FS

// Rules returns the shipped modules with limits.json and capabilities.json. Their tests (*_test.rego) stay with the source.
func Rules() fs.FS { return rules }

// Fixtures returns base.json and one file a tripwire.
func Fixtures() (fs.FS, error) { return fs.Sub(fixtures, "fixtures") }

// Required says which ids each shipped package must have evaluated. The package kmo.plan only makes lists.
func Required() map[string][]string {
	return map[string][]string{
		"kmo.confinement": {"KT001", "KT002", "KT005", "KT010", "KT011", "KT014"},
		"kmo.freeze":      {"KT017"},
		"kmo.hooks":       {"KT027"},
		"kmo.images":      {"KT006", "KT007", "KT008", "KT009"},
		"kmo.kernel":      {"KT012"},
		"kmo.mounts":      {"KT003", "KT004", "KT022"},
		"kmo.network":     {"KT025", "KT026"},
		"kmo.past":        {"KT024", "KT028"},
		"kmo.plan":        nil,
		"kmo.removal":     {"KT016"},
		"kmo.resources":   {"KT013"},
		"kmo.secrets":     {"KT015"},
		"kmo.separation":  {"KT020"},
		"kmo.tiers":       {"KT018", "KT019"},
	}
}

// IDs returns every required id, sorted.
func IDs() []string {
	var all []string
	for _, ids := range Required() {
		all = append(all, ids...)
	}
	slices.Sort(all)
	return all
}
