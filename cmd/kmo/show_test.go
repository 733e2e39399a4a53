package main

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/kindos/kmo/policy"
	"github.com/kindos/kmo/reconciler"
)

// TestCompact: a value from a site is shown in one line, and steers no terminal.
func TestCompact(t *testing.T) {
	for _, one := range []struct {
		value any
		want  string
	}{
		{nil, "nothing"},
		{map[string]any{"a": 1}, `{"a":1}`},
		{"yes \u202eon\u009b31m", `"yes ?on?31m"`},
	} {
		if got := compact(one.value); got != one.want {
			t.Errorf("%q, want %q", got, one.want)
		}
	}
}

// TestReplay: a decision made again is the same if its bytes are, whatever time it took.
func TestReplay(t *testing.T) {
	then := policy.Decision{Denied: []policy.Denial{{ID: "KT001", Unit: "relay"}}, Evaluated: []string{"KT001"}, Input: []byte(`{"a":1}`), Took: 1}
	body, err := json.Marshal(reconciler.DecisionEntry{Decision: then})
	if err != nil {
		t.Fatal(err)
	}
	now := then
	now.Took = 2
	if got := again(body, now); got != "replayed: the same answer, byte for byte" {
		t.Error(got)
	}
	for _, change := range []func(*policy.Decision){
		func(d *policy.Decision) { d.Denied = nil },
		func(d *policy.Decision) { d.Warned = then.Denied },
		func(d *policy.Decision) { d.Evaluated = nil },
		func(d *policy.Decision) { d.Input = []byte(`{"a":2}`) },
		func(d *policy.Decision) { d.Policy[0] = 1 },
	} {
		other := then
		change(&other)
		if got := again(body, other); !strings.HasPrefix(got, differs) {
			t.Error(got)
		}
	}
	if got := again([]byte("{}"), now); !strings.HasPrefix(got, "not replayed: ") {
		t.Error(got)
	}
}
