package plan

import (
	"fmt"
	"math"
	"os"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/docker/engine"
	"github.com/kindos/kmo/backends/process"
	"github.com/kindos/kmo/policy/refusal"
)

// Names is what a workload and a unit may be called.
func Names() *regexp.Regexp { return regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,99}$`) }

// Check refuses what cannot be done, before anything is.
func (p *Plan) Check(able backends.Fingerprint, w backends.Workload) error {
	if !Names().MatchString(w.Name) || !Names().MatchString(w.Unit) {
		return &refusal.Error{Code: "E_PATH", Subject: "workload name and unit", Got: fmt.Sprintf("%.100q, %.100q", w.Name, w.Unit), Want: Names().String()}
	}
	if w.Run.User < 0 || w.Run.User > math.MaxInt32 {
		return &refusal.Error{Code: "E_DECODE", Subject: w.Unit + ": run.user", Got: strconv.Itoa(w.Run.User), Want: fmt.Sprintf("0 to %d", math.MaxInt32)}
	}
	if err := able.Admit(w); err != nil {
		return err
	}
	if err := p.checkRights(w); err != nil {
		return err
	}
	if err := checkPaths(w, p.State); err != nil {
		return err
	}
	if len(process.Argv(w)) == 0 {
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
	for _, d := range w.Resources.Devices {
		if err := there(d); err != nil {
			return lacks(backends.Devices, "%v", err)
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

// there says why a device cannot be given.
func there(d backends.Device) error {
	if len(d.Nodes) == 0 {
		return fmt.Errorf("device %s: this host gives it no nodes", d.Name)
	}
	for _, node := range d.Nodes {
		found, err := os.Stat(node)
		switch {
		case !clean(node) || !within(node, "/dev") || node == "/dev":
			return fmt.Errorf("device %s: %s; want a path below /dev", d.Name, node)
		case err != nil:
			return fmt.Errorf("device %s: %v", d.Name, err)
		case found.Mode()&os.ModeDevice == 0:
			return fmt.Errorf("device %s: %s is no device", d.Name, node)
		}
	}
	return nil
}

// checkPaths sees that every path has one spelling and that none lies below a folder that the program can write.
func checkPaths(w backends.Workload, state string) error {
	refuse := func(subject, got, want string) error {
		return &refusal.Error{Code: "E_PATH", Subject: w.Unit + ": " + subject, Got: strconv.Quote(refusal.Clip(got, 200)), Want: want}
	}
	open := map[string][]string{"overlay.keep": w.Overlay.Keep}
	for _, m := range w.Mounts {
		if !clean(m.From) {
			return refuse("mounts", m.From, "a clean absolute path")
		}
		if within(m.From, state) || within(state, m.From) {
			return refuse("mounts", m.From, "nothing of kMO's own state")
		}
		open["mounts"] = append(open["mounts"], m.To)
	}
	for _, d := range w.Doors {
		if !clean(d.From) {
			return refuse("doors", d.From, "a clean absolute path")
		}
		open["doors"] = append(open["doors"], d.To)
	}
	for _, f := range w.Files {
		open["files"] = append(open["files"], f.To)
	}
	var all []string
	for subject, paths := range open {
		for _, to := range paths {
			if !clean(to) {
				return refuse(subject, to, "a clean absolute path")
			}
			all = append(all, to)
		}
	}
	slices.Sort(all)
	for i, inner := range all {
		for _, reserved := range []string{"/proc", "/sys", "/dev"} {
			if within(inner, reserved) {
				return refuse("path inside", inner, "a path outside "+reserved)
			}
		}
		for j, outer := range all {
			if i != j && within(inner, outer) {
				return refuse("path inside", inner, "a path that does not lie within "+outer)
			}
		}
	}
	return nil
}

// clean says whether p is an absolute path with one spelling and no way out.
func clean(p string) bool {
	return path.IsAbs(p) && path.Clean(p) == p && p != "/" && len(p) <= 4096 && !strings.ContainsFunc(p, func(r rune) bool { return r < ' ' })
}

func within(inner, outer string) bool {
	return inner == outer || strings.HasPrefix(inner, strings.TrimSuffix(outer, "/")+"/")
}
