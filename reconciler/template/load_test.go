package template

import (
	"crypto/sha1"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"

	"github.com/kindos/kmo/policy/refusal"
)

// objectTree is a tree with object ids, as Git has them.
type objectTree struct {
	fstest.MapFS
	ids map[string]string
}

// objects gives every file and folder an id that follows from what is in it.
func objects(tree fstest.MapFS) objectTree {
	sums := make(map[string][]string)
	for name, file := range tree {
		sum := sha1.Sum(file.Data)
		for at := name; at != "."; at = filepath.Dir(at) {
			sums[at] = append(sums[at], name+hex.EncodeToString(sum[:]))
		}
	}
	ids := make(map[string]string, len(sums))
	for name, list := range sums {
		slices.Sort(list)
		sum := sha1.Sum([]byte(strings.Join(list, "\n")))
		ids[name] = hex.EncodeToString(sum[:])
	}
	return objectTree{tree, ids}
}

func (o objectTree) ObjectID(path string) string { return o.ids[path] }

func TestU01LinksAreRefusedAndNotFollowed(t *testing.T) {
	const canary = "canary-4711"
	outside := filepath.Join(t.TempDir(), "secret.yaml")
	if err := os.WriteFile(outside, []byte(canary+": [\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	link := func(from, to string) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			path := filepath.Join(dir, from)
			if err := os.RemoveAll(path); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(to, path); err != nil {
				t.Fatal(err)
			}
		}
	}
	both := func(all ...func(*testing.T, string)) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			for _, one := range all {
				one(t, dir)
			}
		}
	}
	tests := []struct {
		name string
		plan func(t *testing.T, dir string)
		at   string
	}{
		{"absolute, beside the template", link("units/u/x", outside), "units/u/x"},
		{"absolute, as the template", link("units/u/unit.yaml", outside), "units/u/unit.yaml"},
		{"absolute, as a file that the unit brings", link("units/u/conf", outside), "units/u/conf"},
		{"relative with many ..", link("units/u/conf", strings.Repeat("../", 40)+outside), "units/u/conf"},
		{"chain", both(link("units/u/a", "b"), link("units/u/b", outside)), "units/u/a"},
		{"loop", both(link("units/u/a", "b"), link("units/u/b", "a")), "units/u/b"},
		{"to itself", link("units/u/a", "a"), "units/u/a"},
		{"to nothing yet", link("units/u/a", "later"), "units/u/a"},
		{"inside the site", link("units/u/a", "unit.yaml"), "units/u/a"},
		{"folder", link("units/u/etc", "/etc"), "units/u/etc"},
		{"folder above", link("units/u/up", ".."), "units/u/up"},
		{"unit", link("units/v", "u"), "units/v"},
		{"units", both(func(t *testing.T, dir string) {
			if err := os.Rename(filepath.Join(dir, "units"), filepath.Join(dir, "other")); err != nil {
				t.Fatal(err)
			}
		}, link("units", "other")), "units"},
		{"site.yaml", link("site.yaml", outside), "site.yaml"},
		{"profile", link("profiles/x.yaml", outside), "profiles/x.yaml"},
		{"pipe", func(t *testing.T, dir string) {
			if err := syscall.Mkfifo(filepath.Join(dir, "units/u/pipe"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, "units/u/pipe"},
	}
	for _, test := range tests {
		t.Run("U-01 "+test.name, func(t *testing.T) {
			dir := t.TempDir()
			for name, text := range map[string]string{"site.yaml": siteFile, "profiles/edge-small.yaml": edgeSmall,
				"units/u/unit.yaml": smallUnit("files: [{from: conf, to: /conf}]\n"), "units/u/conf": "x"} {
				path := filepath.Join(dir, name)
				if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
					t.Fatal(err)
				}
			}
			mustLoad(t, os.DirFS(dir))
			test.plan(t, dir)
			root, err := os.OpenRoot(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer root.Close()
			for _, tree := range []fs.FS{os.DirFS(dir), root.FS()} {
				_, err = Load(tree)
				wantRefusal(t, err, "E_PATH", test.at+": ", "want a")
				if strings.Contains(err.Error(), canary) {
					t.Errorf("what is outside was read: %v", err)
				}
			}
		})
	}
}

func TestRefusedTrees(t *testing.T) {
	tests := []struct {
		name string
		tree fstest.MapFS
		code string
		want string
	}{
		{"no site.yaml", files("units/u/unit.yaml", smallUnit("")), "E_DECODE", "site.yaml: no such file"},
		{"folder without unit.yaml", northSea("units/v/unit.yml", ""), "E_DECODE", "units/v/unit.yaml: no such file"},
		{"file among the units", northSea("units/v.yaml", ""), "E_PATH", "units/v.yaml: a file; want a folder with unit.yaml"},
		{"unit's name", northSea("units/Relay/unit.yaml", ""), "E_PATH", "units/Relay"},
		{"profile of another kind", northSea("profiles/a.yml", ""), "E_PATH", "profiles/a.yml"},
		{"profile's name", northSea("profiles/a.yaml", "profile: b\n"), "E_DECODE", `profiles/a.yaml:1:10 profile: "b"; want a, the file's name`},
		{"what a profile may not say", northSea("profiles/a.yaml", "security: {privileged: true}\n"), "E_DECODE", "the unknown key \"security\""},
		{"files too large together", northSea("units/u/unit.yaml", smallUnit("files: [{from: a, to: /a}, {from: b, to: /b}]\n"),
			"units/u/a", strings.Repeat("x", maxBrought/2), "units/u/b", strings.Repeat("x", maxBrought/2+1)), "E_LIMIT", "b is one too many"},
		{"folders too deep", northSea("units/u/unit.yaml", smallUnit(""), "units/u/"+strings.Repeat("d/", 20)+"x", ""), "E_LIMIT", "16 deep"},
		{"two zones of one name", files("site.yaml", "site: s\nbranch: main\nzones: [a, a]\n"), "E_DECODE", "site.yaml:3:12 zones[1]"},
		{"a freeze that ends before it begins", files("site.yaml", "site: s\nbranch: main\nzones: [a]\nfreeze: [{from: \"2027-01-04T00:00:00Z\", to: \"2027-01-04T00:00:00Z\"}]\n"),
			"E_DECODE", `site.yaml:4:45 freeze[0].to: "2027-01-04T00:00:00Z"; want a moment after 2027-01-04T00:00:00Z`},
		{"site without zones", files("site.yaml", "site: s\nbranch: main\n"), "E_DECODE", "site.yaml:1:1 zones: no such key"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			_, err := Load(test.tree)
			if all := refused(t, err); string(all[0].Code) != test.code || !strings.Contains(all[0].Error(), test.want) {
				t.Errorf("got %v\nwant %s with %q", err, test.code, test.want)
			}
		})
	}
	if site, err := Load(files("site.yaml", siteFile, "units/README.md", "", "profiles/.gitkeep", "")); err != nil || len(site.Units) != 0 {
		t.Errorf("an empty site: %v", err)
	}
}

// brokenDisk fails to open one file.
type brokenDisk struct {
	fstest.MapFS
	name string
}

func (b brokenDisk) Open(name string) (fs.File, error) {
	if name == b.name {
		return nil, syscall.EIO
	}
	return b.MapFS.Open(name)
}

func (b brokenDisk) Stat(name string) (fs.FileInfo, error) { return b.MapFS.Stat(name) }

func TestAnUnreadableTreeIsNoRefusal(t *testing.T) {
	for _, name := range []string{"site.yaml", "profiles/edge-small.yaml", "units/camera-relay/unit.yaml", "units/camera-relay/relay.toml"} {
		_, err := Load(brokenDisk{northSea("units/a/unit.yaml", "teir: 1\n"), name})
		if !errors.Is(err, syscall.EIO) || len(refusal.All(err)) != 0 || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: got %v, want the disk's error alone", name, err)
		}
	}
}

func TestProfiles(t *testing.T) {
	load := func(profile, unit string) (*Unit, error) {
		site, err := Load(files("site.yaml", siteFile, "profiles/p.yaml", profile, "units/u/unit.yaml",
			"unit: u\nprofile: p\nvariants: [{native: reg.example/u}]\n"+unit))
		if err != nil {
			return nil, err
		}
		return site.Unit("u"), nil
	}
	tests := []struct {
		name, profile, unit string
		got                 func(u *Unit) any
		want                any
	}{
		{"tier of the profile", "tier: 2\n", "", func(u *Unit) any { return u.Tier }, 2},
		{"more sensitive profile", "tier: 0\n", "tier: 2\n", func(u *Unit) any { return u.Tier }, 0},
		{"more sensitive unit", "tier: 2\n", "tier: 1\n", func(u *Unit) any { return u.Tier }, 1},
		{"bounds key by key", "tier: 1\nresources: {cpu: {max: 1}, memory: {min: 1Mi, max: 2Mi}}\n", "resources: {memory: {max: 8Mi}, pids: {max: 3}}\n",
			func(u *Unit) any { return u.Resources },
			Resources{CPU: CPURange{Max: 1000}, Memory: ByteRange{Min: 1 << 20, Max: 8 << 20}, PIDs: MaxCount{Max: 3}}},
		{"environment key by key", "tier: 1\nrun: {env: {A: p, B: p}}\n", "run: {env: {B: u, C: u}}\n", func(u *Unit) any { return u.Run.Env },
			map[EnvName]string{"A": "p", "B": "u", "C": "u"}},
		{"lists as a whole", "tier: 1\nrun: {args: [a, b], ports: [{name: a}]}\n", "run: {args: [c]}\n", func(u *Unit) any { return []any{u.Run.Args, u.Run.Ports} },
			[]any{[]string{"c"}, []Port{{Name: "a"}}}},
		{"an empty list too", "tier: 1\nrun: {args: [a, b]}\n", "run: {args: []}\n", func(u *Unit) any { return len(u.Run.Args) }, 0},
		{"labels key by key", "tier: 1\nplace: {on: {zone: [canary], labels: {a: p, b: p}}}\n", "place: {on: {labels: {b: u}}}\n", func(u *Unit) any { return u.Place.On },
			On{Zone: []Name{"canary"}, Labels: map[Label]Label{"a": "p", "b": "u"}}},
		{"probe as a whole, its times key by key", "tier: 1\nrun: {ports: [{name: a}]}\nhealth: {http: {port: a, path: /p, status: 204}, every: 1s, after: 2}\n",
			"health: {http: {port: a, path: /u}, every: 3s}\n", func(u *Unit) any { return []any{*u.Health.HTTP, u.Health.Every.String(), u.Health.After} },
			[]any{HTTPProbe{Port: "a", Path: "/u"}, "3s", 2}},
		{"other kind of probe", "tier: 1\nrun: {ports: [{name: a}]}\nhealth: {http: {port: a, path: /p}, failures: 9}\n", "health: {process: {}}\n",
			func(u *Unit) any { return []any{u.Health.HTTP == nil, u.Health.Process != nil, u.Health.Failures} }, []any{true, true, 9}},
		{"defaults under both", "tier: 1\n", "", func(u *Unit) any { return []any{u.Run.User, u.Run.Grace.String(), string(u.Place.Count)} }, []any{65532, "10s", "all"}},
		{"user 0 of the unit stands", "tier: 1\nrun: {user: 1000}\n", "run: {user: 0}\n", func(u *Unit) any { return u.Run.User }, 0},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			u, err := load(test.profile, test.unit)
			if err != nil {
				t.Fatal(err)
			}
			if got := test.got(u); !reflect.DeepEqual(got, test.want) {
				t.Errorf("got %v, want %v", got, test.want)
			}
		})
	}
	t.Run("a fault of the profile stands in the profile", func(t *testing.T) {
		_, err := load("tier: 1\nresources: {cpu: {min: 2}}\n", "resources: {cpu: {max: 1}}\n")
		wantRefusal(t, err, "E_DECODE", "profiles/p.yaml:2:24 resources.cpu.min")
	})
	t.Run("a fault of the profile is told once", func(t *testing.T) {
		_, err := Load(northSea("profiles/edge-small.yaml", "tire: 1\n"))
		if all := refused(t, err); len(all) != 1 {
			t.Errorf("got %v", err)
		}
	})
	t.Run("two units share a profile's tree and leave it alone", func(t *testing.T) {
		tree := northSea("units/a/unit.yaml", "unit: a\nprofile: edge-small\nrun: {env: {LOG: a}, ports: [{name: http}]}\nvariants: [{native: reg.example/u}]\n",
			"units/b/unit.yaml", "unit: b\nprofile: edge-small\nrun: {ports: [{name: http}]}\nvariants: [{native: reg.example/u}]\n")
		site := mustLoad(t, tree)
		if got := site.Unit("b").Run.Env["LOG"]; got != "info" {
			t.Errorf("b has LOG=%s", got)
		}
	})
}

func TestGraph(t *testing.T) {
	load := func(needs map[string]string) (*Site, error) {
		tree := files("site.yaml", siteFile)
		for name, list := range needs {
			maps.Copy(tree, files("units/"+name+"/unit.yaml", "unit: "+name+"\ntier: 3\nneeds: ["+list+"]\nvariants: [{native: reg.example/u}]\n"))
		}
		return Load(tree)
	}
	good := []struct {
		needs map[string]string
		want  string
	}{
		{map[string]string{"c": "", "a": "", "b": ""}, "[a b c]"},
		{map[string]string{"a": "c", "b": "", "c": "b"}, "[b c a]"},
		{map[string]string{"a": "d, c", "b": "d", "c": "e", "d": "e", "e": ""}, "[e c d a b]"},
	}
	for _, test := range good {
		site, err := load(test.needs)
		if err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprint(site.Order); got != test.want {
			t.Errorf("%v: order %s, want %s", test.needs, got, test.want)
		}
	}
	bad := []struct {
		needs map[string]string
		want  []string
	}{
		{map[string]string{"a": "a"}, []string{"units/a/unit.yaml:3:9 needs[0]: the cycle a → a; want"}},
		{map[string]string{"a": "b", "b": "a"}, []string{"units/a/unit.yaml:3:9 needs[0]: the cycle a → b → a; want"}},
		{map[string]string{"z": "b", "b": "x, c", "c": "d", "d": "b", "x": ""}, []string{"units/b/unit.yaml:3:12 needs[1]: the cycle b → c → d → b"}},
		{map[string]string{"a": "b", "b": "a", "c": "d", "d": "c"}, []string{"a → b → a", "c → d → c"}},
		{map[string]string{"message-bus": "", "a": "mesage-bus, nothing-near"}, []string{`units/a/unit.yaml:3:9 needs[0]: "mesage-bus", which is no unit of the site; want a folder under units/; did you mean message-bus?`,
			`units/a/unit.yaml:3:21 needs[1]: "nothing-near"`}},
	}
	for _, test := range bad {
		_, err := load(test.needs)
		if got := refused(t, err); len(got) != len(test.want) {
			t.Errorf("%v: got %v", test.needs, err)
		}
		for _, want := range test.want {
			wantRefusal(t, err, "E_GRAPH", want)
		}
	}
}

func TestLoaderDecodesWhatChanged(t *testing.T) {
	tree := northSea("units/a/unit.yaml", strings.Replace(smallUnit(""), "unit: u", "unit: a", 1))
	var l Loader
	load := func(want int) *Site {
		t.Helper()
		site, err := l.Load(objects(tree))
		if err != nil {
			t.Fatal(err)
		}
		if l.decoded != want {
			t.Errorf("%d units decoded, want %d", l.decoded, want)
		}
		fresh := mustLoad(t, tree)
		if !reflect.DeepEqual(site.Units, fresh.Units) || !slices.Equal(site.Order, fresh.Order) || !reflect.DeepEqual(site.Config, fresh.Config) {
			t.Error("what was remembered is not what the files say")
		}
		return site
	}
	set := func(name, text string) { tree = maps.Clone(tree); maps.Copy(tree, files(name, text)) }
	first := load(3)
	load(0)
	set("units/camera-relay/relay.toml", "listen = 9090\n")
	second := load(1)
	if string(second.units[2].files[0].Content) != "listen = 9090\n" || string(first.units[2].files[0].Content) != "listen = 8080\n" {
		t.Error("a changed file of a unit is not the unit's, or the old site changed")
	}
	set("profiles/edge-small.yaml", edgeSmall+"tier: 1\n")
	if _, err := l.Load(objects(tree)); err == nil {
		t.Error("a profile that became wrong must be seen")
	}
	set("profiles/edge-small.yaml", strings.Replace(edgeSmall, "tier: 2", "tier: 1", 1))
	if got := load(2).Unit("camera-relay").Tier; got != 1 {
		t.Errorf("tier %d after the profile changed", got)
	}
	set("profiles/other.yaml", "tier: 1\n")
	load(0)
	set("site.yaml", siteFile+"# a comment\n")
	load(0)
	set("site.yaml", strings.Replace(siteFile, "edge-b", "edge-c", 1))
	_, err := l.Load(objects(tree))
	wantRefusal(t, err, "E_DECODE", "units/camera-relay/unit.yaml", "place.on.zone[1]")
	set("site.yaml", siteFile)
	delete(tree, "units/a/unit.yaml")
	load(0)
	set("units/a/unit.yaml", "unit: a\n")
	if _, err := l.Load(objects(tree)); err == nil {
		t.Error("a wrong unit loaded")
	}
	delete(tree, "units/a/unit.yaml")
	load(0)
}
