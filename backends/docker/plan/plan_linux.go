// Package plan says what a workload comes down to for a container engine: what the engine is asked for, what lies on this host for it, and what
// is refused.
package plan

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/process/secret"
	"github.com/kindos/kmo/backends/process/stage"
)

// Plan is what is the same for all workloads of a state folder.
type Plan struct {
	Engine   string // docker or podman
	Instance string // tells this state folder's containers from others'
	State    string // the state folder
	Secrets  secret.Store
}

const podman = "podman"

// The labels of a container.
const (
	LabelInstance = "kmo.instance"
	LabelRole     = "kmo.role"
	LabelName     = "kmo.name"
	LabelUnit     = "kmo.unit"
	LabelSpec     = "kmo.spec"
	LabelPorts    = "kmo.ports"
	LabelWorkload = "kmo.workload"

	RoleWorkload = "workload"
	RoleHook     = "hook"
)

const (
	logSize = "8m"     // of each of a log's two parts
	shmSize = 64 << 20 // of /dev/shm at most
)

// Container is the name of a workload's container.
func (p *Plan) Container(workload string) string {
	return "kmo-" + workload + "-" + p.Instance[:6]
}

// HostNetwork says whether a workload shares the host's network.
func HostNetwork(w *backends.Workload) bool { return slices.Contains(w.Security.Host, "network") }

// resolved is the workload with its ports filled in: Port is the number inside, Host the one at which it is published.
func resolved(w backends.Workload, ports []int) backends.Workload {
	w.Run.Ports = slices.Clone(w.Run.Ports)
	for i := range w.Run.Ports {
		p := &w.Run.Ports[i]
		p.Host = ports[i]
		if p.Port == 0 || HostNetwork(&w) {
			p.Port = ports[i]
		}
	}
	return w
}

// Options is what the engine is asked for. Argv nil is the workload's own program, another a hook's.
func (p *Plan) Options(w backends.Workload, image string, ports []int, argv []string) (client.ContainerCreateOptions, error) {
	role, name := RoleHook, p.Container(w.Name)+"-hook"
	if argv == nil {
		role, name, argv = RoleWorkload, p.Container(w.Name), w.Argv()
	}
	labels, err := p.labels(w, ports, role)
	if err != nil {
		return client.ContainerCreateOptions{}, err
	}
	asked := w.Run.Ports
	w = resolved(w, ports)
	config := &container.Config{
		Image: image, Cmd: argv, Labels: labels, StopSignal: "SIGTERM", WorkingDir: w.Run.Dir,
		User: fmt.Sprintf("%d:%d", w.Run.User, w.Run.User), Hostname: w.Name[:min(len(w.Name), 63)],
		Healthcheck: &container.HealthConfig{Test: []string{"NONE"}},
	}
	if config.WorkingDir == "" {
		config.WorkingDir = w.Image.Config.Dir
	}
	env := w.Env()
	for _, name := range slices.Sorted(maps.Keys(env)) {
		config.Env = append(config.Env, name+"="+env[name])
	}
	host := &container.HostConfig{
		LogConfig: p.logs(), RestartPolicy: container.RestartPolicy{Name: container.RestartPolicyDisabled}, ReadonlyRootfs: !w.Security.WritableBase,
		CapDrop: []string{"ALL"}, Resources: bounds(w.Resources),
	}
	if host.Mounts, err = p.mounts(w); err != nil {
		return client.ContainerCreateOptions{}, err
	}
	p.writable(host, w)
	grant(config, host, w)
	if role == RoleWorkload {
		publish(config, host, w, asked)
	}
	return client.ContainerCreateOptions{Name: name, Config: config, HostConfig: host}, nil
}

// labels are what a later process finds the workload by. No file's content is among them: labels can be read by whoever may ask the engine.
func (p *Plan) labels(w backends.Workload, ports []int, role string) (map[string]string, error) {
	w.Files = slices.Clone(w.Files)
	for i := range w.Files {
		w.Files[i].Content = nil
	}
	text, err := json.Marshal(w)
	if err != nil {
		return nil, err
	}
	numbers, err := json.Marshal(ports)
	return map[string]string{
		LabelInstance: p.Instance, LabelRole: role, LabelName: w.Name, LabelUnit: w.Unit, LabelSpec: w.Spec.String(), LabelPorts: string(numbers), LabelWorkload: string(text),
	}, err
}

func (p *Plan) logs() container.LogConfig {
	if p.Engine == podman {
		return container.LogConfig{Type: "k8s-file", Config: map[string]string{"max-size": logSize}}
	}
	return container.LogConfig{Type: "json-file", Config: map[string]string{"max-size": logSize, "max-file": "2"}}
}

func bounds(r backends.Resources) container.Resources {
	bounds := container.Resources{Memory: r.Memory, MemorySwap: r.Memory, NanoCPUs: r.CPU * 1e6}
	if r.CPUMin > 0 {
		bounds.CPUShares = max(r.CPUMin*1024/1000, 2)
	}
	if r.PIDs > 0 {
		bounds.PidsLimit = &r.PIDs
	}
	for _, node := range nodes(r) {
		bounds.DeviceCgroupRules = append(bounds.DeviceCgroupRules, node.rule())
	}
	return bounds
}

// writable says where a workload may write, beside what is mounted, which is what the unit has there instead.
func (p *Plan) writable(host *container.HostConfig, w backends.Workload) {
	host.Tmpfs = map[string]string{}
	tmpfs := func(dir, options string) {
		mounted := slices.ContainsFunc(host.Mounts, func(m mount.Mount) bool {
			at, err := stage.Resolve(w.Image.Content, m.Target) // where the image's links lead
			return m.Target == dir || err == nil && at == filepath.Join(w.Image.Content, dir)
		})
		if !mounted && host.Tmpfs[dir] == "" {
			host.Tmpfs[dir] = options
		}
	}
	size := w.Overlay.Size
	if w.Resources.Disk > 0 {
		size = min(size, w.Resources.Disk)
	}
	if size > 0 {
		tmpfs("/tmp", "rw,exec,nosuid,nodev,mode=1777,size="+strconv.FormatInt(size, 10))
		host.ShmSize = min(size, shmSize)
	} else if !slices.Contains(w.Security.Host, "ipc") {
		host.IpcMode = "none"
	}
	if p.Engine == podman && host.ReadonlyRootfs { // it would put folders that can be written over these
		for _, dir := range []string{"/tmp", "/run", "/var/tmp"} {
			tmpfs(dir, "ro,nosuid,nodev,noexec,size=4096")
		}
	}
}

// grant gives what a workload asks for beyond the default.
func grant(config *container.Config, host *container.HostConfig, w backends.Workload) {
	if !w.Security.Escalation {
		host.SecurityOpt = append(host.SecurityOpt, "no-new-privileges")
	}
	if w.Security.Unconfined {
		host.SecurityOpt = append(host.SecurityOpt, "seccomp=unconfined", "apparmor=unconfined", "label=disable")
	}
	if w.Security.Privileged {
		host.Privileged, host.CapDrop = true, nil
	}
	host.CapAdd = w.Security.Capabilities
	for _, namespace := range w.Security.Host {
		switch namespace {
		case "pid":
			host.PidMode = "host"
		case "ipc":
			host.IpcMode = "host"
		case "uts":
			host.UTSMode, config.Hostname = "host", ""
		case "user":
			host.UsernsMode = "host"
		case "cgroup":
			host.CgroupnsMode = "host"
		case "network":
			host.NetworkMode = "host"
		}
	}
	if !HostNetwork(&w) {
		host.Sysctls = map[string]string{"net.ipv4.ip_unprivileged_port_start": "0"}
	}
}

// publish publishes the ports at the numbers they have been given: on every address where the unit names the number, otherwise on the loopback.
func publish(config *container.Config, host *container.HostConfig, w backends.Workload, asked []backends.Port) {
	if HostNetwork(&w) || len(w.Run.Ports) == 0 {
		return
	}
	config.ExposedPorts, host.PortBindings = network.PortSet{}, network.PortMap{}
	for i, p := range w.Run.Ports {
		inside := network.MustParsePort(strconv.Itoa(p.Port) + "/tcp")
		config.ExposedPorts[inside] = struct{}{}
		var at netip.Addr // every one: netavark 1.4 forwards what is for 0.0.0.0 itself if that is named
		if asked[i].Host == 0 {
			at = netip.AddrFrom4([4]byte{127, 0, 0, 1})
		}
		host.PortBindings[inside] = append(host.PortBindings[inside], network.PortBinding{HostIP: at, HostPort: strconv.Itoa(p.Host)})
	}
}

// NamedPort is the number on this host that the unit names, or 0.
func NamedPort(w *backends.Workload, p backends.Port) int {
	if HostNetwork(w) {
		return max(p.Port, p.Host)
	}
	return p.Host
}
