package merkle

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"testing"
)

// FuzzBlob compares the streaming tree with the reference, on data that is repeated so that a few seeds reach many chunks.
func FuzzBlob(f *testing.F) {
	for _, v := range blobVectors {
		f.Add(pattern(v.size), uint16(1), uint32(1000))
	}
	f.Add([]byte("abc"), uint16(60000), uint32(70000))
	f.Fuzz(func(t *testing.T, data []byte, times uint16, piece uint32) {
		if len(data) > 0 {
			data = bytes.Repeat(data, min(int(times), 1<<20/len(data))+1)
		}
		b := NewBlob()
		for at, step := 0, int(piece%200000)+1; at < len(data); at += step {
			b.Write(data[at:min(at+step, len(data))])
		}
		if got, want := b.Root(), refBlob(32, data); !bytes.Equal(got[:], want) {
			t.Errorf("%d bytes in pieces: got %v, want %x", len(data), got, want)
		}
	})
}

// FuzzContent makes entries from bytes; the tree and the reference must agree wherever the tree takes them.
func FuzzContent(f *testing.F) {
	f.Add([]byte("fa\x00db\x00lc\x00"))
	f.Add([]byte("dusr\x00fusr/a\x00husr/b\x00wusr/c\x00oopt\x00"))
	f.Add([]byte("fx\x00fX\x00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		var entries []Entry
		for i, part := range bytes.Split(data, []byte{0}) {
			if len(part) == 0 || i > 64 {
				continue
			}
			e := Entry{Type: part[0], Path: string(part[1:]), Mode: uint32(i), UID: uint32(len(part)), Xattrs: []Xattr{{"user.z", string(part)}, {"user.a", "1"}}}
			switch e.Type {
			case File:
				e.Blob, e.Size = BlobRoot(part), uint64(len(part))
			case Symlink, HardLink:
				e.Link = string(part)
			case CharDev, BlockDev:
				e.Major, e.Minor = uint32(i), 7
			}
			entries = append(entries, e)
		}
		got, err := ContentRoot(entries)
		if err != nil {
			return
		}
		if want := refContent(entries); !bytes.Equal(got[:], want) {
			t.Errorf("got %v, want %x", got, want)
		}
	})
}

// FuzzImage does the same for manifests and indexes of up to 255 members.
func FuzzImage(f *testing.F) {
	for _, n := range []byte{0, 1, 2, 3, 7, 8, 200} {
		f.Add(n, "application/vnd.oci.image.layer.v1.tar+gzip", "linux/arm64/v8")
	}
	f.Fuzz(func(t *testing.T, n byte, mediaType, platform string) {
		var all []Descriptor
		for i := range int(n) + 2 {
			name := fmt.Sprintf("%s %d", mediaType, i)
			d := Descriptor{MediaType: name, Digest: fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(name))), Size: uint64(i) << 33, Root: BlobRoot([]byte(name))}
			if i%3 == 2 {
				d.Content = BlobRoot([]byte(platform))
			}
			all = append(all, d)
		}
		if got, err := ManifestRoot(all[0], all[1], all[2:]); err == nil && !bytes.Equal(got[:], refManifest(all)) {
			t.Errorf("manifest of %d: got %v", n, got)
		}
		for i := range all {
			all[i].Content = Digest{}
			if i > 0 {
				all[i].Platform, all[i].Nested = platform, i%2 == 0
			}
		}
		if got, err := IndexRoot(all[0], all[1:]); err == nil && !bytes.Equal(got[:], refIndex(all)) {
			t.Errorf("index of %d: got %v", n, got)
		}
	})
}

// FuzzLeaves offers any list: it may be taken only if it is the list of the data.
func FuzzLeaves(f *testing.F) {
	root, list := leavesOf(pattern(2*ChunkSize + 5))
	f.Add(list, uint64(2*ChunkSize+5))
	f.Add(list[:64], uint64(2*ChunkSize))
	f.Add(append(bytes.Clone(list), list[64:]...), uint64(3*ChunkSize+5))
	f.Fuzz(func(t *testing.T, offered []byte, size uint64) {
		if _, err := OpenLeaves(root, size, offered); err == nil && (size != 2*ChunkSize+5 || !bytes.Equal(offered, list)) {
			t.Errorf("a list of %d bytes for size %d was taken", len(offered), size)
		}
	})
}

// FuzzParse says that a digest has one spelling.
func FuzzParse(f *testing.F) {
	f.Add(BlobRoot(nil).String())
	f.Add("kmo1:sha3-256:")
	f.Fuzz(func(t *testing.T, text string) {
		if d, err := Parse(text); err == nil && d.String() != text {
			t.Errorf("Parse(%q) prints as %q", text, d)
		}
	})
}

func BenchmarkBlob(b *testing.B) {
	data := pattern(16 << 20)
	b.Run("hash=kmo1", func(b *testing.B) {
		b.SetBytes(int64(len(data)))
		for b.Loop() {
			BlobRoot(data)
		}
	})
	b.Run("hash=sha256", func(b *testing.B) {
		b.SetBytes(int64(len(data)))
		for b.Loop() {
			sha256.Sum256(data)
		}
	})
}
