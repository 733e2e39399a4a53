package conformance

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/kindos/kmo/backends"
)

// writeChecks are about where a workload may write and what becomes of it.
func writeChecks() []check {
	return []check{
		{"nothing can be written without an overlay", nothingWritten},
		{"T56 the base is immutable, the overlay is not", baseImmutable},
		{"a kept path survives a new spec and belongs to its unit", keptSurvives},
	}
}

// boundChecks are about limits.
func boundChecks() []check {
	return []check{
		{"the memory limit bites and is told", memoryBites},
		{"the process limit bites", pidsBite},
		{"the disk limit bites", diskBites},
		{"the processor limit bites and usage is told", cpuBites},
	}
}

// refusalChecks are about what the backend lacks.
func refusalChecks() []check {
	return []check{
		{"what it lacks is refused and nothing changed", lackedRefused},
		{"an unknown format is refused", formatRefused},
		{"what nobody knows is refused", unknownRefused},
	}
}

func nothingWritten(b *bench) {
	w := b.apply(b.unit("relay", "write /tmp/x text", "write /x text", "write /etc/x text", "append /app text", "wait"))
	b.line(w.Name, "waiting")
	for _, path := range []string{"/tmp/x", "/x", "/etc/x"} {
		if got := b.line(w.Name, "write "+path+":"); !strings.HasPrefix(got, "error") {
			b.Errorf("writing %s without an overlay: %s", path, got)
		}
	}
	if got := b.line(w.Name, "append /app:"); !strings.HasPrefix(got, "error") {
		b.Errorf("writing to the program: %s", got)
	}
}

func baseImmutable(b *bench) {
	before := contentSum(b)
	w := b.unit("relay", "append /app text", "cat /tmp/x", "append /tmp/y text", "write /tmp/x text", "write /new text", "cat /tmp/x", "wait")
	if b.has(backends.Overlays) {
		w.Overlay.Size = 16 << 20
	}
	w = b.apply(w)
	b.line(w.Name, "waiting")
	if got := b.line(w.Name, "write /new:"); b.able.Has(backends.Overlays) && b.has(backends.OverlayRoot) && got != "ok" {
		b.Errorf("writing above the base: %s", got)
	}
	if got := b.line(w.Name, "append /tmp/y:"); b.able.Has(backends.Overlays) && got != "ok" { // which makes no folder, as write does
		b.Errorf("writing to /tmp, which an overlay has: %s", got)
	}
	if got := b.line(w.Name, "cat /tmp/x:"); b.able.Has(backends.Overlays) && got != `"text"` {
		b.Errorf("what was written to the overlay reads as %s", got)
	}
	if strings.Count(b.log(w.Name), `cat /tmp/x: "text"`) > 1 {
		b.Error("the overlay was not empty at first")
	}
	b.remove(w.Name)
	if after := contentSum(b); after != before {
		b.Errorf("the image's content has changed: %s, was %s", after, before)
	}
	again := b.apply(w)
	b.line(again.Name, "waiting")
	if text := b.log(again.Name); strings.Count(text, `cat /tmp/x: "text"`) > 1 {
		b.Errorf("the overlay of a removed workload came back: %q", text)
	}
}

// contentSum is a digest of all names, modes and bytes of the image, where they are on this host.
func contentSum(b *bench) string {
	b.Helper()
	if b.subject.Images[b.format].Content == "" {
		return ""
	}
	sum := sha256.New()
	err := filepath.WalkDir(b.subject.Images[b.format].Content, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		found, err := entry.Info()
		if err != nil {
			return err
		}
		_, _ = fmt.Fprintln(sum, path, found.Mode(), found.Size())
		if !found.Mode().IsRegular() {
			return nil
		}
		content, err := os.ReadFile(path)
		sum.Write(content)
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
	return hex.EncodeToString(sum.Sum(nil))
}

func keptSurvives(b *bench) {
	if !b.has(backends.Keep) {
		return // the refusal of it is checked with the others
	}
	unit := func(name string, steps ...string) backends.Workload {
		w := b.unit(name, append(steps, "wait")...)
		w.Overlay.Keep = []string{"/var/lib/relay"}
		return b.apply(w)
	}
	first := unit("relay", "write /var/lib/relay/x first", "cat /var/lib/relay/x")
	b.line(first.Name, "waiting")
	if got := b.line(first.Name, "cat /var/lib/relay/x:"); got != `"first"` {
		b.Fatalf("what was written to a kept path reads as %s", got)
	}
	second := unit("relay", "say second", "cat /var/lib/relay/x")
	b.line(second.Name, "waiting")
	if got := b.line(second.Name, "cat /var/lib/relay/x:"); got != `"first"` {
		b.Errorf("beside the old spec the new one reads %s", got)
	}
	b.remove(first.Name)
	b.remove(second.Name)
	b.reopen()
	third := unit("relay", "say third", "cat /var/lib/relay/x")
	b.line(third.Name, "waiting")
	if got := b.line(third.Name, "cat /var/lib/relay/x:"); got != `"first"` {
		b.Errorf("after all were removed a new spec reads %s", got)
	}
	other := unit("other", "cat /var/lib/relay/x")
	b.line(other.Name, "waiting")
	if got := b.line(other.Name, "cat /var/lib/relay/x:"); !strings.HasPrefix(got, "error") {
		b.Errorf("another unit reads %s", got)
	}
}

func memoryBites(b *bench) {
	if !b.has(backends.LimitMemory) {
		return
	}
	w := b.unit("relay", "eat 536870912", "wait")
	w.Resources.Memory = 64 << 20
	w = b.apply(w)
	s := b.until(w.Name, "ended", func(s backends.Status) bool {
		return s.State == backends.Backoff || s.State == backends.Exited || s.Restarts > 0
	})
	if !s.OOM || s.ExitCode == 0 {
		b.Errorf("the program outgrew its memory; status is %+v, want OOM and an exit code", s)
	}
	if text := b.log(w.Name); strings.Contains("\n"+text, "\nate ") {
		b.Errorf("the program ate 512 MiB under a limit of 64 MiB: %.1000q", text)
	}
}

func pidsBite(b *bench) {
	if !b.has(backends.LimitPIDs) {
		return
	}
	w := b.unit("relay", "fork 40", "wait")
	w.Resources.PIDs = 24
	w = b.apply(w)
	b.poll("the forks to fail", func() (string, bool) {
		s, _ := b.status(w.Name)
		text := b.log(w.Name)
		if strings.Contains(text, "forked 40") {
			b.Fatalf("40 children under a limit of 24 processes: %q", text)
		}
		if s.Usage.PIDs > w.Resources.PIDs {
			b.Fatalf("%d processes under a limit of %d", s.Usage.PIDs, w.Resources.PIDs)
		}
		return text, strings.Contains(text, "fork: ") || s.Restarts > 0 || s.State == backends.Backoff
	})
}

func diskBites(b *bench) {
	if !b.able.Has(backends.Overlays) || !b.has(backends.LimitDisk) {
		return
	}
	w := b.unit("relay", "fill /tmp/x 8388608", "wait")
	w.Resources.Disk, w.Overlay.Size = 1<<20, 1<<20
	w = b.apply(w)
	b.line(w.Name, "waiting")
	if got := b.line(w.Name, "fill /tmp/x:"); !strings.HasPrefix(got, "error") {
		b.Errorf("writing 8 MiB to an overlay of 1 MiB: %s", got)
	}
}

func cpuBites(b *bench) {
	if !b.has(backends.LimitCPU) {
		return
	}
	w := b.unit("relay", "burn")
	w.Resources.CPU = 200
	w = b.apply(w)
	b.until(w.Name, "running", running)
	begun, first := time.Now(), time.Duration(-1)
	b.poll("a second and some of the processor", func() (string, bool) {
		s, _ := b.status(w.Name)
		cpu := s.Usage.CPU
		if b.subject.Used != nil {
			cpu = b.subject.Used(b.T, s)
		}
		if first < 0 {
			begun, first = time.Now(), cpu
		}
		wall, used := time.Since(begun), cpu-first
		if wall > 2*time.Second && used > wall*2/5 {
			b.Fatalf("used %v of the processor in %v under a limit of a fifth", used, wall)
		}
		return fmt.Sprintf("%v used in %v", used, wall), wall > 2*time.Second && used > 50*time.Millisecond
	})
}

// lackedRefused asks for each feature the fingerprint does not have.
func lackedRefused(b *bench) {
	asks := map[backends.Feature]func(w *backends.Workload){
		backends.PortMap:     func(w *backends.Workload) { w.Run.Ports = []backends.Port{{Name: "http", Port: 80, Host: freePort(b)}} },
		backends.LowPorts:    func(w *backends.Workload) { w.Run.Ports = []backends.Port{{Name: "http", Port: 1}} },
		backends.LimitCPU:    func(w *backends.Workload) { w.Resources.CPU = 100 },
		backends.LimitMemory: func(w *backends.Workload) { w.Resources.Memory = 64 << 20 },
		backends.LimitPIDs:   func(w *backends.Workload) { w.Resources.PIDs = 64 },
		backends.LimitDisk:   func(w *backends.Workload) { w.Resources.Disk = 1 << 20 },
		backends.Overlays:    func(w *backends.Workload) { w.Overlay.Size = 1 << 20 },
		backends.Keep:        func(w *backends.Workload) { w.Overlay.Keep = []string{"/keep"} },
		backends.Files:       func(w *backends.Workload) { w.Files = []backends.File{{To: "/etc/x", Mode: 0o444}} },
		backends.Secrets:     func(w *backends.Workload) { w.Files = []backends.File{{To: "/etc/x", Mode: 0o400, Secret: true}} },
		backends.MemoryPool:  func(w *backends.Workload) { w.Doors = []backends.Door{{From: "/tmp", To: "/door", Via: "memory"}} },
		backends.Sockets:     func(w *backends.Workload) { w.Doors = []backends.Door{{From: "/tmp", To: "/door", Via: "socket"}} },
		backends.Hooking:     func(w *backends.Workload) { w.Hooks.PostInit = [][]string{{"/app"}} },
		backends.HostNetwork: func(w *backends.Workload) { w.Security.Host = []string{"network"} },
		backends.Mounts:      func(w *backends.Workload) { w.Mounts = []backends.Mount{{From: "/tmp", To: "/host", ReadOnly: true}} },
		backends.Devices: func(w *backends.Workload) {
			w.Resources.Devices = []backends.Device{{Name: "tun", Nodes: []string{tun}}}
		},
		backends.Capabilities:  func(w *backends.Workload) { w.Security.Capabilities = []string{"CAP_NET_ADMIN"} },
		backends.HostNamespace: func(w *backends.Workload) { w.Security.Host = []string{"pid"} },
		backends.Privileged:    func(w *backends.Workload) { w.Security.Privileged = true },
		backends.WritableBase:  func(w *backends.Workload) { w.Security.WritableBase = true },
		backends.Unconfined:    func(w *backends.Workload) { w.Security.Unconfined = true },
	}
	stays := b.apply(b.unit("stays", "wait"))
	before := b.up(stays.Name)
	for feature, ask := range asks {
		if b.able.Has(feature) {
			continue
		}
		w := b.unit("relay", "wait")
		ask(&w)
		w = seal(w)
		b.names = append(b.names, w.Name)
		b.lacks(feature, b.backend.Apply(b.Context(), w))
	}
	list := b.observe()
	if len(list) != 1 || list[0].Name != stays.Name || list[0].PID != before.PID || list[0].Restarts != 0 {
		b.Errorf("refused workloads changed the host: %+v", list)
	}
}

func formatRefused(b *bench) {
	w := b.unit("relay", "wait")
	w.Format = "floppy"
	w = seal(w)
	b.names = append(b.names, w.Name)
	b.lacks("floppy", b.backend.Apply(b.Context(), w))
	if list := b.observe(); len(list) != 0 {
		b.Errorf("a refused workload is listed: %v", names(list))
	}
}

// unknownRefused asks for what there is nowhere. A backend that has such things in general must look at each of them.
func unknownRefused(b *bench) {
	for _, ask := range []func(w *backends.Workload){
		func(w *backends.Workload) { w.Security.Host = []string{"moon"} },
		func(w *backends.Workload) { w.Security.Capabilities = []string{"CAP_MOON"} },
		func(w *backends.Workload) { w.Resources.Devices = []backends.Device{{Name: "moon"}} },
		func(w *backends.Workload) {
			w.Resources.Devices = []backends.Device{{Name: "moon", Nodes: []string{"/dev/kmo-moon"}}}
		},
	} {
		w := b.unit("relay", "wait")
		ask(&w)
		w = seal(w)
		b.names = append(b.names, w.Name)
		var lacking *backends.FeatureError
		if err := b.backend.Apply(b.Context(), w); !errors.As(err, &lacking) {
			b.Errorf("asked for %v, %v: error %v, want a *FeatureError", w.Security, w.Resources.Devices, err)
		}
	}
	if list := b.observe(); len(list) != 0 {
		b.Errorf("a refused workload is listed: %v", names(list))
	}
}

// lacks wants err to be the refusal of a feature.
func (b *bench) lacks(feature backends.Feature, err error) {
	b.Helper()
	var lacking *backends.FeatureError
	if !errors.As(err, &lacking) || lacking.Feature != feature {
		b.Errorf("asked for %s, which the fingerprint does not have: error %v, want a *FeatureError for it", feature, err)
	}
}
