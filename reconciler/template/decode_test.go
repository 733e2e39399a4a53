package template

import (
	"encoding/json"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

// loadUnit loads a site of which one unit, u, has the text.
func loadUnit(text string) (*Site, error) {
	return Load(files("site.yaml", siteFile, "profiles/edge-small.yaml", edgeSmall, "units/u/unit.yaml", text))
}

// smallUnit is the least that a unit may say; more follows it.
func smallUnit(more string) string {
	return "unit: u\ntier: 3\nvariants: [{native: reg.example/u@" + sha + "}]\n" + more
}

func TestSmallUnit(t *testing.T) {
	site, err := loadUnit(smallUnit(""))
	if err != nil {
		t.Fatal(err)
	}
	got, err := json.Marshal(site.Unit("u"))
	if err != nil {
		t.Fatal(err)
	}
	want := `{"unit":"u","tier":3,"variants":[{"native":"reg.example/u@` + sha + `"}],"place":{"count":"all"},` +
		`"run":{"user":65532,"grace":"10s"},"health":{"process":{}}}`
	if string(got) != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	dos, err := loadUnit(strings.ReplaceAll(smallUnit(""), "\n", "\r\n"))
	if err != nil || !reflect.DeepEqual(dos.Unit("u"), site.Unit("u")) {
		t.Errorf("with the line ends of another system: %v", err)
	}
	if site.Unit("v") != nil {
		t.Error("got a unit that is not there")
	}
}

func TestRefusedYAML(t *testing.T) {
	deep := strings.Repeat("{a: ", 20) + "1" + strings.Repeat("}", 20)
	tests := []struct {
		name, more string
		parts      []string
	}{
		{"T67 duplicate key", "tier: 2\n", []string{"units/u/unit.yaml:4:1 tier", "again", "line 2"}},
		{"T67 duplicate key below", "run: {args: [], args: []}\n", []string{":4:17 run.args", "again"}},
		{"T67 anchor", "needs: &all [a]\n", []string{":4:8 needs", "an anchor, &all"}},
		{"T67 alias", "needs: &n []\nfiles: *n\n", []string{":5:8 files", "an alias, *n"}},
		{"T67 alias of nothing", "needs: *n\n", []string{":4:8", "unknown anchor"}},
		{"T67 merge key", "run:\n  <<: {dir: /x}\n", []string{":5:3 run", "a merge key"}},
		{"T67 tag", "needs: !!seq []\n", []string{":4:8 needs", "a tag, !!seq"}},
		{"T67 own tag", "run: !exec {}\n", []string{":4:6 run", "a tag, !exec"}},
		{"T67 bare tag", "run: {dir: ! /x}\n", []string{"run.dir", "a tag, !"}},
		{"T67 unknown field", "security: {priviledged: true}\n", []string{`:4:12 security.priviledged: the unknown key "priviledged"`, "did you mean privileged?"}},
		{"T67 unknown field, two letters swapped", "resources: {memroy: {max: 1Mi}}\n", []string{"did you mean memory?"}},
		{"T67 unknown field, other case", "resources: {Memory: {max: 1Mi}}\n", []string{"did you mean memory?"}},
		{"T67 unknown field, nothing near", "wibble: 1\n", []string{":4:1 wibble", "one of unit, profile, tier"}},
		{"T67 octal", "run: {user: 0644}\n", []string{":4:13 run.user", `"0644", which YAML reads as int`, "a whole number, 0 to 2147483647"}},
		{"user that no program can have", "run: {user: 2147483648}\n", []string{":4:13 run.user", "0 to 2147483647"}},
		{"T67 octal of the new kind", "run: {user: 0o17}\n", []string{"run.user"}},
		{"T67 hex", "run: {user: 0x1F}\n", []string{"run.user"}},
		{"T67 binary", "run: {user: 0b1}\n", []string{"run.user"}},
		{"T67 underscores", "run: {user: 65_532}\n", []string{"run.user"}},
		{"T67 exponent", "run: {user: 1e3}\n", []string{"run.user"}},
		{"T67 sign", "run: {user: +5}\n", []string{"run.user"}},
		{"T67 negative", "run: {user: -1}\n", []string{"run.user"}},
		{"T67 quoted number", "run: {user: '5'}\n", []string{"run.user"}},
		{"T67 too large a number", "run: {user: 99999999999999999999}\n", []string{"run.user"}},
		{"T67 octal mode", "files: [{from: f, to: /f, mode: 0644}]\n", []string{"files[0].mode", `in quotes: "0644"`}},
		{"T67 yes for true", "security: {privileged: yes}\n", []string{":4:24 security.privileged", "true or false"}},
		{"T67 on for true", "security: {privileged: on}\n", []string{"true or false"}},
		{"T67 TRUE for true", "security: {privileged: TRUE}\n", []string{"true or false"}},
		{"T67 quoted true", "security: {privileged: 'true'}\n", []string{"true or false"}},
		{"T67 number for a text", "run: {env: {PORT: 8080}}\n", []string{":4:19 run.env.PORT", `"8080" in quotes`}},
		{"T67 yes for a text", "run: {env: {A: yes}}\n", []string{`"yes" in quotes`}},
		{"T67 date for a text", "intent: {kind: fix, ticket: 2026-11-22}\n", []string{"intent.ticket", "timestamp"}},
		{"T67 number of base 60 for a text", "run: {args: [22:22]}\n", []string{"run.args[0]", `"22:22" in quotes`}},
		{"T67 infinity for a text", "run: {args: [.inf]}\n", []string{"float"}},
		{"T67 null", "run:\n", []string{":4:5 run: no value", "or no key at all"}},
		{"T67 tilde", "run: {dir: ~}\n", []string{"run.dir"}},
		{"T67 null in a list", "run: {args: [a, ]}\nneeds: [null]\n", []string{"needs[0]"}},
		{"T67 true as a key", "run: {env: {true: x}}\n", []string{"the key", "in quotes"}},
		{"T67 list as a key", "run:\n  ? [a]\n  : b\n", []string{"a key that is no word"}},
		{"T67 list for a mapping", "run: []\n", []string{"run: a list", "a mapping"}},
		{"T67 mapping for a list", "needs: {}\n", []string{"needs: a mapping", "a list"}},
		{"T67 list for a text", "run: {dir: [/x]}\n", []string{"run.dir: a list"}},
		{"T67 text for a list", "run: {args: -x}\n", []string{"run.args", "a list"}},
		{"U-07 too deep", "run: " + deep + "\n", []string{":4:", "too deep", "at most 16"}},
		{"U-07 too deep in blocks", "run: \n  " + strings.Repeat("- ", 20) + "1\n", []string{"too deep"}},
		{"second document", "---\nunit: v\n", []string{":4:1", "another document", "one document"}},
		{"second document, broken", "---\n[\n", []string{"YAML"}},
		{"tab", "\trun: {}\n", []string{":4:1"}},
		{"bad escape", `run: {dir: "\q"}` + "\n", []string{":4:13", "escape"}},
		{"direction of reading turned", "run: {args: [\"\u202e\"]}\n", []string{":4:15", "U+202E"}},
		{"line end of YAML's own", "# harmless \u2028security: {privileged: true}\n", []string{"U+2028"}},
		{"carriage return alone", "# harmless \rsecurity: {privileged: true}\n", []string{":4:12", "a carriage return alone"}},
		{"escape of a terminal", "# \x1b[2J\n", []string{":4:3", "U+001B"}},
		{"U-39 zero byte by escape", `run: {args: ["\0"]}` + "\n", []string{":4:14 run.args[0]", "U+0000"}},
		{"U-39 control by escape", `run: {env: {A: "\x9b2J"}}` + "\n", []string{":4:16 run.env.A", "U+009B", "by an escape"}},
		{"U-39 direction of reading turned by escape", "run:\n  args:\n    - \"\\u202e\"\n", []string{":6:7 run.args[0]", "U+202E"}},
		{"U-39 line end of YAML's own by escape", `intent: {kind: fix, summary: "a\Lb"}` + "\n", []string{":4:30 intent.summary", "U+2028"}},
		{"U-39 carriage return by escape", `hooks: {exit: [[/app, "x\ry"]]}` + "\n", []string{":4:23 hooks.exit[0][1]", "a carriage return alone"}},
		{"U-39 key by escape", `place: {on: {labels: {"a\u200bb": x}}}` + "\n", []string{":4:23 place.on.labels", "U+200B"}},
		{"U-39 path by escape", `mounts: [{from: "/srv\u202e", to: /x}]` + "\n", []string{":4:17 mounts[0].from", "U+202E"}},
		{"same need twice", "needs: [v, v]\n", []string{"needs[1]", "again"}},
		{"intent of no kind", "intent: {kind: whim}\n", []string{"feature, fix, security, rollback or config"}},
		{"needed key", "mounts: [{to: /x}]\n", []string{"mounts[0].from", "no such key", "folder of the host"}},
		{"two probes", "health: {tcp: {port: a}, exec: {argv: [x]}}\n", []string{"health: tcp and exec", "one of http, tcp, exec or process"}},
		{"no words to run", "health: {exec: {argv: []}}\n", []string{"0 members", "1 to 64"}},
		{"hook without a word", "hooks: {preInit: [[]]}\n", []string{"hooks.preInit[0]"}},
		{"hook that is a text", "hooks: {preInit: [/app migrate]}\n", []string{"hooks.preInit[0]", "a list"}},
		{"path with ..", "overlay: {keep: [/var/../etc]}\n", []string{"overlay.keep[0]", "a clean absolute path"}},
		{"path that ends in a slash", "overlay: {keep: [/var/]}\n", []string{"overlay.keep[0]"}},
		{"file outside", "files: [{from: ../v/unit.yaml, to: /x}]\n", []string{"files[0].from", "a clean path inside the unit's folder"}},
		{"file of the host", "files: [{from: /etc/shadow, to: /x}]\n", []string{"files[0].from"}},
		{"file that is not there", "files: [{from: x, to: /x}]\n", []string{"files[0].from", "a file in units/u"}},
		{"two files at one path", "files: [{from: unit.yaml, to: /x}, {from: unit.yaml, to: /x}]\n", []string{"files[1].to", "files[0].to is too"}},
		{"mount over a kept path", "mounts: [{from: /srv, to: /x}]\noverlay: {keep: [/x]}\n", []string{"overlay.keep[0]", "mounts[0].to is too"}},
		{"kept path in a kept path", "overlay: {keep: [/a, /a/b/c]}\n", []string{"overlay.keep[1]", "lies in overlay.keep[0]", "a path outside /a"}},
		{"file in a mount", "mounts: [{from: /srv, to: /x}]\nfiles: [{from: unit.yaml, to: /x/y}]\n", []string{"files[0].to", "lies in mounts[0].to"}},
		{"file that is the system's", "files: [{from: unit.yaml, to: /proc/x}]\n", []string{"files[0].to", "a path outside /proc"}},
		{"file over the one program", "variants: [{native: \"reg.example/x@sha256:" + strings.Repeat("a", 64) + "\"}]\nfiles: [{from: unit.yaml, to: /app}]\n", []string{"files[0].to", "a path outside /app"}},
		{"memory for nothing", "resources: {memory: {max: 512}}\n", []string{"resources.memory.max: 512", "at least 1Mi"}},
		{"deadline before its bake, which it does not say", "gate: {deadline: 10s}\n", []string{"gate.deadline", "more than 10s"}},
		{"variable of a port", "run: {env: {KMO_PORT_HTTP: \"1\"}}\n", []string{":4:28 run.env.KMO_PORT_HTTP", "another name"}},
		{"descriptor of a port", "run: {env: {KMO_FD_HTTP: \"3\"}}\n", []string{":4:26 run.env.KMO_FD_HTTP", "those that begin with KMO_ are kMO's"}},
		{"deadline before it can pass", "health: {process: {}, every: 5s, after: 3}\ngate: {bake: 1m, deadline: 70s}\n", []string{"gate.deadline", "more than 70s"}},
		{"deadline before it can pass at the usual pace", "health: {process: {}, after: 3}\ngate: {bake: 2s, deadline: 12s}\n", []string{"gate.deadline", "more than 12s"}},
		{"deadline before its bake is over", "gate: {deadline: 2s, bake: 1h}\n", []string{":4:18 gate.deadline: 2s", "more than 1h, the soonest"}},
		{"least above most", "resources: {cpu: {min: 2, max: 1}}\n", []string{":4:24 resources.cpu.min", "at most max, 1"}},
		{"least memory above most", "resources: {memory: {min: 2Gi, max: 1Gi}}\n", []string{"resources.memory.min"}},
		{"another spelling of a core", "resources: {cpu: {max: 1000m}}\n", []string{"resources.cpu.max", "it spelled 1"}},
		{"another spelling of a gigabyte", "resources: {memory: {max: 1024Mi}}\n", []string{"it spelled 1Gi"}},
		{"megabytes", "resources: {memory: {max: 128MB}}\n", []string{"resources.memory.max", "32Mi"}},
		{"half a core", "resources: {cpu: {max: 0.5}}\n", []string{"resources.cpu.max", "100m"}},
		{"duration without a unit", "gate: {bake: 60}\n", []string{"gate.bake", "5s, 5m or 2h"}},
		{"duration of two units", "gate: {bake: 1m30s}\n", []string{"gate.bake"}},
		{"no duration", "gate: {bake: 0s}\n", []string{"gate.bake"}},
		{"unknown zone", "place: {on: {zone: [edge-c]}}\n", []string{":4:21 place.on.zone[0]", "canary, edge-a or edge-b"}},
		{"unknown architecture", "place: {on: {arch: [x86_64]}}\n", []string{"amd64"}},
		{"same port name", "run: {ports: [{name: a, port: 1}, {name: a, port: 2}]}\n", []string{"run.ports[1].name", "again"}},
		{"same port", "run: {ports: [{name: a, port: 1}, {name: b, port: 1}]}\n", []string{"run.ports[1].port"}},
		{"same host port", "run: {ports: [{name: a, host: 1}, {name: b, host: 1}]}\n", []string{"run.ports[1].host"}},
		{"port 0", "run: {ports: [{name: a, port: 0}]}\n", []string{"1 to 65535"}},
		{"probe of no port", "health: {http: {port: web, path: /}}\n", []string{":4:23 health.http.port", "under run.ports"}},
		{"tag in quotes where none may be", "intent: {kind: !!str fix}\n", []string{"a tag"}},
		{"merkle root of another kind", "variants: [{wasm: reg.example/u, merkle: sha256:00}]\n", []string{"again"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			_, err := loadUnit(smallUnit(test.more))
			wantRefusal(t, err, "E_DECODE", test.parts...)
			for _, one := range refused(t, err) {
				if !strings.HasPrefix(one.Subject, "units/u/unit.yaml:") {
					t.Errorf("no place in %q", one.Subject)
				}
			}
		})
	}
}

func TestRefusedFiles(t *testing.T) {
	tests := []struct{ name, text, want string }{
		{"empty", "", ":1:1: an empty file"},
		{"only a comment", "# nothing\n", "an empty file"},
		{"null", "null\n", "no mapping"},
		{"list", "- unit: u\n", "no mapping"},
		{"byte order mark", "\xef\xbb\xbfunit: u\n", "a byte order mark"},
		{"Latin-1", "unit: u\n# \xe9t\xe9\n", ":2:3: bytes that are no UTF-8"},
		{"UTF-16", "\xff\xfeu\x00", "no UTF-8"},
		{"directive", "%YAML 1.1\n---\nunit: u\n", ":1:1: a YAML directive"},
		{"directive for tags", "# x\n%TAG ! tag:x,2026:\n---\nunit: u\n", ":2:1: a YAML directive"},
		{"U-07 larger than 1 MiB", "# " + strings.Repeat("x", 1<<20), "at most 1048576 bytes"},
		{"U-07 many values", "needs: [" + strings.Repeat("a,", 25_000) + "a]\n", "at most 20000"},
		{"U-07 many tiny documents", strings.Repeat("---\n", 25_000), "at most 20000"},
		{"U-07 many lists on one line", "a: " + strings.Repeat("- ", 25_000), "at most 20000"},
		{"other unit", "unit: v\ntier: 3\nvariants: [{native: reg.example/u}]\n", `:1:7 unit: "v"; want u, the folder's name`},
		{"no variant", "unit: u\ntier: 3\nvariants: []\n", "1 to 16"},
		{"no format", "unit: u\ntier: 3\nvariants: [{backends: [native]}]\n", ":3:12 variants[0]: none of them; want one of image, lxc, wasm, appimage or native"},
		{"two formats", "unit: u\ntier: 3\nvariants: [{image: r.example/u, wasm: r.example/u}]\n", "image and wasm"},
		{"no tier", "unit: u\nvariants: [{native: reg.example/u}]\n", ":1:1 tier: no such key; want it, here or in a profile"},
		{"profile that is not there", "unit: u\nprofile: edge-big\nvariants: [{native: reg.example/u}]\n", "there is no profiles/edge-big.yaml"},
		{"profile outside", "unit: u\nprofile: ../edge\nvariants: [{native: reg.example/u}]\n", "a name: lower-case"},
		{"short digest", "unit: u\ntier: 3\nvariants: [{native: reg.example/u@sha256:00}]\n", "variants[0].native"},
		{"capital digest", "unit: u\ntier: 3\nvariants: [{native: reg.example/u@sha256:" + strings.Repeat("A", 64) + "}]\n", "variants[0].native"},
		{"no repository", "unit: u\ntier: 3\nvariants: [{native: u}]\n", "an image: host/repository@sha256:"},
		{"root of zeros", "unit: u\ntier: 3\nvariants: [{native: r.example/u, merkle: kmo1:sha3-256:" + strings.Repeat("0", 64) + "}]\n", "all zero is no root"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			_, err := loadUnit(test.text)
			wantRefusal(t, err, "E_DECODE", test.want)
		})
	}
}

func TestAllFaultsAtOnce(t *testing.T) {
	_, err := Load(northSea("profiles/big.yaml", "teir: 1\n", "units/a/unit.yaml", smallUnit("teir: 1\nneeds: [a, a]\nrun: {user: yes}\n"),
		"units/b/unit.yaml", "profile: big\nrun: {user: yes}\n"))
	var got []string
	for _, one := range refused(t, err) {
		got = append(got, one.Subject)
	}
	want := []string{"profiles/big.yaml:1:1 teir", "units/a/unit.yaml:4:1 teir", "units/a/unit.yaml:5:12 needs[1]", "units/a/unit.yaml:6:13 run.user",
		"units/b/unit.yaml:1:1 unit", "units/b/unit.yaml:1:1 variants", "units/b/unit.yaml:2:13 run.user"}
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

func TestManyFaultsAreCounted(t *testing.T) {
	var text strings.Builder
	for i := range 200 {
		fmt.Fprintf(&text, "x%d: 1\n", i)
	}
	_, err := loadUnit(smallUnit(text.String()))
	all := refused(t, err)
	if len(all) != maxProblems || !strings.Contains(all[len(all)-1].Got, "150 more faults") {
		t.Errorf("got %d refusals, the last %v", len(all), all[len(all)-1])
	}
}

func TestOfManyFaultsTheSameAreTold(t *testing.T) {
	var env, keep strings.Builder
	for i := range 60 {
		fmt.Fprintf(&env, "    KMO_%d: x\n", i)
		fmt.Fprintf(&keep, "    - /a/%d\n", i)
	}
	for _, more := range []string{"run:\n  env:\n" + env.String(), "overlay:\n  keep:\n    - /a\n" + keep.String()} {
		_, err := loadUnit(smallUnit(more))
		for range 3 {
			if _, again := loadUnit(smallUnit(more)); len(refused(t, again)) != maxProblems || again.Error() != err.Error() {
				t.Errorf("got  %v\nonce %v", again, err)
			}
		}
	}
}

func TestU39TextFromOutsideIsClipped(t *testing.T) {
	t.Run("U-39 control characters and length", func(t *testing.T) {
		_, err := loadUnit(smallUnit(`"\e[31m` + strings.Repeat("k", 500) + `": 1` + "\n" + `"\e]0;x": {}` + "\n" + `run: {"\u202e": "\e", env: {"\e": "\e"}, dir: "\e[2J"}` + "\n"))
		for _, one := range refused(t, err) {
			if text := one.Error(); strings.ContainsFunc(text, hidden) && !strings.Contains(text, "\u202e") || len(text) > 800 {
				t.Errorf("%d bytes: %q", len(text), text)
			}
			if strings.ContainsRune(one.Error(), '\x1b') {
				t.Errorf("an escape in %q", one.Error())
			}
		}
	})
}

func TestNotYet(t *testing.T) {
	unit := map[string]string{
		"place.count":  "place: {count: 3}\n",
		"place.prefer": "place: {prefer: [{label: {sensor: cam-1}, weight: 50}]}\n",
		"place.spread": "place: {spread: zone}\n",
		"secrets":      "secrets: [{from: token.sops.yaml, key: token, to: /run/secrets/token}]\n",
		"gate.metrics": "gate: {metrics: [{name: p99_ms, scrape: {port: http, path: /metrics, query: p99}, worse: 20%}]}\n",
	}
	site := map[string]string{
		"rollout":   "rollout: {bake: 5m, maxUnavailable: 10%, missing: 20%}\n",
		"gate":      "gate: {bake: 5m}\n",
		"events":    "events: {mail: [a@b]}\n",
		"snapshots": "snapshots: {every: 1h}\n",
		"retention": "retention: {}\n",
	}
	for _, row := range notYet() {
		t.Run(row.file+" "+row.path, func(t *testing.T) {
			var err error
			text := site[row.path]
			if row.file == "unit" {
				text = unit[row.path]
				_, err = loadUnit(smallUnit(text))
			} else {
				_, err = Load(northSea("site.yaml", siteFile+text))
			}
			if text == "" {
				t.Fatal("no text for this row")
			}
			wantRefusal(t, err, "E_UNSUPPORTED", " "+row.path+": this build does not act on it: "+row.why, ":")
			if n := len(refused(t, err)); n != 1 {
				t.Errorf("got %d refusals: %v", n, err)
			}
		})
	}
	t.Run("the bus", func(t *testing.T) {
		_, err := loadUnit(smallUnit("links: [{to: other, via: rpc}, {to: other, via: bus}]\n"))
		wantRefusal(t, err, "E_UNSUPPORTED", "links.via: this build does not act on it: there is no bus yet")
	})
	t.Run("in a profile", func(t *testing.T) {
		_, err := Load(northSea("profiles/edge-small.yaml", edgeSmall+"place: {spread: zone}\n"))
		wantRefusal(t, err, "E_UNSUPPORTED", "profiles/edge-small.yaml:7:17 place.spread")
	})
	t.Run("what is acted on", func(t *testing.T) {
		if _, err := loadUnit(smallUnit("place: {count: all}\n")); err != nil {
			t.Error(err)
		}
	})
}

func TestValuesHaveOneSpelling(t *testing.T) {
	d := newDecoder()
	good := map[reflect.Type][]string{
		reflect.TypeFor[CPU]():       {"1", "100m", "1500m", "1000"},
		reflect.TypeFor[Bytes]():     {"512", "1Ki", "32Mi", "1Gi", "3Ti", "1025Ki", "1024Ti"},
		reflect.TypeFor[Duration]():  {"1ms", "500ms", "5s", "90s", "5m", "2h", "8760h"},
		reflect.TypeFor[Name]():      {"a", "edge-small", "a1-b2"},
		reflect.TypeFor[Ref]():       {"reg.example/a", "127.0.0.1:5000/a/b", "[::1]:5000/a", "reg.example/a:v1", "reg.example/a:v1@" + sha, "localhost/a__b/c-d.e"},
		reflect.TypeFor[Path]():      {"/a", "/a/.b", "/a/..b", "/a/b.c", "/${HOME}"},
		reflect.TypeFor[LocalPath](): {"a", "a/b", ".a", "a..b"},
		reflect.TypeFor[HostPath]():  {"/", "/a/../b", "/a/"},
		reflect.TypeFor[Branch]():    {"main", "release/2026.1", "a_b"},
		reflect.TypeFor[Percent]():   {"0%", "10%", "100%"},
		reflect.TypeFor[Registry]():  {"reg.example", "localhost:5000", "reg.example/team/x"},
		reflect.TypeFor[Burned]():    {sha, "kmo1:sha3-" + strings.Replace(sha, "sha256", "256", 1)},
		reflect.TypeFor[Moment]():    {"2026-12-20T00:00:00Z", "2028-02-29T23:59:59Z"},
		reflect.TypeFor[Network]():   {"10.9.0.0/16", "0.0.0.0/0", "192.0.2.1/32", "fd12::/48", "::/0"},
	}
	bad := map[reflect.Type][]string{
		reflect.TypeFor[CPU]():       {"", "0", "0m", "01", "1001", "2000", "1000001m", "1.5", "+1", "-1", " 1", "1 ", "1M", "1000m", "m", "١"},
		reflect.TypeFor[Bytes]():     {"0", "1K", "1MB", "1mi", "1024Ki", "01Mi", "1.5Gi", "1025Ti", "Mi", "9999999999999999"},
		reflect.TypeFor[Duration]():  {"0s", "05s", "5", "s", "1.5s", "1m30s", "5d", "8761h", "99999999999h", "-5s", "5 s", "5S"},
		reflect.TypeFor[Name]():      {"", "-a", "a-", "a--b", "A", "1a", "a_b", "a.b", "a/b", strings.Repeat("a", 55)},
		reflect.TypeFor[Ref]():       {"a", "reg.example/A", "reg.example/a@sha256:12", "http://reg.example/a", "reg.example/a b", "reg.example//a", "reg.example/../a", "reg.example/a@sha512:00"},
		reflect.TypeFor[Path]():      {"", "/", "a", "/a/", "//a", "/a//b", "/.", "/a/.", "/..", "/a/../b", "/a\n"},
		reflect.TypeFor[LocalPath](): {"", "/a", "..", "../a", "a/..", "./a", "a//b", "a/"},
		reflect.TypeFor[HostPath]():  {"", "a", "~/x", "${HOME}/x", "/a\x00"},
		reflect.TypeFor[Branch]():    {"", "-x", "a..b", "a/", "/a", "a//b", "a b", "refs/heads/../../config", ".a"},
		reflect.TypeFor[Percent]():   {"10", "101%", "01%", "-1%", "1.5%"},
		reflect.TypeFor[Registry]():  {"", "http://x", "x/", "x:0", "X"},
		reflect.TypeFor[Burned]():    {"", "sha256:00", strings.ToUpper(sha), sha + "0", "sha512:" + strings.Repeat("0", 64)},
		reflect.TypeFor[Moment]():    {"", "2026-12-20", "2026-12-20T00:00:00+01:00", "2026-02-29T00:00:00Z", "2026-12-20T24:00:00Z", "2026-12-20t00:00:00z", "2026-12-20T00:00:00.5Z"},
		reflect.TypeFor[Network]():   {"", "10.9.0.0", "10.9.0.1/16", "10.9/16", "010.9.0.0/16", "10.9.0.0/016", "10.9.0.0/33", "fd12:0::/48", "FD12::/48", "fd12::/129", "fe80::%1/64"},
	}
	try := func(typ reflect.Type, text string) (string, bool) {
		v := reflect.New(typ)
		var p problems
		d.text(&node{text: text}, v.Elem(), d.texts[typ], "", &p)
		return fmt.Sprint(v.Elem().Interface()), len(p.list) == 0
	}
	for typ, texts := range good {
		for _, text := range texts {
			if got, ok := try(typ, text); !ok || got != text && typ != reflect.TypeFor[Duration]() {
				t.Errorf("%v %q: got %q, %v", typ, text, got, ok)
			}
		}
	}
	for typ, texts := range bad {
		for _, text := range texts {
			if got, ok := try(typ, text); ok {
				t.Errorf("%v %q: got %q, want a refusal", typ, text, got)
			}
		}
	}
	for text, want := range map[string]string{"60s": "1m", "1000ms": "1s", "60m": "1h", "61s": "61s"} {
		if got, _ := try(reflect.TypeFor[Duration](), text); got != want {
			t.Errorf("%s is printed %s, want %s", text, got, want)
		}
	}
}

func TestDecodeAFileOfOurOwn(t *testing.T) {
	type limits struct {
		Every Duration `json:"every,omitzero"`
	}
	type file struct {
		Host   Name     `json:"host" need:"yes" doc:"its name"`
		Zone   string   `json:"zone"`
		Limits *limits  `json:"limits"`
		Ratio  float64  `json:"ratio"`
		Roots  []string `json:"roots" items:"0-3"`
	}
	got := file{Zone: "as it was"}
	if err := Decode("agent.yaml", []byte("host: edge-1\nlimits: {every: 5s}\nroots: [/a]\n"), &got); err != nil {
		t.Fatal(err)
	}
	if want := (file{Host: "edge-1", Zone: "as it was", Limits: &limits{Duration(5e9)}, Roots: []string{"/a"}}); !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	err := Decode("agent.yaml", []byte("hots: edge-1\nlimits: {evry: 5s}\nratio: 0.5\n"), &got)
	wantRefusal(t, err, "E_DECODE", "agent.yaml:1:1 hots", "did you mean host?")
	wantRefusal(t, err, "E_DECODE", "agent.yaml:1:1 host: no such key")
	wantRefusal(t, err, "E_DECODE", "agent.yaml:2:10 limits.evry")
	wantRefusal(t, err, "E_DECODE", "agent.yaml:3:8 ratio", "nothing reads a value of its type, float64")
}

// TestControls: what patterns call a control is what the screen does not let through, and the ends of lines.
func TestControls(t *testing.T) {
	class := regexp.MustCompile(`^[` + controls + `]$`)
	for r := rune(0); r <= 0x11000; r++ {
		if want := hidden(r) || strings.ContainsRune("\t\n\r", r); utf8.ValidRune(r) && class.MatchString(string(r)) != want {
			t.Errorf("%U is hidden or an end of a line: %v, and to the patterns %v", r, want, !want)
		}
	}
	if _, err := loadUnit(smallUnit(`run: {args: ["a\r\n\tb\u00e9\u00a0"]}` + "\n")); err != nil {
		t.Errorf("escapes of what people see: %v", err)
	}
}

// FuzzDecode: no input makes the decoder panic or run away, every refusal has a code and a place, and what is accepted can be printed as
// JSON and read again to the same value.
func FuzzDecode(f *testing.F) {
	for _, text := range []string{relayFile, edgeSmall, busFile, siteFile, smallUnit(""), "a: &a [*a]\n", "? {a: b}\n: c\n", "a: |\n  b\n", "%YAML 1.1\n", "<<: {}\n"} {
		f.Add([]byte(text))
	}
	d := newDecoder()
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, into := range []func() any{func() any { return new(Config) }, func() any { return &Unit{Tier: 0} }, func() any { return new(Profile) }} {
			var p problems
			first := into()
			top := parse("f.yaml", data, &p)
			if top != nil {
				d.decode(top, first, &p)
			}
			for _, one := range p.list {
				if one.Code != "E_DECODE" || !strings.HasPrefix(one.Subject, "f.yaml:") || one.Got == "" || one.Want == "" {
					t.Fatalf("%+v", one)
				}
			}
			if len(p.list) > 0 || top == nil {
				if len(p.list) == 0 {
					t.Fatal("no tree and no reason")
				}
				continue
			}
			text, err := json.Marshal(first)
			if err != nil {
				t.Fatal(err)
			}
			if found := unseen(text); found.what != "" {
				t.Fatalf("%q is accepted, with %s", text, found.what)
			}
			if marks(text) > maxMarks {
				continue // they stood in quotes, and JSON adds its own
			}
			again := into()
			if top = parse("f.json", text, &p); top != nil {
				d.decode(top, again, &p)
			}
			second, _ := json.Marshal(again)
			if len(p.list) > 0 || string(text) != string(second) {
				t.Fatalf("%s\nis read again as\n%s\n%v", text, second, p.err())
			}
		}
	})
}

func FuzzValues(f *testing.F) {
	for _, text := range []string{"1", "100m", "32Mi", "60s", "1h", "0", "00", "-1", "1e3"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		var c CPU
		if c.UnmarshalText([]byte(text)) == nil && (c <= 0 || c.String() != text) {
			t.Errorf("CPU %q is %d, printed %q", text, c, c)
		}
		var b Bytes
		if b.UnmarshalText([]byte(text)) == nil && (b <= 0 || b.String() != text) {
			t.Errorf("bytes %q are %d, printed %q", text, b, b)
		}
		var d, again Duration
		if d.UnmarshalText([]byte(text)) == nil && (d <= 0 || again.UnmarshalText([]byte(d.String())) != nil || again != d) {
			t.Errorf("duration %q is %d, printed %q", text, d, d)
		}
	})
}
