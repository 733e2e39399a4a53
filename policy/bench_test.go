package policy

import (
	"context"
	"encoding/json"
	"fmt"
	"runtime"
	"testing"

	shipped "github.com/kindos/kmo/rego"
)

// many is the base input with n units, each changed, approved and placed here.
func many(tb testing.TB, n int) Input {
	tb.Helper()
	c, err := readCorpus()
	if err != nil {
		tb.Fatal(err)
	}
	var input Input
	if err := json.Unmarshal(c.base, &input); err != nil {
		tb.Fatal(err)
	}
	unit, facts := input.Units[0], input.Change.Units[0]
	input.Units, input.Change.Units = nil, nil
	for i := range n {
		unit.Name = fmt.Sprintf("relay-%04d", i)
		facts.Unit = unit.Name
		input.Units, input.Change.Units = append(input.Units, unit), append(input.Change.Units, facts)
	}
	return input
}

func load(tb testing.TB) *Set {
	tb.Helper()
	set, err := Load(shipped.Rules())
	if err != nil {
		tb.Fatal(err)
	}
	return set
}

func BenchmarkDecide(b *testing.B) {
	set := load(b)
	for _, n := range []int{10, 100, 1000} {
		b.Run(fmt.Sprintf("units=%d", n), func(b *testing.B) {
			input := many(b, n)
			b.ReportAllocs()
			for b.Loop() {
				decision, err := set.Decide(context.Background(), input)
				if err != nil || decision.Refusal() != nil {
					b.Fatal(err, decision.Refusal())
				}
			}
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N)/float64(n), "µs/unit")
		})
	}
}

// BenchmarkDecideFew judges three changed units of a site of a thousand: what the others take together is in the totals.
func BenchmarkDecideFew(b *testing.B) {
	set, input := load(b), many(b, 3)
	input.Totals.Before, input.Totals.After = 1000, 1000
	b.ReportAllocs()
	for b.Loop() {
		decision, err := set.Decide(context.Background(), input)
		if err != nil || decision.Refusal() != nil {
			b.Fatal(err, decision.Refusal())
		}
	}
}

func BenchmarkDecode(b *testing.B) {
	document, err := json.Marshal(many(b, 1000))
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	b.SetBytes(int64(len(document)))
	for b.Loop() {
		if _, err := decode(document); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkLoad(b *testing.B) {
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	sets := []*Set{}
	for b.Loop() {
		sets = append(sets[:0], load(b))
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	b.ReportMetric(float64(int64(after.HeapAlloc)-int64(before.HeapAlloc))/1024, "resident-KiB")
	runtime.KeepAlive(sets)
}
