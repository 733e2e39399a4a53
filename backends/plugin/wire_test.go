package plugin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/fake"
	"github.com/kindos/kmo/backends/plugin/wire"
	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/registry/merkle"
)

// TestErrorsKeepTheirMeaning sends each kind of error over the wire, bare and wrapped.
func TestErrorsKeepTheirMeaning(t *testing.T) {
	feature := &backends.FeatureError{Backend: "fake", Feature: backends.Keep, Detail: "no disk"}
	start := &backends.StartError{Workload: "relay-1", Stage: "preInit [/app]", Output: "one\ntwo\n", Cause: "exit status 9"}
	one := &refusal.Error{Code: "E_DRIFT", Subject: "relay-1", Got: "a", Want: "b"}
	two := &refusal.Error{Code: "KT001", Subject: "relay-2"}
	tests := []struct {
		name string
		err  error
		is   func(error) bool
	}{
		{"not found", backends.ErrNotFound, func(err error) bool { return errors.Is(err, backends.ErrNotFound) }},
		{"feature", feature, func(err error) bool {
			var got *backends.FeatureError
			return errors.As(err, &got) && *got == *feature
		}},
		{"start", start, func(err error) bool {
			var got *backends.StartError
			return errors.As(err, &got) && *got == *start
		}},
		{"refusal", one, func(err error) bool { return cmp.Equal(refusal.Of(err), one) }},
		{"refusals", errors.Join(one, two), func(err error) bool { return cmp.Equal(refusal.All(err), []*refusal.Error{one, two}) }},
		{"cancelled", context.Canceled, func(err error) bool { return errors.Is(err, context.Canceled) }},
		{"deadline", context.DeadlineExceeded, func(err error) bool { return errors.Is(err, context.DeadlineExceeded) }},
		{"ordinary", errors.New("the disk is on fire"), func(err error) bool {
			return errors.Unwrap(err) == nil && refusal.Of(err) == nil
		}},
	}
	for _, tt := range tests {
		for _, err := range []error{tt.err, fmt.Errorf("applying: %w", tt.err)} {
			b, hangUp, openErr := InProcess(&fake.Backend{Before: func(context.Context, string, string) error { return err }})
			if openErr != nil {
				t.Fatal(openErr)
			}
			got := b.Apply(t.Context(), workload("relay-1"))
			if got == nil || !tt.is(got) || got.Error() != line(err.Error()) {
				t.Errorf("%s: sent %q, got %T %q", tt.name, err, got, got)
			}
			_, got = b.Logs(t.Context(), "relay-1", backends.LogOptions{})
			if got == nil || !tt.is(got) {
				t.Errorf("%s, of a stream: sent %q, got %T %q", tt.name, err, got, got)
			}
			hangUp()
		}
	}
}

// TestOwnContext: what ends a call is told as the caller's own context tells it.
func TestOwnContext(t *testing.T) {
	over := make(chan struct{})
	b, hangUp, err := InProcess(&fake.Backend{Before: func(context.Context, string, string) error {
		<-over // whatever its own context says
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer hangUp()
	defer close(over)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := b.Remove(ctx, "relay-1"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v, want context.DeadlineExceeded", err)
	}
}

// TestRoundTrip sends values in which every field is set.
func TestRoundTrip(t *testing.T) {
	status := backends.Status{
		Name: "relay-1", Spec: merkle.Digest{1, 2}, State: backends.Backoff, Content: "/images/relay",
		Addresses: []backends.Address{{Port: "http", Address: "127.0.0.1:8080"}}, PID: 77, Started: time.Unix(5, 6).UTC(),
		Restarts: 8, ExitCode: 137, OOM: true, Usage: backends.Usage{Memory: 9, CPU: 10, PIDs: 11},
		Unapplied: []string{"landlock: the kernel has none"}, Detail: "spilt coffee",
	}
	print := backends.Fingerprint{
		Backend: "fake", Version: "1.2", Formats: []backends.Format{backends.OCI}, Platforms: []string{"linux/amd64"},
		Isolation: backends.IsolationSandbox, Features: []backends.Feature{backends.Keep}, Missing: []string{"devices: none"},
	}
	b, hangUp, err := InProcess(&canned{print: print, list: []backends.Status{status}})
	if err != nil {
		t.Fatal(err)
	}
	defer hangUp()
	gotPrint, err := b.Fingerprint(t.Context())
	if diff := cmp.Diff(print, gotPrint); err != nil || diff != "" {
		t.Errorf("fingerprint: error %v, difference %s", err, diff)
	}
	gotList, err := b.Observe(t.Context())
	if diff := cmp.Diff([]backends.Status{status}, gotList); err != nil || diff != "" {
		t.Errorf("status: error %v, difference %s", err, diff)
	}
}

// canned always says the same.
type canned struct {
	backends.Backend
	print backends.Fingerprint
	list  []backends.Status
}

func (c *canned) Fingerprint(context.Context) (backends.Fingerprint, error) { return c.print, nil }
func (c *canned) Observe(context.Context) ([]backends.Status, error)        { return c.list, nil }

// TestUnknownFieldIsRefused: a workload of a newer agent may ask for something this plugin would ignore.
func TestUnknownFieldIsRefused(t *testing.T) {
	for _, text := range []string{`{"name":"relay-1","nuclear":true}`, `{"name":"a"} {"name":"b"}`, `{"name":`, `[]`, ``} {
		s := &served{backend: &fake.Backend{}}
		if _, err := s.Apply(t.Context(), &wire.ApplyRequest{Workload: []byte(text)}); err == nil || !strings.Contains(err.Error(), "workload document") {
			t.Errorf("workload %q: error %v", text, err)
		}
	}
}

// FuzzWorkload: U-44 what reads as a workload is written and read again the same.
func FuzzWorkload(f *testing.F) {
	text, err := json.Marshal(workload("relay-1"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(`{"name":"a","files":[{"to":"/x","mode":420,"content":"AA=="}],"overlay":{"keep":["/k"]}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		w, err := readWorkload(text)
		if err != nil {
			return
		}
		first, err := json.Marshal(w)
		if err != nil {
			t.Fatal(err)
		}
		again, err := readWorkload(first)
		if err != nil {
			t.Fatalf("%s: %v", first, err)
		}
		second, _ := json.Marshal(again)
		if string(first) != string(second) {
			t.Errorf("%s is %s when read again", first, second)
		}
	})
}

// FuzzAnswers: U-44 no bytes of a plugin bring the agent down, and what is accepted keeps to the contract.
func FuzzAnswers(f *testing.F) {
	text, err := proto.Marshal(&wire.ObserveAnswer{Workloads: []*wire.Status{{Name: "a", Spec: make([]byte, 32), State: "running"}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	fault, err := proto.Marshal(fromError(&refusal.Error{Code: "E_X", Subject: "s"}))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(fault)
	f.Fuzz(func(t *testing.T, text []byte) {
		var answer wire.ObserveAnswer
		if proto.Unmarshal(text, &answer) == nil {
			if list, err := toStatuses(answer.Workloads); err == nil {
				for i, s := range list {
					if i > 0 && list[i-1].Name >= s.Name || s.State == "" || strings.ContainsAny(s.Detail, "\n\x1b") {
						t.Errorf("accepted %+v", s)
					}
				}
			}
		}
		var fault wire.Fault
		if proto.Unmarshal(text, &fault) == nil {
			if err := toError(&fault); err != nil && strings.ContainsRune(err.Error(), '\x1b') {
				t.Errorf("an error not fit to be shown: %q", err)
			}
		}
	})
}

// BenchmarkObserve asks a plugin's process for its workloads, over the wire as it is.
func BenchmarkObserve(b *testing.B) {
	for _, n := range []int{10, 100, 1000} {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			c := open(b, options(b, "fake", b.TempDir()))
			for i := range n {
				w := workload(fmt.Sprintf("relay-%08x", i))
				w.Run.Ports = []backends.Port{{Name: "http"}}
				if err := c.Apply(b.Context(), w); err != nil {
					b.Fatal(err)
				}
			}
			for b.Loop() {
				if list, err := c.Observe(b.Context()); err != nil || len(list) != n {
					b.Fatal(len(list), err)
				}
			}
		})
	}
}

// BenchmarkStart starts a plugin's process, shakes hands and ends it; it tells what such a process has resident when idle.
func BenchmarkStart(b *testing.B) {
	var resides int64
	for b.Loop() {
		c, err := Open(b.Context(), options(b, "fake", b.TempDir()))
		if err != nil {
			b.Fatal(err)
		}
		if _, err := c.Fingerprint(b.Context()); err != nil {
			b.Fatal(err)
		}
		resides = resident(c.present.proc.cmd.Process)
		c.Close()
	}
	b.ReportMetric(float64(resides)/(1<<20), "MiB-resident")
}
