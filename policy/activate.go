package policy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/topdown"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/policy/trust"
	shipped "github.com/kindos/kmo/rego"
)

// corpus is the shipped inputs that each required rule must deny, and those that it must not.
type corpus struct {
	base  []byte             // a whole input document that passes
	cases map[string]verdict // by id
}

// verdict is the fixtures of one rule: by name, the patch that makes the input of base.
type verdict struct {
	Trip map[string][]operation `json:"trip"`
	Near map[string][]operation `json:"near"`
}

// operation is one step of a JSON patch (RFC 6902) with a value or none: add, replace, remove or test.
type operation struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value"`
}

func readCorpus() (*corpus, error) {
	files, err := shipped.Fixtures()
	if err != nil {
		return nil, err
	}
	c := &corpus{cases: map[string]verdict{}}
	if c.base, err = fs.ReadFile(files, "base.json"); err != nil {
		return nil, err
	}
	names, err := fs.Glob(files, "KT*.json")
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		text, err := fs.ReadFile(files, name)
		if err != nil {
			return nil, err
		}
		var v verdict
		strict := json.NewDecoder(bytes.NewReader(text))
		strict.DisallowUnknownFields()
		if err := strict.Decode(&v); err != nil {
			return nil, fmt.Errorf("fixture %s: %v", name, err)
		}
		c.cases[strings.TrimSuffix(path.Base(name), ".json")] = v
	}
	return c, nil
}

// input is the base with a patch, which OPA's own json.patch applies: an operation that it does not know, or whose target is not there,
// is an error.
func (c *corpus) input(patch []operation) ([]byte, error) {
	base, err := ast.ValueFromReader(bytes.NewReader(c.base))
	if err != nil {
		return nil, err
	}
	steps, err := ast.InterfaceToValue(append([]operation{}, patch...))
	if err != nil {
		return nil, err
	}
	var patched any
	err = topdown.GetBuiltin(ast.JSONPatch.Name)(topdown.BuiltinContext{}, []*ast.Term{ast.NewTerm(base), ast.NewTerm(steps)}, func(result *ast.Term) (err error) {
		patched, err = ast.JSON(result.Value)
		return err
	})
	if err != nil {
		return nil, err
	}
	return json.Marshal(patched)
}

// try runs every fixture: the set must deny what must trip, with that rule's id, and must not call a near miss by it.
func (s *Set) try() error {
	c, err := readCorpus()
	if err != nil {
		return err
	}
	for _, id := range shipped.IDs() {
		v := c.cases[id]
		if len(v.Trip) == 0 || len(v.Near) == 0 {
			return &refusal.Error{Code: codeMissing, Subject: "fixtures of " + id, Got: "none", Want: "one that must trip and one near miss"}
		}
		if err := s.tryAll(c, id, v.Trip, true); err != nil {
			return err
		}
		if err := s.tryAll(c, id, v.Near, false); err != nil {
			return err
		}
	}
	return nil
}

func (s *Set) tryAll(c *corpus, id string, patches map[string][]operation, trip bool) error {
	for _, name := range slices.Sorted(maps.Keys(patches)) {
		input, err := c.input(patches[name])
		if err != nil {
			return fmt.Errorf("fixture %s, %s: %v", id, name, err)
		}
		decision, err := s.Replay(context.Background(), input)
		if err != nil {
			return err
		}
		tripped := slices.ContainsFunc(decision.Denied, func(d Denial) bool { return d.ID == id })
		if trip && !tripped {
			return &refusal.Error{Code: codeMissing, Subject: id + " on the fixture " + strconv.Quote(name), Got: "not denied", Want: "rules that deny it"}
		}
		if !trip && tripped {
			return &refusal.Error{Code: codeMissing, Subject: id + " on the near miss " + strconv.Quote(name), Got: "denied", Want: "rules that let it pass"}
		}
	}
	return nil
}

// wayOutTime bounds all that is asked of rules that are not in force: who asks does nothing else meanwhile.
const wayOutTime = 5 * time.Second

// WayOut refuses a set whose site rules deny each of some changes, all of them ways to one end, which the set would judge once it is active: they
// touch no unit, and what the shipped rules say of them is not asked. what names the end, and input is the change that brings the set.
func (s *Set) WayOut(ctx context.Context, input Input, what string, ways []trust.Facts) error {
	bounded, cancel := context.WithTimeout(ctx, wayOutTime)
	defer cancel()
	input.Units, input.Totals.Before, input.Totals.Removed = nil, input.Totals.After, 0
	var denied []Denial
	for _, way := range ways {
		input.Commit, input.Time, input.Change = way.Commit, way.Time, way
		decision, err := s.Decide(bounded, input)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if bounded.Err() != nil && len(denied) > 0 {
			break
		}
		if err != nil { // that no judgement comes about is one, and would be for the others, too
			return &refusal.Error{Code: codeCompile, Subject: "policy/", Got: "no judgement of " + what + ": " + err.Error(), Want: fmt.Sprintf("rules that judge all of its forms within %v", wayOutTime)}
		}
		denied = slices.DeleteFunc(decision.Denied, func(d Denial) bool { return strings.HasPrefix(d.ID, "KT") })
		if len(denied) == 0 {
			return nil
		}
	}
	faults := make([]error, len(denied)) // of the last one
	for i, d := range denied {
		found, _, _ := strings.Cut(d.Msg, "; want ")
		faults[i] = &refusal.Error{Code: codeCompile, Subject: "policy/", Got: fmt.Sprintf("%s denies %s: %s", d.ID, what, found),
			Want: "rules that let it pass: once they are in force they judge it too, and it was found to pass for nobody, on no day of the week at no even hour"}
	}
	return errors.Join(faults...)
}
