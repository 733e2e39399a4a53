package template

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/registry/merkle"
)

// renderUnit loads a unit, u, and renders it.
func renderUnit(t *testing.T, text string, host Host) (Plan, error) {
	t.Helper()
	site, err := loadUnit(text)
	if err != nil {
		t.Fatal(err)
	}
	return site.Render(host)
}

// only is a host with these backends.
func only(prints ...backends.Fingerprint) Host {
	host := edge()
	host.Fingerprints = make(map[string]backends.Fingerprint)
	for _, print := range prints {
		host.Fingerprints[print.Backend] = print
	}
	return host
}

func TestT70NothingIsExpanded(t *testing.T) {
	t.Run("T70 a variable stays as it is written", func(t *testing.T) {
		t.Setenv("HOME", "/root")
		plan, err := renderUnit(t, smallUnit(`run: {args: ["${HOME}", "$HOME", "{{.Host}}", "%HOME%", "~", "$(id)"], env: {A: "${HOME}"}, dir: "/${HOME}"}
mounts: [{from: "/srv/${HOME}/x", to: "/${HOME}"}]
files: [{from: unit.yaml, to: "/etc/${HOME}"}]
hooks: {exit: [["${HOME}"]]}
`), only(backends.Fingerprint{Backend: "native", Formats: []backends.Format{backends.Native}, Platforms: []string{"linux/amd64"}, Features: append(everything(), backends.Mounts)}))
		if err != nil {
			t.Fatal(err)
		}
		w := plan.Workloads[0]
		got := fmt.Sprintln(w.Run.Args, w.Run.Env, w.Run.Dir, w.Mounts, w.Files[0].To, w.Hooks.Exit)
		want := "[${HOME} $HOME {{.Host}} %HOME% ~ $(id)] map[A:${HOME}] /${HOME} [{/srv/${HOME}/x /${HOME} false}] /etc/${HOME} [[${HOME}]]\n"
		if got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	})
	t.Run("T70 a path of the host cannot begin with a variable", func(t *testing.T) {
		for _, from := range []string{"${HOME}", "$HOME/x", "~/x", "{{.Root}}/x", "./x", "x"} {
			_, err := loadUnit(smallUnit(fmt.Sprintf("mounts: [{from: %q, to: /x}]\n", from)))
			wantRefusal(t, err, "E_DECODE", "mounts[0].from", "an absolute path of the host")
		}
	})
	t.Run("T70 the final plan has the path that is mounted", func(t *testing.T) {
		site, err := loadUnit(smallUnit("mounts: [{from: /srv/../etc/./x/.., to: /x}]\n"))
		if err != nil {
			t.Fatal(err)
		}
		plan, err := site.Render(edge())
		if err != nil {
			t.Fatal(err)
		}
		if got := plan.Workloads[0].Mounts[0].From; got != "/etc" {
			t.Errorf("mounts %s, want /etc", got)
		}
		if got := site.Unit("u").Mounts[0].From; got != "/srv/../etc/./x/.." {
			t.Errorf("the template says %s, want it as written", got)
		}
	})
}

func TestRenderIsPure(t *testing.T) {
	text := func(plan Plan, err error) []byte {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		out, err := json.Marshal(plan)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	// A map is built anew each time, so that its order differs.
	tree := func() objectTree {
		env := ""
		for i := range 50 {
			env += fmt.Sprintf("V%d: x, ", i)
		}
		return objects(northSea("units/u/unit.yaml", smallUnit("run: {env: {"+env+"}}\nplace: {on: {labels: {site: north, a: b, c: d}}}\n")))
	}
	var want []byte
	var shared Loader
	for range 20 {
		site := mustLoad(t, tree())
		remembered, err := shared.Load(tree())
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range []*Site{site, site, remembered} {
			got := text(s.Render(edge()))
			if want == nil {
				want = got
			}
			if !bytes.Equal(got, want) {
				t.Fatalf("got  %s\nwant %s", got, want)
			}
		}
		other := edge()
		other.Zone = "canary" // between two renders, another host
		if bytes.Equal(text(remembered.Render(other)), want) {
			t.Fatal("another host's facts change nothing")
		}
	}
}

func TestThePlanIsTheCallers(t *testing.T) {
	site := mustLoad(t, northSea())
	first, err := site.Render(edge())
	if err != nil {
		t.Fatal(err)
	}
	first.Workloads[0].Image.Content = "/var/lib/kmo/x"
	first.Workloads[0].Image.ContentRoot = merkle.BlobRoot(nil)
	again, err := site.Render(edge())
	if err != nil {
		t.Fatal(err)
	}
	if again.Workloads[0].Image.Content != "" || again.Workloads[0].Name != first.Workloads[0].Name {
		t.Error("what one caller filled in is in another's plan")
	}
	w := first.Workloads[0]
	spec := w.Spec
	w.Name, w.Backend = "x", "other"
	if err := seal(&w); err != nil || w.Spec != spec {
		t.Errorf("the spec covers the name, the backend or what was fetched: %v", err)
	}
}

func TestSpecCoversWhatMatters(t *testing.T) {
	name := func(more string) string {
		plan, err := renderUnit(t, smallUnit(more), edge())
		if err != nil {
			t.Fatal(err)
		}
		return plan.Workloads[0].Name
	}
	changes := []string{"", "run: {args: [a]}\n", "run: {env: {A: b}}\n", "run: {user: 1}\n", "run: {grace: 1s}\n", "run: {ports: [{name: a}]}\n", "run: {dir: /x}\n",
		"resources: {cpu: {max: 1}}\n", "resources: {memory: {max: 1Mi}}\n", "resources: {pids: {max: 1}}\n", "resources: {disk: {max: 1Mi}}\n",
		"overlay: {size: 1Mi}\n", "overlay: {keep: [/x]}\n", "hooks: {exit: [[a]]}\n", "files: [{from: unit.yaml, to: /x}]\n",
		"files: [{from: unit.yaml, to: /x, mode: \"0600\"}]\n", "security: {privileged: true}\n", "mounts: [{from: /a, to: /b}]\n", "mounts: [{from: /a, to: /b, readOnly: true}]\n"}
	seen := make(map[string]string)
	for _, more := range changes {
		got := name(more)
		if other, ok := seen[got]; ok {
			t.Errorf("%q and %q have one name, %s", more, other, got)
		}
		seen[got] = more
	}
	for _, more := range []string{"health: {every: 1s}\n", "gate: {bake: 1m}\n", "intent: {kind: fix}\n", "needs: []\n"} {
		if got := name(more); seen[got] != "" || seen[name("")] != "" || got != name("") {
			t.Errorf("%q starts the workload anew", more)
		}
	}
}

func TestPlacement(t *testing.T) {
	tests := []struct{ name, more, want string }{
		{"zone", "place: {on: {zone: [canary, edge-b]}}\n", `zone "edge-a"; want canary or edge-b`},
		{"architecture", "place: {on: {arch: [arm64]}}\n", `architecture "amd64"; want arm64`},
		{"processor", "place: {on: {cpu: [aes, avx512f]}}\n", "the processor has no avx512f; want a host whose /proc/cpuinfo lists it"},
		{"label", "place: {on: {labels: {site: south}}}\n", `label site is "north"; want south`},
		{"label that is not there", "place: {on: {labels: {gpu: a}}}\n", `label gpu is ""; want a`},
		{"cores", "resources: {cpu: {min: 8}}\n", "4 cores; want 8"},
		{"memory", "resources: {memory: {min: 16Gi}}\n", "8Gi bytes of memory; want 16Gi"},
		{"here", "place: {on: {zone: [edge-a], arch: [amd64], cpu: [sse4_2], labels: {site: north}}}\nresources: {cpu: {min: 4}, memory: {min: 8Gi}}\n", ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			plan, err := renderUnit(t, smallUnit(test.more), edge())
			if err != nil {
				t.Fatal(err)
			}
			if test.want == "" {
				if len(plan.Workloads) != 1 || len(plan.Skipped) != 0 {
					t.Errorf("skipped: %v", plan.Skipped)
				}
				return
			}
			if len(plan.Workloads) != 0 || !slices.Equal(plan.Skipped, []Skip{{"u", test.want}}) {
				t.Errorf("got %v, want %q", plan.Skipped, test.want)
			}
		})
	}
}

func TestVariants(t *testing.T) {
	unit := "unit: u\ntier: 3\nvariants:\n- {image: r.example/u, backends: [podman, docker]}\n- {wasm: r.example/w}\n- {appimage: r.example/a}\n- {native: r.example/n}\n"
	print := func(name string, format backends.Format, platform string, features ...backends.Feature) backends.Fingerprint {
		return backends.Fingerprint{Backend: name, Formats: []backends.Format{format}, Platforms: []string{platform}, Features: features}
	}
	tests := []struct {
		name, more string
		host       Host
		backend    string
		format     backends.Format
		refused    []string
	}{
		{"first that fits", "", only(print("docker", backends.OCI, "linux/amd64"), print("wasm", backends.WASM, "wasip1/wasm")), "docker", backends.OCI, nil},
		{"order of the list", "", only(print("docker", backends.OCI, "linux/amd64"), print("podman", backends.OCI, "linux/amd64/v2")), "podman", backends.OCI, nil},
		{"other architecture", "", only(print("docker", backends.OCI, "linux/arm64"), print("wasm", backends.WASM, "wasip1/wasm")), "wasm", backends.WASM, nil},
		{"feature", "resources: {disk: {max: 1Mi}}\n", only(print("docker", backends.OCI, "linux/amd64"), print("native", backends.Native, "linux/amd64", backends.LimitDisk)), "native", backends.Native, nil},
		{"nothing", "", only(), "", "", []string{"E_FIT: unit u on edge-1:", "variant 1 (image): podman is not on this host", "variant 1 (image): docker is not on this host",
			"variant 2 (wasm): wasm is not on this host", "variant 3 (appimage): appimage is not on this host", "variant 4 (native): native is not on this host"}},
		{"every reason", "run: {ports: [{name: a, port: 80, host: 81}]}\noverlay: {size: 1Mi, keep: [/x]}\nhooks: {exit: [[x]]}\nhealth: {exec: {argv: [x]}}\nresources: {cpu: {max: 1}, memory: {max: 1Mi}, pids: {max: 1}}\n",
			only(print("docker", backends.OCI, "linux/amd64"), print("podman", backends.OCI, "linux/arm64")), "", "",
			[]string{"podman runs nothing for amd64", "docker has no port-map, low-ports, limit-cpu, limit-memory, limit-pids, limit-disk, overlay, keep, hooks or exec",
				"variant 2 (wasm): docker runs no wasm", "variant 4 (native): podman runs no native"}},
		{"same port on both sides needs no mapping", "run: {ports: [{name: a, port: 80, host: 80}, {name: b, host: 81}, {name: c, port: 82}, {name: d}]}\n",
			only(print("docker", backends.OCI, "linux/amd64", backends.LowPorts)), "docker", backends.OCI, nil},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			plan, err := renderUnit(t, unit+test.more, test.host)
			if test.refused != nil {
				wantRefusal(t, err, "E_FIT", test.refused...)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if w := plan.Workloads[0]; w.Backend != test.backend || w.Format != test.format {
				t.Errorf("got %s on %s, want %s on %s", w.Format, w.Backend, test.format, test.backend)
			}
		})
	}
	t.Run("without a list the backend of the format's name comes first, then by name", func(t *testing.T) {
		text := "unit: u\ntier: 3\nvariants: [{image: r.example/u}]\n"
		host := only(print("docker", backends.OCI, "linux/amd64"), print("native", backends.OCI, "linux/amd64"), print("zeta", backends.OCI, "linux/amd64"))
		for _, want := range []string{"native", "docker", "zeta"} {
			plan, err := renderUnit(t, text, host)
			if err != nil {
				t.Fatal(err)
			}
			if got := plan.Workloads[0].Backend; got != want {
				t.Errorf("got %s, want %s", got, want)
			}
			delete(host.Fingerprints, want)
		}
	})
}

func TestLacksAreForTheRulesFirst(t *testing.T) {
	tests := map[string]backends.Feature{
		"security: {privileged: true}\n":              backends.Privileged,
		"security: {writableBase: true}\n":            backends.WritableBase,
		"security: {unconfined: true}\n":              backends.Unconfined,
		"security: {capabilities: [CAP_NET_RAW]}\n":   backends.Capabilities,
		"security: {escalation: true}\n":              backends.Capabilities,
		"security: {host: [pid]}\n":                   backends.HostNamespace,
		"security: {host: [network]}\n":               backends.HostNetwork,
		"mounts: [{from: /srv, to: /x}]\n":            backends.Mounts,
		"security: {host: [network, ipc]}\nneeds: []": backends.HostNamespace,
	}
	for more, feature := range tests {
		plan, err := renderUnit(t, smallUnit(more), edge())
		if err != nil {
			t.Fatal(err)
		}
		if len(plan.Workloads) != 1 || len(plan.Lacks) != 1 || plan.Workloads[0].Backend != "native" {
			t.Fatalf("%q: got %d workloads, lacks %v", more, len(plan.Workloads), plan.Lacks)
		}
		wantRefusal(t, plan.Lacks[0], "E_FIT", "native has no ", string(feature))
		host := edge()
		native := host.Fingerprints["native"]
		native.Features = append(slices.Clone(native.Features), feature, backends.HostNetwork)
		host.Fingerprints = maps.Clone(host.Fingerprints)
		host.Fingerprints["native"] = native
		if plan, err = renderUnit(t, smallUnit(more), host); err != nil || len(plan.Lacks) != 0 {
			t.Errorf("%q: a backend that has it is refused: %v, %v", more, err, plan.Lacks)
		}
	}
}

func TestConflicts(t *testing.T) {
	two := func(a, b string, has ...backends.Feature) (Plan, error) {
		unit := func(name, ports string) string {
			return "unit: " + name + "\ntier: 3\nvariants: [{native: r.example/u}]\nrun: {ports: [" + ports + "]}\n"
		}
		site := mustLoad(t, files("site.yaml", siteFile, "units/a/unit.yaml", unit("a", a), "units/b/unit.yaml", unit("b", b)))
		host := edge()
		native := host.Fingerprints["native"]
		native.Features = append(slices.Clone(native.Features), has...)
		host.Fingerprints = maps.Clone(host.Fingerprints)
		host.Fingerprints["native"] = native
		return site.Render(host)
	}
	_, err := two("{name: x, host: 18080}", "{name: w, port: 80, host: 18080}", backends.OwnNetwork)
	wantRefusal(t, err, "E_CONFLICT", "units a and b on edge-1: host port 18080 for both; want another port under run.ports")
	_, err = two("{name: x, port: 80}", "{name: w, port: 80}", backends.HostNetwork)
	wantRefusal(t, err, "E_CONFLICT", "units a and b on edge-1: host port 80 for both")
	if _, err := two("{name: x, port: 80}, {name: z}", "{name: w, port: 80}, {name: z}", backends.HostNetwork, backends.OwnNetwork); err != nil {
		t.Errorf("ports of their own network: %v", err)
	}
}

func TestExclusive(t *testing.T) {
	prints := map[string]backends.Fingerprint{"shared": {Features: []backends.Feature{backends.HostNetwork}}, "own": {Features: []backends.Feature{backends.HostNetwork, backends.OwnNetwork}}}
	with := func(backend string, change func(*backends.Workload)) backends.Workload {
		w := backends.Workload{Unit: "u", Backend: backend}
		change(&w)
		return w
	}
	port := func(inside, host int) func(*backends.Workload) {
		return func(w *backends.Workload) { w.Run.Ports = []backends.Port{{Name: "http", Port: inside, Host: host}} }
	}
	tests := []struct {
		name string
		a, b backends.Workload
		want []string
	}{
		{"P-04 nothing in common", with("own", port(0, 0)), with("own", port(0, 0)), nil},
		{"P-04 host port", with("own", port(8080, 18080)), with("own", port(9090, 18080)), []string{"host port 18080"}},
		{"P-04 other host port", with("own", port(8080, 18080)), with("own", port(8080, 18081)), nil},
		{"P-04 port in a network of its own", with("own", port(8080, 0)), with("own", port(8080, 0)), nil},
		{"P-04 port in the host's network", with("shared", port(8080, 0)), with("shared", port(8080, 0)), []string{"host port 8080"}},
		{"P-04 port in the host's network on request", with("own", func(w *backends.Workload) { port(8080, 0)(w); w.Security.Host = []string{"network"} }), with("shared", port(8080, 0)), []string{"host port 8080"}},
		{"P-04 free port in the host's network", with("shared", port(0, 0)), with("shared", port(0, 0)), nil},
		{"P-04 one's host port is the other's port", with("own", port(80, 8080)), with("shared", port(8080, 0)), []string{"host port 8080"}},
		{"P-04 kept path", with("own", func(w *backends.Workload) { w.Overlay.Keep = []string{"/a", "/var/lib/relay"} }),
			with("own", func(w *backends.Workload) { w.Overlay.Keep = []string{"/var/lib/relay", "/b"} }), []string{"kept path /var/lib/relay"}},
		{"P-04 device", with("own", func(w *backends.Workload) { w.Resources.Devices = []backends.Device{{Name: "camera"}} }),
			with("own", func(w *backends.Workload) { w.Resources.Devices = []backends.Device{{Name: "camera"}} }), []string{"device camera"}},
		{"P-04 mount that both write", with("own", func(w *backends.Workload) {
			w.Mounts = []backends.Mount{{From: "/srv/a"}, {From: "/srv/b", ReadOnly: true}}
		}),
			with("own", func(w *backends.Workload) { w.Mounts = []backends.Mount{{From: "/srv/a"}, {From: "/srv/b"}} }), []string{"writable mount /srv/a"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if got := Exclusive(test.a, test.b, prints); !slices.Equal(got, test.want) {
				t.Errorf("got %q, want %q", got, test.want)
			}
			if got := Exclusive(test.b, test.a, prints); !slices.Equal(got, test.want) {
				t.Errorf("the other way round: got %q, want %q", got, test.want)
			}
		})
	}
}

// thousand is a site of 1,000 units, some of which need others.
func thousand() objectTree {
	tree := files("site.yaml", siteFile, "profiles/edge-small.yaml", edgeSmall)
	for i := range 1000 {
		text := strings.Replace(strings.Replace(relayFile, "unit: camera-relay", fmt.Sprintf("unit: u%d", i), 1), "host: 18080", fmt.Sprintf("host: %d", 20_000+i), 1)
		if i%10 == 0 {
			text = strings.Replace(text, "needs: [message-bus]", "needs: []", 1)
		} else {
			text = strings.Replace(text, "message-bus", fmt.Sprintf("u%d", i/10*10), 1)
		}
		text = strings.Replace(text, "port: 8080", fmt.Sprintf("port: %d", 30_000+i), 1)
		maps.Copy(tree, files(fmt.Sprintf("units/u%d/unit.yaml", i), text, fmt.Sprintf("units/u%d/relay.toml", i), "listen = 8080\n"))
	}
	return objects(tree)
}

// changed is the tree with the first units changed.
func (o objectTree) changed(units int) objectTree {
	next := objectTree{maps.Clone(o.MapFS), maps.Clone(o.ids)}
	for i := range units {
		name := fmt.Sprintf("units/u%d/relay.toml", i)
		maps.Copy(next.MapFS, files(name, "listen = 9090\n"))
		for _, id := range []string{name, fmt.Sprintf("units/u%d", i), "units"} {
			next.ids[id] = "changed " + id
		}
	}
	return next
}

func TestThousandUnits(t *testing.T) {
	tree := thousand()
	var l Loader
	site, err := l.Load(tree)
	if err != nil {
		t.Fatal(err)
	}
	before, err := site.Render(edge())
	if err != nil || len(before.Workloads) != 1000 || l.decoded != 1000 {
		t.Fatalf("%d workloads, %d decoded, %v", len(before.Workloads), l.decoded, err)
	}
	if site, err = l.Load(tree.changed(3)); err != nil || l.decoded != 3 {
		t.Fatalf("%d decoded, want 3; %v", l.decoded, err)
	}
	after, err := site.Render(edge())
	if err != nil {
		t.Fatal(err)
	}
	differ := 0
	for i := range after.Workloads {
		if after.Workloads[i].Name != before.Workloads[i].Name {
			differ++
		}
	}
	if differ != 3 {
		t.Errorf("%d workloads differ, want 3", differ)
	}
}

func BenchmarkLoadCold1000(b *testing.B) {
	tree := thousand()
	for b.Loop() {
		if _, err := Load(tree); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkLoadChanged3Of1000(b *testing.B) {
	first := thousand()
	trees := [2]objectTree{first, first.changed(3)}
	var l Loader
	if _, err := l.Load(first); err != nil {
		b.Fatal(err)
	}
	for i := 1; b.Loop(); i++ {
		if _, err := l.Load(trees[i%2]); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkRenderCold1000(b *testing.B) {
	site, err := Load(thousand())
	if err != nil {
		b.Fatal(err)
	}
	hosts := [2]Host{edge(), edge()}
	hosts[1].Name = "edge-2"
	for i := 0; b.Loop(); i++ {
		if _, err := site.Render(hosts[i%2]); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkRenderUnchanged1000(b *testing.B) {
	site, err := Load(thousand())
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := site.Render(edge()); err != nil {
			b.Fatal(err)
		}
	}
}

// A unit and those that link to it see the same doors; who else links to it changes nothing of the others.
func TestDoors(t *testing.T) {
	unit := func(name, rest string) string {
		return "unit: " + name + "\ntier: 3\nvariants: [{native: r.example/u}]\n" + rest
	}
	relay := unit("relay", "links: [{to: bus, via: memory}, {to: bus, via: rpc}]\n")
	render := func(more ...string) map[string]backends.Workload {
		site := mustLoad(t, files(append([]string{"site.yaml", siteFile, "units/bus/unit.yaml", unit("bus", ""), "units/hub/unit.yaml", unit("hub", "")}, more...)...))
		host := edge()
		host.Doors = "/run/kmo/doors"
		plan, err := site.Render(host)
		if err != nil {
			t.Fatal(err)
		}
		all := map[string]backends.Workload{}
		for _, w := range plan.Workloads {
			all[w.Unit] = w
		}
		return all
	}
	alone, one := render(), render("units/relay/unit.yaml", relay)
	two := render("units/relay/unit.yaml", relay, "units/other/unit.yaml", strings.Replace(relay, "relay", "other", 1))
	want := []backends.Door{
		{Unit: "bus", From: "/run/kmo/doors/bus/memory", To: "/run/kmo/bus/memory", Via: "memory"},
		{Unit: "bus", From: "/run/kmo/doors/bus/socket", To: "/run/kmo/bus/socket", Via: "socket"},
	}
	if !slices.Equal(one["bus"].Doors, want) || !slices.Equal(one["relay"].Doors, want) || len(one["hub"].Doors)+len(alone["bus"].Doors) > 0 {
		t.Errorf("doors are %+v of bus, %+v of relay, want %+v; %+v of hub, %+v of bus alone", one["bus"].Doors, one["relay"].Doors, want, one["hub"].Doors, alone["bus"].Doors)
	}
	if two["bus"].Spec != one["bus"].Spec || alone["bus"].Spec == one["bus"].Spec {
		t.Errorf("specs of bus are %v alone, %v with one that links to it, %v with two", alone["bus"].Spec, one["bus"].Spec, two["bus"].Spec)
	}
	site := mustLoad(t, files("site.yaml", siteFile, "units/bus/unit.yaml", unit("bus", ""), "units/hub/unit.yaml", unit("hub", ""), "units/relay/unit.yaml", relay))
	plan, err := site.Render(edge())
	if err != nil || len(plan.Skipped) != 1 || !strings.Contains(plan.Skipped[0].Why, "on a tmpfs") {
		t.Errorf("without memory for doors: %+v, %v", plan.Skipped, err)
	}
}
