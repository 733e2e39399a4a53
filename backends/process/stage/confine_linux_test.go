package stage

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

// A program that knows nothing of SIGXFSZ is not ended by it: head is told that its write came to nothing, and says so by status 1.
func TestFileSize(t *testing.T) {
	const size = 4096
	if os.Getenv("KMO_TEST_FILE_SIZE") != "" {
		err := (&Confine{FileSize: size}).bound()
		if err == nil {
			err = syscall.Exec("/bin/sh", []string{"sh", "-c", "head -c 100000 /dev/zero; echo status $? >&2"}, os.Environ())
		}
		t.Fatal(err)
	}
	out, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	var said bytes.Buffer
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestFileSize$")
	cmd.Env = append(os.Environ(), "KMO_TEST_FILE_SIZE=1")
	cmd.Stdout, cmd.Stderr = out, &said
	if err := cmd.Run(); err != nil || !bytes.HasSuffix(said.Bytes(), fmt.Appendln(nil, "status", 1)) {
		t.Errorf("%v: %q, want status 1", err, said.String())
	}
	if found, err := out.Stat(); err != nil || found.Size() != size {
		t.Errorf("%v, %v; want %d bytes", found, err, size)
	}
}
