package kubernetes

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/conformance"
)

func Benchmark(b *testing.B) {
	s := newBench(b)
	race := conformance.Race{Backend: s.Backend, Format: backends.OCI, Image: ref("a"), Played: true, Many: 100}
	if kubectl, err := exec.LookPath("kubectl"); err == nil {
		race.Rival = byHand(s, kubectl)
	} else {
		b.Log("without a rival:", err)
	}
	conformance.Bench(b, race)
}

// byHand is kubectl with the same objects, in a namespace of its own.
func byHand(s *bench, kubectl string) *conformance.Rival {
	s.Helper()
	dir := s.TempDir()
	namespace, _ := control.site(s)
	run := func(words ...string) error {
		words = append([]string{"--kubeconfig", control.admin, "--namespace", namespace, "--cache-dir", filepath.Join(dir, "cache")}, words...)
		if said, err := exec.Command(kubectl, words...).CombinedOutput(); err != nil {
			return fmt.Errorf("kubectl %v: %v: %s", words, err, said)
		}
		return nil
	}
	file := func(name string) string { return filepath.Join(dir, name+".json") }
	return &conformance.Rival{
		Name: "kubectl",
		Start: func(name string) error {
			deployment := planned(workload(name, "1"), "0").deployment
			text, err := json.Marshal(deployment)
			if err == nil {
				err = os.WriteFile(file(name), text, 0o600)
			}
			if err == nil {
				err = run("apply", "--server-side", "-f", file(name))
			}
			if err == nil {
				err = run("rollout", "status", "deployment/"+deployment.name())
			}
			return err
		},
		Stop: func(name string) error { return run("delete", "--cascade=foreground", "-f", file(name)) },
	}
}
