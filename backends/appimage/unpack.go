package appimage

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"

	diskfile "github.com/diskfs/go-diskfs/backend/file"
	"github.com/diskfs/go-diskfs/filesystem/squashfs"

	"github.com/kindos/kmo/registry/merkle"
)

// What an image may come to. One that is larger is refused, whatever its file's size.
const (
	maxEntries = 1 << 18
	maxBytes   = 8 << 30
	maxDepth   = 64
)

// imageError is what is wrong with an image; it is nobody's fault but the image's.
type imageError struct{ text string }

// Error says what was found, and what would pass.
func (e *imageError) Error() string { return e.text }

func bad(format string, args ...any) error { return &imageError{fmt.Sprintf(format, args...)} }

// payload is where the squashfs of a type-2 AppImage begins: behind the last of its ELF sections, segments and headers.
func payload(f *os.File) (int64, error) {
	var head [64]byte
	if _, err := f.ReadAt(head[:], 0); errors.Is(err, io.EOF) {
		return 0, bad("it has fewer than 64 bytes; want a type-2 AppImage")
	} else if err != nil {
		return 0, err
	}
	if !bytes.Equal(head[8:11], []byte("AI\x02")) {
		return 0, bad("its bytes 8 to 10 are %q; want AI and 2, which make an ELF file a type-2 AppImage", head[8:11])
	}
	e, err := elf.NewFile(f)
	if err != nil {
		return 0, bad("its ELF part: %v", err)
	}
	table, entry, count := 0x28, 0x3a, 0x3c // e_shoff, e_shentsize, e_shnum
	size := 8
	if e.Class == elf.ELFCLASS32 {
		table, entry, count, size = 0x20, 0x2e, 0x30, 4
	}
	end := uint64(e.ByteOrder.Uint32(head[table:]))
	if size == 8 {
		end = e.ByteOrder.Uint64(head[table:])
	}
	end += uint64(e.ByteOrder.Uint16(head[entry:])) * uint64(e.ByteOrder.Uint16(head[count:]))
	for _, s := range e.Sections {
		if s.Type != elf.SHT_NOBITS {
			end = max(end, s.Offset+s.FileSize)
		}
	}
	for _, p := range e.Progs {
		end = max(end, p.Off+p.Filesz)
	}
	var magic [4]byte
	if n, err := f.ReadAt(magic[:], int64(end)); n < 4 || string(magic[:]) != "hsqs" { //nolint:gosec // one that is negative then is not there
		return 0, bad("behind its ELF part, at %d, is %q (%v); want a squashfs", end, magic[:n], err)
	}
	return int64(end), nil //nolint:gosec // it was read there
}

// unpack writes the file system of an AppImage into a new folder, and returns its content root. Owners and special modes are left out: all
// of it may be read by anybody, and written by nobody.
func unpack(ctx context.Context, image, dir string) (root merkle.Digest, err error) {
	defer func() {
		if r := recover(); r != nil { // the reader meets what nobody has verified
			err = bad("its squashfs cannot be read: %v", r)
		}
	}()
	f, err := os.Open(image)
	if err != nil {
		return root, err
	}
	defer f.Close()
	at, err := payload(f)
	if err != nil {
		return root, err
	}
	found, err := f.Stat()
	if err != nil {
		return root, err
	}
	system, err := squashfs.Read(diskfile.New(f, true), found.Size()-at, at, 0)
	if err != nil {
		return root, bad("its squashfs: %v", err)
	}
	if err := os.Mkdir(dir, 0o755); err != nil { // the workload's user reads it
		return root, err
	}
	to, err := os.OpenRoot(dir)
	if err != nil {
		return root, err
	}
	defer to.Close()
	u := &unpacking{ctx: ctx, from: system, to: to}
	if err := u.folder(".", 0); err != nil {
		return root, err
	}
	if run, err := to.Stat("AppRun"); err != nil || !run.Mode().IsRegular() || run.Mode()&0o111 == 0 {
		return root, bad("its AppRun is no program (%v); want an executable file or a link to one within", err)
	}
	return measure(ctx, dir)
}

// unpacking is one image on its way.
type unpacking struct {
	ctx     context.Context
	from    *squashfs.FileSystem
	to      *os.Root
	entries int
	bytes   int64
}

func (u *unpacking) folder(name string, depth int) error {
	if depth > maxDepth {
		return bad("%s: folders are more than %d deep", name, maxDepth)
	}
	list, err := u.from.ReadDir(name)
	if err != nil {
		return bad("its folder %s: %v", name, err)
	}
	for _, entry := range list {
		if err := u.ctx.Err(); err != nil {
			return err
		}
		if u.entries++; u.entries > maxEntries {
			return bad("it has more than %d files", maxEntries)
		}
		at := path.Join(name, entry.Name())
		if entry.Name() != path.Base(at) || merkle.CheckPath(at) != nil {
			return bad("a file in %s is named %q; want a plain name", name, entry.Name())
		}
		if err := u.entry(at, entry, depth); err != nil {
			return err
		}
	}
	return nil
}

func (u *unpacking) entry(at string, entry fs.DirEntry, depth int) error {
	switch entry.Type() {
	case fs.ModeDir:
		if err := u.to.Mkdir(at, 0o755); err != nil {
			return err
		}
		return u.folder(at, depth+1)
	case fs.ModeSymlink:
		link, ok := entry.(interface{ Readlink() (string, error) })
		if !ok {
			return bad("%s: a link that leads nowhere", at)
		}
		target, err := link.Readlink()
		if err != nil {
			return bad("%s: %v", at, err)
		}
		return u.to.Symlink(target, at)
	case 0:
		return u.file(at, entry)
	}
	return bad("%s is of type %v; want files, folders and links", at, entry.Type())
}

func (u *unpacking) file(at string, entry fs.DirEntry) error {
	about, err := entry.Info()
	if err != nil {
		return bad("%s: %v", at, err)
	}
	if u.bytes += about.Size(); about.Size() < 0 || u.bytes > maxBytes {
		return bad("its files have more than %d bytes", int64(maxBytes))
	}
	from, err := u.from.Open(at)
	if err != nil {
		return bad("%s: %v", at, err)
	}
	defer from.Close()
	mode := fs.FileMode(0o644)
	if about.Mode()&0o111 != 0 {
		mode = 0o755
	}
	to, err := u.to.OpenFile(at, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	n, err := io.Copy(to, io.LimitReader(reader{from}, about.Size()+1))
	var unreadable *imageError
	if errors.As(err, &unreadable) {
		return errors.Join(bad("%s: %v", at, err), to.Close())
	}
	if err == nil && n != about.Size() {
		err = bad("%s has %d bytes or more; it says %d", at, n, about.Size())
	}
	return errors.Join(err, to.Chmod(mode), to.Sync(), to.Close())
}

// reader blames the image for what cannot be read of it.
type reader struct{ io.Reader }

// Read reads the next bytes.
func (r reader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = bad("%v", err)
	}
	return n, err
}

// measure is the content root of an unpacked image.
func measure(ctx context.Context, dir string) (merkle.Digest, error) {
	var entries []merkle.Entry
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err = errors.Join(err, ctx.Err()); err != nil || path == dir {
			return err
		}
		about, err := entry.Info()
		if err != nil {
			return err
		}
		e := merkle.Entry{Type: merkle.Folder, Mode: uint32(about.Mode().Perm())}
		if e.Path, err = filepath.Rel(dir, path); err != nil {
			return err
		}
		switch entry.Type() {
		case fs.ModeDir:
		case fs.ModeSymlink:
			e.Type, e.Mode = merkle.Symlink, 0o777
			e.Link, err = os.Readlink(path)
		case 0:
			e.Type = merkle.File
			e.Blob, e.Size, err = blob(path)
		default:
			err = fmt.Errorf("%s is of type %v", path, entry.Type())
		}
		entries = append(entries, e)
		return err
	})
	if err != nil {
		return merkle.Digest{}, err
	}
	return merkle.ContentRoot(entries)
}

func blob(path string) (merkle.Digest, uint64, error) {
	f, err := os.Open(path)
	if err != nil {
		return merkle.Digest{}, 0, err
	}
	defer f.Close()
	root, size, err := merkle.ReaderRoot(f)
	return root, uint64(size), err //nolint:gosec // a size is not negative
}
