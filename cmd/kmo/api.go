package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/reconciler"
)

// Status is what `kmo status` shows.
type Status struct {
	Site      string            `json:"site"`
	Branch    string            `json:"branch"`
	Zone      string            `json:"zone"`
	Version   string            `json:"version"`
	Agent     bool              `json:"agent"` // an agent is running; else this is what the journal and the backends say
	Record    reconciler.Record `json:"record"`
	Workloads []reconciler.Have `json:"workloads"`
	Error     string            `json:"error,omitempty"`   // why the agent's last look came to no outcome: the record is of one before it
	Trouble   string            `json:"trouble,omitempty"` // why the workloads could not be listed
}

// api is what the other commands ask of a host: over its agent's socket, or of a host opened for the one command. A reconcile that is asked for
// ends with running, not with the request: who has stopped waiting stops no try.
func (h *host) api(running context.Context) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", h.healthy)
	mux.HandleFunc("GET /metrics", h.metrics)
	mux.HandleFunc("GET /status", answer(func(r *http.Request) (any, error) { return h.status(r.Context()) }))
	mux.HandleFunc("GET /plan", answer(func(r *http.Request) (any, error) { return h.plan(r.Context(), r.FormValue("revision")) }))
	mux.HandleFunc("GET /explain", answer(func(r *http.Request) (any, error) { return h.explain(r.Context(), r.FormValue("revision")) }))
	mux.HandleFunc("GET /decision", answer(func(r *http.Request) (any, error) {
		return h.evaluate(r.Context(), r.FormValue("revision"), r.FormValue("trace") == "true")
	}))
	h.logAPI(mux)
	mux.HandleFunc("POST /reconcile", answer(func(*http.Request) (any, error) { return h.reconcile(running) }))
	mux.HandleFunc("GET /logs", h.logs)
	return mux
}

// fault is an error as it crosses the socket.
type fault struct {
	Text     string           `json:"text"`
	Refusals []*refusal.Error `json:"refusals,omitempty"`
}

// answer makes an HTTP handler of a function that returns a JSON value.
func answer(f func(*http.Request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		value, err := f(r)
		if err != nil {
			reply(w, err)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(value)
	}
}

func reply(w http.ResponseWriter, err error) {
	code := http.StatusBadGateway
	switch {
	case errors.Is(err, backends.ErrNotFound):
		code = http.StatusNotFound
	case refusal.Of(err) != nil:
		code = http.StatusUnprocessableEntity
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(fault{Text: err.Error(), Refusals: refusal.All(err)})
}

// logs streams what a workload wrote. A unit's name stands for its newest workload.
func (h *host) logs(w http.ResponseWriter, r *http.Request) {
	tail, _ := strconv.Atoi(r.FormValue("tail")) // the client checked it; 0 is all
	reader, err := h.openLogs(r.Context(), r.FormValue("name"), backends.LogOptions{Tail: tail, Follow: r.FormValue("follow") == "true"})
	if err != nil {
		reply(w, err)
		return
	}
	defer func() { _ = reader.Close() }()
	stop := context.AfterFunc(r.Context(), func() { _ = reader.Close() })
	defer stop()
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Trailer", cutShort)
	if _, err := io.Copy(flushing{w}, reader); err != nil && r.Context().Err() == nil {
		w.Header().Set(cutShort, err.Error())
	}
}

// cutShort is the trailer that says why a stream has ended before its end.
const cutShort = "Kmo-Cut-Short"

// whole is the body of an answer, whose end is an error if it was cut short.
type whole struct {
	io.ReadCloser
	response *http.Response
}

func (w whole) Read(p []byte) (int, error) {
	n, err := w.ReadCloser.Read(p)
	if why := w.response.Trailer.Get(cutShort); why != "" && errors.Is(err, io.EOF) {
		err = fmt.Errorf("cut short: %s", why)
	}
	return n, err
}

// flushing sends each write at once.
type flushing struct{ http.ResponseWriter }

func (f flushing) Write(p []byte) (int, error) {
	n, err := f.ResponseWriter.Write(p)
	if flusher, ok := f.ResponseWriter.(http.Flusher); ok {
		flusher.Flush()
	}
	return n, err
}

// client asks a host's API.
type client struct {
	http  http.Client
	close func() error
	agent bool
}

// dial returns a client of the agent that runs over the state folder, or else opens the host for this one command. An agent that is
// just starting is waited for.
func dial(ctx context.Context, flags *hostFlags) (*client, error) {
	return onceFree(ctx, func() (*client, error) { return dialOnce(ctx, flags) })
}

func dialOnce(ctx context.Context, flags *hostFlags) (*client, error) {
	socket := filepath.Join(flags.state, "agent.sock")
	connection, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "unix", socket)
	if err == nil {
		_ = connection.Close()
		transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		}}
		return &client{http: http.Client{Transport: transport}, close: func() error { transport.CloseIdleConnections(); return nil }, agent: true}, nil
	}
	if flags.glances {
		return glance(flags)
	}
	if flags.log {
		return openLog(flags)
	}
	h, err := openHost(ctx, &hostFlags{config: flags.config, state: flags.state, makes: flags.makes, command: true}, os.Stderr)
	if err != nil {
		return nil, err
	}
	transport := &local{handler: h.api(ctx)}
	return &client{http: http.Client{Transport: transport}, close: func() error {
		transport.running.Wait() // it works with what is closed next
		return h.close()
	}}, nil
}

// glance answers what the status is from the journal alone: it takes no lock and starts no plugin, so that it can be asked every second,
// and an agent can start meanwhile.
func glance(flags *hostFlags) (*client, error) {
	config, err := loadConfig(flags.config)
	if err != nil {
		return nil, err
	}
	if err := claim(flags.state, false); err != nil {
		return nil, err
	}
	h := &host{config: config, journal: reconciler.FileJournal{Path: filepath.Join(flags.state, "journal.json")}}
	status := answer(func(r *http.Request) (any, error) {
		s, err := h.status(r.Context())
		s.Trouble = "not looked at while no agent is running; 'kmo status' without --watch does"
		return s, err
	})
	return &client{http: http.Client{Transport: &local{handler: status}}, close: func() error { return nil }}, nil
}

// local answers requests by calling the handler.
type local struct {
	handler http.Handler
	running sync.WaitGroup // requests
}

// RoundTrip runs the handler and streams what it writes.
func (l *local) RoundTrip(request *http.Request) (*http.Response, error) {
	reader, writer := io.Pipe()
	started := make(chan *http.Response, 1)
	w := &pipeResponse{header: http.Header{}, body: writer, started: started, response: &http.Response{
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Request: request, Body: reader, ContentLength: -1,
	}}
	l.running.Go(func() {
		l.handler.ServeHTTP(w, request)
		w.WriteHeader(http.StatusOK)
		_ = writer.Close()
	})
	select {
	case response := <-started:
		return response, nil
	case <-request.Context().Done():
		_ = reader.Close() // nobody reads what the handler still writes
		return nil, context.Cause(request.Context())
	}
}

// pipeResponse is the handler's side of local.
type pipeResponse struct {
	header   http.Header
	body     *io.PipeWriter
	response *http.Response
	started  chan *http.Response
	done     bool
}

func (p *pipeResponse) Header() http.Header { return p.header }

func (p *pipeResponse) WriteHeader(code int) {
	if p.done {
		return
	}
	p.done = true
	p.response.StatusCode, p.response.Status, p.response.Header, p.response.Trailer = code, http.StatusText(code), p.header, p.header
	p.started <- p.response
}

func (p *pipeResponse) Write(b []byte) (int, error) {
	p.WriteHeader(http.StatusOK)
	return p.body.Write(b)
}

// do makes a request and returns the body of a good answer; the caller closes it.
func (c *client) do(ctx context.Context, method, path string, query url.Values) (io.ReadCloser, error) {
	request, err := http.NewRequestWithContext(ctx, method, "http://kmo"+path+"?"+query.Encode(), nil)
	if err != nil {
		return nil, err
	}
	response, err := c.http.Do(request)
	if err != nil {
		return nil, fmt.Errorf("asking the agent: %w", err)
	}
	if response.StatusCode == http.StatusOK {
		return whole{response.Body, response}, nil
	}
	defer func() { _ = response.Body.Close() }()
	text, err := io.ReadAll(io.LimitReader(response.Body, 1<<20))
	if err != nil {
		return nil, err
	}
	var f fault
	if err := json.Unmarshal(text, &f); err != nil || f.Text == "" {
		return nil, fmt.Errorf("the agent answers %s: %s", response.Status, refusal.Clip(string(text), 200))
	}
	var all []error
	for _, one := range f.Refusals {
		all = append(all, one)
	}
	if len(all) > 0 {
		return nil, errors.Join(all...)
	}
	return nil, errors.New(f.Text)
}

// get decodes a JSON answer into value, and returns its bytes for those who want them as they are.
func (c *client) get(ctx context.Context, method, path string, query url.Values, value any) error {
	body, err := c.do(ctx, method, path, query)
	if err != nil {
		return err
	}
	defer func() { _ = body.Close() }()
	text, err := io.ReadAll(body)
	if err != nil {
		return err
	}
	return json.NewDecoder(bytes.NewReader(text)).Decode(value)
}
