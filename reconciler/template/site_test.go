package template

import (
	"fmt"
	"io/fs"
	"maps"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/policy/refusal"
)

const (
	sha  = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	root = "kmo1:sha3-256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

	siteFile = "site: north-sea\nbranch: main\nzones: [canary, edge-a, edge-b]\nregistries: [reg.example]\n"

	edgeSmall = `
tier: 2
resources: {cpu: {max: 500m}, memory: {max: 64Mi}, pids: {max: 32}, disk: {max: 128Mi}}
run: {env: {LOG: info, PLACE: profile}, grace: 5s}
health: {http: {port: http, path: /alive}, every: 2s}
gate: {bake: 60s}
`
	busFile = "unit: message-bus\nprofile: edge-small\nvariants: [{native: reg.example/bus@" + sha + ", merkle: " + root + "}]\n" +
		"health: {tcp: {port: bus}}\nrun: {ports: [{name: bus, port: 4222}]}\n"

	// The unit of the design, as far as this build acts on it.
	relayFile = `
unit: camera-relay
profile: edge-small
tier: 2
intent: {kind: feature, summary: "lower latency", ticket: EDGE-12}
needs: [message-bus]
variants:
  - image: reg.example/relay@` + sha + `
    merkle: ` + root + `
    backends: [podman, docker, gvisor, native]
  - wasm: reg.example/relay-wasm@` + sha + `
    merkle: ` + root + `
resources:
  cpu: {min: 100m, max: 1}
  memory: {min: 32Mi, max: 128Mi}
  pids: {max: 64}
  disk: {max: 256Mi}
place:
  on: {zone: [edge-a, edge-b], arch: [amd64, arm64], labels: {site: north}}
  count: all
run: {args: ["--home", "${HOME}"], env: {PLACE: unit}, user: 65532, ports: [{name: http, port: 8080, host: 18080}]}
files: [{from: relay.toml, to: /etc/relay.toml}]
overlay: {size: 64Mi, keep: [/var/lib/relay]}
hooks: {preInit: [[/app, migrate]], postInit: [], exit: [[/app, flush]]}
health: {http: {port: http, path: /healthz}, every: 5s, after: 3}
gate: {bake: 60s}
`
)

// files is a tree of a site without object ids.
func files(pairs ...string) fstest.MapFS {
	tree := fstest.MapFS{}
	for i := 0; i < len(pairs); i += 2 {
		tree[pairs[i]] = &fstest.MapFile{Data: []byte(pairs[i+1])}
	}
	return tree
}

// northSea is the design's site.
func northSea(more ...string) fstest.MapFS {
	tree := files("site.yaml", siteFile, "profiles/edge-small.yaml", edgeSmall, "units/message-bus/unit.yaml", busFile,
		"units/camera-relay/unit.yaml", relayFile, "units/camera-relay/relay.toml", "listen = 8080\n")
	maps.Copy(tree, files(more...))
	return tree
}

// everything is what a backend that lacks nothing has.
func everything() []backends.Feature {
	return []backends.Feature{backends.PortMap, backends.LimitCPU, backends.LimitMemory, backends.LimitPIDs, backends.LimitDisk,
		backends.Overlays, backends.Keep, backends.Files, backends.LowPorts, backends.MemoryPool, backends.Sockets, backends.Devices, backends.Hooking, backends.Exec}
}

// edge is a host that has a native backend and one for WASM.
func edge() Host {
	return Host{Name: "edge-1", Zone: "edge-a", OS: "linux", Arch: "amd64", Labels: map[string]string{"site": "north"}, CPU: 4000, CPUHas: []string{"aes", "sse4_2"}, Memory: 8 << 30,
		Fingerprints: map[string]backends.Fingerprint{
			"native": {Backend: "native", Formats: []backends.Format{backends.OCI, backends.Native}, Platforms: []string{"linux/amd64"}, Features: everything()},
			"wasm":   {Backend: "wasm", Formats: []backends.Format{backends.WASM}, Platforms: []string{"wasip1/wasm"}, Features: everything()},
		}}
}

func mustLoad(t testing.TB, tree fs.FS) *Site {
	t.Helper()
	site, err := Load(tree)
	if err != nil {
		t.Fatalf("loading: %v", err)
	}
	return site
}

// refused returns the refusals of an error and fails if it is anything else.
func refused(t testing.TB, err error) []*refusal.Error {
	t.Helper()
	all := refusal.All(err)
	if len(all) == 0 {
		t.Fatalf("got %v, want a refusal", err)
	}
	return all
}

// wantRefusal fails unless err has a refusal with the code whose text has every part.
func wantRefusal(t testing.TB, err error, code refusal.Code, parts ...string) {
	t.Helper()
	for _, one := range refused(t, err) {
		missing := false
		for _, part := range parts {
			missing = missing || !strings.Contains(one.Error(), part)
		}
		if one.Code == code && !missing {
			return
		}
	}
	t.Errorf("got %v\nwant %s with %q", err, code, parts)
}

func TestDesignSite(t *testing.T) {
	site := mustLoad(t, northSea())
	plan, err := site.Render(edge())
	if err != nil {
		t.Fatal(err)
	}
	if got, want := fmt.Sprint(site.Order), "[message-bus camera-relay]"; got != want {
		t.Errorf("order %s, want %s", got, want)
	}
	if len(plan.Workloads) != 2 || len(plan.Skipped) != 0 || len(plan.Lacks) != 0 {
		t.Fatalf("got %d workloads, skipped %v, lacks %v", len(plan.Workloads), plan.Skipped, plan.Lacks)
	}
	w := plan.Workloads[1]
	if w.Backend != "native" || w.Format != backends.OCI || w.Name != "camera-relay-"+w.Spec.Short() || w.Spec.IsZero() {
		t.Errorf("got %+v", w)
	}
	if want := sha[len("sha256:"):]; w.Image.SHA256 != want || w.Image.Root.String() != root {
		t.Errorf("image %+v", w.Image)
	}
	if got, want := w.Run.Env, map[string]string{"LOG": "info", "PLACE": "unit"}; !maps.Equal(got, want) {
		t.Errorf("env %v, want %v", got, want)
	}
	if len(w.Files) != 1 || w.Files[0].Mode != 0o644 || string(w.Files[0].Content) != "listen = 8080\n" {
		t.Errorf("files %+v", w.Files)
	}
	if check := plan.Checks[1]; check.Health.HTTP == nil || check.Health.HTTP.Path != "/healthz" || check.Health.Every.String() != "5s" || len(check.Passed) != 3 {
		t.Errorf("check %+v", check)
	}
	if check := plan.Checks[0]; check.Health.HTTP != nil || check.Health.TCP == nil || check.Health.Every.String() != "2s" {
		t.Errorf("the unit's kind of probe must drop the profile's: %+v", check.Health)
	}
}
