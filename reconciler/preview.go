package reconciler

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"

	"github.com/kindos/kmo/policy"
	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/policy/trust"
	"github.com/kindos/kmo/reconciler/template"
)

// Preview is what a commit would do to this host.
type Preview struct {
	Commit   string           `json:"commit"`
	Good     string           `json:"good,omitempty"`  // what it is compared with
	Stage    string           `json:"stage,omitempty"` // where it would be refused; empty if it would run
	Refusals []*refusal.Error `json:"refusals,omitempty"`
	Facts    trust.Facts      `json:"facts"`
	Policy   string           `json:"policy,omitempty"`    // digest of the rules that judged; "" if it did not come to that
	Rules    int              `json:"evaluated,omitempty"` // how many of the shipped rules looked
	Warned   []policy.Denial  `json:"warned,omitempty"`
	Steps    []Step           `json:"steps"`
	Skipped  []template.Skip  `json:"skipped,omitempty"` // units not placed on this host, and why
	Changes  []Change         `json:"changes"`

	Decision policy.Decision `json:"-"` // with its input, for who asks about the rules; the zero value if it did not come to that
}

// Change is one field of a unit that differs. A missing side is null.
type Change struct {
	Unit   string `json:"unit"`
	Path   string `json:"path"`
	Before any    `json:"before"`
	After  any    `json:"after"`
}

// Preview says what would happen if commit were the head. It changes nothing on the host and nothing in kMO's state.
func (r *Reconciler) Preview(ctx context.Context, id string) (Preview, error) {
	preview := Preview{Commit: id}
	rec, err := r.load()
	if err != nil {
		return preview, err
	}
	preview.Good = rec.Good
	r.fingerprints, r.waited = nil, 0
	commit, err := r.Source.At(ctx, id)
	if err != nil {
		return preview, err
	}
	next, stage, err := r.assess(ctx, rec, commit)
	if next != nil {
		preview.Facts, preview.Decision, preview.Skipped = next.facts, next.decision, next.plan.Skipped
		preview.Warned = next.decision.Warned
		preview.Policy, preview.Rules = next.decision.Policy.String(), len(next.decision.Evaluated)
	}
	if err == nil {
		stage, err = "policy", next.decision.Refusal()
	}
	if err == nil {
		stage, err = rec.obstacle(next)
	}
	if err == nil {
		stage, err = "trust", r.Trust.CheckFresh(ctx, commit, r.Source)
	}
	if err != nil {
		preview.Stage, preview.Refusals = stage, refusal.All(err)
		if len(preview.Refusals) == 0 {
			return preview, fmt.Errorf("%s: %w", stage, err)
		}
	}
	if next == nil {
		return preview, nil
	}
	good, err := r.goodCommit(ctx, rec)
	if err != nil {
		return preview, err
	}
	have, err := r.observe(ctx)
	if err != nil {
		return preview, err
	}
	preview.Steps = next.steps(have, exclusive(good, next))
	preview.Changes, err = changes(good, next)
	return preview, err
}

// changes lists the fields of every unit that differs, sorted by unit and path.
func changes(good, next *desired) ([]Change, error) {
	var list []Change
	names := slices.Concat(good.names(), next.names())
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		before, err := plain(good.unit(name))
		if err != nil {
			return nil, err
		}
		after, err := plain(next.unit(name))
		if err != nil {
			return nil, err
		}
		walk("", before, after, func(path string, before, after any) {
			list = append(list, Change{Unit: name, Path: path, Before: before, After: after})
		})
	}
	return list, nil
}

// plain is a value as its JSON has it.
func plain(value any) (any, error) {
	text, err := json.Marshal(value)
	if err != nil {
		return nil, fmt.Errorf("encoding a unit: %w", err)
	}
	var out any
	err = json.Unmarshal(text, &out)
	return out, err
}

// walk calls report for every leaf that differs, in the order of paths; of what is new or gone, too.
func walk(path string, before, after any, report func(path string, before, after any)) {
	if reflect.DeepEqual(before, after) {
		return
	}
	left, leftIs := before.(map[string]any)
	right, rightIs := after.(map[string]any)
	if !leftIs && before != nil || !rightIs && after != nil || len(left)+len(right) == 0 {
		report(path, before, after)
		return
	}
	keys := slices.Sorted(maps.Keys(left))
	keys = append(keys, slices.Sorted(maps.Keys(right))...)
	slices.Sort(keys)
	for _, key := range slices.Compact(keys) {
		sub := key
		if path != "" {
			sub = path + "." + key
		}
		walk(sub, left[key], right[key], report)
	}
}
