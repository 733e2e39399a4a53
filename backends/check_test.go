package backends

import (
	"slices"
	"testing"
)

func TestCleanPaths(t *testing.T) {
	for path, want := range map[string]bool{
		"/a": true, "/a/b.c": true, "/..a": true, "/": false, "": false, "a": false, "/a/": false, "/a/../b": false, "//a": false, "/a\x00": false, "/./a": false,
	} {
		if clean(path) != want {
			t.Errorf("T42 %q: %t, want %t", path, !want, want)
		}
	}
}

func TestConcerning(t *testing.T) {
	missing := []string{"apparmor, selinux: none", "seccomp: no filter", "limit-cpu: no seccomp, no bound", "network"}
	if got, want := Concerning(missing, "seccomp", "apparmor"), missing[:2]; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := Concerning(missing, "network", "devices"); !slices.Equal(got, missing[3:]) {
		t.Errorf("got %q, want %q", got, missing[3:])
	}
}
