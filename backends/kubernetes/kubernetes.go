// Package kubernetes runs OCI images on a cluster: a workload is a Deployment of one pod.
//
//	b, err := kubernetes.Open(kubernetes.Options{Kubeconfig: "/etc/kmo/cluster", Namespace: "north-sea", State: state})
//
// Objects are made by server-side apply as field manager "kmo", each with the labels app.kubernetes.io/managed-by=kmo, kmo/instance,
// kmo/unit, kmo/workload and kmo/spec: the Deployment, a Service where there are ports, a ConfigMap where there are files. They have the
// workload's name. What has not the labels of this instance (the state folder's) is never listed, changed or removed. The Deployment says
// in its annotation kmo/applied what was applied, so that a new process can judge, reach and end what an old one made; nothing else is
// remembered. Drift is a field of ours that is not as it was applied; what others add (a sidecar, an annotation) is theirs.
//
// The cluster pulls the image by itself, by its digest and nothing else; Image.Content is not looked at. "The host" of a pod is the node
// it runs on, which need not be this one: so it has none of the features that are about this host's folders, devices and namespaces.
//
// The cluster tells when a program was started to the second, and tells every program, in variables KUBERNETES_…, where its API is.
//
// A port without a number of the host is told as the Service's cluster address: it is reached from the cluster's nodes and pods, and is
// published nowhere. A port with one is a node port, told as the address of the node that the pod runs on.
//
// The kubelet starts a program that ended again, also while no kMO runs. A workload with preInit hooks asks it to begin the whole pod
// again, init containers and all (Kubernetes 1.36 or later); postInit hooks are run by exec, from here, once a process of kMO sees the
// container they have not been run in; exit hooks are run by exec before the Deployment is deleted, so that there may be several and
// Remove can bound them. A node that is drained stops a program without them.
package kubernetes

import (
	"context"
	"embed" // the manifest
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/kindos/kmo/backends"
)

// Name is the backend's name.
const Name = "kubernetes"

// hookTime is how long a hook, or a program that hooks belong to, may take.
const hookTime = 30 * time.Second

// Options are what a Backend needs. Namespace and State are.
type Options struct {
	Kubeconfig string       // path; empty for the cluster that this process is a pod of
	Context    string       // of the kubeconfig; empty for its current one
	Namespace  string       // the site's own; made if there is none and that is allowed
	State      string       // folder that holds which instance this is: trusted, made if there is none
	Logger     *slog.Logger // nil is silent
}

// Backend runs workloads on a cluster. It is a backends.Backend and a backends.Execer.
type Backend struct {
	options  Options
	instance string
	hookTime time.Duration

	ctx    context.Context // of hooks that nobody waits for; ends with Close
	cancel context.CancelFunc
	loose  sync.WaitGroup // those hooks

	mu      sync.Mutex               // guards what follows
	present *cluster                 // nil until it is first asked
	busy    map[string]chan struct{} // by workload: holds a value while one call changes it
}

var (
	_ backends.Backend = (*Backend)(nil)
	_ backends.Execer  = (*Backend)(nil)
)

// Open goes on with what an earlier process of the state folder left on the cluster, which need not answer yet.
func Open(o Options) (*Backend, error) {
	if !regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`).MatchString(o.Namespace) {
		return nil, fmt.Errorf("kubernetes: namespace %q; want a name of lower-case letters, digits and dashes, 63 at most", o.Namespace)
	}
	instance, err := backends.Instance(o.State)
	if err != nil {
		return nil, fmt.Errorf("kubernetes: state: %w", err)
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	b := &Backend{options: o, instance: instance, hookTime: hookTime, busy: map[string]chan struct{}{}}
	b.ctx, b.cancel = context.WithCancel(context.Background())
	return b, nil
}

// Close ends the hooks that run. No workload notices.
func (b *Backend) Close() error {
	b.cancel()
	b.loose.Wait()
	return nil
}

// cluster is the connection, made when it is first asked for, and again after it was refused: credentials are renewed.
func (b *Backend) cluster() (*cluster, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.present != nil {
		return b.present, nil
	}
	c, err := connect(b.options)
	b.present = c
	return c, err
}

// answer says what an error of the cluster means for the caller: one that a person, or time, can mend.
func (b *Backend) answer(err error) error {
	switch {
	case err == nil:
		return nil
	case apierrors.IsUnauthorized(err):
		b.mu.Lock()
		b.present = nil
		b.mu.Unlock()
		return fmt.Errorf("the cluster does not know this account (%v); want a kubeconfig that it does", err)
	case apierrors.IsForbidden(err):
		return fmt.Errorf("the cluster refuses it to this account (%v); want the rights of the manifest", err)
	}
	if !silent(err) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return fmt.Errorf("the cluster does not answer: %v; want its API server to be reachable", err)
}

// silent says that no answer came.
func silent(err error) bool {
	var failed net.Error
	return errors.As(err, &failed)
}

// Fingerprint asks the cluster what it is.
func (b *Backend) Fingerprint(ctx context.Context) (backends.Fingerprint, error) {
	c, err := b.cluster()
	if err != nil {
		return backends.Fingerprint{}, err
	}
	version, err := c.version(ctx)
	if err != nil {
		return backends.Fingerprint{}, b.answer(err)
	}
	able := fingerprint(version)
	var all items
	err = c.list(ctx, nodes, "kubernetes.io/os=linux", &all)
	switch {
	case apierrors.IsForbidden(err):
		able.Missing = append(able.Missing, "platforms: this account may not list nodes, so the control plane's own is told")
	case err != nil:
		return backends.Fingerprint{}, b.answer(err)
	default:
		able.Platforms = platforms(all.Items)
	}
	return able, nil
}

// platforms are those of the nodes.
func platforms(nodes []item) []string {
	var all []string
	for _, node := range nodes {
		all = append(all, "linux/"+node.Metadata.Labels["kubernetes.io/arch"])
	}
	slices.Sort(all)
	return slices.Compact(all)
}

type version struct {
	GitVersion string `json:"gitVersion"`
	Major      string `json:"major"`
	Minor      string `json:"minor"`
	Platform   string `json:"platform"`
}

func (c *cluster) version(ctx context.Context) (v version, err error) {
	err = do(ctx, c.rest.Verb(http.MethodGet).AbsPath("/version"), &v)
	return v, err
}

// restarts says whether the cluster starts a pod's init containers again with its program.
func (v version) restarts() bool {
	minor, err := strconv.Atoi(strings.TrimRight(v.Minor, "+"))
	return err == nil && v.Major == "1" && minor >= 36
}

func fingerprint(v version) backends.Fingerprint {
	able := backends.Fingerprint{
		Backend: Name, Version: v.GitVersion, Formats: []backends.Format{backends.OCI}, Platforms: []string{v.Platform},
		Isolation: backends.IsolationContainer,
		Features: []backends.Feature{
			backends.Exec, backends.Files, backends.LimitCPU, backends.LimitDisk, backends.LimitMemory, backends.LowPorts,
			backends.Overlays, backends.OwnNetwork, backends.PortMap,
		},
		Missing: []string{
			"capabilities: a pod's user who is not root gets none of them",
			"commands: a hook or a probe whose time is over is not ended in its pod",
			"devices: those of this host are not the node's",
			"host-namespace: a pod shares those of its node, which need not be this host",
			"host-network: a pod shares that of its node, which need not be this host",
			"keep: no volume of the cluster is asked for, and a node's own folder stays behind when the pod moves",
			"limit-pids: a pod cannot ask for it; the kubelet's podPidsLimit bounds all pods of a node alike",
			"memory-pool: this host's memory is not the node's",
			"mounts: folders of this host are not on the node",
			"overlay-root: /tmp can be written only, and what is there counts as memory of the program",
			"port-map: a number of the host must be one of the cluster's node ports: 30000 to 32767, where it was not told others",
			"privileged: what it would be given is the node, not this host",
			"secrets: a Secret lies in the cluster's etcd, on disk",
			"sockets: a folder of this host is not on the node",
			"unconfined: the cluster's policy for pods decides that, not the unit",
			"usage: a cluster does not measure it by itself",
			"writable-base: nothing would bound it",
		},
	}
	if v.restarts() {
		able.Features = append(able.Features, backends.Hooking)
	} else {
		able.Missing = append(able.Missing, "hooks: Kubernetes "+v.GitVersion+" starts a program again without its preInit hooks; 1.36 and later can")
	}
	slices.Sort(able.Features)
	slices.Sort(able.Missing)
	return able
}

//go:embed manifest.yaml
var manifests embed.FS

// Manifest is what an administrator applies so that kMO may work in a namespace, with the least rights, as its service account kmo.
func Manifest(namespace string) string {
	text, err := manifests.ReadFile("manifest.yaml")
	if err != nil {
		panic(err) // it is embedded
	}
	return strings.ReplaceAll(string(text), "NAMESPACE", namespace)
}

// namespaceObject is the manifest's, where kMO may make it.
func namespaceObject(name string) object {
	return object{"apiVersion": "v1", "kind": "Namespace", "metadata": object{
		"name": name, "labels": object{"pod-security.kubernetes.io/enforce": "baseline"},
	}}
}
