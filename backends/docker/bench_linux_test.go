package docker

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/conformance"
	"github.com/kindos/kmo/backends/docker/layer"
	"github.com/kindos/kmo/registry/merkle"
)

func Benchmark(b *testing.B) {
	image := packed(b, conformance.Build(b, "linux", runtime.GOARCH))
	image.ContentRoot = merkle.Digest{9} // known, as that of one that was fetched
	measured, err := layer.Measure(b.Context(), image.Content, runtime.GOARCH)
	if err != nil {
		b.Fatal(err)
	}
	for _, name := range []string{Docker, Podman} {
		b.Run(name, func(b *testing.B) {
			d := up(b, name)
			backend := open(b, name, b.TempDir())
			defer backend.Close()
			id, done, err := backend.image(b.Context(), backends.Workload{Image: image}) // the engine keeps it between the rounds
			if err != nil {
				b.Fatal(err)
			}
			conformance.Bench(b, conformance.Race{Backend: backend, Format: backends.OCI, Image: image, Many: 100, Rival: byHand(d, measured.Name, b.TempDir())})
			done()
			backend.drop(id)
		})
	}
}

// byHand is the engine's own command line, with what a workload has. When the program waits is seen where the engine keeps its log: to ask
// for that would be one command more.
func byHand(d *daemon, image, dir string) *conformance.Rival {
	return &conformance.Rival{
		Name: "cli",
		Start: func(name string) error {
			args := []string{
				"run", "-d", "--name", name, "--network", "bridge", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges",
				"--user", "65532:65532", "--cpus", "1", "--memory", "128m", "--pids-limit", "64",
			}
			log := filepath.Join(dir, name)
			if d.name == Podman {
				args = append(args, "--log-driver", "k8s-file", "--log-opt", "path="+log)
			} else {
				args = append(args, "--log-driver", "json-file")
			}
			id, err := command(d, append(args, image, "/app", "wait")...)
			if err != nil {
				return err
			}
			if d.name == Docker {
				log = filepath.Join(d.dir, "data/containers", id, id+"-json.log")
			}
			return conformance.Await(func() (bool, error) {
				text, err := os.ReadFile(log)
				if errors.Is(err, os.ErrNotExist) {
					err = nil
				}
				return strings.Contains(string(text), "waiting"), err
			})
		},
		Stop: func(name string) error {
			_, stopErr := command(d, "stop", "-t", "2", name)
			_, err := command(d, "rm", "-f", name)
			return errors.Join(stopErr, err, os.RemoveAll(filepath.Join(dir, name)))
		},
	}
}

// command runs the engine's own command line, and returns what it says.
func command(d *daemon, args ...string) (string, error) {
	c := exec.Command(d.name, args...)
	c.Env = append(os.Environ(), d.env...)
	if d.name == Docker {
		c.Env = append(c.Env, "DOCKER_HOST=unix://"+d.socket)
	}
	said, err := c.Output()
	var failed *exec.ExitError
	if errors.As(err, &failed) {
		err = fmt.Errorf("%s %v: %v: %s", d.name, args, err, failed.Stderr)
	}
	return strings.TrimSpace(string(said)), err
}
