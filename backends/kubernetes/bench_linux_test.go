package kubernetes

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kindos/kmo/backends"
)

func many(i int) backends.Workload {
	return workload(fmt.Sprint("unit-", i), fmt.Sprintf("%x", 1+i%15))
}

// BenchmarkObserve looks at 100 workloads.
func BenchmarkObserve(b *testing.B) {
	s := newBench(b)
	for i := range 100 {
		s.apply(many(i))
	}
	for up := 0; up < 100; {
		list, err := s.Observe(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		up = 0
		for _, one := range list {
			if one.State == backends.Running {
				up++
			}
		}
	}
	for b.Loop() {
		if list, err := s.Observe(b.Context()); err != nil || len(list) != 100 {
			b.Fatal(len(list), err)
		}
	}
	for i := range 100 {
		s.remove(many(i).Name)
	}
}

// BenchmarkStart applies a workload and waits until it runs, and until it is gone; beside what kubectl takes for the same object.
func BenchmarkStart(b *testing.B) {
	b.Run("kmo", func(b *testing.B) {
		s := newBench(b)
		w := workload("relay", "1")
		for b.Loop() {
			s.apply(w)
			s.running()
			b.StopTimer()
			s.remove(w.Name)
			b.StartTimer()
		}
	})
	b.Run("kubectl", func(b *testing.B) {
		kubectl, err := exec.LookPath("kubectl")
		if err != nil {
			b.Fatal("kubectl is missing, to compare with; as root: apt-get install kubernetes-client")
		}
		s := newBench(b)
		p := planned(workload("relay", "1"), "0")
		text, err := json.Marshal(p.deployment)
		if err != nil {
			b.Fatal(err)
		}
		file := filepath.Join(b.TempDir(), "deployment.json")
		if err := os.WriteFile(file, text, 0o600); err != nil {
			b.Fatal(err)
		}
		run := func(argv ...string) {
			argv = append([]string{"--kubeconfig", control.admin, "--namespace", s.namespace, "--cache-dir", b.TempDir()}, argv...)
			if out, err := exec.CommandContext(context.Background(), kubectl, argv...).CombinedOutput(); err != nil {
				b.Fatalf("%s: %v: %s", strings.Join(argv, " "), err, out)
			}
		}
		for b.Loop() {
			run("apply", "--server-side", "-f", file)
			run("rollout", "status", "deployment/"+p.deployment.name())
			b.StopTimer()
			run("delete", "--cascade=foreground", "-f", file)
			b.StartTimer()
		}
	})
}
