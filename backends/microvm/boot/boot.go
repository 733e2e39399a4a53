// Package boot makes what a machine boots from: its kernel, the first file system that the kernel unpacks, and the disk of a workload's
// base. All of it is the same for every machine of its kind, holds no secret, and is kept in a cache.
//
// The kernel is the host's, or another one of a distribution: an x86 bzImage of LZ4 or gzip is unpacked, which a machine then need not do
// at each start; any other is used as it is. Modules may be .ko, .ko.xz or .ko.zst, for which xz and zstd are needed. What a kernel has
// built in is no module.
//
// The first file system is a newc archive, as the kernel's Documentation/driver-api/early-userspace/buffer-format.rst has it:
//
//	/init                 the guest, which is process 1
//	/modules/NN-NAME.ko   the modules, each after those that it needs
//	/dev/console          what process 1 writes its last words to
//
// The disk is ext4 without a journal, made by mkfs.ext4 (e2fsprogs) from a folder: owners, modes, links and attributes are the folder's.
package boot

import (
	"bytes"
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/renameio/v2"
)

// Kernel is where a kernel lies on this host.
type Kernel struct {
	Image   string // vmlinuz or vmlinux
	Modules string // the folder of its modules: /lib/modules/<version>; "" if all is built in
}

// Find returns the newest kernel of a folder such as /boot, with its modules below another such as /lib/modules.
func Find(images, modules string) (Kernel, error) {
	list, err := filepath.Glob(filepath.Join(images, "vmlinuz-*"))
	if err != nil {
		return Kernel{}, err
	}
	slices.SortFunc(list, byVersion)
	for _, image := range slices.Backward(list) {
		k := Kernel{Image: image, Modules: filepath.Join(modules, strings.TrimPrefix(filepath.Base(image), "vmlinuz-"))}
		if found, err := os.Stat(k.Modules); err == nil && found.IsDir() {
			return k, nil
		}
	}
	return Kernel{}, fmt.Errorf("no kernel to boot: none of %q in %s has its modules in %s; install one (Debian: linux-image-cloud-amd64), or name one to this backend", list, images, modules)
}

// Named returns the kernel in one file, which needs no modules: an x86 bzImage, or a vmlinux.
func Named(image string) (Kernel, error) {
	file, err := os.Open(image)
	if err != nil {
		return Kernel{}, err
	}
	defer file.Close()
	head := make([]byte, payloadEnd)
	if n, err := io.ReadFull(file, head); err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return Kernel{}, err
	} else if !packed(head[:n]) && !bytes.HasPrefix(head[:n], []byte(elf.ELFMAG)) {
		return Kernel{}, fmt.Errorf("%s is no kernel: want an x86 bzImage, or a vmlinux (ELF)", image)
	}
	return Kernel{Image: image}, nil
}

// byVersion compares names by their numbers as numbers.
func byVersion(a, b string) int {
	for a != "" && b != "" {
		x, y := number(a), number(b)
		switch {
		case x != "" && y != "":
			if c := len(strings.TrimLeft(x, "0")) - len(strings.TrimLeft(y, "0")); c != 0 {
				return c
			}
			if c := strings.Compare(strings.TrimLeft(x, "0"), strings.TrimLeft(y, "0")); c != 0 {
				return c
			}
			a, b = a[len(x):], b[len(y):]
		case a[0] != b[0]:
			return int(a[0]) - int(b[0])
		default:
			a, b = a[1:], b[1:]
		}
	}
	return len(a) - len(b)
}

func number(text string) string {
	end := strings.IndexFunc(text, func(r rune) bool { return r < '0' || r > '9' })
	if end < 0 {
		end = len(text)
	}
	return text[:end]
}

// Cache is a folder of what machines boot from. Its methods may be called concurrently.
type Cache struct {
	dir  string
	turn chan struct{} // holds one token: one thing is made at a time

	mu    sync.Mutex           // guards what follows
	ready map[string]Artifacts // by what was asked
}

// Artifacts are files of a cache.
type Artifacts struct {
	Kernel, Initrd string
}

// The names in a cache, and how many of each kind are kept.
const (
	bootPrefix, basePrefix, unfinished = "boot-", "base-", ".new-"
	bootsKept, basesKept               = 4, 16
)

// Open makes the folder, or finds it, and clears what was never finished in it.
func Open(dir string) (*Cache, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	half, err := filepath.Glob(filepath.Join(dir, unfinished+"*"))
	for _, path := range half {
		err = errors.Join(err, os.RemoveAll(path))
	}
	c := &Cache{dir: dir, turn: make(chan struct{}, 1), ready: map[string]Artifacts{}}
	c.turn <- struct{}{}
	return c, err
}

// Boot returns a kernel and a first file system with a guest and these modules.
func (c *Cache) Boot(ctx context.Context, k Kernel, guest []byte, modules []string) (Artifacts, error) {
	found, err := os.Stat(k.Image)
	if err != nil {
		return Artifacts{}, err
	}
	asked := fmt.Sprint(k, found.Size(), found.ModTime().UnixNano(), sha256.Sum256(guest), modules)
	c.mu.Lock()
	made, ok := c.ready[asked]
	c.mu.Unlock()
	if ok && there(made.Kernel) && there(made.Initrd) {
		return made, nil
	}
	sum := sha256.Sum256([]byte(asked))
	dir := filepath.Join(c.dir, bootPrefix+hex.EncodeToString(sum[:8]))
	made = Artifacts{filepath.Join(dir, "kernel"), filepath.Join(dir, "initrd")}
	err = c.make(ctx, dir, bootPrefix, bootsKept, func(to string) error {
		if err := os.Mkdir(to, 0o700); err != nil {
			return err
		}
		image, err := os.ReadFile(k.Image)
		if err != nil {
			return err
		}
		if unpacked, ok := unpack(image); ok {
			image = unpacked
		}
		files, err := collect(k.Modules, modules)
		if err != nil {
			return err
		}
		var archive bytes.Buffer
		first(&archive, guest, files)
		return errors.Join(renameio.WriteFile(filepath.Join(to, "kernel"), image, 0o600), renameio.WriteFile(filepath.Join(to, "initrd"), archive.Bytes(), 0o600))
	})
	if err != nil {
		return Artifacts{}, fmt.Errorf("making what a machine boots from: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ready[asked] = made
	return made, nil
}

// Base returns a disk with the content of a folder, of which key is the digest.
func (c *Cache) Base(ctx context.Context, content, key string) (string, error) {
	at := filepath.Join(c.dir, basePrefix+key)
	return at, c.make(ctx, at, basePrefix, basesKept, func(to string) error { return Disk(ctx, content, to) })
}

func there(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// make makes what is not there under a name of its own, and lets the oldest of its kind go.
func (c *Cache) make(ctx context.Context, at, prefix string, kept int, how func(to string) error) error {
	select {
	case <-c.turn:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { c.turn <- struct{}{} }()
	now := time.Now()
	if there(at) {
		return os.Chtimes(at, now, now)
	}
	half := filepath.Join(c.dir, unfinished+filepath.Base(at))
	err := how(half)
	if err == nil {
		err = errors.Join(ctx.Err(), os.Rename(half, at))
	}
	if err != nil {
		return errors.Join(err, os.RemoveAll(half))
	}
	return c.prune(prefix, kept)
}

// prune lets all go but the newest of a kind. A machine that runs holds its own open.
func (c *Cache) prune(prefix string, kept int) error {
	list, err := filepath.Glob(filepath.Join(c.dir, prefix+"*"))
	if err != nil {
		return err
	}
	age := func(path string) time.Time {
		found, err := os.Stat(path)
		if err != nil {
			return time.Time{}
		}
		return found.ModTime()
	}
	slices.SortFunc(list, func(a, b string) int { return age(b).Compare(age(a)) })
	for _, old := range list[min(kept, len(list)):] {
		err = errors.Join(err, os.RemoveAll(old))
	}
	return err
}
