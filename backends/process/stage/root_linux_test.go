package stage

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Whatever links an image has, making the layer touches nothing outside the layer: not what a descriptor of this process holds, and
// not what a bind has opened.
func TestLayerIsNotLeft(t *testing.T) {
	host := t.TempDir()
	if err := os.Symlink(host, filepath.Join(host, "link")); err != nil {
		t.Fatal(err)
	}
	held, err := os.Create(filepath.Join(host, "held"))
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if err := errors.Join(os.WriteFile(held.Name(), []byte("of the host"), 0o640), held.Chmod(0o640)); err != nil {
		t.Fatal(err)
	}
	fd := fmt.Sprint("/dev/fd/", held.Fd())
	dir, err := os.Open(host)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	for _, test := range []struct {
		name  string
		links map[string]string
		root  Root
	}{
		{"a file by a descriptor", map[string]string{"etc/relay.toml": fd}, Root{Files: []File{{To: "/etc/relay.toml", Mode: 0o777, Content: []byte("x")}}}},
		{"a file by two links", map[string]string{"etc/relay.toml": "../a", "a": fd}, Root{Files: []File{{To: "/etc/relay.toml", Content: []byte("x")}}}},
		{"a file by standard output", map[string]string{"etc/relay.toml": "/dev/stdout"}, Root{Files: []File{{To: "/etc/relay.toml"}}}},
		{"the folder for all", map[string]string{"tmp": fd}, Root{Size: 1 << 20}},
		{"a kept path by a folder's link", map[string]string{"keep": fmt.Sprint("/dev/fd/", dir.Fd(), "/link")}, Root{Binds: []Bind{{From: host, To: "/keep/made"}}}},
		{"a mount in /proc", map[string]string{"mnt": "/proc/self/cwd"}, Root{Binds: []Bind{{From: host, To: "/mnt/made"}}}},
		{"a device", map[string]string{"etc/relay.toml": "/dev/null"}, Root{Files: []File{{To: "/etc/relay.toml"}}}},
		{"the root itself", map[string]string{"tmp": "/"}, Root{Size: 1 << 20}},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.root.Content = content(t, test.links)
			layer := t.TempDir()
			_, err := test.root.points(layer)
			if !errors.As(err, new(blame)) {
				t.Errorf("got %v, want the image to be blamed", err)
			}
			found, err := held.Stat()
			text, _ := os.ReadFile(held.Name())
			if err != nil || found.Mode().Perm() != 0o640 || string(text) != "of the host" {
				t.Errorf("the host's file has mode %v and %q, %v", found.Mode(), text, err)
			}
			if left, _ := filepath.Glob(filepath.Join(host, "*")); len(left) != 2 {
				t.Errorf("the host's folder has %q", left)
			}
			if links, _ := filepath.Glob(filepath.Join(layer, "dev", "std*")); len(links) > 0 {
				t.Errorf("links were made before the rest: %q", links)
			}
		})
	}
}

// /dev and /proc are folders of our own, wherever the image's lead.
func TestOwnFolders(t *testing.T) {
	layer, away := t.TempDir(), t.TempDir()
	r := Root{Content: content(t, map[string]string{"dev": away, "proc": "etc"}), Size: 1 << 20}
	if _, err := r.points(layer); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]os.FileMode{
		"dev": os.ModeDir | 0o755, "proc": os.ModeDir | 0o755, "dev/null": 0o644, "dev/shm": os.ModeDir | os.ModeSticky | 0o777, "tmp": os.ModeDir | os.ModeSticky | 0o777,
	} {
		if found, err := os.Lstat(filepath.Join(layer, name)); err != nil || found.Mode() != want {
			t.Errorf("%s: %v, %v; want %v", name, found, err, want)
		}
	}
	if to, err := os.Readlink(filepath.Join(layer, "dev/fd")); err != nil || to != "/proc/self/fd" {
		t.Errorf("/dev/fd is %q, %v", to, err)
	}
	if left, _ := os.ReadDir(away); len(left) > 0 {
		t.Errorf("made outside: %v", left)
	}
}

// content is an image with a folder etc and links.
func content(t *testing.T, links map[string]string) string {
	t.Helper()
	root := t.TempDir()
	if err := errors.Join(os.Chmod(root, 0o755), os.Mkdir(filepath.Join(root, "etc"), 0o755)); err != nil {
		t.Fatal(err)
	}
	for name, to := range links {
		if strings.HasPrefix(name, "etc/") || os.RemoveAll(filepath.Join(root, name)) == nil {
			if err := os.Symlink(to, filepath.Join(root, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	return root
}
