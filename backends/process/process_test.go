package process

import (
	"errors"
	"slices"
	"testing"

	"github.com/kindos/kmo/backends"
)

func TestLacks(t *testing.T) {
	all := []backends.Feature{backends.Overlays, backends.Keep, backends.Mounts, backends.Hooking, backends.HostNetwork}
	for _, test := range []struct {
		name   string
		change func(*backends.Workload)
		have   []backends.Feature
		want   backends.Feature
	}{
		{"nothing", func(*backends.Workload) {}, nil, ""},
		{"privileged", func(w *backends.Workload) { w.Security.Privileged = true }, all, backends.Privileged},
		{"escalation", func(w *backends.Workload) { w.Security.Escalation = true }, all, backends.Capabilities},
		{"capability", func(w *backends.Workload) { w.Security.Capabilities = []string{"CAP_NET_RAW"} }, all, backends.Capabilities},
		{"writable base", func(w *backends.Workload) { w.Security.WritableBase = true }, all, backends.WritableBase},
		{"unconfined", func(w *backends.Workload) { w.Security.Unconfined = true }, all, backends.Unconfined},
		{"host pids", func(w *backends.Workload) { w.Security.Host = []string{"network", "pid"} }, all, backends.HostNamespace},
		{"host network", func(w *backends.Workload) { w.Security.Host = []string{"network"} }, all, ""},
		{"device", func(w *backends.Workload) { w.Resources.Devices = []string{"camera"} }, all, backends.Devices},
		{"overlay", func(w *backends.Workload) { w.Overlay.Size = 1 }, nil, backends.Overlays},
		{"overlay had", func(w *backends.Workload) { w.Overlay.Size = 1 }, all, ""},
		{"cpu", func(w *backends.Workload) { w.Resources.CPU = 1 }, all, backends.LimitCPU},
		{"memory", func(w *backends.Workload) { w.Resources.Memory = 1 }, all, backends.LimitMemory},
		{"pids", func(w *backends.Workload) { w.Resources.PIDs = 1 }, all, backends.LimitPIDs},
		{"disk", func(w *backends.Workload) { w.Resources.Disk = 1 }, all, backends.LimitDisk},
		{"keep", func(w *backends.Workload) { w.Overlay.Keep = []string{"/a"} }, nil, backends.Keep},
		{"mounts", func(w *backends.Workload) { w.Mounts = make([]backends.Mount, 1) }, nil, backends.Mounts},
		{"hooks", func(w *backends.Workload) { w.Hooks.Exit = [][]string{{"x"}} }, nil, backends.Hooking},
		{"port map", func(w *backends.Workload) { w.Run.Ports = []backends.Port{{Port: 80, Host: 81}} }, all, backends.PortMap},
		{"port", func(w *backends.Workload) { w.Run.Ports = []backends.Port{{Port: 81, Host: 81}, {Host: 82}, {}} }, all, ""},
	} {
		var w backends.Workload
		test.change(&w)
		err := lacks(w, "native", test.have)
		var lacking *backends.FeatureError
		if errors.As(err, &lacking); test.want == "" && err != nil || test.want != "" && (lacking == nil || lacking.Feature != test.want || lacking.Detail == "") {
			t.Errorf("%s: %v, want feature %q", test.name, err, test.want)
		}
	}
}

func TestArgvAndEnv(t *testing.T) {
	w := backends.Workload{
		Image: backends.Image{Config: backends.ImageConfig{Entrypoint: []string{"/a"}, Cmd: []string{"b"}, Env: []string{"X=1", "Y=2=3", "broken"}}},
		Run:   backends.Run{Env: map[string]string{"X": "4"}, Ports: []backends.Port{{Name: "web-ui", Port: 8}}},
	}
	if got, want := Argv(w), []string{"/a", "b"}; !slices.Equal(got, want) {
		t.Errorf("argv %q, want %q", got, want)
	}
	w.Run.Args = []string{"c"}
	if got, want := Argv(w), []string{"/a", "c"}; !slices.Equal(got, want) {
		t.Errorf("argv %q, want %q", got, want)
	}
	env := Env(w)
	for name, want := range map[string]string{"X": "4", "Y": "2=3", "KMO_PORT_WEB_UI": "8"} {
		if env[name] != want {
			t.Errorf("%s=%q, want %q", name, env[name], want)
		}
	}
	if len(env) != 4 {
		t.Errorf("environment %v, want those and PATH", env)
	}
}

func TestCleanPaths(t *testing.T) {
	for path, want := range map[string]bool{
		"/a": true, "/a/b.c": true, "/..a": true, "/": false, "": false, "a": false, "/a/": false, "/a/../b": false, "//a": false, "/a\x00": false, "/./a": false,
	} {
		if clean(path) != want {
			t.Errorf("T42 %q: %t, want %t", path, !want, want)
		}
	}
}
