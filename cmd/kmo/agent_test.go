package main

import (
	"context"
	"errors"
	"net/http"
	"testing"
	"time"

	"github.com/kindos/kmo/reconciler"
)

// TestDelay: a revert is looked for at once, once; a world that does not answer is asked ever less often.
func TestDelay(t *testing.T) {
	const poll = time.Minute
	d := newDelay(poll)
	reverted := reconciler.Record{Outcome: reconciler.Reverted, Head: "bad", Good: "good", Bad: []reconciler.Bad{{Commit: "bad", Revert: "revert"}}}
	near := func(want time.Duration, rec reconciler.Record, err error) {
		t.Helper()
		if got := d.after(rec, err); got < want*9/10 || got > want*11/10+1 {
			t.Errorf("%s (%v): wait %v, want about %v", rec.Outcome, err, got, want)
		}
	}
	near(0, reverted, nil)
	near(poll, reverted, nil) // the remote still shows the bad commit
	unpushed := reverted
	unpushed.Bad = []reconciler.Bad{{Commit: "bad"}}
	near(poll, reconciler.Record{Outcome: reconciler.Converged}, nil)
	waiting := reconciler.Record{Outcome: reconciler.Waiting}
	near(time.Second, waiting, nil)
	near(2*time.Second, waiting, errors.New("journal"))
	for range 10 {
		d.after(waiting, nil)
	}
	near(poll, waiting, nil)
	near(poll, reconciler.Record{Outcome: reconciler.Stuck}, nil)
	near(time.Second, waiting, nil)
	d = newDelay(poll)
	near(poll, unpushed, nil)
}

// TestLocalEndsWithItsHandler: a cancelled request returns at once, and its handler, which still writes, ends and is waited for.
func TestLocalEndsWithItsHandler(t *testing.T) {
	begun, release, ended := make(chan struct{}), make(chan struct{}), make(chan struct{})
	transport := &local{handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		close(begun)
		<-release
		_, _ = w.Write([]byte("nobody reads this"))
		close(ended)
	})}
	ctx, cancel := context.WithCancel(t.Context())
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://kmo/", nil)
	if err != nil {
		t.Fatal(err)
	}
	go func() { <-begun; cancel() }()
	if response, err := transport.RoundTrip(request); !errors.Is(err, context.Canceled) {
		_ = response.Body.Close()
		t.Fatalf("error %v, want that the context was cancelled", err)
	}
	close(release)
	transport.running.Wait()
	select {
	case <-ended:
	default:
		t.Error("the wait was over before the handler")
	}
}
