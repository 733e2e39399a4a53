package plan

import (
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/docker/engine"
)

// Check refuses what cannot be done, before anything is.
func (p *Plan) Check(able backends.Fingerprint, w backends.Workload) error {
	if err := able.Check(w, p.State, "/proc", "/sys", "/dev"); err != nil {
		return err
	}
	if err := p.checkRights(w); err != nil {
		return err
	}
	if len(w.Argv()) == 0 {
		return &backends.StartError{Workload: w.Name, Stage: "exec", Cause: "neither the image nor the unit names a command"}
	}
	return nil
}

// checkRights refuses what the engine would leave out, or fail at, by what this workload asks for in particular.
func (p *Plan) checkRights(w backends.Workload) error {
	lacks := func(f backends.Feature, format string, args ...any) error {
		return &backends.FeatureError{Backend: p.Engine, Feature: f, Detail: fmt.Sprintf(format, args...)}
	}
	for _, namespace := range w.Security.Host {
		if !slices.Contains([]string{"pid", "ipc", "uts", "user", "cgroup", "network"}, namespace) {
			return lacks(backends.HostNamespace, "it knows no namespace %.40q", namespace)
		}
	}
	for _, name := range w.Security.Capabilities {
		if !slices.Contains(engine.Capabilities(), name) {
			return lacks(backends.Capabilities, "it knows no %.40q", name)
		}
	}
	if len(w.Security.Capabilities) > 0 && p.Engine != podman && w.Run.User != 0 && !w.Security.Escalation {
		return lacks(backends.Capabilities, "for user %d they count only beside escalation, through a file's own", w.Run.User)
	}
	if w.Security.WritableBase && w.Resources.Disk > 0 {
		return lacks(backends.LimitDisk, "what is written to the base lies on the engine's disk, without a bound")
	}
	if len(w.Resources.Devices) > 0 {
		var system unix.Statfs_t
		if err := unix.Statfs(p.State, &system); err != nil || system.Flags&unix.ST_NODEV != 0 {
			return lacks(backends.Devices, "%s lies where no device works (mount option nodev)", p.State)
		}
	}
	for _, p := range w.Run.Ports {
		port := max(p.Port, p.Host)
		switch {
		case !HostNetwork(&w):
		case p.Port != 0 && p.Host != 0 && p.Port != p.Host:
			return lacks(backends.PortMap, "port %s: in the host's network a port has one number", p.Name)
		case port > 0 && port < 1024 && w.Run.User != 0:
			return lacks(backends.LowPorts, "port %s: in the host's network numbers below 1024 need a capability", p.Name)
		}
	}
	return nil
}
