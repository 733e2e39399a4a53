// Package registry turns a reference and a kmo1 root into verified content on this host.
//
// A unit pins an image twice: by the sha256 of its manifest or index, in the reference, and by a kmo1 root (package merkle). Both must match, over
// every byte that is used here; where the bytes come from (a registry, a mirror, a folder) gives them no trust. What a root covers:
//
//	a manifest   its own bytes, its config and its layers
//	an index     its own bytes, and all its members, this platform's and the others'
//
// The members for other platforms are not downloaded if an image statement, found beside the image, gives their roots: the statement needs no trust for
// that, since the index's root comes out as pinned only if it is right. Without one everything is fetched and hashed. A layer's contentRoot
// is left empty in a manifest's root: the layer's bytes are there already.
//
// # On disk
//
// A store's folder is trusted: whoever can write there decides what runs. In it are
//
//	blobs/sha256/HEX       bytes as they came, verified; HEX.root has their kmo1 root and size
//	content/KEY/N/root     an unpacked image; content/KEY/N/file is a single file; N is the copy: a path never has other content later
//	content/KEY/N/tree     what was unpacked, one JSON entry a line: the list that Check goes by
//	images/KEY.json        the promoted record, written last: the copy it names is whole and proven
//	tmp/                   what is being written; what a process has left there is removed after a day
//
// Nothing of it goes by itself but what is in tmp: Clear is told what to keep.
//
// # Example
//
//	store := &registry.Store{Dir: "/var/lib/kmo/images"}
//	ref, err := registry.ParseReference("reg.example/relay@sha256:…")
//	content, err := store.Fetch(ctx, ref, root, registry.OCI)
//	// content.Path is the image's root file system
package registry

import (
	"cmp"
	"context"
	"crypto"
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

	"github.com/google/go-containerregistry/pkg/authn"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/registry/merkle"
)

// Store keeps verified images. Its methods may be called concurrently; its exported fields must not change after the first call.
type Store struct {
	Dir      string             // clean absolute path; made if it is not there
	Platform string             // os/arch[/variant] of what is fetched; "" means linux on this machine's architecture
	Mirror   string             // an OCI layout folder that is asked before the registry; "" for none
	Keychain authn.Keychain     // credentials for registries; nil for none
	Keys     []crypto.PublicKey // of those whose statements may lower limits; nil for none
	MaxImage int64              // bytes that may be downloaded for one image, and as many that it may unpack to; 0 means 64 GiB

	disk     func(path string) (free, size int64, err error) // of the file system at path
	once     sync.Once
	invalid  error
	platform v1.Platform
	locks    locks

	mu      sync.Mutex
	known   map[string]Content       // by key: what was fetched or loaded before
	remotes map[string]*remoteSource // by host and repository
	turns   map[string]chan struct{} // by what is asked for, and host
}

// Content is verified content on this host.
type Content struct {
	Path   string        `json:"path"` // folder or file, by format; to be read only
	Root   merkle.Digest `json:"root"` // contentRoot of the folder, blobRoot of the file
	Config Config        `json:"config"`
	Size   int64         `json:"size"`             // bytes of the files
	SetUID []string      `json:"setuid,omitempty"` // paths of set-uid and set-gid files and of those with capabilities, at most 100
}

// open validates the store once and makes its folders.
func (s *Store) open() error {
	s.once.Do(func() { s.invalid = s.validate() })
	return s.invalid
}

func (s *Store) validate() error {
	if !filepath.IsAbs(s.Dir) || filepath.Clean(s.Dir) != s.Dir {
		return fmt.Errorf("image store: folder %q: want a clean absolute path", s.Dir)
	}
	want := s.Platform
	if want == "" {
		want = "linux/" + runtime.GOARCH
	}
	platform, err := v1.ParsePlatform(want)
	if err != nil || platform.OS == "" || platform.Architecture == "" {
		return fmt.Errorf("image store: platform %q: want os/arch[/variant]", want)
	}
	s.platform = *platform
	s.MaxImage = cmp.Or(s.MaxImage, maxImage)
	if s.disk == nil {
		s.disk = statfs
	}
	s.known, s.remotes, s.turns = map[string]Content{}, map[string]*remoteSource{}, map[string]chan struct{}{}
	for _, dir := range []string{"blobs/sha256", "content", "images", "tmp"} {
		if err := os.MkdirAll(filepath.Join(s.Dir, dir), 0o755); err != nil {
			return fmt.Errorf("image store: %w", err)
		}
	}
	return s.sweep()
}

// image is one reference, resolved: the chain of documents from what is pinned to this platform's manifest.
type image struct {
	ref     Reference
	subject string
	at      []source
	top     *document
	chosen  *document // a manifest
	config  []byte
	oci     v1.ConfigFile
	known   roots
	size    int64              // bytes of the blobs that were asked for so far
	keys    []crypto.PublicKey // whose statements count
}

// grow adds what a manifest names that is still to be fetched or unpacked, as it says itself, and refuses an image that has too much.
func (s *Store) grow(img *image, blobs []v1.Descriptor) error {
	for _, blob := range blobs {
		img.size += blob.Size
	}
	if img.size > s.MaxImage {
		return refuse("E_LIMIT", img.subject, fmt.Sprintf("%d bytes to download", img.size), fmt.Sprintf("at most %d bytes", s.MaxImage))
	}
	return nil
}

// resolve gets indexes, manifest and config: small, each verified by its digest.
func (s *Store) resolve(ctx context.Context, ref Reference, format Format) (*image, error) {
	if !digestPattern.MatchString(ref.SHA256) {
		return nil, refuse("KT006", "image "+quote(ref.String()), "it is not pinned by sha256", "host/repository@sha256:<64 hex digits>")
	}
	ctx, cancel := context.WithTimeout(ctx, look)
	defer cancel()
	img := &image{ref: ref, subject: "image " + ref.String(), known: newRoots(), keys: s.Keys}
	img.at = s.sources(ref)
	var err error
	if img.top, err = s.document(ctx, img.at, img.subject, v1.Descriptor{Size: -1, Digest: v1.Hash{Algorithm: "sha256", Hex: ref.SHA256}}); err != nil {
		return nil, err
	}
	if img.chosen, err = s.chooseIn(ctx, img, img.top, s.wanted(format), 1); err != nil {
		return nil, err
	}
	if img.chosen == nil {
		return nil, refuse("E_PLATFORM", img.subject, "it has "+strings.Join(img.top.platforms(), ", "), s.wanted(format).String())
	}
	config := img.chosen.manifest.Config
	if img.config, err = s.small(ctx, img.at, kindBlob, img.subject+": config sha256:"+config.Digest.Hex, config); err != nil {
		return nil, err
	}
	img.known.blobs[config.Digest.Hex] = merkle.BlobRoot(img.config)
	if config.MediaType.IsConfig() {
		if err := json.Unmarshal(img.config, &img.oci); err != nil {
			return nil, refuse("E_DECODE", img.subject, "config: "+refusal.Clip(err.Error(), 200), "an OCI image config")
		}
	}
	return img, s.checkPlatform(img, format)
}

// sources are the places to ask for a reference, in order.
func (s *Store) sources(ref Reference) []source {
	switch {
	case ref.Layout != "":
		return []source{layoutSource{ref.Layout}}
	case s.Mirror != "":
		return []source{layoutSource{s.Mirror}, &lazySource{store: s, ref: ref}}
	}
	return []source{&lazySource{store: s, ref: ref}}
}

func (s *Store) wanted(format Format) v1.Platform {
	if format == WASM {
		return v1.Platform{OS: "wasip1", Architecture: "wasm"}
	}
	return s.platform
}

// chooseIn finds the manifest for a platform, through nested indexes; nil if there is none.
func (s *Store) chooseIn(ctx context.Context, img *image, d *document, want v1.Platform, depth int) (*document, error) {
	if d.manifest != nil {
		return d, nil
	}
	if depth > maxDepth {
		return nil, refuse("E_LIMIT", img.subject, fmt.Sprintf("indexes nested deeper than %d", maxDepth), fmt.Sprintf("at most %d", maxDepth))
	}
	found := d.choose(want)
	for _, m := range d.members {
		if m != found && (found != nil || !m.desc.MediaType.IsIndex()) {
			continue
		}
		if err := s.load(ctx, img, m); err != nil {
			return nil, err
		}
		if chosen, err := s.chooseIn(ctx, img, m, want, depth+1); chosen != nil || err != nil {
			return chosen, err
		}
	}
	return nil, nil
}

// load fetches a member of an index in place.
func (s *Store) load(ctx context.Context, img *image, d *document) error {
	if d.raw != nil {
		return nil
	}
	loaded, err := s.document(ctx, img.at, img.subject, d.desc)
	if err != nil {
		return err
	}
	loaded.desc.Platform = d.desc.Platform
	*d = *loaded
	return nil
}

// checkPlatform holds the manifest against what the index and the host say: a manifest may have been put in another's place.
func (s *Store) checkPlatform(img *image, format Format) error {
	got := v1.Platform{OS: img.oci.OS, Architecture: img.oci.Architecture}
	want := s.wanted(format)
	if got.OS == "" && got.Architecture == "" {
		return nil // an artifact's config says nothing
	}
	if got.OS != want.OS || got.Architecture != want.Architecture {
		return refuse("E_PLATFORM", img.subject, "its config is for "+quote(got.String()), want.String())
	}
	return nil
}

// platforms lists what an index's members, or a manifest, are for.
func (d *document) platforms() []string {
	all := make([]string, 0, len(d.members))
	for _, m := range d.members {
		all = append(all, quote(platformText(m.desc.Platform)))
	}
	return all
}

// Describe gets an image's index, manifest and config, verified by sha256, and compares them with the root where a statement, or blobs that are
// here already, allow it; Fetch compares in any case. A root of none describes what is there. A statement counts that one of keys, or of Store.Keys, signed.
func (s *Store) Describe(ctx context.Context, ref Reference, root merkle.Digest, format Format, keys ...crypto.PublicKey) (Description, error) {
	if err := s.open(); err != nil {
		return Description{}, err
	}
	done, err := s.turn(ctx, "describe", ref)
	if err != nil {
		return Description{}, err
	}
	defer done()
	img, err := s.resolve(ctx, ref, format)
	if err != nil {
		return Description{}, err
	}
	img.keys = append(keys, img.keys...)
	d := Description{Ref: ref.String(), SHA256: ref.SHA256, Root: root, Manifest: img.chosen.desc.Digest.Hex, Artifact: img.chosen.manifest.ArtifactType,
		Layers: len(img.chosen.manifest.Layers), Config: img.run(), Platform: platformText(img.chosen.desc.Platform)}
	for _, m := range img.top.members {
		d.Platforms = append(d.Platforms, platformText(m.desc.Platform))
	}
	if d.Platform == "" && img.oci.OS != "" {
		d.Platform = img.oci.OS + "/" + img.oci.Architecture
	}
	for _, layer := range img.chosen.manifest.Layers {
		d.Size += layer.Size
		if known, ok := readRoot(s.blobPath(layer.Digest.Hex)+".root", layer.Size); ok {
			img.known.blobs[layer.Digest.Hex] = known
		}
	}
	if root.IsZero() {
		return d, nil
	}
	d.Statement, d.Signer, d.Proved, err = s.proveByStatement(ctx, img, root)
	if d.Signer != "" && len(d.Statement.Predicate.Custody) > 0 {
		d.Custody = d.Statement.Predicate.Custody.Verify()
	}
	return d, err
}

// Fetch returns the image's content, verified against both pins. Once it has, the same pins cost one look at the disk and no network.
func (s *Store) Fetch(ctx context.Context, ref Reference, root merkle.Digest, format Format) (Content, error) {
	if err := s.open(); err != nil {
		return Content{}, err
	}
	if root.IsZero() {
		return Content{}, refuse("KT007", "image "+ref.String(), "it has no kmo1 root", "kmo1:sha3-256:<64 hex digits>")
	}
	key := s.key(ref, root, format)
	if content, ok := s.recall(ctx, key); ok {
		return content, nil
	}
	unlock, err := s.locks.lock(ctx, key)
	if err != nil {
		return Content{}, err
	}
	defer unlock()
	if content, ok := s.recall(ctx, key); ok {
		return content, nil
	}
	done, err := s.turn(ctx, "fetch", ref)
	if err != nil {
		return Content{}, err
	}
	defer done()
	return s.fetch(ctx, ref, root, format, key)
}

func (s *Store) fetch(ctx context.Context, ref Reference, root merkle.Digest, format Format, key string) (Content, error) {
	s.locks.filling.RLock()
	defer s.locks.filling.RUnlock()
	ctx, cancel := context.WithTimeout(ctx, longest)
	defer cancel()
	img, err := s.resolve(ctx, ref, format)
	if err != nil {
		return Content{}, err
	}
	if n := len(img.chosen.manifest.Layers); !format.folder() && n != 1 {
		return Content{}, refuse("E_LAYER", img.subject, fmt.Sprintf("%d layers", n), "exactly one, for "+string(format))
	}
	if err := s.grow(img, img.chosen.manifest.Layers); err != nil {
		return Content{}, err
	}
	if err := s.room(img.size + s.missing(img.chosen.manifest.Layers)); err != nil { // they unpack to as much at least
		return Content{}, fmt.Errorf("%s: %w", img.subject, err)
	}
	for i, layer := range img.chosen.manifest.Layers {
		blobRoot, err := s.blob(ctx, img.at, fmt.Sprintf("%s: layer %d", img.subject, i), layer, true)
		if err != nil {
			return Content{}, err
		}
		img.known.blobs[layer.Digest.Hex] = blobRoot
	}
	statement, err := s.prove(ctx, img, root)
	if err != nil {
		return Content{}, err
	}
	content, err := s.place(ctx, img, format, key, statement)
	if err != nil {
		return Content{}, err
	}
	content.Config = img.run()
	return content, s.remember(key, content)
}

// prove compares the pinned root with what the bytes give. Roots of members for other platforms come from a statement, or from their bytes.
func (s *Store) prove(ctx context.Context, img *image, root merkle.Digest) (*Statement, error) {
	statement, signer, proved, err := s.proveByStatement(ctx, img, root)
	if refusal.Of(err) != nil || proved {
		if signer == "" {
			statement = nil // a stranger's may prove, but not lower limits
		}
		return statement, err
	}
	if err := s.loadAll(ctx, img, img.top, 1); err != nil { // no statement, or none to be had now: the bytes say it as well
		if errors.Is(err, errAbsent) {
			return nil, refuse("E_MERKLE_MISSING", img.subject, refusal.Clip(err.Error(), 300), "a statement with the roots of all its platforms, or all their blobs")
		}
		return nil, err
	}
	got, err := img.top.root(img.known)
	if err != nil {
		return nil, err
	}
	return nil, mismatch(img.subject, got, root)
}

// mismatch is nil, or E_MERKLE_ROOT.
func mismatch(subject string, got, want merkle.Digest) error {
	if got == want {
		return nil
	}
	r := refuse("E_MERKLE_ROOT", subject, got.String(), want.String())
	r.Err = &merkle.MismatchError{Name: subject, Got: got, Want: want}
	return r
}

// loadAll makes every root below d known from bytes.
func (s *Store) loadAll(ctx context.Context, img *image, d *document, depth int) error {
	if depth > maxDepth+1 {
		return refuse("E_LIMIT", img.subject, fmt.Sprintf("indexes nested deeper than %d", maxDepth), fmt.Sprintf("at most %d", maxDepth))
	}
	if err := s.load(ctx, img, d); err != nil {
		return err
	}
	if d.manifest != nil {
		unknown := slices.DeleteFunc(d.blobs(), func(blob v1.Descriptor) bool { return !img.known.blobs[blob.Digest.Hex].IsZero() })
		if err := s.grow(img, unknown); err != nil {
			return err
		}
		for _, blob := range unknown {
			var root merkle.Digest
			var err error
			if img.known.unpacked != nil && blob.MediaType.IsLayer() && blob.MediaType.IsDistributable() {
				root, err = s.measure(ctx, img, blob)
			} else {
				root, err = s.blob(ctx, img.at, img.subject, blob, false)
			}
			if err != nil {
				return err
			}
			img.known.blobs[blob.Digest.Hex] = root
		}
	}
	for _, m := range d.members {
		if err := s.loadAll(ctx, img, m, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// key names a pinned image: what it is, what it must be, and for which platform.
func (s *Store) key(ref Reference, root merkle.Digest, format Format) string {
	return sha256Hex([]byte(ref.SHA256 + " " + root.Hex() + " " + string(format) + " " + s.wanted(format).String()))
}

// record is what images/KEY.json holds.
type record struct {
	Boot    string  `json:"boot"` // of the kernel that wrote the content
	Content Content `json:"content"`
}

// recall returns the content of a promoted record, if the record and the content are there. Content is not synced to the disk when it is
// unpacked, so after another boot it is read once and compared; what a power cut has torn is not there.
func (s *Store) recall(ctx context.Context, key string) (Content, bool) {
	s.mu.Lock()
	content, ok := s.known[key]
	s.mu.Unlock()
	if ok {
		_, err := os.Lstat(content.Path)
		return content, err == nil
	}
	r, err := s.recorded(key)
	if err != nil || r.Content.Root.IsZero() {
		return Content{}, false
	}
	if _, err := os.Lstat(r.Content.Path); err != nil {
		return Content{}, false
	}
	if boot := bootID(); boot == "" || boot != r.Boot {
		done, err := s.turn(ctx, "check", Reference{})
		if err != nil {
			return Content{}, false
		}
		defer done()
		if s.Check(ctx, r.Content) != nil || s.remember(key, r.Content) != nil {
			return Content{}, false
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.known[key] = r.Content
	return r.Content, true
}

// bootID tells one boot of a Linux kernel from another; "" elsewhere.
func bootID() string {
	id, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(id))
}

func (s *Store) recordPath(key string) string { return filepath.Join(s.Dir, "images", key+".json") }

// remember writes the promoted record: the last step.
func (s *Store) remember(key string, content Content) error {
	err := s.promote(s.recordPath(key), func(w io.Writer) error { return json.NewEncoder(w).Encode(record{bootID(), content}) })
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.known[key] = content
	return nil
}
