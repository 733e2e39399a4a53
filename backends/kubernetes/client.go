package kubernetes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/go-logr/logr"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
)

const (
	fieldManager = "kmo"
	callTime     = 30 * time.Second // for one call of the API that is no stream
	writeTime    = 2 * time.Second  // for a write to end whose caller has gone
)

// kind is a kind of object, as its path below the API's root.
type kind string

// The kinds that are made, in the order in which they are, and those that the cluster makes of them.
const (
	configMaps  kind = "api/v1/configmaps"
	services    kind = "api/v1/services"
	deployments kind = "apis/apps/v1/deployments"
	replicaSets kind = "apis/apps/v1/replicasets"
	pods        kind = "api/v1/pods"
	namespaces  kind = "api/v1/namespaces"
	nodes       kind = "api/v1/nodes"
)

// split is the kind's API path and its plural.
func (k kind) split() (api, plural string) {
	cut := strings.LastIndexByte(string(k), '/')
	return "/" + string(k[:cut]), string(k[cut+1:])
}

// cluster is a connection to one. It holds no state but that.
type cluster struct {
	config    *rest.Config
	rest      *rest.RESTClient
	namespace string
}

// connect makes a client from a kubeconfig, or from what a pod has of its cluster. Nothing is asked of the cluster yet.
func connect(o Options) (*cluster, error) {
	config, err := rest.InClusterConfig()
	if o.Kubeconfig != "" {
		config, err = clientcmd.NewNonInteractiveDeferredLoadingClientConfig(
			&clientcmd.ClientConfigLoadingRules{ExplicitPath: o.Kubeconfig},
			&clientcmd.ConfigOverrides{CurrentContext: o.Context}).ClientConfig()
	}
	if errors.Is(err, rest.ErrNotInCluster) {
		return nil, errors.New("no cluster is named and this is no pod of one; want a kubeconfig")
	}
	if err != nil {
		return nil, fmt.Errorf("cluster: %v", err)
	}
	scheme := runtime.NewScheme()
	metav1.AddMetaToScheme(scheme) //nolint:errcheck // types that are known to fit
	metav1.AddToGroupVersion(scheme, metav1.Unversioned)
	config.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	config.GroupVersion = &metav1.Unversioned
	config.UserAgent, config.QPS = "kmo", -1 // it is the cluster that says when it is too much
	config.WarningHandlerWithContext = rest.NoWarnings{}
	client, err := rest.UnversionedRESTClientFor(config)
	if err != nil {
		return nil, fmt.Errorf("cluster: %v", err)
	}
	return &cluster{config: config, rest: client, namespace: o.Namespace}, nil
}

// request is a call on objects of a kind; name "" is all of them.
func (c *cluster) request(verb string, k kind, name string, sub ...string) *rest.Request {
	api, plural := k.split()
	r := c.rest.Verb(verb).AbsPath(api).SetHeader("Accept", "application/json")
	if k != namespaces && k != nodes {
		r = r.Namespace(c.namespace)
	}
	r = r.Resource(plural)
	if name != "" {
		r = r.Name(name)
	}
	if len(sub) > 0 {
		r = r.SubResource(sub...)
	}
	return r
}

// do makes a call and reads its answer.
func do(ctx context.Context, r *rest.Request, into any) error {
	bounded, cancel := context.WithTimeout(quiet(ctx), callTime)
	defer cancel()
	return answered(ctx, bounded, r, into)
}

// write is do for a call that changes something. Once it is made it is not cut off at once: the cluster might do it all the same, after
// whatever is done next.
func write(ctx context.Context, r *rest.Request, into any) error {
	bounded, cancel := context.WithTimeout(context.WithoutCancel(quiet(ctx)), callTime)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(writeTime, cancel) })
	defer stop()
	return answered(ctx, bounded, r, into)
}

// quiet keeps the client's own log, which says again what is returned, from this process's output.
func quiet(ctx context.Context) context.Context { return klog.NewContext(ctx, logr.Discard()) }

// answered makes a call in the one context, for a caller of the other.
func answered(ctx, bounded context.Context, r *rest.Request, into any) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	result := r.Do(bounded)
	text, err := result.Raw()
	switch {
	case err != nil && ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		if told := result.Error(); told != nil { // it has read what the server says
			err = told
		}
		return err
	case into == nil:
		return nil
	}
	return json.Unmarshal(text, into)
}

// get reads one object.
func (c *cluster) get(ctx context.Context, k kind, name string, into any) error {
	return do(ctx, c.request(http.MethodGet, k, name), into)
}

// list reads the objects of a kind that have the labels, all at once.
func (c *cluster) list(ctx context.Context, k kind, selector string, into any) error {
	r := c.request(http.MethodGet, k, "").Param("labelSelector", selector)
	if k == configMaps { // what is in the files is not asked for
		r = r.SetHeader("Accept", "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1")
	}
	return do(ctx, r, into)
}

// apply makes the fields of an object ours, by server-side apply; dry only asks whether that would do. What has become of it is read.
func (c *cluster) apply(ctx context.Context, k kind, o object, dry bool, into any) error {
	text, err := json.Marshal(o)
	if err != nil {
		return err
	}
	r := c.request(http.MethodPatch, k, o.name()).SetHeader("Content-Type", string(types.ApplyPatchType)).
		Param("fieldManager", fieldManager).Param("force", "true").Param("fieldValidation", "Strict").Body(text)
	if dry {
		r = r.Param("dryRun", "All")
	}
	return write(ctx, r, into)
}

// annotate changes annotations of one object, and nothing else of it.
func (c *cluster) annotate(ctx context.Context, k kind, m meta, annotations map[string]any) error {
	text, err := json.Marshal(object{"metadata": object{"uid": m.UID, "annotations": annotations}})
	if err != nil {
		return err
	}
	r := c.request(http.MethodPatch, k, m.Name).SetHeader("Content-Type", string(types.MergePatchType)).
		Param("fieldManager", fieldManager+"-hooks").Body(text)
	return write(ctx, r, nil)
}

// remove deletes the one object that was seen, and none that has taken its name since; what hangs on a Deployment goes before it does.
func (c *cluster) remove(ctx context.Context, k kind, m meta) error {
	policy := "Background"
	if k == deployments || k == replicaSets {
		policy = "Foreground"
	}
	text, err := json.Marshal(object{
		"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": policy, "preconditions": object{"uid": m.UID},
	})
	if err != nil {
		return err
	}
	err = write(ctx, c.request(http.MethodDelete, k, m.Name).SetHeader("Content-Type", "application/json").Body(text), nil)
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return nil
	}
	return err
}

// stream opens what goes on: a log.
func stream(ctx context.Context, r *rest.Request) (io.ReadCloser, error) {
	body, err := r.Stream(quiet(ctx))
	if err != nil && ctx.Err() != nil {
		return nil, ctx.Err()
	}
	return body, err
}

// makeNamespace makes the site's namespace where there is none, if that is allowed.
func (c *cluster) makeNamespace(ctx context.Context) error {
	text, err := json.Marshal(namespaceObject(c.namespace))
	if err != nil {
		return err
	}
	err = write(ctx, c.request(http.MethodPost, namespaces, "").SetHeader("Content-Type", "application/json").Body(text), nil)
	if apierrors.IsAlreadyExists(err) {
		return nil
	}
	if apierrors.IsForbidden(err) {
		return fmt.Errorf("namespace %s is not there, and this account may not make it; want it made, with the manifest that gives this account its rights", c.namespace)
	}
	return err
}

// meta is what all objects have.
type meta struct {
	Name              string            `json:"name"`
	UID               string            `json:"uid"`
	Generation        int64             `json:"generation"`
	Labels            map[string]string `json:"labels"`
	Annotations       map[string]string `json:"annotations"`
	CreationTimestamp time.Time         `json:"creationTimestamp"`
	DeletionTimestamp *time.Time        `json:"deletionTimestamp"`
}

type condition struct {
	Type    string `json:"type"`
	Status  string `json:"status"`
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

// item is any object, and of the kinds that are looked at, what is looked at.
type item struct {
	Metadata meta   `json:"metadata"`
	Spec     any    `json:"spec"`
	Status   status `json:"status"`
}

// status is that of a Deployment or of a pod.
type status struct {
	ObservedGeneration    int64             `json:"observedGeneration"`
	UnavailableReplicas   int               `json:"unavailableReplicas"`
	Phase                 string            `json:"phase"`
	Reason                string            `json:"reason"`
	Message               string            `json:"message"`
	HostIP                string            `json:"hostIP"`
	Conditions            []condition       `json:"conditions"`
	InitContainerStatuses []containerStatus `json:"initContainerStatuses"`
	ContainerStatuses     []containerStatus `json:"containerStatuses"`
}

type containerStatus struct {
	Name         string         `json:"name"`
	ContainerID  string         `json:"containerID"`
	RestartCount int            `json:"restartCount"`
	State        containerState `json:"state"`
	LastState    containerState `json:"lastState"`
}

type containerState struct {
	Waiting *struct {
		Reason  string `json:"reason"`
		Message string `json:"message"`
	} `json:"waiting"`
	Running *struct {
		StartedAt time.Time `json:"startedAt"`
	} `json:"running"`
	Terminated *terminated `json:"terminated"`
}

type terminated struct {
	ExitCode int    `json:"exitCode"`
	Reason   string `json:"reason"`
	Message  string `json:"message"`
}

type items struct {
	Items []item `json:"items"`
}
