package appimage

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/renameio/v2"

	"github.com/kindos/kmo/registry/merkle"
)

// apps are the unpacked images of a state folder.
type apps struct {
	dir      string
	turn     chan struct{}        // holds one token: one image is unpacked, measured or removed at a time
	measured map[string]time.Time // when last, by folder; of who has the turn

	mu     sync.Mutex     // guards wanted
	wanted map[string]int // contents that are being applied
}

// about is what is known of an unpacked image.
type about struct {
	Content string        `json:"content"` // the image's file
	Root    merkle.Digest `json:"root"`    // of the unpacked folder
}

// measureEvery is how often an unpacked image is read again at most.
const measureEvery = time.Minute

func openApps(dir string) (*apps, error) {
	a := &apps{dir: dir, turn: make(chan struct{}, 1), measured: map[string]time.Time{}, wanted: map[string]int{}}
	a.turn <- struct{}{}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	half, err := filepath.Glob(filepath.Join(dir, "*.new"))
	for _, left := range half {
		err = errors.Join(err, os.RemoveAll(left))
	}
	return a, err
}

// ready returns the folder of an image, which is unpacked if it is not there or is not what it was.
func (a *apps) ready(ctx context.Context, content string) (string, error) {
	select {
	case <-ctx.Done():
		return "", ctx.Err()
	case <-a.turn:
	}
	defer func() { a.turn <- struct{}{} }()
	at, err := a.folder(content)
	if err != nil {
		return "", err
	}
	app := filepath.Join(at, "app")
	if time.Since(a.measured[at]) < measureEvery {
		return app, nil
	}
	known, err := load(at)
	if err == nil && known.Content == content {
		if root, err := measure(ctx, app); err == nil && root == known.Root {
			a.measured[at] = time.Now()
			return app, nil
		}
	}
	if ctx.Err() != nil {
		return "", ctx.Err()
	}
	if err := a.make(ctx, content, at); err != nil {
		return "", err
	}
	a.measured[at] = time.Now()
	return app, nil
}

// folder is where an image is unpacked: another file, or another at the same place, has another.
func (a *apps) folder(content string) (string, error) {
	found, err := os.Stat(content)
	if err != nil {
		return "", err
	}
	if !found.Mode().IsRegular() {
		return "", bad("%s is no file", content)
	}
	key := merkle.BlobRoot(fmt.Appendln(nil, content, found.Size(), found.ModTime().UnixNano()))
	return filepath.Join(a.dir, hex.EncodeToString(key[:16])), nil
}

// make unpacks an image beside its place and renames it there.
func (a *apps) make(ctx context.Context, content, at string) (err error) {
	next := at + ".new"
	if err := errors.Join(os.RemoveAll(next), os.RemoveAll(at), os.Mkdir(next, 0o700)); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(next))
		}
	}()
	root, err := unpack(ctx, content, filepath.Join(next, "app"))
	if err != nil {
		return err
	}
	text, err := json.Marshal(about{Content: content, Root: root})
	if err != nil {
		return err
	}
	if err := renameio.WriteFile(filepath.Join(next, "about"), text, 0o600); err != nil {
		return err
	}
	return os.Rename(next, at)
}

func load(at string) (known about, err error) {
	text, err := os.ReadFile(filepath.Join(at, "about"))
	if err != nil {
		return known, err
	}
	return known, json.Unmarshal(text, &known)
}

// want keeps the unpacked image of a content, until it is called with -1, from being removed.
func (a *apps) want(content string, by int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.wanted[content] += by; a.wanted[content] == 0 {
		delete(a.wanted, content)
	}
}

// keep removes the unpacked images of contents that are neither used nor about to be. What is about to be is looked at first: once it is
// no more, it is used.
func (a *apps) keep(ctx context.Context, used func() (map[string]bool, error)) error {
	select {
	case <-a.turn:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { a.turn <- struct{}{} }()
	a.mu.Lock()
	wanted := maps.Clone(a.wanted)
	a.mu.Unlock()
	present, err := used()
	if err != nil {
		return err
	}
	found, err := os.ReadDir(a.dir)
	for _, entry := range found {
		at := filepath.Join(a.dir, entry.Name())
		known, bad := load(at)
		if bad != nil || !present[known.Content] && wanted[known.Content] == 0 {
			delete(a.measured, at)
			err = errors.Join(err, os.RemoveAll(at))
		}
	}
	return err
}
