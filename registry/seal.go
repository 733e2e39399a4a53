package registry

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/kindos/kmo/policy/refusal"
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
	Custody Custody
	Intent  *Intent // To is set to the image that is sealed
}

// ParseCustody reads a chain: a JSON list of links. Nothing in it is verified yet.
func ParseCustody(file []byte) (c Custody, err error) {
	if len(file) > maxEnvelope {
		return nil, refuse("E_LIMIT", "custody", fmt.Sprintf("%d bytes", len(file)), fmt.Sprintf("at most %d", maxEnvelope))
	}
	if err := decodeStrict(file, &c); err != nil {
		return nil, refuse("E_DECODE", "custody", refusal.Clip(err.Error(), 200), "a list of DSSE envelopes, as kmo image link writes them")
	}
	return c, nil
}

// With adds a link that signer signs. Its Previous and Key are set here. A chain with a link that does not hold is refused: nobody can mend it after.
func (c Custody) With(step CustodyStep, signer crypto.Signer) (Custody, error) {
	public, err := x509.MarshalPKIXPublicKey(signer.Public())
	if err != nil {
		return nil, fmt.Errorf("public key: %v", err)
	}
	step.Key, step.Previous = base64.StdEncoding.EncodeToString(public), ""
	if len(c) > 0 {
		payload, err := base64.StdEncoding.Strict().DecodeString(c[len(c)-1].Payload)
		if err != nil {
			return nil, refuse("E_CUSTODY", "custody", "a link whose payload is no base64", "a chain that holds")
		}
		step.Previous = sha256Hex(payload)
	}
	raw, err := seal(custodyType, step, signer)
	if err != nil {
		return nil, err
	}
	var link envelope
	if err := json.Unmarshal(raw, &link); err != nil {
		return nil, err
	}
	c = append(c[:len(c):len(c)], link)
	return c, c.holds()
}

// holds refuses a chain of which a link does not hold or starts from what nobody has made.
func (c Custody) holds() error {
	for i, link := range c.Verify() {
		got := link.Why
		if got == "" && len(link.Uncovered) > 0 {
			got = "in " + refusal.Clip(link.Uncovered[0], 200) + ", which no link before has made"
		}
		if got != "" {
			return refuse("E_CUSTODY", fmt.Sprintf("custody: link %d, %s by %s", i, quote(link.Step), quote(link.Principal)), got, "links in order, each signed, naming the one before, from what those before have made")
		}
	}
	return nil
}

// Verify looks at each link by itself and after those before it.
func (c Custody) Verify() []CustodyFact {
	facts, made, before, place := []CustodyFact{}, map[string]bool{}, "", 0
	for i := range c {
		f := CustodyFact{In: []string{}, Out: []string{}, Uncovered: []string{}}
		if i >= maxLinks {
			f.Why = fmt.Sprintf("more than %d links", maxLinks)
			return append(facts, f)
		}
		step, payload, key, err := c[i].link()
		if r := refusal.Of(err); r != nil {
			f.Why = r.Got + "; want " + r.Want
		} else if err != nil {
			f.Why = refusal.Clip(err.Error(), 200)
		}
		f.Step, f.Principal, f.Key = refusal.Clip(step.Step, 20), refusal.Clip(step.Principal, 60), key
		f.In, f.Out = append(f.In, step.In...), append(f.Out, step.Out...)
		at := slices.Index(CustodySteps(), step.Step)
		switch {
		case f.Why != "":
		case step.Previous != before:
			f.Why = "it follows another link than the one before it"
		case at < place:
			f.Why = fmt.Sprintf("%s comes after %s", step.Step, CustodySteps()[place])
		}
		place, before = max(place, at), sha256Hex(payload)
		for _, in := range step.In {
			if !made[in] {
				f.Uncovered = append(f.Uncovered, in)
			}
		}
		for _, out := range step.Out {
			made[out] = true
		}
		facts = append(facts, f)
	}
	return facts
}

// link opens one link, with the id of the key that signed it.
func (e *envelope) link() (step CustodyStep, payload []byte, id string, err error) {
	const subject = "custody"
	if e.PayloadType != custodyType || len(e.Signatures) != 1 {
		return step, nil, "", refuse("E_PAYLOAD_TYPE", subject, fmt.Sprintf("%s with %d signatures", quote(e.PayloadType), len(e.Signatures)), custodyType+" with one")
	}
	if payload, err = base64.StdEncoding.Strict().DecodeString(e.Payload); err == nil {
		err = decodeStrict(payload, &step)
	}
	if err != nil {
		return CustodyStep{}, payload, "", refuse("E_DECODE", subject, refusal.Clip(err.Error(), 200), "one step of a custody chain")
	}
	if !slices.Contains(CustodySteps(), step.Step) || step.Principal == "" || len(step.In) > maxLinks || len(step.Out) > maxLinks || slices.ContainsFunc(slices.Concat(step.In, step.Out), func(d string) bool { return !madePattern.MatchString(d) }) {
		return step, payload, "", refuse("E_DECODE", subject, "a step "+quote(step.Step)+" by "+quote(step.Principal), "one of "+strings.Join(CustodySteps(), ", ")+" by a principal, from and to things named sha256:, git: or kmo1:sha3-256:")
	}
	der, err := base64.StdEncoding.Strict().DecodeString(step.Key)
	if err != nil {
		return step, payload, "", refuse("E_DECODE", subject, refusal.Clip(err.Error(), 100), "a key in base64")
	}
	key, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return step, payload, "", refuse("E_DECODE", subject, refusal.Clip(err.Error(), 100), "a public key in PKIX form")
	}
	id, err = signerOf(e, payload, []crypto.PublicKey{key})
	return step, payload, id, err
}

var madePattern = regexp.MustCompile(`^(sha256:[0-9a-f]{64}|git:[0-9a-f]{40}|kmo1:sha3-256:[0-9a-f]{64})$`)

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
	if err := sealing.covers(ref.SHA256, root); err != nil {
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

// covers refuses a chain that does not hold or does not end in the image, and completes the intent.
func (s *Sealing) covers(sha string, root merkle.Digest) error {
	if s.Intent != nil {
		s.Intent.To = "sha256:" + sha
	}
	if err := s.Custody.holds(); err != nil || len(s.Custody) == 0 {
		return err
	}
	facts := s.Custody.Verify()
	last := facts[len(facts)-1]
	if !slices.Contains(last.Out, "sha256:"+sha) && !slices.Contains(last.Out, root.String()) {
		return refuse("E_CUSTODY", "custody: its last link", "out "+refusal.Clip(strings.Join(last.Out, ", "), 200), "the image: sha256:"+sha)
	}
	return nil
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
