package docker

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/process"
	"github.com/kindos/kmo/backends/process/secret"
)

// The labels of a container.
const (
	labelInstance = "kmo.instance"
	labelRole     = "kmo.role"
	labelName     = "kmo.name"
	labelUnit     = "kmo.unit"
	labelSpec     = "kmo.spec"
	labelPorts    = "kmo.ports"
	labelWorkload = "kmo.workload"

	roleWorkload = "workload"
	roleHook     = "hook"
)

const (
	logSize = "8m"     // of each of a log's two parts
	shmSize = 64 << 20 // of /dev/shm at most
)

// container is the name of a workload's container.
func (b *Backend) container(workload string) string {
	return "kmo-" + workload + "-" + b.instance[:6]
}

// hostNetwork says whether a workload shares the host's network.
func hostNetwork(w *backends.Workload) bool { return slices.Contains(w.Security.Host, "network") }

// resolved is the workload with its ports filled in: Port is the number inside, Host the one at which it is published.
func resolved(w backends.Workload, ports []int) backends.Workload {
	w.Run.Ports = slices.Clone(w.Run.Ports)
	for i := range w.Run.Ports {
		p := &w.Run.Ports[i]
		p.Host = ports[i]
		if p.Port == 0 || hostNetwork(&w) {
			p.Port = ports[i]
		}
	}
	return w
}

// options is what the engine is asked for. Argv nil is the workload's own program, another a hook's.
func (b *Backend) containerOptions(w backends.Workload, image string, ports []int, argv []string) (client.ContainerCreateOptions, error) {
	role, name := roleHook, b.container(w.Name)+"-hook"
	if argv == nil {
		role, name, argv = roleWorkload, b.container(w.Name), process.Argv(w)
	}
	labels, err := b.labels(w, ports, role)
	if err != nil {
		return client.ContainerCreateOptions{}, err
	}
	w = resolved(w, ports)
	config := &container.Config{
		Image: image, Cmd: argv, Labels: labels, StopSignal: "SIGTERM", WorkingDir: w.Run.Dir,
		User: fmt.Sprintf("%d:%d", w.Run.User, w.Run.User), Hostname: w.Name[:min(len(w.Name), 63)],
		Healthcheck: &container.HealthConfig{Test: []string{"NONE"}},
	}
	if config.WorkingDir == "" {
		config.WorkingDir = w.Image.Config.Dir
	}
	env := process.Env(w)
	for _, name := range slices.Sorted(maps.Keys(env)) {
		config.Env = append(config.Env, name+"="+env[name])
	}
	host := &container.HostConfig{
		LogConfig: b.logs(), RestartPolicy: container.RestartPolicy{Name: container.RestartPolicyDisabled}, ReadonlyRootfs: !w.Security.WritableBase,
		CapDrop: []string{"ALL"}, Resources: bounds(w.Resources),
	}
	if host.Mounts, err = b.mounts(w); err != nil {
		return client.ContainerCreateOptions{}, err
	}
	b.writable(host, w)
	grant(config, host, w)
	if role == roleWorkload {
		publish(config, host, w)
	}
	return client.ContainerCreateOptions{Name: name, Config: config, HostConfig: host}, nil
}

// labels are what a later process finds the workload by. No file's content is among them: labels can be read by whoever may ask the engine.
func (b *Backend) labels(w backends.Workload, ports []int, role string) (map[string]string, error) {
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
		labelInstance: b.instance, labelRole: role, labelName: w.Name, labelUnit: w.Unit, labelSpec: w.Spec.String(), labelPorts: string(numbers), labelWorkload: string(text),
	}, err
}

func (b *Backend) logs() container.LogConfig {
	if b.options.Name == Podman {
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
	for _, d := range r.Devices {
		for _, node := range d.Nodes {
			bounds.Devices = append(bounds.Devices, container.DeviceMapping{PathOnHost: node, PathInContainer: node, CgroupPermissions: "rwm"})
		}
	}
	return bounds
}

// writable says where a workload may write, beside what is mounted.
func (b *Backend) writable(host *container.HostConfig, w backends.Workload) {
	size := w.Overlay.Size
	if w.Resources.Disk > 0 {
		size = min(size, w.Resources.Disk)
	}
	if size > 0 {
		host.Tmpfs = map[string]string{"/tmp": "rw,exec,nosuid,nodev,mode=1777,size=" + strconv.FormatInt(size, 10)}
		host.ShmSize = min(size, shmSize)
	} else if !slices.Contains(w.Security.Host, "ipc") {
		host.IpcMode = "none"
	}
	if b.options.Name == Podman && host.ReadonlyRootfs { // it would put folders that can be written over these
		if host.Tmpfs == nil {
			host.Tmpfs = map[string]string{}
		}
		for _, dir := range []string{"/tmp", "/run", "/var/tmp"} {
			if host.Tmpfs[dir] == "" {
				host.Tmpfs[dir] = "ro,nosuid,nodev,noexec,size=4096"
			}
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
	for _, d := range w.Resources.Devices {
		for _, node := range d.Nodes {
			if gid, ok := groupOf(node); ok {
				host.GroupAdd = append(host.GroupAdd, gid)
			}
		}
	}
	if !hostNetwork(&w) {
		host.Sysctls = map[string]string{"net.ipv4.ip_unprivileged_port_start": "0"}
	}
}

// groupOf is the group through which a device can be read and written, if it is not by everybody.
func groupOf(node string) (gid string, ok bool) {
	var found unix.Stat_t
	if unix.Stat(node, &found) != nil || found.Mode&0o006 == 0o006 || found.Mode&0o060 != 0o060 {
		return "", false
	}
	return strconv.Itoa(int(found.Gid)), true
}

func publish(config *container.Config, host *container.HostConfig, w backends.Workload) {
	if hostNetwork(&w) || len(w.Run.Ports) == 0 {
		return
	}
	config.ExposedPorts, host.PortBindings = network.PortSet{}, network.PortMap{}
	for _, p := range w.Run.Ports {
		inside := network.MustParsePort(strconv.Itoa(p.Port) + "/tcp")
		config.ExposedPorts[inside] = struct{}{}
		host.PortBindings[inside] = append(host.PortBindings[inside], network.PortBinding{HostIP: netip.AddrFrom4([4]byte{127, 0, 0, 1}), HostPort: strconv.Itoa(p.Host)})
	}
}

// place is where a file of a workload lies on this host.
func (b *Backend) place(w *backends.Workload, i int) string {
	dir := filepath.Join(b.options.State, "work", w.Name, "files")
	if w.Files[i].Secret {
		dir = b.secrets.Folder(w.Name)
	}
	return filepath.Join(dir, "file-"+strconv.Itoa(i))
}

// put makes the files of a workload and its kept folders. A file that is there is replaced as a whole: a container that runs keeps the old one.
func (b *Backend) put(w *backends.Workload) error {
	for i, f := range w.Files {
		at := b.place(w, i)
		if f.Secret && !b.secrets.Has() {
			return errors.New("no memory to keep a secret in")
		}
		if err := os.MkdirAll(filepath.Dir(at), 0o700); err != nil {
			return err
		}
		next := at + ".next"
		err := os.WriteFile(next, f.Content, 0o600)
		err = errors.Join(err, os.Chown(next, w.Run.User, w.Run.User), os.Chmod(next, os.FileMode(f.Mode).Perm()), os.Rename(next, at))
		if err != nil {
			return err
		}
	}
	for _, keep := range w.Overlay.Keep {
		at := b.keptPath(w.Unit, keep)
		if err := errors.Join(os.MkdirAll(at, 0o750), os.Chown(at, w.Run.User, w.Run.User)); err != nil {
			return err
		}
	}
	return nil
}

// missing says what a workload's container needs of this host and does not find.
func (b *Backend) missing(w *backends.Workload) error {
	for i, f := range w.Files {
		_, err := os.Stat(b.place(w, i))
		if errors.Is(err, os.ErrNotExist) && f.Secret {
			return fmt.Errorf("%s: %w", w.Name, secret.ErrGone)
		}
		if err != nil {
			return err
		}
	}
	for _, m := range w.Mounts {
		if err := straight(m.From); err != nil {
			return &backends.StartError{Workload: w.Name, Stage: "mount " + m.To, Cause: err.Error()}
		}
	}
	for _, d := range w.Doors {
		if err := straight(d.From); err != nil {
			return fmt.Errorf("%s: door %s: %v", w.Name, d.To, err)
		}
	}
	return nil
}

// straight wants a path to be there and to have no link in it.
func straight(path string) error {
	fd, err := unix.Openat2(unix.AT_FDCWD, path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS})
	if errors.Is(err, unix.ELOOP) {
		return fmt.Errorf("%s has a link in it; want a path without", path)
	}
	if err != nil {
		return fmt.Errorf("%s: %v", path, err)
	}
	return unix.Close(fd)
}

// mounts are the folders and files of this host that a workload sees.
func (b *Backend) mounts(w backends.Workload) (list []mount.Mount, err error) {
	bind := func(from, to string, readOnly bool) {
		list = append(list, mount.Mount{
			Type: mount.TypeBind, Source: from, Target: to, ReadOnly: readOnly,
			BindOptions: &mount.BindOptions{Propagation: mount.PropagationRPrivate, NonRecursive: true},
		})
	}
	for i, f := range w.Files {
		bind(b.place(&w, i), f.To, true)
	}
	for _, keep := range w.Overlay.Keep {
		bind(b.keptPath(w.Unit, keep), keep, false)
	}
	for _, d := range w.Doors {
		bind(d.From, d.To, false)
	}
	for _, m := range w.Mounts {
		bind(m.From, m.To, m.ReadOnly)
	}
	return list, b.missing(&w)
}

// choosePorts gives every port of a workload its number on this host. Those that are free to choose lie below the range from which the
// kernel takes its own, and begin at a place that depends on the name alone, so that they seldom change. Those in taken are not chosen.
func (b *Backend) choosePorts(w backends.Workload, taken []int) (ports []int, err error) {
	const first, count = 20000, 12000
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, p := range w.Run.Ports {
		port := namedPort(&w, p)
		if port != 0 && !portFree(port) && b.ports[port] != w.Name {
			return nil, takenError(w.Name, p.Name, port)
		}
		if port == 0 {
			hash := fnv.New32a()
			_, _ = hash.Write([]byte(w.Name + "/" + p.Name))
			for i := range count {
				candidate := first + int((hash.Sum32()+uint32(i))%uint32(count))
				if b.ports[candidate] == "" && !slices.Contains(ports, candidate) && !slices.Contains(taken, candidate) && portFree(candidate) {
					port = candidate
					break
				}
			}
			if port == 0 {
				return nil, fmt.Errorf("%s: port %s: none of %d numbers from %d on is free", w.Name, p.Name, count, first)
			}
			b.ports[port] = w.Name
		}
		ports = append(ports, port)
	}
	return ports, nil
}

// namedPort is the number on this host that the unit names, or 0.
func namedPort(w *backends.Workload, p backends.Port) int {
	if hostNetwork(w) {
		return max(p.Port, p.Host)
	}
	return p.Host
}

func takenError(workload, name string, port int) error {
	return fmt.Errorf("%s: port %s: port %d is taken by another program of this host", workload, name, port)
}

// portFree is false for a port on which anybody listens, on whatever address.
func portFree(port int) bool {
	for _, address := range []net.IP{net.IPv4(127, 0, 0, 1), nil} {
		listener, err := net.ListenTCP("tcp", &net.TCPAddr{IP: address, Port: port})
		if err != nil || listener.Close() != nil {
			return !errors.Is(err, unix.EADDRINUSE)
		}
	}
	return true
}

// releasePorts lets go of the numbers that were chosen for a workload.
func (b *Backend) releasePorts(name string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	maps.DeleteFunc(b.ports, func(_ int, whose string) bool { return whose == name })
}

// create makes a container, which does not run yet.
func (b *Backend) create(ctx context.Context, w backends.Workload, image string, ports []int, argv []string) (id string, err error) {
	options, err := b.containerOptions(w, image, ports, argv)
	if err != nil {
		return "", err
	}
	made, err := b.engine.ContainerCreate(ctx, options)
	if err != nil && strings.Contains(err.Error(), "in use") { // what an interrupted call has left
		left, inspectErr := b.inspect(ctx, options.Name)
		if inspectErr != nil || left == nil {
			return "", errors.Join(err, inspectErr)
		}
		if err := b.discard(ctx, left.id); err != nil {
			return "", err
		}
		made, err = b.engine.ContainerCreate(ctx, options)
	}
	if err != nil {
		return "", b.plain(ctx, err)
	}
	return made.ID, nil
}

// createLoaded is create, which loads the image again if somebody has removed it.
func (b *Backend) createLoaded(ctx context.Context, w backends.Workload, image string, ports []int, argv []string) (id string, err error) {
	if id, err = b.create(ctx, w, image, ports, argv); !errdefs.IsNotFound(err) {
		return id, err
	}
	if err := b.provide(ctx, w, image, nil); err != nil {
		return "", err
	}
	return b.create(ctx, w, image, ports, argv)
}

// keptPath is where a kept path of a unit lies: readable, and as different as the paths are.
func (b *Backend) keptPath(unit, to string) string {
	name := strings.ReplaceAll(strings.Trim(to, "/"), "/", "-")
	return filepath.Join(b.options.State, "kept", unit, fmt.Sprintf("%.100s-%x", name, sha256.Sum256([]byte(to)))[:min(len(name), 100)+9])
}
