package reconciler

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

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
	changed  map[string]bool // units whose workload, or what is asked of it, is not the good commit's
	probes   []gate.Target   // of every workload; made by all
	prints   map[string]backends.Fingerprint
	withheld map[string]error // units that are not in the plan although they are placed, and why; their copies are left as they are
	ready    bool             // judged, fetched, and nothing withheld
}

// DecisionEntry is what the audit log keeps of a decision: enough to decide again.
type DecisionEntry struct {
	About
	Decision policy.Decision `json:"decision"`
}

// judge says whether a commit may run here, and fetches what it needs. The stage is where it was refused.
func (r *Reconciler) judge(ctx context.Context, rec Record, head Commit) (next *desired, stage string, err error) {
	next, stage, err = r.assess(ctx, rec, head)
	if next == nil {
		return nil, stage, err
	}
	if err := r.Trust.Cool(ctx, next.facts); err != nil {
		return nil, "trust", err
	}
	if err := r.ruling(rec, next, err); err != nil {
		return nil, "policy", err
	}
	if stage, err := rec.obstacle(next); err != nil {
		return nil, stage, err
	}
	if err := r.fetch(ctx, next); err != nil {
		return nil, "fetch", err
	}
	return next, "", nil
}

// assess establishes everything about a commit that can be known without fetching its images' bytes or touching the host. Where the rules
// came to no judgement, next holds the decision that says so beside the error: it is a denial like others.
func (r *Reconciler) assess(ctx context.Context, rec Record, head Commit) (next *desired, stage string, err error) {
	good, err := r.goodCommit(ctx, rec)
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
	next.compare(rec)
	stage, err = r.decide(ctx, rec, good, next)
	if err != nil && next.decision.Denied == nil {
		return nil, stage, err
	}
	return next, stage, err
}

// decide has the rules judge the change from good to next. The stage is where it ended.
func (r *Reconciler) decide(ctx context.Context, rec Record, good, next *desired) (stage string, err error) {
	input, err := r.input(ctx, rec, good, next)
	if err != nil {
		return "describe", err
	}
	set, err := r.rules(ctx, next.facts, next.commit)
	if err == nil {
		err = r.canGo(ctx, input, next)
	}
	if err != nil {
		return "policy", err
	}
	next.decision, err = set.Decide(ctx, input)
	if err != nil {
		return "policy", err
	}
	return "", nil
}

// ruling puts a decision on record and says what it comes to; err is why the rules came to none.
func (r *Reconciler) ruling(rec Record, next *desired, err error) error {
	if err := r.recordDecision(rec, next); err != nil {
		return err
	}
	if err != nil {
		return err
	}
	return next.decision.Refusal()
}

// obstacle is what keeps a commit that the rules let pass from running here. The stage is where it is refused.
func (rec *Record) obstacle(next *desired) (stage string, err error) {
	faults := slices.Clone(next.plan.Lacks)
	if !next.facts.Revert { // that goes back to what is kept there
		for _, workload := range next.plan.Workloads {
			faults = append(faults, rec.leavesKept(workload))
		}
	}
	if err := errors.Join(faults...); err != nil {
		return "render", err
	}
	if bad := next.repeats(rec.Bad...); bad != nil {
		return "quarantine", &refusal.Error{Code: "E_FAILED_BEFORE", Subject: "unit " + bad.Unit,
			Got:  fmt.Sprintf("%s, which failed here on %s in %s: %s: %s", bad.Workload, bad.Backend, bad.Commit, bad.Gate, bad.Evidence),
			Want: "a commit that changes the unit, the backend it runs on, or what is asked of it"}
	}
	return "", nil
}

// leavesKept refuses a workload with kept paths whose unit runs on another backend: each keeps them for itself, and there it would begin without.
func (rec *Record) leavesKept(w backends.Workload) error {
	if len(w.Overlay.Keep) == 0 {
		return nil
	}
	for name, placement := range rec.Allowed {
		if unitOf(name) == w.Unit && placement.Backend != w.Backend {
			return &refusal.Error{Code: "E_KEEP", Subject: "unit " + w.Unit,
				Got:  fmt.Sprintf("it runs on %s, which has what is in %s; on %s it would begin without", placement.Backend, strings.Join(w.Overlay.Keep, ", "), w.Backend),
				Want: fmt.Sprintf("backends: [%s] for it; or a commit that moves it without overlay.keep, and one that keeps anew", placement.Backend)}
		}
	}
	return nil
}

// rules returns the rules of the last accepted commit, which judge the next; where none was accepted yet, the new commit's own. A policy that
// comes with other changes, in commits of its own, judges them as well.
// The new commit's rules must load too, whoever judges: a set that would not is refused before it can count.
func (r *Reconciler) rules(ctx context.Context, facts trust.Facts, head Commit) (*policy.Set, error) {
	own, err := r.sets.of(r.Rules, head.Tree)
	if err != nil {
		return nil, err
	}
	if facts.Base == "" {
		return own, nil
	}
	commit, err := r.Source.At(ctx, facts.Base)
	if err != nil {
		return nil, fmt.Errorf("the last accepted commit: %w", err)
	}
	base, err := r.sets.of(r.Rules, commit.Tree)
	if err != nil || !facts.Apart {
		return base, err
	}
	return base.And(own), nil
}

// canGo refuses site rules that are not in force yet and would keep themselves: that let no removal of theirs pass, or no host's revert. A revert
// is not asked: what it brings was in force.
func (r *Reconciler) canGo(ctx context.Context, input policy.Input, next *desired) error {
	facts, tree := next.facts, next.commit.Tree
	if tree.ObjectID("policy") == "" || facts.Revert || facts.Base != "" && !facts.Policy {
		return nil
	}
	own, err := r.sets.of(r.Rules, tree)
	if err != nil {
		return err
	}
	removals, reverts, err := r.Trust.WaysOut(next.commit, facts)
	if err != nil {
		return err
	}
	return errors.Join(own.WayOut(ctx, input, "the removal of policy/ alone, whoever signs and approves it", removals),
		own.WayOut(ctx, input, "a host's revert of the commit that brings it", reverts))
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
	if err == nil {
		err = r.ours(site.Config)
	}
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
	return &desired{commit: commit, site: site, plan: plan, prints: host.Fingerprints}, nil
}

// ours refuses a site that is not the one this host follows, or that does not know the host's zone: nothing would run, and well.
func (r *Reconciler) ours(site template.Config) error {
	got := fmt.Sprintf("site %s, branch %s, zones %v", site.Site, site.Branch, site.Zones)
	if string(site.Site) != r.Trust.Site || string(site.Branch) != r.Trust.Branch || !slices.Contains(site.Zones, template.Name(r.Host.Zone)) {
		return &refusal.Error{Code: "E_FIT", Subject: "site.yaml", Got: refusal.Clip(got, 300),
			Want: fmt.Sprintf("what this host's agent.yaml says: site %s, branch %s, zone %s", r.Trust.Site, r.Trust.Branch, r.Host.Zone)}
	}
	return nil
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

// goodCommit returns the good commit, as far as it can be rendered here; nothing of it is judged or fetched for that. Before there is a
// good commit it has no site.
func (r *Reconciler) goodCommit(ctx context.Context, rec Record) (*desired, error) {
	if rec.Good == "" {
		return &desired{}, nil
	}
	if r.good != nil && r.good.commit.ID == rec.Good {
		return r.good, nil
	}
	commit, err := r.Source.At(ctx, rec.Good)
	if err != nil {
		return nil, err
	}
	good, err := r.render(ctx, commit)
	if refusal.Of(err) != nil { // it fits this host no more: what comes next can be judged all the same
		good = &desired{commit: commit}
		good.site, err = r.loader.Load(commit.Tree)
	}
	if err != nil {
		return nil, err
	}
	r.good, r.vitals = good, newVitals()
	return good, nil
}

// goodPlan returns the good commit as it must run here, with its images: nothing, before there is one. What cannot run now is withheld.
func (r *Reconciler) goodPlan(ctx context.Context, rec *Record) (*desired, error) {
	good, err := r.goodCommit(ctx, *rec)
	if err != nil || rec.Good == "" || good.ready {
		return good, err
	}
	if good, err = r.render(ctx, good.commit); err != nil {
		return nil, err
	}
	r.permit(ctx, rec, good)
	missing := make(map[string]error)
	for i, err := range r.contents(ctx, good) {
		if err != nil {
			missing[good.plan.Workloads[i].Unit] = err
		}
	}
	for unit, why := range missing {
		good.withhold(unit, why)
	}
	good.ready = len(good.withheld) == 0
	r.good = good
	return good, nil
}

// permit has the rules judge what the good commit would run here and they have not let run yet: a label, a zone or a backend of this host
// changed. What they do not let run is withheld.
func (r *Reconciler) permit(ctx context.Context, rec *Record, good *desired) {
	var placed []string // units
	for _, workload := range slices.Clone(good.plan.Workloads) {
		if err := rec.leavesKept(workload); err != nil {
			good.withhold(workload.Unit, err)
		} else if !rec.permits(workload) {
			placed = append(placed, workload.Unit)
		}
	}
	if len(placed) == 0 {
		return
	}
	var err error
	if good.facts, err = r.Trust.Verify(ctx, good.commit, good.commit, r.Source); err == nil {
		_, err = r.decide(ctx, *rec, good, good)
		if err == nil || good.decision.Denied != nil {
			err = r.ruling(*rec, good, err)
		}
	}
	if err == nil {
		rec.Allowed = good.placements()
		return
	}
	for _, unit := range placed {
		good.withhold(unit, fmt.Errorf("newly placed by a change of this host: %w", err))
	}
}

// permits says whether the rules have let a workload run on this host, on that backend.
func (rec *Record) permits(w backends.Workload) bool {
	allowed, known := rec.Allowed[w.Name]
	tried, trial := rec.Trial[w.Name]
	return known && allowed.Backend == w.Backend || trial && tried.Backend == w.Backend
}

// fetch sets every workload's image content.
func (r *Reconciler) fetch(ctx context.Context, next *desired) error {
	for i, err := range r.contents(ctx, next) {
		if err != nil {
			return fmt.Errorf("%s: %w", next.plan.Workloads[i].Unit, err)
		}
	}
	return nil
}

// contents sets the image content of every workload that it can be had for. The errors are one for each workload.
func (r *Reconciler) contents(ctx context.Context, d *desired) []error {
	return r.ask(ctx, d, func(ctx context.Context, workload *backends.Workload, _ int) error {
		image, err := r.Images.Fetch(ctx, workload.Image, workload.Format)
		if err == nil {
			workload.Image = image
		}
		return err
	})
}

// errSilent is why an image is not waited for any longer.
var errSilent = errors.New("it is not here yet, and waited for")

// leastWait is how long a look that has waited enough for registries still waits for what is on this host's own disk.
const leastWait = time.Second

// ask asks about every workload at once: how long a look waits depends on no number of images. Whoever answers bounds how much is done at a time.
func (r *Reconciler) ask(ctx context.Context, d *desired, do func(context.Context, *backends.Workload, int) error) []error {
	if r.Wait > 0 {
		begun := time.Now()
		defer func() { r.waited += time.Since(begun) }()
		var end context.CancelFunc
		ctx, end = context.WithTimeoutCause(ctx, max(r.Wait-r.waited, leastWait), errSilent)
		defer end()
	}
	errs := make([]error, len(d.plan.Workloads))
	var all sync.WaitGroup
	for i := range errs {
		all.Go(func() { errs[i] = do(ctx, &d.plan.Workloads[i], i) })
	}
	all.Wait()
	return errs
}

func (r *Reconciler) backendNames() []string {
	return slices.Sorted(maps.Keys(r.Backends))
}
