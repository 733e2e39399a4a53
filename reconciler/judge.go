package reconciler

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/policy"
	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/policy/trust"
	"github.com/kindos/kmo/reconciler/gate"
	"github.com/kindos/kmo/reconciler/template"
)

// desired is a commit rendered for this host.
type desired struct {
	commit   Commit
	facts    trust.Facts
	site     *template.Site
	plan     template.Plan
	decision policy.Decision
	changed  map[string]bool // units whose workload is not the good commit's
	probes   []gate.Target   // of every workload; made by all
	wanted   map[string]bool // names of the workloads; made by runs
}

// DecisionEntry is what the audit log keeps of a decision: enough to decide again.
type DecisionEntry struct {
	Commit   string          `json:"commit"`
	Host     string          `json:"host"`
	Decision policy.Decision `json:"decision"`
}

// judge says whether a commit may run here, and fetches what it needs. The stage is where it was refused.
func (r *Reconciler) judge(ctx context.Context, rec Record, head Commit) (next *desired, stage string, err error) {
	next, stage, err = r.assess(ctx, rec, head)
	if next == nil {
		return nil, stage, err
	}
	if err := r.recordDecision(rec, next); err != nil {
		return nil, "policy", err
	}
	if err == nil {
		err = next.decision.Refusal()
	}
	if err != nil {
		return nil, "policy", err
	}
	if err := errors.Join(next.plan.Lacks...); err != nil {
		return nil, "render", err
	}
	for _, bad := range rec.Bad {
		if next.runs(bad.Workload) {
			return nil, "quarantine", &refusal.Error{Code: "E_FAILED_BEFORE", Subject: "unit " + bad.Unit,
				Got:  fmt.Sprintf("%s, which failed here in %s: %s: %s", bad.Workload, bad.Commit, bad.Gate, bad.Evidence),
				Want: "a commit that changes the unit"}
		}
	}
	if err := r.fetch(ctx, next); err != nil {
		return nil, "fetch", err
	}
	return next, "", nil
}

// assess establishes everything about a commit that can be known without fetching its images' bytes or touching the host. Where the rules
// came to no judgement, next holds the decision that says so beside the error: it is a denial like others.
func (r *Reconciler) assess(ctx context.Context, rec Record, head Commit) (next *desired, stage string, err error) {
	good, err := r.goodPlan(ctx, rec)
	if err != nil {
		return nil, "render", fmt.Errorf("the good commit: %w", err)
	}
	facts, err := r.Trust.Verify(ctx, good.commit, head, r.Source)
	if err != nil {
		return nil, "trust", err
	}
	next, err = r.render(ctx, head)
	if err != nil {
		return nil, "render", err
	}
	next.facts = facts
	next.compare(good)
	input, err := r.input(ctx, good, next)
	if err != nil {
		return nil, "describe", err
	}
	set, err := r.rules(ctx, facts.Base, head)
	if err != nil {
		return nil, "policy", err
	}
	next.decision, err = set.Decide(ctx, input)
	switch {
	case refusal.Of(err) != nil:
		return next, "policy", err
	case err != nil: // nothing was judged
		return nil, "policy", err
	}
	return next, "", nil
}

// rules returns the rules of the last accepted commit, which judge the next; where none was accepted yet, the new commit's own.
// The new commit's rules must load too, whoever judges: a set that would not is refused before it can count.
func (r *Reconciler) rules(ctx context.Context, accepted string, head Commit) (*policy.Set, error) {
	own, err := r.sets.of(r.Rules, head.Tree)
	if err != nil {
		return nil, err
	}
	if accepted == "" {
		return own, nil
	}
	commit, err := r.Source.At(ctx, accepted)
	if err != nil {
		return nil, fmt.Errorf("the last accepted commit: %w", err)
	}
	return r.sets.of(r.Rules, commit.Tree)
}

// ruleCache keeps the sets that were loaded last, by the object id of their folder: loading one takes longer than deciding.
type ruleCache struct {
	ids  [2]string
	sets [2]*policy.Set
}

func (c *ruleCache) of(load func(fs.FS) (*policy.Set, error), tree trust.Tree) (*policy.Set, error) {
	id := tree.ObjectID("policy")
	if id == "" {
		id = "none"
	}
	if at := slices.Index(c.ids[:], id); at >= 0 {
		return c.sets[at], nil
	}
	var folder fs.FS
	if id != "none" {
		sub, err := fs.Sub(tree, "policy")
		if err != nil {
			return nil, fmt.Errorf("the site's policy: %v", err)
		}
		folder = sub
	}
	set, err := load(folder)
	if err != nil {
		return nil, err
	}
	c.ids, c.sets = [2]string{id, c.ids[0]}, [2]*policy.Set{set, c.sets[0]}
	return set, nil
}

// render loads a commit's site and renders it for this host.
func (r *Reconciler) render(ctx context.Context, commit Commit) (*desired, error) {
	site, err := r.loader.Load(commit.Tree)
	if err != nil {
		return nil, err
	}
	host, err := r.host(ctx)
	if err != nil {
		return nil, err
	}
	plan, err := site.Render(host)
	if err != nil {
		return nil, err
	}
	return &desired{commit: commit, site: site, plan: plan}, nil
}

// host is the facts of this host with what its backends can do now.
func (r *Reconciler) host(ctx context.Context) (template.Host, error) {
	host := r.Host
	if r.fingerprints == nil {
		prints := make(map[string]backends.Fingerprint, len(r.Backends))
		for _, name := range r.backendNames() {
			print, err := r.Backends[name].Fingerprint(ctx)
			if err != nil {
				return host, fmt.Errorf("fingerprint of %s: %w", name, err)
			}
			prints[name] = print
		}
		r.fingerprints = prints
	}
	host.Fingerprints = r.fingerprints
	return host, nil
}

// load renders a commit that was accepted earlier and fetches what it needs; nothing about it is judged again.
func (r *Reconciler) load(ctx context.Context, id string) (*desired, error) {
	commit, err := r.Source.At(ctx, id)
	if err != nil {
		return nil, err
	}
	next, err := r.render(ctx, commit)
	if err != nil {
		return nil, err
	}
	return next, r.fetch(ctx, next)
}

// goodPlan returns the good commit as it must run here: nothing, before there is one.
func (r *Reconciler) goodPlan(ctx context.Context, rec Record) (*desired, error) {
	if rec.Good == "" {
		return &desired{}, nil
	}
	if r.good == nil || r.good.commit.ID != rec.Good {
		good, err := r.load(ctx, rec.Good)
		if err != nil {
			return nil, err
		}
		r.good, r.vitals = good, newVitals()
	}
	return r.good, nil
}

// fetch sets every workload's image content.
func (r *Reconciler) fetch(ctx context.Context, next *desired) error {
	for i := range next.plan.Workloads {
		workload := &next.plan.Workloads[i]
		image, err := r.Images.Fetch(ctx, workload.Image, workload.Format)
		if err != nil {
			return fmt.Errorf("%s: %w", workload.Unit, err)
		}
		workload.Image = image
	}
	return nil
}

func (r *Reconciler) backendNames() []string {
	return slices.Sorted(maps.Keys(r.Backends))
}
