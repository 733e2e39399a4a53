package lxc

import (
	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/process"
	"github.com/kindos/kmo/backends/process/stage"
)

// users is what this host has for the users of containers.
type users struct {
	trial *stage.Users // nil where there is no user namespace
	lacks string       // why containers have the host's users
}

// measure tries a mapping of the state folder's owners.
func measure(state string) (u users) {
	var err error
	if u.trial, err = stage.NewUsers(firstUser(Name), 0); err == nil {
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
