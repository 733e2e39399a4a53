package backends

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A state folder has one name for good: one that cannot be read, or is gone from beside what it is the name of, is not made anew.
func TestInstance(t *testing.T) {
	state := filepath.Join(t.TempDir(), "state")
	first, err := Instance(state, "work", "images")
	if err != nil || len(first) != 16 {
		t.Fatalf("%q, %v", first, err)
	}
	path := filepath.Join(state, "instance")
	if err := os.MkdirAll(filepath.Join(state, "images"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ name, text, want string }{
		{"again", first, ""},
		{"with a line's end", first + "\n", ""},
		{"empty", "", "instance holds \"\"; want 16 hex digits"},
		{"cut short", first[:7], "want 16 hex digits"},
		{"of other bytes", strings.Repeat("x", 16), "want 16 hex digits"},
	} {
		if err := os.WriteFile(path, []byte(test.text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := Instance(state, "work", "images")
		if test.want == "" && (err != nil || got != first) {
			t.Errorf("%s: %q, %v; want %q", test.name, got, err, first)
		}
		if test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("%s: %q, %v; want an error with %q", test.name, got, err, test.want)
		}
		if text, err := os.ReadFile(path); err != nil || string(text) != test.text {
			t.Errorf("%s: the file is %q, %v now", test.name, text, err)
		}
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	record := filepath.Join(state, "images", "record")
	if err := os.WriteFile(record, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := Instance(state, "work", "images"); err == nil || !strings.Contains(err.Error(), "images has record; want the file as it was") {
		t.Errorf("gone from beside a record: %q, %v", got, err)
	}
	if err := os.Remove(record); err != nil {
		t.Fatal(err)
	}
	if got, err := Instance(state, "work", "images"); err != nil || got == first {
		t.Errorf("gone from beside nothing: %q, %v; want another than %q", got, err, first)
	}
}
