package merkle

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
)

func pattern(n int) []byte {
	data := make([]byte, n)
	for i := range data {
		data[i] = byte(i*131 + i/256*29 + i/65536*53 + 7)
	}
	return data
}

// blobVectors are sizes of the pattern with their roots, on which two independent programs agreed.
var blobVectors = []struct {
	size int
	root string
}{
	{0, "cfd094e9c16bf23a7d565187b5fbaccb876b10a6c98748ccab26bdf86b367a84"},
	{1, "20b99a33b3f29f7c32beb640b51d511d425ff55c5cc3bca41acd37f325cc3ec0"},
	{65535, "9b31db6a52aaa2c63414eba7c3355c34703fbac1eaa18bbf9a6adec0fe7e2881"},
	{65536, "8fab00a0ba88ba74061f22b1499051dc29042036739455b5043af31ca2f2219b"},
	{65537, "5a718285d5ef21787f7f180d2ba492916e935e484c681ad2ba141fcb98f7c5cb"},
	{196608, "426f6132fc71da9f8537b3ab5374320d001c8fbb6c8179db57513bc0f7ef2f1f"},
	{327681, "72571e7720ecac3f037c91ff2b1946738429254b035b29855093898551109a01"},
}

func TestBlobVectors(t *testing.T) {
	for _, v := range blobVectors {
		data := pattern(v.size)
		if got := BlobRoot(data).Hex(); got != v.root {
			t.Errorf("BlobRoot of %d bytes: got %s, want %s", v.size, got, v.root)
		}
		if got := hex.EncodeToString(refBlob(32, data)); got != v.root {
			t.Errorf("reference of %d bytes: got %s, want %s", v.size, got, v.root)
		}
	}
}

// TestLongHash holds the format to its vectors for SHA3-512, of which the package makes nothing yet, and a root of it must not pass for one of ours.
func TestLongHash(t *testing.T) {
	for size, want := range map[int]string{0: "1c8d2b5030980b396b255b99d2438ec0", 65536: "1fd10bd927ba4f57b59a89bc4430dfee", 327681: "2524b8cccd1e23c4fd973bf8ff62933d"} {
		got := refBlob(64, pattern(size))
		if hex.EncodeToString(got[:16]) != want {
			t.Errorf("reference of %d bytes: got %x, want it to begin with %s", size, got, want)
		}
		for _, text := range []string{"kmo1:sha3-512:" + hex.EncodeToString(got), "kmo1:sha3-512:" + hex.EncodeToString(got[:32]), prefix + hex.EncodeToString(got)} {
			if d, err := Parse(text); err == nil {
				t.Errorf("Parse(%q): got %v, want an error", text, d)
			}
		}
	}
}

func described(mediaType string, data []byte) Descriptor {
	return Descriptor{MediaType: mediaType, Digest: fmt.Sprintf("sha256:%x", sha256.Sum256(data)), Size: uint64(len(data)), Root: BlobRoot(data)}
}

func TestManifestVector(t *testing.T) {
	const layerType = "application/vnd.oci.image.layer.v1.tar"
	config := described("application/vnd.oci.image.config.v1+json", []byte("{}"))
	layers := []Descriptor{described(layerType, pattern(70000)), described(layerType, pattern(5))}
	text := `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":` + descriptorJSON(config) +
		`,"layers":[` + descriptorJSON(layers[0]) + "," + descriptorJSON(layers[1]) + "]}"
	if len(text) != 543 {
		t.Fatalf("manifest: got %d bytes, want 543", len(text))
	}
	self := described("application/vnd.oci.image.manifest.v1+json", []byte(text))
	if want := "sha256:84dc9f0a04621c39bb5d4069eac49e809085e6d31a2e44acafd6cba2e9fb220e"; self.Digest != want {
		t.Fatalf("manifest: got %s, want %s", self.Digest, want)
	}
	const want = "90a40737b8b4ccbc23cf36a31a7efb8a6819c74ec591941e74d6119b3e581ec5"
	got, err := ManifestRoot(self, config, layers)
	if err != nil || got.Hex() != want {
		t.Errorf("ManifestRoot: got %s, %v, want %s", got.Hex(), err, want)
	}
	if ref := hex.EncodeToString(refManifest(append([]Descriptor{self, config}, layers...))); ref != want {
		t.Errorf("reference: got %s, want %s", ref, want)
	}
}

func descriptorJSON(d Descriptor) string {
	return fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, d.MediaType, d.Digest, d.Size)
}

func TestBlobWritesInAnyPieces(t *testing.T) {
	data := pattern(3*ChunkSize + 17)
	want := BlobRoot(data)
	for _, piece := range []int{1000, ChunkSize - 1, ChunkSize, ChunkSize + 1, 2 * ChunkSize} {
		b := NewBlob()
		for at := 0; at < len(data); at += piece {
			b.Write(data[at:min(at+piece, len(data))])
		}
		if got := b.Root(); got != want || b.Root() != want || b.Size() != int64(len(data)) {
			t.Errorf("pieces of %d: got %v, size %d, want %v", piece, got, b.Size(), want)
		}
		if _, err := b.Write([]byte{1}); err == nil {
			t.Errorf("pieces of %d: writing after Root: got no error", piece)
		}
	}
}

func TestBlobMemoryIsLogarithmic(t *testing.T) {
	b := NewBlob()
	for range 1000 {
		b.tree.add(Digest{1})
	}
	if got := len(b.tree.stack); got > 10 {
		t.Errorf("stack after 1000 leaves: got %d digests, want at most 10", got)
	}
}

func leavesOf(data []byte) (Digest, []byte) {
	var list []byte
	b := NewBlob()
	b.Leaf = func(leaf Digest) { list = append(list, leaf[:]...) }
	b.Write(data)
	return b.Root(), list
}

func TestLeaves(t *testing.T) {
	data := pattern(5*ChunkSize + 100)
	root, list := leavesOf(data)
	size := uint64(len(data))
	leaves, err := OpenLeaves(root, size, list)
	if err != nil {
		t.Fatal(err)
	}
	chunk := func(i int) []byte { return data[i*ChunkSize : min((i+1)*ChunkSize, len(data))] }
	for i := range leaves.Len() {
		if err := leaves.VerifyChunk(i, chunk(i)); err != nil {
			t.Errorf("chunk %d: %v", i, err)
		}
	}

	t.Run("T48 one chunk flipped is named, the others stay good", func(t *testing.T) {
		for at := 0; at < ChunkSize; at += 4099 {
			bad := bytes.Clone(chunk(3))
			bad[at] ^= 1
			var mismatch *MismatchError
			if err := leaves.VerifyChunk(3, bad); !errors.As(err, &mismatch) || mismatch.Name != "chunk 3" {
				t.Fatalf("byte %d: got %v, want a mismatch of chunk 3", at, err)
			}
		}
		if err := leaves.VerifyChunk(2, chunk(3)); err == nil {
			t.Error("chunk 3 as chunk 2: got no error")
		}
	})
	t.Run("T49 leaf list of other length, last leaf doubled, other size, wrong index", func(t *testing.T) {
		last := list[len(list)-32:]
		for name, bad := range map[string][]byte{
			"empty": nil, "one short": list[:len(list)-32], "one byte short": list[:len(list)-1],
			"last doubled": append(bytes.Clone(list), last...), "first two swapped": append(append(bytes.Clone(list[32:64]), list[:32]...), list[64:]...),
		} {
			if _, err := OpenLeaves(root, size, bad); err == nil {
				t.Errorf("%s: got no error", name)
			}
		}
		for _, other := range []uint64{0, size - 1, size + 1, size + ChunkSize, 1 << 60} {
			if _, err := OpenLeaves(root, other, list); err == nil {
				t.Errorf("size %d: got no error", other)
			}
		}
		for _, i := range []int{-1, 6, 1 << 40} {
			if err := leaves.VerifyChunk(i, chunk(0)); err == nil {
				t.Errorf("index %d: got no error", i)
			}
		}
	})
	t.Run("T50 U-29 a node or a blob's record is no chunk", func(t *testing.T) {
		// Two chunks whose node is offered as the one leaf of a shorter blob, and the node's preimage as its chunk.
		a, b := leafOf(chunk(0)), leafOf(chunk(1))
		inner := node(levelBlob, a, b)
		preimage := append(bytes.Clone(a[:]), b[:]...)
		if leafOf(preimage) == inner {
			t.Fatal("leaf and node agree: levels are not separated")
		}
		one, err := OpenLeaves(blobHead(64, inner), 64, inner[:])
		if err != nil {
			t.Fatal(err)
		}
		if err := one.VerifyChunk(0, preimage); err == nil {
			t.Error("inner node's preimage as chunk: got no error")
		}
		record, err := described("x", chunk(0)).leaf(roleConfig)
		if err != nil {
			t.Fatal(err)
		}
		manifest := tree{level: levelManifest}
		manifest.leaf(record)
		if leafOf(record) == manifest.stack[0] {
			t.Error("a blob's record hashes the same as a chunk and as a leaf of a manifest")
		}
	})
	t.Run("every byte of the list broken", func(t *testing.T) {
		for i := range list {
			bad := bytes.Clone(list)
			bad[i] ^= 0x80
			if _, err := OpenLeaves(root, size, bad); err == nil {
				t.Fatalf("byte %d: got no error", i)
			}
		}
	})
}

func TestU29(t *testing.T) {
	small := []byte("the same bytes")
	d := described("application/octet-stream", small)
	base, err := ManifestRoot(d, d, []Descriptor{d, d, d})
	if err != nil {
		t.Fatal(err)
	}
	t.Run("U-29 odd counts and order change the root", func(t *testing.T) {
		e := d
		e.Size++
		seen := map[Digest]string{base: "base"}
		for name, layers := range map[string][]Descriptor{"none": nil, "one": {d}, "two": {d, d}, "four": {d, d, d, d}, "first other": {e, d, d}, "last other": {d, d, e}} {
			root, err := ManifestRoot(d, d, layers)
			if err != nil {
				t.Fatal(err)
			}
			if other, twice := seen[root]; twice {
				t.Errorf("%s has the root of %s", name, other)
			}
			seen[root] = name
		}
	})
	t.Run("U-29 each field is covered", func(t *testing.T) {
		for name, change := range map[string]func(*Descriptor){
			"media type": func(d *Descriptor) { d.MediaType += "x" }, "digest": func(d *Descriptor) { d.Digest = "sha256:" + strings.Repeat("0", 64) },
			"size": func(d *Descriptor) { d.Size++ }, "root": func(d *Descriptor) { d.Root[31] ^= 1 }, "content": func(d *Descriptor) { d.Content[0] = 1 },
		} {
			e := d
			change(&e)
			if root, err := ManifestRoot(d, d, []Descriptor{d, e, d}); err != nil || root == base {
				t.Errorf("%s: got %v, %v, want another root", name, root, err)
			}
		}
	})
	t.Run("U-29 a manifest's root is no index's", func(t *testing.T) {
		if index, err := IndexRoot(d, []Descriptor{d, d, d, d}); err != nil || index == base {
			t.Errorf("got %v, %v", index, err)
		}
	})
	for name, bad := range map[string]Descriptor{"no root": {Digest: d.Digest}, "upper case": {Digest: strings.ToUpper(d.Digest), Root: d.Root}, "sha512": {Digest: "sha512:00", Root: d.Root}} {
		if _, err := ManifestRoot(bad, d, nil); err == nil {
			t.Errorf("%s: ManifestRoot: got no error", name)
		}
		if _, err := IndexRoot(d, []Descriptor{bad}); err == nil {
			t.Errorf("%s: IndexRoot: got no error", name)
		}
	}
}

func TestT51ExtraManifest(t *testing.T) {
	self := described("application/vnd.oci.image.index.v1+json", []byte("index"))
	amd, arm := described("m", []byte("amd64")), described("m", []byte("arm64"))
	amd.Platform, arm.Platform = "linux/amd64", "linux/arm64/v8"
	want, err := IndexRoot(self, []Descriptor{amd, arm})
	if err != nil {
		t.Fatal(err)
	}
	if got := hex.EncodeToString(refIndex([]Descriptor{self, amd, arm})); got != want.Hex() {
		t.Errorf("reference: got %s, want %s", got, want.Hex())
	}
	swapped := []Descriptor{arm, amd}
	relabelled := []Descriptor{amd, amd}
	relabelled[1].Platform = arm.Platform
	nested := []Descriptor{amd, arm}
	nested[1].Nested = true
	for name, members := range map[string][]Descriptor{
		"T51 order swapped": swapped, "T51 other manifest under a platform": relabelled, "T51 extra manifest": {amd, arm, arm}, "T51 one missing": {amd}, "T51 manifest as nested index": nested,
	} {
		t.Run(name, func(t *testing.T) {
			if got, err := IndexRoot(self, members); err != nil || got == want {
				t.Errorf("got %v, %v, want another root", got, err)
			}
		})
	}
}

func sampleTree() []Entry {
	return []Entry{
		{Type: Folder, Path: "bin", Mode: 0o755},
		{Type: File, Path: "bin/app", Mode: 0o4755, UID: 1, GID: 2, Size: 3, Blob: BlobRoot([]byte("app")), Xattrs: []Xattr{{"user.b", "2"}, {"security.capability", "\x01"}}},
		{Type: HardLink, Path: "bin/app2", Mode: 0o4755, Link: "bin/app"},
		{Type: Symlink, Path: "bin-link", Mode: 0o777, Link: "bin"},
		{Type: CharDev, Path: "null", Mode: 0o666, Major: 1, Minor: 3},
	}
}

func TestContentRoot(t *testing.T) {
	entries := sampleTree()
	want, err := ContentRoot(entries)
	if err != nil {
		t.Fatal(err)
	}
	if got := hex.EncodeToString(refContent(entries)); got != want.Hex() {
		t.Errorf("reference: got %s, want %s", got, want.Hex())
	}
	reversed := sampleTree()
	for i := range len(reversed) / 2 {
		j := len(reversed) - 1 - i
		reversed[i], reversed[j] = reversed[j], reversed[i]
	}
	if got, err := ContentRoot(reversed); err != nil || got != want {
		t.Errorf("in another order: got %v, %v, want %v", got, err, want)
	}
	changes := map[string]func([]Entry){
		"type": func(e []Entry) { e[4].Type = BlockDev }, "path": func(e []Entry) { e[4].Path = "nul" }, "mode": func(e []Entry) { e[1].Mode = 0o755 },
		"uid": func(e []Entry) { e[1].UID = 2 }, "gid": func(e []Entry) { e[1].GID = 1 }, "size": func(e []Entry) { e[1].Size++ }, "link": func(e []Entry) { e[3].Link = "bin/" },
		"major": func(e []Entry) { e[4].Major = 3 }, "minor": func(e []Entry) { e[4].Minor = 1 }, "attribute's name": func(e []Entry) { e[1].Xattrs[0].Name = "user.c" },
		"attribute's value": func(e []Entry) { e[1].Xattrs[0].Value = "" }, "attribute gone": func(e []Entry) { e[1].Xattrs = e[1].Xattrs[1:] }, "blob": func(e []Entry) { e[1].Blob[0] ^= 1 },
	}
	for name, change := range changes {
		other := sampleTree()
		change(other)
		if got, err := ContentRoot(other); err != nil || got == want {
			t.Errorf("%s: got %v, %v, want another root", name, got, err)
		}
	}
}

func TestContentRefusals(t *testing.T) {
	file := func(path string) Entry { return Entry{Type: File, Path: path, Blob: BlobRoot(nil)} }
	for name, entries := range map[string][]Entry{
		"empty": {file("")}, "dot": {file(".")}, "dot dot": {file("a/../b")}, "above": {file("../a")}, "absolute": {file("/a")}, "empty part": {file("a//b")}, "slash at the end": {file("a/")},
		"NUL": {file("a\x00")}, "control": {file("a\x1bb")}, "C1 control": {file("a\u0085")}, "not UTF-8": {file("a\xff")}, "4 KiB": {file(strings.Repeat("a", 4097))},
		"twice":        {file("a"), file("a")},
		"below a file": {file("a"), file("a/b")}, "below a link": {{Type: Symlink, Path: "a", Link: "/"}, file("a/b")},
	} {
		var path *PathError
		if _, err := ContentRoot(entries); !errors.As(err, &path) {
			t.Errorf("%s: got %v, want a *PathError", name, err)
		}
		if _, err := SiteRoot(entries); !errors.As(err, &path) {
			t.Errorf("%s: in a site: got %v, want a *PathError", name, err)
		}
	}
	for name, e := range map[string]Entry{
		"type": {Type: 'x', Path: "a"}, "mode": {Type: Folder, Path: "a", Mode: 0o10000}, "file without root": {Type: File, Path: "a"}, "folder with root": {Type: Folder, Path: "a", Blob: Digest{1}},
		"folder with size": {Type: Folder, Path: "a", Size: 1}, "link to nothing": {Type: Symlink, Path: "a"}, "file with link": {Type: File, Path: "a", Link: "b", Blob: Digest{1}},
		"folder with device": {Type: Folder, Path: "a", Minor: 1}, "attribute twice": {Type: Folder, Path: "a", Xattrs: []Xattr{{"u", "1"}, {"u", "2"}}}, "long link": {Type: Symlink, Path: "a", Link: strings.Repeat("a", 65536)},
	} {
		if got, err := ContentRoot([]Entry{e}); err == nil {
			t.Errorf("%s: got %v, want an error", name, got)
		}
	}
	if root, err := ContentRoot(nil); err != nil || root.Hex() != hex.EncodeToString(refContent(nil)) {
		t.Errorf("no entries: got %v, %v", root, err)
	}
}

func TestSiteRefusals(t *testing.T) {
	for name, paths := range map[string][]string{
		"U-03 T42 case": {"readme", "README"}, "T42 case of a folder": {"A/x", "a/y"}, "T42 Kelvin": {"k", "\u212a"}, "U-03 T42 backslash": {`a\b`},
	} {
		t.Run(name, func(t *testing.T) {
			site := fstest.MapFS{}
			var entries []Entry
			for _, path := range paths {
				site[path] = &fstest.MapFile{Mode: 0o644}
				entries = append(entries, Entry{Type: File, Path: path, Mode: 0o644, Blob: BlobRoot(nil)})
			}
			var bad *PathError
			if _, err := FolderRoot(site); !errors.As(err, &bad) {
				t.Errorf("FolderRoot: got %v, want a *PathError", err)
			}
			if _, err := SiteRoot(entries); !errors.As(err, &bad) {
				t.Errorf("SiteRoot: got %v, want a *PathError", err)
			}
			if got, err := ContentRoot(entries); err != nil || got.Hex() != hex.EncodeToString(refContent(entries)) {
				t.Errorf("in an image: got %v, %v, want the root", got, err)
			}
		})
	}
}

func TestFolderRoot(t *testing.T) {
	site := fstest.MapFS{"unit.yaml": {Data: []byte("unit: a\n"), Mode: 0o600}, "bin/run": {Data: []byte("#!"), Mode: 0o700}}
	want, err := ContentRoot([]Entry{
		{Type: File, Path: "unit.yaml", Mode: 0o644, Size: 8, Blob: BlobRoot([]byte("unit: a\n"))},
		{Type: Folder, Path: "bin", Mode: 0o755},
		{Type: File, Path: "bin/run", Mode: 0o755, Size: 2, Blob: BlobRoot([]byte("#!"))},
	})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := FolderRoot(site); err != nil || got != want {
		t.Errorf("in memory: got %v, %v, want %v", got, err, want)
	}
	dir := t.TempDir()
	if err := os.CopyFS(dir, site); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(dir, "bin/run"), 0o700); err != nil { // CopyFS leaves it to the umask
		t.Fatal(err)
	}
	if got, err := FolderRoot(os.DirFS(dir)); err != nil || got != want {
		t.Errorf("on disk: got %v, %v, want %v", got, err, want)
	}
	t.Run("U-02 a symbolic link is refused, unread", func(t *testing.T) {
		if err := os.Symlink("/etc/shadow", filepath.Join(dir, "x")); err != nil {
			t.Fatal(err)
		}
		var path *PathError
		if got, err := FolderRoot(os.DirFS(dir)); !errors.As(err, &path) || path.Path != "x" {
			t.Errorf("got %v, %v, want a *PathError for x", got, err)
		}
	})
}

func TestDigestText(t *testing.T) {
	want := BlobRoot(nil)
	text := want.String()
	if got, err := Parse(text); err != nil || got != want {
		t.Errorf("Parse(String): got %v, %v, want %v", got, err, want)
	}
	for i := range text {
		bad := []byte(text)
		bad[i] ^= 0x20 // changes the case of letters, breaks digits
		if got, err := Parse(string(bad)); err == nil && got == want {
			t.Errorf("byte %d broken: %q is still the same digest", i, bad)
		}
		if _, err := Parse(text[:i]); err == nil {
			t.Errorf("prefix of %d bytes: got no error", i)
		}
	}
	for _, bad := range []string{text + "0", strings.ToUpper(text), " " + text, "kmo1:sha3-256:" + strings.Repeat("0", 64), "sha256:" + text[14:]} {
		if _, err := Parse(bad); err == nil {
			t.Errorf("Parse(%q): got no error", bad)
		}
	}
	var d Digest
	if err := d.UnmarshalText(nil); err != nil || !d.IsZero() || d.String() != "" {
		t.Errorf("empty text: got %v, %v, want none", d, err)
	}
}
