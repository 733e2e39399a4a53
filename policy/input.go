package policy

import (
	"time"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/policy/trust"
	"github.com/kindos/kmo/registry/merkle"
)

//go:generate go test -run ^TestInputSchema$ -update .

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
	Burned     []string `json:"burned"`     // sha256 of images, and kmo1 roots of images and units, that must not run again
	Freeze     []Window `json:"freeze"`     // when nothing is changed
	Forbidden  []string `json:"forbidden"`  // networks that no unit may be told to reach: 10.9.0.0/16
}

// Window is a time from a moment up to another, as RFC 3339 has them.
type Window struct {
	From string `json:"from"`
	To   string `json:"to"`
	Why  string `json:"why"`
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
	Own     []string `json:"own"` // kMO's own binary, file, keys and plugins, and where links to them lead
}

// Unit is one changed unit. Before and After are the unit's template after its profile (the keys of unit.yaml), null if the unit is new or gone.
// Before is the template at Change.Base, whether or not it ran on this host: a unit whose Before and After differ must be among
// Change.Units, or nobody is known to have approved it. Null and a missing member are the same to every rule; Security may hold no
// member that no rule knows.
type Unit struct {
	Name      string `json:"name"`
	Tier      int    `json:"tier"` // as trust has established it, whatever the template says
	Before    any    `json:"before"`
	After     any    `json:"after"`
	Workloads []any  `json:"workloads"` // the final plan on this host: backends.Workload; empty if the unit is not placed here
	Images    []any  `json:"images"`    // what the registry knows of each workload's image, in the workloads' order
	Ports     []int  `json:"ports"`     // of this host, that the workloads take by number
}

// fill makes the empty lists lists: a rule may count them.
func (i *Input) fill() {
	i.Site.Burned = append([]string{}, i.Site.Burned...)
	i.Site.Freeze, i.Host.Own = append([]Window{}, i.Site.Freeze...), append([]string{}, i.Host.Own...)
	i.Site.Registries, i.Site.Forbidden = append([]string{}, i.Site.Registries...), append([]string{}, i.Site.Forbidden...)
	i.Units = append([]Unit{}, i.Units...)
	for n := range i.Units {
		u := &i.Units[n]
		u.Workloads, u.Images, u.Ports = append([]any{}, u.Workloads...), append([]any{}, u.Images...), append([]int{}, u.Ports...)
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

// kind is what a value of the input document must be.
type kind int

const (
	anything kind = iota
	text
	truth
	integer
	list   // of elem
	object // with fields; with elem, every other field is one
)

// shape is what the rules take for granted of one value. A missing value and null pass unless must is set: they ask for nothing.
type shape struct {
	kind   kind
	must   bool
	closed bool // no fields but these: one that no rule knows would not be judged
	elem   *shape
	fields map[string]*shape
}

// inputShape is the input document as far as rules look at it. What a rule reads is listed here, or it may be of any form.
func inputShape() *shape {
	facts := &shape{kind: object, must: true, fields: map[string]*shape{
		"unit": needed(text), "action": needed(text), "back": needed(text), "to": of(text), "tier": needed(integer), "tierBefore": needed(integer), "need": needed(integer),
		"counted": listOf(approvalShape()), "uncounted": listOf(approvalShape()),
	}}
	unit := &shape{kind: object, must: true, fields: map[string]*shape{
		"name": needed(text), "tier": needed(integer), "before": of(object), "after": templateShape(), "workloads": listOf(workloadShape()),
		"images": listOf(&shape{kind: object, fields: map[string]*shape{"root": of(text), "signer": of(text), "custody": linksShape(), "config": {kind: object, fields: map[string]*shape{
			"entrypoint": listOf(needed(text)), "cmd": listOf(needed(text))}}}}),
		"ports": {kind: list, must: true, elem: needed(integer)},
	}}
	return &shape{kind: object, must: true, fields: map[string]*shape{
		"version": needed(integer),
		"commit":  needed(text),
		"time":    needed(text),
		"rules":   listOf(needed(text)),
		"site": {kind: object, must: true, fields: map[string]*shape{"name": needed(text), "registries": listOf(needed(text)),
			"forbidden": {kind: list, must: true, elem: needed(text)},
			"burned":    {kind: list, must: true, elem: needed(text)},
			"freeze":    {kind: list, must: true, elem: &shape{kind: object, must: true, fields: map[string]*shape{"from": needed(text), "to": needed(text), "why": needed(text)}}}}},
		"host": {kind: object, must: true, fields: map[string]*shape{
			"state": needed(text), "engines": listOf(needed(text)), "own": {kind: list, must: true, elem: needed(text)}, "cpu": needed(integer), "memory": needed(integer), "pids": needed(integer), "disk": needed(integer)}},
		"change": {kind: object, must: true, fields: map[string]*shape{
			"commit": needed(text), "base": needed(text), "signer": needed(text), "revert": needed(truth),
			"trust": needed(truth), "policy": needed(truth), "other": needed(truth), "apart": of(truth), "units": listOf(facts), "tripwires": listOf(needed(text)),
			"burned":     {kind: list, must: true, elem: &shape{kind: object, must: true, fields: map[string]*shape{"unit": needed(text), "commit": needed(text), "why": needed(text)}}},
			"statements": {kind: list, must: true, elem: of(text)}, "custody": custodyShape()}},
		"units": listOf(unit),
		"totals": {kind: object, must: true, fields: map[string]*shape{
			"before": needed(integer), "after": needed(integer), "removed": needed(integer),
			"cpu": needed(integer), "memory": needed(integer), "pids": needed(integer), "disk": needed(integer)}},
	}}
}

func custodyShape() *shape {
	return &shape{kind: object, fields: map[string]*shape{
		"steps": {kind: list, must: true, elem: &shape{kind: list, must: true, elem: needed(text)}},
		"keys":  {kind: list, must: true, elem: &shape{kind: object, must: true, fields: map[string]*shape{"principal": needed(text), "key": needed(text)}}}}}
}

func linksShape() *shape {
	return listOf(&shape{kind: object, must: true, fields: map[string]*shape{
		"step": needed(text), "principal": needed(text), "key": needed(text), "why": needed(text),
		"in": listOf(needed(text)), "out": listOf(needed(text)), "uncovered": listOf(needed(text))}})
}

func approvalShape() *shape {
	return &shape{kind: object, must: true, fields: map[string]*shape{
		"principal": needed(text), "key": of(text), "file": of(text), "why": of(text),
	}}
}

func templateShape() *shape {
	return &shape{kind: object, fields: map[string]*shape{
		"variants": listOf(&shape{kind: object, must: true, fields: map[string]*shape{
			"image": of(text), "lxc": of(text), "wasm": of(text), "appimage": of(text), "native": of(text), "merkle": of(text)}}),
		"resources": {kind: object, fields: map[string]*shape{"devices": listOf(needed(text))}},
		"run":       runShape(of(integer)),
		"mounts":    mountsShape(),
		"hooks":     hooksShape(),
		"health": {kind: object, fields: map[string]*shape{
			"exec": {kind: object, fields: map[string]*shape{"argv": listOf(needed(text))}},
			"http": {kind: object, fields: map[string]*shape{"path": of(text)}}}},
		"security": securityShape(),
	}}
}

func workloadShape() *shape {
	return &shape{kind: object, must: true, fields: map[string]*shape{
		"format": of(text),
		"image":  {kind: object, must: true, fields: map[string]*shape{"ref": needed(text), "root": needed(text)}},
		"resources": {kind: object, must: true, fields: map[string]*shape{
			"cpu": of(integer), "memory": of(integer), "pids": of(integer), "disk": of(integer),
			"devices": listOf(&shape{kind: object, must: true, fields: map[string]*shape{"name": needed(text), "nodes": listOf(needed(text))}})}},
		"run": runShape(needed(integer)),
		"files": listOf(&shape{kind: object, must: true, fields: map[string]*shape{
			"to": needed(text), "mode": needed(integer), "content": of(text)}}),
		"mounts":   mountsShape(),
		"hooks":    hooksShape(),
		"security": securityShape(),
	}}
}

func runShape(user *shape) *shape {
	return &shape{kind: object, must: user.must, fields: map[string]*shape{
		"args": listOf(needed(text)), "env": {kind: object, elem: needed(text)}, "user": user,
		"ports": listOf(&shape{kind: object, must: true, fields: map[string]*shape{"port": of(integer), "host": of(integer)}}),
	}}
}

func mountsShape() *shape {
	return listOf(&shape{kind: object, must: true, fields: map[string]*shape{"from": needed(text)}})
}

func hooksShape() *shape {
	return &shape{kind: object, elem: listOf(listOf(needed(text)))}
}

func securityShape() *shape {
	return &shape{kind: object, closed: true, fields: map[string]*shape{
		"privileged": of(truth), "escalation": of(truth), "writableBase": of(truth), "unconfined": of(truth),
		"capabilities": listOf(needed(text)), "host": listOf(needed(text)),
	}}
}

func of(k kind) *shape          { return &shape{kind: k} }
func needed(k kind) *shape      { return &shape{kind: k, must: true} }
func listOf(elem *shape) *shape { return &shape{kind: list, elem: elem} }

// fault is where a document is not as expected. The path grows on the way out: a document that is as expected costs no paths.
type fault struct{ path, got, want string }

func (f *fault) below(path string) *fault {
	f.path = path + f.path
	return f
}

func malformed(path, got, want string) error {
	return &refusal.Error{Code: codeDecode, Subject: refusal.Clip(path, 200), Got: refusal.Clip(got, 100), Want: want}
}

// is says what is wrong with a value of kind k at s.
func (s *shape) is(k kind, got string) *fault {
	if s.kind == anything || s.kind == k {
		return nil
	}
	return &fault{got: refusal.Clip(got, 100), want: s.kind.String()}
}

// null passes where nothing is needed.
func (s *shape) null() *fault {
	if s.must {
		return &fault{got: "missing", want: s.kind.String()}
	}
	return nil
}

// field is the shape of one member, free if no rule looks at it, and whether there may be such a member.
func (s *shape) field(name string, free *shape) (*shape, bool) {
	switch f := s.fields[name]; {
	case f != nil:
		return f, true
	case s.kind == anything:
		return s, true
	case s.elem != nil:
		return s.elem, true
	}
	return free, !s.closed
}

func (k kind) String() string {
	return [...]string{"anything", "text", "true or false", "a whole number", "a list", "an object"}[k]
}
