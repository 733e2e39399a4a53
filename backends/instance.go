package backends

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/google/renameio/v2"
)

// Instance is the name, 16 hex digits, by which a backend tells what belongs to its state folder from what others have in the same runtime. It is in
// the file instance there, made once and for good. It is an error if that holds something else, or is gone while one of the folders below state that
// are named holds anything: under another name all that runs would be a stranger's.
func Instance(state string, folders ...string) (string, error) {
	if state == "" {
		return "", errors.New("no state folder is named")
	}
	if err := os.MkdirAll(state, 0o700); err != nil {
		return "", err
	}
	path := filepath.Join(state, "instance")
	for range 2 { // another process may have been quicker
		text, err := os.ReadFile(path)
		name := strings.TrimSpace(string(text))
		switch {
		case err == nil && regexp.MustCompile(`^[0-9a-f]{16}$`).MatchString(name):
			return name, nil
		case err == nil:
			return "", fmt.Errorf("%s holds %.100q; want 16 hex digits, the label kmo.instance or kmo/instance of what runs", path, text)
		case !errors.Is(err, fs.ErrNotExist):
			return "", err
		}
		for _, folder := range folders {
			found, err := os.ReadDir(filepath.Join(state, folder))
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return "", err
			}
			if len(found) > 0 {
				return "", fmt.Errorf("%s is not there, and %s has %s; want the file as it was, or that folder empty",
					path, filepath.Join(state, folder), found[0].Name())
			}
		}
		var random [8]byte
		_, _ = rand.Read(random[:]) // never fails
		if err := makeOnce(path, hex.EncodeToString(random[:])); err != nil {
			return "", err
		}
	}
	return "", fmt.Errorf("%s vanishes", path)
}

// makeOnce makes a file with all of its content, durably, unless there is one.
func makeOnce(path, content string) error {
	t, err := renameio.TempFile("", path)
	if err != nil {
		return err
	}
	defer t.Cleanup() //nolint:errcheck // it is only in the way
	if _, err := t.WriteString(content); err != nil {
		return err
	}
	if err := errors.Join(t.Sync(), os.Link(t.Name(), path)); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}
