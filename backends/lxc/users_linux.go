package lxc

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/process"
	"github.com/kindos/kmo/backends/process/stage"
)

// trialUser is where the users of a trial begin: below those of workloads.
const trialUser = 1<<30 - 1<<17

// users is what this host has for the users of containers.
type users struct {
	trial *stage.Users // nil where there is no user namespace
	lacks string       // why containers have the host's users
}

// mapped are the first users of this host that the users of running containers, anybody's, are.
func mapped() map[int]bool {
	taken := map[int]bool{}
	maps, _ := filepath.Glob("/proc/[0-9]*/uid_map")
	for _, path := range maps {
		text, _ := os.ReadFile(path) // or it has ended
		for line := range strings.Lines(string(text)) {
			if fields := strings.Fields(line); len(fields) == 3 {
				if at, err := strconv.Atoi(fields[1]); err == nil {
					taken[at] = true
				}
			}
		}
	}
	return taken
}

// measure tries a mapping of the state folder's owners.
func measure(state string) (u users) {
	var err error
	if u.trial, err = stage.NewUsers(trialUser, 0); err == nil {
		err = u.trial.Maps(state)
	}
	if err != nil {
		u.lacks = "containers have the host's: " + err.Error()
	}
	return u
}

// maps says why a workload cannot have users of its own, or nothing.
func (u users) maps(w backends.Workload, place process.Place) string {
	if u.trial == nil {
		return u.lacks
	}
	paths := []string{w.Image.Content}
	for _, m := range w.Mounts {
		paths = append(paths, m.From)
	}
	for _, d := range w.Doors {
		paths = append(paths, d.From)
	}
	if len(place.Kept) > 0 && u.lacks != "" {
		return u.lacks
	}
	for _, path := range paths {
		if err := u.trial.Maps(path); err != nil {
			return path + ": " + err.Error()
		}
	}
	return ""
}

func (u users) close() error {
	if u.trial == nil {
		return nil
	}
	return u.trial.Close()
}
