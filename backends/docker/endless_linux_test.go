package docker

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/docker/engine"
	"github.com/kindos/kmo/backends/docker/plan"
)

// upgrade begins the answer with which a connection becomes a stream.
const upgrade = "HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n"

// endless is a door behind which what begins with start goes on without end, for every request that ends so; others are answered as given.
type endless struct {
	path, start, more string
	status            int
	others            map[string]string
	sent              atomic.Int64 // the most that anybody has taken
}

func (e *endless) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body)
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Server", "Docker/1")
	if !strings.HasSuffix(r.URL.Path, e.path) {
		for path, text := range e.others {
			if strings.HasSuffix(r.URL.Path, path) {
				_, _ = io.WriteString(w, text)
				return
			}
		}
		if strings.HasSuffix(r.URL.Path, "/events") {
			<-r.Context().Done()
			return
		}
		http.Error(w, `{"message":"no such container"}`, http.StatusNotFound)
		return
	}
	to := io.Writer(w)
	if e.status == http.StatusSwitchingProtocols {
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			panic(err)
		}
		defer conn.Close()
		to = conn
	} else {
		w.WriteHeader(e.status)
	}
	n, err := io.WriteString(to, e.start)
	for sent := int64(n); err == nil; sent += int64(n) {
		if n, err = io.WriteString(to, e.more); sent > e.sent.Load() {
			e.sent.Store(sent)
		}
	}
}

func (e *endless) open(t *testing.T) *Backend {
	t.Helper()
	socket := filepath.Join(engines[Docker].dir, "endless.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: e, ReadHeaderTimeout: time.Minute}
	go func() { _ = server.Serve(l) }() // until it is closed
	t.Cleanup(func() { _ = server.Close() })
	b, err := Open(Options{Name: Docker, Socket: socket, State: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	return b
}

// An engine that answers without end is not listened to for ever, nor is what it says kept in memory.
func TestEndlessAnswers(t *testing.T) {
	up(t, Docker) // for its folder
	image := content(t)
	long := strings.Repeat("a", 1<<16)
	others := map[string]string{"/info": `{"ServerVersion":"1"}`, "/containers/json": "[]", "/images/json": "[]", "/exec": `{"Id":"1"}`}
	apply := func(b *Backend) error { return b.Apply(t.Context(), unit("relay", image, "wait")) }
	observe := func(b *Backend) error { _, err := b.Observe(t.Context()); return err }
	exec := func(b *Backend) error {
		if err := b.ready(t.Context()); err != nil { // which clears the folder of a workload that it does not know
			return err
		}
		_, _, err := b.exec(t.Context(), b.fresh("relay"), "1", []string{"/app"}, &engine.Output{})
		return err
	}
	for name, c := range map[string]struct {
		path, start, more string
		status            int
		ask               func(b *Backend) error
	}{
		"a list":              {"/containers/json", `["`, long, 200, observe},
		"a list of many":      {"/containers/json", `[{}`, strings.Repeat(",{}", 1<<14), 200, observe},
		"what it can do":      {"/info", `{"Name":"`, long, 200, observe},
		"spaces":              {"/info", ` `, strings.Repeat(" ", 1<<16), 200, observe},
		"an error":            {"/info", `{"message":"`, long, 500, observe},
		"a container":         {"/kmo-relay-00000001/json", `{"Id":"`, long, 200, func(b *Backend) error { _, err := b.inspect(t.Context(), "kmo-relay-00000001"); return err }},
		"an image":            {"/json", `{"Id":"`, long, 200, func(b *Backend) error { _, err := b.has(t.Context(), "sha256:00", nil); return err }},
		"what it has loaded":  {"/images/load", `{"stream":"`, long, 200, apply},
		"steps of a load":     {"/images/load", "{}", strings.Repeat("{\"stream\":\"a\"}\n", 1<<10), 200, apply},
		"what it has created": {"/exec", `{"Id":"`, long, 200, exec},
		"a handshake":         {"/start", upgrade + "A: ", long, 101, exec},
	} {
		t.Run(name, func(t *testing.T) {
			d := &endless{path: c.path, start: c.start, more: c.more, status: c.status, others: others}
			b := d.open(t)
			err := c.ask(b)
			if plain(t, "asking", err); err == nil || !strings.Contains(err.Error(), "longer than") && !strings.Contains(err.Error(), "message (> ") {
				t.Errorf("error %v, want one that says how long an answer may be", err)
			}
			if sent := d.sent.Load(); sent > engine.MaxAnswer+8<<20 { // what lies in buffers
				t.Errorf("%d bytes were taken of it", sent)
			}
		})
	}
}

// A log that is asked for as a whole is bounded too, and one that is followed is not.
func TestEndlessLog(t *testing.T) {
	up(t, Docker)
	w := unit("relay", backends.Image{}, "wait")
	frame := "\x01\x00\x00\x00\x00\x00\x40\x00" + "2026-01-01T00:00:00Z " + strings.Repeat("a", 1<<14-22) + "\n"
	d := &endless{path: "/logs", more: frame, status: 200, others: map[string]string{"/info": `{}`, "/images/json": "[]"}}
	labels, err := json.Marshal(w)
	if err != nil {
		t.Fatal(err)
	}
	list, err := json.Marshal([]map[string]any{{"Id": "1", "State": "running", "Labels": map[string]string{
		plan.LabelRole: plan.RoleWorkload, plan.LabelName: w.Name, plan.LabelWorkload: string(labels), plan.LabelPorts: "[]",
	}}})
	if err != nil {
		t.Fatal(err)
	}
	d.others["/containers/json"] = string(list)
	b := d.open(t)
	if _, err := b.Logs(t.Context(), w.Name, backends.LogOptions{}); err == nil || !strings.Contains(err.Error(), "longer than") {
		t.Errorf("a log without end: %v, want an error that says how long it may be", err)
	}
	log, err := b.Logs(t.Context(), w.Name, backends.LogOptions{Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	if n, err := io.CopyN(io.Discard, log, 2*engine.MaxAnswer); err != nil {
		t.Errorf("of a log that is followed %d bytes were read: %v", n, err)
	}
	if err := log.Close(); err != nil {
		t.Error(err)
	}
}

// What a command writes is no answer: only the caller's patience bounds it.
func TestEndlessExec(t *testing.T) {
	up(t, Docker)
	frame := "\x01\x00\x00\x00\x00\x00\x40\x00" + strings.Repeat("a", 1<<14)
	d := &endless{path: "/start", start: upgrade + "\r\n", more: frame, status: 101, others: map[string]string{"/info": `{}`, "/containers/json": "[]", "/images/json": "[]", "/exec": `{"Id":"1"}`}}
	b := d.open(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		for d.sent.Load() < 2*engine.MaxAnswer && ctx.Err() == nil {
			time.Sleep(time.Millisecond)
		}
		cancel()
	}()
	if _, _, err := b.exec(ctx, b.fresh("relay"), "1", []string{"/app"}, &engine.Output{Most: maxOutput}); !errors.Is(err, context.Canceled) {
		t.Errorf("a command that writes without end: %v, want its context's end", err)
	}
}
