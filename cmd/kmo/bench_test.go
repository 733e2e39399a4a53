package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/kindos/kmo/registry"
)

// relay is the text of a unit that runs a pinned program; n makes it differ.
func relay(name, pin string, n int) map[string]string {
	return map[string]string{filepath.Join("units", name, "unit.yaml"): fmt.Sprintf(`unit: %s
tier: 3
intent: {kind: feature, summary: "bench"}
variants:
%sresources: {cpu: {max: 1}, memory: {max: 64Mi}, pids: {max: 64}, disk: {max: 16Mi}}
run: {ports: [{name: http}], user: 65532, env: {N: "%d"}}
health: {http: {port: http, path: /healthz}, every: 100ms, start: 5s}
`, name, pin, n)}
}

// BenchmarkPush is the time from the return of `git push` to the new program's first instruction and to the host's record that
// it is healthy; medians, in ms. In "image" the image is new to the host, too. Beside them, measured in the same run: the push
// itself, and the execution of the same program with nothing around it.
func BenchmarkPush(b *testing.B) {
	for _, fresh := range []bool{false, true} {
		name := map[bool]string{false: "unit", true: "image"}[fresh]
		b.Run(name, func(b *testing.B) {
			w := newWorld(b, "backends: [native]\n")
			w.start()
			w.write("v0", relay("relay", w.pins["relay-1"], 0))
			w.push()
			w.converged(w.accept())
			var pushed, first, healthy, bare []time.Duration
			b.ResetTimer()
			for i := range b.N {
				b.StopTimer()
				pin := w.pins["relay-1"]
				if fresh {
					pin = w.another(i)
				}
				commit := w.write("v", relay("relay", pin, i+1))
				bare = append(bare, w.bare())
				b.StartTimer()
				begin := time.Now()
				w.push()
				returned := time.Now()
				w.converged(commit)
				healthy = append(healthy, time.Since(returned))
				b.StopTimer()
				pushed = append(pushed, returned.Sub(begin))
				first = append(first, w.began("relay").Sub(returned))
			}
			b.ReportMetric(median(first), "first-ms")
			b.ReportMetric(median(healthy), "healthy-ms")
			b.ReportMetric(median(pushed), "gitpush-ms")
			b.ReportMetric(median(bare), "exec-ms")
		})
	}
}

func median(all []time.Duration) float64 {
	slices.Sort(all)
	return float64(all[len(all)/2].Microseconds()) / 1000
}

// bare executes the program with nothing around it, and returns how long it took to its first instruction.
func (w *world) bare() time.Duration {
	w.t.Helper()
	stamp := filepath.Join(w.dir, "stamp")
	cmd := exec.CommandContext(w.t.Context(), filepath.Join(w.programs, "relay-1"), "stamp", stamp)
	cmd.Env = []string{"KMO_PORT_HTTP=0"}
	begin := time.Now()
	if err := cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	defer func() { _ = cmd.Wait() }()
	defer func() { _ = cmd.Process.Kill() }()
	for {
		if text, err := os.ReadFile(stamp); err == nil && len(text) > 18 {
			ns, err := strconv.ParseInt(string(text), 10, 64)
			if err != nil {
				w.t.Fatal(err)
			}
			_ = os.Remove(stamp)
			return time.Unix(0, ns).Sub(begin)
		}
		time.Sleep(200 * time.Microsecond)
	}
}

// another is the same program with other bytes at its end, pushed to the registry.
func (w *world) another(n int) string {
	w.t.Helper()
	text, err := os.ReadFile(filepath.Join(w.programs, "relay-1"))
	if err != nil {
		w.t.Fatal(err)
	}
	path := filepath.Join(w.dir, "another")
	if err := os.WriteFile(path, fmt.Appendf(text, "%d", n), 0o755); err != nil {
		w.t.Fatal(err)
	}
	place, err := registry.ParsePlace(w.registry + "/relay-1")
	if err != nil {
		w.t.Fatal(err)
	}
	var pin string
	if err := withStore(func(store *registry.Store) error {
		ref, root, err := store.PushFile(context.Background(), path, place, registry.Native)
		pin = fmt.Sprintf("  - native: %s\n    merkle: %s\n", ref, root)
		return err
	}); err != nil {
		w.t.Fatal(err)
	}
	return strings.Clone(pin)
}
