// Package template turns the files of a site into the workloads of one host: files → units → workloads. It is pure: the same tree and
// the same facts of the host give the same bytes, whatever was loaded before, and nothing but the tree is read.
//
//	var loader template.Loader
//	site, err := loader.Load(commit.Tree) // a *refusal.Error for each fault, joined
//	plan, err := site.Render(host)        // plan.Workloads, dependencies first
//
// # Files
//
// site.yaml, profiles/<name>.yaml and units/<name>/unit.yaml are each one YAML document with one mapping, whose keys are the JSON names of
// [Config], [Profile] and [Unit]; docs/schema has them as JSON Schemas. Decoding is strict: E_DECODE, with file, line and column, for every
// fault of a file at once. Refused are unknown keys and keys that come twice, anchors, aliases, merge keys, tags, directives, a second
// document, an empty file, a byte order mark, bytes that are no UTF-8, characters that people do not see (written as they are or as an
// escape), numbers other than plain decimal ones, booleans other than true and false, texts without quotes that YAML takes for something else, keys without a value, more than
// 1 MiB, 16 levels or 20,000 values. There are no variables: a text is what it says, ${HOME} included.
//
// A field that this build does not act on is refused as E_UNSUPPORTED. A path that is no regular file or folder, a symbolic link above
// all, is refused as E_PATH wherever it is met, and never followed: give [Load] the file system of an [os.Root] to hold that against a folder
// that changes meanwhile.
//
// # Profiles
//
// A unit that names a profile takes what it does not say itself from it. Mappings merge key by key; lists, plain values and probes are
// replaced as a whole; of two tiers the more sensitive stands. What gives a unit rights, or is run, never comes from a profile.
//
// # Rendering
//
// A unit is placed on a host that its place.on admits and that has its resources' min. Of its variants the first that fits is taken: a backend
// of the variant's list, in its order, whose fingerprint has the format, the host's architecture and every feature the workload
// asks for. A unit that is placed but fits nowhere is refused as E_FIT, with each variant's reason.
package template

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"
	"sync"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/policy/refusal"
)

// Limits of a site.
const (
	maxUnits    = 10_000
	maxEntries  = 4096    // files and folders in a unit's folder
	maxFolders  = 16      // nested in a unit's folder
	maxBrought  = 2 << 20 // bytes of all the files that a unit brings
	maxRefusals = 200     // reported for one site
)

// Site is a site as its files say. It is read-only: commits that share files share what was decoded from them.
type Site struct {
	Config Config
	Units  []*Unit             // after their profiles, sorted by name
	Order  []string            // the units' names, dependencies first
	units  []*entry            // in Order
	offers map[string][]string // by what others link to a unit, sorted
}

// Unit returns the unit of that name, nil if there is none.
func (s *Site) Unit(name string) *Unit {
	at, ok := slices.BinarySearchFunc(s.Units, name, func(u *Unit, name string) int { return strings.Compare(string(u.Unit), name) })
	if !ok {
		return nil
	}
	return s.Units[at]
}

// entry is a unit with what was read for it. Only rendered changes once it is made.
type entry struct {
	unit     *Unit
	key      string // what it was made from; "" if that cannot be told
	files    []backends.File
	needsAt  []string // where each of its needs stands
	rendered lastRender
}

// Load decodes a site once.
func Load(tree fs.FS) (*Site, error) { return new(Loader).Load(tree) }

// Loader decodes sites and remembers the units of the last one: of a tree with object ids (ObjectID(path string) string, as Git has
// them) only what changed is decoded again. Its zero value is ready, and may be used by several goroutines.
type Loader struct {
	mu      sync.Mutex
	decoder *decoder
	last    map[string]*entry
	decoded int // units decoded by the last Load
}

// loading is one Load.
type loading struct {
	*Loader
	tree     fs.FS
	object   func(path string) string
	config   Config
	profiles map[string]*profile
	errs     []error // refusals
}

// profile is a decoded profile.
type profile struct {
	id   string // object id
	top  *node
	good bool
}

// Load decodes the site in a tree. The error joins a refusal for each fault; any other error says that the tree could not be read.
func (l *Loader) Load(tree fs.FS) (*Site, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.decoder == nil {
		l.decoder = newDecoder()
	}
	l.decoded = 0
	run := &loading{Loader: l, tree: tree, object: func(string) string { return "" }, profiles: make(map[string]*profile)}
	if ids, ok := tree.(interface{ ObjectID(path string) string }); ok {
		run.object = ids.ObjectID
	}
	if err := run.site(); err != nil {
		return nil, err
	}
	if err := run.allProfiles(); err != nil {
		return nil, err
	}
	entries, err := run.allUnits()
	if err != nil {
		return nil, err
	}
	if len(run.errs) > 0 {
		return nil, errors.Join(run.errs...)
	}
	ordered, err := order(entries)
	if err != nil {
		return nil, err
	}
	site := &Site{Config: run.config, units: ordered, offers: offers(ordered)}
	l.last = make(map[string]*entry, len(entries))
	for i, e := range entries {
		site.Units = append(site.Units, e.unit)
		site.Order = append(site.Order, string(ordered[i].unit.Unit))
		l.last[string(e.unit.Unit)] = e
	}
	return site, nil
}

// refuse records refusals; it returns err if it is something else, or if there are too many to go on.
func (l *loading) refuse(err error) error {
	if err == nil {
		return nil
	}
	if refusal.Of(err) == nil {
		return err
	}
	for _, one := range refusal.All(err) {
		l.errs = append(l.errs, one)
	}
	if len(l.errs) >= maxRefusals {
		return errors.Join(l.errs...)
	}
	return nil
}

// site reads site.yaml. Nothing else is looked at if it is wrong.
func (l *loading) site() error {
	var p problems
	top, err := l.read("site.yaml", "site", &p)
	if err != nil {
		return err
	}
	if top != nil {
		l.decoder.decode(top, &l.config, &p)
	}
	for i, w := range l.config.Freeze {
		if w.From != "" && w.To != "" && w.To <= w.From {
			p.add(top.at("freeze", i, "to"), fmt.Sprintf("freeze[%d].to", i), show(string(w.To)), "a moment after "+string(w.From))
		}
	}
	return errors.Join(p.err(), refuseNotYet("site", top))
}

// read parses a file after looking at what it is.
func (l *loading) read(name, what string, p *problems) (*node, error) {
	stat, err := fs.Lstat(l.tree, name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, &refusal.Error{Code: "E_DECODE", Subject: name, Got: "no such file", Want: "a " + what + "'s file"}
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if !stat.Mode().IsRegular() {
		return nil, notRegular(name, stat.Mode(), "a regular file")
	}
	data, err := l.bytes(name, maxFile)
	if err != nil {
		return nil, err
	}
	return parse(name, data, p), nil
}

// bytes reads a regular file up to one byte more than limit.
func (l *loading) bytes(name string, limit int64) ([]byte, error) {
	f, err := l.tree.Open(name)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	defer f.Close()
	stat, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if !stat.Mode().IsRegular() {
		return nil, notRegular(name, stat.Mode(), "a regular file")
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return data, nil
}

// notRegular refuses a path for what it is.
func notRegular(name string, mode fs.FileMode, want string) error {
	got := "neither a file nor a folder"
	switch {
	case mode&fs.ModeSymlink != 0:
		got = "a symbolic link"
	case mode.IsDir():
		got = "a folder"
	case mode.IsRegular():
		got = "a file"
	}
	return &refusal.Error{Code: "E_PATH", Subject: refusal.Clip(name, 4*maxShown), Got: got, Want: want}
}

// folder lists a folder of the site, nil if there is none. A link is refused before it is looked into.
func (l *loading) folder(name string) ([]fs.DirEntry, error) {
	stat, err := fs.Lstat(l.tree, name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if !stat.IsDir() {
		return nil, notRegular(name, stat.Mode(), "a folder")
	}
	list, err := fs.ReadDir(l.tree, name)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return slices.DeleteFunc(list, func(e fs.DirEntry) bool {
		return e.Type().IsRegular() && (e.Name() == "README.md" || e.Name() == ".gitkeep")
	}), nil
}

// allProfiles reads profiles/*.yaml.
func (l *loading) allProfiles() error {
	list, err := l.folder("profiles")
	if err != nil {
		return err
	}
	for _, item := range list {
		if err := l.refuse(l.oneProfile(item)); err != nil {
			return err
		}
	}
	return nil
}

// oneProfile reads a profile. A wrong one is remembered, so that its units are not refused for naming one that is not there.
func (l *loading) oneProfile(item fs.DirEntry) error {
	file := "profiles/" + item.Name()
	if !item.Type().IsRegular() {
		return notRegular(file, item.Type(), "a regular file, <name>.yaml")
	}
	name, ok := strings.CutSuffix(item.Name(), ".yaml")
	if !ok || !l.isName(name) {
		return &refusal.Error{Code: "E_PATH", Subject: refusal.Clip(file, 4*maxShown), Got: "another kind of file", Want: "<name>.yaml, the name in lower-case letters, digits and dashes"}
	}
	entry := &profile{id: l.object(file)}
	l.profiles[name] = entry
	var p problems
	top, err := l.read(file, "profile", &p)
	if err != nil {
		return err
	}
	if top == nil {
		return p.err()
	}
	values := Profile{Profile: Name(name)}
	l.decoder.decode(top, &values, &p)
	if string(values.Profile) != name {
		p.add(top.at("profile"), "profile", show(string(values.Profile)), name+", the file's name")
	}
	entry.top = top
	err = errors.Join(p.err(), refuseNotYet("unit", top))
	entry.good = err == nil
	return err
}

// isName says whether a text is a name.
func (l *loading) isName(text string) bool {
	return l.decoder.fits(Name(text))
}

// offers is by what the units are linked to.
func offers(units []*entry) map[string][]string {
	all := make(map[string][]string)
	for _, e := range units {
		for _, link := range e.unit.Links {
			if to := string(link.To); !slices.Contains(all[to], link.Via) {
				all[to] = append(all[to], link.Via)
				slices.Sort(all[to])
			}
		}
	}
	return all
}
