package stage

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	securejoin "github.com/cyphar/filepath-securejoin"
	"golang.org/x/sys/unix"
)

// blame marks what the workload itself got wrong.
type blame struct{ error }

const safe = unix.MS_NOSUID | unix.MS_NODEV

// build mounts the root and makes it ours. All of it lies in our own mount namespace and goes with it.
//
// Mount points and files are made in a layer above the content, never in the content. The content's links are resolved on paper,
// within the content; what is made in the layer are real folders and files, and none of them lies in another mount, which may hold
// links that a program has left there. The layer is reached through an [os.Root] alone, and its own links, those of /dev, are made
// last; where something is mounted, no link is followed at all.
func (r *Root) build() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making mounts private: %v", err)
	}
	merged, sources, err := r.lay()
	if err != nil {
		return err
	}
	if err := r.populate(merged, sources); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(r.Hostname)); err != nil {
		return fmt.Errorf("naming the host: %v", err)
	}
	return pivot(merged)
}

// Lay mounts the root for a runtime that sees to the rest: it returns the folder where the content lies with its files, and the binds,
// for which there are mount points. Their From is now a path in the caller's mount namespace, which is to be private, their To where the
// content's links lead. Devices and proc are not in it. [Blames] says whether an error is the workload's fault.
func (r *Root) Lay() (at string, binds []Bind, err error) {
	at, sources, err := r.lay()
	for i, s := range sources {
		if err == nil {
			s.bind.From, err = s.pin(filepath.Join(r.Scratch, "bind-"+strconv.Itoa(i)))
		}
		s.bind.To = s.to
		binds = append(binds, s.bind)
		err = errors.Join(err, unix.Close(s.fd))
	}
	return at, binds, err
}

// pin gives what was opened a path.
func (s source) pin(at string) (string, error) {
	var found unix.Stat_t
	err := unix.Fstat(s.fd, &found)
	if err == nil && found.Mode&unix.S_IFMT == unix.S_IFDIR {
		err = os.Mkdir(at, 0o700)
	} else if err == nil {
		err = os.WriteFile(at, nil, 0o600)
	}
	if err == nil {
		err = unix.Mount("/proc/self/fd/"+strconv.Itoa(s.fd), at, "", unix.MS_BIND, "")
	}
	if err != nil {
		return "", fmt.Errorf("binding %s: %v", s.bind.From, err)
	}
	return at, nil
}

// Blames says whether an error of Lay is the workload's fault.
func Blames(err error) bool {
	var b blame
	return errors.As(err, &b)
}

// lay makes the layer, merges it with the content and puts the files in their places.
func (r *Root) lay() (merged string, sources []source, err error) {
	if err := unix.Mount("tmpfs", r.Scratch, "tmpfs", safe, "mode=0755"); err != nil {
		return "", nil, fmt.Errorf("mounting a tmpfs: %v", err)
	}
	layer, merged := filepath.Join(r.Scratch, "layer"), filepath.Join(r.Scratch, "merged")
	if err := errors.Join(os.Mkdir(layer, 0o755), os.Mkdir(merged, 0o755)); err != nil { // it is the program's /
		return "", nil, err
	}
	if sources, err = r.points(layer); err != nil {
		return "", nil, err
	}
	if err := r.merge(layer, merged); err != nil {
		return "", sources, err
	}
	if r.Size > 0 { // without, the whole layer is read-only already
		for _, f := range r.Files {
			if err := bind(filepath.Join(layer, f.To), merged, f.To, safe|unix.MS_RDONLY); err != nil {
				return "", sources, err
			}
		}
	}
	return merged, sources, nil
}

// Devices are the files of /dev that every program has.
func Devices() []string { return []string{"null", "zero", "full", "random", "urandom"} }

// source is a bind whose From has been opened: what is mounted is what was looked at.
type source struct {
	fd   int
	to   string
	bind Bind
}

// points makes every mount point and file in the layer.
func (r *Root) points(layer string) ([]source, error) {
	top, err := os.OpenRoot(layer)
	if err != nil {
		return nil, err
	}
	defer top.Close()
	if r.Content != "" {
		if err := mirror(r.Content, top, "."); err != nil {
			return nil, err
		}
	}
	if err := r.own(top); err != nil {
		return nil, err
	}
	var places []place
	for i := range r.Files {
		f := &r.Files[i]
		asked := f.To
		if err := r.file(top, f); err != nil {
			return nil, err
		}
		places = append(places, place{asked, f.To})
	}
	var sources []source
	for _, bind := range r.Binds {
		s, err := open(bind)
		if err != nil {
			return nil, err
		}
		var found unix.Stat_t
		if err := unix.Fstat(s.fd, &found); err != nil {
			return nil, err
		}
		if s.to, err = r.point(top, bind.To, found.Mode&unix.S_IFMT == unix.S_IFDIR); err != nil {
			return nil, err
		}
		sources, places = append(sources, s), append(places, place{bind.To, s.to})
	}
	if err := apart(places); err != nil {
		return nil, err
	}
	for _, link := range [][2]string{{"fd", "/proc/self/fd"}, {"stdin", "fd/0"}, {"stdout", "fd/1"}, {"stderr", "fd/2"}} {
		if err := top.Symlink(link[1], "dev/"+link[0]); err != nil {
			return nil, err
		}
	}
	return sources, nil
}

// place is a path inside, as it was asked for and where the content's links lead.
type place struct{ asked, to string }

// apart blames who has one thing at or below the path of another, whether by asking so or by links.
func apart(places []place) error {
	for i, inner := range places {
		for j, outer := range places {
			if i != j && strings.HasPrefix(inner.to+"/", outer.to+"/") {
				return blame{fmt.Errorf("%s: in the image it is %s, within %s, which is %s; want neither to lie in the other", inner.asked, inner.to, outer.asked, outer.to)}
			}
		}
	}
	return nil
}

// own makes what is there whatever the content says: /dev and /proc, which hide a link of the content in their place, and, where
// something may be written, the root folder itself for the program and the two folders that any may write.
func (r *Root) own(top *os.Root) error {
	folders := []string{"/proc", "/dev"}
	if r.Size > 0 {
		folders = append(folders, "/dev/shm")
	}
	for _, dir := range folders {
		if err := r.make(top, dir, true); err != nil {
			return err
		}
	}
	for _, device := range Devices() {
		if err := r.make(top, "/dev/"+device, false); err != nil {
			return err
		}
	}
	for _, node := range r.Nodes {
		if err := r.make(top, node, false); err != nil {
			return err
		}
	}
	if r.Size == 0 {
		return nil
	}
	tmp, err := r.point(top, "/tmp", true)
	if err != nil {
		return err
	}
	return errors.Join(dress(top, tmp, 0, 0, 0o777|os.ModeSticky), dress(top, "dev/shm", 0, 0, 0o777|os.ModeSticky), dress(top, ".", r.Owner, r.Owner, 0o755))
}

// dress gives a file or folder of the layer an owner and a mode.
func dress(top *os.Root, name string, uid, gid int, mode os.FileMode) error {
	f, err := top.Open(inLayer(name))
	if err != nil {
		return err
	}
	return errors.Join(f.Chown(uid, gid), f.Chmod(mode), f.Close())
}

// inLayer is a path inside as os.Root names it.
func inLayer(to string) string { return cmp.Or(strings.TrimPrefix(to, "/"), ".") }

func (r *Root) file(top *os.Root, f *File) error {
	to, err := r.point(top, f.To, false)
	if err != nil {
		return err
	}
	f.To = to
	if err := top.WriteFile(inLayer(to), f.Content, 0o600); err != nil {
		return err
	}
	return dress(top, to, r.Owner, r.Owner, os.FileMode(f.Mode).Perm())
}

// point makes a folder or an empty file in the layer for what the content calls to, and returns where the content's links lead.
// Nothing leads into /dev or /proc: what is there is ours.
func (r *Root) point(top *os.Root, to string, folder bool) (string, error) {
	asked := to
	if r.Content != "" {
		at, err := securejoin.SecureJoin(r.Content, to)
		if err != nil {
			return "", blame{err}
		}
		to = path.Join("/", strings.TrimPrefix(at, filepath.Clean(r.Content)))
	}
	if first, _, _ := strings.Cut(inLayer(to), "/"); first == "dev" || first == "proc" || first == "." {
		return "", blame{fmt.Errorf("%s: a link of the image leads it to %s; want a path outside /dev and /proc", asked, to)}
	}
	return to, r.make(top, to, folder)
}

// make makes a folder or an empty file in the layer, and the folders above it with the modes of the content's.
func (r *Root) make(top *os.Root, to string, folder bool) error {
	dir := ""
	parts := strings.Split(inLayer(to), "/")
	for i, part := range parts {
		dir = path.Join(dir, part)
		if i == len(parts)-1 && !folder {
			f, err := top.OpenFile(dir, os.O_CREATE|os.O_WRONLY, 0o644)
			if err != nil {
				return blame{err}
			}
			return f.Close()
		}
		if err := top.Mkdir(dir, 0o755); errors.Is(err, os.ErrExist) {
			continue
		} else if err != nil {
			return blame{err}
		}
		if r.Content == "" {
			continue
		}
		if err := mirror(filepath.Join(r.Content, dir), top, dir); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// mirror gives a folder of the layer the owner and mode of another, because the uppermost layer's count. What is no folder there
// leaves it as it was made.
func mirror(from string, top *os.Root, name string) error {
	found, err := os.Lstat(from)
	if err != nil || !found.IsDir() {
		return err
	}
	stat, ok := found.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("%s: no owner", from)
	}
	return dress(top, name, int(stat.Uid), int(stat.Gid), found.Mode()&(os.ModePerm|os.ModeSticky))
}

func open(b Bind) (source, error) {
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC}
	if b.Strict {
		how.Resolve = unix.RESOLVE_NO_SYMLINKS
	}
	fd, err := unix.Openat2(unix.AT_FDCWD, b.From, &how)
	if errors.Is(err, unix.ELOOP) && b.Strict {
		return source{}, blame{fmt.Errorf("%s has a link in it; want a path without", b.From)}
	}
	if err != nil {
		return source{}, fmt.Errorf("opening %s: %v", b.From, err)
	}
	return source{fd: fd, bind: b}, nil
}

// merge puts the layer over the content, and a bounded tmpfs over both where writing is wanted.
func (r *Root) merge(layer, merged string) error {
	lower := escape(layer)
	if r.Content != "" {
		lower += ":" + escape(r.Content)
	}
	if r.Size > 0 {
		top := filepath.Join(r.Scratch, "top")
		if err := os.Mkdir(top, 0o700); err != nil {
			return err
		}
		if err := unix.Mount("tmpfs", top, "tmpfs", safe, "mode=0700,size="+strconv.FormatInt(r.Size, 10)); err != nil {
			return fmt.Errorf("mounting a tmpfs of %d bytes: %v", r.Size, err)
		}
		upper, work := filepath.Join(top, "upper"), filepath.Join(top, "work")
		if err := errors.Join(os.Mkdir(upper, 0o700), os.Mkdir(work, 0o700)); err != nil {
			return err
		}
		above, err := os.OpenRoot(upper)
		if err != nil {
			return err
		}
		if err := errors.Join(mirror(layer, above, "."), above.Close()); err != nil {
			return err
		}
		return overlay(merged, safe, "lowerdir="+lower+",upperdir="+escape(upper)+",workdir="+escape(work))
	}
	if r.Content != "" {
		return overlay(merged, safe|unix.MS_RDONLY, "lowerdir="+lower)
	}
	return bind(layer, r.Scratch, filepath.Base(merged), safe|unix.MS_RDONLY)
}

func overlay(at string, flags uintptr, options string) error {
	if err := unix.Mount("overlay", at, "overlay", flags, options); err != nil {
		return fmt.Errorf("mounting an overlay (%s): %v", options, err)
	}
	return nil
}

// escape keeps a path whole in overlayfs' options.
func escape(p string) string {
	return strings.NewReplacer(`\`, `\\`, ":", `\:`, ",", `\,`).Replace(p)
}

// populate mounts what comes from outside the content.
func (r *Root) populate(merged string, sources []source) error {
	if err := mount("proc", merged, "/proc", "proc", safe|unix.MS_NOEXEC|unix.MS_RDONLY); err != nil {
		return fmt.Errorf("mounting proc: %v", err)
	}
	for _, device := range Devices() {
		if err := mount("/dev/"+device, merged, "/dev/"+device, "", unix.MS_BIND); err != nil {
			return fmt.Errorf("binding /dev/%s: %v", device, err)
		}
	}
	if err := r.nodes(merged); err != nil {
		return err
	}
	for _, s := range sources {
		flags := uintptr(safe)
		if !s.bind.Writable {
			flags |= unix.MS_RDONLY
		}
		if err := bind("/proc/self/fd/"+strconv.Itoa(s.fd), merged, s.to, flags); err != nil {
			return fmt.Errorf("%s: %v", s.bind.From, err)
		}
	}
	return nil
}

// nodes makes nodes of the host's devices, on a file system of their own, since what else is mounted here takes none.
func (r *Root) nodes(merged string) error {
	if len(r.Nodes) == 0 {
		return nil
	}
	dir := filepath.Join(r.Scratch, "nodes")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", safe&^unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return fmt.Errorf("mounting a tmpfs for devices: %v", err)
	}
	for i, node := range r.Nodes {
		var found unix.Stat_t
		if err := unix.Stat(node, &found); err != nil {
			return fmt.Errorf("device %s: %v", node, err)
		}
		own := filepath.Join(dir, strconv.Itoa(i))
		if err := errors.Join(unix.Mknod(own, found.Mode&unix.S_IFMT|0o600, int(found.Rdev)), os.Chown(own, r.Owner, r.Owner)); err != nil {
			return fmt.Errorf("device %s: %v", node, err)
		}
		if err := mount(own, merged, node, "", unix.MS_BIND); err != nil {
			return fmt.Errorf("binding device %s: %v", node, err)
		}
	}
	return nil
}

func bind(from, top, to string, flags uintptr) error {
	if err := mount(from, top, to, "", unix.MS_BIND); err != nil {
		return fmt.Errorf("binding %s: %v", to, err)
	}
	if err := mount("", top, to, "", unix.MS_BIND|unix.MS_REMOUNT|flags); err != nil {
		return fmt.Errorf("binding %s again: %v", to, err)
	}
	return nil
}

// mount mounts at a path below top. The path has no link in it, and the kernel looks it up no second time.
func mount(from, top, to, kind string, flags uintptr) error {
	root, err := unix.Open(top, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(root)
	at, err := unix.Openat2(root, inLayer(to), &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS})
	if err != nil {
		return err
	}
	defer unix.Close(at)
	return unix.Mount(from, "/proc/self/fd/"+strconv.Itoa(at), kind, flags, "")
}

func pivot(root string) error {
	if err := os.Chdir(root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("changing the root: %v", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("letting the host's root go: %v", err)
	}
	return os.Chdir("/")
}
