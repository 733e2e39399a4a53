package registry

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/kindos/kmo/registry/merkle"
)

// Media types of what is pushed.
const (
	emptyConfig   = "application/vnd.oci.empty.v1+json"
	envelopeMedia = "application/vnd.dsse.envelope.v1+json"
	wasmConfig    = "application/vnd.wasm.config.v0+json"
	wasmLayer     = "application/wasm"
	nativeMedia   = "application/vnd.kmo.native.v1"
	appImageMedia = "application/vnd.kmo.appimage.v1"
)

// Sealing is what a statement says beyond roots.
type Sealing struct {
	Custody []CustodyLink
	Intent  *map[string]string
}

// Root is the root to pin for an image, computed from all of its bytes on all platforms.
func (s *Store) Root(ctx context.Context, ref Reference) (merkle.Digest, error) {
	img, err := s.whole(ctx, ref, newRoots())
	if err != nil {
		return merkle.Digest{}, err
	}
	return img.top.root(img.known)
}

// whole gets every document of an image and adds the root of every blob to known.
func (s *Store) whole(ctx context.Context, ref Reference, known roots) (*image, error) {
	if err := s.open(); err != nil {
		return nil, err
	}
	img := &image{ref: ref, subject: "image " + ref.String(), known: known}
	img.at = s.sources(ref)
	img.top = &document{desc: v1.Descriptor{Size: -1, Digest: v1.Hash{Algorithm: "sha256", Hex: ref.SHA256}}}
	return img, s.loadAll(ctx, img, img.top, 1)
}

// measure is the root of a layer, and notes how many bytes it unpacks to, in one pass.
func (s *Store) measure(ctx context.Context, img *image, layer v1.Descriptor) (root merkle.Digest, err error) {
	subject := img.subject + ": blob sha256:" + layer.Digest.Hex
	err = s.read(ctx, img.at, kindBlob, subject, layer, func(r io.Reader) error {
		v := newVerifier(subject, layer, r, true)
		tarball, done, err := decompress(subject, layer, v, "", maxUnpacked)
		if err == nil {
			_, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, tarball, make([]byte, 256<<10))
			done()
		}
		if _, lie := io.Copy(io.Discard, v); lie != nil { // other bytes than the digest's explain what is wrong in them
			return lie
		}
		if err == nil {
			root, img.known.unpacked[layer.Digest.Hex] = v.blob.Root(), tarball.size
		}
		return err
	})
	return root, err
}

// Seal computes the roots of an image that is already in its registry or layout, from all of its bytes, signs them with what its layers unpack
// to, and puts the statement beside it. It returns the root to pin.
func (s *Store) Seal(ctx context.Context, ref Reference, signer crypto.Signer, sealing Sealing) (merkle.Digest, error) {
	known := newRoots()
	known.unpacked = map[string]int64{}
	img, err := s.whole(ctx, ref, known)
	if err != nil {
		return merkle.Digest{}, err
	}
	root, err := img.top.root(img.known)
	if err != nil {
		return merkle.Digest{}, err
	}
	statement := &Statement{Type: statementType, PredicateType: predicateType,
		Subject:   []Subject{{Name: Reference{Host: ref.Host, Repository: ref.Repository, Layout: ref.Layout}.String(), Digest: map[string]string{"sha256": ref.SHA256, "kmo1": root.Hex()}}},
		Predicate: Predicate{Parameters: Parameters{"sha3-256", merkle.ChunkSize}, Platforms: []PlatformRoot{}, Blobs: []BlobRoot{}, Custody: sealing.Custody, Intent: sealing.Intent}}
	if img.top.index != nil {
		statement.Predicate.IndexRoot = root
	}
	if err := img.top.state(&statement.Predicate, img.known, map[string]bool{}); err != nil {
		return merkle.Digest{}, err
	}
	raw, err := SignStatement(statement, signer)
	if err != nil {
		return merkle.Digest{}, err
	}
	if len(raw) > maxEnvelope { // nobody would read it
		return merkle.Digest{}, refuse("E_LIMIT", img.subject, fmt.Sprintf("a statement of %d bytes", len(raw)), fmt.Sprintf("at most %d", maxEnvelope))
	}
	subject := v1.Descriptor{MediaType: img.top.desc.MediaType, Size: img.top.desc.Size, Digest: img.top.desc.Digest}
	m := v1.Manifest{ArtifactType: StatementArtifact, Subject: &subject}
	_, err = s.push(ctx, ref, m, memory(emptyConfig, []byte("{}")), memory(envelopeMedia, raw))
	return root, err
}

// state adds the roots of d and of all below it.
func (d *document) state(p *Predicate, known roots, seen map[string]bool) error {
	if seen[d.desc.Digest.Hex] {
		return nil
	}
	seen[d.desc.Digest.Hex] = true
	root, err := d.root(known)
	if err != nil {
		return err
	}
	if len(seen) > 1 || d.manifest != nil {
		p.Platforms = append(p.Platforms, PlatformRoot{Platform: platformText(d.desc.Platform), SHA256: d.desc.Digest.Hex, ManifestRoot: root})
	}
	if d.manifest != nil {
		for _, b := range d.blobs() {
			if !seen[b.Digest.Hex] {
				seen[b.Digest.Hex] = true
				leaves := max(1, (b.Size+merkle.ChunkSize-1)/merkle.ChunkSize)
				p.Blobs = append(p.Blobs, BlobRoot{SHA256: b.Digest.Hex, Size: b.Size, BlobRoot: known.blobs[b.Digest.Hex], Leaves: leaves, UncompressedSize: known.unpacked[b.Digest.Hex]})
			}
		}
	}
	for _, m := range d.members {
		if err := m.state(p, known, seen); err != nil {
			return err
		}
	}
	return nil
}

// envelope gets the DSSE envelope of a statement artifact: its first layer. Nothing of it is kept: a registry has as many as it likes, for every
// image, and it is asked for them anew each time.
func (s *Store) envelope(ctx context.Context, place source, subject string, desc v1.Descriptor) ([]byte, error) {
	d := &document{desc: v1.Descriptor{Size: desc.Size, Digest: desc.Digest}}
	if err := checkDescriptor(d.desc, maxEnvelope); err != nil {
		return nil, refuse(err.code, subject+": referrer", err.got, err.want)
	}
	at := []source{place}
	var err error
	if d.raw, err = s.bytes(ctx, at, kindManifest, subject+": referrer sha256:"+desc.Digest.Hex, d.desc, maxEnvelope); err != nil {
		return nil, err
	}
	if err := d.parse(subject); err != nil {
		return nil, err
	}
	if d.manifest == nil || d.manifest.ArtifactType != StatementArtifact || len(d.manifest.Layers) == 0 {
		return nil, refuse("E_DECODE", subject, "a referrer that is no image statement", StatementArtifact)
	}
	layer := d.manifest.Layers[0]
	return s.bytes(ctx, at, kindBlob, subject+": statement sha256:"+layer.Digest.Hex, layer, maxEnvelope)
}

// PushFile puts a single file into a registry or layout as an artifact of one layer, and returns its reference and the root to pin. to has no digest.
// A WASM module gets the CNCF's media types. As an OCI image it is a static program at /app, the image's entrypoint, in a root with nothing
// else but empty folders.
func (s *Store) PushFile(ctx context.Context, path string, to Reference, as Format) (Reference, merkle.Digest, error) {
	var machine string
	if as == OCI {
		layer, arch, err := programLayer(path)
		if err != nil {
			return Reference{}, merkle.Digest{}, fmt.Errorf("pushing %s: %w", path, err)
		}
		defer os.Remove(layer) //nolint:errcheck // it lies in the folder for temporary files
		path, machine = layer, arch
	}
	sha, blobRoot, err := DigestFile(path)
	if err != nil {
		return Reference{}, merkle.Digest{}, err
	}
	stat, err := os.Stat(path)
	if err != nil {
		return Reference{}, merkle.Digest{}, err
	}
	layer := piece{path: path, desc: v1.Descriptor{Size: stat.Size(), Digest: v1.Hash{Algorithm: "sha256", Hex: sha}}}
	config := memory(emptyConfig, []byte("{}"))
	var m v1.Manifest
	switch as {
	case WASM:
		layer.desc.MediaType = wasmLayer
		config = memory(wasmConfig, fmt.Appendf(nil, `{"created":"1970-01-01T00:00:00Z","architecture":"wasm","os":"wasip1","layerDigests":["sha256:%s"]}`, sha))
	case OCI:
		layer.desc.MediaType = types.OCIUncompressedLayer
		config = memory(types.OCIConfigJSON, fmt.Appendf(nil, `{"architecture":%q,"os":"linux","config":{"Entrypoint":["/app"]},"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}`, machine, sha))
	case Native:
		layer.desc.MediaType, m.ArtifactType = nativeMedia, nativeMedia
	case AppImage:
		layer.desc.MediaType, m.ArtifactType = appImageMedia, appImageMedia
	default:
		return Reference{}, merkle.Digest{}, fmt.Errorf("pushing %s: a file can be image, wasm, native or appimage, not %q", path, as)
	}
	raw, err := s.push(ctx, to, m, config, layer)
	if err != nil {
		return Reference{}, merkle.Digest{}, fmt.Errorf("pushing %s: %w", filepath.Base(path), err)
	}
	to.SHA256 = sha256Hex(raw)
	d := &document{raw: raw, desc: v1.Descriptor{Digest: v1.Hash{Algorithm: "sha256", Hex: to.SHA256}}}
	if err := d.parse(path); err != nil {
		return Reference{}, merkle.Digest{}, err
	}
	root, err := d.root(roots{blobs: map[string]merkle.Digest{config.desc.Digest.Hex: merkle.BlobRoot(config.data), sha: blobRoot}})
	return to, root, err
}

// programLayer writes the one layer of an image that holds a program, and tells for which architecture that was built. The same program is
// always the same bytes.
func programLayer(program string) (layer, arch string, err error) {
	machines := map[elf.Machine]string{elf.EM_X86_64: "amd64", elf.EM_AARCH64: "arm64", elf.EM_386: "386", elf.EM_ARM: "arm", elf.EM_RISCV: "riscv64"}
	f, err := os.Open(program)
	if err != nil {
		return "", "", err
	}
	defer f.Close()
	binary, err := elf.NewFile(f)
	if err != nil {
		return "", "", fmt.Errorf("%w; want a program for Linux", err)
	}
	arch, known := machines[binary.Machine]
	if !known {
		return "", "", fmt.Errorf("a program for %v; want one of amd64, arm64, 386, arm and riscv64", binary.Machine)
	}
	stat, err := f.Stat()
	if err != nil {
		return "", "", err
	}
	out, err := os.CreateTemp("", "kmo-layer-")
	if err != nil {
		return "", "", err
	}
	w := tar.NewWriter(out)
	for _, folder := range []string{"dev", "etc", "proc", "run", "sys", "tmp"} {
		mode := int64(0o755)
		if folder == "tmp" {
			mode = 0o1777
		}
		err = errors.Join(err, w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: folder + "/", Mode: mode, Format: tar.FormatUSTAR}))
	}
	err = errors.Join(err, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "app", Mode: 0o755, Size: stat.Size(), Format: tar.FormatUSTAR}))
	if err == nil {
		_, err = io.Copy(w, io.NewSectionReader(f, 0, stat.Size()))
	}
	if err = errors.Join(err, w.Close(), out.Close()); err != nil {
		return "", "", errors.Join(err, os.Remove(out.Name()))
	}
	return out.Name(), arch, nil
}

// DigestFile returns a file's sha256, in hex, and its kmo1 blobRoot, in one pass.
func DigestFile(path string) (string, merkle.Digest, error) {
	file, err := os.Open(path)
	if err != nil {
		return "", merkle.Digest{}, err
	}
	defer file.Close()
	sha, blob := sha256.New(), merkle.NewBlob()
	if _, err := io.CopyBuffer(io.MultiWriter(sha, blob), struct{ io.Reader }{file}, make([]byte, 256<<10)); err != nil {
		return "", merkle.Digest{}, fmt.Errorf("reading %s: %w", path, err)
	}
	return hex.EncodeToString(sha.Sum(nil)), blob.Root(), nil
}

// piece is a blob to push: a file, or bytes.
type piece struct {
	desc v1.Descriptor
	path string
	data []byte
}

func memory(media types.MediaType, data []byte) piece {
	return piece{data: data, desc: v1.Descriptor{MediaType: media, Size: int64(len(data)), Digest: v1.Hash{Algorithm: "sha256", Hex: sha256Hex(data)}}}
}

func (p piece) open() (io.ReadCloser, error) {
	if p.path != "" {
		return os.Open(p.path)
	}
	return io.NopCloser(bytes.NewReader(p.data)), nil
}

// The methods that partial.CompressedToLayer asks for.

func (p piece) Digest() (v1.Hash, error)            { return p.desc.Digest, nil }
func (p piece) Compressed() (io.ReadCloser, error)  { return p.open() }
func (p piece) Size() (int64, error)                { return p.desc.Size, nil }
func (p piece) MediaType() (types.MediaType, error) { return p.desc.MediaType, nil }

// pushed is a manifest as bytes.
type pushed struct{ raw []byte }

func (p pushed) RawManifest() ([]byte, error)        { return p.raw, nil }
func (p pushed) MediaType() (types.MediaType, error) { return types.OCIManifestSchema1, nil }

// push writes an artifact: its pieces, the first of which is its config, then the manifest m made of them, whose bytes it returns.
func (s *Store) push(ctx context.Context, to Reference, m v1.Manifest, pieces ...piece) ([]byte, error) {
	if err := s.open(); err != nil {
		return nil, err
	}
	m.SchemaVersion, m.MediaType, m.Config = 2, types.OCIManifestSchema1, pieces[0].desc
	for _, p := range pieces[1:] {
		m.Layers = append(m.Layers, p.desc)
	}
	raw, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	hash := v1.Hash{Algorithm: "sha256", Hex: sha256Hex(raw)}
	if to.Layout != "" {
		return raw, pushLayout(to.Layout, m, hash, raw, pieces)
	}
	place, err := (&lazySource{store: s, ref: to}).remote(ctx)
	if err != nil {
		return nil, err
	}
	options := []remote.Option{remote.WithContext(ctx), remote.WithTransport(place.border), remote.WithRetryBackoff(remote.Backoff{Steps: 1})}
	if s.Keychain != nil {
		options = append(options, remote.WithAuthFromKeychain(s.Keychain))
	}
	for _, p := range pieces {
		layer, err := partial.CompressedToLayer(p)
		if err != nil {
			return nil, err
		}
		if err := remote.WriteLayer(place.repository, layer, options...); err != nil {
			return nil, outside("registry "+to.Host, err)
		}
	}
	var at name.Reference = place.repository.Digest(hash.String())
	if err := remote.Put(at, pushed{raw}, options...); err != nil {
		return nil, outside("registry "+to.Host, err)
	}
	return raw, nil
}

func pushLayout(dir string, m v1.Manifest, hash v1.Hash, raw []byte, pieces []piece) error {
	path, err := layout.FromPath(dir)
	if errors.Is(err, os.ErrNotExist) {
		path, err = layout.Write(dir, empty.Index)
	}
	if err != nil {
		return fmt.Errorf("layout %s: %w", dir, err)
	}
	for _, p := range pieces {
		body, err := p.open()
		if err != nil {
			return err
		}
		if err := path.WriteBlob(p.desc.Digest, body); err != nil {
			return fmt.Errorf("layout %s: %w", dir, err)
		}
	}
	if err := path.WriteBlob(hash, io.NopCloser(bytes.NewReader(raw))); err != nil {
		return fmt.Errorf("layout %s: %w", dir, err)
	}
	return path.AppendDescriptor(v1.Descriptor{MediaType: types.OCIManifestSchema1, Size: int64(len(raw)), Digest: hash, ArtifactType: m.ArtifactType})
}
