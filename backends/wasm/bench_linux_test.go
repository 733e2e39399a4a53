package wasm

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/conformance"
)

// Benchmark is of a module that has been compiled before.
func Benchmark(b *testing.B) {
	backend := over(b, shareModules(b))
	defer backend.Close()
	conformance.Bench(b, conformance.Race{Backend: backend, Format: backends.WASM, Image: backends.Image{Content: binaries.program}, Many: 100})
}

// BenchmarkCompile is what the first start of a module costs beside.
func BenchmarkCompile(b *testing.B) {
	for name, module := range map[string]string{"small": binaries.program, "net-http": binaries.web} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				machineCodeIn(b, filepath.Join(b.TempDir(), "modules"), module)
			}
		})
	}
}

// BenchmarkIdleWeb is what an idle web server costs: the time is of one answer.
func BenchmarkIdleWeb(b *testing.B) {
	guest, _, _ := web(b)
	pid := guest.Process.Pid
	begun, first := time.Now(), ticks(b, pid)
	for b.Loop() {
		<-time.After(2 * time.Second)
	}
	b.ReportMetric(float64(ticks(b, pid)-first)/time.Since(begun).Seconds(), "ticks/s")
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if kind := fields[0]; kind == "Rss:" || kind == "Pss:" {
			size, err := strconv.ParseFloat(fields[1], 64)
			if err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(size/1024, strings.TrimSuffix(kind, ":")+"-MiB")
		}
	}
}

// ticks is the processor time of a process in hundredths of a second.
func ticks(t testing.TB, pid int) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(text))
	user, err := strconv.Atoi(fields[13])
	if err != nil {
		t.Fatal(err)
	}
	system, err := strconv.Atoi(fields[14])
	if err != nil {
		t.Fatal(err)
	}
	return user + system
}
