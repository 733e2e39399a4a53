package docker

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/docker/plan"
	"github.com/kindos/kmo/registry/merkle"
)

// hanging is a socket in front of an engine's. Behind it a request to remove an image hangs; each sends what lets it go when it is closed.
func hanging(t *testing.T, d *daemon) (socket string, asked <-chan chan struct{}) {
	t.Helper()
	socket = filepath.Join(d.dir, "hanging.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	hung := make(chan chan struct{}, 10)
	through := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) { r.Out.URL.Scheme, r.Out.URL.Host = "http", "engine" },
		Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", d.socket)
		}},
		FlushInterval: -1,
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodDelete && strings.Contains(r.URL.Path, "/images/") {
			goOn := make(chan struct{})
			hung <- goOn
			select {
			case <-goOn:
			case <-r.Context().Done():
				return
			}
		}
		through.ServeHTTP(w, r)
	})}
	go func() { _ = server.Serve(l) }() // until it is closed
	t.Cleanup(func() { _ = server.Close() })
	return socket, hung
}

// An engine that does not answer when it is to remove an image holds nobody for longer than the bound, and others only who want that image.
func TestImageRemovalHangs(t *testing.T) {
	images := []backends.Image{content(t), content(t)}
	if err := os.WriteFile(filepath.Join(images[1].Content, "etc", "other"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	relay := func(spec byte, image int) backends.Workload {
		w := unit("relay", images[image], "wait")
		w.Spec = merkle.Digest{spec}
		return w
	}
	each(t, func(t *testing.T, d *daemon) {
		state := t.TempDir()
		socket, asked := hanging(t, d)
		b, err := Open(Options{Name: d.name, Socket: socket, State: state})
		if err != nil {
			t.Fatal(err)
		}
		b.dropTime = time.Hour
		if err := b.Apply(t.Context(), relay(1, 0)); err != nil {
			t.Fatal(err)
		}
		applied := make(chan error, 1)
		go func() { applied <- b.Apply(t.Context(), relay(2, 1)) }()
		goOn := <-asked
		if err := b.Apply(t.Context(), unit("other", images[1], "wait")); err != nil {
			t.Errorf("applying another while an image is being removed: %v", err)
		}
		brief, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := b.Apply(brief, unit("third", images[0], "wait")); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("applying what has the image that is being removed: %v, want its context's end", err)
		}
		close(goOn)
		if err := <-applied; err != nil {
			t.Error(err)
		}
		cancelledRemoval(t, b, unit("third", images[0], "wait"), asked)
		b.dropTime = time.Second
		if err := errors.Join(b.Remove(t.Context(), "other-00000001"), b.Apply(t.Context(), relay(3, 0)), b.Remove(t.Context(), "relay-00000001")); err != nil {
			t.Errorf("while no image can be removed: %v", err)
		}
		if got := len(asked); got != 2 {
			t.Errorf("%d images were to be removed, want 2", got)
		}
		if err := b.Close(); err != nil {
			t.Error(err)
		}
		b = open(t, d.name, state) // which clears what is left
		for deadline := time.Now().Add(time.Minute); len(leaks(t, d, state)) > 0 && time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		}
		over(t, d, b, state)
	})
}

// cancelledRemoval ends the context of a Remove while the image is being removed, which is removed all the same.
func cancelledRemoval(t *testing.T, b *Backend, w backends.Workload, asked <-chan chan struct{}) {
	t.Helper()
	if err := b.Apply(t.Context(), w); err != nil {
		t.Fatal(err)
	}
	id := b.entry(w.Name).imageID()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	removed := make(chan struct{})
	go func() {
		defer close(removed)
		_ = b.Remove(ctx, w.Name) // done or not
	}()
	goOn := <-asked
	cancel()
	close(goOn)
	<-removed
	if there, err := b.has(t.Context(), id, nil); there || err != nil {
		t.Errorf("after a removal that was given up its image is there: %t; %v", there, err)
	}
}

// An engine that went away just after a start has not damaged what it started.
func TestFaultOver(t *testing.T) {
	b := &Backend{options: Options{State: t.TempDir()}}
	e := b.fresh("relay-00000001")
	e.running = true
	e.fail(errors.New("docker does not answer"))
	if e.record.Fault == "" {
		t.Error("it is not told at once")
	}
	if err := b.postInit(t.Context(), e); err != nil || e.record.Fault != "" {
		t.Errorf("after it has been applied again its fault is %q; %v", e.record.Fault, err)
	}
}

// A record that a power cut has left empty costs what it said, and no more.
func TestEmptyRecord(t *testing.T) {
	b := &Backend{options: Options{State: t.TempDir(), Logger: slog.New(slog.DiscardHandler)}}
	w := hooked(backends.Image{})
	labels, err := json.Marshal(w)
	at := filepath.Join(b.fresh(w.Name).dir, "record.json")
	if err := errors.Join(err, os.MkdirAll(filepath.Dir(at), 0o700), os.WriteFile(at, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	e, err := b.recall(container.Summary{State: container.StateExited, Labels: map[string]string{
		plan.LabelRole: plan.RoleWorkload, plan.LabelName: w.Name, plan.LabelWorkload: string(labels), plan.LabelPorts: "[]",
	}})
	if err != nil || !e.known() || !e.record.Pending {
		t.Errorf("got %+v; %v; want the workload, whose hooks are due", e, err)
	}
}
