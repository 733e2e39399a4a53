package docker

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/system"
	"github.com/moby/moby/client"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/docker/engine"
)

// Fingerprint asks the engine what it can do now.
func (b *Backend) Fingerprint(ctx context.Context) (backends.Fingerprint, error) {
	version, err := b.engine.ServerVersion(ctx, client.ServerVersionOptions{})
	if err != nil {
		return backends.Fingerprint{}, b.plain(ctx, err)
	}
	isPodman := slices.ContainsFunc(version.Components, func(c system.ComponentVersion) bool { return c.Name == "Podman Engine" })
	if isPodman != (b.options.Name == Podman) {
		return backends.Fingerprint{}, fmt.Errorf("%s: what answers at %s is another engine: version %s of %v", b.options.Name, strings.Join(b.door.Sockets(), ", "), version.Version, version.Components)
	}
	info, err := b.engine.Info(ctx, client.InfoOptions{})
	if err != nil {
		return backends.Fingerprint{}, b.plain(ctx, err)
	}
	able := backends.Fingerprint{
		Backend: b.options.Name, Version: version.Version, Isolation: backends.IsolationContainer,
		Formats: []backends.Format{backends.OCI}, Platforms: []string{"linux/" + engine.Arch(version.Arch)},
	}
	b.measure(&able, info.Info)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.able = &able
	return able, nil
}

// abilities are those that were found last, or else are found now.
func (b *Backend) abilities(ctx context.Context) (backends.Fingerprint, error) {
	b.mu.Lock()
	able := b.able
	b.mu.Unlock()
	if able != nil {
		return *able, nil
	}
	return b.Fingerprint(ctx)
}

// measure fills in what the engine has and what it lacks.
func (b *Backend) measure(able *backends.Fingerprint, info system.Info) {
	has := func(f backends.Feature) { able.Features = append(able.Features, f) }
	lacks := func(words string) { able.Missing = append(able.Missing, words) }
	for _, f := range []backends.Feature{
		backends.PortMap, backends.LowPorts, backends.LimitDisk, backends.Overlays, backends.MemoryPool, backends.Sockets, backends.Hooking, backends.HostNetwork,
		backends.Exec, backends.Mounts, backends.Devices, backends.Capabilities, backends.HostNamespace, backends.WritableBase, backends.Unconfined,
	} {
		has(f)
	}
	for _, limit := range []struct {
		feature backends.Feature
		has     bool
	}{{backends.LimitCPU, info.CPUCfsQuota}, {backends.LimitMemory, info.MemoryLimit}, {backends.LimitPIDs, info.PidsLimit}} {
		if limit.has {
			has(limit.feature)
		} else {
			lacks(string(limit.feature) + ": the engine says that this host's cgroups take no such bound")
		}
	}
	mapped := os.Geteuid() != 0 || slices.ContainsFunc(info.SecurityOptions, func(o string) bool {
		return strings.Contains(o, "name=userns") || strings.Contains(o, "name=rootless")
	})
	switch {
	case mapped:
		for _, f := range []backends.Feature{backends.Keep, backends.Files, backends.Secrets} {
			lacks(string(f) + ": the engine maps user ids, so that what is made for a user here is another's inside")
		}
	default:
		has(backends.Keep)
		has(backends.Files)
		if b.secrets.Has() {
			has(backends.Secrets)
		} else {
			lacks("secrets: neither /run/kmo nor /dev/shm/kmo is on storage that is memory, and this user's own")
		}
	}
	if why := b.unprivileged(mapped); why == "" {
		has(backends.Privileged)
	} else {
		lacks("privileged: " + why)
	}
	if !slices.ContainsFunc(info.SecurityOptions, func(o string) bool { return strings.Contains(o, "name=seccomp") }) {
		lacks("seccomp: the engine has no filter")
	}
	if !slices.ContainsFunc(info.SecurityOptions, func(o string) bool {
		return strings.Contains(o, "name=apparmor") || strings.Contains(o, "name=selinux")
	}) {
		lacks("apparmor, selinux: the kernel has neither, or the engine does not use them")
	}
	if b.options.Name == Docker {
		lacks("capabilities: for a user that is not 0 they count only beside escalation, through a file's own")
	}
	lacks("overlay-root: what may be written is /tmp and /dev/shm, each a tmpfs of its own")
	lacks("content: the engine's own copy of an image is not looked at again while it is used")
	slices.Sort(able.Features)
}

// unprivileged says why all of the host cannot be given, or nothing if it can. Docker gives every capability the kernel knows, and cannot
// give what it has not itself; Podman gives what it has.
func (b *Backend) unprivileged(mapped bool) string {
	if mapped {
		return "the engine itself has not all of the host"
	}
	if b.options.Name == Podman {
		return ""
	}
	lacking, err := b.door.Lacking(b.ctx)
	if err != nil {
		return "which capabilities the engine itself has cannot be told: " + err.Error()
	}
	if len(lacking) > 0 {
		return "the engine itself has no " + lacking[0]
	}
	return ""
}

