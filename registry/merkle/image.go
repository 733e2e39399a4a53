package merkle

import (
	"encoding/binary"
	"fmt"
	"regexp"
)

// Descriptor is what an image says about one of its blobs, and that blob's root.
type Descriptor struct {
	MediaType string
	Digest    string // "sha256:" and 64 lower-case hex digits
	Size      uint64
	Root      Digest // of the blob; for a member of an index, its manifestRoot or indexRoot
	Content   Digest // contentRoot of a layer, or none; not in an index
	Platform  string // "os/arch[/variant][:os.version]" or ""; only in an index
	Nested    bool   // it is an index in an index
}

// The roles of a descriptor.
const (
	roleIndex    = 0
	roleManifest = 1
	roleConfig   = 2
	roleLayer    = 3
	roleMember   = 4
	roleNested   = 5
)

var ociDigest = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)

// ManifestRoot is the root of an image manifest: its own bytes, its config, its layers in order.
func ManifestRoot(self, config Descriptor, layers []Descriptor) (Digest, error) {
	t := tree{level: levelManifest}
	for i, d := range append([]Descriptor{self, config}, layers...) {
		if d.Platform != "" || d.Nested {
			return Digest{}, fmt.Errorf("manifest: blob %s has a platform or is an index", clip(d.Digest))
		}
		x, err := d.leaf(byte(min(roleManifest+i, roleLayer)))
		if err != nil {
			return Digest{}, fmt.Errorf("manifest: %v", err)
		}
		x = append(x, d.Root[:]...)
		var content []byte
		if !d.Content.IsZero() {
			content = d.Content[:]
		}
		x, err = appendString(x, "content root", string(content))
		if err != nil {
			return Digest{}, err
		}
		t.leaf(x)
	}
	return t.head(), nil
}

// IndexRoot is the root of an image index: its own bytes, then every member in the order of its array.
func IndexRoot(self Descriptor, members []Descriptor) (Digest, error) {
	t := tree{level: levelIndex}
	for i, d := range append([]Descriptor{self}, members...) {
		role := byte(roleMember)
		switch {
		case i == 0:
			role = roleIndex
		case d.Nested:
			role = roleNested
		}
		if !d.Content.IsZero() || i == 0 && (d.Nested || d.Platform != "") {
			return Digest{}, fmt.Errorf("index: member %s has a content root, or the index itself a platform", clip(d.Digest))
		}
		x, err := d.leaf(role)
		if err != nil {
			return Digest{}, fmt.Errorf("index: %v", err)
		}
		if x, err = appendString(x, "platform", d.Platform); err != nil {
			return Digest{}, fmt.Errorf("index: %v", err)
		}
		t.leaf(append(x, d.Root[:]...))
	}
	return t.head(), nil
}

// leaf is the part of a leaf that both levels share.
func (d Descriptor) leaf(role byte) ([]byte, error) {
	if !ociDigest.MatchString(d.Digest) {
		return nil, fmt.Errorf("digest %q: want sha256: and 64 lower-case hex digits", clip(d.Digest))
	}
	if d.Root.IsZero() {
		return nil, fmt.Errorf("blob %s has no root", d.Digest)
	}
	x := binary.BigEndian.AppendUint64([]byte{role}, d.Size)
	x, err := appendString(x, "media type", d.MediaType)
	if err != nil {
		return nil, err
	}
	return appendString(x, "digest", d.Digest)
}
