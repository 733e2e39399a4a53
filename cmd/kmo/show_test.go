package main

import (
	"strings"
	"testing"

	"github.com/kindos/kmo/policy"
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

// TestReplay: a decision made again is the same if what it says is, whatever time it took.
func TestReplay(t *testing.T) {
	then := policy.Decision{Denied: []policy.Denial{{ID: "KT001", Unit: "relay"}}, Evaluated: []string{"KT001"}, Took: 1}
	now := then
	now.Took = 2
	if got := again(then, now); got != "replayed: the same answer" {
		t.Error(got)
	}
	for _, change := range []func(*policy.Decision){
		func(d *policy.Decision) { d.Denied = nil },
		func(d *policy.Decision) { d.Warned = then.Denied },
		func(d *policy.Decision) { d.Evaluated = nil },
	} {
		other := then
		change(&other)
		if got := again(then, other); !strings.HasPrefix(got, "REPLAY DIFFERS") {
			t.Error(got)
		}
	}
}
