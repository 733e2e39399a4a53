package reconciler

import (
	"sort"
	"strings"

	"github.com/kindos/kmo/backends"
)

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
	Backend string
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
			step.Reason = "its spec changed from " + other.Name
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
