package reconciler

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/reconciler/gate"
)

// observe asks every backend what exists on this host, one after the other: they answer from memory.
func (r *Reconciler) observe(ctx context.Context) ([]Have, error) {
	var all []Have
	for _, name := range r.backendNames() {
		list, err := r.Backends[name].Observe(ctx)
		if err != nil {
			return nil, fmt.Errorf("observing %s: %w", name, err)
		}
		for _, status := range list {
			all = append(all, Have{Backend: name, Status: status})
		}
	}
	return all, nil
}

// patience is how long a try is watched before the branch and the host are looked at again.
const patience = 15 * time.Second

// gate is the gate over what is observed anew at each probe. What a try changed may be watched for hours, a look at a time; going back is
// waited for.
func (r *Reconciler) gate(forward bool) gate.Gate {
	g := gate.Gate{Observe: r.statuses, Exec: r.exec}
	if forward {
		g.Patience, g.Memory = patience, r.watched
	}
	return g
}

func (r *Reconciler) statuses(ctx context.Context) (map[string]backends.Status, error) {
	list, err := r.observe(ctx)
	if err != nil {
		return nil, err
	}
	return byName(list), nil
}

func byName(list []Have) map[string]backends.Status {
	all := make(map[string]backends.Status, len(list))
	for _, have := range list {
		all[have.Name] = have.Status
	}
	return all
}

// exec runs a probe's command inside a workload.
func (r *Reconciler) exec(ctx context.Context, target gate.Target) (int, []byte, error) {
	execer, ok := r.Backends[target.Backend].(backends.Execer)
	if !ok {
		return 0, nil, fmt.Errorf("%s runs no commands inside workloads", target.Backend)
	}
	return execer.Exec(ctx, target.Workload, target.Probe.Argv)
}

// converge does the steps and returns the gate's verdict on what they changed. A unit is started when those it needs have passed their
// probes. Going forward, an old copy goes when everything new has passed its gate, or first where the two cannot stand side by
// side; going back, everything that can be done is done, whatever else fails. An error means that a backend did not answer.
func (r *Reconciler) converge(ctx context.Context, want *desired, steps []Step, forward bool) (gate.Finding, error) {
	finding, err := r.start(ctx, want, steps, forward)
	if forward && (err != nil || finding.Verdict != gate.Pass) {
		return finding, err
	}
	for _, step := range steps {
		if step.Op == Remove && ctx.Err() == nil {
			err = errors.Join(err, r.remove(ctx, step.Backend, step.Name, step.Reason))
		}
	}
	if err == nil && ctx.Err() == nil {
		if left := closeDoors(ctx, r.Host.Doors, want.plan.Workloads); left != nil { // what units have put there holds up no verdict
			r.Logger.Warn("closing doors; tried again after the next change", "folder", r.Host.Doors, "err", refusal.Clip(left.Error(), maxReason))
		}
	}
	return finding, err
}

// start does the Apply steps, in order, and watches what they started. Going forward the first that does not pass ends it; going back
// the others are started all the same, but those that need it.
func (r *Reconciler) start(ctx context.Context, want *desired, steps []Step, forward bool) (gate.Finding, error) {
	started, down := make(map[string]bool), make(map[string]bool) // units
	first := gate.Finding{Verdict: gate.Pass}                     // of what is not as it should be
	var silent error
	for _, step := range steps {
		if step.Op != Apply || ctx.Err() != nil {
			continue
		}
		finding, err := r.begin(ctx, want, step, down, forward)
		if err == nil && finding.Verdict == gate.Pass {
			started[step.Unit] = true
			continue
		}
		if forward {
			return finding, err
		}
		down[step.Unit], down[finding.Unit] = true, true
		silent = errors.Join(silent, err)
		if err == nil && first.Verdict == gate.Pass {
			first = finding
		}
	}
	// What a try changed is watched even if nothing is left to start: a try that was cut short has no verdict yet.
	targets := want.targets(func(unit string) bool { return started[unit] || forward && want.changed[unit] }, forward)
	finding := r.gate(forward).Watch(ctx, targets)
	if first.Verdict != gate.Pass {
		finding = first
	}
	return finding, silent
}

// begin does one Apply step once the units that it needs have passed their probes. What needs a unit that is down is down itself.
func (r *Reconciler) begin(ctx context.Context, want *desired, step Step, down map[string]bool, forward bool) (gate.Finding, error) {
	needs := want.needs(step.Name)
	if at := slices.IndexFunc(needs, func(unit string) bool { return down[unit] }); at >= 0 {
		return gate.Finding{Verdict: gate.Fail, Workload: step.Name, Unit: step.Unit, Gate: "needs", Evidence: needs[at] + " is down"}, nil
	}
	needed := want.targets(func(unit string) bool { return slices.Contains(needs, unit) }, false)
	if finding := r.gate(forward).Watch(ctx, needed); finding.Verdict != gate.Pass {
		return finding, nil
	}
	err := r.apply(ctx, step)
	if err == nil {
		return gate.Finding{Verdict: gate.Pass}, nil
	}
	if finding, blamed := blame(step, err); blamed {
		return finding, nil
	}
	return gate.Finding{}, fmt.Errorf("applying %s: %w", step.Name, err)
}

// blame tells a workload that is itself at fault from a backend that did not answer.
func blame(step Step, err error) (gate.Finding, bool) {
	var feature *backends.FeatureError
	var start *backends.StartError
	if !errors.As(err, &feature) && !errors.As(err, &start) && refusal.Of(err) == nil {
		return gate.Finding{}, false
	}
	return gate.Finding{Verdict: gate.Fail, Workload: step.Name, Unit: step.Unit, Gate: "start", Evidence: refusal.Clip(err.Error(), 500)}, true
}

// apply does one step: what it replaces goes first, once the backend has answered and says that it can run what comes.
func (r *Reconciler) apply(ctx context.Context, step Step) error {
	backend, ok := r.Backends[step.Backend]
	if !ok {
		return fmt.Errorf("%s: %w: %s", step.Name, errNoBackend, step.Backend)
	}
	if len(step.Replaces) > 0 {
		able, err := backend.Fingerprint(ctx)
		if err != nil {
			return fmt.Errorf("fingerprint of %s: %v", step.Backend, err) // whatever it is, the workload is not to blame
		}
		if err := able.Admit(step.Workload); err != nil {
			return err
		}
	}
	for _, old := range step.Replaces {
		for _, name := range r.backendNames() {
			if err := r.remove(ctx, name, old, "it shares "+fmt.Sprint(step.Because)+" with "+step.Name); err != nil {
				return err
			}
		}
	}
	begun := time.Now()
	err := openDoors(step.Workload)
	if err == nil {
		err = backend.Apply(ctx, step.Workload)
	}
	r.Logger.Debug("apply", "unit", step.Name, "backend", step.Backend, "stage", "apply", "took", time.Since(begun), "reason", step.Reason, "err", err)
	return err
}

func (r *Reconciler) remove(ctx context.Context, backend, name, reason string) error {
	begun := time.Now()
	err := r.Backends[backend].Remove(ctx, name)
	r.Logger.Debug("remove", "unit", name, "backend", backend, "stage", "apply", "took", time.Since(begun), "reason", reason, "err", err)
	if err != nil {
		return fmt.Errorf("removing %s from %s: %w", name, backend, err)
	}
	return nil
}

// doorTime is for clearing the doors that nobody sees any more.
const doorTime = 10 * time.Second

// openDoors makes the folders that a workload shares with others. Only they see them: the folder above is this agent's alone.
func openDoors(w backends.Workload) error {
	for _, door := range w.Doors {
		if err := os.MkdirAll(door.From, 0o700); err != nil {
			return err
		}
		if err := os.Chmod(door.From, 0o777|os.ModeSticky); err != nil { // each of them is another user
			return err
		}
	}
	return nil
}

// closeDoors removes the doors of units that no workload sees any more.
func closeDoors(ctx context.Context, folder string, workloads []backends.Workload) error {
	if folder == "" {
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, doorTime, fmt.Errorf("not cleared within %v", doorTime))
	defer cancel()
	open := map[string]bool{}
	for _, w := range workloads {
		for _, door := range w.Doors {
			open[door.Unit] = true
		}
	}
	found, err := os.ReadDir(folder)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	for _, unit := range found {
		if !open[unit.Name()] {
			err = errors.Join(err, removeTree(ctx, filepath.Join(folder, unit.Name())))
		}
	}
	_ = os.Remove(folder) // if it is empty
	return err
}

// removeTree removes a folder and all that is below, of any depth: os.RemoveAll holds a descriptor open for each level. What lies deeper is moved up
// to the first level, so that two are enough.
func removeTree(ctx context.Context, path string) error {
	top, err := os.OpenRoot(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer top.Close()
	for ctx.Err() == nil {
		names, err := children(top, ".")
		if err != nil {
			return err
		}
		if len(names) == 0 {
			return os.Remove(path)
		}
		for _, name := range names {
			if err := flatten(ctx, top, name); err != nil {
				return err
			}
		}
	}
	return context.Cause(ctx)
}

// flatten removes what has that name at the first level; folders in it are moved beside it, under names that are new.
func flatten(ctx context.Context, top *os.Root, name string) error {
	for ctx.Err() == nil {
		err := top.Remove(name)
		if err == nil || errors.Is(err, os.ErrNotExist) {
			return nil
		}
		names, listed := children(top, name)
		if listed != nil || len(names) == 0 {
			return errors.Join(err, listed)
		}
		for _, child := range names {
			at := filepath.Join(name, child)
			if top.Remove(at) == nil {
				continue
			}
			if err := top.Rename(at, rand.Text()); err != nil {
				return err
			}
		}
	}
	return context.Cause(ctx)
}

// children are some of the names in a folder, at most a thousand.
func children(top *os.Root, folder string) ([]string, error) {
	opened, err := top.Open(folder)
	if err != nil {
		return nil, err
	}
	defer opened.Close()
	names, err := opened.Readdirnames(1000)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return names, err
}

// Op is what a step does.
type Op string

// The operations.
const (
	Apply  Op = "apply"
	Remove Op = "remove"
)

// Step is one thing to do to the host, and why.
type Step struct {
	Op       Op                `json:"op"`
	Unit     string            `json:"unit"`
	Name     string            `json:"name"`
	Backend  string            `json:"backend"`
	Reason   string            `json:"reason"`
	Replaces []string          `json:"replaces,omitempty"` // for Apply: copies of the unit that must go first
	Because  []string          `json:"because,omitempty"`  // what they and the new copy cannot both have
	Workload backends.Workload `json:"-"`
}

// Have is a workload that exists, with the backend that has it.
type Have struct {
	Backend string `json:"backend"`
	backends.Status
}

// Unit is the unit a workload's name belongs to.
func (h Have) Unit() string { return unitOf(h.Name) }

// unitOf cuts the spec's eight digits off a workload's name.
func unitOf(name string) string {
	if at := strings.LastIndexByte(name, '-'); at > 0 {
		return name[:at]
	}
	return name
}

// Diff says what makes the host from what it has into what is wanted: first every Apply in the order of want, then every Remove in
// the reverse order of names. It is pure, and applying what it says makes the next Diff empty.
// exclusive says in words what two copies of a unit cannot both have; nothing means that they can stand side by side.
func Diff(want []backends.Workload, have []Have, exclusive func(old, new string) []string) []Step {
	type key struct{ backend, name string }
	wanted := make(map[key]bool, len(want))
	exists := make(map[key]backends.Status, len(have))
	copies := make(map[string][]Have)
	for _, h := range have {
		exists[key{h.Backend, h.Name}] = h.Status
		copies[h.Unit()] = append(copies[h.Unit()], h)
	}
	var steps []Step
	for _, w := range want {
		at := key{w.Backend, w.Name}
		wanted[at] = true
		status, ok := exists[at]
		reason := damage(status)
		if at := w.Image.Content; reason == "" && at != "" && status.Content != "" && status.Content != at {
			reason = "it stands on another copy of its image"
		}
		if ok && reason == "" {
			continue
		}
		step := Step{Op: Apply, Unit: w.Unit, Name: w.Name, Backend: w.Backend, Reason: reason, Workload: w}
		if !ok {
			step.Reason = "it is not there"
		}
		for _, other := range copies[w.Unit] {
			if other.Name == w.Name && other.Backend == w.Backend {
				continue
			}
			if !ok {
				step.Reason = "its spec changed from " + other.Name
			}
			if shared := exclusive(other.Name, w.Name); len(shared) > 0 {
				step.Replaces = append(step.Replaces, other.Name)
				step.Because = append(step.Because, shared...)
			}
		}
		steps = append(steps, step)
	}
	var removes []Step
	for _, h := range have {
		if !wanted[key{h.Backend, h.Name}] {
			removes = append(removes, Step{Op: Remove, Unit: h.Unit(), Name: h.Name, Backend: h.Backend, Reason: "the site does not ask for it"})
		}
	}
	sort.Slice(removes, func(i, j int) bool { return removes[i].Name > removes[j].Name })
	return append(steps, removes...)
}

// damage says what is wrong with a workload that exists, "" for nothing. A program in backoff is its backend's to start again.
func damage(s backends.Status) string {
	switch s.State {
	case backends.Damaged:
		return "it is damaged: " + s.Detail
	case backends.Exited:
		return "its program ended and stays so"
	}
	return ""
}
