package kubernetes

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/kindos/kmo/backends"
)

// bench is a site with a backend on it.
type bench struct {
	testing.TB
	*Backend
	options   Options
	namespace string
}

func newBench(t testing.TB) *bench {
	t.Helper()
	namespace, account := control.site(t)
	o := Options{Kubeconfig: account, Namespace: namespace, State: t.TempDir()}
	return &bench{t, open(t, o), o, namespace}
}

func (b *bench) apply(w backends.Workload) {
	b.Helper()
	if err := b.Apply(b.Context(), w); err != nil {
		b.Fatalf("apply %s: %v", w.Name, err)
	}
}

func (b *bench) remove(name string) {
	b.Helper()
	if err := b.Remove(b.Context(), name); err != nil {
		b.Fatalf("remove %s: %v", name, err)
	}
}

// status is that of the one workload there is.
func (b *bench) status() backends.Status {
	b.Helper()
	list, err := b.Observe(b.Context())
	if err != nil || len(list) != 1 {
		b.Fatalf("observe: %+v, %v; want one", list, err)
	}
	return list[0]
}

func (b *bench) until(what string, is func(backends.Status) bool) (s backends.Status) {
	b.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if s = b.status(); is(s) {
			return s
		}
		if time.Now().After(deadline) {
			b.Fatalf("it is %+v, want %s", s, what)
		}
	}
}

func (b *bench) running() backends.Status {
	b.Helper()
	return b.until("running", func(s backends.Status) bool { return s.State == backends.Running })
}

// path is where an object of the site is.
func (b *bench) path(k kind, name string) string {
	api, plural := k.split()
	return api + "/namespaces/" + b.namespace + "/" + plural + "/" + name
}

const (
	mergePatch = "application/merge-patch+json"
	jsonPatch  = "application/json-patch+json"
	applyPatch = "application/apply-patch+yaml"
)

// everything is a workload that has each kind of object.
func everything(digit string) backends.Workload {
	w := workload("relay", digit)
	w.Files = []backends.File{{To: "/etc/relay.toml", Mode: 0o444, Content: []byte("key = 1\n")}}
	w.Run.Ports = []backends.Port{{Name: "http"}, {Name: "out", Host: 30000 + int(digit[0])}}
	w.Run.Env = map[string]string{"COST": "$(HOME) $5"}
	w.Overlay.Size = 16 << 20
	return w
}

// TestDrift changes one thing after the other behind the backend's back.
func TestDrift(t *testing.T) {
	w := everything("1")
	for _, d := range []struct {
		name, detail string
		change       func(b *bench)
	}{
		{"replicas", "deployment.replicas is 3, want 1", func(b *bench) {
			control.must(b, http.MethodPatch, b.path(deployments, w.Name), mergePatch, `{"spec":{"replicas":3}}`, nil)
		}},
		{"replicas of another manager", "deployment.replicas is 2, want 1", func(b *bench) {
			control.must(b, http.MethodPatch, b.path(deployments, w.Name)+"?fieldManager=hpa&force=true", applyPatch,
				`{"apiVersion":"apps/v1","kind":"Deployment","metadata":{"name":"`+w.Name+`"},"spec":{"replicas":2}}`, nil)
		}},
		{"image", "deployment.template.spec.containers[app].image is evil, want reg.example/app@sha256:", func(b *bench) {
			control.must(b, http.MethodPatch, b.path(deployments, w.Name), jsonPatch, `[{"op":"replace","path":"/spec/template/spec/containers/0/image","value":"evil"}]`, nil)
		}},
		{"limit", "deployment.template.spec.containers[app].resources.limits.memory is 1Gi, want 64Mi", func(b *bench) {
			control.must(b, http.MethodPatch, b.path(deployments, w.Name), jsonPatch, `[{"op":"replace","path":"/spec/template/spec/containers/0/resources/limits/memory","value":"1Gi"}]`, nil)
		}},
		{"environment, which is not told", "deployment.template.spec.containers[app].env[COST].value is not as it was applied", func(b *bench) {
			control.must(b, http.MethodPatch, b.path(deployments, w.Name), jsonPatch, `[{"op":"replace","path":"/spec/template/spec/containers/0/env/0/value","value":"evil"}]`, nil)
		}},
		{"security", "deployment.template.spec.containers[app].securityContext.readOnlyRootFilesystem is false, want true", func(b *bench) {
			control.must(b, http.MethodPatch, b.path(deployments, w.Name), jsonPatch, `[{"op":"replace","path":"/spec/template/spec/containers/0/securityContext/readOnlyRootFilesystem","value":false}]`, nil)
		}},
		{"what was applied", "annotation kmo/applied", func(b *bench) {
			control.must(b, http.MethodPatch, b.path(deployments, w.Name), mergePatch, `{"metadata":{"annotations":{"kmo/applied":null}}}`, nil)
		}},
		{"service", "the Service " + w.Name + " is missing", func(b *bench) {
			control.must(b, http.MethodDelete, b.path(services, w.Name), "", nil, nil)
		}},
		{"service's target", "service.ports[http].targetPort is 1, want 20000", func(b *bench) {
			control.must(b, http.MethodPatch, b.path(services, w.Name), jsonPatch, `[{"op":"replace","path":"/spec/ports/0/targetPort","value":1}]`, nil)
		}},
		{"files", "the ConfigMap of its files is missing", func(b *bench) {
			control.must(b, http.MethodDelete, b.path(configMaps, w.Name), "", nil, nil)
		}},
		{"files of another", "the ConfigMap of its files is missing, or another", func(b *bench) {
			var now map[string]any
			control.must(b, http.MethodGet, b.path(configMaps, w.Name), "", nil, &now)
			control.must(b, http.MethodDelete, b.path(configMaps, w.Name), "", nil, nil)
			labels := now["metadata"].(map[string]any)["labels"]
			other := object{"apiVersion": "v1", "kind": "ConfigMap", "metadata": object{"name": w.Name, "labels": labels}, "data": object{"f0": "evil"}}
			control.must(b, http.MethodPost, strings.TrimSuffix(b.path(configMaps, ""), "/"), "application/json", other, nil)
		}},
	} {
		t.Run(d.name, func(t *testing.T) {
			b := newBench(t)
			defer b.remove(w.Name)
			b.apply(w)
			b.running()
			d.change(b)
			if s := b.status(); s.State != backends.Damaged || !strings.Contains(s.Detail, d.detail) {
				t.Errorf("it is %s, %q; want damaged: %s", s.State, s.Detail, d.detail)
			}
			b.apply(w)
			b.running()
		})
	}
}

// What others add beside our fields is theirs.
func TestWhatOthersAddIsTheirs(t *testing.T) {
	b := newBench(t)
	w := everything("2")
	b.apply(w)
	b.running()
	control.must(t, http.MethodPatch, b.path(deployments, w.Name)+"?fieldManager=mesh", applyPatch, fmt.Sprintf(`
apiVersion: apps/v1
kind: Deployment
metadata: {name: %s, annotations: {mesh: "on"}, labels: {mesh: "on"}}
spec: {template: {metadata: {annotations: {mesh: "on"}}, spec: {containers: [{name: sidecar, image: mesh}]}}}
`, w.Name), nil)
	b.running()
	b.apply(w)
	b.running()
	var now item
	control.must(t, http.MethodGet, b.path(deployments, w.Name), "", nil, &now)
	if text := fmt.Sprint(now.Spec); !strings.Contains(text, "sidecar") || now.Metadata.Annotations["mesh"] != "on" {
		t.Errorf("applying it again took what is another's: %s", text)
	}
	b.remove(w.Name)
}

// TestStrangers: what has not our labels is never listed, changed or removed, whatever its name is; nor what another instance made.
func TestStrangers(t *testing.T) {
	b := newBench(t)
	w := workload("relay", "3")
	o := b.options
	o.State = t.TempDir()
	other := &bench{t, open(t, o), o, b.namespace}
	deploy := object{"apiVersion": "apps/v1", "kind": "Deployment", "metadata": object{"name": w.Name}, "spec": object{
		"selector": object{"matchLabels": object{"app": "x"}},
		"template": object{"metadata": object{"labels": object{"app": "x"}}, "spec": object{"containers": []any{object{"name": "x", "image": "x"}}}},
	}}
	for name, make := range map[string]func(){
		"a person's": func() {
			control.must(t, http.MethodPost, strings.TrimSuffix(b.path(deployments, ""), "/"), "application/json", deploy, nil)
		},
		"another instance's": func() { other.apply(w) },
	} {
		make()
		var before, after item
		control.must(t, http.MethodGet, b.path(deployments, w.Name), "", nil, &before)
		if list, err := b.Observe(t.Context()); err != nil || len(list) != 0 {
			t.Errorf("%s is listed: %+v, %v", name, list, err)
		}
		var lacking *backends.FeatureError
		var start *backends.StartError
		if err := b.Apply(t.Context(), w); err == nil || errors.As(err, &lacking) || errors.As(err, &start) || !strings.Contains(err.Error(), "is another's") {
			t.Errorf("applying over %s: %v; want that it is another's", name, err)
		}
		b.remove(w.Name)
		if _, err := b.Logs(t.Context(), w.Name, backends.LogOptions{}); !errors.Is(err, backends.ErrNotFound) {
			t.Errorf("logs of %s: %v", name, err)
		}
		control.must(t, http.MethodGet, b.path(deployments, w.Name), "", nil, &after)
		if before.Metadata.UID != after.Metadata.UID || before.Metadata.Generation != after.Metadata.Generation || after.Metadata.DeletionTimestamp != nil {
			t.Errorf("%s was touched: %+v, was %+v", name, after.Metadata, before.Metadata)
		}
		control.must(t, http.MethodDelete, b.path(deployments, w.Name), "", nil, nil)
		for len(control.objects(t, b.namespace)) > 0 {
			time.Sleep(20 * time.Millisecond)
		}
	}
}

// TestApplyTwiceWritesNothing: the same again is no new generation of anything.
func TestApplyTwiceWritesNothing(t *testing.T) {
	b := newBench(t)
	w := everything("4")
	b.apply(w)
	b.running()
	generations := func() (all []string) {
		for k, name := range map[kind]string{deployments: w.Name, services: w.Name, configMaps: w.Name} {
			var o struct {
				Metadata struct {
					UID        string `json:"uid"`
					Generation int    `json:"generation"`
				} `json:"metadata"`
				Spec any `json:"spec"`
			}
			control.must(t, http.MethodGet, b.path(k, name), "", nil, &o)
			all = append(all, fmt.Sprint(k, o))
		}
		return all
	}
	before := generations()
	b.apply(w)
	for _, one := range generations() {
		if !contains(before, one) {
			t.Errorf("applying the same changed %s", one)
		}
	}
	b.remove(w.Name)
	if left := control.objects(t, b.namespace); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}
