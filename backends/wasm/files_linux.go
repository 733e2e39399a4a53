package wasm

import (
	"errors"
	"io/fs"
	"os"
	"path"
	"syscall"

	"github.com/tetratelabs/wazero/experimental/sys"
	"github.com/tetratelabs/wazero/experimental/sysfs"
	wasisys "github.com/tetratelabs/wazero/sys"
)

// tree is a folder of the host as a guest's file system. wazero's own follows symbolic links out of the folder, and a guest may
// make some; tree asks an [os.Root] first, which does not.
type tree struct {
	sys.FS
	root *os.Root
}

func openTree(dir string) (*tree, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	return &tree{sysfs.DirFS(dir), root}, nil
}

// inside says no to a name that leads out of the folder. What is not there yet is inside: every folder above it was looked at.
func (t *tree) inside(name string, follow bool) sys.Errno {
	name = path.Clean(name)
	if name == "/" {
		name = "."
	}
	look := t.root.Lstat
	if follow {
		look = t.root.Stat
	}
	_, err := look(name)
	var errno syscall.Errno
	switch {
	case err == nil, errors.Is(err, fs.ErrNotExist):
		return 0
	case errors.As(err, &errno):
		return sys.UnwrapOSError(errno)
	}
	return sys.EPERM
}

// both is inside for two names, neither followed.
func (t *tree) both(one, other string) sys.Errno {
	if errno := t.inside(one, false); errno != 0 {
		return errno
	}
	return t.inside(other, false)
}

// OpenFile opens what is inside.
func (t *tree) OpenFile(name string, flag sys.Oflag, perm fs.FileMode) (sys.File, sys.Errno) {
	if errno := t.inside(name, flag&sys.O_NOFOLLOW == 0); errno != 0 {
		return nil, errno
	}
	return t.FS.OpenFile(name, flag, perm)
}

// Lstat tells of what is inside.
func (t *tree) Lstat(name string) (wasisys.Stat_t, sys.Errno) {
	if errno := t.inside(name, false); errno != 0 {
		return wasisys.Stat_t{}, errno
	}
	return t.FS.Lstat(name)
}

// Stat tells of what is inside.
func (t *tree) Stat(name string) (wasisys.Stat_t, sys.Errno) {
	if errno := t.inside(name, true); errno != 0 {
		return wasisys.Stat_t{}, errno
	}
	return t.FS.Stat(name)
}

// Mkdir makes a folder inside.
func (t *tree) Mkdir(name string, perm fs.FileMode) sys.Errno {
	if errno := t.inside(name, false); errno != 0 {
		return errno
	}
	return t.FS.Mkdir(name, perm)
}

// Chmod changes what is inside.
func (t *tree) Chmod(name string, perm fs.FileMode) sys.Errno {
	if errno := t.inside(name, true); errno != 0 {
		return errno
	}
	return t.FS.Chmod(name, perm)
}

// Rename moves from inside to inside.
func (t *tree) Rename(from, to string) sys.Errno {
	if errno := t.both(from, to); errno != 0 {
		return errno
	}
	return t.FS.Rename(from, to)
}

// Rmdir removes what is inside.
func (t *tree) Rmdir(name string) sys.Errno {
	if errno := t.inside(name, false); errno != 0 {
		return errno
	}
	return t.FS.Rmdir(name)
}

// Unlink removes what is inside.
func (t *tree) Unlink(name string) sys.Errno {
	if errno := t.inside(name, false); errno != 0 {
		return errno
	}
	return t.FS.Unlink(name)
}

// Link links from inside to inside.
func (t *tree) Link(from, to string) sys.Errno {
	if errno := t.both(from, to); errno != 0 {
		return errno
	}
	return t.FS.Link(from, to)
}

// Symlink makes a link inside. Where it leads is judged when it is followed.
func (t *tree) Symlink(to, name string) sys.Errno {
	if errno := t.inside(name, false); errno != 0 {
		return errno
	}
	return t.FS.Symlink(to, name)
}

// Readlink tells of what is inside.
func (t *tree) Readlink(name string) (string, sys.Errno) {
	if errno := t.inside(name, false); errno != 0 {
		return "", errno
	}
	return t.FS.Readlink(name)
}

// Utimens changes what is inside.
func (t *tree) Utimens(name string, atim, mtim int64) sys.Errno {
	if errno := t.inside(name, true); errno != 0 {
		return errno
	}
	return t.FS.Utimens(name, atim, mtim)
}
