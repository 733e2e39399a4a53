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
	"slices"
	"strconv"
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
	half, err := filepath.Glob(filepath.Join(dir, "*", "*.new"))
	for _, left := range half {
		err = errors.Join(err, os.RemoveAll(left))
	}
	return a, err
}

// ready returns the folder of an image, which is unpacked if it is not there or is not what it was: then at another path, for programs may run
// from what was changed.
func (a *apps) ready(ctx context.Context, content string) (string, error) {
	select {
	case <-ctx.Done():
		return "", ctx.Err()
	case <-a.turn:
	}
	defer func() { a.turn <- struct{}{} }()
	key, err := a.folder(content)
	if err != nil {
		return "", err
	}
	copies, err := copiesIn(key)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	next := 1
	if len(copies) > 0 {
		last := copies[len(copies)-1]
		at := filepath.Join(key, strconv.Itoa(last))
		if a.sound(ctx, at, content) {
			return filepath.Join(at, "app"), nil
		}
		next = last + 1
	}
	if ctx.Err() != nil {
		return "", ctx.Err()
	}
	at := filepath.Join(key, strconv.Itoa(next))
	if err := a.make(ctx, content, at); err != nil {
		_ = os.Remove(key) // it fails if it is not empty
		return "", err
	}
	a.measured[at] = time.Now()
	return filepath.Join(at, "app"), nil
}

// sound says that a copy is what it was, as far as was measured not long ago.
func (a *apps) sound(ctx context.Context, at, content string) bool {
	if time.Since(a.measured[at]) < measureEvery {
		return true
	}
	known, err := load(at)
	if err != nil || known.Content != content {
		return false
	}
	root, err := measure(ctx, filepath.Join(at, "app"))
	if err != nil || root != known.Root {
		return false
	}
	a.measured[at] = time.Now()
	return true
}

// copiesIn lists the copies of an image, oldest first. The newest is what programs are started from.
func copiesIn(key string) (list []int, err error) {
	found, err := os.ReadDir(key)
	for _, entry := range found {
		if n, err := strconv.Atoi(entry.Name()); err == nil && n > 0 {
			list = append(list, n)
		}
	}
	slices.Sort(list)
	return list, err
}

// folder is where the copies of an image are: another file, or another at the same place, has another.
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
	if err := errors.Join(os.RemoveAll(next), os.MkdirAll(next, 0o700)); err != nil {
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
	err = json.Unmarshal(text, &known)
	return known, err
}

// want keeps the unpacked image of a content, until it is called with -1, from being removed.
func (a *apps) want(content string, by int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.wanted[content] += by; a.wanted[content] == 0 {
		delete(a.wanted, content)
	}
}

// use is what a workload runs from.
type use struct {
	content string
	folder  os.FileInfo // of the copy; nil where that could not be seen
}

// keep removes the copies that no workload runs from and none is about to be started from. What is about to be is looked at first: once it is
// no more, it is used.
func (a *apps) keep(ctx context.Context, used func() ([]use, error)) error {
	select {
	case <-a.turn:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { a.turn <- struct{}{} }()
	a.mu.Lock()
	wanted := maps.Clone(a.wanted)
	a.mu.Unlock()
	uses, err := used()
	if err != nil {
		return err
	}
	keys, err := os.ReadDir(a.dir)
	for _, entry := range keys {
		key := filepath.Join(a.dir, entry.Name())
		copies, bad := copiesIn(key)
		err = errors.Join(err, bad)
		left := 0
		for i, n := range copies {
			at := filepath.Join(key, strconv.Itoa(n))
			if needed(at, i == len(copies)-1, uses, wanted) {
				left++
				continue
			}
			delete(a.measured, at)
			err = errors.Join(err, os.RemoveAll(at))
		}
		if left == 0 && bad == nil {
			err = errors.Join(err, os.RemoveAll(key))
		}
	}
	return err
}

// needed says whether a program runs from a copy, or may, or will: from the newest whoever has its content will be started.
func needed(at string, newest bool, uses []use, wanted map[string]int) bool {
	known, unknown := load(at)
	if unknown == nil && wanted[known.Content] > 0 {
		return true
	}
	folder, gone := os.Stat(filepath.Join(at, "app"))
	for _, u := range uses {
		if gone == nil && u.folder != nil && os.SameFile(folder, u.folder) {
			return true
		}
		if unknown == nil && u.content == known.Content && (newest || u.folder == nil) {
			return true
		}
	}
	return false
}
