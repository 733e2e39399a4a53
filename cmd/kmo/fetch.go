package main

import (
	"context"
	"fmt"
	"maps"
	"sync"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/registry"
)

// images is the store as the reconciler asks for it.
type images struct {
	store *registry.Store
	blind bool // something may run here that no backend sees
	mu    sync.Mutex
	jobs  map[string]*job // what registries are asked, by what that is
}

// job is a question to a registry that is under way, or one that ended while nobody waited.
type job struct {
	done      chan struct{}
	ended     time.Time // zero while it is under way; images.mu guards it
	described any
	content   registry.Content
	err       error
}

// news is how long the end of a job is told to who asks for it next; after that it is begun anew.
const news = 5 * time.Minute

func (i *images) Describe(ctx context.Context, image backends.Image, format backends.Format) (any, error) {
	job, err := i.ask(ctx, "describe", image, format, func(ctx context.Context, job *job, ref registry.Reference) error {
		described, err := i.store.Describe(ctx, ref, image.Root, registry.Format(format))
		job.described = described
		return err
	})
	if err != nil {
		return nil, err
	}
	return job.described, nil
}

func (i *images) Fetch(ctx context.Context, image backends.Image, format backends.Format) (backends.Image, error) {
	job, err := i.ask(ctx, "fetch", image, format, func(ctx context.Context, job *job, ref registry.Reference) (err error) {
		job.content, err = i.store.Fetch(ctx, ref, image.Root, registry.Format(format))
		return err
	})
	if err != nil {
		return image, err
	}
	return fetched(image, job.content), nil
}

// ask has a job done and waits for it until ctx ends.
func (i *images) ask(ctx context.Context, what string, image backends.Image, format backends.Format, do func(context.Context, *job, registry.Reference) error) (*job, error) {
	ref, err := registry.ParseReference(image.Ref)
	if err != nil {
		return nil, err
	}
	key := fmt.Sprintln(what, image.Ref, image.Root, format)
	job := i.join(key, func(job *job) error { return do(context.WithoutCancel(ctx), job, ref) })
	select {
	case <-job.done:
	case <-ctx.Done():
		return nil, fmt.Errorf("%s: %w", image.Ref, context.Cause(ctx))
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.jobs[key] == job {
		delete(i.jobs, key)
	}
	return job, job.err
}

// join joins a job that is under way, or begins it. It goes on while the reconciler looks elsewhere, so that a slow registry keeps nobody
// from a newer commit, and ends with the process.
func (i *images) join(key string, do func(*job) error) *job {
	i.mu.Lock()
	defer i.mu.Unlock()
	maps.DeleteFunc(i.jobs, func(_ string, known *job) bool { return !known.ended.IsZero() && time.Since(known.ended) > news })
	if known := i.jobs[key]; known != nil {
		return known
	}
	begun := &job{done: make(chan struct{})}
	i.jobs[key] = begun
	go func() {
		defer close(begun.done)
		begun.err = do(begun)
		i.mu.Lock()
		defer i.mu.Unlock()
		begun.ended = time.Now()
		if begun.err == nil && begun.described == nil { // the store has what was fetched; what was described is told once
			delete(i.jobs, key)
		}
	}()
	return begun
}

func (i *images) Check(ctx context.Context, image backends.Image) error {
	return i.store.Check(ctx, registry.Content{Path: image.Content, Root: image.ContentRoot})
}

func (i *images) Repair(ctx context.Context, image backends.Image, format backends.Format) (backends.Image, error) {
	ref, err := registry.ParseReference(image.Ref)
	if err != nil {
		return image, err
	}
	content, err := i.store.Repair(ctx, ref, image.Root, registry.Format(format))
	return fetched(image, content), err
}

func (i *images) Clear(ctx context.Context, keep []backends.Workload, inUse []string) ([]string, error) {
	if i.blind {
		return nil, nil
	}
	var pins []registry.Pin
	for _, workload := range keep {
		ref, err := registry.ParseReference(workload.Image.Ref)
		if err != nil {
			return nil, err
		}
		pins = append(pins, registry.Pin{Ref: ref, Root: workload.Image.Root, Format: registry.Format(workload.Format)})
	}
	return i.store.Clear(ctx, pins, inUse)
}

// fetched is image with what the store says of it.
func fetched(image backends.Image, content registry.Content) backends.Image {
	image.Content, image.ContentRoot = content.Path, content.Root
	image.Config = backends.ImageConfig(content.Config)
	return image
}
