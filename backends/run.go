package backends

import (
	"maps"
	"slices"
	"strconv"
	"strings"
)

// Argv is the command of the image and the unit together: the image's entrypoint, then the unit's arguments or, if it has none, the image's.
func (w *Workload) Argv() []string {
	rest := w.Image.Config.Cmd
	if len(w.Run.Args) > 0 {
		rest = w.Run.Args
	}
	return append(slices.Clone(w.Image.Config.Entrypoint), rest...)
}

// Env is the environment of the image and the unit together, with a PATH and the ports, whose Port is to be filled in. Nothing of this process's is in it.
func (w *Workload) Env() map[string]string {
	env := map[string]string{"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	for _, pair := range w.Image.Config.Env {
		if name, value, ok := strings.Cut(pair, "="); ok {
			env[name] = value
		}
	}
	maps.Copy(env, w.Run.Env)
	for _, p := range w.Run.Ports {
		env[p.Variable()] = strconv.Itoa(p.Port)
	}
	return env
}
