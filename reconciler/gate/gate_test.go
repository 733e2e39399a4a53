package gate

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kindos/kmo/backends"
)

// script answers Observe from a list of states, a letter a call: r running, b backoff, x nothing there, e the backend does not answer,
// R running after a restart, s starting. The last letter goes on for ever.
func script(letters string) func(context.Context) (map[string]backends.Status, error) {
	calls := 0
	return func(context.Context) (map[string]backends.Status, error) {
		letter := letters[min(calls, len(letters)-1)]
		calls++
		status := backends.Status{Name: "relay-1", State: backends.Running}
		switch letter {
		case 'R':
			status.Restarts = 1
		case 'b':
			status.State, status.ExitCode, status.OOM = backends.Backoff, 137, true
		case 's':
			status.State = backends.Starting
		case 'x':
			return map[string]backends.Status{}, nil
		case 'e':
			return nil, errors.New("connection refused")
		}
		return map[string]backends.Status{"relay-1": status}, nil
	}
}

func TestVerdicts(t *testing.T) {
	probe := Probe{Every: time.Second, Start: 3 * time.Second, After: 2, Failures: 3}
	for _, test := range []struct {
		name, script string
		bake         time.Duration
		want         Verdict
		evidence     string
		took         time.Duration
	}{
		{"passes at once", "r", 0, Pass, "", time.Second},
		{"bakes", "r", 10 * time.Second, Pass, "", 11 * time.Second},
		{"starts slowly", "bbbbr", 0, Pass, "", 0},
		{"hooks that outlast the start time", strings.Repeat("s", 40) + "r", 0, Pass, "", 0},
		{"never begins", "s", 0, Fail, "no verdict in time; last seen: fail: its program is starting", 100 * time.Second},
		{"never starts", "b", 0, Fail, "3 times in a row: its program is backoff: it ended with status 137, for want of memory", 0},
		{"P-02 applied is not running", "x", 0, Fail, "the workload is not there", 0},
		{"fails while it bakes", "rrrrbbb", time.Minute, Fail, "3 times in a row", 0},
		{"a blip while it bakes", "rrrbrrr", 10 * time.Second, Pass, "", 0},
		{"a blip when its bake ends", strings.Repeat("r", 10) + "bbrr", 9500 * time.Millisecond, Pass, "", 13 * time.Second},
		{"no data when its bake ends", strings.Repeat("r", 10) + "eerr", 9500 * time.Millisecond, Pass, "", 13 * time.Second},
		{"restarted while it bakes", "rrrRRR", time.Minute, Fail, "its program ended and was started again", 0},
		{"bakes beyond the deadline", "r", time.Hour, NoData, "no verdict in time; last seen: pass, and baking for 1h0m0s", 100 * time.Second},
		{"no data", "e", 0, NoData, "last seen: no data: connection refused", 100 * time.Second},
		{"no data resets a streak, then passes", "rerr", 0, Pass, "", 0},
		{"flaps until the deadline, ends failing", strings.Repeat("rb", 200) + "b", 0, Fail, "", 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				begun := time.Now()
				got := Gate{Observe: script(test.script)}.Watch(t.Context(),
					[]Target{{Workload: "relay-1", Unit: "relay", Probe: probe, Bake: test.bake, Deadline: 100 * time.Second}})
				if got.Verdict != test.want || !strings.Contains(got.Evidence, test.evidence) {
					t.Errorf("got %+v, want %s with %q", got, test.want, test.evidence)
				}
				if took := time.Since(begun); test.took != 0 && took != test.took {
					t.Errorf("took %v, want %v", took, test.took)
				}
			})
		})
	}
}

// TestAVerdictEndsAWatch: the next watch of the same target has the whole of its own time.
func TestAVerdictEndsAWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := Gate{Observe: script("rbr"), Patience: 15 * time.Second, Memory: make(Memory)}
		needed := []Target{{Workload: "relay-1", Probe: Probe{Every: time.Second}, Deadline: time.Minute}}
		for range 2 {
			if got := g.Watch(t.Context(), needed); got.Verdict != Pass {
				t.Errorf("got %+v, want a pass", got)
			}
			time.Sleep(time.Hour)
		}
	})
}

// TestSharedLooks watches many targets whose host takes a while to look at: the looks must not be as many as the targets, and none that
// was begun before a target asked may answer it.
func TestSharedLooks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n, took = 1000, 10 * time.Millisecond
		looks, begun := 0, time.Now()
		observe := func(context.Context) (map[string]backends.Status, error) {
			state := backends.Running
			if looks++; time.Since(begun) < time.Second {
				state = backends.Starting
			}
			time.Sleep(took)
			all := map[string]backends.Status{}
			for i := range n {
				all[fmt.Sprint(i)] = backends.Status{State: state}
			}
			return all, nil
		}
		var targets []Target
		for i := range n {
			targets = append(targets, Target{Workload: fmt.Sprint(i), Probe: Probe{Every: 100 * time.Millisecond}})
		}
		if got := (Gate{Observe: observe}).Watch(t.Context(), targets); got.Verdict != Pass {
			t.Fatalf("got %+v, want a pass", got)
		}
		if least := time.Second + took; time.Since(begun) < least {
			t.Errorf("passed after %v, before a look that began when all ran was over, %v", time.Since(begun), least)
		}
		if most := 60; looks > most {
			t.Errorf("%d looks for %d targets, want at most %d", looks, n, most)
		}
	})
}

func TestOneFailureDecidesForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		observe := func(context.Context) (map[string]backends.Status, error) {
			return map[string]backends.Status{"good-1": {State: backends.Running}, "bad-1": {State: backends.Exited, ExitCode: 3}}, nil
		}
		begun := time.Now()
		got := Gate{Observe: observe}.Watch(t.Context(), []Target{
			{Workload: "good-1", Unit: "good", Bake: time.Hour},
			{Workload: "bad-1", Unit: "bad", Probe: Probe{Start: time.Millisecond}},
		})
		if got.Verdict != Fail || got.Unit != "bad" || !strings.Contains(got.Evidence, "ended with status 3") {
			t.Errorf("got %+v, want bad to fail", got)
		}
		if took := time.Since(begun); took > time.Minute {
			t.Errorf("took %v: it waited for the good one's bake", took)
		}
	})
}

func TestCancelledContextJudgesNothing(t *testing.T) {
	for _, letters := range []string{"r", "b", "x"} {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(20*time.Second, cancel)
			got := Gate{Observe: script(letters)}.Watch(ctx,
				[]Target{{Workload: "relay-1", Probe: Probe{Start: time.Hour}, Bake: time.Hour}})
			if got.Verdict != NoData {
				t.Errorf("script %q: got %+v, want no data", letters, got)
			}
		})
	}
}

func TestCancelledProbeJudgesNothing(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	exec := func(ctx context.Context, _ Target) (int, []byte, error) {
		cancel()
		<-ctx.Done()
		return 0, nil, ctx.Err()
	}
	got := Gate{Observe: script("r"), Exec: exec}.Once(ctx, []Target{{Workload: "relay-1", Probe: Probe{Kind: Exec, Argv: []string{"/app"}}}})
	if len(got) != 1 || got[0].Verdict != NoData {
		t.Errorf("got %+v, want no data", got)
	}
}

func TestProbes(t *testing.T) {
	mux := http.NewServeMux()
	mux.HandleFunc("/good", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("/bad", func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "boom \x1b[31m", http.StatusInternalServerError)
	})
	mux.HandleFunc("/teapot", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) })
	mux.HandleFunc("/away", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/bad", http.StatusFound) })
	mux.HandleFunc("/slow", func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	server := httptest.NewServer(mux)
	defer server.Close()
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = closed.Close()
	g := Gate{
		Observe: func(context.Context) (map[string]backends.Status, error) {
			return map[string]backends.Status{"relay-1": {State: backends.Running, Addresses: []backends.Address{
				{Port: "http", Address: server.Listener.Addr().String()}, {Port: "closed", Address: closed.Addr().String()},
			}}}, nil
		},
		Exec: func(ctx context.Context, target Target) (int, []byte, error) {
			switch target.Probe.Argv[0] {
			case "hang":
				<-ctx.Done()
				return 0, nil, ctx.Err()
			case "gone":
				return 0, nil, backends.ErrNotFound
			}
			var code int
			_, _ = fmt.Sscan(target.Probe.Argv[0], &code)
			return code, []byte("said so\n"), nil
		},
	}
	for _, test := range []struct {
		probe    Probe
		want     Verdict
		evidence string
	}{
		{Probe{Kind: HTTP, Port: "http", Path: "/good"}, Pass, ""},
		{Probe{Kind: HTTP, Port: "http", Path: "/bad"}, Fail, "500 Internal Server Error: boom ?[31m"},
		{Probe{Kind: HTTP, Port: "http", Path: "/teapot"}, Fail, "418"},
		{Probe{Kind: HTTP, Port: "http", Path: "/teapot", Status: 418}, Pass, ""},
		{Probe{Kind: HTTP, Port: "http", Path: "/away"}, Pass, ""},
		{Probe{Kind: HTTP, Port: "http", Path: "/slow", Timeout: 20 * time.Millisecond}, Fail, "deadline exceeded"},
		{Probe{Kind: HTTP, Port: "closed", Path: "/"}, Fail, "connection refused"},
		{Probe{Kind: HTTP, Port: "none"}, Fail, "no port none"},
		{Probe{Kind: TCP, Port: "http"}, Pass, ""},
		{Probe{Kind: TCP, Port: "closed"}, Fail, "connection refused"},
		{Probe{Kind: Exec, Argv: []string{"0"}}, Pass, ""},
		{Probe{Kind: Exec, Argv: []string{"7"}}, Fail, "ended with status 7: said so"},
		{Probe{Kind: Exec, Argv: []string{"hang"}, Timeout: 20 * time.Millisecond}, Fail, "no end within 20ms"},
		{Probe{Kind: Exec, Argv: []string{"gone"}}, NoData, "no such workload"},
		{Probe{}, Pass, ""},
	} {
		bad := g.Once(t.Context(), []Target{{Workload: "relay-1", Probe: test.probe}})
		got := Finding{Verdict: Pass}
		if len(bad) > 0 {
			got = bad[0]
		}
		if got.Verdict != test.want || !strings.Contains(got.Evidence, test.evidence) {
			t.Errorf("%v: got %s %q, want %s with %q", test.probe, got.Verdict, got.Evidence, test.want, test.evidence)
		}
	}
}

// TestNoLookOutlivesAWatch: a look at the host that is under way when the context ends is waited for.
func TestNoLookOutlivesAWatch(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	looking := false // read below without a lock: the race detector sees a look that goes on
	g := Gate{Observe: func(ctx context.Context) (map[string]backends.Status, error) {
		looking = true
		cancel()
		<-ctx.Done()
		time.Sleep(time.Millisecond) // a backend lets go soon, not at once
		looking = false
		return nil, ctx.Err()
	}}
	if got := g.Watch(ctx, []Target{{Workload: "relay-1", Unit: "relay"}}); got.Verdict != NoData || looking {
		t.Errorf("verdict %s, still looking: %v; want no data and nothing under way", got.Verdict, looking)
	}
}
