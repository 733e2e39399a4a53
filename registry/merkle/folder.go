package merkle

import (
	"fmt"
	"io/fs"
)

// FolderRoot is the contentRoot of a folder of a site: uid = gid = 0, mode 0755 for folders and for files their owner may execute, 0644 for
// other files. It returns a *PathError for anything that is neither a file nor a folder.
func FolderRoot(fsys fs.FS) (Digest, error) {
	var entries []Entry
	err := fs.WalkDir(fsys, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == "." {
			return err
		}
		if err := CheckPath(path); err != nil {
			return err // before anything is read
		}
		e, err := folderEntry(fsys, path, d)
		entries = append(entries, e)
		return err
	})
	if err != nil {
		return Digest{}, err
	}
	return ContentRoot(entries)
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
