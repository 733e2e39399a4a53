package stage

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"

	securejoin "github.com/cyphar/filepath-securejoin"
	"golang.org/x/sys/unix"
)

// Mount builds the root for a runtime that enters it by itself, and returns where it lies: all that a program sees but /proc, which is
// to be of the runtime's process ids. The caller's mount namespace is to be its own, and private. [Blames] says whether an error is the
// workload's fault.
func (r *Root) Mount() (at string, err error) {
	at, sources, err := r.lay()
	if err != nil {
		return "", err
	}
	return at, r.populate(at, sources)
}

// Resolve is where a path leads within a root, whose links are followed within it.
func Resolve(root, to string) (string, error) { return securejoin.SecureJoin(root, to) }

// NewUsers makes them. It needs root.
func NewUsers(first, extra int) (*Users, error) {
	u := &Users{First: first, Extra: extra}
	runtime.LockOSThread() // the one that traces
	defer runtime.UnlockOSThread()
	var ids []syscall.SysProcIDMap
	for _, e := range u.Ranges() {
		ids = append(ids, syscall.SysProcIDMap{ContainerID: e[0], HostID: e[1], Size: e[2]})
	}
	// It is stopped before its first instruction, and ended there.
	pid, err := syscall.ForkExec("/proc/self/exe", []string{"kmo"}, &syscall.ProcAttr{Env: []string{}, Sys: &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids, Ptrace: true, Pdeathsig: syscall.SIGKILL,
	}})
	if err != nil {
		return nil, fmt.Errorf("making a user namespace: %v", err)
	}
	u.space, err = os.Open("/proc/" + strconv.Itoa(pid) + "/ns/user")
	_ = unix.Kill(pid, unix.SIGKILL)
	for {
		if _, ended := unix.Wait4(pid, nil, unix.WALL, nil); !errors.Is(ended, unix.EINTR) {
			break
		}
	}
	return u, err
}

// Close lets the user namespace go. What was mounted by it stays as it is.
func (u *Users) Close() error { return u.space.Close() }

// Ranges lists where ids begin inside, where on the host, and how many they are.
func (u *Users) Ranges() [][3]int {
	list := [][3]int{{0, u.First, idCount}}
	if u.Extra >= idCount {
		list = append(list, [3]int{u.Extra, u.First + idCount, 1})
	}
	return list
}

// outside is the id on the host of one inside.
func (u *Users) outside(id int) int {
	switch {
	case u == nil:
		return id
	case id < idCount:
		return u.First + id
	}
	return u.First + idCount
}

// own gives a layer to whom its owners are to be.
func (u *Users) own(layer string) error {
	return filepath.WalkDir(layer, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		found, err := entry.Info()
		if err != nil {
			return err
		}
		stat, ok := found.Sys().(*syscall.Stat_t)
		if !ok {
			return fmt.Errorf("%s: no owner", path)
		}
		if err := os.Lchown(path, u.outside(int(stat.Uid)), u.outside(int(stat.Gid))); err != nil || entry.Type()&fs.ModeSymlink != 0 {
			return err
		}
		return os.Chmod(path, found.Mode()) // a change of owner may have taken bits of it
	})
}

// content mounts a folder of content, owned by whom its owners are to be.
func (u *Users) content(from, scratch string) (string, error) {
	if from == "" {
		return "", nil
	}
	at := filepath.Join(scratch, "content")
	if err := os.Mkdir(at, 0o700); err != nil {
		return "", err
	}
	fd, err := unix.Open(from, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("opening %s: %v", from, err)
	}
	defer unix.Close(fd)
	if err := u.bind(fd, scratch, "/content", safe|unix.MS_RDONLY); err != nil {
		return "", fmt.Errorf("%s: %v", from, err)
	}
	return at, nil
}

// Maps returns an error if what lies at a path cannot be mounted with other owners: not every file system can.
func (u *Users) Maps(path string) error {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	tree, err := u.tree(fd, 0)
	if err != nil {
		return err
	}
	return unix.Close(tree)
}

// tree is a mount, attached nowhere yet, of what is open as fd.
func (u *Users) tree(fd int, flags uint64) (int, error) {
	tree, err := unix.OpenTree(fd, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	if err != nil {
		return -1, fmt.Errorf("cloning a mount: %v", err)
	}
	change := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP | flags, Userns_fd: uint64(u.space.Fd())}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &change); err != nil {
		return -1, errors.Join(fmt.Errorf("mapping its owners: %v", err), unix.Close(tree))
	}
	return tree, nil
}

// bind mounts what is open as fd at a path below top, with its owners mapped.
func (u *Users) bind(fd int, top, to string, flags uintptr) error {
	var attributes uint64
	for old, attribute := range map[uintptr]uint64{
		unix.MS_NOSUID: unix.MOUNT_ATTR_NOSUID, unix.MS_NODEV: unix.MOUNT_ATTR_NODEV, unix.MS_RDONLY: unix.MOUNT_ATTR_RDONLY,
	} {
		if flags&old != 0 {
			attributes |= attribute
		}
	}
	tree, err := u.tree(fd, attributes)
	if err != nil {
		return err
	}
	defer unix.Close(tree)
	at, err := below(top, to)
	if err != nil {
		return fmt.Errorf("binding %s: %v", to, err)
	}
	defer unix.Close(at)
	if err := unix.MoveMount(tree, "", at, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return fmt.Errorf("binding %s: %v", to, err)
	}
	return nil
}
