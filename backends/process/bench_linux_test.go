package process

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"
)

// BenchmarkObserve is one look at many running programs: the first after a second reads their cgroups.
func BenchmarkObserve(b *testing.B) {
	for _, count := range []int{100} {
		b.Run(fmt.Sprint(count), func(b *testing.B) {
			k := fresh(b)
			for i := range count {
				w := workload("many", "wait")
				w.Name = fmt.Sprintf("many-%08d", i)
				apply(b, k, w)
			}
			keeper, goroutines := resident(os.Getpid()), runtime.NumGoroutine()
			for _, e := range k.list() {
				e.read = time.Time{}
			}
			began := time.Now()
			if _, err := k.Observe(context.Background()); err != nil {
				b.Fatal(err)
			}
			reading := time.Since(began)
			for b.Loop() {
				if list, err := k.Observe(context.Background()); err != nil || len(list) != count {
					b.Fatal(len(list), err)
				}
			}
			b.ReportMetric(float64(keeper>>10), "KiB-keeper")
			b.ReportMetric(float64(goroutines), "goroutines")
			b.ReportMetric(float64(reading.Microseconds())/1000, "ms-with-usage")
		})
	}
}

func resident(pid int) int64 {
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "statm"))
	if err != nil {
		return 0
	}
	pages, err := strconv.ParseInt(strings.Fields(string(text))[1], 10, 64)
	if err != nil {
		return 0
	}
	return pages * int64(os.Getpagesize())
}
