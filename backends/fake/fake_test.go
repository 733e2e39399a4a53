package fake_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/conformance"
	"github.com/kindos/kmo/backends/fake"
)

func TestConformance(t *testing.T) {
	content := t.TempDir()
	conformance.Test(t, func(t *testing.T) conformance.Subject {
		dir := t.TempDir()
		program := &imagined{t: t, servers: map[string]bool{}}
		able := fake.Able()
		able.Features = slices.DeleteFunc(able.Features, func(f backends.Feature) bool {
			return f == backends.LimitCPU || f == backends.LimitMemory || f == backends.LimitPIDs // nothing real is used, so nothing can bite
		})
		var present *fake.Backend
		return conformance.Subject{
			Open: func(*testing.T) backends.Backend {
				present = &fake.Backend{Dir: dir, Print: able, Program: program.run}
				return spoiled(present)
			},
			Images: map[backends.Format]backends.Image{
				backends.OCI: {Content: content}, backends.LXC: {Content: content}, backends.WASM: {Content: content},
				backends.AppImage: {Content: content}, backends.Native: {Content: content},
			},
			Leaks: func(t *testing.T) []string {
				entries, err := os.ReadDir(dir)
				if err != nil {
					t.Fatal(err)
				}
				var left []string
				for _, entry := range entries {
					if entry.Name() != "kept.json" {
						left = append(left, entry.Name())
					}
				}
				return left
			},
			Kill:     func(_ *testing.T, s backends.Status) { present.Kill(s.Name) },
			Programs: conformance.Imagined,
			Damage:   func(_ *testing.T, w backends.Workload) { present.Damage(w.Name, "a byte of the base has changed") },
		}
	})
}

// imagined is the suite's test program without a process.
type imagined struct {
	t       *testing.T
	servers map[string]bool // by address; they outlive their workloads
}

func (i *imagined) run(p *fake.Process) (code int, ended bool) {
	if p.Argv == nil { // it is told to stop
		fmt.Fprintln(&p.Out, "stopped")
		return 0, true
	}
	for _, step := range p.Argv {
		verb, rest, _ := strings.Cut(step, " ")
		switch verb {
		case "exit":
			code, _ := strconv.Atoi(rest)
			return code, true
		case "tick":
			return 0, false
		case "wait":
			fmt.Fprintln(&p.Out, "waiting")
			return 0, false
		default:
			i.step(p, verb, rest)
		}
	}
	return 0, true
}

func (i *imagined) step(p *fake.Process, verb, rest string) {
	path, text, _ := strings.Cut(rest, " ")
	var err error
	said := "ok"
	switch verb {
	case "/app":
		return
	case "say", "warn":
		fmt.Fprintln(&p.Out, rest)
		return
	case "args":
		fmt.Fprintf(&p.Out, "args %q\n", p.Argv[len(p.Argv)-len(p.Workload.Run.Args):])
		return
	case "dir":
		fmt.Fprintln(&p.Out, "dir", p.Workload.Run.Dir)
		return
	case "id":
		fmt.Fprintln(&p.Out, "id", p.Workload.Run.User, p.Workload.Run.User)
		return
	case "env":
		for _, pair := range p.Env {
			fmt.Fprintln(&p.Out, "env", pair)
		}
		fmt.Fprintln(&p.Out, "env end")
		return
	case "serve":
		i.serve(p)
		return
	case "cat":
		var content []byte
		content, err = p.Read(path)
		said = strconv.Quote(string(content))
	case "mode":
		said = "0440"
	case "write":
		err = p.Write(path, []byte(text))
	case "append":
		err = i.append(p, path, text)
	case "fill":
		size, _ := strconv.Atoi(text)
		err = p.Write(path, make([]byte, size))
	default:
		i.t.Errorf("unknown step %q", verb)
	}
	if err != nil {
		said = "error: " + err.Error()
	}
	fmt.Fprintf(&p.Out, "%s %s: %s\n", verb, path, said)
}

func (i *imagined) append(p *fake.Process, path, text string) error {
	before, _ := p.Read(path)
	return p.Write(path, append(slices.Clone(before), text...))
}

func (i *imagined) serve(p *fake.Process) {
	address := p.Addresses[0].Address
	if i.servers[address] {
		return
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		i.t.Error(err)
		return
	}
	i.servers[address] = true
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "serve http") })}
	go server.Serve(listener)
	i.t.Cleanup(func() { server.Close() })
}

// sleeper is a workload of the fake's own tests.
func sleeper(name string) backends.Workload {
	return backends.Workload{Name: name, Unit: "relay", Format: backends.Native, Image: backends.Image{Content: "imaginary"}}
}

func TestFaults(t *testing.T) {
	lost := errors.New("the connection is lost")
	tests := []struct {
		name   string
		before error
		after  error
		exists bool
	}{
		{"before the effect", lost, nil, false},
		{"after the effect", nil, lost, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			once := func(err error) func(context.Context, string, string) error {
				return func(_ context.Context, call, name string) error {
					if call == "Apply" && name == "relay-1" {
						return err
					}
					return nil
				}
			}
			b := &fake.Backend{Before: once(tt.before), After: once(tt.after)}
			if err := b.Apply(t.Context(), sleeper("relay-1")); !errors.Is(err, lost) {
				t.Errorf("apply: error %v, want %v", err, lost)
			}
			list, err := b.Observe(t.Context())
			if err != nil || (len(list) == 1) != tt.exists {
				t.Errorf("observe: %v, error %v; exists should be %t", list, err, tt.exists)
			}
			if got := b.Calls("Apply"); got != 1 {
				t.Errorf("Apply was called %d times, want 1", got)
			}
		})
	}
}

func TestHang(t *testing.T) {
	b := &fake.Backend{Before: func(ctx context.Context, _, _ string) error {
		<-ctx.Done()
		return context.Cause(ctx)
	}}
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("enough")
	cancel(why)
	if err := b.Apply(ctx, sleeper("relay-1")); !errors.Is(err, context.Canceled) {
		t.Errorf("apply: error %v, want context.Canceled", err)
	}
}

// TestBackoff has time pass by the test's hand alone.
func TestBackoff(t *testing.T) {
	now := time.Unix(1000, 0)
	b := &fake.Backend{Now: func() time.Time { return now }, Pause: time.Second}
	if err := b.Apply(t.Context(), sleeper("relay-1")); err != nil {
		t.Fatal(err)
	}
	for restarts, pause := range []time.Duration{1, 2, 4} {
		if !b.Kill("relay-1") {
			t.Fatal("nothing to kill")
		}
		now = now.Add(pause*time.Second - 1)
		want(t, b, backends.Backoff, restarts)
		now = now.Add(1)
		want(t, b, backends.Running, restarts+1)
	}
	if !b.Damage("relay-1", "spilt coffee") {
		t.Fatal("nothing to damage")
	}
	want(t, b, backends.Damaged, 3)
	if err := b.Apply(t.Context(), sleeper("relay-1")); err != nil {
		t.Fatal(err)
	}
	want(t, b, backends.Running, 3)
	if b.Kill("relay-2") || b.Damage("relay-2", "") {
		t.Error("what does not exist was killed or damaged")
	}
}

func want(t *testing.T, b *fake.Backend, state backends.State, restarts int) {
	t.Helper()
	list, err := b.Observe(t.Context())
	if err != nil || len(list) != 1 || list[0].State != state || list[0].Restarts != restarts {
		t.Errorf("observe: %+v, error %v; want %s with %d restarts", list, err, state, restarts)
	}
}

func BenchmarkObserve(b *testing.B) {
	for _, n := range []int{10, 100, 1000} {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			backend := &fake.Backend{}
			for i := range n {
				if err := backend.Apply(b.Context(), sleeper(fmt.Sprint("relay-", i))); err != nil {
					b.Fatal(err)
				}
			}
			for b.Loop() {
				if list, err := backend.Observe(b.Context()); err != nil || len(list) != n {
					b.Fatal(len(list), err)
				}
			}
		})
	}
}
