// Package native runs programs of OCI images, and bare static ones, on this host's kernel, with nothing installed: the
// embedded default. What keeps, confines and finds them again is package process.
//
// A program shares the host's network, and nothing else: its own file system, process ids, ipc and name, a user without a
// capability, landlock, seccomp, cgroup bounds. What this host does not let it apply is said in the fingerprint's Missing and
// in each status.
//
// A bare program ([backends.Native]) is seen at /app inside, in a root that holds nothing else. A backend that is not root
// runs bare programs only, and none where the kernel lacks landlock or seccomp, which then are all that holds them.
package native

import (
	"context"
	"log/slog"
	"runtime"
	"slices"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/process"
)

// Name is the backend's name.
const Name = "native"

// app is where a bare program is seen.
const app = "/app"

// Options are what a Backend needs. State is.
type Options struct {
	State   string                           // the state folder: trusted, made if there is none
	Logger  *slog.Logger                     // nil is silent
	Backoff func(restarts int) time.Duration // pause before a program is started again; nil is 1 s doubling to 1 min
}

// Backend runs programs. It is a backends.Backend and a backends.Execer.
type Backend struct {
	*process.Keeper
}

// Open goes on with what an earlier process left in the state folder.
func Open(o Options) (*Backend, error) {
	keeper, err := process.Open(process.Options{Backend: Name, State: o.State, Plan: plan, Logger: o.Logger, Backoff: o.Backoff})
	if err != nil {
		return nil, err
	}
	return &Backend{keeper}, nil
}

// Fingerprint says what was measured when the backend was opened.
func (b *Backend) Fingerprint(context.Context) (backends.Fingerprint, error) {
	return backends.Fingerprint{
		Backend:   Name,
		Version:   b.Kernel(),
		Formats:   b.formats(),
		Platforms: []string{runtime.GOOS + "/" + runtime.GOARCH},
		Isolation: backends.IsolationProcess,
		Features:  b.Features(),
		Missing:   b.Missing(),
	}, nil
}

func (b *Backend) formats() []backends.Format {
	if !b.Confines() {
		return nil
	}
	if slices.Contains(b.Features(), backends.Overlays) {
		return []backends.Format{backends.OCI, backends.Native}
	}
	return []backends.Format{backends.Native}
}

// plan says what of a workload is run, and how.
func plan(_ context.Context, w backends.Workload, _ process.Place) (process.Program, error) {
	p := process.Program{Argv: w.Argv(), Env: w.Env(), Dir: w.Run.Dir}
	if p.Dir == "" {
		p.Dir = w.Image.Config.Dir
	}
	switch w.Format {
	case backends.OCI:
		p.Root = w.Image.Content
	case backends.Native:
		p.Binds = []process.Bind{{From: w.Image.Content, To: app}}
		if len(w.Image.Config.Entrypoint) == 0 {
			p.Argv = append([]string{app}, p.Argv...)
		}
	default:
		return p, &backends.FeatureError{Backend: Name, Feature: backends.Feature(w.Format), Detail: "it runs the formats image and native only"}
	}
	return p, nil
}
