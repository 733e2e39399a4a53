package docker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/client"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/docker/layer"
	"github.com/kindos/kmo/registry/merkle"
)

// images says who is about to use which image, so that none is removed under somebody's hands.
type images struct {
	mu    *sync.Mutex              // guards what follows; never held across a call of the engine
	using map[string]int           // by id
	turns map[string]chan struct{} // by id, each holds one token: who loads it
	going map[string]chan struct{} // by id, closed when its removal is over
}

func newImages() images {
	return images{mu: &sync.Mutex{}, using: map[string]int{}, turns: map[string]chan struct{}{}, going: map[string]chan struct{}{}}
}

// hold keeps an image from being removed until done is called. It waits for a removal that is under way.
func (i *images) hold(ctx context.Context, id string) (done func(), err error) {
	for {
		i.mu.Lock()
		going := i.going[id]
		if going == nil {
			i.using[id]++
			i.mu.Unlock()
			return func() { i.release(id) }, nil
		}
		i.mu.Unlock()
		select {
		case <-going:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (i *images) release(id string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.using[id]--; i.using[id] == 0 {
		delete(i.using, id)
		delete(i.turns, id)
	}
}

// remove marks an image as being removed until over is called, unless somebody uses or removes it.
func (i *images) remove(id string, used func() bool) (over func(), ok bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.using[id] > 0 || i.going[id] != nil || used() {
		return nil, false
	}
	going := make(chan struct{})
	i.going[id] = going
	return func() {
		i.mu.Lock()
		defer i.mu.Unlock()
		delete(i.going, id)
		close(going)
	}, true
}

// turn is that of loading an image, which the caller holds.
func (i *images) turn(id string) chan struct{} {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.turns[id] == nil {
		i.turns[id] = make(chan struct{}, 1)
		i.turns[id] <- struct{}{}
	}
	return i.turns[id]
}

// shortcut is the file that remembers what image a content has become.
func (b *Backend) shortcut(root merkle.Digest) string {
	return filepath.Join(b.options.State, "images", fmt.Sprintf("%x", root[:]))
}

// image makes the engine have the image of a content, and returns its id, which is held until done is called.
func (b *Backend) image(ctx context.Context, w backends.Workload) (id string, done func(), err error) {
	var measured *layer.Image
	if text, err := os.ReadFile(b.shortcut(w.Image.ContentRoot)); err == nil && w.Image.ContentRoot != (merkle.Digest{}) {
		id = string(text)
	} else {
		if measured, err = layer.Measure(ctx, w.Image.Content, runtime.GOARCH); err != nil {
			return "", nil, err
		}
		id = measured.ID
	}
	if done, err = b.images.hold(ctx, id); err != nil {
		return "", nil, err
	}
	if err := b.provide(ctx, w, id, measured); err != nil {
		done()
		b.drop(id) // it may have been loaded all the same
		return "", nil, err
	}
	return id, done, nil
}

// provide loads an image that the engine lacks, once for all who want it at the same time.
func (b *Backend) provide(ctx context.Context, w backends.Workload, id string, measured *layer.Image) error {
	turn := b.images.turn(id)
	select {
	case <-turn:
		defer func() { turn <- struct{}{} }()
	case <-ctx.Done():
		return ctx.Err()
	}
	there, err := b.has(ctx, id, measured)
	if there || err != nil {
		return err
	}
	if measured == nil {
		if measured, err = layer.Measure(ctx, w.Image.Content, runtime.GOARCH); err != nil {
			return err
		}
		if measured.ID != id {
			return fmt.Errorf("image content %s: it is image %s now, and was %s when it had the same root", w.Image.Content, measured.ID, id)
		}
	}
	b.step("load")
	if err := b.load(ctx, measured); err != nil {
		return err
	}
	b.step("loaded")
	if there, err = b.has(ctx, id, measured); err != nil {
		return err
	}
	if !there {
		return fmt.Errorf("%s has loaded image %s, and does not have it", b.options.Name, id)
	}
	if w.Image.ContentRoot == (merkle.Digest{}) {
		return nil
	}
	return durable(b.shortcut(w.Image.ContentRoot), []byte(id))
}

// durable replaces a file as a whole: whoever is killed, or loses power, leaves the old or the new one.
func durable(path string, text []byte) error {
	next, err := os.OpenFile(path+".next", os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = next.Write(text)
	if err := errors.Join(err, next.Sync(), next.Close()); err != nil {
		return err
	}
	return os.Rename(path+".next", path)
}

// has says whether the engine has an image, by id. The id covers the diff id; that the engine says the same is looked at all the same.
func (b *Backend) has(ctx context.Context, id string, measured *layer.Image) (bool, error) {
	found, err := b.engine.ImageInspect(ctx, id)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, b.plain(ctx, err)
	}
	if got := found.RootFS.Layers; measured != nil && (len(got) != 1 || got[0] != measured.DiffID) {
		return false, fmt.Errorf("%s says that image %s has layers %v; want %s alone", b.options.Name, id, got, measured.DiffID)
	}
	return true, nil
}

// load sends an image. When ctx ends nothing more is sent; of one that has been sent already the answer is waited for, for a while: what the
// engine makes of it would come after it has been looked at what is to be removed.
func (b *Backend) load(ctx context.Context, i *layer.Image) error {
	answered, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(b.dropTime, cancel) })()
	r, w := io.Pipe()
	sent := make(chan error, 1)
	go func() {
		err := i.Send(ctx, w)
		_ = w.CloseWithError(err) // never fails
		sent <- err
	}()
	answer, err := b.engine.ImageLoad(answered, r, client.ImageLoadWithQuiet(true))
	if err == nil {
		err = loadFault(answer)
		err = errors.Join(err, answer.Close())
	}
	_ = r.Close() // the sender goes on no longer
	if sendErr := <-sent; sendErr != nil && !errors.Is(sendErr, io.ErrClosedPipe) {
		err = sendErr // the reason of the other
	}
	if err != nil {
		return fmt.Errorf("loading image %s: %w", i.ID, b.plain(ctx, err))
	}
	return nil
}

// loadFault is what the engine's messages say went wrong.
func loadFault(r io.Reader) error {
	for messages := json.NewDecoder(r); ; {
		var message struct{ Error string }
		err := messages.Decode(&message)
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		case message.Error != "":
			return errors.New(message.Error)
		}
	}
}

// drop removes an image if nobody uses it, whatever becomes of who wants that: nobody comes back for it. What the engine says against it
// counts: others may use it. One that does not answer in time is not waited for: what is left then is removed when the state folder is
// opened again.
func (b *Backend) drop(id string) {
	if id == "" {
		return
	}
	over, ok := b.images.remove(id, func() bool {
		return slices.ContainsFunc(b.list(), func(e *entry) bool {
			e.mu.Lock()
			defer e.mu.Unlock()
			return !e.cleared && e.image == id
		})
	})
	if !ok {
		return
	}
	defer over()
	ctx, cancel := context.WithTimeout(b.ctx, b.dropTime)
	defer cancel()
	_, err := b.engine.ImageRemove(ctx, id, client.ImageRemoveOptions{PruneChildren: true})
	if err != nil && !errdefs.IsNotFound(err) {
		if !errdefs.IsConflict(err) {
			b.options.Logger.Warn("removing an image", "image", id, "err", err)
		}
		return
	}
	b.forget(func(known string) bool { return known != id })
}

// forget removes the records of images that are not to be kept.
func (b *Backend) forget(keep func(id string) bool) (forgotten []string) {
	dir := filepath.Join(b.options.State, "images")
	files, _ := os.ReadDir(dir) // there may be none
	for _, f := range files {
		at := filepath.Join(dir, f.Name())
		text, err := os.ReadFile(at)
		if err == nil && !keep(string(text)) {
			forgotten = append(forgotten, string(text))
			_ = os.Remove(at) // it is only a shortcut
		}
	}
	return forgotten
}

// tidy removes images of ours that no container of anybody uses: what a process that was killed has left.
func (b *Backend) tidy(ctx context.Context) error {
	found, err := b.engine.ImageList(ctx, client.ImageListOptions{Filters: client.Filters{}.Add("label", layer.Label)})
	if err != nil {
		return b.plain(ctx, err)
	}
	for _, i := range found.Items {
		ours := slices.ContainsFunc(i.RepoTags, func(tag string) bool { return strings.HasPrefix(tag, layer.Repository+":") })
		if ours {
			b.drop(imageID(i.ID))
		}
	}
	return nil
}

// create makes a container, which does not run yet.
func (b *Backend) create(ctx context.Context, w backends.Workload, image string, ports []int, argv []string) (id string, err error) {
	options, err := b.plan.Options(w, image, ports, argv)
	if err != nil {
		return "", err
	}
	made, err := b.engine.ContainerCreate(ctx, options)
	if err != nil && strings.Contains(err.Error(), "in use") { // what an interrupted call has left
		left, inspectErr := b.inspect(ctx, options.Name)
		if inspectErr != nil || left == nil {
			return "", errors.Join(err, inspectErr)
		}
		if err := b.discard(ctx, left.id); err != nil {
			return "", err
		}
		made, err = b.engine.ContainerCreate(ctx, options)
	}
	if err != nil {
		return "", b.plain(ctx, err)
	}
	return made.ID, nil
}

// createLoaded is create, which loads the image again if somebody has removed it.
func (b *Backend) createLoaded(ctx context.Context, w backends.Workload, image string, ports []int, argv []string) (id string, err error) {
	if id, err = b.create(ctx, w, image, ports, argv); !errdefs.IsNotFound(err) {
		return id, err
	}
	if err := b.provide(ctx, w, image, nil); err != nil {
		return "", err
	}
	return b.create(ctx, w, image, ports, argv)
}
