package review

import (
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kindos/kmo/policy/trust"
	"github.com/kindos/kmo/reconciler/template"
)

// site is a site of one unit, loaded, with more files beside it.
func site(t *testing.T, unit string, more map[string]string) (fstest.MapFS, *template.Site) {
	t.Helper()
	tree := fstest.MapFS{
		"site.yaml":             {Data: []byte("site: north-sea\nbranch: main\nzones: [edge]\n"), Mode: 0o644},
		"units/relay/unit.yaml": {Data: []byte(unit), Mode: 0o644},
	}
	for name, data := range more {
		tree[name] = &fstest.MapFile{Data: []byte(data), Mode: 0o644}
	}
	loaded, err := template.Load(tree)
	if err != nil {
		t.Fatal(err)
	}
	return tree, loaded
}

const (
	image1 = "reg.example/relay@sha256:1111111111111111111111111111111111111111111111111111111111111111"
	image2 = "reg.example/relay@sha256:2222222222222222222222222222222222222222222222222222222222222222"
	root1  = "kmo1:sha3-256:1111111111111111111111111111111111111111111111111111111111111111"
	root2  = "kmo1:sha3-256:2222222222222222222222222222222222222222222222222222222222222222"
	plain  = "unit: relay\ntier: 1\nvariants: [{image: '" + image1 + "', merkle: '" + root1 + "'}]\n"
)

// TestLines: what a person sees of a change is all of it, but for secrets, and nothing that steers the terminal.
func TestLines(t *testing.T) {
	files := "files: [{from: relay.toml, to: /etc/relay.toml}]\n"
	for _, tt := range []struct {
		name          string
		before, after string
		old, now      map[string]string
		want          []string
	}{
		{name: "an image by its digests", before: plain, after: strings.NewReplacer(image1, image2, root1, root2).Replace(plain), want: []string{
			"  images",
			"    variants[0].image", `      from "` + image1 + `"`, `      to   "` + image2 + `"`,
			"    variants[0].merkle", `      from "` + root1 + `"`, `      to   "` + root2 + `"`,
			"  files", "    units/relay/unit.yaml: as its fields say",
		}},
		{name: "fields, with lists of names told apart", before: plain + "run: {env: {REGION: north}, ports: [{name: http, port: 80}]}\n",
			after: plain + "intent: {kind: fix, summary: because}\nrun: {args: [-v], env: {REGION: south, ZONE: x}, ports: [{name: admin, port: 81}, {name: http, port: 8080}]}\n", want: []string{
				"  fields",
				`    intent.kind: nothing -> "fix"`,
				`    intent.summary: nothing -> "because"`,
				`    run.args: nothing -> ["-v"]`,
				`    run.env.REGION: "north" -> "south"`,
				`    run.env.ZONE: nothing -> "x"`,
				`    run.ports[admin].name: nothing -> "admin"`,
				"    run.ports[admin].port: nothing -> 81",
				"    run.ports[http].port: 80 -> 8080",
				"  files", "    units/relay/unit.yaml: as its fields say",
			}},
		{name: "only a comment", before: plain, after: "# why not\n" + plain, want: []string{
			"  files", "    units/relay/unit.yaml", "      @@ -1,3 +1,4 @@", "      +# why not", "       unit: relay", "       tier: 1",
			"       variants: [{image: '" + image1 + "', merkle: '" + root1 + "'}]",
		}},
		{name: "the lines of a file, none of which steers the terminal", before: plain + files, after: plain + files,
			old: map[string]string{"units/relay/relay.toml": "a = 1\nb = 2\n"}, now: map[string]string{"units/relay/relay.toml": "a = 1\nb = 3\x1b[1A\x1b[2K\n# \u202egnihton\n"}, want: []string{
				"  files", "    units/relay/relay.toml", "      @@ -1,2 +1,3 @@", "       a = 1", "      -b = 2",
				`      "+b = 3\x1b[1A\x1b[2K" (quoted: it has characters that do not show)`, `      "+# \u202egnihton" (quoted: it has characters that do not show)`,
			}},
		{name: "that a secret changes, and nothing of it", before: plain, after: plain,
			old: map[string]string{"units/relay/named": "token: hunter2\n"}, now: map[string]string{"units/relay/named": "token: hunter3\n", "units/relay/z.sops.yaml": "token: hunter4\n", "units/relay/other.key": "-----BEGIN OPENSSH PRIVATE KEY-----\nx\n"}, want: []string{
				"  files",
				"    units/relay/named: a secret, whose content is not shown", "      from 15 bytes, kmo1:…", "      to   15 bytes, kmo1:…",
				"    units/relay/other.key: new, 38 bytes: a secret, whose content is not shown", "      from nothing", "      to   38 bytes, kmo1:…",
				"    units/relay/z.sops.yaml: new, 15 bytes: a secret, whose content is not shown", "      from nothing", "      to   15 bytes, kmo1:…",
			}},
		{name: "a file that is not text", before: plain + files, after: plain + files,
			old: map[string]string{"units/relay/relay.toml": "a\x00"}, now: map[string]string{"units/relay/relay.toml": "b\x00"}, want: []string{
				"  files", "    units/relay/relay.toml: not text", "      from 2 bytes, kmo1:…", "      to   2 bytes, kmo1:…",
			}},
		{name: "a file that goes and one that comes", before: plain, after: plain,
			old: map[string]string{"units/relay/old": "a\nb\n"}, now: map[string]string{"units/relay/new": "c\n"}, want: []string{
				"  files", "    units/relay/new: new, 2 bytes", "      @@ -0,0 +1,1 @@", "      +c", "    units/relay/old: removed, 4 bytes",
			}},
		{name: "nothing", before: plain, after: plain},
	} {
		t.Run(tt.name, func(t *testing.T) {
			unit := Unit{Reviewed: trust.Reviewed{UnitFacts: trust.UnitFacts{Unit: "relay"}}}
			for _, side := range []struct {
				unit string
				more map[string]string
				into *Side
			}{{tt.before, tt.old, &unit.Before}, {tt.after, tt.now, &unit.After}} {
				tree, loaded := site(t, side.unit, side.more)
				if side.more["units/relay/named"] != "" { // no build decodes these yet
					loaded.Units[0].Secrets = []template.Secret{{From: "named", Key: "token", To: "/run/secrets/token"}}
				}
				var err error
				if *side.into, err = Read(tree, loaded, unit.UnitFacts); err != nil {
					t.Fatal(err)
				}
			}
			got := unit.Lines()
			for i, line := range got {
				if at := strings.Index(line, " bytes, kmo1:"); at >= 0 {
					got[i] = line[:at] + " bytes, kmo1:…"
				}
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestSides: a unit that is new, one that is gone, and what is no unit's folder.
func TestSides(t *testing.T) {
	tree, loaded := site(t, plain, map[string]string{"policy/site.rego": "package site\n"})
	unit := Unit{Reviewed: trust.Reviewed{UnitFacts: trust.UnitFacts{Unit: "relay"}}}
	var err error
	if unit.After, err = Read(tree, loaded, unit.UnitFacts); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(unit.Lines(), "\n"); !strings.Contains(got, "variants[0].image\n      from nothing\n") || !strings.Contains(got, "unit.yaml: new, ") {
		t.Errorf("a new unit:\n%s", got)
	}
	unit.Before, unit.After = unit.After, Side{}
	if got := strings.Join(unit.Lines(), "\n"); !strings.Contains(got, "\n      to   nothing\n") || !strings.Contains(got, "unit.yaml: removed, ") {
		t.Errorf("a unit that is gone:\n%s", got)
	}
	for name, want := range map[string]string{"@policy": "      +package site", "@site": `    branch: nothing -> "main"`} {
		unit := Unit{Reviewed: trust.Reviewed{UnitFacts: trust.UnitFacts{Unit: name}}}
		if unit.After, err = Read(tree, loaded, unit.UnitFacts); err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(unit.Lines(), "\n"); !strings.Contains(got, want) {
			t.Errorf("%s:\n%s\nwant %q", name, got, want)
		}
	}
}

func TestQuorum(t *testing.T) {
	u := trust.Reviewed{UnitFacts: trust.UnitFacts{Unit: "relay", Action: "upgrade", Tier: 1, Need: 2,
		Counted:   []trust.Approval{{Principal: "bob", Expires: time.Unix(0, 0)}},
		Uncounted: []trust.Approval{{Principal: "alice", Code: "E_QUORUM", Why: "alice wrote it"}, {File: "approvals/\x1b[2J", Code: "E_DECODE", Why: "no JSON"}}},
		Authors: []string{"alice"}, Open: []string{"carol", "dave"}}
	want := []string{
		"relay: 1 of 2 approvals, 1 missing",
		"  counts: bob",
		"  does not count: alice: E_QUORUM alice wrote it",
		`"  does not count: approvals/\x1b[2J: E_DECODE no JSON" (quoted: it has characters that do not show)`,
		"  written by: alice",
		"  may still approve: carol, dave",
	}
	if diff := cmp.Diff(want, Quorum(u)); diff != "" {
		t.Error(diff)
	}
	u.Open = nil
	if got := Quorum(u); got[len(got)-1] != "  may still approve: nobody of the trust root" {
		t.Errorf("%q", got[len(got)-1])
	}
}
