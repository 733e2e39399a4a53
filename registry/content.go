package registry

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/registry/merkle"
)

// grace is how long what is not needed stays at least.
const grace = 24 * time.Hour

// The names in a content folder.
const (
	rootName = "root"
	fileName = "file"
	treeName = "tree"
)

// place unpacks an image whose blobs are kept and proven, into a new copy that gets its name when it is whole. A blob that the disk has
// spoilt is forgotten, so that the next try fetches it again.
func (s *Store) place(ctx context.Context, img *image, format Format, key string, statement *Statement) (Content, error) {
	temp, err := os.MkdirTemp(filepath.Join(s.Dir, "tmp"), "content-*")
	if err != nil {
		return Content{}, err
	}
	defer func() { _ = os.RemoveAll(temp) }() // in vain once it is renamed
	var content Content
	if format.folder() {
		content, err = s.unpack(ctx, img, temp, statement)
	} else {
		content, err = s.copyFile(img, temp, format)
	}
	if err != nil {
		return Content{}, s.forgetSpoilt(img, err)
	}
	final, err := s.newCopy(key)
	if err != nil {
		return Content{}, err
	}
	if err := os.Rename(temp, final); err != nil {
		return Content{}, err
	}
	content.Path = filepath.Join(final, filepath.Base(content.Path))
	return content, nil
}

// newCopy returns the path of one more copy of an image's content, one that no copy had before: by its path a backend tells that a workload has
// another base, and what runs from the old copy keeps it until it is started again.
func (s *Store) newCopy(key string) (string, error) {
	dir := filepath.Join(s.Dir, "content", key)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	list, err := os.ReadDir(dir)
	next := time.Now().UnixNano() // no number comes again even where somebody has removed all copies
	for _, entry := range list {
		number, _ := strconv.ParseInt(entry.Name(), 10, 64)
		next = max(next, number+1)
	}
	return filepath.Join(dir, strconv.FormatInt(next, 10)), err
}

// removeCopies removes the copies of an image's content but one.
func (s *Store) removeCopies(key, but string) error {
	list, err := filepath.Glob(filepath.Join(s.Dir, "content", key, "*"))
	for _, path := range list {
		if path != but {
			err = errors.Join(err, os.RemoveAll(path))
		}
	}
	return err
}

// unpack makes temp/root and temp/tree. The folder around them is closed to others, so that no set-uid file of an image is theirs to run.
func (s *Store) unpack(ctx context.Context, img *image, temp string, statement *Statement) (Content, error) {
	dir := filepath.Join(temp, rootName)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return Content{}, err
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return Content{}, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return Content{}, err
	}
	defer root.Close()
	diffs := img.oci.RootFS.DiffIDs
	if n := len(img.chosen.manifest.Layers); len(diffs) != 0 && len(diffs) != n {
		return Content{}, refuse("E_IMG_DIGEST", img.subject, fmt.Sprintf("%d diff ids in the config", len(diffs)), fmt.Sprintf("one for each of %d layers", n))
	}
	u := newUnpacker(img.subject, root)
	u.room = func() error { return s.room(0) }
	for i, layer := range img.chosen.manifest.Layers {
		u.subject = fmt.Sprintf("%s: layer %d", img.subject, i)
		diff := ""
		if len(diffs) > 0 {
			diff = diffs[i].Hex
		}
		kept, err := s.openBlob(u.subject, layer)
		if err != nil {
			return Content{}, err
		}
		err = u.layerFrom(ctx, func() (*bounded, func(), error) {
			return decompress(u.subject, layer, kept, diff, min(statement.unpacked(layer.Digest.Hex), s.MaxImage-u.size))
		})
		kept.Close()
		if err != nil {
			return Content{}, err
		}
	}
	content := Content{Path: dir}
	entries := u.tree.list(nil)
	slices.SortFunc(entries, func(a, b merkle.Entry) int { return strings.Compare(a.Path, b.Path) })
	if content.Root, err = merkle.ContentRoot(entries); err != nil {
		return Content{}, refuse("E_LAYER", img.subject, refusal.Clip(err.Error(), 300), "clean paths, each once, below folders only")
	}
	for _, e := range entries {
		content.Size += int64(e.Size)
		if (e.Type == merkle.File && e.Mode&0o6000 != 0 || len(e.Xattrs) > 0) && len(content.SetUID) < 100 {
			content.SetUID = append(content.SetUID, e.Path)
		}
	}
	return content, writeTree(filepath.Join(temp, treeName), entries)
}

func (u *unpacker) layerFrom(ctx context.Context, open func() (*bounded, func(), error)) error {
	layer, done, err := open()
	if err != nil {
		return err
	}
	defer done()
	err = u.apply(ctx, layer)
	u.size += layer.size
	return err
}

// copyFile makes temp/file of an artifact's one layer.
func (s *Store) copyFile(img *image, temp string, format Format) (Content, error) {
	layer := img.chosen.manifest.Layers[0]
	kept, err := s.openBlob(img.subject, layer)
	if err != nil {
		return Content{}, err
	}
	defer kept.Close()
	path := filepath.Join(temp, fileName)
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return Content{}, err
	}
	defer file.Close()
	if _, err := io.CopyBuffer(struct{ io.Writer }{file}, kept, make([]byte, 256<<10)); err != nil {
		return Content{}, err
	}
	mode := fs.FileMode(0o555)
	if format == WASM {
		mode = 0o444
	}
	if err := errors.Join(file.Chmod(mode), os.Chmod(temp, 0o755), file.Close()); err != nil {
		return Content{}, err
	}
	return Content{Path: path, Root: img.known.blobs[layer.Digest.Hex], Size: layer.Size}, nil
}

// forgetSpoilt looks, after unpacking went wrong, whether the kept blobs are still what was verified. If one is not, it goes, and the error is no refusal.
func (s *Store) forgetSpoilt(img *image, err error) error {
	if refusal.Of(err) == nil {
		return err
	}
	for _, layer := range img.chosen.manifest.Layers {
		kept, openErr := s.openBlob(img.subject, layer)
		if openErr != nil {
			continue
		}
		_, readErr := io.Copy(io.Discard, kept)
		kept.Close()
		if refusal.Of(readErr) != nil {
			path := s.blobPath(layer.Digest.Hex)
			return errors.Join(fmt.Errorf("%s: the disk has spoilt blob sha256:%s; it is fetched again at the next try", img.subject, layer.Digest.Hex), os.Remove(path+".root"), os.Remove(path))
		}
	}
	return err
}

func writeTree(path string, entries []merkle.Entry) error {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o400)
	if err != nil {
		return err
	}
	defer file.Close()
	out := bufio.NewWriter(file)
	encoder := json.NewEncoder(out)
	for _, e := range entries {
		if err := encoder.Encode(e); err != nil {
			return err
		}
	}
	return errors.Join(out.Flush(), file.Close())
}

func readTree(path string) ([]merkle.Entry, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	var entries []merkle.Entry
	for decoder := json.NewDecoder(bufio.NewReader(file)); ; {
		var e merkle.Entry
		switch err := decoder.Decode(&e); {
		case err == io.EOF:
			return entries, nil
		case err != nil:
			return nil, err
		}
		entries = append(entries, e)
	}
}

// Check reads content again, all of it. The first difference is refused with E_DRIFT, naming the file; the cause is a
// *merkle.MismatchError where bytes differ. Only Path and Root of content matter.
func (s *Store) Check(ctx context.Context, content Content) error {
	stat, err := os.Lstat(content.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return drift(content.Path, "it is gone", "the content that was unpacked there")
	}
	if err != nil {
		return err
	}
	if !stat.IsDir() {
		file, err := openRegular(filepath.Dir(content.Path), filepath.Base(content.Path))
		if err != nil {
			return err
		}
		defer file.Close()
		return sameBytes(ctx, content.Path, file, content.Root)
	}
	entries, err := readTree(filepath.Join(filepath.Dir(content.Path), treeName))
	if err != nil {
		return drift(content.Path, "its tree record cannot be read: "+refusal.Clip(err.Error(), 200), "the record written when it was unpacked")
	}
	if got, err := merkle.ContentRoot(entries); err != nil || got != content.Root {
		return drift(content.Path, "its tree record has root "+got.String(), content.Root.String())
	}
	root, err := os.OpenRoot(content.Path)
	if err != nil {
		return err
	}
	defer root.Close()
	c := &checker{root: root, path: content.Path, owner: os.Geteuid() == 0, left: make(map[string]*merkle.Entry, len(entries))}
	for i := range entries {
		c.left[entries[i].Path] = &entries[i]
	}
	if err := fs.WalkDir(root.FS(), ".", func(path string, d fs.DirEntry, err error) error { return c.visit(ctx, path, d, err) }); err != nil {
		return err
	}
	for path := range c.left {
		return drift(filepath.Join(content.Path, path), "it is gone", "the file that was unpacked there")
	}
	return nil
}

func drift(path, got, want string) *refusal.Error {
	return refuse("E_DRIFT", `content "`+refusal.Clip(path, 2*merkle.MaxPath)+`"`, got, want)
}

// checker compares a folder with the list of what was unpacked there.
type checker struct {
	root  *os.Root
	path  string
	owner bool                     // owners were set when it was unpacked
	left  map[string]*merkle.Entry // not seen yet
}

func (c *checker) visit(ctx context.Context, path string, d fs.DirEntry, err error) error {
	if path == "." || err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	full := filepath.Join(c.path, path)
	e := c.left[path]
	if e == nil {
		return drift(full, "it was added", "no such file")
	}
	delete(c.left, path)
	stat, err := d.Info()
	if err != nil {
		return err
	}
	types := map[byte]fs.FileMode{merkle.File: 0, merkle.Folder: fs.ModeDir, merkle.Symlink: fs.ModeSymlink}
	if stat.Mode().Type() != types[e.Type] {
		return drift(full, "its type is "+stat.Mode().Type().String(), fmt.Sprintf("type %c", e.Type))
	}
	if want := fileMode(diskMode(e, c.owner)); e.Type != merkle.Symlink && stat.Mode()&^fs.ModeType != want {
		return drift(full, "its mode is "+(stat.Mode()&^fs.ModeType).String(), want.String())
	}
	if sys, ok := stat.Sys().(*syscall.Stat_t); ok && c.owner && (sys.Uid != e.UID || sys.Gid != e.GID) {
		return drift(full, fmt.Sprintf("its owner is %d:%d", sys.Uid, sys.Gid), fmt.Sprintf("%d:%d", e.UID, e.GID))
	}
	if e.Type == merkle.Symlink {
		if link, err := c.root.Readlink(path); err != nil || link != e.Link {
			return drift(full, "it leads to "+quote(link), quote(e.Link))
		}
		return nil
	}
	if e.Type == merkle.File {
		return c.file(ctx, full, path, e)
	}
	return nil
}

func (c *checker) file(ctx context.Context, full, path string, e *merkle.Entry) error {
	file, err := c.root.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	want := ""
	if len(e.Xattrs) > 0 {
		want = e.Xattrs[0].Value
	}
	value := make([]byte, 256)
	n, err := unix.Fgetxattr(int(file.Fd()), capability, value)
	if got := string(value[:max(0, n)]); c.owner && (err == nil || want != "") && got != want {
		return drift(full, fmt.Sprintf("its capabilities are %x", got), fmt.Sprintf("%x", want))
	}
	return sameBytes(ctx, full, file, e.Blob)
}

func sameBytes(ctx context.Context, path string, file *os.File, want merkle.Digest) error {
	got, _, err := merkle.ReaderRoot(contextReader{ctx, file})
	if err != nil || got == want {
		return err
	}
	r := drift(path, "root is "+got.String(), want.String())
	r.Err = &merkle.MismatchError{Name: path, Got: got, Want: want}
	return r
}

// contextReader ends with its context.
type contextReader struct {
	ctx context.Context
	io.Reader
}

func (r contextReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.Reader.Read(p)
}

// Repair makes a new copy of an image's content, from the blobs kept here as far as they are still good, and from its source otherwise. Where
// the present copy is whole it returns that. The copy that it replaces stays, for what runs from it until it is started again; those
// before that go, for what used them was to be started from the one that is replaced now.
func (s *Store) Repair(ctx context.Context, ref Reference, root merkle.Digest, format Format) (Content, error) {
	if err := s.open(); err != nil {
		return Content{}, err
	}
	key := s.key(ref, root, format)
	unlock, err := s.locks.lock(ctx, key)
	if err != nil {
		return Content{}, err
	}
	defer unlock()
	if present, ok := s.recall(ctx, key); ok {
		if s.Check(ctx, present) == nil {
			return present, nil
		}
		if err := s.removeCopies(key, filepath.Dir(present.Path)); err != nil {
			return Content{}, err
		}
	}
	s.mu.Lock()
	delete(s.known, key)
	s.mu.Unlock()
	if err := os.Remove(s.recordPath(key)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Content{}, err
	}
	content, err := s.fetch(ctx, ref, root, format, key)
	if err != nil && refusal.Of(err) == nil && ctx.Err() == nil {
		content, err = s.fetch(ctx, ref, root, format, key) // a spoilt blob was forgotten
	}
	return content, err
}

// recorded returns a promoted record as it is on the disk, the zero record if there is none.
func (s *Store) recorded(key string) (r record, err error) {
	text, err := os.ReadFile(s.recordPath(key))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return r, err
	}
	if decodeStrict(text, &r) != nil || r.Content.Root.IsZero() { // a power cut has torn it
		return record{}, nil
	}
	r.Content.Path = filepath.Join(s.Dir, "content", key, filepath.Base(filepath.Dir(r.Content.Path)), filepath.Base(r.Content.Path))
	return r, nil
}

// sweep clears what a crash left behind.
func (s *Store) sweep() error {
	left, err := os.ReadDir(filepath.Join(s.Dir, "tmp"))
	if err != nil {
		return err
	}
	for _, entry := range left {
		stat, err := entry.Info()
		if err == nil && time.Since(stat.ModTime()) > grace { // a younger one may be another process's
			err = os.RemoveAll(filepath.Join(s.Dir, "tmp", entry.Name()))
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
