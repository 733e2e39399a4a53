package backends

import "testing"

func TestCleanPaths(t *testing.T) {
	for path, want := range map[string]bool{
		"/a": true, "/a/b.c": true, "/..a": true, "/": false, "": false, "a": false, "/a/": false, "/a/../b": false, "//a": false, "/a\x00": false, "/./a": false,
	} {
		if clean(path) != want {
			t.Errorf("T42 %q: %t, want %t", path, !want, want)
		}
	}
}
