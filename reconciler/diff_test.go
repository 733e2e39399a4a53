package reconciler

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/kindos/kmo/backends"
)

// do makes of what a host has what one step leaves of it.
func do(have []Have, step Step) []Have {
	gone := func(h Have) bool {
		return h.Name == step.Name && h.Backend == step.Backend || slices.Contains(step.Replaces, h.Name)
	}
	have = slices.DeleteFunc(slices.Clone(have), gone)
	if step.Op == Apply {
		have = append(have, Have{Backend: step.Backend, Status: backends.Status{Name: step.Name, State: backends.Running}})
	}
	return have
}

// TestDiffIsDoneOnce: whatever a host has and whatever is wanted, the steps leave exactly what is wanted, the next difference is empty, a step
// changes only what it names, and nothing that is right is touched.
func TestDiffIsDoneOnce(t *testing.T) {
	states := []backends.State{backends.Running, backends.Starting, backends.Backoff, backends.Exited, backends.Damaged}
	for seed := range uint64(2000) {
		random := rand.New(rand.NewPCG(seed, 1))
		name := func(unit int) string { return fmt.Sprintf("unit%d-%08d", unit, random.IntN(3)) }
		backend := func() string { return []string{"native", "wasm"}[random.IntN(2)] }
		var want []backends.Workload
		for unit := range random.IntN(5) {
			want = append(want, backends.Workload{Name: name(unit), Unit: fmt.Sprint("unit", unit), Backend: backend()})
		}
		var have []Have
		for range random.IntN(8) {
			one := Have{Backend: backend(), Status: backends.Status{Name: name(random.IntN(6)), State: states[random.IntN(len(states))]}}
			if !slices.ContainsFunc(have, func(h Have) bool { return h.Name == one.Name && h.Backend == one.Backend }) {
				have = append(have, one)
			}
		}
		exclusive := func(old, new string) []string {
			if (len(old)+int(seed))%2 == 0 && old != new {
				return []string{"a port"}
			}
			return nil
		}
		steps, after := Diff(want, have, exclusive), have
		for _, step := range steps {
			if step.Reason == "" {
				t.Errorf("seed %d: %s %s for no reason", seed, step.Op, step.Name)
			}
			right := slices.ContainsFunc(have, func(h Have) bool {
				return h.Name == step.Name && h.Backend == step.Backend && damage(h.Status) == ""
			})
			if step.Op == Apply && right {
				t.Errorf("seed %d: applies %s, which is as it should be", seed, step.Name)
			}
			after = do(after, step)
		}
		if again := Diff(want, after, exclusive); len(again) != 0 {
			t.Errorf("seed %d: want %v, had %v: after %v there is still %v", seed, want, have, steps, again)
		}
		if len(after) != len(want) {
			t.Errorf("seed %d: %d workloads, want %d", seed, len(after), len(want))
		}
	}
}
