package merkle

import (
	"fmt"
	"io/fs"
	"strings"
	"unicode"
)

// FolderRoot is the SiteRoot of a folder: uid = gid = 0, mode 0755 for folders and for files their owner may execute, 0644 for other files. It
// returns a *PathError for anything that is neither a file nor a folder.
func FolderRoot(fsys fs.FS) (Digest, error) {
	var entries []Entry
	err := fs.WalkDir(fsys, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == "." {
			return err
		}
		if err := checkSitePath(path); err != nil {
			return err // before anything is read
		}
		e, err := folderEntry(fsys, path, d)
		entries = append(entries, e)
		return err
	})
	if err != nil {
		return Digest{}, err
	}
	return SiteRoot(entries)
}

// SiteRoot is the ContentRoot of a tree that people check out, on whatever they work with. It returns a *PathError for a path with a backslash as
// well, and for one that equals another under case folding, folders above entries included.
func SiteRoot(entries []Entry) (Digest, error) {
	folded := make(map[string]string, len(entries))
	for _, e := range entries {
		if err := checkSitePath(e.Path); err != nil {
			return Digest{}, err
		}
		for at := len(e.Path); at > 0; at = strings.LastIndexByte(e.Path[:at], '/') {
			path := e.Path[:at]
			key := fold(path)
			if other, known := folded[key]; known {
				if other != path {
					return Digest{}, &PathError{Path: path, Reason: fmt.Sprintf("equals %q under case folding", clip(other))}
				}
				break // and so are all above it
			}
			folded[key] = path
		}
	}
	return ContentRoot(entries)
}

func checkSitePath(path string) error {
	if strings.ContainsRune(path, '\\') {
		return &PathError{Path: path, Reason: "has a backslash"}
	}
	return CheckPath(path)
}

// fold maps two strings to one exactly if strings.EqualFold holds of them.
func fold(s string) string {
	return strings.Map(func(r rune) rune {
		least := r
		for next := unicode.SimpleFold(r); next != r; next = unicode.SimpleFold(next) {
			least = min(least, next)
		}
		return least
	}, s)
}

func folderEntry(fsys fs.FS, path string, d fs.DirEntry) (Entry, error) {
	if d.IsDir() {
		return Entry{Type: Folder, Path: path, Mode: 0o755}, nil
	}
	if !d.Type().IsRegular() {
		return Entry{}, &PathError{Path: path, Reason: fmt.Sprintf("neither a file nor a folder (%v)", d.Type())}
	}
	file, err := fsys.Open(path)
	if err != nil {
		return Entry{}, err
	}
	defer file.Close()
	stat, err := file.Stat()
	if err != nil {
		return Entry{}, err
	}
	if !stat.Mode().IsRegular() {
		return Entry{}, &PathError{Path: path, Reason: "was replaced while it was opened"}
	}
	root, size, err := ReaderRoot(file)
	if err != nil {
		return Entry{}, fmt.Errorf("reading %s: %w", path, err)
	}
	e := Entry{Type: File, Path: path, Mode: 0o644, Size: uint64(size), Blob: root}
	if stat.Mode()&0o100 != 0 {
		e.Mode = 0o755
	}
	return e, nil
}
