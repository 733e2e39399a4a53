package registry

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/registry/merkle"
)

// fetchLayers puts plain tar layers into a layout and fetches the image.
func fetchLayers(t *testing.T, layers ...[]byte) (*Store, Content, error) {
	t.Helper()
	var blobs []blobOf
	for _, l := range layers {
		blobs = append(blobs, blobOf{types.OCIUncompressedLayer, l})
	}
	return fetchImage(t, imageOf(t, "linux/amd64", nil, blobs...))
}

func fetchImage(t *testing.T, image v1.Image) (*Store, Content, error) {
	t.Helper()
	ref := toLayout(t, image)
	s := newStore(t)
	content, err := s.Fetch(context.Background(), ref, rootOf(t, ref), OCI)
	return s, content, err
}

func TestHostileLayers(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(outside, []byte("untouched"), 0o600); err != nil {
		t.Fatal(err)
	}
	device := func(typ byte) file {
		return file{tar.Header{Name: "dev/x", Typeflag: typ, Devmajor: 1, Devminor: 3, Mode: 0o666}, ""}
	}
	xattr := func(name string) file {
		return file{tar.Header{Name: "x", Typeflag: tar.TypeReg, Mode: 0o644, PAXRecords: map[string]string{"SCHILY.xattr." + name: "y"}, Format: tar.FormatPAX}, ""}
	}
	for name, c := range map[string]struct {
		layers [][]file
		word   string
	}{
		"T54 U-02 dot dot":                      {[][]file{{reg("../x", "")}}, `"../x"`},
		"T54 dot dot in the middle":             {[][]file{{dir("a"), reg("a/../../x", "")}}, `"a/../../x"`},
		"T54 absolute path":                     {[][]file{{reg("/etc/x", "")}}, `"/etc/x"`},
		"T54 absolute hard link":                {[][]file{{link(tar.TypeLink, "x", outside)}}, "hard link"},
		"T54 U-09 hard link out of the tree":    {[][]file{{link(tar.TypeLink, "x", "../../outside")}}, "hard link"},
		"T54 hard link to a folder":             {[][]file{{dir("a"), link(tar.TypeLink, "x", "a")}}, "hard link"},
		"T54 hard link to a link":               {[][]file{{link(tar.TypeSymlink, "a", outside), link(tar.TypeLink, "x", "a")}}, "hard link"},
		"T54 hard link through a link":          {[][]file{{link(tar.TypeSymlink, "a", "/"), link(tar.TypeLink, "x", "a/etc/passwd")}}, "hard link"},
		"T54 U-09 character device":             {[][]file{{device(tar.TypeChar)}}, "dev/x"},
		"T54 U-09 block device":                 {[][]file{{device(tar.TypeBlock)}}, "dev/x"},
		"T54 pipe":                              {[][]file{{device(tar.TypeFifo)}}, "dev/x"},
		"T54 duplicate entry":                   {[][]file{{reg("a", "1"), reg("a", "2")}}, "twice"},
		"T54 duplicate folder":                  {[][]file{{dir("a"), dir("a")}}, "twice"},
		"T54 duplicate by another spelling":     {[][]file{{reg("a", "1"), reg("./a", "2")}}, "twice"},
		"T54 whiteout outside":                  {[][]file{{dir("a"), reg("a/.wh...", "")}}, "whiteout"},
		"T54 whiteout of nothing":               {[][]file{{reg(".wh.", "")}}, "whiteout"},
		"T54 whiteout through a link":           {[][]file{{link(tar.TypeSymlink, "a", filepath.Dir(outside))}, {reg("a/.wh.outside", "")}}, "no folder"},
		"T54 opaque through a link":             {[][]file{{link(tar.TypeSymlink, "a", filepath.Dir(outside))}, {reg("a/.wh..wh..opq", "")}}, "no folder"},
		"T54 U-02 write through a link":         {[][]file{{link(tar.TypeSymlink, "a", filepath.Dir(outside)), reg("a/outside", "evil")}}, "no folder"},
		"T54 write through a link below":        {[][]file{{link(tar.TypeSymlink, "a", filepath.Dir(outside))}, {reg("a/outside", "evil")}}, "no folder"},
		"T54 folder through a link":             {[][]file{{link(tar.TypeSymlink, "a", filepath.Dir(outside))}, {dir("a/b")}}, "no folder"},
		"T54 below a file":                      {[][]file{{reg("a", ""), reg("a/b", "")}}, "no folder"},
		"T54 duplicate whiteout":                {[][]file{{reg("a", "")}, {reg(".wh.a", ""), reg("./.wh.a", "")}}, "twice"},
		"T54 duplicate opaque marker":           {[][]file{{dir("a")}, {reg("a/.wh..wh..opq", ""), reg("a/b", ""), reg("a/.wh..wh..opq", "")}}, "twice"},
		"T54 file over a folder that is filled": {[][]file{{dir("a")}, {reg("a/b", ""), reg("a", "")}}, "replaces"},
		"U-09 path over 4 KiB":                  {[][]file{{reg(strings.Repeat("a/", 2100)+"b", "")}}, "4096"},
		"U-09 control character":                {[][]file{{reg("a\x1b[31m", "")}}, "control"},
		"attribute that overlayfs obeys":        {[][]file{{xattr("trusted.overlay.redirect")}}, "trusted.overlay"},
		"attribute of an overlay without root":  {[][]file{{xattr("user.overlay.opaque")}}, "user.overlay"},
		"no name":                               {[][]file{{link(tar.TypeSymlink, "./", "x")}}, "no name"},
	} {
		t.Run(name, func(t *testing.T) {
			var layers [][]byte
			for _, files := range c.layers {
				layers = append(layers, archive(t, files...))
			}
			s, _, err := fetchLayers(t, layers...)
			wantRefusal(t, s, err, "E_LAYER", c.word)
			if strings.Contains(err.Error(), "\x1b") {
				t.Errorf("U-39: %q", err)
			}
			if body, err := os.ReadFile(outside); err != nil || string(body) != "untouched" {
				t.Errorf("a file outside is now %q, %v", body, err)
			}
		})
	}
}

func TestBrokenLayers(t *testing.T) {
	tarball := archive(t, reg("a", strings.Repeat("a", 10000)))
	diff := []string{"sha256:" + sha256Hex(tarball)}
	for name, c := range map[string]struct {
		media types.MediaType
		data  []byte
		diffs []string
		code  refusal.Code
	}{
		"tar cut":                     {types.OCIUncompressedLayer, tarball[:2000], nil, "E_LAYER"},
		"gzip cut":                    {types.OCILayer, gz(t, tarball)[:50], nil, "E_LAYER"},
		"U-09 gzip's trailer lies":    {types.OCILayer, func() []byte { b := gz(t, tarball); b[len(b)-1] ^= 1; return b }(), nil, "E_LAYER"},
		"garbage after gzip":          {types.OCILayer, append(gz(t, tarball), "garbage"...), nil, "E_LAYER"},
		"not gzip":                    {types.OCILayer, tarball, nil, "E_LAYER"},
		"not zstd":                    {types.OCILayerZStd, tarball, nil, "E_LAYER"},
		"zstd cut":                    {types.OCILayerZStd, zst(t, tarball)[:20], nil, "E_LAYER"},
		"media type":                  {"application/x-foreign", tarball, nil, "E_LAYER"},
		"other diff id":               {types.OCILayer, gz(t, append(tarball, 0)), diff, "E_IMG_DIGEST"},
		"more diff ids than layers":   {types.OCILayer, gz(t, tarball), append(diff, diff...), "E_IMG_DIGEST"},
		"T55 huge zstd window":        {types.OCILayerZStd, zst(t, bytes.Repeat([]byte("a"), 65<<20), zstd.WithWindowSize(64<<20)), nil, "E_LIMIT"},
		"U-09 sparse file":            {types.OCIUncompressedLayer, sparse(t), nil, "E_LAYER"},
		"U-09 42.zip: gzip in itself": {types.OCILayer, gz(t, gz(t, tarball)), nil, "E_LAYER"},
	} {
		t.Run(name, func(t *testing.T) {
			s, _, err := fetchImage(t, imageOf(t, "linux/amd64", c.diffs, blobOf{c.media, c.data}))
			wantRefusal(t, s, err, c.code)
			if strings.Contains(name, "sparse") && !strings.Contains(err.Error(), "sparse") {
				t.Errorf("refused for something else: %v", err)
			}
		})
	}
}

// sparse is an archive of one GNU sparse file that says 1 TiB in no bytes: a PAX header made by hand, since the writer makes none.
func sparse(t *testing.T) []byte {
	t.Helper()
	data := archive(t, reg("PaxHeaders/x", "22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n21 GNU.sparse.name=x\n37 GNU.sparse.realsize=1099511627776\n"), reg("x", "0\n"+strings.Repeat("\x00", 510)))
	copy(data[148:156], "        ") // the checksum counts as spaces while it is computed
	data[156] = 'x'
	sum := 0
	for _, b := range data[:512] {
		sum += int(b)
	}
	copy(data[148:], fmt.Sprintf("%06o\x00 ", sum))
	return data
}

// TestBombs lowers the bound instead of filling the disk: what is tested is that the stream is cut at the bound, whatever its headers say.
func TestBombs(t *testing.T) {
	bomb := archive(t, reg("bomb", strings.Repeat("\x00", 4<<20)))
	for name, c := range map[string]blobOf{"T55 U-09 gzip bomb": {types.OCILayer, gz(t, bomb)}, "T55 zstd bomb": {types.OCILayerZStd, zst(t, bomb)}, "T55 plain": {types.OCIUncompressedLayer, bomb}} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			root, err := os.OpenRoot(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer root.Close()
			u := newUnpacker("layer 0", root)
			err = u.layerFrom(context.Background(), func() (*bounded, func(), error) {
				return decompress("layer 0", v1.Descriptor{MediaType: c.media}, bytes.NewReader(c.data), "", 1<<20)
			})
			if r := refusal.Of(err); r == nil || r.Code != "E_LIMIT" {
				t.Fatalf("got %v, want E_LIMIT", err)
			}
			if stat, err := os.Stat(filepath.Join(dir, "bomb")); err == nil && stat.Size() > 1<<20 {
				t.Errorf("%d bytes were written", stat.Size())
			}
		})
	}
	t.Run("T55 more than the signed uncompressed size", func(t *testing.T) {
		ctx := context.Background()
		ref := toLayout(t, imageOf(t, "linux/amd64", nil, blobOf{types.OCILayer, gz(t, bomb)}))
		key, public := signingKey("release")
		s := newStore(t)
		s.Keys = append(s.Keys, public)
		root := rootOf(t, ref)
		statement := sampleStatement(ref.SHA256, root)
		statement.Predicate.Blobs = []BlobRoot{{SHA256: sha256Hex(gz(t, bomb)), BlobRoot: merkle.BlobRoot(gz(t, bomb)), UncompressedSize: 1 << 20}}
		pushStatement(t, s, ref, statement, key)
		_, err := s.Fetch(ctx, ref, root, OCI)
		wantRefusal(t, s, err, "E_LIMIT", "1048576")
	})
	t.Run("U-09 more entries than may be", func(t *testing.T) {
		root, err := os.OpenRoot(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		u := newUnpacker("layer 0", root)
		u.entries = maxEntries - 1
		if err := u.apply(context.Background(), bytes.NewReader(archive(t, reg("a", ""), reg("b", "")))); refusal.Of(err) == nil || refusal.Of(err).Code != "E_LIMIT" {
			t.Errorf("got %v, want E_LIMIT", err)
		}
	})
}

// paths lists a folder as "type path" with contents of files.
func paths(t *testing.T, dir string) []string {
	t.Helper()
	var all []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		rel, _ := filepath.Rel(dir, path)
		switch {
		case err != nil || rel == ".":
			return err
		case d.IsDir():
			all = append(all, rel+"/")
		case d.Type() == fs.ModeSymlink:
			to, _ := os.Readlink(path)
			all = append(all, rel+" -> "+to)
		default:
			body, _ := os.ReadFile(path)
			all = append(all, rel+"="+string(body))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestLayers(t *testing.T) {
	for name, c := range map[string]struct {
		layers [][]file
		want   []string
	}{
		"whiteout of a file":            {[][]file{{dir("a"), reg("a/x", "1"), reg("a/y", "2")}, {reg("a/.wh.x", "")}}, []string{"a/", "a/y=2"}},
		"whiteout of a folder":          {[][]file{{dir("a"), reg("a/x", "1"), reg("b", "")}, {reg(".wh.a", "")}}, []string{"b="}},
		"whiteout of nothing there":     {[][]file{{reg("b", "")}, {reg(".wh.a", "")}}, []string{"b="}},
		"whiteout spares its own layer": {[][]file{{reg("x", "old")}, {reg("x", "new"), reg(".wh.x", "")}}, []string{"x=new"}},
		"opaque folder":                 {[][]file{{dir("a"), dir("a/d"), reg("a/d/x", "1"), reg("a/y", "2")}, {reg("a/z", "3"), reg("a/.wh..wh..opq", ""), reg("a/w", "4")}}, []string{"a/", "a/w=4", "a/z=3"}},
		"opaque below a new folder":     {[][]file{{dir("a"), dir("a/d"), reg("a/d/x", "1")}, {dir("a/d"), reg("a/d/n", "2"), reg("a/.wh..wh..opq", "")}}, []string{"a/", "a/d/", "a/d/n=2"}},
		"file over a file":              {[][]file{{reg("x", "old")}, {reg("x", "new")}}, []string{"x=new"}},
		"file over a hard link":         {[][]file{{reg("x", "old"), link(tar.TypeLink, "y", "x")}, {reg("x", "new")}}, []string{"x=new", "y=old"}},
		"file over a link":              {[][]file{{reg("t", "t"), link(tar.TypeSymlink, "x", "t")}, {reg("x", "new")}}, []string{"t=t", "x=new"}},
		"link over a folder":            {[][]file{{dir("x"), reg("x/a", "")}, {link(tar.TypeSymlink, "x", "/t")}}, []string{"x -> /t"}},
		"folder over a file":            {[][]file{{reg("x", "old")}, {dir("x"), reg("x/a", "1")}}, []string{"x/", "x/a=1"}},
		"folder kept":                   {[][]file{{dir("x"), reg("x/a", "1")}, {dir("x")}}, []string{"x/", "x/a=1"}},
		"parents that nobody described": {[][]file{{reg("a/b/c", "1"), dir("a/b")}}, []string{"a/", "a/b/", "a/b/c=1"}},
		"dot slash":                     {[][]file{{dir("."), dir("./a"), reg("./a/b", "1")}}, []string{"a/", "a/b=1"}},
		"names equal but for case":      {[][]file{{reg("net/xt_MARK.h", "1"), reg("net/xt_mark.h", "2"), dir("Net")}, {reg("net/.wh.xt_MARK.h", "")}}, []string{"Net/", "net/", "net/xt_mark.h=2"}},
		"names with a backslash":        {[][]file{{reg(`system/mnt-a\x2db.mount`, "1"), link(tar.TypeLink, `b\`, `system/mnt-a\x2db.mount`)}}, []string{`b\=1`, "system/", `system/mnt-a\x2db.mount=1`}},
		"whiteouts at every level":      {[][]file{{dir("a"), dir("a/b"), reg("a/b/x", "1"), reg("a/y", "2")}, {reg("a/b/z", "3"), reg("a/b/.wh..wh..opq", ""), reg("a/.wh.b", ""), reg(".wh.a", "")}}, []string{"a/", "a/b/", "a/b/z=3"}},
		"whiteouts in every layer":      {[][]file{{reg("a/x", "1")}, {reg("a/.wh..wh..opq", ""), reg("a/y", "2")}, {reg("a/.wh..wh..opq", ""), reg("a/z", "3")}}, []string{"a/", "a/z=3"}},
		"removed and made again":        {[][]file{{dir("a"), reg("a/x", "1")}, {reg(".wh.a", "")}, {dir("a")}}, []string{"a/"}},
	} {
		t.Run(name, func(t *testing.T) {
			var layers [][]byte
			for _, files := range c.layers {
				layers = append(layers, archive(t, files...))
			}
			s, content, err := fetchLayers(t, layers...)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, paths(t, content.Path)); diff != "" {
				t.Error(diff)
			}
			if err := s.Check(context.Background(), content); err != nil {
				t.Errorf("Check: %v", err)
			}
			wantClean(t, s, false)
		})
	}
}

func TestLayerCompressions(t *testing.T) {
	tarball := archive(t, reg("a", strings.Repeat("abc", 100_000)))
	diffs := []string{"sha256:" + sha256Hex(tarball)}
	for media, data := range map[types.MediaType][]byte{types.OCILayer: gz(t, tarball), types.DockerLayer: gz(t, tarball), types.OCILayerZStd: zst(t, tarball), types.OCIUncompressedLayer: tarball} {
		_, content, err := fetchImage(t, imageOf(t, "linux/amd64", diffs, blobOf{media, data}))
		if err != nil || content.Size != 300_000 {
			t.Errorf("%s: got %d bytes, %v", media, content.Size, err)
		}
	}
}

func TestSetUID(t *testing.T) {
	capability := "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" // cap_net_bind_service=ep
	s, content, err := fetchLayers(t, archive(t,
		file{tar.Header{Name: "su", Typeflag: tar.TypeReg, Mode: 0o4755, Uid: 3, Gid: 4}, "su"},
		file{tar.Header{Name: "ping", Typeflag: tar.TypeReg, Mode: 0o755, PAXRecords: map[string]string{"SCHILY.xattr.security.capability": capability}, Format: tar.FormatPAX}, "ping"},
		reg("plain", "")))
	if err != nil {
		t.Fatal(err)
	}
	t.Run("T54 set-uid files and capabilities are in the tree and reported", func(t *testing.T) {
		if want := []string{"ping", "su"}; !slices.Equal(content.SetUID, want) {
			t.Errorf("got %v, want %v", content.SetUID, want)
		}
		want, err := merkle.ContentRoot([]merkle.Entry{
			{Type: merkle.File, Path: "su", Mode: 0o4755, UID: 3, GID: 4, Size: 2, Blob: merkle.BlobRoot([]byte("su"))},
			{Type: merkle.File, Path: "ping", Mode: 0o755, Size: 4, Blob: merkle.BlobRoot([]byte("ping")), Xattrs: []merkle.Xattr{{Name: "security.capability", Value: capability}}},
			{Type: merkle.File, Path: "plain", Mode: 0o644, Blob: merkle.BlobRoot(nil)},
		})
		if err != nil || content.Root != want {
			t.Errorf("got root %v, want %v, %v", content.Root, want, err)
		}
		if err := s.Check(context.Background(), content); err != nil {
			t.Errorf("Check: %v", err)
		}
	})
	t.Run("others of this host cannot reach them", func(t *testing.T) {
		if stat, err := os.Stat(filepath.Dir(content.Path)); err != nil || stat.Mode().Perm() != 0o700 {
			t.Errorf("got %v, %v, want 0700", stat.Mode(), err)
		}
	})
}

func TestDrift(t *testing.T) {
	ctx := context.Background()
	ref := toLayout(t, simple(t, "linux/amd64", dir("bin"), reg("bin/app", "hello"), link(tar.TypeSymlink, "app", "bin/app")))
	root := rootOf(t, ref)
	s := newStore(t)
	content, err := s.Fetch(ctx, ref, root, OCI)
	if err != nil {
		t.Fatal(err)
	}
	at := func(path string) string { return filepath.Join(content.Path, path) }
	for name, c := range map[string]struct {
		change func() error
		word   string
	}{
		"T56 changed byte":        {func() error { return os.WriteFile(at("bin/app"), []byte("hallo"), 0o644) }, "bin/app"},
		"T56 longer":              {func() error { return os.WriteFile(at("bin/app"), []byte("hello!"), 0o644) }, "bin/app"},
		"T56 gone":                {func() error { return os.Remove(at("bin/app")) }, "gone"},
		"T56 added":               {func() error { return os.WriteFile(at("bin/new"), nil, 0o644) }, "bin/new"},
		"T56 mode":                {func() error { return os.Chmod(at("bin/app"), 0o4755) }, "mode"},
		"T56 owner":               {func() error { return os.Lchown(at("app"), 5, 5) }, "owner"},
		"T56 U-02 file to a link": {func() error { return errors.Join(os.Remove(at("bin/app")), os.Symlink("/etc/passwd", at("bin/app"))) }, "type"},
		"T56 link led elsewhere":  {func() error { return errors.Join(os.Remove(at("app")), os.Symlink("/bin/sh", at("app"))) }, "/bin/sh"},
		"T56 tree record":         {func() error { return os.Remove(filepath.Join(filepath.Dir(content.Path), treeName)) }, "tree record"},
		"T56 all gone":            {func() error { return os.RemoveAll(content.Path) }, "gone"},
	} {
		t.Run(name, func(t *testing.T) {
			if err := c.change(); err != nil {
				t.Fatal(err)
			}
			err := s.Check(ctx, Content{Path: content.Path, Root: content.Root})
			if r := refusal.Of(err); r == nil || r.Code != "E_DRIFT" || !strings.Contains(err.Error(), c.word) {
				t.Fatalf("got %v, want E_DRIFT that says %q", err, c.word)
			}
			var mismatch *merkle.MismatchError
			if errors.As(err, &mismatch) != (name == "T56 changed byte" || name == "T56 longer") {
				t.Errorf("cause: got %v", mismatch)
			}
			repaired, err := s.Repair(ctx, ref, root, OCI)
			if err != nil || repaired.Path == content.Path || cmp.Diff(content, repaired, otherCopy) != "" {
				t.Fatalf("Repair: got %+v, %v", repaired, err)
			}
			if err := s.Check(ctx, repaired); err != nil {
				t.Errorf("after repair: %v", err)
			}
			wantClean(t, s, false)
			content = repaired
		})
	}
	t.Run("T56 repair needs no source while the blobs are good", func(t *testing.T) {
		if err := errors.Join(os.Rename(ref.Layout, ref.Layout+"-away"), os.Remove(at("bin/app"))); err != nil {
			t.Fatal(err)
		}
		if content, err = s.Repair(ctx, ref, root, OCI); err != nil {
			t.Errorf("got %v", err)
		}
		if err := os.Rename(ref.Layout+"-away", ref.Layout); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("T56 a spoilt blob is fetched again", func(t *testing.T) {
		kept, err := filepath.Glob(filepath.Join(s.Dir, "blobs/sha256/*.root"))
		if err != nil || len(kept) != 1 {
			t.Fatalf("got %v, %v, want the layer's root", kept, err)
		}
		spoil(t, strings.TrimSuffix(kept[0], ".root"))
		spoil(t, at("bin/app"))
		repaired, err := s.Repair(ctx, ref, root, OCI)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Check(ctx, repaired); err != nil {
			t.Errorf("after repair: %v", err)
		}
	})
	t.Run("T56 single file", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "program")
		if err := os.WriteFile(path, []byte("program"), 0o600); err != nil {
			t.Fatal(err)
		}
		ref, root, err := s.PushFile(ctx, path, Reference{Layout: filepath.Join(t.TempDir(), "layout")}, Native)
		if err != nil {
			t.Fatal(err)
		}
		content, err := s.Fetch(ctx, ref, root, Native)
		if err != nil {
			t.Fatal(err)
		}
		spoil(t, content.Path)
		if r := refusal.Of(s.Check(ctx, content)); r == nil || r.Code != "E_DRIFT" {
			t.Errorf("got %v, want E_DRIFT", r)
		}
	})
}

// otherCopy leaves out of a comparison where content lies.
var otherCopy = cmpopts.IgnoreFields(Content{}, "Path")

// TestT56RepairLeavesWhatRuns is about the workloads that have a copy as their base while it is replaced.
func TestT56RepairLeavesWhatRuns(t *testing.T) {
	ctx := context.Background()
	ref := toLayout(t, simple(t, "linux/amd64", reg("app", "hello")))
	root := rootOf(t, ref)
	s := newStore(t)
	var copies []Content
	for range 3 {
		content, err := s.Fetch(ctx, ref, root, OCI)
		if err != nil {
			t.Fatal(err)
		}
		copies = append(copies, content)
		if err := os.WriteFile(filepath.Join(content.Path, "app"), []byte("hallo"), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Repair(ctx, ref, root, OCI); err != nil {
			t.Fatal(err)
		}
		if body, err := os.ReadFile(filepath.Join(content.Path, "app")); err != nil || string(body) != "hallo" {
			t.Errorf("the copy that is replaced: got %q, %v, want it as it was", body, err)
		}
	}
	last, err := s.Repair(ctx, ref, root, OCI)
	if now, err2 := s.Fetch(ctx, ref, root, OCI); err != nil || err2 != nil || cmp.Diff(now, last) != "" {
		t.Errorf("a repair of what is whole: got %+v, %v, want %+v, %v", last, err, now, err2)
	}
	for i, content := range copies {
		if _, err := os.Stat(content.Path); (err == nil) != (i == len(copies)-1) {
			t.Errorf("copy %d: got %v, want only the last one replaced to be left", i, err)
		}
	}
	if err := os.RemoveAll(filepath.Join(s.Dir, "content")); err != nil {
		t.Fatal(err)
	}
	fresh, err := (&Store{Dir: s.Dir, Platform: s.Platform}).Fetch(ctx, ref, root, OCI)
	if err != nil || slices.ContainsFunc(append(copies, last), func(c Content) bool { return c.Path == fresh.Path }) {
		t.Errorf("after all copies were removed: got %s, %v, want a path of its own", fresh.Path, err)
	}
}

func BenchmarkUnpack(b *testing.B) {
	var files []file
	for i := range 500 {
		body := make([]byte, 40<<10)
		for j := range body {
			body[j] = byte((i*7+j)*(j>>7) + j&15)
		}
		files = append(files, reg("usr/share/"+sha256Hex([]byte{byte(i), byte(i >> 8)})[:8]+"/file", string(body)))
	}
	data := archive(b, files...)
	layer := gz(b, data)
	b.Run("by=kmo", func(b *testing.B) {
		b.SetBytes(int64(len(data)))
		for b.Loop() {
			root, err := os.OpenRoot(b.TempDir())
			if err != nil {
				b.Fatal(err)
			}
			u := newUnpacker("layer", root)
			if err := u.layerFrom(context.Background(), func() (*bounded, func(), error) {
				return decompress("layer", v1.Descriptor{MediaType: types.OCILayer}, bytes.NewReader(layer), sha256Hex(data), maxUnpacked)
			}); err != nil {
				b.Fatal(err)
			}
			root.Close()
		}
	})
	b.Run("by=tar", func(b *testing.B) {
		path := filepath.Join(b.TempDir(), "layer.tar.gz")
		if err := os.WriteFile(path, layer, 0o600); err != nil {
			b.Fatal(err)
		}
		b.SetBytes(int64(len(data)))
		for b.Loop() {
			if out, err := exec.Command("tar", "-xzf", path, "-C", b.TempDir()).CombinedOutput(); err != nil {
				b.Fatalf("%v: %s", err, out)
			}
		}
	})
}
