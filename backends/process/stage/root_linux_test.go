package stage

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
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

// An image's links lead nothing into what is mounted for something else, where a program may have put links of its own; and no two
// things to one path.
func TestNothingLiesInAnother(t *testing.T) {
	host := t.TempDir()
	binds := func(paths ...string) (list []Bind) {
		for _, to := range paths {
			list = append(list, Bind{From: host, To: to, Writable: true})
		}
		return list
	}
	links := map[string]string{"etc/app": "../keep", "deep": "/keep/sub/deep", "keep": "/var/keep", "loop": "/keep/../keep/x"}
	for _, test := range []struct {
		name   string
		root   Root
		blamed bool
	}{
		{"a bind in a bind by a link", Root{Binds: binds("/keep", "/deep")}, true},
		{"the other way round", Root{Binds: binds("/deep", "/keep")}, true},
		{"a bind in a bind by a folder's link", Root{Binds: binds("/var/keep", "/etc/app/sub")}, true},
		{"a bind in a bind as it was asked", Root{Binds: binds("/var/keep", "/var/keep/sub")}, true},
		{"two binds at one path", Root{Binds: binds("/keep", "/etc/app")}, true},
		{"two binds asked at one path", Root{Binds: binds("/mnt", "/mnt")}, true},
		{"a file in a bind", Root{Binds: binds("/etc/app"), Files: []File{{To: "/loop/token"}}}, true},
		{"a file where a bind is", Root{Binds: binds("/deep"), Files: []File{{To: "/keep/sub"}}}, true},
		{"two files at one path", Root{Files: []File{{To: "/keep/token"}, {To: "/etc/app/token"}}}, true},
		{"side by side", Root{Binds: binds("/keep", "/var/keep2", "/var/kee"), Files: []File{{To: "/var/keep.toml"}, {To: "/etc/relay.toml"}}}, false},
		{"in the folder for all", Root{Size: 1 << 20, Binds: binds("/tmp/keep"), Files: []File{{To: "/tmp/token"}}}, false},
		{"over the folder for all", Root{Size: 1 << 20, Binds: binds("/tmp")}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.root.Content = content(t, links)
			if _, err := test.root.points(t.TempDir()); errors.As(err, new(blame)) != test.blamed || !test.blamed && err != nil {
				t.Errorf("got %v, want blame: %t", err, test.blamed)
			}
		})
	}
}

// Where something is mounted no link is followed, neither to a place outside nor to one inside.
func TestMountFollowsNoLink(t *testing.T) {
	top, away := t.TempDir(), t.TempDir()
	for _, err := range []error{
		os.MkdirAll(filepath.Join(top, "real/dir"), 0o755), os.Mkdir(filepath.Join(away, "dir"), 0o755),
		os.Symlink(away, filepath.Join(top, "away")), os.Symlink("real", filepath.Join(top, "near")), os.Symlink("/proc/self/cwd", filepath.Join(top, "magic")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	OnThread(func() {
		if err := errors.Join(unix.Unshare(unix.CLONE_FS|unix.CLONE_NEWNS), unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")); err != nil {
			t.Errorf("a mount namespace: %v", err)
			return
		}
		for _, to := range []string{"/away", "/away/dir", "/near", "/near/dir", "/magic", "/real/../../x"} {
			if err := mount("tmpfs", top, to, "tmpfs", safe); !errors.Is(err, unix.ELOOP) && !errors.Is(err, unix.EXDEV) {
				t.Errorf("%s: %v, want ELOOP or EXDEV", to, err)
			}
		}
		if err := bind(away, top, "/real/dir", safe|unix.MS_RDONLY); err != nil {
			t.Errorf("/real/dir: %v", err)
		}
		if err := os.Mkdir(filepath.Join(top, "real/dir/new"), 0o755); !errors.Is(err, unix.EROFS) {
			t.Errorf("a folder in a read-only bind: %v, want EROFS", err)
		}
	})
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
