package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/reconciler"
	"github.com/kindos/kmo/registry"
	"github.com/kindos/kmo/registry/merkle"
)

// TestDelay: a revert is looked for at once, once; a world that does not answer is asked ever less often.
func TestDelay(t *testing.T) {
	const poll = time.Minute
	d := newDelay(poll)
	reverted := reconciler.Record{Ending: reconciler.Ending{Outcome: reconciler.Reverted, Head: "bad"}, Good: "good", Bad: []reconciler.Bad{{Commit: "bad", Revert: "revert"}}}
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
	near(poll, reconciler.Record{Ending: reconciler.Ending{Outcome: reconciler.Converged}}, nil)
	waiting := reconciler.Record{Ending: reconciler.Ending{Outcome: reconciler.Waiting}}
	near(time.Second, waiting, nil)
	near(2*time.Second, waiting, errors.New("journal"))
	for range 10 {
		d.after(waiting, nil)
	}
	near(poll, waiting, nil)
	near(poll, reconciler.Record{Ending: reconciler.Ending{Outcome: reconciler.Stuck}}, nil)
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

// TestFetchThatNobodyWaitedFor: how it ended is told to who asks soon, since a look may wait less than a fetch takes; later it is no news.
func TestFetchThatNobodyWaitedFor(t *testing.T) {
	asked, release := make(chan struct{}, 100), make(chan struct{})
	var requests atomic.Int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked <- struct{}{}
		<-release
		http.Error(w, fmt.Sprintf("no such thing %d", requests.Add(1)), http.StatusNotFound)
	}))
	defer server.Close()
	i := &images{store: &registry.Store{Dir: t.TempDir()}, jobs: map[string]*job{}}
	image := backends.Image{Ref: server.Listener.Addr().String() + "/relay@sha256:" + strings.Repeat("0", 64), Root: merkle.BlobRoot(nil)}
	fetch := func(ctx context.Context) error {
		_, err := i.Fetch(ctx, image, backends.Native)
		return err
	}
	late := func() *job {
		t.Helper()
		silent := errors.New("no longer waited for")
		ctx, cancel := context.WithTimeoutCause(t.Context(), 10*time.Millisecond, silent)
		defer cancel()
		if err := fetch(ctx); !errors.Is(err, silent) {
			t.Fatalf("%v, want that it is being fetched", err)
		}
		i.mu.Lock()
		defer i.mu.Unlock()
		for _, one := range i.jobs {
			return one
		}
		t.Fatal("no fetch is under way")
		return nil
	}
	begun := late()
	<-asked
	if late() != begun {
		t.Fatal("the fetch was begun twice")
	}
	close(release)
	<-begun.done
	if err := fetch(t.Context()); err == nil || err != begun.err { //nolint:errorlint // the very one
		t.Fatalf("%v, want how the fetch ended, %v", err, begun.err)
	}
	if len(i.jobs) != 0 {
		t.Fatal("it is told twice")
	}
	old := &job{done: begun.done, err: begun.err, ended: time.Now().Add(-time.Hour)}
	i.jobs[fmt.Sprintln("fetch", image.Ref, image.Root, backends.Native)] = old
	i.jobs["another"] = old
	if err := fetch(t.Context()); err == nil || err == begun.err { //nolint:errorlint // the very one
		t.Fatalf("%v, want how it ends now", err)
	}
	if len(i.jobs) != 0 {
		t.Fatalf("%d fetches that ended long ago are kept", len(i.jobs))
	}
}

// TestNothingIsClearedBlindly: what runs from a copy may be seen by no backend.
func TestNothingIsClearedBlindly(t *testing.T) {
	dir := t.TempDir()
	copied := filepath.Join(dir, "content", "key", "1")
	if err := os.MkdirAll(copied, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, blind := range []bool{true, false} {
		i := &images{store: &registry.Store{Dir: dir}, blind: blind}
		_, err := i.Clear(t.Context(), nil, nil)
		if _, gone := os.Stat(copied); err != nil || blind != (gone == nil) {
			t.Errorf("blind %v: %v, the copy: %v", blind, err, gone)
		}
	}
}
