package main

import "testing"

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
