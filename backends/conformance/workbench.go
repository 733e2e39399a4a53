package conformance

import (
	"bufio"
	"cmp"
	"crypto/sha3"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/plugin"
	"github.com/kindos/kmo/registry/merkle"
)

// route is a way to reach a backend: the value itself, or the same over gRPC.
type route struct {
	name string
	via  func(t *testing.T, b backends.Backend) (seen backends.Backend, hangUp func())
}

// bench is one check's place of work.
type bench struct {
	*testing.T
	subject Subject
	route   route
	format  backends.Format
	able    backends.Fingerprint
	backend backends.Backend
	end     func() // of the present process
	names   []string

	patience time.Duration
	proven   map[backends.Feature]bool // what the checks of this format have exercised
}

func newBench(t *testing.T, subject Subject, route route, format backends.Format) *bench {
	b := &bench{T: t, subject: subject, route: route, format: format, patience: cmp.Or(subject.Patience, 20*time.Second)}
	b.reopen()
	able, err := b.backend.Fingerprint(t.Context())
	if err != nil {
		t.Fatalf("fingerprint: %v", err)
	}
	b.able = able
	t.Cleanup(func() { b.end() })
	return b
}

// has says whether the fingerprint has a feature, which the check that asks then exercises.
func (b *bench) has(f backends.Feature) bool {
	if !b.able.Has(f) {
		return false
	}
	b.proven[f] = true
	return true
}

// reopen ends the present process, if there is one, and begins another over the same state.
func (b *bench) reopen() {
	b.Helper()
	if b.end != nil {
		b.end()
	}
	value := b.subject.Open(b.T)
	seen, hangUp := b.route.via(b.T, value)
	b.backend = seen
	b.end = func() {
		hangUp()
		if closer, ok := value.(io.Closer); ok {
			if err := closer.Close(); err != nil {
				b.Errorf("close: %v", err)
			}
		}
		b.end = func() {}
	}
}

// clear removes what the check applied and looks for leaks.
func (b *bench) clear() {
	b.Helper()
	for _, name := range b.names {
		b.remove(name)
	}
	if left := b.observe(); len(left) > 0 {
		b.Errorf("after removing all, observe lists %v", names(left))
	}
	if b.subject.Leaks != nil {
		if left := b.subject.Leaks(b.T); len(left) > 0 {
			b.Errorf("left behind: %q", left)
		}
	}
}

// unit is a workload of a unit whose program runs the steps. It asks for nothing that the fingerprint lacks.
func (b *bench) unit(unit string, steps ...string) backends.Workload {
	w := backends.Workload{
		Unit: unit, Backend: b.able.Backend, Tier: 3, Format: b.format, Image: b.subject.Images[b.format],
		Run: backends.Run{Args: steps, User: b.subject.User, Grace: 2 * time.Second},
	}
	if w.Run.User == 0 {
		w.Run.User = 65532
	}
	if b.format == backends.OCI || b.format == backends.LXC {
		w.Image.Config.Entrypoint = []string{"/app"}
	}
	if b.able.Has(backends.LimitCPU) {
		w.Resources.CPU = 1000
	}
	if b.able.Has(backends.LimitMemory) {
		w.Resources.Memory = 128 << 20
	}
	if b.able.Has(backends.LimitPIDs) {
		w.Resources.PIDs = 64
	}
	return w
}

// seal gives a workload its spec and its name.
func seal(w backends.Workload) backends.Workload {
	cover := w
	cover.Name, cover.Spec, cover.Backend, cover.Image.Content = "", merkle.Digest{}, "", ""
	text, err := json.Marshal(cover)
	if err != nil {
		panic(err) // a Workload always has a JSON form
	}
	w.Spec = merkle.Digest(sha3.Sum256(text))
	w.Name = w.Unit + "-" + w.Spec.Short()
	return w
}

// apply seals and applies a workload, which must succeed, and returns it sealed.
func (b *bench) apply(w backends.Workload) backends.Workload {
	b.Helper()
	w = seal(w)
	b.names = append(b.names, w.Name)
	if err := b.backend.Apply(b.Context(), w); err != nil {
		b.Fatalf("apply %s: %v", w.Name, err)
	}
	return w
}

func (b *bench) remove(name string) {
	b.Helper()
	if err := b.backend.Remove(b.Context(), name); err != nil {
		b.Fatalf("remove %s: %v", name, err)
	}
}

func (b *bench) observe() []backends.Status {
	b.Helper()
	list, err := b.backend.Observe(b.Context())
	if err != nil {
		b.Fatalf("observe: %v", err)
	}
	if !slices.IsSortedFunc(list, func(x, y backends.Status) int { return strings.Compare(x.Name, y.Name) }) {
		b.Errorf("observe is not sorted by name: %v", names(list))
	}
	return list
}

// status is what Observe says of one workload; ok is false if it lists none of that name.
func (b *bench) status(name string) (s backends.Status, ok bool) {
	b.Helper()
	for _, s := range b.observe() {
		if s.Name == name {
			return s, true
		}
	}
	return backends.Status{}, false
}

// until observes one workload until it is as wanted.
func (b *bench) until(name, wanted string, is func(backends.Status) bool) backends.Status {
	b.Helper()
	var last backends.Status
	b.poll("workload "+name+" "+wanted, func() (string, bool) {
		last, _ = b.status(name)
		return fmt.Sprintf("%+v", last), is(last)
	})
	return last
}

// up waits until the program of a workload, whose last step is wait, has come to that. Where there is none the workload is there, and no more.
func (b *bench) up(name string) backends.Status {
	b.Helper()
	switch b.subject.Programs {
	case Played:
		return b.until(name, "running, as it says", running)
	case Real, Imagined:
		b.line(name, "waiting")
		return b.until(name, "running", running)
	}
	s, ok := b.status(name)
	if !ok || running(s) {
		b.Fatalf("%s is %+v, want it listed, and not as running: nothing runs", name, s)
	}
	return s
}

// poll asks until it is answered true, or fails with what was seen last.
func (b *bench) poll(wanted string, ask func() (seen string, ok bool)) {
	b.Helper()
	deadline := time.Now().Add(b.patience)
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		seen, ok := ask()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			b.Fatalf("%s: not within %v; last seen: %s", wanted, b.patience, seen)
		}
		time.Sleep(pause)
	}
}

func running(s backends.Status) bool { return s.State == backends.Running }

// log is everything that a workload has written so far.
func (b *bench) log(name string) string {
	b.Helper()
	text, err := b.logs(name, backends.LogOptions{})
	if err != nil {
		b.Fatalf("logs of %s: %v", name, err)
	}
	return text
}

func (b *bench) logs(name string, options backends.LogOptions) (string, error) {
	r, err := b.backend.Logs(b.Context(), name, options)
	if err != nil {
		return "", err
	}
	defer r.Close()
	text, err := io.ReadAll(r)
	return string(text), err
}

// follow begins to follow a log, and returns what waits for the end of it and tells all that it said.
func (b *bench) follow(name string) (end func() string) {
	b.Helper()
	r, err := b.backend.Logs(b.Context(), name, backends.LogOptions{Follow: true})
	if err != nil {
		b.Fatalf("following the log of %s: %v", name, err)
	}
	b.Cleanup(func() { _ = r.Close() }) // it has ended, or the test has failed
	said := make(chan string, 1)
	go func() {
		text, err := io.ReadAll(r)
		if err != nil {
			text = fmt.Append(text, "error: ", err)
		}
		said <- string(text)
	}()
	return func() (text string) {
		b.Helper()
		select {
		case text = <-said:
		case <-time.After(b.patience):
			b.Fatalf("the log of %s goes on although the workload is removed", name)
		}
		return text
	}
}

// line waits until a workload has written a line that starts with prefix, and returns the rest of the last such line.
func (b *bench) line(name, prefix string) string {
	b.Helper()
	var found string
	b.poll("log of "+name+" with a line "+prefix, func() (string, bool) {
		text := b.log(name)
		ok := false
		for lines := bufio.NewScanner(strings.NewReader(text)); lines.Scan(); {
			if rest, has := strings.CutPrefix(lines.Text(), prefix); has {
				found, ok = strings.TrimPrefix(rest, " "), true
			}
		}
		return text, ok
	})
	return found
}

// get fetches a page of a workload.
func get(address string) (string, error) {
	client := http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	answer, err := client.Get("http://" + address + "/")
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	return string(body), err
}

func names(list []backends.Status) []string {
	var names []string
	for _, s := range list {
		names = append(names, s.Name)
	}
	return names
}
func routes() []route {
	return []route{
		{"value", func(_ *testing.T, b backends.Backend) (backends.Backend, func()) { return b, func() {} }},
		{"wire", func(t *testing.T, b backends.Backend) (backends.Backend, func()) {
			seen, hangUp, err := plugin.InProcess(b)
			if err != nil {
				t.Fatal(err)
			}
			return seen, hangUp
		}},
	}
}
