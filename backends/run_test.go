package backends

import (
	"slices"
	"testing"
)

func TestArgvAndEnv(t *testing.T) {
	w := Workload{
		Image: Image{Config: ImageConfig{Entrypoint: []string{"/a"}, Cmd: []string{"b"}, Env: []string{"X=1", "Y=2=3", "broken"}}},
		Run:   Run{Env: map[string]string{"X": "4"}, Ports: []Port{{Name: "web-ui", Port: 8}}},
	}
	if got, want := w.Argv(), []string{"/a", "b"}; !slices.Equal(got, want) {
		t.Errorf("argv %q, want %q", got, want)
	}
	w.Run.Args = []string{}
	if got, want := w.Argv(), []string{"/a", "b"}; !slices.Equal(got, want) {
		t.Errorf("argv with empty arguments %q, want %q", got, want)
	}
	w.Run.Args = []string{"c"}
	if got, want := w.Argv(), []string{"/a", "c"}; !slices.Equal(got, want) {
		t.Errorf("argv %q, want %q", got, want)
	}
	env := w.Env()
	for name, want := range map[string]string{"X": "4", "Y": "2=3", "KMO_PORT_WEB_UI": "8"} {
		if env[name] != want {
			t.Errorf("%s=%q, want %q", name, env[name], want)
		}
	}
	if len(env) != 4 {
		t.Errorf("environment %v, want those and PATH", env)
	}
}
