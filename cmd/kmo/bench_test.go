//go:build linux

package main

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/kindos/kmo/reconciler"
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
gate: {bake: 1ms}
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

// many is a host over a site of n units, converged, in this process; its backend is a plugin process that starts nothing.
func many(b *testing.B, n int) (*world, *host) {
	b.Helper()
	w := newWorld(b, "backends: [fake]\nlog: error\n")
	files := map[string]string{}
	for i := range n {
		name := fmt.Sprintf("unit-%d", i)
		files[filepath.Join("units", name, "unit.yaml")] = w.idle(name, 0)
	}
	w.write("many", files)
	w.push()
	commit := w.accept()
	h, err := openHost(b.Context(), &hostFlags{config: filepath.Join(w.dir, "agent.yaml"), state: w.state(), makes: true}, os.Stderr)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = h.close() })
	h.reconciler.Host.CPU, h.reconciler.Host.Memory, h.reconciler.Host.PIDs, h.reconciler.Host.Disk = 1<<40, 1<<50, 1<<40, 1<<50
	w.reconciled(h, commit)
	return w, h
}

// idle is a unit whose one probe is due at each look.
func (w *world) idle(name string, n int) string {
	return fmt.Sprintf(`unit: %s
tier: 3
intent: {kind: feature, summary: "bench"}
variants:
%sresources: {cpu: {max: 100m}, memory: {max: 16Mi}, pids: {max: 16}, disk: {max: 16Mi}}
run: {user: 65532, env: {N: "%d"}}
health: {process: {}, every: 1ms, timeout: 1s}
gate: {bake: 1ms}
`, name, w.pins["relay-1"], n)
}

// reconciled reconciles once, and the host must then run the commit.
func (w *world) reconciled(h *host, commit string) {
	w.t.Helper()
	rec, err := h.reconcileNow(w.t.Context())
	if err != nil || rec.Good != commit || rec.Outcome != reconciler.Converged {
		w.t.Fatalf("%+v, %v; want convergence to %s", rec, err, commit)
	}
}

// BenchmarkReconcile is one look at a branch that has not moved, on a host on which nothing has: a real repository on disk, a real
// journal, trust, policy and store, a real plugin process. Every unit's probe is due each time. Beside it, measured in the same run:
// reading and hashing the units' files once, with SHA-256.
func BenchmarkReconcile(b *testing.B) {
	for _, n := range []int{10, 100, 1000} {
		b.Run(fmt.Sprintf("units=%d", n), func(b *testing.B) {
			w, h := many(b, n)
			before := w.records(h)
			rec, err := h.journal.Load()
			if err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				w.reconciled(h, rec.Good)
			}
			b.ReportMetric(median([]time.Duration{w.hashed(), w.hashed(), w.hashed()}), "sha256-ms")
			if after, err := h.journal.Load(); err != nil || after.Seq != rec.Seq || w.records(h) != before {
				b.Errorf("looking again saved the journal %d times and wrote %d audit records, want none (%v)", after.Seq-rec.Seq, w.records(h)-before, err)
			}
		})
	}
}

// hashed reads and hashes every unit's file.
func (w *world) hashed() time.Duration {
	w.t.Helper()
	begin := time.Now()
	all, err := filepath.Glob(filepath.Join(w.dir, "site", "units", "*", "unit.yaml"))
	if err != nil || len(all) == 0 {
		w.t.Fatal(len(all), err)
	}
	for _, path := range all {
		text, err := os.ReadFile(path)
		if err != nil {
			w.t.Fatal(err)
		}
		sha256.Sum256(text)
	}
	return time.Since(begin)
}

func (w *world) records(h *host) int64 {
	w.t.Helper()
	tree, err := h.audit.Tree()
	if err != nil {
		w.t.Fatal(err)
	}
	return tree.N
}

// BenchmarkChange is a push that changes one unit of many, from the look at the branch to the record that it is good; what a
// program needs to start is not in it. Beside it, measured in the same run: the push.
func BenchmarkChange(b *testing.B) {
	for _, n := range []int{10, 100, 1000} {
		b.Run(fmt.Sprintf("units=%d", n), func(b *testing.B) {
			w, h := many(b, n)
			var pushed []time.Duration
			b.ResetTimer()
			for i := range b.N {
				b.StopTimer()
				commit := w.write("one", map[string]string{"units/unit-3/unit.yaml": w.idle("unit-3", i+1)})
				begin := time.Now()
				w.push()
				pushed = append(pushed, time.Since(begin))
				b.StartTimer()
				w.reconciled(h, commit)
			}
			b.ReportMetric(median(pushed), "gitpush-ms")
		})
	}
}
