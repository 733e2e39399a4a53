package secret

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/kindos/kmo/backends"
)

// memory is a path on storage that is memory at which there is nothing.
func memory(t *testing.T) string {
	t.Helper()
	above, err := os.MkdirTemp("/dev/shm", "kmo-secret-test-")
	if err != nil {
		t.Skip("no /dev/shm to be used: ", err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(above) })
	dir := filepath.Join(above, "kmo")
	s := Open(dir, "x")
	if s.Close(); !s.Has() {
		t.Skip("/dev/shm is not on storage that is memory")
	}
	return dir
}

func workload() backends.Workload {
	return backends.Workload{Name: "relay-00000001", Files: []backends.File{{To: "/token", Content: []byte("canary"), Secret: true}}}
}

func TestClose(t *testing.T) {
	there := func(dir string, want bool) {
		t.Helper()
		if _, err := os.Stat(dir); (err == nil) != want {
			t.Errorf("stat: %v, want it there: %t", err, want)
		}
	}
	dir := memory(t)
	there(dir, false) // it was made for nothing
	s := Open(dir, "x")
	Open(dir, "y").Close() // which has not made it
	there(dir, true)
	if err := s.Hide(workload()); err != nil {
		t.Fatal(err)
	}
	s.Close()
	if files, err := s.Reveal(workload()); err != nil || string(files[0].Content) != "canary" {
		t.Errorf("after Close: %v", err)
	}
	if err := s.Forget(workload().Name); err != nil {
		t.Fatal(err)
	}
	s.Close()
	there(dir, false)
	if err := s.Hide(workload()); err != nil { // somebody else's Close
		t.Fatal(err)
	}
	there(dir, true)
}

func TestMemoryOfOthers(t *testing.T) {
	dir := memory(t)
	s := Open(dir, "x")
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := s.Hide(workload()); err == nil {
		t.Error("hiding where everybody may write: no error")
	}
	if found, _ := filepath.Glob(filepath.Join(dir, "x", "*", "*")); len(found) > 0 {
		t.Errorf("there lies %v", found)
	}
}
