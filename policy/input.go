package policy

import (
	"time"

	"github.com/kindos/kmo/policy/trust"
	"github.com/kindos/kmo/registry/merkle"
)

// Input is everything a rule may look at: one change of a site, before and after, with what Go has established about it.
// Its JSON is the input document of the rules, and the audit log keeps it.
type Input struct {
	Version int         `json:"version"` // of this document: 1
	Site    Site        `json:"site"`
	Host    Host        `json:"host"`
	Time    time.Time   `json:"time"` // trusted time, UTC
	Commit  string      `json:"commit"`
	Change  trust.Facts `json:"change"` // who signed, what changed, which approvals count
	Units   []Unit      `json:"units"`  // the units that differ between what runs and what would run, sorted by name
	Totals  Totals      `json:"totals"` // over the whole site on this host, so that no rule needs the unchanged units

	// Rules are the digests of the sets that judge, the base's first, where they are two (Set.And). Decide sets it.
	Rules []merkle.Digest `json:"rules,omitempty"`
}

// Site is what the trusted base says about the site.
type Site struct {
	Name       string   `json:"name"`
	Branch     string   `json:"branch"`
	Registries []string `json:"registries"` // hosts, or hosts with a repository prefix, that images may come from
}

// Host is what this host is and has.
type Host struct {
	Name   string            `json:"name"`
	Zone   string            `json:"zone"`
	OS     string            `json:"os"`
	Arch   string            `json:"arch"`
	Labels map[string]string `json:"labels"`
	CPU    int64             `json:"cpu"`    // thousandths of a core
	Memory int64             `json:"memory"` // bytes
	PIDs   int64             `json:"pids"`
	Disk   int64             `json:"disk"`  // bytes where kMO keeps its state
	State  string            `json:"state"` // kMO's state folder, which nothing may mount
	// Engines are where the agent's file says that runtimes are, and where that leads: sockets, which nothing may mount.
	Engines []string `json:"engines,omitempty"`
}

// Unit is one changed unit. Before and After are the unit's template after its profile (the keys of unit.yaml), null if the unit is new or gone.
// Before is the template at Change.Base, whether or not it ran on this host: a unit whose Before and After differ must be among
// Change.Units, or nobody is known to have approved it. Null and a missing member are the same to every rule; Security may hold no
// member that no rule knows.
type Unit struct {
	Name      string `json:"name"`
	Before    any    `json:"before"`
	After     any    `json:"after"`
	Workloads []any  `json:"workloads"` // the final plan on this host: backends.Workload; empty if the unit is not placed here
	Images    []any  `json:"images"`    // what the registry knows of each variant's image, in the variants' order
}

// fill makes the empty lists lists: a rule may count them.
func (i *Input) fill() {
	i.Site.Registries = append([]string{}, i.Site.Registries...)
	i.Units = append([]Unit{}, i.Units...)
	for n := range i.Units {
		u := &i.Units[n]
		u.Workloads, u.Images = append([]any{}, u.Workloads...), append([]any{}, u.Images...)
	}
	if i.Host.Labels == nil {
		i.Host.Labels = map[string]string{}
	}
}

// Totals are sums over all units of the site on this host.
type Totals struct {
	Before  int   `json:"before"`  // units that run
	After   int   `json:"after"`   // units that would run
	Removed int   `json:"removed"` // units that run and would not
	CPU     int64 `json:"cpu"`     // of all workloads that would run, enforced bounds
	Memory  int64 `json:"memory"`
	PIDs    int64 `json:"pids"`
	Disk    int64 `json:"disk"`
}
