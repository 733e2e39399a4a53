package registry

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/google/go-containerregistry/pkg/name"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/registry/merkle"
)

// world is a registry on loopback that can be made to lie.
type world struct {
	t      *testing.T
	server *httptest.Server
	honest http.Handler

	mu       sync.Mutex
	lie      func(w http.ResponseWriter, r *http.Request, honest http.Handler) // nil for none
	requests []string                                                          // GETs, in order
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, honest: Memory()}
	w.server = httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		w.mu.Lock()
		lie := w.lie
		if r.Method == http.MethodGet {
			w.requests = append(w.requests, r.URL.Path)
		}
		w.mu.Unlock()
		if lie != nil {
			lie(rw, r, w.honest)
			return
		}
		w.honest.ServeHTTP(rw, r)
	}))
	t.Cleanup(w.server.Close)
	return w
}

// lies makes the registry answer with lie until the test ends.
func (w *world) lies(lie func(http.ResponseWriter, *http.Request, http.Handler)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.lie = lie
}

// lieAbout changes the body of what is asked for by a path that ends in suffix.
func (w *world) lieAbout(suffix string, change func([]byte) []byte) {
	w.lies(func(rw http.ResponseWriter, r *http.Request, honest http.Handler) {
		recorder := httptest.NewRecorder()
		honest.ServeHTTP(recorder, r)
		body := recorder.Body.Bytes()
		if strings.HasSuffix(r.URL.Path, suffix) && r.Method == http.MethodGet && recorder.Code == http.StatusOK {
			body = change(bytes.Clone(body))
		}
		for k, v := range recorder.Header() {
			if k != "Content-Length" {
				rw.Header()[k] = v
			}
		}
		rw.WriteHeader(recorder.Code)
		rw.Write(body)
	})
}

// asked returns and forgets the paths that were asked for.
func (w *world) asked() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	all := w.requests
	w.requests = nil
	return all
}

func (w *world) host() string { return strings.TrimPrefix(w.server.URL, "http://") }

func (w *world) place(repository string) Reference {
	return Reference{Host: w.host(), Repository: repository}
}

// push puts an image or index into the registry and returns its reference.
func (w *world) push(repository string, what remote.Taggable) Reference {
	w.t.Helper()
	ref := w.place(repository)
	ref.SHA256 = digestOf(w.t, what)
	at, err := name.NewDigest(ref.String(), name.Insecure)
	if err != nil {
		w.t.Fatal(err)
	}
	if err := remote.Push(at, what); err != nil {
		w.t.Fatal(err)
	}
	return ref
}

func digestOf(t *testing.T, what remote.Taggable) string {
	t.Helper()
	raw, err := what.RawManifest()
	if err != nil {
		t.Fatal(err)
	}
	return sha256Hex(raw)
}

func newStore(t *testing.T) *Store {
	return &Store{Dir: filepath.Join(t.TempDir(), "store"), Platform: "linux/amd64"}
}

// file is one entry of a layer.
type file struct {
	tar.Header
	body string
}

func reg(path, body string) file {
	return file{tar.Header{Name: path, Typeflag: tar.TypeReg, Mode: 0o644}, body}
}

func dir(path string) file {
	return file{tar.Header{Name: path + "/", Typeflag: tar.TypeDir, Mode: 0o755}, ""}
}

func link(typ byte, path, to string) file {
	return file{tar.Header{Name: path, Typeflag: typ, Linkname: to, Mode: 0o777}, ""}
}

func archive(t testing.TB, files ...file) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, f := range files {
		h := f.Header
		h.Size = int64(len(f.body))
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, f.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func gz(t testing.TB, data []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func zst(t testing.TB, data []byte, options ...zstd.EOption) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := zstd.NewWriter(&out, options...)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// built is an image whose manifest and config are exactly these bytes.
type built struct {
	v1.Image
	manifest, config []byte
}

func (b built) RawManifest() ([]byte, error)   { return b.manifest, nil }
func (b built) RawConfigFile() ([]byte, error) { return b.config, nil }
func (b built) Size() (int64, error)           { return int64(len(b.manifest)), nil }
func (b built) Manifest() (*v1.Manifest, error) {
	return v1.ParseManifest(bytes.NewReader(b.manifest))
}
func (b built) ConfigName() (v1.Hash, error) {
	return v1.Hash{Algorithm: "sha256", Hex: sha256Hex(b.config)}, nil
}
func (b built) Digest() (v1.Hash, error) {
	return v1.Hash{Algorithm: "sha256", Hex: sha256Hex(b.manifest)}, nil
}

// blobOf is a layer of exact bytes.
type blobOf struct {
	media types.MediaType
	data  []byte
}

// imageOf builds an image for a platform; diff ids are left out of its config unless given.
func imageOf(t testing.TB, platform string, diffs []string, layers ...blobOf) v1.Image {
	t.Helper()
	img, err := mutate.ConfigFile(mutate.MediaType(empty.Image, types.OCIManifestSchema1), &v1.ConfigFile{})
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range layers {
		if img, err = mutate.Append(img, mutate.Addendum{Layer: static.NewLayer(l.data, l.media), MediaType: l.media}); err != nil {
			t.Fatal(err)
		}
	}
	p, err := v1.ParsePlatform(platform)
	if err != nil {
		t.Fatal(err)
	}
	config := map[string]any{"os": p.OS, "architecture": p.Architecture, "config": map[string]any{"Entrypoint": []string{"/bin/app"}, "Env": []string{"A=1"}, "WorkingDir": "/srv", "User": "7"}}
	if diffs != nil {
		config["rootfs"] = map[string]any{"type": "layers", "diff_ids": diffs}
	}
	raw, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	m, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	m = m.DeepCopy()
	m.MediaType = types.OCIManifestSchema1
	m.Config = v1.Descriptor{MediaType: types.OCIConfigJSON, Size: int64(len(raw)), Digest: v1.Hash{Algorithm: "sha256", Hex: sha256Hex(raw)}}
	manifest, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return built{img, manifest, raw}
}

// simple is an image of one gzip layer.
func simple(t testing.TB, platform string, files ...file) v1.Image {
	t.Helper()
	tarball := archive(t, files...)
	return imageOf(t, platform, []string{"sha256:" + sha256Hex(tarball)}, blobOf{types.OCILayer, gz(t, tarball)})
}

// twoPlatforms is an index of an amd64 and an arm64 image.
func twoPlatforms(t testing.TB) (v1.ImageIndex, v1.Image, v1.Image) {
	t.Helper()
	amd := simple(t, "linux/amd64", dir("bin"), reg("bin/app", "for amd64"))
	arm := simple(t, "linux/arm64", dir("bin"), reg("bin/app", "for arm64"))
	index := mutate.AppendManifests(mutate.IndexMediaType(empty.Index, types.OCIImageIndex),
		mutate.IndexAddendum{Add: amd, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "amd64"}}},
		mutate.IndexAddendum{Add: arm, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}}})
	return index, amd, arm
}

// toLayout writes an image or index into a fresh layout folder.
func toLayout(t *testing.T, what any) Reference {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "layout")
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	switch x := what.(type) {
	case v1.Image:
		err = path.AppendImage(x)
	case v1.ImageIndex:
		err = path.AppendIndex(x)
	}
	if err != nil {
		t.Fatal(err)
	}
	return Reference{Layout: dir, SHA256: digestOf(t, what.(remote.Taggable))}
}

// signingKey is the same key for the same name.
func signingKey(name string) (ed25519.PrivateKey, crypto.PublicKey) {
	key := ed25519.NewKeyFromSeed([]byte(sha256Hex([]byte(name))[:32]))
	return key, key.Public()
}

// rootOf computes the root to pin with a store of its own.
func rootOf(t *testing.T, ref Reference) merkle.Digest {
	t.Helper()
	root, err := newStore(t).Root(context.Background(), ref)
	if err != nil {
		t.Fatal(err)
	}
	return root
}

// wantRefusal checks the code, the place, and that the store holds nothing half-done.
func wantRefusal(t *testing.T, s *Store, err error, code refusal.Code, words ...string) {
	t.Helper()
	r := refusal.Of(err)
	if r == nil || r.Code != code {
		t.Fatalf("got %v, want a refusal %s", err, code)
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("refusal %q does not say %q", err, word)
		}
	}
	wantClean(t, s, true)
}

// wantClean checks that nothing temporary is left, and with empty that no content was promoted.
func wantClean(t *testing.T, s *Store, empty bool) {
	t.Helper()
	folders := []string{"tmp"}
	if empty {
		folders = append(folders, "content", "images")
	}
	for _, folder := range folders {
		left, err := os.ReadDir(filepath.Join(s.Dir, folder))
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		for _, entry := range left {
			t.Errorf("%s is left in %s", entry.Name(), folder)
		}
	}
	s.locks.mu.Lock()
	defer s.locks.mu.Unlock()
	if len(s.locks.held) > 0 {
		t.Errorf("%d locks are still held", len(s.locks.held))
	}
}

// indexOf is an index of one image under a platform.
func indexOf(t testing.TB, image v1.Image, platform *v1.Platform) v1.ImageIndex {
	t.Helper()
	return mutate.AppendManifests(mutate.IndexMediaType(empty.Index, types.OCIImageIndex), mutate.IndexAddendum{Add: image, Descriptor: v1.Descriptor{Platform: platform}})
}

func withExtra(t testing.TB, index v1.ImageIndex, image v1.Image) v1.ImageIndex {
	t.Helper()
	return mutate.AppendManifests(index, mutate.IndexAddendum{Add: image, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "s390x"}}})
}

// pushLie puts a statement beside an image that is about it by both digests, but gives wrong roots.
func pushLie(t *testing.T, s *Store, ref Reference, root merkle.Digest, signer crypto.Signer) {
	t.Helper()
	lie := sampleStatement(ref.SHA256, root)
	for _, m := range wholeOf(t, ref).top.members {
		lie.Predicate.Platforms = append(lie.Predicate.Platforms, PlatformRoot{SHA256: m.desc.Digest.Hex, ManifestRoot: merkle.BlobRoot([]byte("lie"))})
	}
	pushStatement(t, s, ref, lie, signer)
}

// pushStatement puts a statement beside an image, whatever it says.
func pushStatement(t *testing.T, s *Store, ref Reference, statement *Statement, signer crypto.Signer) {
	t.Helper()
	raw, err := SignStatement(statement, signer)
	if err != nil {
		t.Fatal(err)
	}
	subject := wholeOf(t, ref).top.desc
	if _, err := s.push(context.Background(), ref, v1.Manifest{ArtifactType: StatementArtifact, Subject: &subject}, memory(emptyConfig, []byte("{}")), memory(envelopeMedia, raw)); err != nil {
		t.Fatal(err)
	}
}

// wholeOf is an image with every root, by a store of its own.
func wholeOf(t *testing.T, ref Reference) *image {
	t.Helper()
	img, err := newStore(t).whole(context.Background(), ref, newRoots())
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func sampleStatement(sha256 string, root merkle.Digest) *Statement {
	return &Statement{Type: statementType, PredicateType: predicateType, Subject: []Subject{{Name: "image", Digest: map[string]string{"sha256": sha256, "kmo1": root.Hex()}}},
		Predicate: Predicate{Parameters: Parameters{"sha3-256", merkle.ChunkSize}}}
}

func writeBlob(t *testing.T, layout string, raw []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(layout, "blobs/sha256", sha256Hex(raw)), raw, 0o600); err != nil {
		t.Fatal(err)
	}
}

// nestedIndex is an index of an index.
func nestedIndex(t testing.TB, inner v1.ImageIndex) v1.ImageIndex {
	t.Helper()
	return mutate.AppendManifests(mutate.IndexMediaType(empty.Index, types.OCIImageIndex), mutate.IndexAddendum{Add: inner})
}

// slow is a place that gives a few bytes now and then, and for ever, if end does not say how many.
type slow struct {
	source
	answers, every time.Duration
	bytes          int
	end            int64
	ctx            context.Context
	given          int64
}

func (s *slow) open(ctx context.Context, _, _ string) (io.ReadCloser, int64, error) {
	s.ctx = ctx
	return io.NopCloser(s), -1, s.wait(s.answers)
}

func (s *slow) referrers(ctx context.Context, _ string) ([]v1.Descriptor, error) {
	s.ctx = ctx
	return nil, s.wait(s.answers)
}

func (s *slow) wait(long time.Duration) error {
	select {
	case <-s.ctx.Done():
		return context.Cause(s.ctx)
	case <-time.After(long):
		return nil
	}
}

func (s *slow) Read(p []byte) (int, error) {
	if s.end > 0 && s.given >= s.end {
		return 0, io.EOF
	}
	err := s.wait(s.every)
	n := min(len(p), s.bytes)
	clear(p[:n])
	s.given += int64(n)
	return n, err
}
