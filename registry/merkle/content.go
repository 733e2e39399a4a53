package merkle

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// MaxPath is how many bytes a path may have.
const MaxPath = 4096

// The types of an entry.
const (
	File      = 'f'
	Folder    = 'd'
	Symlink   = 'l'
	HardLink  = 'h'
	CharDev   = 'c'
	BlockDev  = 'b'
	Pipe      = 'p'
	Whiteout  = 'w'
	OpaqueDir = 'o'
)

// Entry is one file, folder or other thing of a tree.
type Entry struct {
	Type         byte
	Path         string // clean, relative, with slashes; never the root folder itself
	Mode         uint32 // lower twelve bits of a Unix mode
	UID, GID     uint32
	Size         uint64 // of a file, 0 otherwise
	Link         string // target of a symbolic link, path of the other name of a hard link
	Major, Minor uint32 // of a device
	Xattrs       []Xattr
	Blob         Digest // root of a file's bytes
}

// Xattr is one extended attribute, such as security.capability.
type Xattr struct{ Name, Value string }

// PathError says that a tree has a path it must not have.
type PathError struct {
	Path   string
	Reason string
}

// Error names the path and what is wrong with it.
func (e *PathError) Error() string { return fmt.Sprintf("path %q: %s", clip(e.Path), e.Reason) }

// CheckPath returns a *PathError unless path is UTF-8, relative, clean, at most MaxPath bytes, and free of control characters.
func CheckPath(path string) error {
	reason := ""
	switch {
	case len(path) > MaxPath:
		reason = fmt.Sprintf("%d bytes, at most %d", len(path), MaxPath)
	case !utf8.ValidString(path):
		reason = "not UTF-8"
	case strings.ContainsFunc(path, unicode.IsControl):
		reason = "has a control character"
	case path == "." || !fs.ValidPath(path):
		reason = "not a clean relative path"
	}
	if reason != "" {
		return &PathError{Path: path, Reason: reason}
	}
	return nil
}

// ContentRoot is the root of a tree. It sorts a copy of entries; it returns a *PathError for a path that CheckPath refuses, that is there
// twice, or that lies below something that is not a folder, and an error for an entry that says something its type does not have.
func ContentRoot(entries []Entry) (Digest, error) {
	entries = slices.Clone(entries)
	slices.SortFunc(entries, func(a, b Entry) int { return cmp.Compare(a.Path, b.Path) })
	if err := checkPaths(entries); err != nil {
		return Digest{}, err
	}
	t := tree{level: levelContent}
	var x []byte
	for _, e := range entries {
		var err error
		if x, err = e.append(x[:0]); err != nil {
			return Digest{}, err
		}
		t.leaf(x)
	}
	return t.head(), nil
}

// checkPaths checks sorted entries against each other.
func checkPaths(entries []Entry) error {
	types := make(map[string]byte, len(entries))
	for _, e := range entries {
		if err := CheckPath(e.Path); err != nil {
			return err
		}
		if _, twice := types[e.Path]; twice {
			return &PathError{Path: e.Path, Reason: "is there twice"}
		}
		types[e.Path] = e.Type
		for at := len(e.Path); at > 0; at = strings.LastIndexByte(e.Path[:at], '/') {
			path := e.Path[:at]
			if above, known := types[path]; known && at < len(e.Path) && above != Folder && above != OpaqueDir {
				return &PathError{Path: e.Path, Reason: fmt.Sprintf("lies below %q, which is no folder", clip(path))}
			}
		}
	}
	return nil
}

// check says whether e has only what its type has: a tree has one description, not several.
func (e *Entry) check() error {
	file := e.Type == File
	link := e.Type == Symlink || e.Type == HardLink
	device := e.Type == CharDev || e.Type == BlockDev
	switch {
	case !strings.ContainsRune("fdlhcbpwo", rune(e.Type)):
		return fmt.Errorf("entry %q: type %q is not one of fdlhcbpwo", clip(e.Path), e.Type)
	case e.Mode > 0o7777:
		return fmt.Errorf("entry %q: mode %o has more than twelve bits", clip(e.Path), e.Mode)
	case file == e.Blob.IsZero():
		return fmt.Errorf("entry %q: a blob root is for files, and each has one", clip(e.Path))
	case !file && e.Size != 0:
		return fmt.Errorf("entry %q: size %d on what is no file", clip(e.Path), e.Size)
	case link == (e.Link == ""):
		return fmt.Errorf("entry %q: a link's target is for links, and each has one", clip(e.Path))
	case !device && (e.Major != 0 || e.Minor != 0):
		return fmt.Errorf("entry %q: device numbers on what is no device", clip(e.Path))
	case len(e.Xattrs) > 0xffff:
		return fmt.Errorf("entry %q: %d extended attributes, at most 65535", clip(e.Path), len(e.Xattrs))
	}
	return nil
}

// append appends the bytes of e's leaf.
func (e *Entry) append(x []byte) ([]byte, error) {
	if err := e.check(); err != nil {
		return nil, err
	}
	x = append(x, e.Type)
	x, err := appendString(x, "path", e.Path)
	if err != nil {
		return nil, err
	}
	x = binary.BigEndian.AppendUint32(x, e.Mode)
	x = binary.BigEndian.AppendUint32(x, e.UID)
	x = binary.BigEndian.AppendUint32(x, e.GID)
	x = binary.BigEndian.AppendUint64(x, e.Size)
	if x, err = appendString(x, "link", e.Link); err != nil {
		return nil, err
	}
	x = binary.BigEndian.AppendUint32(x, e.Major)
	x = binary.BigEndian.AppendUint32(x, e.Minor)
	x = binary.BigEndian.AppendUint16(x, uint16(len(e.Xattrs)))
	xattrs := slices.Clone(e.Xattrs)
	slices.SortFunc(xattrs, func(a, b Xattr) int { return cmp.Compare(a.Name, b.Name) })
	for i, a := range xattrs {
		if i > 0 && xattrs[i-1].Name == a.Name {
			return nil, fmt.Errorf("entry %q: extended attribute %q is there twice", clip(e.Path), clip(a.Name))
		}
		if x, err = appendString(x, "extended attribute", a.Name); err != nil {
			return nil, err
		}
		if x, err = appendString(x, "extended attribute's value", a.Value); err != nil {
			return nil, err
		}
	}
	if e.Type == File {
		x = append(x, e.Blob[:]...)
	}
	return x, nil
}
