//go:build linux

package main

import (
	"fmt"
	"maps"
	"os"
	"strings"
	"testing"
	"time"
)

// TestMemory holds the agent to what it may keep, idle, with ten native units and both built-in backends: 45 MB as its share of what it has
// resident. The rest are clean pages of the one binary, which its plugins have as well; how many of them a kernel maps around those that are touched
// differs by 6 MB between two machines. Plugins are told apart.
func TestMemory(t *testing.T) {
	w := newWorld(t, "")
	w.start()
	files := map[string]string{}
	for i := range 10 {
		maps.Copy(files, relay(fmt.Sprintf("relay-%d", i), w.pins["relay-1"], i))
	}
	w.write("ten", files)
	w.push()
	w.converged(w.accept())
	for i := range 20 { // as a host that has lived a little
		maps.Copy(files, relay("relay-3", w.pins["relay-1"], 100+i))
		commit := w.write("one more", files)
		w.push()
		w.converged(commit)
	}
	const limit = 45e6
	resident, shared := 0.0, 0.0
	deadline := time.Now().Add(20 * time.Second) // for what is let go of when nothing happens
	for {
		if resident, shared = memory(t, w.agent.Process.Pid); shared < limit || time.Now().After(deadline) {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Logf("agent: %.1f MB resident, %.1f MB its share", resident/1e6, shared/1e6)
	for _, pid := range (&scene{world: w}).plugins() {
		line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		words := strings.Split(string(line), "\x00")
		resident, shared := memory(t, pid)
		t.Logf("plugin %s: %.1f MB resident, %.1f MB its share", words[3], resident/1e6, shared/1e6)
	}
	if shared > limit {
		t.Errorf("the agent keeps %.1f MB as its share, want at most %.0f", shared/1e6, limit/1e6)
	}
}

// memory is what a process has resident, and its share of it where pages are shared, in bytes.
func memory(t *testing.T, pid int) (resident, share float64) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		var kb float64
		if _, err := fmt.Sscanf(line, "Rss: %f kB", &kb); err == nil {
			resident = kb * 1024
		}
		if _, err := fmt.Sscanf(line, "Pss: %f kB", &kb); err == nil {
			share = kb * 1024
		}
	}
	return resident, share
}
