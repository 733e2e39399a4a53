package monitor

import (
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/process/stage"
)

const resolvConf = "/etc/resolv.conf"

// Resolver is the file that tells a workload with a network of its own which address resolves names: /etc/resolv.conf, in place of what the image
// was built with. There is none where the unit has something there, or where the image has a link, which something inside is to fill.
func Resolver(w backends.Workload, address string) []stage.File {
	taken := slices.Clone(w.Overlay.Keep)
	for _, f := range w.Files {
		taken = append(taken, f.To)
	}
	for _, m := range w.Mounts {
		taken = append(taken, m.To)
	}
	for _, d := range w.Doors {
		taken = append(taken, d.To)
	}
	for _, path := range taken {
		if strings.HasPrefix(resolvConf+"/", path+"/") || strings.HasPrefix(path+"/", resolvConf+"/") {
			return nil
		}
	}
	for _, path := range []string{filepath.Dir(resolvConf), resolvConf} {
		if found, err := os.Lstat(filepath.Join(w.Image.Content, path)); err == nil && found.Mode()&os.ModeSymlink != 0 {
			return nil
		}
	}
	return []stage.File{{To: resolvConf, Mode: 0o644, Content: []byte("nameserver " + address + "\n")}}
}
