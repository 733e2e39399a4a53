// Package secret keeps the secret files of workloads on storage that is memory, where a later process finds them and a host that is
// started again does not.
package secret

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends"
)

// Store is one backend's folder. The zero value has no memory to keep anything in.
type Store struct {
	dir  string
	made bool // Open made the folder that it lies in
}

// Open finds memory for a backend's folder of that name: below dir, or, if that is "", below the first of /run/kmo and /dev/shm/kmo
// that lies on a tmpfs and is this user's alone. Where there is none it returns the zero value.
func Open(dir, name string) Store {
	folders := []string{"/run/kmo", "/dev/shm/kmo"}
	if dir != "" {
		folders = []string{dir}
	}
	for _, at := range folders {
		err := os.Mkdir(at, 0o700)
		if (err == nil || errors.Is(err, os.ErrExist)) && private(at) {
			return Store{dir: filepath.Join(at, name), made: err == nil}
		}
		if err == nil {
			_ = os.Remove(at) // made for nothing
		}
	}
	return Store{}
}

// Close removes what Open made, if nobody keeps anything there.
func (s Store) Close() {
	if s.made {
		_ = os.Remove(filepath.Dir(s.dir)) // it fails if it is not empty
	}
}

func private(dir string) bool {
	var found unix.Stat_t
	var system unix.Statfs_t
	if unix.Lstat(dir, &found) != nil || unix.Statfs(dir, &system) != nil {
		return false
	}
	memory := system.Type == unix.TMPFS_MAGIC || system.Type == unix.RAMFS_MAGIC
	return memory && found.Mode&unix.S_IFMT == unix.S_IFDIR && int(found.Uid) == os.Geteuid() && found.Mode&0o022 == 0
}

// SwapWords are for a fingerprint's Missing where Swaps.
const SwapWords = "secrets: this host swaps, so what lies in memory may reach its disk; switch swap off, or encrypt it"

// Swaps says whether this host has swap, which memory file systems use too.
func Swaps() bool {
	text, err := os.ReadFile("/proc/swaps")
	return err == nil && bytes.Count(text, []byte("\n")) > 1 // below the heading
}

// Dir is the backend's folder, or "" without memory. It need not be there.
func (s Store) Dir() string { return s.dir }

// Has says whether there is memory.
func (s Store) Has() bool { return s.dir != "" }

// Folder is where what belongs to a workload lies, or "" without memory. It need not be there.
func (s Store) Folder(workload string) string {
	if !s.Has() {
		return ""
	}
	return filepath.Join(s.dir, workload)
}

// Make makes the folder of a workload, and looks that it still lies where nobody else gets at it.
func (s Store) Make(workload string) error {
	if !s.Has() {
		return errors.New("no memory to keep a secret in")
	}
	if err := os.MkdirAll(s.Folder(workload), 0o700); err != nil {
		return err
	}
	if at := filepath.Dir(s.dir); !private(at) {
		return fmt.Errorf("%s is not on storage that is memory, and this user's own, any more", at)
	}
	return nil
}

// Hide keeps the secret files of a workload.
func (s Store) Hide(w backends.Workload) error {
	for i, f := range w.Files {
		if !f.Secret {
			continue
		}
		err := s.Make(w.Name)
		if err == nil {
			err = renameio.WriteFile(s.file(w.Name, i), f.Content, 0o600)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (s Store) file(workload string, i int) string {
	return filepath.Join(s.Folder(workload), "secret-"+strconv.Itoa(i))
}

// ErrGone says that a workload's secrets are no longer there.
var ErrGone = errors.New("its secrets are gone: they lay in memory, and are brought by applying it again")

// Reveal returns the files of a workload with the contents that backends.Veil left out. It returns ErrGone if they are not there.
func (s Store) Reveal(w backends.Workload) ([]backends.File, error) {
	files := slices.Clone(w.Files)
	for i := range files {
		if !files[i].Secret || files[i].Content != nil {
			continue
		}
		content, err := os.ReadFile(s.file(w.Name, i))
		if errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("%s: %w", w.Name, ErrGone)
		}
		if err != nil {
			return nil, err
		}
		files[i].Content = content
	}
	return files, nil
}

// Forget removes what belongs to a workload.
func (s Store) Forget(workload string) error {
	if !s.Has() {
		return nil
	}
	err := os.RemoveAll(s.Folder(workload))
	_ = os.Remove(s.dir) // if it was the last
	return err
}

// Keep forgets all workloads but those that known tells. What cannot be removed is left for the next time.
func (s Store) Keep(known func(workload string) bool) {
	found, _ := os.ReadDir(s.dir) // there may be none
	for _, dir := range found {
		if !known(dir.Name()) {
			_ = s.Forget(dir.Name())
		}
	}
}
