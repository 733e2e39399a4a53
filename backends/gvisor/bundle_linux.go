package gvisor

import (
	"encoding/json"
	"errors"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"

	securejoin "github.com/cyphar/filepath-securejoin"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/process/monitor"
	"github.com/kindos/kmo/backends/process/netns"
	"github.com/kindos/kmo/backends/process/stage"
)

// lay mounts the root of a task, and returns what runsc is to make of it.
func lay(t monitor.Task) (specs.Spec, error) {
	w := t.Workload
	scratch := filepath.Join(t.Dir, "root")
	if err := os.Mkdir(scratch, 0o700); err != nil {
		return specs.Spec{}, err
	}
	root := t.Root(w, scratch)
	if !onHost(w) {
		root.Files = append(root.Files, monitor.Resolver(w, netns.Resolver)...)
	}
	at, binds, err := root.Lay()
	if err != nil {
		if stage.Blames(err) {
			err = monitor.Blame{Step: "building the root", Cause: err}
		}
		return specs.Spec{}, err
	}
	spec := describe(w, at, root)
	for _, b := range binds {
		spec.Mounts = append(spec.Mounts, mount(b.From, b.To, b.Writable))
	}
	shared, err := sharedFolders(at, root.Size > 0)
	spec.Mounts = append(shared, spec.Mounts...)
	return spec, err
}

func mount(from, to string, writable bool) specs.Mount {
	mode := "ro"
	if writable {
		mode = "rw"
	}
	return specs.Mount{Destination: to, Type: "bind", Source: from, Options: []string{"bind", mode, "nosuid", "nodev"}}
}

// sharedFolders are the two folders which every program may write, in a root that may be written. They are named because runsc
// would otherwise put memory without a bound on a /tmp in which there is nothing.
func sharedFolders(root string, writable bool) (list []specs.Mount, err error) {
	for _, dir := range []string{"/tmp", "/dev/shm"} {
		from, err := securejoin.SecureJoin(root, dir)
		if err != nil {
			return nil, err
		}
		if found, err := os.Stat(from); err == nil && found.IsDir() {
			list = append(list, mount(from, dir, writable))
		} else { // only where nothing may be written
			list = append(list, specs.Mount{Destination: dir, Type: "tmpfs", Source: "tmpfs", Options: []string{"ro", "nosuid", "nodev", "mode=0755"}})
		}
	}
	return list, nil
}

// onHost says whether a workload's network is this host's.
func onHost(w backends.Workload) bool { return slices.Contains(w.Security.Host, "network") }

// describe is the part of a spec that needs no mounts, for a root that lies at a path.
func describe(w backends.Workload, at string, root *stage.Root) specs.Spec {
	likely := 1000 // the sandbox is what ends for want of memory, not what watches it
	return specs.Spec{
		Version: "1.0.2", Hostname: root.Hostname, Linux: &specs.Linux{},
		Root:    &specs.Root{Path: at, Readonly: root.Size == 0},
		Process: run(w, w.Argv(), &likely),
	}
}

// run is how argv is run in a workload.
func run(w backends.Workload, argv []string, likely *int) *specs.Process {
	user := uint32(w.Run.User)
	p := &specs.Process{
		User: specs.User{UID: user, GID: user}, Args: argv, Cwd: w.Run.Dir, NoNewPrivileges: true,
		Capabilities: &specs.LinuxCapabilities{}, OOMScoreAdj: likely,
	}
	if p.Cwd == "" {
		p.Cwd = w.Image.Config.Dir
	}
	if p.Cwd == "" {
		p.Cwd = "/"
	}
	env := w.Env()
	for _, name := range slices.Sorted(maps.Keys(env)) {
		p.Env = append(p.Env, name+"="+env[name])
	}
	if n := pids(w); n > 0 {
		p.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NPROC", Hard: uint64(n), Soft: uint64(n)}}
	}
	return p
}

// writeJSON writes what is nobody's secret.
func writeJSON(at string, value any) error {
	text, err := json.Marshal(value)
	if err != nil {
		return err
	}
	return os.WriteFile(at, text, 0o600)
}

func readJSON(at string, value any) error {
	text, err := os.ReadFile(at)
	if err != nil {
		return err
	}
	return json.Unmarshal(text, value)
}

// bundle makes a bundle of a spec, in a network namespace where it is to have one, and returns its folder.
func bundle(dir string, spec specs.Spec, netns string) (string, error) {
	if netns != "" {
		linux := *spec.Linux
		linux.Namespaces = []specs.LinuxNamespace{{Type: specs.NetworkNamespace, Path: netns}}
		spec.Linux = &linux
	}
	return dir, errors.Join(os.MkdirAll(dir, 0o700), writeJSON(path.Join(dir, "config.json"), spec))
}
