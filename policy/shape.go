package policy

import (
	"encoding/json"
	"fmt"
	"strconv"

	"github.com/kindos/kmo/policy/refusal"
)

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
		"unit": needed(text), "action": of(text), "to": of(text), "tier": needed(integer), "tierBefore": needed(integer), "need": needed(integer),
		"counted": listOf(approvalShape()), "uncounted": listOf(approvalShape()),
	}}
	unit := &shape{kind: object, must: true, fields: map[string]*shape{
		"name": needed(text), "before": of(object), "after": templateShape(), "workloads": listOf(workloadShape()), "images": listOf(of(anything)),
	}}
	return &shape{kind: object, must: true, fields: map[string]*shape{
		"version": needed(integer),
		"commit":  needed(text),
		"site":    {kind: object, must: true, fields: map[string]*shape{"name": needed(text), "registries": listOf(needed(text))}},
		"host": {kind: object, must: true, fields: map[string]*shape{
			"state": needed(text), "cpu": needed(integer), "memory": needed(integer), "pids": needed(integer), "disk": needed(integer)}},
		"change": {kind: object, must: true, fields: map[string]*shape{
			"commit": needed(text), "base": needed(text), "signer": needed(text), "revert": needed(truth),
			"trust": needed(truth), "policy": needed(truth), "other": needed(truth), "units": listOf(facts)}},
		"units": listOf(unit),
		"totals": {kind: object, must: true, fields: map[string]*shape{
			"before": needed(integer), "after": needed(integer), "removed": needed(integer),
			"cpu": needed(integer), "memory": needed(integer), "pids": needed(integer), "disk": needed(integer)}},
	}}
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
		"security":  securityShape(),
	}}
}

func workloadShape() *shape {
	return &shape{kind: object, must: true, fields: map[string]*shape{
		"image": {kind: object, must: true, fields: map[string]*shape{"ref": needed(text), "root": needed(text)}},
		"resources": {kind: object, must: true, fields: map[string]*shape{
			"cpu": of(integer), "memory": of(integer), "pids": of(integer), "disk": of(integer), "devices": listOf(needed(text))}},
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
type fault struct {
	path, want string
	got        any
}

// checkShape refuses a document that is not as the rules expect, so that no rule passes over a value for its type.
func checkShape(document any) error {
	if f := inputShape().check(document); f != nil {
		return malformed("input"+f.path, f.got, f.want)
	}
	input := document.(map[string]any)
	if version := input["version"].(json.Number); version != "1" {
		return malformed("input.version", version, "1")
	}
	if commit := input["change"].(map[string]any)["commit"]; commit != input["commit"] {
		return malformed("input.change.commit", commit, "that of input.commit")
	}
	units, _ := input["units"].([]any)
	seen := make(map[string]bool, len(units))
	for i, unit := range units {
		name := unit.(map[string]any)["name"].(string)
		if name == "" || seen[name] {
			return malformed(fmt.Sprintf("input.units[%d].name", i), name, "each unit once, by name")
		}
		seen[name] = true
	}
	return nil
}

func malformed(path string, got any, want string) error {
	return &refusal.Error{Code: codeDecode, Subject: refusal.Clip(path, 200), Got: refusal.Clip(fmt.Sprintf("%v", got), 100), Want: want}
}

func (s *shape) check(value any) *fault {
	switch value := value.(type) {
	case nil:
		if s.must {
			return &fault{got: "missing", want: s.kind.String()}
		}
		return nil
	case string:
		return s.is(text, value)
	case bool:
		return s.is(truth, value)
	case json.Number:
		if _, err := value.Int64(); s.kind == integer && err != nil {
			return &fault{got: value, want: s.kind.String()}
		}
		return s.is(integer, value)
	case []any:
		if s.kind != list {
			return s.is(list, "a list")
		}
		for i, elem := range value {
			if f := s.elem.check(elem); f != nil {
				f.path = "[" + strconv.Itoa(i) + "]" + f.path
				return f
			}
		}
		return nil
	case map[string]any:
		if s.kind != object {
			return s.is(object, "an object")
		}
		return s.members(value)
	}
	return &fault{got: fmt.Sprintf("%T", value), want: s.kind.String()}
}

func (s *shape) is(k kind, value any) *fault {
	if s.kind == anything || s.kind == k {
		return nil
	}
	return &fault{got: value, want: s.kind.String()}
}

func (s *shape) members(value map[string]any) *fault {
	for key, field := range s.fields {
		if f := field.check(value[key]); f != nil {
			f.path = "." + key + f.path
			return f
		}
	}
	if !s.closed && s.elem == nil {
		return nil
	}
	for key, field := range value {
		var f *fault
		if s.closed && s.fields[key] == nil {
			f = &fault{got: field, want: "no field that no rule knows"}
		} else if s.elem != nil {
			f = s.elem.check(field)
		}
		if f != nil {
			f.path = "." + key + f.path
			return f
		}
	}
	return nil
}

func (k kind) String() string {
	return [...]string{"anything", "text", "true or false", "a whole number", "a list", "an object"}[k]
}
