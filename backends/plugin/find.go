package plugin

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	goplugin "github.com/hashicorp/go-plugin"

	"github.com/kindos/kmo/policy/refusal"
)

// codePlugin is the tripwire for a plugin that is not pinned by checksum, or lies where others can write.
const codePlugin refusal.Code = "KT023"

// maxProgram bounds the size of a plugin's program.
const maxProgram = 512 << 20

// Found is a plugin that is not part of this program: a file whose name is its backend's, and the checksum it must have.
type Found struct {
	Name   string
	Path   string
	SHA256 string // 64 lower-case hex digits
}

// Find looks for plugins in a folder. Every file of it must be pinned, by name, to its sha256; every pin must have its file.
// Files and the folders above them must belong to root or to this process's user, and nobody else may be able to write there.
// It returns those that pass, sorted by name, and beside them one KT023 refusal for each that does not.
func Find(dir string, pins map[string]string) ([]Found, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if err := checkFolders(dir); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("plugin folder: %v", err)
	}
	var found []Found
	var faults []error
	here := map[string]bool{}
	for _, entry := range entries {
		one := Found{Name: entry.Name(), Path: filepath.Join(dir, entry.Name()), SHA256: pins[entry.Name()]}
		here[one.Name] = true
		file, err := one.open()
		if err != nil {
			faults = append(faults, err)
			continue
		}
		file.Close()
		found = append(found, one)
	}
	for name := range pins {
		if !here[name] {
			faults = append(faults, refuse(filepath.Join(dir, name), "no such file", "the program that is pinned"))
		}
	}
	slices.SortFunc(faults, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return found, errors.Join(faults...)
}

// open returns the plugin's program, open and checked: what this handle reads is what is pinned.
func (f *Found) open() (*os.File, error) {
	pin, err := hex.DecodeString(f.SHA256)
	if err != nil || len(pin) != sha256.Size || strings.ToLower(f.SHA256) != f.SHA256 {
		got := "no pin"
		if f.SHA256 != "" {
			got = "the pin " + refusal.Clip(f.SHA256, 100)
		}
		return nil, refuse(f.Path, got, "its sha256 as 64 lower-case hex digits")
	}
	if err := checkFolders(filepath.Dir(f.Path)); err != nil {
		return nil, err
	}
	named, err := os.Lstat(f.Path)
	if err != nil {
		return nil, refuse(f.Path, "no such file", "the program that is pinned")
	}
	if err := checkFile(f.Path, named); err != nil {
		return nil, err
	}
	file, err := os.OpenFile(f.Path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("plugin %s: %v", f.Path, err)
	}
	if err := f.checkOpen(file, pin); err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}

// checkOpen judges what the handle holds, whatever the path names by now.
func (f *Found) checkOpen(file *os.File, pin []byte) error {
	opened, err := file.Stat()
	if err != nil {
		return fmt.Errorf("plugin %s: %v", f.Path, err)
	}
	if err := checkFile(f.Path, opened); err != nil {
		return err
	}
	secure := goplugin.SecureConfig{Checksum: pin, Hash: sha256.New()}
	same, err := secure.Check(pathOf(file))
	if err != nil {
		return fmt.Errorf("plugin %s: %v", f.Path, err)
	}
	if !same {
		return refuse(f.Path, "sha256 "+hex.EncodeToString(secure.Hash.Sum(nil)), f.SHA256)
	}
	return nil
}

func checkFile(path string, found fs.FileInfo) error {
	switch {
	case !found.Mode().IsRegular():
		return refuse(path, "a "+kindOf(found.Mode()), "a plain file")
	case found.Mode().Perm()&0o111 == 0:
		return refuse(path, fmt.Sprintf("mode %#o", found.Mode().Perm()), "an executable file")
	case found.Size() > maxProgram:
		return refuse(path, fmt.Sprintf("%d bytes", found.Size()), fmt.Sprintf("at most %d", maxProgram))
	}
	return checkOwner(path, found, 0)
}

// checkFolders judges a folder and all above it, by its own path and by the one its links lead to. A sticky folder above may be
// writable: nobody can take away there what is not theirs.
func checkFolders(dir string) error {
	last, err := os.Lstat(dir)
	if err != nil {
		return fmt.Errorf("plugin folder: %v", err)
	}
	if !last.IsDir() {
		return refuse(dir, "a "+kindOf(last.Mode()), "a folder")
	}
	if err := checkOwner(dir, last, 0); err != nil {
		return err
	}
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return fmt.Errorf("plugin folder: %v", err)
	}
	for _, path := range []string{dir, real} {
		for path != filepath.Dir(path) {
			path = filepath.Dir(path)
			found, err := os.Lstat(path)
			if err != nil {
				return fmt.Errorf("plugin folder: %v", err)
			}
			if err := checkOwner(path, found, fs.ModeSticky|fs.ModeSymlink); err != nil {
				return err
			}
		}
	}
	return nil
}

// checkOwner wants an owner whom this process must trust anyway, and nobody else who may write.
func checkOwner(path string, found fs.FileInfo, excuse fs.FileMode) error {
	owner, ok := found.Sys().(*syscall.Stat_t)
	if !ok {
		return refuse(path, "no owner", "one")
	}
	if int(owner.Uid) != 0 && int(owner.Uid) != os.Geteuid() {
		return refuse(path, fmt.Sprintf("owner %d", owner.Uid), fmt.Sprintf("owner 0 or %d", os.Geteuid()))
	}
	if found.Mode().Perm()&0o022 != 0 && found.Mode()&excuse == 0 {
		return refuse(path, fmt.Sprintf("mode %#o", found.Mode().Perm()), "writable by its owner only")
	}
	return nil
}

func refuse(path, got, want string) error {
	return &refusal.Error{Code: codePlugin, Subject: "plugin " + refusal.Clip(path, maxText), Got: got, Want: want}
}

func kindOf(mode fs.FileMode) string {
	switch mode.Type() {
	case 0:
		return "plain file"
	case fs.ModeDir:
		return "folder"
	case fs.ModeSymlink:
		return "symbolic link"
	case fs.ModeNamedPipe:
		return "named pipe"
	case fs.ModeSocket:
		return "socket"
	}
	return "device"
}
