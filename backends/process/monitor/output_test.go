package monitor

import (
	"os"
	"path/filepath"
	"testing"
)

func TestOutputIsBounded(t *testing.T) {
	f, err := os.OpenFile(filepath.Join(t.TempDir(), "log"), os.O_CREATE|os.O_APPEND|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	write := func(o output, text, want string) {
		t.Helper()
		if n, err := o.Write([]byte(text)); err != nil || n != len(text) {
			t.Errorf("%q: %d, %v", text, n, err)
		}
		if got, err := os.ReadFile(f.Name()); err != nil || string(got) != want {
			t.Errorf("the log is %q, %v; want %q", got, err, want)
		}
	}
	bounded := output{f, 8}
	write(bounded, "begun\n", "begun\n")
	write(bounded, "lost\n", "begun\nlo")
	write(bounded, "lost\n", "begun\nlo")
	if err := f.Truncate(0); err != nil {
		t.Fatal(err)
	}
	write(bounded, "again\n", "again\n")
	write(output{f, 0}, "more than eight\n", "again\nmore than eight\n")
}
