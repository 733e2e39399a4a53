package registry

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/registry/merkle"
)

func TestFetchImage(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	image := simple(t, "linux/amd64", dir("bin"), reg("bin/app", "hello"), link('2', "app", "bin/app"))
	want, err := merkle.ContentRoot([]merkle.Entry{
		{Type: merkle.Symlink, Path: "app", Mode: 0o777, Link: "bin/app"},
		{Type: merkle.Folder, Path: "bin", Mode: 0o755},
		{Type: merkle.File, Path: "bin/app", Mode: 0o644, Size: 5, Blob: merkle.BlobRoot([]byte("hello"))},
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, ref := range map[string]Reference{"registry": w.push("app", image), "layout": toLayout(t, image)} {
		t.Run(name, func(t *testing.T) {
			root := rootOf(t, ref)
			s := newStore(t)
			got, err := s.Fetch(ctx, ref, root, OCI)
			if err != nil {
				t.Fatal(err)
			}
			if body, err := os.ReadFile(filepath.Join(got.Path, "bin/app")); err != nil || string(body) != "hello" {
				t.Errorf("bin/app: got %q, %v", body, err)
			}
			if got.Root != want || got.Size != 5 {
				t.Errorf("got root %v and size %d, want %v and 5", got.Root, got.Size, want)
			}
			if diff := cmp.Diff(Config{Entrypoint: []string{"/bin/app"}, Env: []string{"A=1"}, Dir: "/srv", User: "7"}, got.Config); diff != "" {
				t.Error(diff)
			}
			if err := s.Check(ctx, got); err != nil {
				t.Errorf("Check: %v", err)
			}
			wantClean(t, s, false)

			w.asked()
			again, err := s.Fetch(ctx, ref, root, OCI)
			other := &Store{Dir: s.Dir, Platform: s.Platform} // another process: the record on disk
			fromDisk, err2 := other.Fetch(ctx, ref, root, OCI)
			if diff := cmp.Diff([]Content{got, got}, []Content{again, fromDisk}); err != nil || err2 != nil || diff != "" {
				t.Errorf("fetching again: %v, %v, %s", err, err2, diff)
			}
			if asked := w.asked(); len(asked) > 0 {
				t.Errorf("U-30: fetching again asked for %v", asked)
			}
		})
	}
}

func TestAfterAPowerCut(t *testing.T) {
	ctx := context.Background()
	ref := toLayout(t, simple(t, "linux/amd64", reg("a", "some bytes")))
	root := rootOf(t, ref)
	for name, c := range map[string]struct {
		torn func(s *Store, record, file string) error
		same bool // the copy is used as it is
	}{
		"content without its bytes": {func(_ *Store, _, file string) error { return os.Truncate(file, 0) }, false},
		"record cut":                {func(_ *Store, record, _ string) error { return os.Truncate(record, 10) }, false},
		"record empty":              {func(_ *Store, record, _ string) error { return os.Truncate(record, 0) }, false},
		"content gone":              {func(_ *Store, _, file string) error { return os.RemoveAll(filepath.Dir(file)) }, false},
		"a kept manifest cut": {func(s *Store, record, _ string) error {
			return errors.Join(os.Remove(record), os.Truncate(s.blobPath(ref.SHA256), 10))
		}, false},
		"nothing": {func(*Store, string, string) error { return nil }, true},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			content, err := s.Fetch(ctx, ref, root, OCI)
			if err != nil {
				t.Fatal(err)
			}
			record := s.recordPath(s.key(ref, root, OCI))
			text, err := os.ReadFile(record)
			if err != nil {
				t.Fatal(err)
			}
			earlier := strings.Replace(string(text), bootID(), "an-earlier-boot", 1)
			if err := errors.Join(os.Remove(record), os.WriteFile(record, []byte(earlier), 0o600), c.torn(s, record, filepath.Join(content.Path, "a"))); err != nil {
				t.Fatal(err)
			}
			next := &Store{Dir: s.Dir, Platform: s.Platform}
			got, err := next.Fetch(ctx, ref, root, OCI)
			if err != nil || (got.Path == content.Path) != c.same || cmp.Diff(content, got, otherCopy) != "" {
				t.Fatalf("got %+v, %v, want %+v in the same copy: %v", got, err, content, c.same)
			}
			if body, err := os.ReadFile(filepath.Join(got.Path, "a")); err != nil || string(body) != "some bytes" {
				t.Errorf("got %q, %v", body, err)
			}
		})
	}
}

func TestFetchFile(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	path := filepath.Join(t.TempDir(), "module")
	if err := os.WriteFile(path, []byte("\x00asm"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, format := range []Format{WASM, Native, AppImage} {
		for name, to := range map[string]Reference{"registry": w.place("file-" + string(format)), "layout": {Layout: filepath.Join(t.TempDir(), "layout")}} {
			t.Run(string(format)+" "+name, func(t *testing.T) {
				s := newStore(t)
				ref, root, err := s.PushFile(ctx, path, to, format)
				if err != nil {
					t.Fatal(err)
				}
				if computed := rootOf(t, ref); computed != root {
					t.Errorf("PushFile: got root %v, want %v", root, computed)
				}
				got, err := s.Fetch(ctx, ref, root, format)
				if err != nil {
					t.Fatal(err)
				}
				body, err := os.ReadFile(got.Path)
				stat, _ := os.Stat(got.Path)
				if err != nil || string(body) != "\x00asm" || got.Root != merkle.BlobRoot(body) || (format == WASM) != (stat.Mode() == 0o444) {
					t.Errorf("got %q, %v, root %v, mode %v", body, err, got.Root, stat.Mode())
				}
				if err := s.Check(ctx, got); err != nil {
					t.Errorf("Check: %v", err)
				}
				d, err := s.Describe(ctx, ref, root, format)
				if err != nil || !d.Proved || d.Layers != 1 || d.Size != 4 {
					t.Errorf("Describe: got %+v, %v", d, err)
				}
			})
		}
	}
}

// A program pushed as an image is a root with the program at /app, and the same one twice.
func TestPushProgram(t *testing.T) {
	w := newWorld(t)
	s := newStore(t)
	ref, root, err := s.PushFile(t.Context(), "/bin/true", w.place("program"), OCI)
	if err != nil {
		t.Fatal(err)
	}
	if again, same, err := s.PushFile(t.Context(), "/bin/true", w.place("program"), OCI); err != nil || again != ref || same != root {
		t.Errorf("pushed again it is %v %v, %v; was %v %v", again, same, err, ref, root)
	}
	got, err := s.Fetch(t.Context(), ref, root, OCI)
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile("/bin/true")
	if err != nil {
		t.Fatal(err)
	}
	body, err := os.ReadFile(filepath.Join(got.Path, "app"))
	if err != nil || !bytes.Equal(body, want) || !slices.Equal(got.Config.Entrypoint, []string{"/app"}) {
		t.Errorf("got %d bytes, entrypoint %q, %v", len(body), got.Config.Entrypoint, err)
	}
	text := filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(text, []byte("#!/bin/sh"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.PushFile(t.Context(), text, w.place("text"), OCI); err == nil || !strings.Contains(err.Error(), "want a program for Linux") {
		t.Errorf("a text as an image: %v", err)
	}
}

func TestIndex(t *testing.T) {
	ctx := context.Background()
	index, amd, arm := twoPlatforms(t)
	armManifest, err := arm.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	armLayer := armManifest.Layers[0].Digest.Hex
	key, public := signingKey("release")

	for _, where := range []string{"registry", "layout"} {
		t.Run(where, func(t *testing.T) {
			w := newWorld(t)
			ref := w.push("two", index)
			if where == "layout" {
				ref = toLayout(t, index)
			}
			unsealed := newStore(t)
			root := rootOf(t, ref)
			content, err := unsealed.Fetch(ctx, ref, root, OCI)
			if err != nil {
				t.Fatalf("without a statement: %v", err)
			}
			if body, _ := os.ReadFile(filepath.Join(content.Path, "bin/app")); string(body) != "for amd64" {
				t.Errorf("got %q, want this platform's", body)
			}
			sealed, err := newStore(t).Seal(ctx, ref, key, Sealing{Custody: releasedBy(t, "ann", ref)})
			if err != nil || sealed != root {
				t.Fatalf("Seal: got %v, %v, want %v", sealed, err, root)
			}
			w.asked()
			s := newStore(t)
			s.Keys = append(s.Keys, public)
			d, err := s.Describe(ctx, ref, root, OCI)
			if err != nil || !d.Proved || len(d.Custody) != 1 || d.Custody[0].Principal != "ann" || d.Signer == "" {
				t.Errorf("Describe: got %+v, %v", d, err)
			}
			if want := []string{"linux/amd64", "linux/arm64/v8"}; !slices.Equal(d.Platforms, want) || d.Manifest != digestOf(t, amd) {
				t.Errorf("Describe: got platforms %v, manifest %s", d.Platforms, d.Manifest)
			}
			if _, err := s.Fetch(ctx, ref, root, OCI); err != nil {
				t.Fatal(err)
			}
			for _, path := range w.asked() {
				if strings.HasSuffix(path, armLayer) {
					t.Error("with a statement, the other platform's layer was downloaded")
				}
			}
			arm64 := newStore(t)
			arm64.Platform = "linux/arm64/v8"
			if _, err := arm64.Fetch(ctx, ref, root, OCI); err != nil {
				t.Errorf("the same root on the other platform: %v", err)
			}
		})
	}

	t.Run("T51 platform that the index does not have", func(t *testing.T) {
		w := newWorld(t)
		ref := w.push("two", index)
		s := newStore(t)
		s.Platform = "linux/riscv64"
		_, err := s.Fetch(ctx, ref, merkle.BlobRoot(nil), OCI)
		wantRefusal(t, s, err, "E_PLATFORM", "linux/arm64/v8", "linux/riscv64")
	})
	t.Run("T51 arm64 manifest under amd64", func(t *testing.T) {
		w := newWorld(t)
		swapped := indexOf(t, arm, &v1.Platform{OS: "linux", Architecture: "amd64"})
		ref := w.push("swapped", swapped)
		s := newStore(t)
		_, err := s.Fetch(ctx, ref, rootOf(t, ref), OCI)
		wantRefusal(t, s, err, "E_PLATFORM", "linux/arm64")
	})
	t.Run("T51 single manifest for another platform", func(t *testing.T) {
		w := newWorld(t)
		ref := w.push("arm", arm)
		s := newStore(t)
		_, err := s.Fetch(ctx, ref, rootOf(t, ref), OCI)
		wantRefusal(t, s, err, "E_PLATFORM", "linux/arm64")
	})
	t.Run("T51 extra manifest in the index", func(t *testing.T) {
		w := newWorld(t)
		pinned := rootOf(t, w.push("two", index))
		ref := w.push("three", withExtra(t, index, arm))
		s := newStore(t)
		_, err := s.Fetch(ctx, ref, pinned, OCI)
		wantRefusal(t, s, err, "E_MERKLE_ROOT", pinned.String())
	})
	t.Run("T52 statement gone and the other platform's blobs with it", func(t *testing.T) {
		w := newWorld(t)
		ref := w.push("two", index)
		root := rootOf(t, ref)
		w.lies(func(rw http.ResponseWriter, r *http.Request, honest http.Handler) {
			if strings.HasSuffix(r.URL.Path, armLayer) {
				http.NotFound(rw, r)
				return
			}
			honest.ServeHTTP(rw, r)
		})
		s := newStore(t)
		_, err := s.Fetch(ctx, ref, root, OCI)
		wantRefusal(t, s, err, "E_MERKLE_MISSING", armLayer)
	})
	t.Run("T52 statements cannot be asked for", func(t *testing.T) {
		for _, status := range []int{400, 404, 405, 500, 503} {
			w := newWorld(t)
			ref := w.push("two", index)
			root := rootOf(t, ref)
			w.lies(func(rw http.ResponseWriter, r *http.Request, honest http.Handler) {
				if strings.Contains(r.URL.Path, "/referrers/") {
					rw.WriteHeader(status)
					return
				}
				honest.ServeHTTP(rw, r)
			})
			s := newStore(t)
			if _, err := s.Fetch(ctx, ref, root, OCI); err != nil {
				t.Errorf("status %d: Fetch: %v", status, err)
			}
			d, err := newStore(t).Describe(ctx, ref, root, OCI)
			if (err == nil) != (status < 500) || refusal.Of(err) != nil || d.Proved {
				t.Errorf("status %d: Describe: got %+v, %v", status, d, err)
			}
		}
	})
	t.Run("T52 a stranger's lie is ignored, and all is computed", func(t *testing.T) {
		w := newWorld(t)
		ref := w.push("two", index)
		root := rootOf(t, ref)
		liar, _ := signingKey("liar")
		pushLie(t, newStore(t), ref, root, liar)
		s := newStore(t)
		w.asked()
		if _, err := s.Fetch(ctx, ref, root, OCI); err != nil {
			t.Fatal(err)
		}
		if !slices.ContainsFunc(w.asked(), func(path string) bool { return strings.HasSuffix(path, armLayer) }) {
			t.Error("the other platform's layer was not downloaded: the lie was believed")
		}
	})
}

func TestPins(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	ref := w.push("app", simple(t, "linux/amd64", reg("a", "1")))
	root := rootOf(t, ref)
	t.Run("T45 tag, tag and digest, no digest, no registry", func(t *testing.T) {
		digest := "@sha256:" + ref.SHA256
		for _, text := range []string{"reg.example/app", "reg.example/app:v1", "reg.example/app:v1" + digest, "localhost:5000/app:v1" + digest, "app" + digest, "library/app" + digest, "reg.example/app@sha512:00",
			"reg.example/app@sha256:" + strings.ToUpper(ref.SHA256), "reg.example/app" + digest + "00", "reg.example/" + digest, "oci-layout:rel" + digest, "oci-layout:/a/../b" + digest, "reg.example/../x" + digest, ""} {
			if got, err := ParseReference(text); refusal.Of(err) == nil || refusal.Of(err).Code != "KT006" {
				t.Errorf("ParseReference(%q): got %v, %v, want KT006", text, got, err)
			}
		}
		for _, text := range []string{ref.String(), "reg.example/a/b" + digest, "oci-layout:/srv/images" + digest, "localhost:5000/app" + digest} {
			if got, err := ParseReference(text); err != nil || got.String() != text {
				t.Errorf("ParseReference(%q): got %v, %v", text, got, err)
			}
		}
	})
	t.Run("T47 sha256 right, kmo1 wrong", func(t *testing.T) {
		s := newStore(t)
		wrong := root
		wrong[0] ^= 1
		_, err := s.Fetch(ctx, ref, wrong, OCI)
		wantRefusal(t, s, err, "E_MERKLE_ROOT", root.String(), wrong.String())
		if _, err := s.Fetch(ctx, ref, root, OCI); err != nil {
			t.Errorf("the right root afterwards: %v", err)
		}
	})
	t.Run("T47 U-29 kmo1 right, sha256 wrong", func(t *testing.T) {
		s := newStore(t)
		other := w.push("app", simple(t, "linux/amd64", reg("a", "2")))
		_, err := s.Fetch(ctx, other, root, OCI)
		wantRefusal(t, s, err, "E_MERKLE_ROOT")
	})
	t.Run("KT007 no root at all", func(t *testing.T) {
		s := newStore(t)
		_, err := s.Fetch(ctx, ref, merkle.Digest{}, OCI)
		wantRefusal(t, s, err, "KT007")
	})
	t.Run("a file's format on an image of two layers", func(t *testing.T) {
		two := w.push("two", imageOf(t, "linux/amd64", nil, blobOf{types.OCIUncompressedLayer, archive(t)}, blobOf{types.OCIUncompressedLayer, archive(t, reg("a", ""))}))
		s := newStore(t)
		_, err := s.Fetch(ctx, two, rootOf(t, two), Native)
		wantRefusal(t, s, err, "E_LAYER", "2 layers")
	})
}

func TestMirror(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	image := simple(t, "linux/amd64", reg("a", "1"))
	ref := w.push("app", image)
	root := rootOf(t, ref)
	mirror := toLayout(t, image)
	s := newStore(t)
	s.Mirror = mirror.Layout
	w.asked()
	if _, err := s.Fetch(ctx, ref, root, OCI); err != nil {
		t.Fatal(err)
	}
	for _, path := range w.asked() {
		if strings.Contains(path, "/blobs/") || strings.Contains(path, "/manifests/") {
			t.Errorf("the registry was asked for %s, which the mirror has", path)
		}
	}
	m, err := image.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	spoil(t, filepath.Join(mirror.Layout, "blobs/sha256", m.Layers[0].Digest.Hex))
	liar := newStore(t)
	liar.Mirror = mirror.Layout
	if _, err := liar.Fetch(ctx, ref, root, OCI); err != nil {
		t.Errorf("a lying mirror before an honest registry: %v", err)
	}
}

// spoil flips one bit in the middle of a file.
func spoil(t *testing.T, path string) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)/2] ^= 1
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func BenchmarkFetchKnown(b *testing.B) {
	dir := filepath.Join(b.TempDir(), "module")
	if err := os.WriteFile(dir, []byte("program"), 0o600); err != nil {
		b.Fatal(err)
	}
	s := &Store{Dir: b.TempDir(), Platform: "linux/amd64"}
	ref, root, err := s.PushFile(context.Background(), dir, Reference{Layout: filepath.Join(b.TempDir(), "layout")}, Native)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := s.Fetch(context.Background(), ref, root, Native); err != nil {
			b.Fatal(err)
		}
	}
}

// TestClear has an image that is kept, one that something stands on, and one that nobody wants, with what crashes have left of them.
func TestClear(t *testing.T) {
	ctx := t.Context()
	s := newStore(t)
	fetch := func(s *Store, pin Pin) Content {
		t.Helper()
		content, err := s.Fetch(ctx, pin.Ref, pin.Root, pin.Format)
		if err != nil {
			t.Fatal(err)
		}
		return content
	}
	var pins []Pin
	var old, last []Content // unpacked, and a crash came before it was recorded; and recorded
	index, _, _ := twoPlatforms(t)
	for _, what := range []any{index, simple(t, "linux/amd64", reg("a", "in use")), simple(t, "linux/amd64", reg("a", "unwanted"))} {
		ref := toLayout(t, what)
		pin := Pin{ref, rootOf(t, ref), OCI}
		for range 3 {
			old = append(old, fetch(s, pin))
			if err := os.Remove(s.recordPath(s.key(ref, pin.Root, OCI))); err != nil {
				t.Fatal(err)
			}
			s = &Store{Dir: s.Dir, Platform: s.Platform}
		}
		pins, last = append(pins, pin), append(last, fetch(s, pin))
	}
	left := func() (contents []string) {
		for _, content := range append(slices.Clone(old), last...) {
			if _, err := os.Stat(content.Path); err == nil {
				contents = append(contents, content.Path)
			}
		}
		return contents
	}
	clear := func(inUse ...string) []string {
		t.Helper()
		removed, err := s.Clear(t.Context(), pins[:1], inUse)
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range removed {
			if _, err := os.Lstat(filepath.Join(s.Dir, path)); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s: %v, want that it is gone", path, err)
			}
		}
		return removed
	}

	s.locks.filling.RLock()
	if _, err := s.Clear(t.Context(), nil, nil); !errors.Is(err, errFilling) || len(left()) != 12 {
		t.Errorf("while an image is fetched: %v, %d copies, want that all stay", err, len(left()))
	}
	s.locks.filling.RUnlock()

	elsewhere := strings.Replace(old[3].Path, s.Dir, "/an/earlier/name", 1)
	if removed := clear(elsewhere); len(removed) != 8 {
		t.Errorf("removed %v, want the 8 copies that are neither recorded nor in use", removed)
	}
	if diff := cmp.Diff([]string{old[3].Path, last[0].Path, last[1].Path, last[2].Path}, left()); diff != "" {
		t.Error(diff)
	}

	days := time.Now().Add(-2 * grace)
	for _, pattern := range []string{"images/*", "blobs/sha256/*"} {
		all, err := filepath.Glob(filepath.Join(s.Dir, pattern))
		for _, path := range all {
			err = errors.Join(err, os.Chtimes(path, days, days))
		}
		if err != nil || len(all) == 0 {
			t.Fatal(len(all), err)
		}
	}
	clear(old[3].Path)
	if diff := cmp.Diff([]string{old[3].Path, last[0].Path, last[1].Path}, left()); diff != "" {
		t.Error(diff)
	}
	clear()
	if diff := cmp.Diff([]string{last[0].Path}, left()); diff != "" {
		t.Error(diff)
	}
	if removed := clear(); len(removed) != 0 {
		t.Errorf("removed %v, want nothing more", removed)
	}
	for _, pin := range pins {
		if err := os.Rename(pin.Ref.Layout, pin.Ref.Layout+"-away"); err != nil {
			t.Fatal(err)
		}
	}
	spoil(t, filepath.Join(last[0].Path, "bin/app"))
	if content, err := s.Repair(ctx, pins[0].Ref, pins[0].Root, OCI); err != nil || s.Check(ctx, content) != nil {
		t.Errorf("repairing what was kept, without its source: %v", err)
	}
	if _, err := s.Fetch(ctx, pins[2].Ref, pins[2].Root, OCI); err == nil {
		t.Error("what was removed is still there")
	}
}
