package reconciler

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends"
)

// TestDeepDoor: whatever a unit has put into its door goes with it, also what is nested deeper than descriptors reach, and beside what a name would need.
func TestDeepDoor(t *testing.T) {
	const depth = 3000
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	few := limit
	few.Cur = 256
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &few); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Setrlimit(unix.RLIMIT_NOFILE, &limit) }()
	doors := filepath.Join(t.TempDir(), "doors")
	stays := backends.Door{Unit: "stays", From: filepath.Join(doors, "stays", "memory")}
	for _, folder := range []string{stays.From, filepath.Join(doors, "goes", "memory")} {
		if err := os.MkdirAll(folder, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(stays.From, filepath.Join(doors, "goes", "memory", "link")); err != nil {
		t.Fatal(err)
	}
	for i := range 1500 {
		if err := os.WriteFile(filepath.Join(doors, "goes", "memory", fmt.Sprint(i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	nest(t, filepath.Join(doors, "goes", "memory"), depth)
	if err := closeDoors(t.Context(), doors, []backends.Workload{{Doors: []backends.Door{stays}}}); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(doors); err != nil || len(left) != 1 || left[0].Name() != "stays" {
		t.Errorf("left are %v, %v; want stays alone", left, err)
	}
	if _, err := os.Stat(stays.From); err != nil {
		t.Error(err)
	}
}

// nest makes folders in each other, as a program does that changes into each: no path of the deepest would be short enough.
func nest(t *testing.T, at string, depth int) {
	t.Helper()
	fd, err := unix.Open(at, unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0)
	for range depth {
		if err == nil {
			err = unix.Mkdirat(fd, strings.Repeat("d", 40), 0o700)
		}
		next := -1
		if err == nil {
			next, err = unix.Openat(fd, strings.Repeat("d", 40), unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0)
		}
		if err != nil {
			t.Fatal(err)
		}
		_ = unix.Close(fd)
		fd = next
	}
	_ = unix.Close(fd)
}
