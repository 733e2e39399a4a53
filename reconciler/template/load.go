package template

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"reflect"
	"slices"
	"strings"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/policy/refusal"
)

// fits says whether a value of a text type is as its rule says.
func (d *decoder) fits(value any) bool {
	rule := d.texts[reflect.TypeOf(value)]
	text := reflect.ValueOf(value).String()
	return len(text) <= rule.max && rule.match.MatchString(text)
}

// allUnits reads units/*/unit.yaml, or takes what the last Load made of the same objects.
func (l *loading) allUnits() ([]*entry, error) {
	list, err := l.folder("units")
	if err != nil {
		return nil, err
	}
	if len(list) > maxUnits {
		return nil, &refusal.Error{Code: "E_LIMIT", Subject: "units", Got: fmt.Sprintf("%d units", len(list)), Want: fmt.Sprintf("at most %d", maxUnits)}
	}
	zones := texts(l.config.Zones)
	slices.Sort(zones)
	context := strings.Join(zones, ",")
	entries := make([]*entry, 0, len(list))
	for _, item := range list {
		if known := l.last[item.Name()]; known != nil && known.key != "" && item.IsDir() && known.key == l.key(item.Name(), known.unit.Profile, context) {
			entries = append(entries, known)
			continue
		}
		made, err := l.oneUnit(item, context)
		if err := l.refuse(err); err != nil {
			return nil, err
		}
		if made != nil {
			entries = append(entries, made)
		}
	}
	slices.SortFunc(entries, func(a, b *entry) int { return strings.Compare(string(a.unit.Unit), string(b.unit.Unit)) })
	return entries, nil
}

// key names everything that a unit is made from, "" if the tree has no object ids.
func (l *loading) key(folder string, uses Name, context string) string {
	id := l.object("units/" + folder)
	if id == "" {
		return ""
	}
	if uses != "" {
		used := l.profiles[string(uses)]
		if used == nil || used.id == "" || !used.good {
			return ""
		}
		id += " " + used.id
	}
	return id + " " + context
}

// oneUnit decodes a unit's folder.
func (l *loading) oneUnit(item fs.DirEntry, context string) (*entry, error) {
	folder := "units/" + item.Name()
	if !item.IsDir() {
		return nil, notRegular(folder, item.Type(), "a folder with unit.yaml")
	}
	if !l.isName(item.Name()) {
		return nil, &refusal.Error{Code: "E_PATH", Subject: refusal.Clip(folder, 4*maxShown), Got: "a folder that is named as no unit can be",
			Want: "lower-case letters, digits and single dashes, a letter first, 54 at most"}
	}
	l.decoded++
	inside, err := l.inventory(folder)
	if err != nil {
		return nil, err
	}
	var p problems
	top, err := l.read(folder+"/unit.yaml", "unit", &p)
	if err != nil {
		return nil, err
	}
	if top == nil {
		return nil, p.err()
	}
	unit, merged := l.unit(top, item.Name(), &p)
	made := &entry{unit: unit, key: l.key(item.Name(), unit.Profile, context)}
	for i := range unit.Needs {
		at := merged.at("needs", i)
		made.needsAt = append(made.needsAt, fmt.Sprintf("%s:%d:%d needs[%d]", at.file, at.line, at.col, i))
	}
	brought := l.brought(made, folder, inside, merged, &p)
	if err := errors.Join(p.err(), refuseNotYet("unit", top), brought); err != nil {
		return nil, err
	}
	return made, nil
}

// unit decodes a unit over its profile and returns it with the tree it was decoded from.
func (l *loading) unit(top *node, folder string, p *problems) (*Unit, *node) {
	unit := &Unit{Tier: -1, Run: Run{User: defaultUser, Grace: defaultGrace}}
	merged, whole := top, true
	if uses := top.get("profile"); uses != nil && uses.kind == scalar {
		switch used := l.profiles[uses.text]; {
		case used == nil && l.decoder.fits(Name(uses.text)):
			p.add(uses, "profile", show(uses.text), "a profile: there is no profiles/"+uses.text+".yaml")
			whole = false
		case used == nil || !used.good:
			whole = false // that is refused already
		default:
			merged = l.decoder.merge(top, used.top)
		}
	}
	before := len(p.list)
	l.decoder.decode(merged, unit, p)
	if whole && len(p.list) == before {
		unit.check(merged, folder, l.config.Zones, p)
	}
	unit.complete()
	return unit, merged
}

// complete sets what a unit need not say.
func (u *Unit) complete() {
	if u.Place.Count == "" {
		u.Place.Count = "all"
	}
	if h := &u.Health; h.HTTP == nil && h.TCP == nil && h.Exec == nil {
		h.Process = &ProcessProbe{}
	}
	for i := range u.Files {
		if u.Files[i].Mode == "" {
			u.Files[i].Mode = "0644"
		}
	}
}

// inventory lists the regular files below a unit's folder and refuses everything that is neither such a file nor a folder.
func (l *loading) inventory(folder string) (map[string]bool, error) {
	files := make(map[string]bool)
	var all []error
	entries := 0
	var walk func(dir string, depth int) error
	walk = func(dir string, depth int) error {
		list, err := fs.ReadDir(l.tree, dir)
		if err != nil {
			return fmt.Errorf("%s: %w", dir, err)
		}
		if entries += len(list); entries > maxEntries || depth > maxFolders {
			return &refusal.Error{Code: "E_LIMIT", Subject: folder, Got: fmt.Sprintf("%d files or more, %d folders deep", entries, depth),
				Want: fmt.Sprintf("at most %d files and folders, %d deep", maxEntries, maxFolders)}
		}
		for _, item := range list {
			name := path.Join(dir, item.Name())
			switch {
			case item.IsDir():
				if err := walk(name, depth+1); err != nil {
					return err
				}
			case item.Type().IsRegular():
				files[name] = true
			case len(all) < maxProblems:
				all = append(all, notRegular(name, item.Type(), "a regular file or a folder"))
			}
		}
		return nil
	}
	if err := walk(folder, 1); err != nil {
		return nil, err
	}
	return files, errors.Join(all...)
}

// brought reads the files that a unit brings, sorted by where they go.
func (l *loading) brought(made *entry, folder string, inside map[string]bool, top *node, p *problems) error {
	left := int64(maxBrought)
	for i, f := range made.unit.Files {
		if f.From == "" || f.To == "" {
			continue // refused already
		}
		name := folder + "/" + string(f.From)
		if !inside[name] {
			p.add(top.at("files", i, "from"), fmt.Sprintf("files[%d].from", i), show(string(f.From)), "a file in "+folder)
			continue
		}
		data, err := l.bytes(name, left)
		if err != nil {
			return err
		}
		if left -= int64(len(data)); left < 0 {
			return &refusal.Error{Code: "E_LIMIT", Subject: folder, Got: "files that are larger together: " + refusal.Clip(string(f.From), maxShown) + " is one too many",
				Want: fmt.Sprintf("at most %d bytes in all files of a unit", maxBrought)}
		}
		made.files = append(made.files, backends.File{To: string(f.To), Mode: f.Mode.bits(), Content: data})
	}
	slices.SortFunc(made.files, func(a, b backends.File) int { return strings.Compare(a.To, b.To) })
	return nil
}

// texts turns names into strings.
func texts[T ~string](names []T) []string {
	var all []string
	for _, name := range names {
		all = append(all, string(name))
	}
	return all
}

// maxCycles bounds how many faults of the graph one refusal names.
const maxCycles = 10

// graph orders units so that each comes after those it needs; otherwise by name. The order of two units does not depend on a third
// that neither needs.
type graph struct {
	units map[string]*entry
	state map[string]int // 0 not seen, 1 on the path, 2 done
	path  []string
	order []*entry
	errs  []error
}

// order returns the entries, which are sorted by name, dependencies first. Unknown units and cycles are refused.
func order(entries []*entry) ([]*entry, error) {
	g := graph{units: make(map[string]*entry, len(entries)), state: make(map[string]int, len(entries))}
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		name := string(e.unit.Unit)
		g.units[name], names = e, append(names, name)
	}
	for _, e := range entries {
		for i, need := range e.unit.Needs {
			if g.units[string(need)] == nil && len(g.errs) < maxCycles {
				g.errs = append(g.errs, &refusal.Error{Code: "E_GRAPH", Subject: e.needsAt[i], Got: show(string(need)) + ", which is no unit of the site",
					Want: "a folder under units/" + meant(string(need), names)})
			}
		}
	}
	for _, e := range entries {
		g.visit(e)
	}
	return g.order, errors.Join(g.errs...)
}

// visit appends e after everything it needs.
func (g *graph) visit(e *entry) {
	name := string(e.unit.Unit)
	if g.state[name] == 2 {
		return
	}
	g.state[name], g.path = 1, append(g.path, name)
	needs := slices.Clone(e.unit.Needs)
	slices.Sort(needs)
	for _, need := range needs {
		next := g.units[string(need)]
		switch {
		case next == nil:
		case g.state[string(need)] == 1:
			g.cycle(string(need))
		default:
			g.visit(next)
		}
	}
	g.state[name], g.path = 2, g.path[:len(g.path)-1]
	g.order = append(g.order, e)
}

// cycle refuses the part of the path that begins with name.
func (g *graph) cycle(name string) {
	if len(g.errs) >= maxCycles {
		return
	}
	ring := slices.Clone(g.path[slices.Index(g.path, name):])
	least := slices.Index(ring, slices.Min(ring))
	ring = append(ring[least:], ring[:least]...)
	e := g.units[ring[0]]
	at := e.needsAt[slices.Index(e.unit.Needs, Name(ring[1%len(ring)]))]
	shown := ring
	if len(shown) > 20 {
		shown = append(slices.Clone(shown[:19]), "…")
	}
	g.errs = append(g.errs, &refusal.Error{Code: "E_GRAPH", Subject: at, Got: "the cycle " + strings.Join(append(shown, ring[0]), " → "),
		Want: "units that need each other in one direction"})
}
