package reconciler

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/policy"
	"github.com/kindos/kmo/policy/trust"
	"github.com/kindos/kmo/reconciler/gate"
	"github.com/kindos/kmo/reconciler/template"
)

// unit returns the site's unit of that name, nil if there is none.
func (d *desired) unit(name string) *template.Unit {
	if d.site == nil {
		return nil
	}
	return d.site.Unit(name)
}

// names lists the site's units; none before there is a commit.
func (d *desired) names() []string {
	if d.site == nil {
		return nil
	}
	return d.site.Order
}

// needs are the units that a workload needs.
func (d *desired) needs(workload string) []string {
	for _, check := range d.plan.Checks {
		if check.Workload == workload {
			return check.Needs
		}
	}
	return nil
}

// asked is a digest of what is asked of a workload: with other probes or another bake time, another verdict is possible.
func asked(check template.Check) string {
	text, err := json.Marshal([]any{check.Health, check.Gate}) // what is not asked leaves nothing, so a key that a later version adds changes none
	if err != nil {
		panic(err) // two structs of numbers and strings
	}
	sum := sha256.Sum256(text)
	return fmt.Sprintf("%x", sum[:8])
}

// repeats returns the first of what failed before that is wanted again: the same workload on the same backend, of which the same is asked. It is
// nil if nothing is.
func (d *desired) repeats(failed ...Bad) *Bad {
	placements := d.placements()
	for i, bad := range failed {
		placement, wanted := placements[bad.Workload]
		if bad.Backend == "" { // by an earlier version, which did not note it
			bad.Backend = placement.Backend
		}
		if wanted && placement == bad.Placement {
			return &failed[i]
		}
	}
	return nil
}

// compare notes the units whose workload is not one that the good commit runs here, or runs on another backend, or of which something else is asked.
func (d *desired) compare(rec Record) {
	d.changed = make(map[string]bool)
	placements := d.placements()
	for _, check := range d.plan.Checks {
		if placement, ok := rec.Allowed[check.Workload]; !ok || placement != placements[check.Workload] {
			d.changed[check.Unit] = true
		}
	}
}

// steps is the difference between what the host has and what is wanted. What goes, goes for the reason that holds: a unit that the site has can
// be one that the host is not asked for any more, and no commit need have changed for that.
func (d *desired) steps(have []Have, exclusive func(old, new string) []string) []Step {
	list := Diff(d.plan.Workloads, have, exclusive)
	for i := range list {
		unit := list[i].Unit
		if list[i].Op != Remove || d.unit(unit) == nil {
			continue
		}
		list[i].Reason = "this host is not asked for it any more"
		for _, skip := range d.plan.Skipped {
			if skip.Unit == unit {
				list[i].Reason += ": " + skip.Why
			}
		}
		if at := d.placed(unit); at >= 0 {
			list[i].Reason = "the site asks for another copy of it, " + d.plan.Workloads[at].Name
		}
	}
	return list
}

// placed is the index of a unit's workload in the plan, -1 if there is none.
func (d *desired) placed(unit string) int {
	return slices.IndexFunc(d.plan.Workloads, func(w backends.Workload) bool { return w.Unit == unit })
}

// permitted are the workloads as the record keeps them.
func (d *desired) placements() map[string]Placement {
	list := make(map[string]Placement, len(d.plan.Workloads))
	for i, workload := range d.plan.Workloads {
		list[workload.Name] = Placement{Backend: workload.Backend, Asked: asked(d.plan.Checks[i])}
	}
	return list
}

// withhold takes a unit out of the plan.
func (d *desired) withhold(unit string, why error) {
	if d.withheld == nil {
		d.withheld = make(map[string]error)
	}
	d.withheld[unit] = why
	d.plan.Workloads = slices.DeleteFunc(d.plan.Workloads, func(w backends.Workload) bool { return w.Unit == unit })
	d.plan.Checks = slices.DeleteFunc(d.plan.Checks, func(c template.Check) bool { return c.Unit == unit })
}

// left says which units are withheld, and why.
func (d *desired) left() error {
	var all []error
	for _, unit := range slices.Sorted(maps.Keys(d.withheld)) {
		all = append(all, fmt.Errorf("%s: %w", unit, d.withheld[unit]))
	}
	return errors.Join(all...)
}

// all are the targets of every workload, made once.
func (d *desired) all() []gate.Target {
	if d.probes == nil {
		d.probes = d.targets(func(string) bool { return true }, false)
	}
	return d.probes
}

// targets are what the gate watches of the units chosen.
func (d *desired) targets(chosen func(unit string) bool, bake bool) []gate.Target {
	var list []gate.Target
	for i, check := range d.plan.Checks {
		if !chosen(check.Unit) {
			continue
		}
		target := gate.Target{Workload: check.Workload, Unit: check.Unit, Backend: d.plan.Workloads[i].Backend, Probe: probe(check.Health).WithDefaults(), Deadline: time.Duration(check.Gate.Deadline)}
		if bake {
			target.Bake = time.Duration(cmp.Or(check.Gate.Bake, template.DefaultBake)) // not in the check: what is asked is digested as it was written
		}
		list = append(list, target)
	}
	return list
}

// probe is a unit's health as the gate asks it.
func probe(h template.Health) gate.Probe {
	p := gate.Probe{Every: time.Duration(h.Every), Timeout: time.Duration(h.Timeout), Start: time.Duration(h.Start), After: h.After, Failures: h.Failures}
	switch {
	case h.HTTP != nil:
		p.Kind, p.Port, p.Path, p.Status = gate.HTTP, string(h.HTTP.Port), string(h.HTTP.Path), h.HTTP.Status
	case h.TCP != nil:
		p.Kind, p.Port = gate.TCP, string(h.TCP.Port)
	case h.Exec != nil:
		p.Kind, p.Argv = gate.Exec, h.Exec.Argv
	}
	return p
}

// exclusive says what a copy that exists and one that is wanted cannot both have. Of a copy that neither commit knows it assumes
// that it has all that the new one wants.
func exclusive(good, want *desired) func(old, new string) []string {
	known := make(map[string]backends.Workload)
	for _, d := range []*desired{good, want} {
		for _, workload := range d.plan.Workloads {
			known[workload.Name] = workload
		}
	}
	return func(old, new string) []string {
		before, ok := known[old]
		if !ok {
			before = known[new]
		}
		return template.Exclusive(before, known[new], want.prints)
	}
}

// input is the document that the rules judge.
func (r *Reconciler) input(ctx context.Context, rec Record, good, next *desired) (policy.Input, error) {
	judged := next.site
	if good.site != nil {
		judged = good.site // the base's lists judge the next commit
	}
	input := policy.Input{
		Version: 1,
		Site:    lists(judged.Config),
		Host: policy.Host{Name: r.Host.Name, Zone: r.Host.Zone, OS: r.Host.OS, Arch: r.Host.Arch, Labels: r.Host.Labels,
			CPU: r.Host.CPU, Memory: r.Host.Memory, PIDs: r.Host.PIDs, Disk: r.Host.Disk, State: r.State, Engines: r.Host.Engines, Own: r.Host.Own},
		Time:   next.facts.Time,
		Commit: next.commit.ID,
		Change: next.facts,
		Totals: totals(good, next),
	}
	differ, err := r.differing(rec, next)
	if err != nil {
		return input, err
	}
	described := make([]any, len(next.plan.Workloads))
	for _, err := range r.ask(ctx, next, func(ctx context.Context, workload *backends.Workload, i int) (err error) {
		if _, judged := differ[workload.Unit]; judged {
			described[i], err = r.Images.Describe(ctx, workload.Image, workload.Format, next.facts.Sealers)
		}
		return err
	}) {
		if err != nil {
			return input, err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(differ)) {
		unit := policy.Unit{Name: name, Tier: differ[name]}
		if before := good.unit(name); before != nil {
			unit.Before = before
		}
		if after := next.unit(name); after != nil {
			unit.After = after
		}
		if unit.Before == nil && unit.After == nil {
			continue // trust, policy or the site file
		}
		for i, workload := range next.plan.Workloads {
			if workload.Unit == name {
				workload.Files = backends.Veil(workload.Files)
				unit.Workloads, unit.Images = append(unit.Workloads, workload), append(unit.Images, described[i])
				unit.Ports = append(unit.Ports, template.HostPorts(workload, next.prints[workload.Backend])...)
			}
		}
		input.Units = append(input.Units, unit)
	}
	return input, nil
}

// lists is what a site.yaml says to the rules.
func lists(config template.Config) policy.Site {
	site := policy.Site{Name: string(config.Site), Branch: string(config.Branch)}
	for _, registry := range config.Registries {
		site.Registries = append(site.Registries, string(registry))
	}
	for _, one := range config.Burned {
		site.Burned = append(site.Burned, string(one))
	}
	for _, network := range config.Forbidden {
		site.Forbidden = append(site.Forbidden, string(network))
	}
	for _, w := range config.Freeze {
		site.Freeze = append(site.Freeze, policy.Window{From: string(w.From), To: string(w.To), Why: w.Why})
	}
	return site
}

// differing are the units that are judged, with their tiers: those that change, and those that are new on this host though nobody changed them.
func (r *Reconciler) differing(rec Record, next *desired) (tiers map[string]int, err error) {
	tiers = make(map[string]int)
	for _, facts := range next.facts.Units {
		tiers[facts.Unit] = facts.Tier
	}
	for _, workload := range next.plan.Workloads {
		if _, known := tiers[workload.Unit]; known || rec.permits(workload) {
			continue
		}
		if tiers[workload.Unit], err = r.Trust.Tier(next.commit.Tree, workload.Unit); err != nil {
			return nil, err
		}
	}
	return tiers, nil
}

// totals sums over the whole site on this host.
func totals(good, next *desired) policy.Totals {
	sums := policy.Totals{Before: len(good.names()), After: len(next.names())}
	for _, name := range good.names() {
		if next.unit(name) == nil {
			sums.Removed++
		}
	}
	for _, workload := range next.plan.Workloads {
		sums.CPU += workload.Resources.CPU
		sums.Memory += workload.Resources.Memory
		sums.PIDs += workload.Resources.PIDs
		sums.Disk += workload.Resources.Disk
	}
	return sums
}

// recordDecision writes the decision to the audit log, unless it is the one written last: a head that is refused, or waits for its images,
// is judged at every look.
func (r *Reconciler) recordDecision(rec Record, next *desired) error {
	said := fmt.Sprintln(next.decision.Policy, next.decision.Denied, next.decision.Warned)
	again := len(next.decision.Denied) > 0 && rec.Head == next.commit.ID && rec.Outcome == Refused && rec.Stage == "policy"
	if r.decided[next.commit.ID] == said || again {
		return nil
	}
	if err := r.record("decision", &DecisionEntry{r.about(next.commit.ID), next.decision}); err != nil {
		return err
	}
	if r.decided == nil || len(r.decided) >= maxBad {
		r.decided = make(map[string]string)
	}
	r.decided[next.commit.ID] = said
	return nil
}

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
		for _, variant := range unit.Variants {
			declared.Images = append(declared.Images, variant.SHA256())
		}
		return declared, nil
	}
}
