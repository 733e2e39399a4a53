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

// The agent's protection from being killed for want of memory is not handed on; nothing is protected that was not.
func TestRaise(t *testing.T) {
	for had, want := range map[string]string{"-500\n": "0", "-1000\n": "0", "0\n": "0\n", "300\n": "300\n"} {
		file := filepath.Join(t.TempDir(), "oom_score_adj")
		if err := os.WriteFile(file, []byte(had), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := raise(file); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(file); err != nil || string(got) != want {
			t.Errorf("%q became %q, %v; want %q", had, got, err, want)
		}
	}
}

// A user that is none, which the kernel takes for "as it is", is not dropped to.
func TestNoUser(t *testing.T) {
	for _, user := range []int{-1, 1<<32 - 1} {
		var err error
		OnThread(func() { err = (&Confine{User: user}).drop() })
		if err == nil {
			t.Errorf("user %d was dropped to", user)
		}
	}
}
