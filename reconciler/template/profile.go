package template

import (
	"cmp"
	"fmt"
	"maps"
	"path"
	"reflect"
	"slices"
	"strings"

	"github.com/kindos/kmo/policy/refusal"
)

// notYet lists what this build decodes but does not act on: it is refused by name, never ignored. A field leaves the list when
// something acts on it. "unit" rows hold for profiles too; a value equal to but is acted on.
func notYet() []struct{ file, path, but, why string } {
	return []struct{ file, path, but, why string }{
		{"site", "rollout", "", "changes do not wait for other zones yet"},
		{"site", "gate", "", "a gate stands in the unit or its profile"},
		{"site", "events", "", "no events are sent yet"},
		{"site", "snapshots", "", "no snapshots are taken yet"},
		{"site", "retention", "", "nothing is deleted by age yet"},
		{"unit", "place.count", "all", "every host that fits runs one copy"},
		{"unit", "place.prefer", "", "every host that fits runs one copy"},
		{"unit", "place.spread", "", "every host that fits runs one copy"},
		{"unit", "secrets", "", "secrets are not decrypted yet"},
		{"unit", "gate.metrics", "", "metrics are not scraped yet"},
	}
}

// refuseNotYet refuses what stands in a file but is not acted on.
func refuseNotYet(file string, top *node) error {
	var found problems
	for _, row := range notYet() {
		if row.file != file {
			continue
		}
		n := top
		for _, key := range strings.Split(row.path, ".") {
			n = n.get(key)
		}
		if n == nil || row.but != "" && n.text == row.but {
			continue
		}
		want := "a " + file + " without it"
		if row.but != "" {
			want = row.but + ", or no such key"
		}
		found.add(n, row.path, "this build does not act on it: "+row.why, want)
	}
	if links := top.get("links"); file == "unit" && links != nil {
		for _, link := range links.values {
			if via := link.get("via"); via != nil && via.text == "bus" {
				found.add(via, "links.via", "this build does not act on it: there is no bus yet", "rpc or memory")
			}
		}
	}
	for _, one := range found.list {
		one.Code = "E_UNSUPPORTED"
	}
	return found.err()
}

// merge lays a unit over its profile: what the unit says stands.
//
// Mappings merge key by key: resources, place, place.on, its labels, run, run.env, overlay, health, gate. Lists and plain values are the
// unit's or, if it has none, the profile's, as a whole; so is a probe. A unit that chooses one kind of probe drops the profile's. Of two
// tiers the more sensitive stands.
func (d *decoder) merge(unit, profile *node) *node {
	merged := *unit
	for i, key := range profile.keys {
		own := unit.get(key.text)
		switch {
		case key.text == "profile":
		case own == nil:
			merged.keys, merged.values = append(merged.keys[:len(merged.keys):len(merged.keys)], key), append(merged.values[:len(merged.values):len(merged.values)], profile.values[i])
		case key.text == "tier":
			if isTier(own) && isTier(profile.values[i]) && profile.values[i].text < own.text {
				merged.replace(key.text, profile.values[i])
			}
		default:
			f, _ := d.field(reflect.TypeFor[Unit](), key.text)
			merged.replace(key.text, d.lay(f, own, profile.values[i]))
		}
	}
	return &merged
}

// isTier says whether a node is a tier as it must be spelled.
func isTier(n *node) bool {
	return n.kind == scalar && n.other == "int" && len(n.text) == 1 && n.text >= "0" && n.text <= "3"
}

// replace sets the value of a key without touching the mapping that n was copied from.
func (n *node) replace(key string, value *node) {
	values := append([]*node(nil), n.values...)
	for i, k := range n.keys {
		if k.text == key {
			values[i] = value
		}
	}
	n.values = values
}

// field is the type of a key of a struct.
func (d *decoder) field(t reflect.Type, key string) (reflect.Type, field) {
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if s := d.structs[t]; s != nil {
		for _, f := range s.fields {
			if f.name == key {
				return t.Field(f.index).Type, f
			}
		}
	}
	return nil, field{}
}

// lay lays over on under, both values of type t.
func (d *decoder) lay(t reflect.Type, over, under *node) *node {
	if t == nil || over.kind != mapping || under.kind != mapping || !d.merges(t) {
		return over
	}
	chosen := false
	for _, key := range over.keys {
		_, f := d.field(t, key.text)
		chosen = chosen || f.one
	}
	laid := *over
	laid.keys, laid.values = append([]*node(nil), over.keys...), append([]*node(nil), over.values...)
	for i, key := range under.keys {
		below, f := d.field(t, key.text)
		switch own := over.get(key.text); {
		case own != nil:
			laid.replace(key.text, d.lay(below, own, under.values[i]))
		case f.one && chosen:
		default:
			laid.keys, laid.values = append(laid.keys, key), append(laid.values, under.values[i])
		}
	}
	return &laid
}

// merges says whether two mappings of a type merge: maps, and structs of which no key must be there.
func (d *decoder) merges(t reflect.Type) bool {
	if t.Kind() == reflect.Map {
		return true
	}
	s := d.structs[t]
	if s == nil || s.exactly {
		return false
	}
	for _, f := range s.fields {
		if f.need {
			return false
		}
	}
	return true
}

// leastMemory is below what any program needs to be started.
const leastMemory = Bytes(1 << 20)

// check looks at what one key says of another. top is the merged tree, for the places.
func (u *Unit) check(top *node, folder string, zones []Name, p *problems) {
	if string(u.Unit) != folder {
		p.add(top.at("unit"), "unit", show(string(u.Unit)), folder+", the folder's name")
	}
	if u.Tier < 0 {
		p.add(top, "tier", "no such key", "it, here or in a profile: 0 to 3")
	}
	if r := u.Resources.CPU; r.Max != 0 && r.Min > r.Max {
		p.add(top.at("resources", "cpu", "min"), "resources.cpu.min", r.Min.String(), "at most max, "+r.Max.String())
	}
	if r := u.Resources.Memory; r.Max != 0 && r.Min > r.Max {
		p.add(top.at("resources", "memory", "min"), "resources.memory.min", r.Min.String(), "at most max, "+r.Max.String())
	}
	if most := u.Resources.Memory.Max; most != 0 && most < leastMemory {
		p.add(top.at("resources", "memory", "max"), "resources.memory.max", most.String(), "at least 1Mi, below which nothing starts")
	}
	known := make(map[Name]bool, len(zones))
	for _, zone := range zones {
		known[zone] = true
	}
	for i, zone := range u.Place.On.Zone {
		if !known[zone] {
			p.add(top.at("place", "on", "zone", i), fmt.Sprintf("place.on.zone[%d]", i), show(string(zone)), "a zone of site.yaml: "+refusal.Clip(words(texts(zones)), 2*maxShown))
		}
	}
	every := cmp.Or(u.Health.Every, defaultEvery)
	if soonest := cmp.Or(u.Gate.Bake, DefaultBake) + Duration(max(u.Health.After-1, 0))*every; u.Gate.Deadline != 0 && u.Gate.Deadline <= soonest {
		p.add(top.at("gate", "deadline"), "gate.deadline", u.Gate.Deadline.String(), "more than "+soonest.String()+", the soonest that it can pass")
	}
	u.checkPorts(top, p)
	u.checkPaths(top, p)
}

// checkPorts refuses ports that cannot be told apart and probes of ports that are not there.
func (u *Unit) checkPorts(top *node, p *problems) {
	names, numbers, hosts := map[string]bool{}, map[int]bool{}, map[int]bool{}
	again := func(i int, key, got string) {
		p.add(top.at("run", "ports", i, key), fmt.Sprintf("run.ports[%d].%s", i, key), got+" again", "each once")
	}
	for i, port := range u.Run.Ports {
		if names[string(port.Name)] {
			again(i, "name", show(string(port.Name)))
		}
		if port.Port != 0 && numbers[port.Port] {
			again(i, "port", fmt.Sprint(port.Port))
		}
		if port.Host != 0 && hosts[port.Host] {
			again(i, "host", fmt.Sprint(port.Host))
		}
		names[string(port.Name)], numbers[port.Port], hosts[port.Host] = true, true, true
	}
	for _, name := range slices.Sorted(maps.Keys(u.Run.Env)) {
		if strings.HasPrefix(string(name), "KMO_") { // a port's number, or its descriptor, would take the place of what is said here
			p.add(top.at("run", "env", string(name)), "run.env."+string(name), "a variable of kMO's own, which tells a program its ports",
				"another name; those that begin with KMO_ are kMO's")
		}
	}
	probe := func(kind string, port PortName) {
		if !names[string(port)] {
			p.add(top.at("health", kind, "port"), "health."+kind+".port", show(string(port)), "the name of a port under run.ports")
		}
	}
	if u.Health.HTTP != nil {
		probe("http", u.Health.HTTP.Port)
	}
	if u.Health.TCP != nil {
		probe("tcp", u.Health.TCP.Port)
	}
}

// checkPaths refuses two things at one path of the workload, one below another, and what is the system's: no backend could give it.
func (u *Unit) checkPaths(top *node, p *problems) {
	type place struct {
		field string
		at    []any
	}
	taken := make(map[Path]place)
	take := func(to Path, field string, at ...any) {
		if by, ok := taken[to]; ok {
			p.add(top.at(at...), field, show(string(to))+", which "+by.field+" is too", "another path")
			return
		}
		taken[to] = place{field, at}
	}
	for i, f := range u.Files {
		take(f.To, fmt.Sprintf("files[%d].to", i), "files", i, "to")
	}
	for i, s := range u.Secrets {
		take(s.To, fmt.Sprintf("secrets[%d].to", i), "secrets", i, "to")
	}
	for i, m := range u.Mounts {
		take(m.To, fmt.Sprintf("mounts[%d].to", i), "mounts", i, "to")
	}
	for i, keep := range u.Overlay.Keep {
		take(keep, fmt.Sprintf("overlay.keep[%d]", i), "overlay", "keep", i)
	}
	systems := []string{"/proc", "/dev", "/sys"}
	if slices.ContainsFunc(u.Variants, func(v Variant) bool { return v.Image == "" && v.LXC == "" }) {
		systems = append(systems, "/app") // where an image that is one program is
	}
	for _, inner := range slices.Sorted(maps.Keys(taken)) { // sorted, so that of many faults the same are told each time
		mine := taken[inner]
		for outer := path.Dir(string(inner)); outer != "/" && outer != "."; outer = path.Dir(outer) {
			if by, ok := taken[Path(outer)]; ok {
				p.add(top.at(mine.at...), mine.field, show(string(inner))+", which lies in "+by.field, "a path outside "+outer)
			}
		}
		for _, system := range systems {
			if string(inner) == system || strings.HasPrefix(string(inner), system+"/") {
				p.add(top.at(mine.at...), mine.field, show(string(inner)), "a path outside "+system)
			}
		}
	}
}
