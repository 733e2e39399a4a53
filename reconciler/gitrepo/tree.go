package gitrepo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/go-git/go-git/v5/plumbing"
	"golang.org/x/text/unicode/norm"

	"github.com/kindos/kmo/policy/refusal"
)

// The modes of a tree entry, as git writes them.
const (
	modeFile       = "100644"
	modeExecutable = "100755"
	modeFolder     = "40000"
	modeLink       = "120000"
	modeModule     = "160000"
)

// treeEntry is one name of a folder.
type treeEntry struct {
	mode string
	name string
	id   plumbing.Hash
}

// parseTree reads a tree object: mode, space, name, NUL, twenty bytes of id. It judges no name.
func parseTree(raw []byte) ([]treeEntry, error) {
	var entries []treeEntry
	for len(raw) > 0 {
		mode, rest, ok := bytes.Cut(raw, []byte{' '})
		if !ok || len(mode) < 5 || len(mode) > 6 {
			return nil, errors.New("an entry without a mode")
		}
		name, rest, ok := bytes.Cut(rest, []byte{0})
		if !ok || len(rest) < len(plumbing.Hash{}) {
			return nil, errors.New("an entry without an id")
		}
		e := treeEntry{mode: string(mode), name: string(name)}
		copy(e.id[:], rest)
		raw = rest[len(e.id):]
		entries = append(entries, e)
	}
	return entries, nil
}

// parseFolder reads a tree object whose every entry may be had: regular files and folders, with names that mean the same on
// every file system, each once. at names the folder in a refusal.
func parseFolder(raw []byte, at string) ([]treeEntry, error) {
	entries, err := parseTree(raw)
	if err != nil {
		return nil, refuse("E_OBJ_MALFORMED", "folder "+at, err.Error(), "a tree as git writes it")
	}
	seen := make(map[string]string, len(entries))
	for _, e := range entries {
		want := ""
		switch e.mode {
		case modeFile, modeExecutable, modeFolder:
			want = badName(e.name)
		case modeLink:
			want = "a regular file: links are not followed"
		case modeModule:
			want = "the files themselves: submodules are not fetched"
		default:
			want = "mode 100644, 100755 or 40000"
		}
		folded := fold(e.name)
		if other, twice := seen[folded]; twice && want == "" {
			want = fmt.Sprintf("names that differ by more than case: there is also %q", refusal.Clip(other, 100))
		}
		if want != "" {
			return nil, refuse("E_PATH", "path "+show(path.Join(at, e.name)), e.mode+" "+show(e.name), refusal.Clip(want, 300))
		}
		seen[folded] = e.name
	}
	slices.SortFunc(entries, func(a, b treeEntry) int { return strings.Compare(a.name, b.name) })
	return entries, nil
}

func show(name string) string { return fmt.Sprintf("%q", refusal.Clip(name, 200)) }

// fold maps the names that some file system takes for one to one text.
func fold(name string) string { return strings.ToLower(strings.ToUpper(norm.NFKC.String(name))) }

// badName says what a name must be instead, or "" if it is good.
func badName(name string) string {
	switch {
	case name == "" || name == "." || name == "..":
		return "a name, not a step"
	case !utf8.ValidString(name):
		return "UTF-8"
	case strings.ContainsAny(name, "/\\:"):
		return "a single name: no slash, backslash or colon"
	case strings.HasSuffix(name, ".") || strings.HasSuffix(name, " "):
		return "a name that ends neither in a dot nor in a space"
	case strings.ContainsFunc(name, invisible):
		return "no control and no invisible characters"
	}
	folded := fold(name)
	if short, ok := strings.CutPrefix(folded, "git~"); folded == ".git" || ok && strings.Trim(short, "0123456789") == "" {
		return "no name that some file system takes for .git"
	}
	return ""
}

// invisible holds for control and format characters: what a person does not see, and what HFS+ leaves out of a name.
func invisible(r rune) bool {
	return unicode.IsControl(r) || unicode.Is(unicode.Cf, r) || r == 0x2028 || r == 0x2029
}

// extent is how far a good folder reaches.
type extent struct {
	depth int // folders below it
	path  int // bytes of the longest path in it
	files int // entries in all, a folder counted as often as it is met
}

// checkTree looks at every path of a commit before it is promoted. known keeps the folders that were good, so that the cost
// follows the changes; a folder that is met a million times is looked at once and counted a million times.
func checkTree(ctx context.Context, s *store, root plumbing.Hash, l Limits, known map[plumbing.Hash]extent) error {
	if len(known) > 200_000 {
		clear(known)
	}
	_, err := checkFolder(ctx, s, root, "", l.Depth, l, known)
	return err
}

func checkFolder(ctx context.Context, s *store, h plumbing.Hash, at string, left int, l Limits, known map[plumbing.Hash]extent) (extent, error) {
	all, ok := known[h]
	if !ok {
		if ctx.Err() != nil {
			return all, ctx.Err()
		}
		if left < 0 {
			return all, tooLarge("path "+show(at), int64(l.Depth+1), int64(l.Depth), "folders deep")
		}
		raw, err := s.readAs(plumbing.TreeObject, h)
		if err != nil {
			return all, err
		}
		entries, err := parseFolder(raw, at)
		if err != nil {
			return all, err
		}
		for _, e := range entries {
			all.files++
			all.path = max(all.path, len(e.name))
			if e.mode != modeFolder {
				continue
			}
			below, err := checkFolder(ctx, s, e.id, path.Join(at, e.name), left-1, l, known)
			if err != nil {
				return all, err
			}
			all.depth = max(all.depth, below.depth+1)
			all.path = max(all.path, len(e.name)+1+below.path)
			if all.files += below.files; all.files > l.Objects {
				return all, tooLarge("folder "+show(at), int64(all.files), int64(l.Objects), "files")
			}
		}
	}
	switch {
	case all.depth > left:
		return all, tooLarge("path "+show(at), int64(l.Depth-left+all.depth), int64(l.Depth), "folders deep")
	case len(at)+1+all.path > l.Path:
		return all, refuse("E_PATH", "path "+show(at), fmt.Sprintf("%d bytes", len(at)+1+all.path), fmt.Sprintf("at most %d", l.Path))
	}
	known[h] = all
	return all, nil
}

// treeCache keeps folders that were read. The zero value is ready.
type treeCache struct {
	mu      sync.Mutex
	folders map[plumbing.Hash][]treeEntry
	entries int
}

func (c *treeCache) get(s *store, h plumbing.Hash, at string) ([]treeEntry, error) {
	c.mu.Lock()
	entries, ok := c.folders[h]
	c.mu.Unlock()
	if ok {
		return entries, nil
	}
	raw, err := s.readAs(plumbing.TreeObject, h)
	if err != nil {
		return nil, err
	}
	if entries, err = parseFolder(raw, at); err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.folders == nil || c.entries > 100_000 {
		c.folders, c.entries = map[plumbing.Hash][]treeEntry{}, 0
	}
	c.folders[h] = entries
	c.entries += len(entries) + 1
	return entries, nil
}

// tree is a commit's files as an fs.FS. It implements trust.Tree, fs.ReadFileFS, fs.ReadDirFS and fs.StatFS.
type tree struct {
	store  *store
	cache  *treeCache
	root   plumbing.Hash
	limits Limits
}

// find walks to a clean path.
func (t *tree) find(op, name string) (treeEntry, error) {
	e := treeEntry{mode: modeFolder, name: ".", id: t.root}
	if !fs.ValidPath(name) {
		return e, &fs.PathError{Op: op, Path: name, Err: fs.ErrInvalid}
	}
	if name == "." {
		return e, nil
	}
	at := ""
	for part := range strings.SplitSeq(name, "/") {
		if e.mode != modeFolder {
			return e, &fs.PathError{Op: op, Path: name, Err: fs.ErrNotExist}
		}
		entries, err := t.folder(e.id, at)
		if err != nil {
			return e, err
		}
		i, ok := slices.BinarySearchFunc(entries, part, func(e treeEntry, name string) int { return strings.Compare(e.name, name) })
		if !ok {
			return e, &fs.PathError{Op: op, Path: name, Err: fs.ErrNotExist}
		}
		e, at = entries[i], path.Join(at, part)
	}
	return e, nil
}

func (t *tree) folder(h plumbing.Hash, at string) ([]treeEntry, error) {
	entries, err := t.cache.get(t.store, h, at)
	return entries, t.held(err)
}

func (t *tree) blob(h plumbing.Hash) ([]byte, error) {
	content, err := t.store.readAs(plumbing.BlobObject, h)
	return content, t.held(err)
}

// held marks the copy as damaged when something that must be there is not.
func (t *tree) held(err error) error {
	if errors.Is(err, errAbsent) {
		t.store.damaged.Store(true)
	}
	return ours(err)
}

// ours turns the refusal of damaged bytes into an error that is none: our own disk is at fault, not the commit.
func ours(err error) error {
	if r := refusal.Of(err); r != nil && r.Code == "E_PACK" {
		return fmt.Errorf("the copy is damaged and will be fetched again: %v", err)
	}
	return err
}

// ObjectID implements trust.Tree.
func (t *tree) ObjectID(name string) string {
	e, err := t.find("id", name)
	if err != nil {
		return ""
	}
	return e.id.String()
}

// Open implements fs.FS.
func (t *tree) Open(name string) (fs.File, error) {
	e, err := t.find("open", name)
	if err != nil {
		return nil, err
	}
	s := stat{t, e}
	if e.mode == modeFolder {
		list, err := t.ReadDir(name)
		return &openFolder{stat: s, list: list}, err
	}
	content, err := t.blob(e.id)
	if err != nil {
		return nil, err
	}
	return &openFile{stat: s, Reader: bytes.NewReader(content)}, nil
}

// ReadFile implements fs.ReadFileFS.
func (t *tree) ReadFile(name string) ([]byte, error) {
	e, err := t.find("read", name)
	if err != nil {
		return nil, err
	}
	if e.mode == modeFolder {
		return nil, &fs.PathError{Op: "read", Path: name, Err: errors.New("is a folder")}
	}
	return t.blob(e.id)
}

// ReadDir implements fs.ReadDirFS: sorted by name.
func (t *tree) ReadDir(name string) ([]fs.DirEntry, error) {
	e, err := t.find("readdir", name)
	if err != nil {
		return nil, err
	}
	if e.mode != modeFolder {
		return nil, &fs.PathError{Op: "readdir", Path: name, Err: errors.New("is no folder")}
	}
	entries, err := t.folder(e.id, strings.TrimPrefix(name, "."))
	if err != nil {
		return nil, err
	}
	list := make([]fs.DirEntry, len(entries))
	for i, e := range entries {
		list[i] = stat{t, e}
	}
	return list, nil
}

// Stat implements fs.StatFS.
func (t *tree) Stat(name string) (fs.FileInfo, error) {
	e, err := t.find("stat", name)
	if err != nil {
		return nil, err
	}
	return stat{t, e}.Info()
}

// stat is an entry as fs.DirEntry and, once its size is known, as fs.FileInfo.
type stat struct {
	tree  *tree
	entry treeEntry
}

func (s stat) Name() string { return s.entry.name }
func (s stat) IsDir() bool  { return s.entry.mode == modeFolder }
func (s stat) Type() fs.FileMode {
	return s.Mode().Type()
}

func (s stat) Mode() fs.FileMode {
	switch s.entry.mode {
	case modeFolder:
		return fs.ModeDir | 0o555
	case modeExecutable:
		return 0o555
	}
	return 0o444
}

func (s stat) Info() (fs.FileInfo, error) {
	if s.IsDir() {
		return sized{stat: s}, nil
	}
	content, err := s.tree.blob(s.entry.id)
	return sized{s, int64(len(content))}, err
}

type sized struct {
	stat
	size int64
}

func (s sized) Size() int64        { return s.size }
func (s sized) ModTime() time.Time { return time.Time{} }
func (s sized) Sys() any           { return nil }

type openFile struct {
	stat
	*bytes.Reader
}

func (f *openFile) Stat() (fs.FileInfo, error) { return sized{f.stat, f.Size()}, nil }
func (f *openFile) Close() error               { return nil }

type openFolder struct {
	stat
	list []fs.DirEntry
}

func (f *openFolder) Stat() (fs.FileInfo, error) { return sized{stat: f.stat}, nil }
func (f *openFolder) Close() error               { return nil }
func (f *openFolder) Read([]byte) (int, error) {
	return 0, &fs.PathError{Op: "read", Path: f.entry.name, Err: errors.New("is a folder")}
}

func (f *openFolder) ReadDir(n int) ([]fs.DirEntry, error) {
	if n > 0 && len(f.list) == 0 {
		return nil, io.EOF
	}
	if n <= 0 || n > len(f.list) {
		n = len(f.list)
	}
	some := f.list[:n]
	f.list = f.list[n:]
	return some, nil
}
