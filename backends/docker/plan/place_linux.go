package plan

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/mount"
	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/process/secret"
)

// place is where a file of a workload lies on this host.
func (p *Plan) place(w *backends.Workload, i int) string {
	dir := filepath.Join(p.State, "work", w.Name, "files")
	if w.Files[i].Secret {
		dir = p.Secrets.Folder(w.Name)
	}
	return filepath.Join(dir, "file-"+strconv.Itoa(i))
}

// node is a device node of this host.
type node struct {
	path string
	kind uint32 // unix.S_IFCHR or unix.S_IFBLK
	dev  int
}

// nodes are those of a workload's devices. One that is not there is left out: it has been refused.
func nodes(r backends.Resources) (list []node) {
	for _, d := range r.Devices {
		for _, path := range d.Nodes {
			var found unix.Stat_t
			if unix.Stat(path, &found) == nil {
				list = append(list, node{path, found.Mode & unix.S_IFMT, int(found.Rdev)})
			}
		}
	}
	return list
}

// rule lets a container's processes use the device.
func (n node) rule() string {
	kind := "c"
	if n.kind == unix.S_IFBLK {
		kind = "b"
	}
	return fmt.Sprintf("%s %d:%d rwm", kind, unix.Major(uint64(n.dev)), unix.Minor(uint64(n.dev)))
}

// device is where the workload's own node of a device lies: one that its user may open, whoever may open that of this host.
func (p *Plan) device(workload string, i int) string {
	return filepath.Join(p.State, "work", workload, "devices", strconv.Itoa(i))
}

// Put makes the files of a workload, its nodes and its kept folders. A file that is there is replaced as a whole: a container that runs keeps the old one.
func (p *Plan) Put(w *backends.Workload) error {
	for i, f := range w.Files {
		at := p.place(w, i)
		var err error
		if f.Secret {
			err = p.Secrets.Make(w.Name)
		} else {
			err = os.MkdirAll(filepath.Dir(at), 0o700)
		}
		if err != nil {
			return err
		}
		next := at + ".next"
		err = os.WriteFile(next, f.Content, 0o600)
		err = errors.Join(err, os.Chown(next, w.Run.User, w.Run.User), os.Chmod(next, os.FileMode(f.Mode).Perm()), os.Rename(next, at))
		if err != nil {
			return err
		}
	}
	for i, n := range nodes(w.Resources) {
		at := p.device(w.Name, i)
		_ = os.Remove(at) // of an earlier start
		err := errors.Join(os.MkdirAll(filepath.Dir(at), 0o700), unix.Mknod(at, n.kind|0o600, n.dev), os.Chown(at, w.Run.User, w.Run.User))
		if err != nil {
			return fmt.Errorf("device %s: %v", n.path, err)
		}
	}
	for _, keep := range w.Overlay.Keep {
		at := p.keptPath(w.Unit, keep)
		if err := errors.Join(os.MkdirAll(at, 0o750), os.Chown(at, w.Run.User, w.Run.User)); err != nil {
			return err
		}
	}
	return nil
}

// Missing says what a workload's container needs of this host and does not find.
func (p *Plan) Missing(w *backends.Workload) error {
	for i, f := range w.Files {
		_, err := os.Stat(p.place(w, i))
		if errors.Is(err, os.ErrNotExist) && f.Secret {
			return fmt.Errorf("%s: %w", w.Name, secret.ErrGone)
		}
		if err != nil {
			return err
		}
	}
	for _, m := range w.Mounts {
		err := straight(m.From)
		if errors.Is(err, errLink) {
			return &backends.StartError{Workload: w.Name, Stage: "mount " + m.To, Cause: err.Error()}
		}
		if err != nil {
			return fmt.Errorf("%s: mount %s: %v", w.Name, m.To, err)
		}
	}
	for _, d := range w.Doors {
		if err := straight(d.From); err != nil {
			return fmt.Errorf("%s: door %s: %v", w.Name, d.To, err)
		}
	}
	return nil
}

var errLink = errors.New("a link on the way to it; want a path without")

// straight wants a path to be there and to have no link in it, which is errLink, and to stay so: the engine looks for it again by its name, so
// nobody but root may be able to put another in its place.
func straight(path string) error {
	fd, err := unix.Openat2(unix.AT_FDCWD, path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS})
	if errors.Is(err, unix.ELOOP) {
		return fmt.Errorf("%s: %w", path, errLink)
	}
	if err != nil {
		return fmt.Errorf("%s: %v", path, err)
	}
	if err := unix.Close(fd); err != nil {
		return err
	}
	for name := filepath.Clean(path); name != "/"; name = filepath.Dir(name) {
		var within, entry unix.Stat_t
		if err := errors.Join(unix.Lstat(filepath.Dir(name), &within), unix.Lstat(name, &entry)); err != nil {
			return fmt.Errorf("%s: %v", path, err)
		}
		alone := within.Mode&0o022 == 0 || within.Mode&unix.S_ISVTX != 0 && int(entry.Uid) == os.Geteuid()
		if owner := int(within.Uid); owner != os.Geteuid() && owner != 0 || !alone {
			return fmt.Errorf("%s: others may put another in its place: %s is user %d's, mode %#o; want folders above it that only root may write",
				path, filepath.Dir(name), within.Uid, within.Mode&0o7777)
		}
	}
	return nil
}

// mounts are the folders and files of this host that a workload sees.
func (p *Plan) mounts(w backends.Workload) (list []mount.Mount, err error) {
	bind := func(from, to string, readOnly bool) {
		list = append(list, mount.Mount{
			Type: mount.TypeBind, Source: from, Target: to, ReadOnly: readOnly,
			BindOptions: &mount.BindOptions{Propagation: mount.PropagationRPrivate, NonRecursive: true},
		})
	}
	for i, f := range w.Files {
		bind(p.place(&w, i), f.To, true)
	}
	for i, n := range nodes(w.Resources) {
		bind(p.device(w.Name, i), n.path, false)
	}
	for _, keep := range w.Overlay.Keep {
		bind(p.keptPath(w.Unit, keep), keep, false)
	}
	for _, d := range w.Doors {
		bind(d.From, d.To, false)
	}
	for _, m := range w.Mounts {
		bind(m.From, m.To, m.ReadOnly)
	}
	for _, m := range list { // Podman makes one text of them, in which a comma begins another option, such as another source, and a quote another text
		if strings.ContainsAny(m.Source+m.Target, `,"`) {
			return nil, &backends.StartError{Workload: w.Name, Stage: "mount " + m.Target, Cause: fmt.Sprintf("a comma or a quote in %q or %q; want paths without", m.Source, m.Target)}
		}
	}
	return list, p.Missing(&w)
}

// keptPath is where a kept path of a unit lies.
func (p *Plan) keptPath(unit, to string) string {
	return filepath.Join(p.State, "kept", unit, backends.KeptName(to))
}
