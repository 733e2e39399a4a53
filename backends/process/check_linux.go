package process

import (
	"fmt"
	"hash/fnv"
	"net"
	"os"
	"regexp"
	"strconv"
	"strings"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/policy/refusal"
)

// check refuses what cannot be done, before anything is.
func (k *Keeper) check(w backends.Workload) error {
	names := regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,99}$`)
	if !names.MatchString(w.Name) || !names.MatchString(w.Unit) {
		return &refusal.Error{Code: "E_PATH", Subject: "workload name and unit", Got: fmt.Sprintf("%.100q, %.100q", w.Name, w.Unit), Want: names.String()}
	}
	if err := lacks(w, k.options.Backend, k.Features()); err != nil {
		return err
	}
	if err := checkPaths(w, k.options.State); err != nil {
		return err
	}
	if len(w.Files) > 0 && !k.support.Mounts {
		return &backends.FeatureError{Backend: k.options.Backend, Feature: backends.Mounts, Detail: "files need a root of their own, and that needs root"}
	}
	free := freePorts()
	for _, p := range w.Run.Ports {
		if port := max(p.Port, p.Host); port != 0 && port < free {
			return &backends.FeatureError{Backend: k.options.Backend, Feature: backends.Capabilities,
				Detail: fmt.Sprintf("port %s: numbers below %d need a capability; a program here has none", p.Name, free)}
		}
	}
	resolved := w
	resolved.Run.Ports = append([]backends.Port(nil), w.Run.Ports...)
	program, err := k.options.Plan(resolved)
	switch {
	case err != nil:
		return err
	case program.Root != "" && !k.support.Overlay:
		return &backends.FeatureError{Backend: k.options.Backend, Feature: backends.Overlays, Detail: "an image's root needs overlayfs, and root to mount it"}
	case len(program.Argv) == 0:
		return &backends.StartError{Workload: w.Name, Stage: "exec", Cause: "neither the image nor the unit names a command"}
	}
	return nil
}

// checkPaths sees that every path has one spelling and that none lies below a folder that the program can write.
func checkPaths(w backends.Workload, state string) error {
	refuse := func(subject, got, want string) error {
		return &refusal.Error{Code: "E_PATH", Subject: w.Unit + ": " + subject, Got: strconv.Quote(refusal.Clip(got, 200)), Want: want}
	}
	var open []string
	for _, keep := range w.Overlay.Keep {
		if !clean(keep) {
			return refuse("overlay.keep", keep, "a clean absolute path")
		}
		open = append(open, keep)
	}
	for _, m := range w.Mounts {
		if !clean(m.To) || !clean(m.From) {
			return refuse("mounts", m.From+" at "+m.To, "clean absolute paths")
		}
		if within(m.From, state) || within(state, m.From) {
			return refuse("mounts", m.From, "nothing of kMO's own state")
		}
		open = append(open, m.To)
	}
	for _, f := range w.Files {
		if !clean(f.To) {
			return refuse("files", f.To, "a clean absolute path")
		}
		open = append(open, f.To)
	}
	for _, inner := range open {
		for _, reserved := range []string{"/proc", "/dev"} {
			if within(inner, reserved) {
				return refuse("path inside", inner, "a path outside "+reserved)
			}
		}
		for _, outer := range open {
			if inner != outer && within(inner, outer) {
				return refuse("path inside", inner, "a path that does not lie within "+outer)
			}
		}
	}
	return nil
}

func within(inner, outer string) bool {
	return inner == outer || strings.HasPrefix(inner, strings.TrimSuffix(outer, "/")+"/")
}

// freePorts is the first port number that needs no capability.
func freePorts() int {
	text, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start")
	if err != nil {
		return 1024
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return 1024
	}
	return n
}

// choosePorts gives every port of a workload its number, once. Those that are free to choose lie below the range from which
// the kernel takes its own, and begin at a place that depends on the name alone, so that they seldom change.
func (k *Keeper) choosePorts(e *entry) error {
	if len(e.record.Ports) == len(e.record.Workload.Run.Ports) {
		return nil
	}
	const first, count = 20000, 12000
	k.mu.Lock()
	defer k.mu.Unlock()
	var ports []int
	for _, p := range e.record.Workload.Run.Ports {
		port := max(p.Port, p.Host)
		if port == 0 {
			hash := fnv.New32a()
			_, _ = hash.Write([]byte(e.name + "/" + p.Name))
			for i := range count {
				candidate := first + int(hash.Sum32()+uint32(i))%count
				if k.ports[candidate] == "" && freePort(candidate) {
					port = candidate
					break
				}
			}
			if port == 0 {
				return fmt.Errorf("%s: port %s: none of %d numbers from %d on is free", e.name, p.Name, count, first)
			}
			k.ports[port] = e.name
		}
		ports = append(ports, port)
	}
	e.mu.Lock()
	e.record.Ports = ports
	e.mu.Unlock()
	return nil
}

func freePort(port int) bool {
	listener, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port})
	if err != nil {
		return false
	}
	return listener.Close() == nil
}
