package backends

import (
	"cmp"
	"slices"
	"strings"
)

// Needs lists the features that w asks for, in the order in which they are declared.
func (w *Workload) Needs() []Feature {
	host := func(namespace string) bool { return slices.Contains(w.Security.Host, namespace) }
	mapped := func(p Port) bool { return p.Port != 0 && p.Host != 0 && p.Port != p.Host }
	low := func(p Port) bool { n := cmp.Or(p.Host, p.Port); return n > 0 && n < 1024 }
	door := func(via string) bool { return slices.ContainsFunc(w.Doors, func(d Door) bool { return d.Via == via }) }
	asked := []struct {
		feature Feature
		asks    bool
	}{
		{PortMap, slices.ContainsFunc(w.Run.Ports, mapped)},
		{LowPorts, slices.ContainsFunc(w.Run.Ports, low)},
		{LimitCPU, w.Resources.CPU > 0},
		{LimitMemory, w.Resources.Memory > 0},
		{LimitPIDs, w.Resources.PIDs > 0},
		{LimitDisk, w.Resources.Disk > 0},
		{Overlays, w.Overlay.Size > 0},
		{Keep, len(w.Overlay.Keep) > 0},
		{Files, slices.ContainsFunc(w.Files, func(f File) bool { return !f.Secret })},
		{Secrets, slices.ContainsFunc(w.Files, func(f File) bool { return f.Secret })},
		{MemoryPool, door("memory")},
		{Sockets, door("socket")},
		{Hooking, len(w.Hooks.PreInit)+len(w.Hooks.PostInit)+len(w.Hooks.Exit) > 0},
		{HostNetwork, host("network")},
		{Mounts, len(w.Mounts) > 0},
		{Devices, len(w.Resources.Devices) > 0},
		{Capabilities, len(w.Security.Capabilities) > 0 || w.Security.Escalation},
		{HostNamespace, slices.ContainsFunc(w.Security.Host, func(n string) bool { return n != "network" })},
		{Privileged, w.Security.Privileged},
		{WritableBase, w.Security.WritableBase},
		{Unconfined, w.Security.Unconfined},
	}
	var needs []Feature
	for _, a := range asked {
		if a.asks {
			needs = append(needs, a.feature)
		}
	}
	return needs
}

// Admit returns a *FeatureError if w asks for a format or a feature that p lacks; why is the line of p.Missing that names it.
func (p *Fingerprint) Admit(w Workload) error {
	lacks := func(f Feature) error {
		why := "the backend does not have it"
		for _, line := range p.Missing {
			if strings.HasPrefix(line, string(f)+":") {
				why = strings.TrimSpace(line[len(f)+1:])
			}
		}
		return &FeatureError{Backend: p.Backend, Feature: f, Detail: why}
	}
	if !slices.Contains(p.Formats, w.Format) {
		return lacks(Feature(w.Format))
	}
	for _, f := range w.Needs() {
		if !p.Has(f) {
			return lacks(f)
		}
	}
	return nil
}
