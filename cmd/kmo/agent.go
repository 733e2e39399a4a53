package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/kindos/kmo/reconciler"
)

func agentCommand() *cobra.Command {
	flags := &hostFlags{makes: true}
	cmd := &cobra.Command{
		Use:   "agent",
		Short: "Keep this host as the branch says, until stopped",
		Long: `Keep this host as the branch says, until stopped. The branch is looked at when a push to a local repository is seen, when
'kmo reconcile' asks, and at every poll. Workloads go on running when the agent stops, and are found again when it starts.

Its file says which site and where; the last lines are as 'kmo site init' printed them:

  site: north-sea
  remote: ssh://git@git.example/north-sea.git
  zone: edge-a
  key: host.key
  trust:
    sha256: …
    kmo1: kmo1:sha3-256:…

Exit statuses: 0 stopped by a signal, 1 error, 3 refused (kMO's own state is not as it left it).`,
		Example: "  kmo agent --config /etc/kmo/agent.yaml\n  kmo agent --config agent.yaml --state /tmp/kmo",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			h, err := onceFree(cmd.Context(), func() (*host, error) { return openHost(cmd.Context(), flags, cmd.ErrOrStderr()) })
			if err != nil {
				return err
			}
			return errors.Join(h.serve(cmd.Context()), h.close())
		},
	}
	flags.add(cmd)
	return cmd
}

// registryWait is how long a look of the agent waits for registries before it goes on without. A command was asked for its one look.
const registryWait = 10 * time.Second

// serve runs the agent until ctx ends: the API on its socket, and the loop.
func (h *host) serve(ctx context.Context) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	listener, err := h.listen(ctx)
	if err != nil {
		return err
	}
	server := &http.Server{Handler: h.api(ctx), ReadHeaderTimeout: 10 * time.Second, MaxHeaderBytes: 64 << 10,
		BaseContext: func(net.Listener) context.Context { return ctx }}
	h.agent = true
	h.reconciler.Wait, h.preview.Wait = registryWait, registryWait
	var group sync.WaitGroup
	group.Go(func() {
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			h.logger.Error("listener", "err", err)
		}
	})
	h.logger.Info("agent", "site", h.config.Site, "branch", h.config.Branch, "zone", h.config.Zone, "version", version)
	err = h.loop(ctx)
	stop() // requests see their context end
	ended, cancel := background()
	defer cancel()
	if late := server.Shutdown(ended); late != nil { // until then they work with what the caller closes next
		h.logger.Error("requests that do not end", "err", errors.Join(late, server.Close()))
	}
	group.Wait()
	return err
}

// listen opens the API's unix socket: the agent listens on nothing else.
func (h *host) listen(ctx context.Context) (net.Listener, error) {
	path := filepath.Join(h.dir, "agent.sock")
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) { // the lock says that nobody else is there
		return nil, fmt.Errorf("clearing the old socket: %w", err)
	}
	listener, err := (&net.ListenConfig{}).Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listening for commands: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, listener.Close())
	}
	return listener, nil
}

// loop reconciles whenever something says "look again".
func (h *host) loop(ctx context.Context) error {
	pushed := h.source.Watch(ctx)
	delay := newDelay(time.Duration(h.config.Poll))
	for {
		rec, err := h.reconcileNow(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			h.logger.Error("reconcile", "err", err)
		}
		h.rest(ctx, pushed, time.Now().Add(delay.after(rec, err)))
	}
}

// probePause bounds how often what runs is probed, however often its units ask for it.
const probePause = 250 * time.Millisecond

// rest waits until the branch is to be looked at: at that time, after a push, or when the probes that are made meanwhile come to something new.
func (h *host) rest(ctx context.Context, pushed <-chan struct{}, look time.Time) {
	for probing := true; ; {
		wait, due := h.due()
		due = due && probing
		if left := time.Until(look); !due || left < wait {
			wait, due = left, false
		} else {
			wait = max(wait, probePause)
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-pushed:
		case <-timer.C:
			if due {
				news, err := h.probe(ctx)
				probing = err == nil // what does not answer now is for the next look to tell
				if !news {
					continue
				}
			}
		}
		timer.Stop()
		return
	}
}

func (h *host) due() (time.Duration, bool) {
	h.line.Lock()
	defer h.line.Unlock()
	return h.reconciler.Due()
}

func (h *host) probe(ctx context.Context) (news bool, err error) {
	h.line.Lock()
	defer h.line.Unlock()
	return h.reconciler.Probe(ctx)
}

// delay spaces the looks: the poll with jitter, sooner and then ever later while the world does not answer.
type delay struct {
	poll   time.Duration
	next   time.Duration
	revert string // the newest that was looked for at once
}

func newDelay(poll time.Duration) *delay { return &delay{poll: poll} }

// after returns how long to wait after a reconcile that ended so.
func (d *delay) after(rec reconciler.Record, err error) time.Duration {
	wait := d.poll
	if err == nil && rec.Trying != "" && rec.Stage == reconciler.StageWatch {
		return 0
	}
	if err != nil || rec.Outcome == reconciler.Waiting {
		d.next = min(max(2*d.next, time.Second), d.poll)
		wait = d.next
	} else {
		d.next = 0
		if rec.Outcome == reconciler.Reverted && rec.Head != rec.Good && len(rec.Bad) > 0 && rec.Bad[0].Revert != d.revert {
			d.revert = rec.Bad[0].Revert
			return 0 // the revert is the head now, unless the remote is slow to show it
		}
	}
	return wait*9/10 + rand.N(wait/5+1)
}

// reconcileNow reconciles, one at a time.
func (h *host) reconcileNow(ctx context.Context) (reconciler.Record, error) {
	h.line.Lock()
	defer h.line.Unlock()
	rec, err := h.reconciler.Reconcile(ctx)
	h.ended(rec, err)
	return rec, err
}

// slogLevel reads a level's name.
func slogLevel(name string) (slog.Level, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(name)); err != nil {
		return level, usageError{fmt.Errorf("log level %q: want debug, info, warn or error", name)}
	}
	return level, nil
}
