package plan

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/process/secret"
)

func planned(t *testing.T, engine string) *Plan {
	t.Helper()
	return &Plan{Engine: engine, Instance: "0123456789abcdef", State: t.TempDir(), Secrets: secret.Open(t.TempDir(), "x")}
}

func workload() backends.Workload {
	return backends.Workload{
		Name: "relay-00000001", Unit: "relay", Format: backends.OCI, Image: backends.Image{Config: backends.ImageConfig{Entrypoint: []string{"/app"}}},
		Run: backends.Run{User: 65532, Ports: []backends.Port{{Name: "http", Port: 81}, {Name: "admin"}}},
	}
}

// No file's content reaches the engine, secret or not.
func TestContentsStay(t *testing.T) {
	p, w := planned(t, "docker"), workload()
	w.Files = []backends.File{{To: "/etc/x", Content: []byte("canary")}}
	if err := p.Put(&w); err != nil {
		t.Fatal(err)
	}
	options, err := p.Options(w, "sha256:00", []int{20001, 20002}, nil)
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(options.Config.Labels)
	if err != nil || strings.Contains(string(text), "canary") || strings.Contains(string(text), "Y2FuYXJ5") {
		t.Errorf("labels are %s; %v", text, err)
	}
	if string(w.Files[0].Content) != "canary" {
		t.Error("the caller's workload was changed")
	}
}

func TestDefaultConfinement(t *testing.T) {
	for _, engine := range []string{"docker", "podman"} {
		p := planned(t, engine)
		options, err := p.Options(workload(), "sha256:00", []int{20001, 20002}, nil)
		if err != nil {
			t.Fatal(err)
		}
		h := options.HostConfig
		if !h.ReadonlyRootfs || h.Privileged || !slices.Equal(h.CapDrop, []string{"ALL"}) || len(h.CapAdd) > 0 || !slices.Equal(h.SecurityOpt, []string{"no-new-privileges"}) || h.IpcMode != "none" {
			t.Errorf("%s: without a wish the container has %+v", engine, h)
		}
		if options.Config.User != "65532:65532" || !slices.Contains(options.Config.Env, "KMO_PORT_HTTP=81") || !slices.Contains(options.Config.Env, "KMO_PORT_ADMIN=20002") {
			t.Errorf("%s: user %s, environment %v", engine, options.Config.User, options.Config.Env)
		}
		for inside, bindings := range h.PortBindings {
			if len(bindings) != 1 || bindings[0].HostIP.String() != "127.0.0.1" {
				t.Errorf("%s: port %s is published at %v", engine, inside, bindings)
			}
		}
		hook, err := p.Options(workload(), "sha256:00", []int{20001, 20002}, []string{"/app", "migrate"})
		if err != nil || len(hook.HostConfig.PortBindings) > 0 || hook.Name == options.Name || hook.Config.Labels[LabelRole] != RoleHook {
			t.Errorf("%s: a hook's container is %+v; %v", engine, hook, err)
		}
	}
}

func TestRefusedPaths(t *testing.T) {
	p := planned(t, "docker")
	able := backends.Fingerprint{Formats: []backends.Format{backends.OCI}, Features: []backends.Feature{
		backends.LowPorts, backends.Keep, backends.Mounts, backends.Files, backends.Capabilities, backends.WritableBase, backends.LimitDisk, backends.HostNetwork,
	}}
	if err := p.Check(able, workload()); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(w *backends.Workload){
		"a name with a slash": func(w *backends.Workload) { w.Name = "a/b" },
		"a user below 0":      func(w *backends.Workload) { w.Run.User = -1 },
		"a path that goes up": func(w *backends.Workload) { w.Overlay.Keep = []string{"/a/../b"} },
		"a path in proc":      func(w *backends.Workload) { w.Overlay.Keep = []string{"/proc/x"} },
		"one path in another": func(w *backends.Workload) { w.Overlay.Keep = []string{"/a", "/a/b"} },
		"a path twice":        func(w *backends.Workload) { w.Overlay.Keep = []string{"/a", "/a"} },
		"kMO's own state": func(w *backends.Workload) {
			w.Mounts = []backends.Mount{{From: filepath.Join(p.State, "work"), To: "/x"}}
		},
		"all of the host":           func(w *backends.Workload) { w.Mounts = []backends.Mount{{From: "/", To: "/x"}} },
		"a capability for a user":   func(w *backends.Workload) { w.Security.Capabilities = []string{"CAP_CHOWN"} },
		"an unbounded base bounded": func(w *backends.Workload) { w.Security.WritableBase, w.Resources.Disk = true, 1 },
		"a low port of the host":    func(w *backends.Workload) { w.Security.Host = []string{"network"} },
		"no command":                func(w *backends.Workload) { w.Image.Config.Entrypoint = nil },
	} {
		w := workload()
		change(&w)
		if err := p.Check(able, w); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestMissing(t *testing.T) {
	p, w := planned(t, "docker"), workload()
	w.Files = []backends.File{{To: "/run/token", Content: []byte("canary"), Secret: true}}
	if !p.Secrets.Has() {
		p.Secrets = secret.Open("/dev/shm", "kmo-plan-test")
		t.Cleanup(func() { _ = os.RemoveAll("/dev/shm/kmo-plan-test") })
	}
	if err := p.Missing(&w); !errors.Is(err, secret.ErrGone) {
		t.Errorf("a secret that was never put: %v, want %v", err, secret.ErrGone)
	}
}
