package machine

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi2"
	"github.com/getkin/kin-openapi/openapi2conv"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/legacy"
	"go.yaml.in/yaml/v4"

	"github.com/kindos/kmo/backends/microvm/channel"
)

// descriptionVariable names the file of Firecracker's published description, firecracker.yaml.
const descriptionVariable = "KMO_FIRECRACKER_API"

// TestMain makes this binary a Firecracker that has no processor, when it is called as one.
func TestMain(m *testing.M) {
	if i := slices.Index(os.Args, "--api-sock"); i > 0 && i+1 < len(os.Args) {
		if err := pretend(os.Args[i+1]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// described is the description as something that finds and checks requests.
func described(path string) (routers.Router, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var tree any
	if err := yaml.Unmarshal(text, &tree); err != nil {
		return nil, err
	}
	if text, err = json.Marshal(worded(tree)); err != nil {
		return nil, err
	}
	var old openapi2.T
	if err := json.Unmarshal(text, &old); err != nil {
		return nil, err
	}
	// A value of the description that contradicts it is no matter of ours.
	document, err := openapi2conv.ToV3(&old)
	if err != nil {
		return nil, err
	}
	document.Servers = nil
	return legacy.NewRouter(document)
}

// worded makes the numbers that are keys in YAML, status codes, the words that JSON wants.
func worded(tree any) any {
	switch t := tree.(type) {
	case map[any]any:
		words := map[string]any{}
		for key, value := range t {
			words[fmt.Sprint(key)] = worded(value)
		}
		return words
	case map[string]any:
		for key := range t {
			t[key] = worded(t[key])
		}
	case []any:
		for i := range t {
			t[i] = worded(t[i])
		}
	}
	return tree
}

// pretender answers as the description says, and calls the host by vsock as a guest would.
type pretender struct {
	router routers.Router

	mu    sync.Mutex // guards what follows
	state string
	made  map[string]map[string]any // by path
}

func pretend(socket string) error {
	router, err := described(os.Getenv(descriptionVariable))
	if err != nil {
		return err
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	return http.Serve(listener, &pretender{router: router, state: "Not started", made: map[string]map[string]any{}})
}

func (p *pretender) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	defer p.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	refuse := func(err error) {
		w.WriteHeader(http.StatusBadRequest)
		_ = json.NewEncoder(w).Encode(map[string]string{"fault_message": err.Error()})
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		refuse(err)
		return
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	fmt.Fprintf(os.Stderr, "%s %s %s\n", r.Method, r.URL.Path, body)
	if err := p.check(r, body); err != nil {
		refuse(err)
		return
	}
	if r.Method == http.MethodGet {
		_ = json.NewEncoder(w).Encode(map[string]string{"app_name": "Firecracker", "id": "kmo", "state": p.state, "vmm_version": "pretended"})
		return
	}
	said := map[string]any{}
	if err = json.Unmarshal(body, &said); err == nil {
		err = p.take(r.URL.Path, said)
	}
	if err != nil {
		refuse(err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// check holds a request against the description.
func (p *pretender) check(r *http.Request, body []byte) error {
	route, parameters, err := p.router.FindRoute(r)
	if err != nil {
		return fmt.Errorf("%s %s: %v", r.Method, r.URL.Path, err)
	}
	err = openapi3filter.ValidateRequest(r.Context(), &openapi3filter.RequestValidationInput{Request: r, PathParams: parameters, Route: route})
	if err != nil {
		return err
	}
	return unknown(route, body)
}

// unknown refuses what the description has no word for, as Firecracker does, and the description does not say.
func unknown(route *routers.Route, body []byte) error {
	if route.Operation.RequestBody == nil {
		return nil
	}
	said := map[string]any{}
	if err := json.Unmarshal(body, &said); err != nil {
		return err
	}
	schema := route.Operation.RequestBody.Value.Content.Get("application/json").Schema.Value
	for key := range said {
		if schema.Properties[key] == nil {
			return fmt.Errorf("unknown field %q", key)
		}
	}
	return nil
}

// take does what a request asks for. What makes a machine must come before its start, and not after.
func (p *pretender) take(path string, said map[string]any) error {
	if path != "/actions" {
		if p.state != "Not started" {
			return errors.New("the requested operation is not supported after starting the microVM")
		}
		p.made[path] = said
		return nil
	}
	if p.made["/boot-source"] == nil {
		return errors.New("cannot start microvm without kernel configuration")
	}
	for path, key := range map[string]string{"/boot-source": "kernel_image_path", "/drives/base": "path_on_host"} {
		at, _ := p.made[path][key].(string)
		f, err := os.Open(at)
		if err != nil {
			return err
		}
		_ = f.Close()
	}
	p.state = "Running"
	socket, _ := p.made["/vsock"]["uds_path"].(string)
	go func() {
		if err := guest(socket); err != nil {
			fmt.Fprintln(os.Stderr, "guest:", err)
			os.Exit(1)
		}
	}()
	return nil
}

// guest calls the host, says hello, and answers a connection to a port by the port's number.
func guest(socket string) error {
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	stream, err := net.Dial("unix", fmt.Sprintf("%s_%d", socket, channel.Vsock))
	if err != nil {
		return err
	}
	if err := channel.Open(stream, channel.MaxToGuest).Send(channel.Hello, 0, nil); err != nil {
		return err
	}
	for {
		conn, err := listener.Accept()
		if err != nil {
			return err
		}
		r := bufio.NewReader(conn)
		line, err := r.ReadString('\n')
		if err != nil {
			return err
		}
		if line != fmt.Sprintf("CONNECT %d\n", channel.Publish) {
			return fmt.Errorf("asked for %q", line)
		}
		if _, err := io.WriteString(conn, "OK 1073741824\n"); err != nil {
			return err
		}
		port, err := r.ReadString('\n')
		if err != nil {
			return err
		}
		if _, err := io.WriteString(conn, "port "+port); err != nil {
			return err
		}
		_ = conn.Close()
	}
}

// description is where the published description lies. It is not ours to bring along: a test without it says so.
func description(t *testing.T) string {
	t.Helper()
	for _, path := range []string{os.Getenv(descriptionVariable), "../../../.cache/firecracker.yaml", "../../../../shared/data/firecracker-api.yaml", "../../../../../shared/data/firecracker-api.yaml"} {
		at, err := filepath.Abs(path)
		if path == "" || err != nil {
			continue
		}
		if _, err := os.Stat(at); err == nil {
			return at
		}
	}
	t.Skipf("nothing was checked: Firecracker's description is not there: set %s to the file src/firecracker/swagger/firecracker.yaml of its repository, or put it at .cache/firecracker.yaml", descriptionVariable)
	return ""
}

// made is a machine of the pretender's, which has a user of its own where this process may give it one.
func made(t *testing.T, c Config) (*Firecracker, error) {
	t.Helper()
	described, everybody := description(t), t.TempDir()
	c.Dir = t.TempDir()
	t.Chdir(c.Dir)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program, known := filepath.Join(everybody, "firecracker"), filepath.Join(everybody, "description")
	for to, from := range map[string]string{program: self, known: described} {
		text, err := os.ReadFile(from)
		if err = errors.Join(err, os.WriteFile(to, text, 0o755)); err != nil {
			t.Fatal(err)
		}
	}
	for at := everybody; at != filepath.Clean(os.TempDir()) && os.Geteuid() == 0; at = filepath.Dir(at) {
		if err := os.Chmod(at, 0o755); err != nil {
			t.Fatal(err)
		}
		c.User = Group + 1
	}
	for _, path := range []*string{&c.Kernel, &c.Initrd, &c.Disk} {
		f, err := os.CreateTemp(t.TempDir(), "")
		if err != nil {
			t.Fatal(err)
		}
		if *path = f.Name(); f.Close() != nil {
			t.Fatal("a file is not written")
		}
	}
	f := &Firecracker{Program: program, environment: []string{descriptionVariable + "=" + known}}
	t.Cleanup(func() {
		if said := f.Stop(); t.Failed() {
			t.Log(said)
		}
	})
	return f, f.Create(t.Context(), c)
}

func TestFirecrackerByItsDescription(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := listener.Addr().(*net.TCPAddr).Port
	if err := listener.Close(); err != nil {
		t.Fatal(err)
	}
	f, err := made(t, Config{CPUs: 2, Memory: 128, Forwards: []Forward{{"127.0.0.1", port, 8080}}})
	if err != nil {
		t.Fatal(err)
	}
	state := func(want string) {
		t.Helper()
		answer, err := f.client.Get("http://firecracker/")
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		var got struct{ State string }
		if err := json.NewDecoder(answer.Body).Decode(&got); err != nil || got.State != want {
			t.Errorf("state is %q, %v; want %q", got.State, err, want)
		}
	}
	state("Not started")
	var found syscall.Stat_t
	if err := syscall.Stat(fmt.Sprint("/proc/", f.started.Process.Pid), &found); err != nil || int(found.Uid) != f.config.User {
		t.Errorf("its user is %d, %v; want %d", found.Uid, err, f.config.User)
	}
	if err := f.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	state("Running")
	stream, err := f.Connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if frame, err := channel.Open(stream, channel.MaxToHost).Receive(); err != nil || frame.Kind != channel.Hello {
		t.Errorf("the guest says %v, %v", frame, err)
	}
	conn, err := net.Dial("tcp", fmt.Sprint("127.0.0.1:", port))
	if err != nil {
		t.Fatal(err)
	}
	if said, err := io.ReadAll(conn); err != nil || string(said) != "port 8080\n" {
		t.Errorf("through the port came %q, %v", said, err)
	}
	if err := f.ask(t.Context(), f.requests(Config{CPUs: 1, Memory: 128})[0]); err == nil || !strings.Contains(err.Error(), "after starting") {
		t.Errorf("a machine that runs took another configuration: %v", err)
	}
}

// The description is held against what is wrong, too: otherwise the test above would not say much.
func TestFirecrackerRefuses(t *testing.T) {
	f, err := made(t, Config{CPUs: 33, Memory: 128})
	if err == nil || !strings.Contains(err.Error(), "PUT /machine-config: 400") || !strings.Contains(err.Error(), "vcpu_count") {
		t.Errorf("33 processors: %v", err)
	}
	for _, r := range []request{
		{http.MethodPut, "/boot-source", map[string]any{"boot_args": "no kernel"}},
		{http.MethodPut, "/vsock", map[string]any{"guest_cid": 1, "uds_path": "vsock"}},
		{http.MethodPut, "/actions", map[string]any{"action_type": "Explode"}},
		{http.MethodPut, "/nowhere", map[string]any{}},
	} {
		if err := f.ask(t.Context(), r); err == nil {
			t.Errorf("%v was taken", r)
		}
	}
	if err := f.Start(t.Context()); err == nil || !strings.Contains(err.Error(), "without kernel") {
		t.Errorf("start without a kernel: %v", err)
	}
}

// Who waits for a guest's call learns that the machine has ended, or the wait.
func TestFirecrackerGone(t *testing.T) {
	f, err := made(t, Config{CPUs: 1, Memory: 128})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.started.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Connect(t.Context()); err == nil {
		t.Error("a machine that is gone has called")
	}
	f, err = made(t, Config{CPUs: 1, Memory: 128})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := f.Connect(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("waiting for a call that does not come: %v", err)
	}
}
