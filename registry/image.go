package registry

import (
	"archive/tar"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/registry/merkle"
)

// Bounds of what an image may be made of.
const (
	maxManifest = 4 << 20 // bytes of a manifest, an index or a config
	maxMembers  = 64      // manifests in an index
	maxLayers   = 128
	maxDepth    = 3        // indexes inside each other
	maxImage    = 64 << 30 // bytes of all blobs, where Store.MaxImage says no other number
)

const layoutScheme = "oci-layout:"

var digestPattern = regexp.MustCompile(`^[0-9a-f]{64}$`)

// Reference names an image by digest, and where to ask for it: a repository of a registry, or an OCI layout folder.
type Reference struct {
	Host       string // host[:port]; "" for a layout
	Repository string
	Layout     string // clean absolute path; "" for a registry
	SHA256     string // 64 lower-case hex digits of the manifest or index; "" only in a place to push to
}

// ParseReference reads "host/repository@sha256:…" or "oci-layout:/folder@sha256:…". Anything with a tag, or without a digest, is
// refused with KT006.
func ParseReference(text string) (Reference, error) {
	place, digest, pinned := strings.Cut(text, "@")
	hex, sha := strings.CutPrefix(digest, "sha256:")
	if !pinned || !sha || !digestPattern.MatchString(hex) {
		return Reference{}, refuse("KT006", "image "+quote(text), "it is not pinned by sha256", "host/repository@sha256:<64 hex digits>")
	}
	ref, err := ParsePlace(place)
	ref.SHA256 = hex
	return ref, err
}

// ParsePlace reads what stands before the @ of a reference: where an image is, or is to be pushed to.
func ParsePlace(text string) (Reference, error) {
	if folder, ok := strings.CutPrefix(text, layoutScheme); ok {
		if !filepath.IsAbs(folder) || filepath.Clean(folder) != folder {
			return Reference{}, refuse("KT006", "image "+quote(text), "its layout folder is not a clean absolute path", layoutScheme+"/folder@sha256:<64 hex digits>")
		}
		return Reference{Layout: folder}, nil
	}
	host, repository, _ := strings.Cut(text, "/")
	if strings.Contains(repository, ":") {
		return Reference{}, refuse("KT006", "image "+quote(text), "it has a tag", "host/repository@sha256:<64 hex digits>, without a tag")
	}
	if !strings.ContainsAny(host, ".:") && host != "localhost" || !fs.ValidPath(repository) || repository == "." {
		return Reference{}, refuse("KT006", "image "+quote(text), "it does not name a registry and a clean repository", "host/repository@sha256:<64 hex digits>")
	}
	if _, err := name.NewRepository(text, name.StrictValidation); err != nil {
		return Reference{}, refuse("KT006", "image "+quote(text), refusal.Clip(err.Error(), 200), "host/repository@sha256:<64 hex digits>")
	}
	return Reference{Host: host, Repository: repository}, nil
}

// String is what ParseReference reads.
func (r Reference) String() string {
	place := layoutScheme + r.Layout
	if r.Layout == "" {
		place = r.Host + "/" + r.Repository
	}
	if r.SHA256 == "" {
		return place
	}
	return place + "@sha256:" + r.SHA256
}

// Pin is an image as it is asked for.
type Pin struct {
	Ref    Reference
	Root   merkle.Digest
	Format Format
}

// Format is what an image's content is: a key of a unit's variants.
type Format string

// The formats. OCI and LXC unpack to a folder; the others are a single file, the one layer of an artifact.
const (
	OCI      Format = "image"
	LXC      Format = "lxc"
	WASM     Format = "wasm"
	AppImage Format = "appimage"
	Native   Format = "native"
)

func (f Format) folder() bool { return f == OCI || f == LXC }

// Config is what an image says about how to run it.
type Config struct {
	Entrypoint []string `json:"entrypoint,omitempty"`
	Cmd        []string `json:"cmd,omitempty"`
	Env        []string `json:"env,omitempty"`
	Dir        string   `json:"dir,omitempty"`
	User       string   `json:"user,omitempty"`
}

func (img *image) run() Config {
	c := img.oci.Config
	return Config{Entrypoint: c.Entrypoint, Cmd: c.Cmd, Env: c.Env, Dir: c.WorkingDir, User: c.User}
}

// document is an index or a manifest, its bytes checked against the digest it was asked for by.
type document struct {
	desc     v1.Descriptor // what named it; for the first one, made from the reference and its bytes
	raw      []byte        // nil if it was not fetched
	index    *v1.IndexManifest
	manifest *v1.Manifest
	members  []*document // of an index, in order
}

// parse fills in what raw says. subject is for the refusal.
func (d *document) parse(subject string) error {
	var shape struct {
		MediaType types.MediaType `json:"mediaType"`
		Manifests json.RawMessage `json:"manifests"`
		Config    json.RawMessage `json:"config"`
		Layers    json.RawMessage `json:"layers"`
	}
	if err := json.Unmarshal(d.raw, &shape); err != nil {
		return refuse("E_DECODE", subject, refusal.Clip(err.Error(), 200), "a manifest or an index")
	}
	isIndex := shape.Manifests != nil
	if isIndex && (shape.Layers != nil || shape.Config != nil) {
		return refuse("E_DECODE", subject, "it is a manifest and an index at once", "one of them")
	}
	media := shape.MediaType
	switch {
	case media == "" && isIndex:
		media = types.OCIImageIndex
	case media == "":
		media = types.OCIManifestSchema1
	case isIndex && media.IsIndex(), !isIndex && media.IsImage():
	default:
		return refuse("E_DECODE", subject, "its media type is "+quote(string(media)), "that of an OCI or Docker v2 manifest or index, as its members say")
	}
	if d.desc.MediaType != "" && d.desc.MediaType != media {
		return refuse("E_DECODE", subject, fmt.Sprintf("it says that it is %s, the index that it is %s", quote(string(media)), quote(string(d.desc.MediaType))), "one media type")
	}
	d.desc.MediaType = media
	d.desc.Size = int64(len(d.raw))
	if isIndex {
		return d.parseIndex(subject)
	}
	return d.parseManifest(subject)
}

func (d *document) parseIndex(subject string) error {
	d.index = &v1.IndexManifest{}
	if err := json.Unmarshal(d.raw, d.index); err != nil {
		return refuse("E_DECODE", subject, refusal.Clip(err.Error(), 200), "an OCI image index")
	}
	if n := len(d.index.Manifests); n == 0 || n > maxMembers {
		return refuse("E_LIMIT", subject, fmt.Sprintf("%d manifests in the index", n), fmt.Sprintf("1 to %d", maxMembers))
	}
	d.members = nil
	for _, desc := range d.index.Manifests {
		if err := checkDescriptor(desc, maxManifest); err != nil {
			return refuse(err.code, subject, err.got, err.want)
		}
		d.members = append(d.members, &document{desc: desc})
	}
	return nil
}

func (d *document) parseManifest(subject string) error {
	d.manifest = &v1.Manifest{}
	if err := json.Unmarshal(d.raw, d.manifest); err != nil {
		return refuse("E_DECODE", subject, refusal.Clip(err.Error(), 200), "an OCI image manifest")
	}
	if n := len(d.manifest.Layers); n > maxLayers {
		return refuse("E_LIMIT", subject, fmt.Sprintf("%d layers", n), fmt.Sprintf("at most %d", maxLayers))
	}
	if err := checkDescriptor(d.manifest.Config, maxManifest); err != nil {
		return refuse(err.code, subject, "config: "+err.got, err.want)
	}
	for i, layer := range d.manifest.Layers {
		if err := checkDescriptor(layer, maxUnpacked); err != nil {
			return refuse(err.code, subject, fmt.Sprintf("layer %d: %s", i, err.got), err.want)
		}
	}
	return nil
}

type descriptorError struct {
	code      refusal.Code
	got, want string
}

func checkDescriptor(d v1.Descriptor, limit int64) *descriptorError {
	switch {
	case d.Digest.Algorithm != "sha256" || !digestPattern.MatchString(d.Digest.Hex):
		return &descriptorError{"E_DECODE", "digest " + quote(d.Digest.String()), "sha256:<64 hex digits>"}
	case d.Size < 0 || d.Size > limit:
		return &descriptorError{"E_LIMIT", fmt.Sprintf("size %d", d.Size), fmt.Sprintf("0 to %d bytes", limit)}
	}
	return nil
}

// blobs are the blobs of a manifest in the order of its root: config, layers.
func (d *document) blobs() []v1.Descriptor {
	return append([]v1.Descriptor{d.manifest.Config}, d.manifest.Layers...)
}

// roots are kmo1 roots by sha256 hex: of blobs, and, as far as a statement says, of manifests and nested indexes.
type roots struct {
	blobs     map[string]merkle.Digest
	manifests map[string]merkle.Digest // of members that are not fetched; where from is not trusted
	unpacked  map[string]int64         // bytes that layers unpack to; nil unless that is asked for
}

func newRoots() roots {
	return roots{blobs: map[string]merkle.Digest{}, manifests: map[string]merkle.Digest{}}
}

// root computes the manifestRoot or indexRoot of d from its bytes and the roots of what it names. Only of a member that was not
// fetched is a root taken as it is known: its bytes are not used here, and the root above comes out right only if it is. It returns none if
// something is missing.
func (d *document) root(known roots) (merkle.Digest, error) {
	if d.raw == nil {
		return known.manifests[d.desc.Digest.Hex], nil
	}
	var members []merkle.Descriptor
	switch {
	case d.manifest != nil:
		for _, blob := range d.blobs() {
			members = append(members, described(blob, known.blobs[blob.Digest.Hex]))
		}
	case d.index != nil:
		for _, m := range d.members {
			root, err := m.root(known)
			if err != nil {
				return merkle.Digest{}, err
			}
			member := described(m.desc, root)
			member.Platform, member.Nested = platformText(m.desc.Platform), m.desc.MediaType.IsIndex()
			members = append(members, member)
		}
	}
	if slices.ContainsFunc(members, func(m merkle.Descriptor) bool { return m.Root.IsZero() }) {
		return merkle.Digest{}, nil
	}
	self := described(d.desc, merkle.BlobRoot(d.raw))
	if d.index != nil {
		return merkle.IndexRoot(self, members)
	}
	return merkle.ManifestRoot(self, members[0], members[1:])
}

func described(d v1.Descriptor, root merkle.Digest) merkle.Descriptor {
	return merkle.Descriptor{MediaType: string(d.MediaType), Digest: d.Digest.String(), Size: uint64(d.Size), Root: root}
}

// platformText is "os/arch[/variant][:os.version]", "" for none.
func platformText(p *v1.Platform) string {
	if p == nil {
		return ""
	}
	return p.String()
}

// choose returns the member of an index that fits, the first of several; nil if none does. A platform with a variant wants
// that variant, or one without.
func (d *document) choose(want v1.Platform) *document {
	var fallback *document
	for _, m := range d.members {
		p := m.desc.Platform
		if p == nil || p.OS != want.OS || p.Architecture != want.Architecture {
			continue
		}
		if want.Variant == "" || p.Variant == want.Variant {
			return m
		}
		if p.Variant == "" && fallback == nil {
			fallback = m
		}
	}
	return fallback
}

func refuse(code refusal.Code, subject, got, want string) *refusal.Error {
	return &refusal.Error{Code: code, Subject: subject, Got: got, Want: want}
}

func quote(s string) string { return `"` + refusal.Clip(s, 200) + `"` }

// Description is what is known of an image without its layers.
type Description struct {
	Ref       string        `json:"ref"`
	SHA256    string        `json:"sha256"`
	Root      merkle.Digest `json:"root"`
	Proved    bool          `json:"proved"`   // the pinned root was recomputed, with a statement's help or from bytes that are here
	Platform  string        `json:"platform"` // of the chosen member, or as the config says
	Manifest  string        `json:"manifest"` // sha256 of the chosen manifest
	Artifact  string        `json:"artifact,omitempty"`
	Platforms []string      `json:"platforms,omitempty"` // of an index's members
	Layers    int           `json:"layers"`
	Size      int64         `json:"size"` // bytes to download, all layers
	Config    Config        `json:"config"`
	Statement *Statement    `json:"statement,omitempty"` // the one that proved the root
	Signer    string        `json:"signer,omitempty"`    // id of the key that counts and signed it; "" for a stranger's
	Custody   []CustodyFact `json:"custody,omitempty"`   // the statement's chain, link by link; none of a stranger's
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
