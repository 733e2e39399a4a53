package kubernetes

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http/httptest"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/conformance"
	"github.com/kindos/kmo/registry"
)

const (
	kubeletEnv = "KMO_TEST_KUBELET" // asks for a real node
	nodeEnv    = "KMO_TEST_NODE"    // the folder of the process that has one, in namespaces of its own

	nodeAddress = "10.254.0.1"
	cgroups     = "/sys/fs/cgroup"
)

// prepare makes the namespaces a machine of its own: /run and /var are private, and free ports are such as a cluster's nodes may have.
const prepare = `set -e
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs -o size=2g none "$KMO_TEST_NODE"
mkdir "$KMO_TEST_NODE/upper" "$KMO_TEST_NODE/work"
mount -t overlay -o "lowerdir=/var,upperdir=$KMO_TEST_NODE/upper,workdir=$KMO_TEST_NODE/work" none /var
mount -t tmpfs none /run
ip link set lo up
ip link add node0 type bridge
ip address add ` + nodeAddress + `/24 dev node0
ip link set node0 up
ip route add default dev node0
echo 1 >/proc/sys/net/ipv4/ip_forward
echo 30000 32767 >/proc/sys/net/ipv4/ip_local_port_range
"$@"`

// elsewhere runs these tests in namespaces of their own, with which all that they start and mount goes, however they end.
func elsewhere() int {
	if _, err := built(); err != nil { // there is no network in there
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	dir, err := os.MkdirTemp("/tmp", "kmo-node-") // short: sockets lie in it
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	defer clearGroups(filepath.Base(dir))
	signal.Notify(make(chan os.Signal, 1), os.Interrupt) // it ends the tests, and then this ends
	self := exec.Command("/bin/sh", append([]string{"-c", prepare, "sh", os.Args[0]}, os.Args[1:]...)...)
	self.Stdin, self.Stdout, self.Stderr = os.Stdin, os.Stdout, os.Stderr
	self.Env = append(os.Environ(), nodeEnv+"="+dir)
	runtime.LockOSThread() // the child dies with the thread that started it
	self.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID, Pdeathsig: unix.SIGKILL}
	err = self.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "running the tests in namespaces of their own (needs root, and iproute2):", err)
		return 1
	}
	return 0
}

// hierarchies are where cgroups are made: each of version 1, or the one of version 2.
func hierarchies() []string {
	all, _ := filepath.Glob(cgroups + "/*/cgroup.procs")
	if _, err := os.Stat(cgroups + "/cgroup.controllers"); err == nil {
		all = []string{cgroups + "/cgroup.procs"}
	}
	for i := range all {
		all[i] = filepath.Dir(all[i])
	}
	return all
}

// clearGroups removes the cgroups of a node, in which nothing runs any more.
func clearGroups(group string) {
	for _, hierarchy := range hierarchies() {
		var all []string
		_ = filepath.WalkDir(filepath.Join(hierarchy, group), func(path string, entry fs.DirEntry, err error) error {
			if err == nil && entry.IsDir() {
				all = append(all, path)
			}
			return nil // what is not there need not be removed
		})
		slices.Reverse(all)
		for _, path := range all {
			if err := unix.Rmdir(path); err != nil {
				fmt.Fprintln(os.Stderr, "cgroup", path, err)
			}
		}
	}
}

// join makes this machine the node of the plane: containerd, kubelet and kube-proxy, and a registry with the suite's test program.
func (p *plane) join(t *testing.T) backends.Image {
	t.Helper()
	store := httptest.NewServer(registry.Memory())
	t.Cleanup(store.Close)
	host := strings.TrimPrefix(store.URL, "http://")
	image := push(t, host+"/kmo/app")
	group := filepath.Base(os.Getenv(nodeEnv))
	for _, hierarchy := range hierarchies() {
		if err := os.Mkdir(filepath.Join(hierarchy, group), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	p.tunables(t)
	p.write(t, "certs.d/"+host+"/hosts.toml", fmt.Sprintf("server = %q\n", store.URL))
	p.write(t, "cni/kmo.conflist", fmt.Sprintf(conflist, p.file("ipam")))
	p.write(t, "containerd.toml", fmt.Sprintf(containerdConfig,
		p.file("containerd"), p.file("containerd-run"), p.file("containerd.sock"), image.Ref, p.file("cni"), p.file("certs.d")))
	p.write(t, "kubelet.yaml", fmt.Sprintf(kubeletConfig, p.file("containerd.sock"), group, nodeAddress, p.file("ca.crt"), p.file("server.crt"),
		p.file("server.key"), p.file("pods"), p.file("plugins"), p.file("resolv.conf")))
	p.write(t, "resolv.conf", "nameserver "+nodeAddress+"\n")
	containerd, err := exec.LookPath("containerd")
	if err != nil {
		t.Fatal(err)
	}
	p.server("containerd", containerd, "-c", p.file("containerd.toml"))
	if err := p.until("containerd", 30*time.Second, func() error {
		_, err := os.Stat(p.file("containerd.sock"))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	p.server("kubelet", p.program("kubelet", "kubelet"), "--config="+p.file("kubelet.yaml"), "--kubeconfig="+p.file("node.kubeconfig"),
		"--hostname-override=node-0", "--node-ip="+nodeAddress, "--root-dir="+p.file("kubelet"), "--cert-dir="+p.file("kubelet-certs"))
	p.server("kube-proxy", p.program("kubelet", "kube-proxy"), "--kubeconfig="+p.admin, "--hostname-override=node-0", "--proxy-mode=iptables",
		"--conntrack-max-per-core=0", "--conntrack-min=0", "--conntrack-tcp-timeout-established=0", "--conntrack-tcp-timeout-close-wait=0")
	if err := p.nodeReady(); err != nil {
		t.Fatal(err)
	}
	return image
}

func (p *plane) write(t *testing.T, name, text string) {
	t.Helper()
	path := p.file(name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(text), 0o600)); err != nil {
		t.Fatal(err)
	}
}

// tunables shows the kubelet the kernel's settings as it wants them, since it would change them for the whole machine.
func (p *plane) tunables(t *testing.T) {
	t.Helper()
	for name, value := range map[string]string{
		"vm/overcommit_memory": "1", "vm/panic_on_oom": "0", "kernel/panic": "10", "kernel/panic_on_oops": "1",
		"kernel/keys/root_maxkeys": "1000000", "kernel/keys/root_maxbytes": "25000000",
	} {
		p.write(t, "sysctl/"+name, value+"\n")
		if err := unix.Mount(p.file("sysctl/"+name), "/proc/sys/"+name, "", unix.MS_BIND, ""); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
}

// push makes an image of the suite's test program and puts it into a registry. It is told by its digest. What runs it without a command is
// the node, to hold a pod's namespaces.
func push(t *testing.T, repository string) backends.Image {
	t.Helper()
	program, err := os.ReadFile(conformance.Build(t, "linux", runtime.GOARCH))
	if err != nil {
		t.Fatal(err)
	}
	var files bytes.Buffer
	w := tar.NewWriter(&files)
	for _, dir := range []string{"etc/", "tmp/", "var/"} {
		err = errors.Join(err, w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755}))
	}
	err = errors.Join(err, w.WriteHeader(&tar.Header{Name: "app", Mode: 0o755, Size: int64(len(program))}))
	_, writeErr := w.Write(program)
	err = errors.Join(err, writeErr, w.Close())
	layer, layerErr := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(files.Bytes())), nil })
	if err := errors.Join(err, layerErr); err != nil {
		t.Fatal(err)
	}
	made, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		t.Fatal(err)
	}
	made, err = mutate.ConfigFile(made, configured(t, made))
	if err != nil {
		t.Fatal(err)
	}
	digest, err := made.Digest()
	if err != nil {
		t.Fatal(err)
	}
	ref, err := name.ParseReference(repository + "@" + digest.String())
	if err == nil {
		err = remote.Write(ref, made)
	}
	if err != nil {
		t.Fatal(err)
	}
	return backends.Image{Ref: ref.String(), SHA256: digest.Hex}
}

func configured(t *testing.T, image v1.Image) *v1.ConfigFile {
	t.Helper()
	config, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.OS, config.Architecture, config.Config.Cmd = "linux", runtime.GOARCH, []string{"/app", "wait"}
	return config
}

const conflist = `{"cniVersion": "0.4.0", "name": "kmo", "plugins": [{"type": "ptp", "ipam": {
	"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": "10.85.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}
`

const containerdConfig = `version = 2
root = %q
state = %q
[grpc]
  address = %q
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = %q
  restrict_oom_score_adj = true
  stream_server_address = "127.0.0.1"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = %q
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = %q
`

const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: unix://%s
cgroupDriver: cgroupfs
cgroupRoot: /%s
failCgroupV1: false
failSwapOn: false
protectKernelDefaults: true
address: %s
authentication: {anonymous: {enabled: false}, webhook: {enabled: false}, x509: {clientCAFile: %q}}
authorization: {mode: AlwaysAllow}
tlsCertFile: %q
tlsPrivateKeyFile: %q
podLogsDir: %q
volumePluginDir: %q
resolvConf: %q
evictionHard: {memory.available: 0%%, nodefs.available: 0%%, imagefs.available: 0%%, nodefs.inodesFree: 0%%, imagefs.inodesFree: 0%%}
imageGCHighThresholdPercent: 100
`
