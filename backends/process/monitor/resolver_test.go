package monitor

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/kindos/kmo/backends"
)

func TestResolver(t *testing.T) {
	image := func(make func(etc string) error) string {
		root := t.TempDir()
		etc := filepath.Join(root, "etc")
		if err := os.Mkdir(etc, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := make(etc); err != nil {
			t.Fatal(err)
		}
		return root
	}
	none := image(func(string) error { return nil })
	built := image(func(etc string) error {
		return os.WriteFile(filepath.Join(etc, "resolv.conf"), []byte("nameserver 192.0.2.1\n"), 0o600)
	})
	link := image(func(etc string) error { return os.Symlink("../run/resolv.conf", filepath.Join(etc, "resolv.conf")) })
	for _, test := range []struct {
		name  string
		w     backends.Workload
		image string
		want  bool
	}{
		{"an image without", backends.Workload{}, none, true},
		{"what the image was built with", backends.Workload{}, built, true},
		{"a link of the image", backends.Workload{}, link, false},
		{"a file of the unit", backends.Workload{Files: []backends.File{{To: "/etc/resolv.conf"}}}, none, false},
		{"another file of the unit", backends.Workload{Files: []backends.File{{To: "/etc/resolv.conf.d"}}}, none, true},
		{"a mount above", backends.Workload{Mounts: []backends.Mount{{To: "/etc"}}}, none, false},
		{"a door", backends.Workload{Doors: []backends.Door{{To: "/etc/resolv.conf"}}}, none, false},
		{"a kept path", backends.Workload{Overlay: backends.Overlay{Keep: []string{"/etc"}}}, none, false},
	} {
		test.w.Image.Content = test.image
		got := Resolver(test.w, "10.0.2.3")
		if (len(got) == 1) != test.want {
			t.Errorf("%s: %v, want a file: %v", test.name, got, test.want)
		}
		if len(got) == 1 && (got[0].To != "/etc/resolv.conf" || string(got[0].Content) != "nameserver 10.0.2.3\n") {
			t.Errorf("%s: %+v", test.name, got)
		}
	}
}
