package kubernetes

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.yaml.in/yaml/v4"
)

// plane is a control plane of its own: etcd, API server, controllers, scheduler, and KWOK in the place of nodes. Pods become ready there,
// and are gone when they are deleted; nothing runs. What is written and run "in" a container is a file and a process of this host. Where a
// real node is asked for there is no KWOK, and the node joins later.
type plane struct {
	dir     string            // everything it keeps
	folders map[string]string // of programs, by what .ci/servers calls them
	url     string            // of the API server
	podLog  string            // the file that is every pod's log
	spawn   chan func()
	servers map[string]*server
	admin   string // kubeconfig
	names   int
	mu      sync.Mutex // guards names
}

// server is one process of the plane.
type server struct {
	argv    []string
	process *exec.Cmd
	ended   chan struct{}
}

var control *plane // of this test binary; set by TestMain

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		os.Exit(child())
	}
	if os.Getenv(kubeletEnv) != "" && os.Getenv(nodeEnv) == "" {
		os.Exit(elsewhere())
	}
	code, err := withPlane(m.Run)
	if err != nil {
		fmt.Fprintln(os.Stderr, "control plane:", err)
		code = 1
	}
	os.Exit(code)
}

func withPlane(run func() int) (code int, err error) {
	folders, err := built()
	if err != nil {
		return 1, err
	}
	dir, err := os.MkdirTemp(os.Getenv(nodeEnv), "kmo-plane-")
	if err != nil {
		return 1, err
	}
	p := &plane{dir: dir, folders: folders, spawn: make(chan func()), servers: map[string]*server{}, podLog: filepath.Join(dir, "pod.log")}
	go func() {
		runtime.LockOSThread() // the servers end with the thread that started them
		for start := range p.spawn {
			start()
		}
	}()
	defer func() {
		p.stopAll()
		if os.Getenv(nodeEnv) == "" { // or it goes with the namespace, and what a kubelet leaves mounted
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()
	if err := p.start(); err != nil {
		return 1, err
	}
	control = p
	return run(), nil
}

// built builds the servers where that has not been done, which takes a while and says so. It returns the folder of each.
func built() (map[string]string, error) {
	names := []string{"etcd", "kubernetes", "kwok"}
	if os.Getenv(kubeletEnv) != "" {
		names[2] = "kubelet"
	}
	build := exec.Command("../../.ci/servers", names...)
	build.Stderr = os.Stderr
	out, err := build.Output()
	folders := strings.Fields(string(out))
	if err != nil || len(folders) != len(names) {
		return nil, fmt.Errorf(".ci/servers built %q: %v; want Go and its module proxy, or a filled $KMO_CACHE", folders, err)
	}
	at := map[string]string{}
	for i, name := range names {
		at[name] = folders[i]
	}
	return at, nil
}

// program is the path of a built one.
func (p *plane) program(of, name string) string { return filepath.Join(p.folders[of], name) }

func (p *plane) file(name string) string { return filepath.Join(p.dir, name) }

func (p *plane) start() error {
	ports, err := freePorts(7)
	if err != nil {
		return err
	}
	at := func(i int) string { return fmt.Sprint("127.0.0.1:", ports[i]) }
	p.url = "https://" + at(2)
	if err := p.files(); err != nil {
		return err
	}
	db := "http://" + at(0)
	p.server("etcd", p.program("etcd", "etcd"), "--name=t", "--data-dir="+p.file("etcd"), "--unsafe-no-fsync", "--log-level=error",
		"--listen-client-urls="+db, "--advertise-client-urls="+db, "--listen-peer-urls=http://"+at(1),
		"--initial-advertise-peer-urls=http://"+at(1), "--initial-cluster=t=http://"+at(1))
	if err := p.until("etcd", 30*time.Second, func() error { return ok(http.DefaultClient, db+"/health") }); err != nil {
		return err
	}
	p.server("kube-apiserver", p.program("kubernetes", "kube-apiserver"), "--etcd-servers="+db, "--bind-address=127.0.0.1",
		fmt.Sprint("--secure-port=", ports[2]), "--tls-cert-file="+p.file("server.crt"), "--tls-private-key-file="+p.file("server.key"),
		"--client-ca-file="+p.file("ca.crt"), "--token-auth-file="+p.file("tokens.csv"), "--service-cluster-ip-range=10.0.0.0/16",
		"--authorization-mode=Node,RBAC", "--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file="+p.file("sa.key"), "--service-account-signing-key-file="+p.file("sa.key"),
		"--endpoint-reconciler-type=none", "--kubelet-preferred-address-types=InternalIP",
		"--kubelet-client-certificate="+p.file("server.crt"), "--kubelet-client-key="+p.file("server.key"))
	if err := p.ready(); err != nil {
		return err
	}
	p.server("kube-controller-manager", p.program("kubernetes", "kube-controller-manager"), "--kubeconfig="+p.admin, "--leader-elect=false",
		"--use-service-account-credentials=false", "--kube-api-qps=300", "--kube-api-burst=500", "--service-account-private-key-file="+p.file("sa.key"),
		"--root-ca-file="+p.file("ca.crt"), "--bind-address=127.0.0.1", fmt.Sprint("--secure-port=", ports[3]), "--cert-dir="+p.file("kcm"),
		"--controllers=*,-nodeipam", "--v=0", "--flex-volume-plugin-dir="+p.file("kcm-plugins"))
	p.server("kube-scheduler", p.program("kubernetes", "kube-scheduler"), "--kubeconfig="+p.admin, "--leader-elect=false",
		"--kube-api-qps=300", "--kube-api-burst=500", "--bind-address=127.0.0.1", fmt.Sprint("--secure-port=", ports[4]), "--cert-dir="+p.file("sched"))
	if p.folders["kwok"] != "" {
		if err := p.node(at(5), ports[5]); err != nil {
			return err
		}
	}
	return p.until("the default service account", time.Minute, func() error {
		return p.call(context.Background(), http.MethodGet, "/api/v1/namespaces/default/serviceaccounts/default", "", nil, nil)
	})
}

func (p *plane) ready() error {
	return p.until("kube-apiserver", 2*time.Minute, func() error {
		return p.call(context.Background(), http.MethodGet, "/readyz", "", nil, nil)
	})
}

// node makes the one node there is, and what plays it.
func (p *plane) node(address string, port int) error {
	p.server("kwok", p.program("kwok", "kwok"), "--kubeconfig="+p.admin, "--manage-all-nodes=true", "--node-lease-duration-seconds=40",
		"--config="+p.file("kwok.yaml"), "--server-address="+address, "--node-ip=127.0.0.1", fmt.Sprint("--node-port=", port),
		"--tls-cert-file="+p.file("server.crt"), "--tls-private-key-file="+p.file("server.key"))
	room := object{"cpu": "1000", "memory": "1000Gi", "pods": "5000"}
	labels := object{"kubernetes.io/os": "linux", "kubernetes.io/arch": runtime.GOARCH}
	node := object{
		"apiVersion": "v1", "kind": "Node", "metadata": object{"name": "node-0", "labels": labels},
		"status": object{"allocatable": room, "capacity": room, "declaredFeatures": []any{"RestartAllContainersOnContainerExits"}},
	}
	if err := p.call(context.Background(), http.MethodPost, "/api/v1/nodes", "application/json", node, nil); err != nil {
		return err
	}
	return p.nodeReady()
}

func (p *plane) nodeReady() error {
	return p.until("the node", time.Minute, func() error {
		var now item
		if err := p.call(context.Background(), http.MethodGet, "/api/v1/nodes/node-0", "", nil, &now); err != nil {
			return err
		}
		for _, c := range now.Status.Conditions {
			if c.Type == "Ready" && c.Status == "True" {
				return nil
			}
		}
		return fmt.Errorf("node-0 is %+v", now.Status)
	})
}

// files are keys, certificates, accounts and what KWOK plays.
func (p *plane) files() error {
	caKey, ca, err := certificate(p.dir, "ca", nil, nil)
	if err != nil {
		return err
	}
	if _, _, err := certificate(p.dir, "server", caKey, ca); err != nil {
		return err
	}
	if _, _, err := certificate(p.dir, "sa", nil, nil); err != nil {
		return err
	}
	stages, err := os.ReadFile("testdata/stages.yaml")
	if err != nil {
		return err
	}
	inside := fmt.Sprintf("\n---\napiVersion: kwok.x-k8s.io/v1alpha1\nkind: ClusterLogs\nmetadata: {name: logs}\nspec: {logs: [{logsFile: %s, previousLogsFile: %s.previous, follow: true}]}\n"+
		"---\napiVersion: kwok.x-k8s.io/v1alpha1\nkind: ClusterExec\nmetadata: {name: exec}\nspec: {execs: [{local: {workDir: /}}]}\n", p.podLog, p.podLog)
	p.admin = p.file("admin.kubeconfig")
	return errors.Join(
		os.WriteFile(p.file("kwok.yaml"), append(stages, inside...), 0o600),
		os.WriteFile(p.file("tokens.csv"), []byte("admin-token,admin,admin-uid,\"system:masters\"\nnode-token,system:node:node-0,node-uid,\"system:nodes\"\n"), 0o600),
		os.WriteFile(p.podLog, criLog("one", "two", "three"), 0o600),
		os.WriteFile(p.podLog+".previous", criLog("zero"), 0o600),
		p.kubeconfig(p.admin, "admin-token"), p.kubeconfig(p.file("node.kubeconfig"), "node-token"))
}

// criLog is lines as a container runtime keeps them.
func criLog(lines ...string) (text []byte) {
	for _, line := range lines {
		text = fmt.Appendln(text, "2026-01-01T00:00:00.000000000Z stdout F", line)
	}
	return text
}

func (p *plane) kubeconfig(path, token string) error {
	return os.WriteFile(path, fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters: [{name: here, cluster: {server: %s, certificate-authority: %s}}]
users: [{name: me, user: {token: %s}}]
contexts: [{name: main, context: {cluster: here, user: me}}, {name: nobody, context: {cluster: here, user: none}}]
current-context: main
`, p.url, p.file("ca.crt"), token), 0o600)
}

// server starts a process of the plane.
func (p *plane) server(name string, argv ...string) {
	p.servers[name] = &server{argv: argv}
	p.restart(name)
}

func (p *plane) restart(name string) {
	s := p.servers[name]
	s.ended = make(chan struct{})
	started := make(chan struct{})
	p.spawn <- func() {
		defer close(started)
		log, err := os.OpenFile(p.file(name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return
		}
		defer log.Close()
		s.process = exec.Command(s.argv[0], s.argv[1:]...)
		s.process.Stdout, s.process.Stderr, s.process.Dir = log, log, p.dir
		s.process.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := s.process.Start(); err != nil {
			fmt.Fprintln(log, err)
			return
		}
		go func() {
			_ = s.process.Wait()
			close(s.ended)
		}()
	}
	<-started
}

// kill ends a process of the plane at once.
func (p *plane) kill(name string) {
	s := p.servers[name]
	if s.process != nil && s.process.Process != nil {
		_ = s.process.Process.Kill()
		<-s.ended
	}
}

func (p *plane) stopAll() {
	for name := range p.servers {
		p.kill(name)
	}
	close(p.spawn)
}

// until asks until it is answered well, and says at the end what the servers say.
func (p *plane) until(what string, patience time.Duration, ask func() error) error {
	deadline := time.Now().Add(patience)
	for {
		err := ask()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			for name := range p.servers {
				text, _ := os.ReadFile(p.file(name + ".log"))
				fmt.Fprintf(os.Stderr, "%s: %s\n", name, text[max(0, len(text)-2000):])
			}
			return fmt.Errorf("%s is not there after %v: %w", what, patience, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// call asks the API server as an administrator.
func (p *plane) call(ctx context.Context, method, path, contentType string, body, into any) error {
	var content io.Reader
	switch body := body.(type) {
	case nil:
	case string:
		content = strings.NewReader(body)
	default:
		text, err := json.Marshal(body)
		if err != nil {
			return err
		}
		content = bytes.NewReader(text)
	}
	request, err := http.NewRequestWithContext(ctx, method, p.url+path, content)
	if err != nil {
		return err
	}
	request.Header.Set("Authorization", "Bearer admin-token")
	if contentType != "" {
		request.Header.Set("Content-Type", contentType)
	}
	ca, err := os.ReadFile(p.file("ca.crt"))
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	client := http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: pool}}}
	answer, err := client.Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		return err
	}
	if answer.StatusCode > 299 {
		return fmt.Errorf("%s %s: %s: %s", method, path, answer.Status, text)
	}
	if into == nil {
		return nil
	}
	return json.Unmarshal(text, into)
}

// must is call, and fails the test.
func (p *plane) must(t testing.TB, method, path, contentType string, body, into any) {
	t.Helper()
	if err := p.call(context.Background(), method, path, contentType, body, into); err != nil {
		t.Fatal(err)
	}
}

// apiPath is where an object of a manifest is.
func apiPath(o map[string]any) string {
	api, _ := o["apiVersion"].(string)
	k, _ := o["kind"].(string)
	m, _ := o["metadata"].(map[string]any)
	path := "/apis/" + api
	if api == "v1" {
		path = "/api/v1"
	}
	if ns, ok := m["namespace"]; ok {
		path += fmt.Sprint("/namespaces/", ns)
	}
	return fmt.Sprintf("%s/%ss/%v", path, strings.ToLower(k), m["name"])
}

// site makes a namespace with the rights of the manifest, and returns it with the kubeconfig of its account.
func (p *plane) site(t testing.TB) (namespace, kubeconfig string) {
	t.Helper()
	p.mu.Lock()
	p.names++
	namespace = fmt.Sprint("site-", p.names)
	p.mu.Unlock()
	for _, document := range strings.Split(Manifest(namespace), "\n---\n") {
		var o map[string]any
		if err := yaml.Unmarshal([]byte(document), &o); err != nil {
			t.Fatal(err)
		}
		p.must(t, http.MethodPatch, apiPath(o)+"?fieldManager=admin&force=true", "application/apply-patch+yaml", document, nil)
	}
	return namespace, p.account(t, namespace, "kmo")
}

// account is the kubeconfig of a service account.
func (p *plane) account(t testing.TB, namespace, name string) string {
	t.Helper()
	var token struct {
		Status struct {
			Token string `json:"token"`
		} `json:"status"`
	}
	request := object{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": object{"expirationSeconds": 3600}}
	at := "/api/v1/namespaces/" + namespace + "/serviceaccounts/" + name + "/token"
	if err := p.until("the account "+name, time.Minute, func() error { // one is made by the cluster itself
		return p.call(t.Context(), http.MethodPost, at, "application/json", request, &token)
	}); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "kubeconfig")
	if err := p.kubeconfig(path, token.Status.Token); err != nil {
		t.Fatal(err)
	}
	return path
}

// objects lists everything of ours, or like ours, that is in a namespace.
func (p *plane) objects(t testing.TB, namespace string) (names []string) {
	t.Helper()
	for _, k := range []kind{deployments, replicaSets, pods, services, configMaps} {
		api, plural := k.split()
		var all items
		p.must(t, http.MethodGet, api+"/namespaces/"+namespace+"/"+plural, "", nil, &all)
		for _, one := range all.Items {
			if one.Metadata.Name != "kube-root-ca.crt" {
				names = append(names, plural+"/"+one.Metadata.Name)
			}
		}
	}
	return names
}

func ok(client *http.Client, url string) error {
	answer, err := client.Get(url)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return errors.New(answer.Status)
	}
	return nil
}

// contains says whether one of the texts has a part.
func contains(list []string, part string) bool {
	return slices.ContainsFunc(list, func(s string) bool { return strings.Contains(s, part) })
}
