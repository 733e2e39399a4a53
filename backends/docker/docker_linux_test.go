package docker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/conformance"
	"github.com/kindos/kmo/backends/docker/layer"
	"github.com/kindos/kmo/backends/docker/plan"
)

func open(t testing.TB, name, state string) *Backend {
	t.Helper()
	b, err := Open(Options{Name: name, Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)), Socket: engines[name].socket, State: state, Backoff: func(n int) time.Duration { return 10 * time.Millisecond << min(n, 6) }})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// content puts the test program into a root file system.
func content(t *testing.T) backends.Image {
	t.Helper()
	return packed(t, conformance.Build(t, "linux", runtime.GOARCH))
}

func packed(t testing.TB, program string) backends.Image {
	t.Helper()
	text, err := os.ReadFile(program)
	root := filepath.Join(t.TempDir(), "root")
	for _, dir := range []string{"etc", "tmp", "var"} {
		err = errors.Join(err, os.MkdirAll(filepath.Join(root, dir), 0o755))
	}
	if err := errors.Join(err, os.WriteFile(filepath.Join(root, "app"), text, 0o755)); err != nil {
		t.Fatal(err)
	}
	return backends.Image{Content: root}
}

func TestConformance(t *testing.T) {
	for _, name := range []string{Docker, Podman} {
		t.Run(name, func(t *testing.T) {
			image := content(t)
			d := up(t, name)
			conformance.Test(t, func(t *testing.T) conformance.Subject {
				dir := t.TempDir()
				return conformance.Subject{
					Open:     func(t *testing.T) backends.Backend { return open(t, name, dir) },
					At:       func(t *testing.T, state string) backends.Backend { return open(t, name, state) },
					Dies:     true,
					Patience: time.Minute,
					Table:    filepath.Join("testdata", "features", name),
					Images:   map[backends.Format]backends.Image{backends.OCI: image},
					Disk:     []string{dir, d.dir},
					Leaks:    func(t *testing.T) []string { return leaks(t, d, dir) },
					Damage:   func(t *testing.T, w backends.Workload) { damage(t, d, dir, w) },
					Stranger: func(t *testing.T) func(*testing.T) { return stranger(t, d, image) },
				}
			})
		})
	}
}

func TestDemo(t *testing.T) {
	each(t, func(t *testing.T, d *daemon) { conformance.Demo(t, d.name, d.socket) })
}

// asked is a client of an engine, for the tests' own questions.
func asked(t *testing.T, d *daemon) *client.Client {
	t.Helper()
	c, err := client.New(client.WithHost("unix://" + d.socket))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// leaks lists what is left of the workloads of a state folder: containers, images, mounts, files.
func leaks(t *testing.T, d *daemon, state string) (list []string) {
	c, ctx := asked(t, d), context.Background()
	id, err := os.ReadFile(filepath.Join(state, "instance"))
	if err != nil {
		return []string{err.Error()}
	}
	found, err := c.ContainerList(ctx, client.ContainerListOptions{All: true, Filters: client.Filters{}.Add("label", plan.LabelInstance+"="+string(id))})
	if err != nil {
		return []string{err.Error()}
	}
	for _, one := range found.Items {
		list = append(list, fmt.Sprint("container ", one.Names, " ", one.State))
	}
	images, err := c.ImageList(ctx, client.ImageListOptions{Filters: client.Filters{}.Add("label", layer.Label)})
	if err != nil {
		return append(list, err.Error())
	}
	for _, one := range images.Items {
		list = append(list, fmt.Sprint("image ", one.ID, one.RepoTags))
	}
	for _, pattern := range []string{filepath.Join(state, "work", "*"), filepath.Join(state, "images", "*"), "/run/kmo/*-" + string(id)} {
		left, _ := filepath.Glob(pattern)
		list = append(list, left...)
	}
	mounts, _ := filepath.Glob("/proc/[0-9]*/mountinfo")
	for _, path := range mounts {
		text, err := os.ReadFile(path)
		if err == nil && strings.Contains(string(text), state) {
			line, _ := os.ReadFile(filepath.Join(filepath.Dir(path), "cmdline"))
			list = append(list, fmt.Sprintf("process %s %q", path, line))
		}
	}
	return list
}

// damage removes a workload's container behind the backend's back.
func damage(t *testing.T, d *daemon, state string, w backends.Workload) {
	id, err := os.ReadFile(filepath.Join(state, "instance"))
	if err == nil {
		_, err = asked(t, d).ContainerRemove(t.Context(), "kmo-"+w.Name+"-"+string(id[:6]), client.ContainerRemoveOptions{Force: true})
	}
	if err != nil {
		t.Fatal(err)
	}
}

// stranger runs a container of somebody else, of an image of ours under another's name, and returns a check that it is untouched.
func stranger(t *testing.T, d *daemon, image backends.Image) func(*testing.T) {
	c := asked(t, d)
	b := open(t, d.name, t.TempDir())
	id, done, err := b.image(t.Context(), backends.Workload{Image: image})
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	made, err := c.ContainerCreate(t.Context(), client.ContainerCreateOptions{Name: "kmo-stranger", Config: &container.Config{
		Image: id, Cmd: []string{"/app", "wait"}, Labels: map[string]string{"kmo.instance": "another", "kmo.role": "workload", "kmo.name": "relay-00000000"},
	}})
	if err == nil {
		_, err = c.ContainerStart(t.Context(), made.ID, client.ContainerStartOptions{})
	}
	if err != nil {
		t.Fatal(err)
	}
	before, err := c.ContainerInspect(t.Context(), made.ID, client.ContainerInspectOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return func(t *testing.T) {
		after, err := c.ContainerInspect(t.Context(), made.ID, client.ContainerInspectOptions{})
		if err != nil || after.Container.State.Pid != before.Container.State.Pid || !after.Container.State.Running {
			t.Errorf("the stranger is %+v, was %+v; %v", after.Container.State, before.Container.State, err)
		}
		if err := b.discard(t.Context(), made.ID); err != nil {
			t.Error(err)
		}
		b.drop(id)
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	}
}

// Who only looks changes nothing: not an image that another has loaded and not used yet, not a folder.
func TestLook(t *testing.T) {
	image := content(t)
	each(t, func(t *testing.T, d *daemon) {
		other := open(t, d.name, t.TempDir())
		id, done, err := other.image(t.Context(), backends.Workload{Image: image})
		if err != nil {
			t.Fatal(err)
		}
		state := filepath.Join(t.TempDir(), "state")
		b, err := Open(Options{Name: d.name, Socket: d.socket, State: state, Look: true})
		if err != nil {
			t.Fatal(err)
		}
		if able, err := b.Fingerprint(t.Context()); err != nil || len(able.Formats) == 0 {
			t.Errorf("fingerprint %+v; %v", able, err)
		}
		if _, err := b.Observe(t.Context()); err == nil {
			t.Error("observe: no error")
		}
		if err := b.Close(); err != nil {
			t.Error(err)
		}
		if there, err := other.has(t.Context(), id, nil); err != nil || !there {
			t.Errorf("the image is there: %t; %v", there, err)
		}
		if _, err := os.Stat(state); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the state folder: %v, want none", err)
		}
		done()
		other.drop(id)
		if err := other.Close(); err != nil {
			t.Error(err)
		}
	})
}

func TestUnapplied(t *testing.T) {
	able := backends.Fingerprint{Missing: []string{"apparmor, selinux: neither", "capabilities: some", "seccomp: no filter"}}
	for _, test := range []struct {
		security backends.Security
		want     []string
	}{
		{backends.Security{}, []string{able.Missing[0], able.Missing[2]}},
		{backends.Security{Unconfined: true}, nil},
		{backends.Security{Privileged: true}, nil},
	} {
		if got := unapplied(able, backends.Workload{Security: test.security}); !slices.Equal(got, test.want) {
			t.Errorf("%+v: got %q, want %q", test.security, got, test.want)
		}
	}
}
