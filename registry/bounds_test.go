package registry

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/registry/merkle"
)

func TestWholeImageIsBounded(t *testing.T) {
	ctx := context.Background()
	layer := func(name string) blobOf {
		return blobOf{types.OCILayer, gz(t, archive(t, reg(name, strings.Repeat("\x00", 1<<20))))}
	}
	a, b := layer("a"), layer("b")
	two := imageOf(t, "linux/amd64", nil, a, b)
	packed := int64(len(a.data) + len(b.data))
	index, amd, _ := twoPlatforms(t)
	one := must(amd.Manifest())(t).Layers[0].Size
	for name, c := range map[string]struct {
		what  any
		limit int64
		code  refusal.Code // "" for an image that is fetched
		words string
	}{
		"layers that are too much together":                       {two, packed - 1, "E_LIMIT", fmt.Sprintf("%d bytes to download", packed)},
		"layers that unpack to too much together":                 {two, 3 << 19, "E_LIMIT", "layer 1"},
		"near miss: layers that are just enough":                  {two, 3 << 20, "", ""},
		"what other platforms' members are is counted too":        {index, one + 100, "E_LIMIT", "to download"},
		"near miss: this platform's member and the others' blobs": {index, 1 << 20, "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			ref := toLayout(t, c.what)
			s := newStore(t)
			s.MaxImage = c.limit
			_, err := s.Fetch(ctx, ref, rootOf(t, ref), OCI)
			if c.code != "" {
				wantRefusal(t, s, err, c.code, c.words)
			} else if err != nil {
				t.Error(err)
			}
		})
	}
}

// TestAFullDisk has the disk say what it has left. That it is full is nobody's fault and may change: an error, and no refusal.
func TestAFullDisk(t *testing.T) {
	ctx := context.Background()
	const size = 1 << 40
	zeros := archive(t, reg("zeros", strings.Repeat("\x00", askEvery)))
	packed := gz(t, zeros)
	w := newWorld(t)
	ref := w.push("app", imageOf(t, "linux/amd64", nil, blobOf{types.OCILayer, packed}))
	root := rootOf(t, ref)
	need := headroom + int64(len(packed))
	for name, c := range map[string]struct {
		free []int64 // at each look, the last one ever after
		got  bool    // the layer was asked for
	}{
		"before anything is fetched": {[]int64{need + int64(len(packed)) - 1}, false},
		"just before the layer":      {[]int64{size, need - 1}, false},
		"while it is unpacked":       {[]int64{size, size, headroom - 1}, true},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			s.disk = func(string) (int64, int64, error) {
				free := c.free[0]
				c.free = c.free[min(1, len(c.free)-1):]
				return free, size, nil
			}
			w.asked()
			_, err := s.Fetch(ctx, ref, root, OCI)
			if !errors.Is(err, errNoRoom) || refusal.Of(err) != nil || !strings.Contains(err.Error(), fmt.Sprint(headroom)) {
				t.Fatalf("got %v, want an error that is no refusal and says how much is to stay free", err)
			}
			wantClean(t, s, true)
			got := slices.ContainsFunc(w.asked(), func(path string) bool { return strings.HasSuffix(path, sha256Hex(packed)) })
			if got != c.got {
				t.Errorf("the layer was asked for: %v, want %v", got, c.got)
			}
			s.disk = func(string) (int64, int64, error) { return size, size, nil }
			if _, err := s.Fetch(ctx, ref, root, OCI); err != nil {
				t.Errorf("with room again: %v", err)
			}
		})
	}
}

// TestASilentRegistry is asked about a few images at a time, and keeps nobody from what others have.
func TestASilentRegistry(t *testing.T) {
	ctx := t.Context()
	w := newWorld(t)
	var waiting atomic.Int64
	full, release := make(chan struct{}), make(chan struct{})
	w.lies(func(http.ResponseWriter, *http.Request, http.Handler) {
		defer waiting.Add(-1)
		if waiting.Add(1) == atOnce {
			close(full)
		}
		<-release
	})
	s := newStore(t)
	var all sync.WaitGroup
	for i := range 3 * atOnce {
		ref := w.place("app")
		ref.SHA256 = fmt.Sprintf("%064x", i)
		all.Go(func() { _, _ = s.Fetch(ctx, ref, merkle.BlobRoot(nil), OCI) })
	}
	<-full
	other := toLayout(t, simple(t, "linux/amd64", reg("a", "1")))
	root := rootOf(t, other)
	for range 2 { // fetched, and then on the disk
		if _, err := s.Fetch(ctx, other, root, OCI); err != nil {
			t.Error(err)
		}
	}
	if n := waiting.Load(); n != atOnce {
		t.Errorf("%d images are asked for at once, want %d", n, atOnce)
	}
	w.lies(func(rw http.ResponseWriter, r *http.Request, _ http.Handler) { http.NotFound(rw, r) })
	close(release)
	all.Wait()
}

// TestMarkersEverywhere has a marker in every folder of a deep tree, above many files of the same layer.
func TestMarkersEverywhere(t *testing.T) {
	const depth, wide = 1000, 200_000
	u := newUnpacker("layer 1", nil) // nothing is removed
	u.layer = 1
	bottom := u.tree
	for range depth {
		next := &node{entry: merkle.Entry{Type: merkle.Folder}, children: map[string]*node{}, held: 1}
		bottom.children["a"], bottom = next, next
	}
	for i := range wide {
		bottom.children[fmt.Sprint(i)] = &node{layer: 1, held: 1}
	}
	begun := time.Now()
	for i := range depth {
		if err := u.entry(&tar.Header{Name: strings.Repeat("a/", i) + opaqueName, Typeflag: tar.TypeReg}, nil); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begun); took > 5*time.Second {
			t.Fatalf("%d of %d markers took %v", i+1, depth, took)
		}
	}
	if len(bottom.children) != wide {
		t.Errorf("%d files are left, want all %d of the layer", len(bottom.children), wide)
	}
}
