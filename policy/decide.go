package policy

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/topdown"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/registry/merkle"
	shipped "github.com/kindos/kmo/rego"
)

// Decision is what the rules said about one change, with everything needed to say it again: the audit log keeps it.
type Decision struct {
	Denied    []Denial        `json:"denied,omitempty"` // sorted by id, unit and path; none and Evaluated complete: the change may run
	Waived    []Denial        `json:"waived,omitempty"` // what would be denied, but for a waiver in the input
	Warned    []Denial        `json:"warned,omitempty"`
	Evaluated []string        `json:"evaluated"` // ids of the shipped rules that looked, sorted
	Policy    merkle.Digest   `json:"policy"`    // the set that judged; of two, the base's
	Input     json.RawMessage `json:"input"`     // the very bytes that were judged; none of an input that was too large to be
	Took      time.Duration   `json:"took"`      // ns
}

// Denial is one finding of one rule.
type Denial struct {
	ID   string `json:"id"`             // KT…, a site's own, or E_… where no judgement came about
	Unit string `json:"unit,omitempty"` // "" for the change as a whole
	Msg  string `json:"msg"`            // "what was found; want what would pass"
	Path string `json:"path"`           // the field in unit.yaml, or the file
}

// Refusal is nil if the change may run. Otherwise it joins one *refusal.Error a denial, with the rule's id as its code. The zero Decision
// is a refusal, and so is one in which a required rule did not look.
func (d Decision) Refusal() error {
	if len(d.Denied) == 0 {
		if missing := unlooked(d.Evaluated, nil); len(missing) > 0 {
			return &refusal.Error{Code: codeMissing, Subject: "policy", Got: refusal.Clip(strings.Join(missing, ", "), 200) + " did not look at the change", Want: "every required rule evaluated"}
		}
		return nil
	}
	faults := make([]error, len(d.Denied))
	for i, denial := range d.Denied {
		faults[i] = denial.refusal()
	}
	return errors.Join(faults...)
}

func (d Denial) refusal() error {
	subject := d.Unit
	if subject == "" {
		subject = "the change"
	}
	if d.Path != "" {
		subject += ", " + d.Path
	}
	got, want, _ := strings.Cut(d.Msg, "; want ")
	return &refusal.Error{Code: refusal.Code(d.ID), Subject: subject, Got: got, Want: want}
}

// denialOf shows a judgement that did not come about as the denial it amounts to.
func denialOf(err error) Denial {
	e := refusal.Of(err)
	msg := e.Got
	if e.Want != "" {
		msg += "; want " + e.Want
	}
	return Denial{ID: string(e.Code), Path: e.Subject, Msg: msg}
}

// Decide judges one change. With a nil error the decision is complete, and its Refusal says whether the change may run. A
// *refusal.Error says that no judgement came about, and counts as a denial that the decision shows too; any other error is
// the caller's own context having ended, and then nothing was judged.
func (s *Set) Decide(ctx context.Context, input Input) (decision Decision, err error) {
	defer func() { // a value in the input that panics when it is written down
		if r := recover(); r != nil {
			err = &refusal.Error{Code: codeError, Subject: "policy input", Got: refusal.Clip(fmt.Sprintf("panic: %v", r), 200), Want: "values that can be written as JSON"}
			decision = Decision{Policy: s.digest, Denied: []Denial{denialOf(err)}}
		}
	}()
	input.Rules = s.Rules()
	input.fill()
	document, err := json.Marshal(input)
	if err != nil {
		err = &refusal.Error{Code: codeError, Subject: "policy input", Got: refusal.Clip(err.Error(), 200), Want: "values that can be written as JSON"}
		return Decision{Policy: s.digest, Denied: []Denial{denialOf(err)}}, err
	}
	return s.Replay(ctx, document)
}

// Replay judges an input document as Decide made it and the audit log keeps it: same set, same bytes, same decision.
func (s *Set) Replay(ctx context.Context, input []byte) (decision Decision, err error) {
	start := time.Now()
	decision = Decision{Policy: s.digest}
	if len(input) <= maxInput { // what is larger was not judged
		decision.Input = input
	}
	defer func() {
		if r := recover(); r != nil {
			err = &refusal.Error{Code: codeError, Subject: "policy", Got: refusal.Clip(fmt.Sprintf("panic: %v", r), 200), Want: "a judgement"}
		}
		if err != nil {
			decision.Denied, decision.Waived, decision.Warned, decision.Evaluated = nil, nil, nil, nil
			if refusal.Of(err) != nil {
				decision.Denied = []Denial{denialOf(err)}
			}
		}
		decision.Took = time.Since(start)
	}()
	value, err := decode(input)
	if err != nil {
		return decision, err
	}
	for set := s; set != nil; set = set.also {
		found, err := set.evaluate(ctx, value)
		if err != nil {
			return decision, err
		}
		if err := found.into(&decision, requiredBy(value)); err != nil {
			return decision, err
		}
	}
	return decision, decision.waive(input)
}

// waive moves what the input's waivers let pass out of the denials. What no unit is to blame for nobody waives.
func (d *Decision) waive(input []byte) error {
	if len(d.Denied) == 0 || !bytes.Contains(input, []byte(`"waivers"`)) {
		return nil
	}
	var facts struct {
		Change struct {
			Units []struct {
				Unit    string
				Waivers []struct {
					ID      string
					Missing *int
				}
			}
		}
	}
	if err := json.Unmarshal(input, &facts); err != nil {
		return &refusal.Error{Code: codeError, Subject: "policy input", Got: refusal.Clip(err.Error(), 200), Want: "an input document"}
	}
	granted := map[[2]string]bool{}
	for _, u := range facts.Change.Units {
		for _, w := range u.Waivers {
			granted[[2]string{u.Unit, w.ID}] = w.Missing != nil && *w.Missing == 0
		}
	}
	d.Denied = slices.DeleteFunc(d.Denied, func(denial Denial) bool {
		waived := denial.Unit != "" && granted[[2]string{denial.Unit, denial.ID}] && waivable(denial.ID)
		if waived {
			d.Waived = append(d.Waived, denial)
		}
		return waived
	})
	return nil
}

// waivable says whether a rule's denials can be waived: a site's own, and a shipped one whose annotations say so.
func waivable(id string) bool {
	if !strings.HasPrefix(id, "KT") {
		return !strings.HasPrefix(id, "E_")
	}
	list, err := annotations()
	return err == nil && slices.ContainsFunc(list, func(t Tripwire) bool { return t.ID == id && t.Waivable })
}

var annotations = sync.OnceValues(Tripwires)

// requiredBy lists the ids that the trust root requires beside the shipped ones.
func requiredBy(input ast.Object) []string {
	var ids []string
	if list, ok := member(member(input, "change"), "tripwires").(*ast.Array); ok {
		list.Foreach(func(id *ast.Term) {
			text, _ := id.Value.(ast.String)
			ids = append(ids, string(text))
		})
	}
	return ids
}

// findings are what the query answers, of all packages together. Only the shipped ones can say that a shipped rule looked.
type findings struct{ denied, siteDenied, warned, siteWarned, evaluated []any }

func (s *Set) evaluate(ctx context.Context, input ast.Value) (findings, error) {
	bounded, cancel := context.WithTimeout(ctx, s.limit)
	defer cancel()
	results, err := s.query.Eval(bounded, rego.EvalParsedInput(input))
	switch {
	case ctx.Err() != nil:
		return findings{}, fmt.Errorf("policy decision: %w", ctx.Err())
	case bounded.Err() != nil || topdown.IsCancel(err):
		return findings{}, &refusal.Error{Code: codeError, Subject: "policy", Got: "timeout: no decision after " + s.limit.String(),
			Want: "rules that are done in time: no loops over pairs of units"}
	case err != nil:
		return findings{}, &refusal.Error{Code: codeError, Subject: "policy", Got: refusal.Clip(err.Error(), 300), Want: "rules that come to an end without an error"}
	}
	undefined := &refusal.Error{Code: codeError, Subject: "policy", Got: "an undefined result", Want: "a set of findings of every package"}
	if len(results) != 1 {
		return findings{}, undefined
	}
	lists, ok := results[0].Bindings["findings"].([]any)
	if !ok || len(lists) != 5 {
		return findings{}, undefined
	}
	var found findings
	for i, into := range []*[]any{&found.denied, &found.siteDenied, &found.warned, &found.siteWarned, &found.evaluated} {
		sets, ok := lists[i].([]any)
		if !ok {
			return findings{}, undefined
		}
		for _, set := range sets {
			members, ok := set.([]any)
			if !ok {
				return findings{}, undefined
			}
			*into = append(*into, members...)
		}
	}
	return found, nil
}

// into adds what one set found to the decision, and refuses findings that say nothing and required rules that did not look.
func (f findings) into(d *Decision, required []string) error {
	denied, err := denials(f.denied, f.siteDenied)
	if err != nil {
		return err
	}
	warned, err := denials(f.warned, f.siteWarned)
	if err != nil {
		return err
	}
	d.Denied, d.Warned = sorted(append(d.Denied, denied...)), sorted(append(d.Warned, warned...))
	looked := []string{string(codeMissing), string(codePlugin)} // the one happens here, and without the other nothing would have come here
	for _, id := range f.evaluated {
		looked = append(looked, fmt.Sprint(id))
	}
	d.Evaluated = append(d.Evaluated, looked...)
	slices.Sort(d.Evaluated)
	d.Evaluated = slices.Compact(d.Evaluated)
	if missing := unlooked(looked, required); len(missing) > 0 {
		return &refusal.Error{Code: codeMissing, Subject: "policy", Got: refusal.Clip(strings.Join(missing, ", "), 200) + " did not look at the change", Want: "every required rule evaluated"}
	}
	return nil
}

// unlooked lists the shipped and the required ids that are not among the evaluated, sorted.
func unlooked(evaluated, required []string) []string {
	missing := slices.DeleteFunc(slices.Concat(shipped.IDs(), required), func(id string) bool { return slices.Contains(evaluated, id) })
	slices.Sort(missing)
	return slices.Compact(missing)
}

// denials reads findings. One that is not of the agreed form is an error: a denial must not get lost for its form.
func denials(ours, sites []any) ([]Denial, error) {
	var list []Denial
	for i, one := range slices.Concat(ours, sites) {
		d, ok := denialFrom(one)
		if shippedID := strings.HasPrefix(d.ID, "KT"); !ok || shippedID != (i < len(ours)) {
			return nil, &refusal.Error{Code: codeError, Subject: "policy", Got: "a finding " + refusal.Clip(fmt.Sprint(one), 200),
				Want: `{"id", "unit", "path", "msg"}, all of them texts; a site's id in upper case, without KT or E_ before it`}
		}
		list = append(list, d)
	}
	return list, nil
}

// sorted is the list in its order, each finding once.
func sorted(list []Denial) []Denial {
	slices.SortFunc(list, func(a, b Denial) int {
		return cmp.Or(strings.Compare(a.ID, b.ID), strings.Compare(a.Unit, b.Unit), strings.Compare(a.Path, b.Path), strings.Compare(a.Msg, b.Msg))
	})
	return slices.Compact(list)
}

func denialFrom(finding any) (Denial, bool) {
	fields, ok := finding.(map[string]any)
	if !ok || len(fields) != 4 {
		return Denial{}, false
	}
	text := func(key string, n int) string {
		t, isText := fields[key].(string)
		ok = ok && isText
		return refusal.Clip(t, n)
	}
	d := Denial{ID: text("id", 40), Unit: text("unit", 200), Path: text("path", 400), Msg: text("msg", 1000)}
	return d, ok && d.Msg != "" && plainID(d.ID)
}

// plainID says whether a rule may call itself so: 2 to 32 of A–Z, 0–9, "_" and "-", a letter first.
func plainID(id string) bool {
	odd := func(r rune) bool { return !strings.ContainsRune("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-", r) }
	return len(id) >= 2 && len(id) <= 32 && id[0] >= 'A' && id[0] <= 'Z' && !strings.HasPrefix(id, "E_") && strings.IndexFunc(id, odd) < 0
}
