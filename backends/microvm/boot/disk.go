package boot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Tool is the program that makes disks, of the package e2fsprogs.
const Tool = "mkfs.ext4"

// Disk makes a read-only disk of a folder at to.
func Disk(ctx context.Context, folder, to string) error {
	size, count := int64(4<<20), 64
	err := filepath.WalkDir(folder, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		found, err := d.Info()
		if err != nil {
			return err
		}
		const page = 4096
		size += (found.Size()+page-1)/page*page + page/8 // and its inode and name
		if d.IsDir() {
			size += page
		}
		count++
		return nil
	})
	if err != nil {
		return err
	}
	for room := size + size/16; ; room *= 2 {
		f, err := os.OpenFile(to, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
		if err == nil {
			err = errors.Join(f.Truncate(room), f.Close()) // what nobody writes takes no room
		}
		if err != nil {
			return err
		}
		said, err := exec.CommandContext(ctx, Tool, "-q", "-F", "-b", "4096", "-m", "0", "-N", fmt.Sprint(count+count/8),
			"-O", "^has_journal,^resize_inode,^metadata_csum,^64bit", "-d", folder, to).CombinedOutput()
		switch {
		case err == nil:
			return nil
		case errors.Is(err, exec.ErrNotFound):
			return fmt.Errorf("%s is not installed; it makes the disk of an image (Debian: e2fsprogs)", Tool)
		case room > 4*size || ctx.Err() != nil:
			return errors.Join(fmt.Errorf("%s of %s: %v: %s", Tool, folder, err, strings.TrimSpace(string(said))), os.Remove(to))
		}
	}
}
