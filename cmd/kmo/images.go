package main

import (
	"context"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/registry"
)

// images is the store as the reconciler asks for it.
type images struct{ store *registry.Store }

func (i images) Describe(ctx context.Context, image backends.Image, format backends.Format) (any, error) {
	ref, err := registry.ParseReference(image.Ref)
	if err != nil {
		return nil, err
	}
	return i.store.Describe(ctx, ref, image.Root, registry.Format(format))
}

func (i images) Fetch(ctx context.Context, image backends.Image, format backends.Format) (backends.Image, error) {
	ref, err := registry.ParseReference(image.Ref)
	if err != nil {
		return image, err
	}
	content, err := i.store.Fetch(ctx, ref, image.Root, registry.Format(format))
	return fetched(image, content), err
}

func (i images) Check(ctx context.Context, image backends.Image) error {
	return i.store.Check(ctx, registry.Content{Path: image.Content, Root: image.ContentRoot})
}

func (i images) Repair(ctx context.Context, image backends.Image, format backends.Format) (backends.Image, error) {
	ref, err := registry.ParseReference(image.Ref)
	if err != nil {
		return image, err
	}
	content, err := i.store.Repair(ctx, ref, image.Root, registry.Format(format))
	return fetched(image, content), err
}

// fetched is image with what the store says of it.
func fetched(image backends.Image, content registry.Content) backends.Image {
	image.Content, image.ContentRoot = content.Path, content.Root
	image.Config = backends.ImageConfig(content.Config)
	return image
}
