package docker

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/docker/layer"
	"github.com/kindos/kmo/registry/merkle"
)

// rooted is an image whose root is known, as one that was fetched has it.
func rooted(b *testing.B) backends.Image {
	b.Helper()
	program := filepath.Join(b.TempDir(), "app")
	build := exec.Command("go", "build", "-o", program, "github.com/kindos/kmo/backends/conformance/testprogram")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if output, err := build.CombinedOutput(); err != nil {
		b.Fatalf("building the test program: %v\n%s", err, output)
	}
	image := packed(b, program)
	image.ContentRoot = merkle.Digest{9}
	return image
}

// BenchmarkStart starts a workload and ends it, beside the engine's own command line and the same image.
func BenchmarkStart(b *testing.B) {
	image := rooted(b)
	for _, name := range []string{Docker, Podman} {
		d := up(b, name)
		state := b.TempDir()
		keeper := open(b, name, state)
		_, done, err := keeper.image(b.Context(), unit("relay", image)) // loaded before anything is measured
		if err != nil {
			b.Fatal(err)
		}
		measured, err := layer.Measure(b.Context(), image.Content, runtime.GOARCH)
		if err != nil {
			b.Fatal(err)
		}
		b.Run(name+"/kmo", func(b *testing.B) {
			var starts, stops time.Duration
			for b.Loop() {
				begun := time.Now()
				if err := keeper.Apply(b.Context(), unit("relay", image, "wait")); err != nil {
					b.Fatal(err)
				}
				started := time.Now()
				if err := keeper.Remove(b.Context(), "relay-00000001"); err != nil {
					b.Fatal(err)
				}
				starts, stops = starts+started.Sub(begun), stops+time.Since(started)
			}
			tell(b, starts, stops)
		})
		b.Run(name+"/command line", func(b *testing.B) {
			var starts, stops time.Duration
			for b.Loop() {
				begun := time.Now()
				command(b, d, "run", "-d", "--name", "bench", "--network", "bridge", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--user", "65532:65532", measured.Name, "/app", "wait")
				started := time.Now()
				command(b, d, "stop", "-t", "2", "bench")
				command(b, d, "rm", "-f", "bench")
				starts, stops = starts+started.Sub(begun), stops+time.Since(started)
			}
			tell(b, starts, stops)
		})
		done()
		keeper.drop(measured.ID)
		if err := keeper.Close(); err != nil {
			b.Error(err)
		}
	}
}

func tell(b *testing.B, starts, stops time.Duration) {
	b.ReportMetric(float64(starts.Milliseconds())/float64(b.N), "ms/start")
	b.ReportMetric(float64(stops.Milliseconds())/float64(b.N), "ms/stop")
}

// command runs the engine's own command line.
func command(b *testing.B, d *daemon, args ...string) {
	b.Helper()
	c := exec.Command(d.name, args...)
	c.Env = append(os.Environ(), d.env...)
	if d.name == Docker {
		c.Env = append(c.Env, "DOCKER_HOST=unix://"+d.socket)
	}
	if output, err := c.CombinedOutput(); err != nil {
		b.Fatalf("%s %v: %v: %s", d.name, args, err, output)
	}
}

// BenchmarkObserve looks at many workloads.
func BenchmarkObserve(b *testing.B) {
	const many = 100
	image := rooted(b)
	for _, name := range []string{Docker, Podman} {
		up(b, name)
		keeper := open(b, name, b.TempDir())
		begun := time.Now()
		failed := make(chan error, many)
		for i := range many {
			go func() { failed <- keeper.Apply(b.Context(), unit(fmt.Sprint("unit-", i), image, "wait")) }()
		}
		for range many {
			if err := <-failed; err != nil {
				b.Fatal(err)
			}
		}
		b.Logf("%s: %d started at once in %v", name, many, time.Since(begun))
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if list, err := keeper.Observe(b.Context()); err != nil || len(list) != many {
					b.Fatalf("%d workloads, %v", len(list), err)
				}
			}
		})
		for i := range many {
			go func() { failed <- keeper.Remove(b.Context(), fmt.Sprintf("unit-%d-00000001", i)) }()
		}
		for range many {
			if err := <-failed; err != nil {
				b.Error(err)
			}
		}
		if err := keeper.Close(); err != nil {
			b.Error(err)
		}
	}
}
