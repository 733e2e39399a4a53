package reconciler

import (
	"io/fs"
	"sync"

	"github.com/kindos/kmo/policy/trust"
	"github.com/kindos/kmo/reconciler/template"
)

// Declare tells trust what units say of themselves, read by the one decoder that also renders them. The site that was asked for last is
// kept: trust asks for one unit after the other.
func Declare() func(tree fs.FS, unit string) (trust.Declared, error) {
	var mu sync.Mutex
	var loader template.Loader
	var id string
	var site *template.Site
	return func(tree fs.FS, name string) (trust.Declared, error) {
		mu.Lock()
		defer mu.Unlock()
		objects, known := tree.(trust.Tree)
		if !known || site == nil || objects.ObjectID(".") != id {
			loaded, err := loader.Load(tree)
			if err != nil {
				return trust.Declared{}, err
			}
			site, id = loaded, ""
			if known {
				id = objects.ObjectID(".")
			}
		}
		unit := site.Unit(name)
		if unit == nil {
			return trust.Declared{Tier: -1}, nil
		}
		declared := trust.Declared{Tier: unit.Tier, Profile: string(unit.Profile), Rollback: unit.Intent != nil && unit.Intent.Kind == "rollback"}
		for _, need := range unit.Needs {
			declared.Needs = append(declared.Needs, string(need))
		}
		return declared, nil
	}
}
