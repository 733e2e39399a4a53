//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kindos/kmo/reconciler"
)

// world is the demo's stage with the built binary for agent: real git pushes, a registry in this process, programs of this host.
type world struct {
	demo
	t testing.TB
}

// newWorld makes the stage; extra is more of agent.yaml. Nothing runs yet.
func newWorld(t testing.TB, extra string) *world {
	t.Helper()
	b := binaries(t)
	dir, err := os.MkdirTemp("", "kmo-world-") // short: sockets lie below it
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, demo: demo{out: io.Discard, dir: dir, self: b.kmo, programs: b.programs, backend: "native", begun: time.Now()}}
	t.Cleanup(w.end)
	if err := os.Mkdir(filepath.Join(dir, "keys"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range append(people(), "edge-1") {
		if _, err := newKey(w.key(name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.serveImages(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := w.buildSite(t.Context()); err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(dir, "agent.yaml")
	text, err := os.ReadFile(config)
	if err == nil {
		err = os.WriteFile(config, append(text, extra...), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// end stops the agent and removes what it ran; nothing may be left.
func (w *world) end() {
	if w.agent != nil && w.agent.ProcessState == nil {
		ending := syscall.SIGTERM
		if w.t.Failed() {
			ending = syscall.SIGQUIT // and say what it was doing
		}
		_ = w.agent.Process.Signal(ending)
		_ = w.agent.Wait() // however it ended
	}
	if err := clear(binaries(w.t), w.state()); err != nil {
		w.t.Errorf("removing the workloads: %v", err)
	}
	if w.t.Failed() {
		log, _ := os.ReadFile(filepath.Join(w.dir, "agent.log"))
		w.t.Logf("the agent's log:\n%s", log[max(0, len(log)-50000):])
	}
	if err := os.RemoveAll(w.dir); err != nil {
		w.t.Error(err)
	}
}

// start starts the agent, appending to one log.
func (w *world) start() {
	w.t.Helper()
	log, err := os.OpenFile(filepath.Join(w.dir, "agent.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		w.t.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	w.agent = exec.Command(w.self, "agent", "--config", filepath.Join(w.dir, "agent.yaml"), "--state", w.state()) // killed by hand
	w.agent.Stderr = log
	if err := w.agent.Start(); err != nil {
		w.t.Fatal(err)
	}
}

// stop ends the agent as systemd would.
func (w *world) stop() {
	_ = w.agent.Process.Signal(syscall.SIGTERM)
	_ = w.agent.Wait()
}

// write writes files of the site and commits them as alice, without pushing; it returns the commit.
func (w *world) write(message string, files map[string]string) string {
	w.t.Helper()
	for name, text := range files {
		path := filepath.Join(w.dir, "site", name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			w.t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			w.t.Fatal(err)
		}
	}
	w.must("add", "-A")
	w.must("commit", "-q", "-S", "--allow-empty", "-m", message)
	return strings.TrimSpace(w.must("rev-parse", "HEAD"))
}

// must runs git in the site as alice.
func (w *world) must(args ...string) string {
	w.t.Helper()
	out, err := w.git(w.t.Context(), args...)
	if err != nil {
		w.t.Fatal(err)
	}
	return out
}

func (w *world) push() {
	w.t.Helper()
	w.must("push", "-q", "origin", "main")
}

// accept has the whole site approved by bob and carol, and pushed.
func (w *world) accept() string {
	w.t.Helper()
	if err := w.approve(w.t.Context(), "none", "approve the site", "bob", "carol"); err != nil {
		w.t.Fatal(err)
	}
	return strings.TrimSpace(w.must("rev-parse", "HEAD"))
}

// until waits for a record; what names it.
func (w *world) until(what string, limit time.Duration, done func(reconciler.Record) bool) reconciler.Record {
	w.t.Helper()
	journal := reconciler.FileJournal{Path: filepath.Join(w.state(), "journal.json")}
	deadline := time.Now().Add(limit)
	for {
		rec, err := journal.Load()
		if err == nil && done(rec) {
			return rec
		}
		if time.Now().After(deadline) {
			text, _ := json.MarshalIndent(rec, "", "  ")
			w.t.Fatalf("after %v there is no %s; the journal says (%v):\n%s", limit, what, err, text)
		}
		time.Sleep(500 * time.Microsecond)
	}
}

// converged waits until the host runs a commit, and well.
func (w *world) converged(commit string) reconciler.Record {
	w.t.Helper()
	return w.until("convergence to "+commit, 30*time.Second, func(rec reconciler.Record) bool {
		return rec.Good == commit && rec.Outcome == reconciler.Converged && rec.Trying == ""
	})
}

// status is what the agent says over its socket.
func (w *world) status() (Status, error) {
	var s Status
	client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(w.state(), "agent.sock"))
	}}}
	response, err := client.Get("http://agent/status") // bounded by the client
	if err != nil {
		return s, err
	}
	defer func() { _ = response.Body.Close() }()
	if response.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(response.Body)
		return s, fmt.Errorf("status: %s: %s", response.Status, text)
	}
	err = json.NewDecoder(response.Body).Decode(&s)
	return s, err
}

// get asks a unit's first port.
func (w *world) get(unit, path string) (string, error) {
	s, err := w.status()
	if err != nil {
		return "", err
	}
	for _, have := range s.Workloads {
		if have.Unit() != unit || len(have.Addresses) == 0 {
			continue
		}
		client := http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
		response, err := client.Get("http://" + have.Addresses[0].Address + path) // bounded by the client
		if err != nil {
			return "", err
		}
		text, err := io.ReadAll(response.Body)
		return string(bytes.TrimSpace(text)), cmpErr(err, response.Body.Close())
	}
	return "", fmt.Errorf("%s has no address", unit)
}

func cmpErr(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// began is when a unit's program executed its first instruction, as it says itself.
func (w *world) began(unit string) time.Time {
	w.t.Helper()
	text, err := w.get(unit, "/began")
	if err != nil {
		w.t.Fatal(err)
	}
	ns, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		w.t.Fatal(err)
	}
	return time.Unix(0, ns)
}
