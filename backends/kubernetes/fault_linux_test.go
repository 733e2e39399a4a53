package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"crypto/tls"
	"net/http/httptest"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/policy/refusal"
)

// plainly wants an error that says waiting: none that a person who changes the workload could mend.
func plainly(t testing.TB, what string, err error) {
	t.Helper()
	var lacking *backends.FeatureError
	var start *backends.StartError
	if err == nil || errors.As(err, &lacking) || errors.As(err, &start) {
		t.Errorf("%s: %v (%T); want a plain error", what, err, err)
	}
}

// TestRefused: what the cluster cannot do, and what must not be, changes nothing.
func TestRefused(t *testing.T) {
	b := newBench(t)
	for name, ask := range map[string]struct {
		feature backends.Feature
		ask     func(w *backends.Workload)
	}{
		"a tag":                 {"image", func(w *backends.Workload) { w.Image = backends.Image{Ref: "reg.example/app:1"} }},
		"a tag and a digest":    {"image", func(w *backends.Workload) { w.Image.Ref = strings.Replace(w.Image.Ref, "@", ":1@", 1) }},
		"no digest":             {"image", func(w *backends.Workload) { w.Image = backends.Image{Ref: "reg.example/app"} }},
		"another digest":        {"image", func(w *backends.Workload) { w.Image.SHA256 = strings.Repeat("b", 64) }},
		"a file for one":        {"files", func(w *backends.Workload) { w.Files = []backends.File{{To: "/x", Mode: 0o400}} }},
		"a secret":              {"secrets", func(w *backends.Workload) { w.Files = []backends.File{{To: "/x", Mode: 0o440, Secret: true}} }},
		"a port of no node":     {"port-map", func(w *backends.Workload) { w.Run.Ports = []backends.Port{{Name: "a", Port: 8080, Host: 8080}} }},
		"a bound of processes":  {"limit-pids", func(w *backends.Workload) { w.Resources.PIDs = 10 }},
		"a folder of this host": {"mounts", func(w *backends.Workload) { w.Mounts = []backends.Mount{{From: "/etc", To: "/host"}} }},
	} {
		w := workload("relay", "5")
		w.Files = []backends.File{{To: "/etc/relay.toml", Mode: 0o444, Content: []byte("x")}}
		ask.ask(&w)
		var lacking *backends.FeatureError
		if err := b.Apply(t.Context(), w); !errors.As(err, &lacking) || lacking.Feature != ask.feature {
			t.Errorf("%s: %v; want that %s is lacking", name, err, ask.feature)
		}
		if left := control.objects(t, b.namespace); len(left) > 0 {
			t.Errorf("%s: refused, and left %q", name, left)
		}
	}
	for name, spoil := range map[string]func(w *backends.Workload){
		"a user below 0": func(w *backends.Workload) { w.Run.User = -1 },
		"a file in a file": func(w *backends.Workload) {
			w.Files = []backends.File{{To: "/x", Mode: 0o444}, {To: "/x/y", Mode: 0o444}}
		},
		"a file among processes":  func(w *backends.Workload) { w.Files = []backends.File{{To: "/proc/x", Mode: 0o444}} },
		"a path with a way round": func(w *backends.Workload) { w.Files = []backends.File{{To: "/x/../y", Mode: 0o444}} },
	} {
		w := workload("relay", "5")
		spoil(&w)
		var refused *refusal.Error
		if err := b.Apply(t.Context(), w); !errors.As(err, &refused) {
			t.Errorf("%s: %v; want a *refusal.Error", name, err)
		}
		if left := control.objects(t, b.namespace); len(left) > 0 {
			t.Errorf("%s: refused, and left %q", name, left)
		}
	}
	w := workload("relay", "5")
	w.Files = []backends.File{{To: "/etc/relay.toml", Mode: 0o444, Content: make([]byte, 2<<20)}}
	var start *backends.StartError
	if err := b.Apply(t.Context(), w); !errors.As(err, &start) {
		t.Errorf("a file that no ConfigMap holds: %v; want a *StartError", err)
	}
	w.Name = "relay,kmo/workload!=x"
	if err := b.Apply(t.Context(), w); !errors.As(err, &start) && err == nil {
		t.Errorf("a name that is a selector: %v", err)
	}
	b.remove(w.Name)
	if left := control.objects(t, b.namespace); len(left) > 0 {
		t.Errorf("refused, and left %q", left)
	}
}

// TestPortTaken: a node port that another workload has is waited for, and nothing is left of the one that waits.
func TestPortTaken(t *testing.T) {
	b := newBench(t)
	one, two := workload("one", "6"), workload("two", "7")
	one.Run.Ports = []backends.Port{{Name: "http", Port: 8080, Host: 31001}}
	two.Run.Ports = one.Run.Ports
	b.apply(one)
	s := b.running()
	if len(s.Addresses) != 1 || s.Addresses[0].Address != "127.0.0.1:31001" {
		t.Errorf("addresses %v, want port 31001 of the node", s.Addresses)
	}
	plainly(t, "a port that is taken", b.Apply(t.Context(), two))
	b.running() // and no other
	b.remove(one.Name)
	b.apply(two)
	b.running()
	b.remove(two.Name)
}

// TestAddresses: a port of the cluster is told under the Service's address.
func TestAddresses(t *testing.T) {
	b := newBench(t)
	w := workload("relay", "8")
	w.Run.Ports = []backends.Port{{Name: "a"}, {Name: "b", Port: 81}, {Name: "c"}}
	b.apply(w)
	s := b.running()
	for i, want := range []string{":20000", ":81", ":20001"} {
		if len(s.Addresses) != 3 || !strings.HasPrefix(s.Addresses[i].Address, "10.0.") || !strings.HasSuffix(s.Addresses[i].Address, want) {
			t.Errorf("addresses %v, want one of the cluster that ends in %s", s.Addresses, want)
		}
	}
	b.remove(w.Name)
}

// TestPodIsRestricted: everything that is had passes the strictest standard that a cluster has for pods.
func TestPodIsRestricted(t *testing.T) {
	b := newBench(t)
	control.must(t, http.MethodPatch, "/api/v1/namespaces/"+b.namespace, mergePatch, `{"metadata":{"labels":{"pod-security.kubernetes.io/enforce":"restricted"}}}`, nil)
	w := everything("9")
	w.Hooks.PreInit = [][]string{{"/app", "migrate"}}
	w.Run.Ports = append(w.Run.Ports, backends.Port{Name: "low", Port: 81})
	b.apply(w)
	b.running()
	b.remove(w.Name)

	root := workload("root", "9")
	root.Run.User = 0
	b.apply(root)
	s := b.until("why there is no pod", func(s backends.Status) bool { return strings.Contains(s.Detail, "violates PodSecurity") })
	if s.State != backends.Starting {
		t.Errorf("it is %+v, want it starting", s)
	}
	b.remove(root.Name)
}

// TestImageThatCannotBePulled is told while it is, and repaired by nothing but another image.
func TestImageThatCannotBePulled(t *testing.T) {
	b := newBench(t)
	w := workload("relay", "a")
	w.Image = backends.Image{Ref: "reg.example/bad@sha256:bad" + strings.Repeat("0", 58) + "bad"}
	b.apply(w)
	s := b.until("ImagePullBackOff", func(s backends.Status) bool {
		return strings.Contains(s.Detail, "ImagePullBackOff: Back-off pulling image")
	})
	if s.State != backends.Starting {
		t.Errorf("it is %+v, want it starting", s)
	}
	b.remove(w.Name)
	w.Hooks.PostInit = [][]string{{"/app"}}
	plainly(t, "an image that cannot be pulled, with hooks that wait for it", b.Apply(t.Context(), w))
	b.remove(w.Name)
}

// pod is the one pod there is.
func (b *bench) pod() (name string) {
	b.Helper()
	for _, one := range control.objects(b, b.namespace) {
		if rest, is := strings.CutPrefix(one, "pods/"); is {
			name = rest
		}
	}
	return name
}

// says makes the pod say something of its container.
func (b *bench) says(restarts int, state, last string) {
	b.Helper()
	control.must(b, http.MethodPatch, b.path(pods, b.pod())+"/status", mergePatch, fmt.Sprintf(
		`{"status":{"containerStatuses":[{"name":"app","image":"x","imageID":"","ready":false,"restartCount":%d,"state":%s,"lastState":%s}]}}`, restarts, state, last), nil)
}

// TestEnds: what a kubelet says of a container, and what is told.
func TestEnds(t *testing.T) {
	b := newBench(t)
	b.apply(workload("relay", "b"))
	b.running()
	const end = `{"terminated":{"exitCode":%d,"reason":"%s","message":"%s","startedAt":"2026-01-01T00:00:00Z","finishedAt":"2026-01-01T00:00:01Z"}}`
	for _, c := range []struct {
		state, last string
		want        backends.Status
	}{
		{`{"waiting":{"reason":"CrashLoopBackOff","message":"back-off 10s"}}`, fmt.Sprintf(end, 137, "OOMKilled", ""),
			backends.Status{State: backends.Backoff, ExitCode: 137, OOM: true, Detail: "its program ended with status 137, OOMKilled"}},
		{fmt.Sprintf(end, 3, "Error", ""), `{}`, backends.Status{State: backends.Backoff, ExitCode: 3, Detail: "its program ended with status 3"}},
		{`{"running":{"startedAt":"2026-01-01T00:00:00Z"}}`, fmt.Sprintf(end, 143, "Error", ""), backends.Status{State: backends.Running, ExitCode: 143}},
		{`{"waiting":{"reason":"CrashLoopBackOff"}}`, fmt.Sprintf(end, 128, "StartError", "exec /app: no such file"),
			backends.Status{State: backends.Backoff, ExitCode: 128, Detail: "its program ended with status 128, StartError: exec /app: no such file"}},
		{`{"waiting":{"reason":"RunContainerError","message":"exec /app: no such file"}}`, fmt.Sprintf(end, 128, "StartError", "exec /app: no such file"),
			backends.Status{State: backends.Backoff, ExitCode: 128, Detail: "its program ended with status 128, StartError: exec /app: no such file"}},
		{`{"waiting":{"reason":"CreateContainerConfigError","message":"no configmap"}}`, `{}`,
			backends.Status{State: backends.Starting, Detail: "CreateContainerConfigError: no configmap"}},
	} {
		b.says(4, c.state, c.last)
		s := b.status()
		if s.State != c.want.State || s.ExitCode != c.want.ExitCode || s.OOM != c.want.OOM || s.Detail != c.want.Detail || s.Restarts != 4 {
			t.Errorf("of %s, %s is told %+v; want %+v", c.state, c.last, s, c.want)
		}
	}
	b.remove(b.status().Name)
}

// TestRights: without them it is said which are wanted; a namespace that may not be made is named.
func TestRights(t *testing.T) {
	b := newBench(t)
	o := b.options
	o.Kubeconfig = control.account(t, b.namespace, "default")
	nobody := open(t, o)
	_, err := nobody.Observe(t.Context())
	plainly(t, "observe without rights", err)
	err = nobody.Apply(t.Context(), workload("relay", "c"))
	plainly(t, "apply without rights", err)
	if err == nil || !strings.Contains(err.Error(), "want the rights of the manifest") {
		t.Errorf("without rights it is said: %v", err)
	}
	o.Context = "nobody"
	_, err = open(t, o).Observe(t.Context())
	plainly(t, "observe as nobody", err)

	kmo, err := b.cluster()
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range []kind{nodes, namespaces, "api/v1/secrets", "apis/rbac.authorization.k8s.io/v1/roles"} {
		if err := kmo.list(t.Context(), k, "", nil); err == nil {
			t.Errorf("the manifest's account may list %s", k)
		}
	}
	o = Options{Kubeconfig: control.admin, Namespace: "made-for-it", State: t.TempDir()}
	made := &bench{t, open(t, o), o, o.Namespace}
	made.apply(workload("relay", "c"))
	made.running()
	made.remove(workload("relay", "c").Name)
}

// TestClusterIsDown: the API server is killed and comes back. Every call says so, plainly; nothing is doubled.
func TestClusterIsDown(t *testing.T) {
	b := newBench(t)
	w := everything("d")
	b.apply(w)
	before := b.running()
	control.kill("kube-apiserver")
	calls := map[string]func() error{
		"fingerprint": func() error { _, err := b.Fingerprint(t.Context()); return err },
		"observe":     func() error { _, err := b.Observe(t.Context()); return err },
		"apply":       func() error { return b.Apply(t.Context(), w) },
		"remove":      func() error { return b.Remove(t.Context(), w.Name) },
		"logs":        func() error { _, err := b.Logs(t.Context(), w.Name, backends.LogOptions{}); return err },
		"exec":        func() error { _, _, err := b.Exec(t.Context(), w.Name, []string{"x"}); return err },
	}
	for name, call := range calls {
		err := call()
		plainly(t, name, err)
		if err != nil && !strings.Contains(err.Error(), "does not answer") {
			t.Errorf("%s: %v; want that the cluster does not answer", name, err)
		}
	}
	_ = open(t, b.options) // it opens all the same
	control.restart("kube-apiserver")
	if err := control.ready(); err != nil {
		t.Fatal(err)
	}
	b.apply(w)
	if after := b.running(); !after.Started.Equal(before.Started) || after.Restarts != 0 {
		t.Errorf("it is %+v, was %+v", after, before)
	}
	b.remove(w.Name)
	if left := control.objects(t, b.namespace); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// child applies a workload and is killed in the middle of it.
func child() int {
	b, err := Open(Options{Kubeconfig: os.Getenv(childEnv), Namespace: os.Getenv("KMO_NAMESPACE"), State: os.Getenv("KMO_STATE")})
	if err == nil {
		err = b.Apply(context.Background(), everything("e"))
	}
	fmt.Println("not killed:", err)
	return 1
}

// TestKilledBetweenObjects kills the process that applies after each of its writes. What it left is seen, repaired, and cleared.
func TestKilledBetweenObjects(t *testing.T) {
	w := everything("e")
	for writes := int64(1); writes <= 4; writes++ { // files, two Services, Deployment
		for _, then := range []string{"repaired", "cleared"} {
			t.Run(fmt.Sprint(writes, " then ", then), func(t *testing.T) {
				b := newBench(t)
				b.killedAfter(writes)
				list, err := b.Observe(t.Context())
				if err != nil || len(list) != 1 || list[0].Name != w.Name || writes < 4 && (list[0].State != backends.Damaged || list[0].Detail == "") {
					t.Errorf("what was left is told as %+v, %v", list, err)
				}
				if then == "repaired" {
					b.apply(w)
					b.running()
				}
				b.remove(w.Name)
				if left := control.objects(t, b.namespace); len(left) > 0 {
					t.Errorf("left behind: %q", left)
				}
			})
		}
	}
}

// killedAfter runs a process that applies everything and dies, killed, when that many writes have been made.
func (b *bench) killedAfter(writes int64) {
	b.Helper()
	target, err := url.Parse(control.url)
	if err != nil {
		b.Fatal(err)
	}
	var made atomic.Int64
	reached := make(chan struct{})
	proxy := httputil.NewSingleHostReverseProxy(target)
	proxy.Transport = &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}} // of this test's own plane
	proxy.ModifyResponse = func(r *http.Response) error {
		if r.Request.Method == http.MethodPatch && !strings.Contains(r.Request.URL.RawQuery, "dryRun") && made.Add(1) == writes {
			close(reached)
			<-r.Request.Context().Done() // no answer is seen
		}
		return nil
	}
	server := httptest.NewTLSServer(proxy)
	defer server.Close()
	text, err := os.ReadFile(b.options.Kubeconfig)
	if err != nil {
		b.Fatal(err)
	}
	account := filepath.Join(b.TempDir(), "kubeconfig")
	through := strings.NewReplacer(control.url, server.URL, "certificate-authority: "+control.file("ca.crt"), "insecure-skip-tls-verify: true").Replace(string(text))
	if err := os.WriteFile(account, []byte(through), 0o600); err != nil {
		b.Fatal(err)
	}
	process := exec.Command(os.Args[0])
	process.Env = append(os.Environ(), childEnv+"="+account, "KMO_NAMESPACE="+b.namespace, "KMO_STATE="+b.options.State)
	out, err := process.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := process.Start(); err != nil {
		b.Fatal(err)
	}
	said := make(chan string, 1)
	go func() {
		text, _ := io.ReadAll(out)
		said <- string(text)
	}()
	select {
	case <-reached:
	case text := <-said:
		b.Fatalf("it ended by itself: %s", text)
	case <-time.After(time.Minute):
		b.Errorf("it has not made %d writes", writes)
	}
	_ = process.Process.Kill()
	_ = process.Wait()
}

// TestCancelled ends the context of Apply and Remove at moments from at once to well after.
func TestCancelled(t *testing.T) {
	b := newBench(t)
	w := everything("f")
	for _, after := range []time.Duration{0, 1, 3, 10, 30, 100} {
		within := func(call func(context.Context) error) {
			ctx, cancel := context.WithTimeout(t.Context(), after*time.Millisecond)
			defer cancel()
			if err := call(ctx); err != nil && !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("after %d ms: %v, want the context's end", after, err)
			}
		}
		within(func(ctx context.Context) error { return b.Apply(ctx, w) })
		b.apply(w)
		b.running()
		within(func(ctx context.Context) error { return b.Remove(ctx, w.Name) })
		b.remove(w.Name)
		if left := control.objects(t, b.namespace); len(left) > 0 {
			t.Errorf("cancelled after %d ms: left behind: %q", after, left)
		}
	}
}
