package backends

import (
	"errors"
	"slices"
	"testing"
)

func TestAdmit(t *testing.T) {
	all := Workload{
		Format:    Native,
		Run:       Run{Ports: []Port{{Name: "http", Port: 80, Host: 8080}, {Name: "low", Host: 81}}},
		Resources: Resources{CPU: 1, Memory: 1, PIDs: 1, Disk: 1, Devices: []Device{{Name: "camera"}}},
		Files:     []File{{To: "/c"}, {To: "/d", Secret: true}},
		Doors:     []Door{{Via: "memory"}, {Via: "socket"}},
		Mounts:    []Mount{{From: "/a", To: "/b"}},
		Overlay:   Overlay{Size: 1, Keep: []string{"/k"}},
		Hooks:     Hooks{Exit: [][]string{{"/app"}}},
		Security: Security{
			Privileged: true, WritableBase: true, Unconfined: true, Capabilities: []string{"CAP_CHOWN"}, Host: []string{"network", "pid"},
		},
	}
	needs := all.Needs()
	if len(needs) != 21 {
		t.Errorf("a workload that asks for everything needs %d features, want 21: %v", len(needs), needs)
	}
	able := Fingerprint{Backend: "some", Formats: []Format{Native}, Features: needs}
	if err := able.Admit(all); err != nil {
		t.Errorf("everything asked, everything there: %v", err)
	}
	for _, feature := range needs {
		able.Features = slices.DeleteFunc(slices.Clone(needs), func(f Feature) bool { return f == feature })
		able.Missing = []string{string(feature) + ": the kernel is too old"}
		want := FeatureError{Backend: "some", Feature: feature, Detail: "the kernel is too old"}
		var got *FeatureError
		if err := able.Admit(all); !errors.As(err, &got) || *got != want {
			t.Errorf("without %s: error %v, want %v", feature, err, &want)
		}
	}
	modest := Workload{Format: Native, Run: Run{Ports: []Port{{Name: "a"}, {Name: "b", Port: 8080}, {Name: "c", Port: 8080, Host: 8080}}}}
	if needs := modest.Needs(); len(needs) != 0 {
		t.Errorf("a workload that asks for nothing needs %v", needs)
	}
	if needs := (&Workload{Security: Security{Escalation: true}}).Needs(); !slices.Equal(needs, []Feature{Capabilities}) {
		t.Errorf("a workload that asks for escalation needs %v, want %s", needs, Capabilities)
	}
	modest.Format = OCI
	var got *FeatureError
	if err := able.Admit(modest); !errors.As(err, &got) || got.Feature != Feature(OCI) {
		t.Errorf("another format: error %v, want a *FeatureError for %s", err, OCI)
	}
}
