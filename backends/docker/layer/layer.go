// Package layer makes of a folder an image that a container engine loads: one layer, in the layout that docker save writes.
//
// The same folder is always the same bytes: names in order, no time, the owners and modes of the files. A folder /tmp is one in which
// anybody may write, whatever its mode: what is mounted there gets the mode from it. So what an image is called is known before it is sent:
// its diff id is the sha256 of the layer, and its id the sha256 of the configuration, which names the diff id.
//
//	layer.tar        the folder
//	<id>.json        the configuration
//	manifest.json    [{"Config": "<id>.json", "RepoTags": ["localhost/kmo:<diff id>"], "Layers": ["layer.tar"]}]
package layer

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Label is what every image of ours has.
const Label = "kmo.image"

// Repository is the name of every image of ours, before the colon. No engine resolves it to anything.
const Repository = "localhost/kmo"

// Image is a folder as an image.
type Image struct {
	ID     string // sha256:…, of the configuration
	DiffID string // sha256:…, of the layer
	Name   string // Repository:<hex of DiffID>

	folder string
	config []byte
	size   int64
}

// Measure reads a folder and says what image it is. Arch is as Go names it.
func Measure(ctx context.Context, folder, arch string) (*Image, error) {
	found, err := os.Stat(folder)
	if err == nil && !found.IsDir() {
		err = fmt.Errorf("%s is no folder", folder)
	}
	if err != nil {
		return nil, fmt.Errorf("image content: %v", err)
	}
	sum := &counted{to: sha256.New()}
	if err := write(ctx, folder, sum); err != nil {
		return nil, err
	}
	i := &Image{DiffID: digest(sum.to), folder: folder, size: sum.size}
	i.Name = Repository + ":" + strings.TrimPrefix(i.DiffID, "sha256:")
	const never = "1970-01-01T00:00:00Z"
	i.config, err = json.Marshal(map[string]any{
		"architecture": arch, "os": "linux", "created": never,
		"config":  map[string]any{"Labels": map[string]string{Label: "1"}},
		"rootfs":  map[string]any{"type": "layers", "diff_ids": []string{i.DiffID}},
		"history": []map[string]any{{"created": never, "created_by": "kmo"}},
	})
	whole := sha256.Sum256(i.config)
	i.ID = "sha256:" + hex.EncodeToString(whole[:])
	return i, err
}

// Send writes the archive. It is an error if the folder is no longer what was measured.
func (i *Image) Send(ctx context.Context, w io.Writer) error {
	config := strings.TrimPrefix(i.ID, "sha256:") + ".json"
	manifest, err := json.Marshal([]map[string]any{{"Config": config, "RepoTags": []string{i.Name}, "Layers": []string{"layer.tar"}}})
	if err != nil {
		return err
	}
	archive := tar.NewWriter(w)
	if err := archive.WriteHeader(&tar.Header{Name: "layer.tar", Mode: 0o444, Size: i.size}); err != nil {
		return err
	}
	sum := &counted{to: sha256.New()}
	if err := write(ctx, i.folder, io.MultiWriter(sum, archive)); err != nil {
		return err
	}
	if got := digest(sum.to); got != i.DiffID {
		return fmt.Errorf("image content %s: its layer is %s, and was %s when it was measured", i.folder, got, i.DiffID)
	}
	for _, part := range []struct {
		name string
		text []byte
	}{{config, i.config}, {"manifest.json", manifest}} {
		if err := archive.WriteHeader(&tar.Header{Name: part.name, Mode: 0o444, Size: int64(len(part.text))}); err != nil {
			return err
		}
		if _, err := archive.Write(part.text); err != nil {
			return err
		}
	}
	return archive.Close()
}

// counted is a digest that knows how much went into it.
type counted struct {
	to   hash.Hash
	size int64
}

func (c *counted) Write(p []byte) (int, error) {
	c.size += int64(len(p))
	return c.to.Write(p)
}

func digest(h hash.Hash) string { return "sha256:" + hex.EncodeToString(h.Sum(nil)) }

// file is a file's identity on its file system: two names of one file are one file in the layer, too.
type file struct{ device, inode uint64 }

// write writes a folder's layer, without the folder itself, which is / inside.
func write(ctx context.Context, folder string, w io.Writer) error {
	archive := tar.NewWriter(w)
	known := map[file]string{}
	err := filepath.WalkDir(folder, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || path == folder {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		name, err := filepath.Rel(folder, path)
		if err != nil {
			return err
		}
		return add(archive, path, name, entry, known)
	})
	if err != nil {
		return fmt.Errorf("image content: %w", err)
	}
	return archive.Close()
}

func add(archive *tar.Writer, path, name string, entry fs.DirEntry, known map[file]string) error {
	if strings.HasPrefix(entry.Name(), ".wh.") {
		return fmt.Errorf("%s: in a layer the name means that another file is deleted; want another name", name)
	}
	found, err := entry.Info()
	if err != nil {
		return err
	}
	link := ""
	switch found.Mode().Type() {
	case 0, fs.ModeDir:
	case fs.ModeSymlink:
		if link, err = os.Readlink(path); err != nil {
			return err
		}
	default:
		return fmt.Errorf("%s: %v; want a file, a folder or a link", name, found.Mode().Type())
	}
	head, err := tar.FileInfoHeader(found, link)
	if err != nil {
		return err
	}
	head.Name = name
	if entry.IsDir() {
		head.Name += "/"
	}
	if head.Name == "tmp/" {
		head.Mode = 0o1777
	}
	head.Format, head.ModTime, head.Uname, head.Gname = tar.FormatPAX, time.Unix(0, 0), "", ""
	head.AccessTime, head.ChangeTime = time.Time{}, time.Time{}
	if stat, ok := found.Sys().(*syscall.Stat_t); ok && found.Mode().IsRegular() && stat.Nlink > 1 {
		this := file{uint64(stat.Dev), stat.Ino} //nolint:unconvert // its width is the platform's
		if first, ok := known[this]; ok {
			head.Typeflag, head.Linkname, head.Size = tar.TypeLink, first, 0
		} else {
			known[this] = name
		}
	}
	if err := archive.WriteHeader(head); err != nil {
		return fmt.Errorf("%s: %v", name, err)
	}
	if head.Typeflag != tar.TypeReg {
		return nil
	}
	from, err := os.Open(path)
	if err != nil {
		return err
	}
	defer from.Close()
	_, err = io.CopyN(archive, from, head.Size)
	return err
}
