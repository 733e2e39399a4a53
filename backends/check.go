package backends

import (
	"fmt"
	"math"
	"os"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/kindos/kmo/policy/refusal"
)

// ValidName says whether a workload or a unit may be called so.
func ValidName(name string) bool { return names().MatchString(name) }

func names() *regexp.Regexp { return regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,99}$`) }

// Check refuses what no backend can make of a workload, and what p lacks: a name, a user or a path that cannot be, a device that this host
// does not have. State is the backend's own folder, of which nothing is mounted; nothing of the unit lies in the reserved folders inside.
func (p *Fingerprint) Check(w Workload, state string, reserved ...string) error {
	if !ValidName(w.Name) || !ValidName(w.Unit) {
		return &refusal.Error{Code: "E_PATH", Subject: "workload name and unit", Got: fmt.Sprintf("%.100q, %.100q", w.Name, w.Unit), Want: names().String()}
	}
	if w.Run.User < 0 || w.Run.User > math.MaxInt32 {
		return &refusal.Error{Code: "E_DECODE", Subject: w.Unit + ": run.user", Got: strconv.Itoa(w.Run.User), Want: fmt.Sprintf("0 to %d", math.MaxInt32)}
	}
	if err := p.Admit(w); err != nil {
		return err
	}
	if err := w.checkPaths(state, reserved); err != nil {
		return err
	}
	for _, d := range w.Resources.Devices {
		if err := d.check(); err != nil {
			return &FeatureError{Backend: p.Backend, Feature: Devices, Detail: err.Error()}
		}
	}
	return nil
}

// check says why a device cannot be given.
func (d Device) check() error {
	if len(d.Nodes) == 0 {
		return fmt.Errorf("device %s: this host gives it no nodes", d.Name)
	}
	for _, node := range d.Nodes {
		found, err := os.Stat(node)
		switch {
		case !clean(node) || !within(node, "/dev") || node == "/dev":
			return fmt.Errorf("device %s: %s; want a path below /dev", d.Name, node)
		case err != nil:
			return fmt.Errorf("device %s: %v", d.Name, err)
		case found.Mode()&os.ModeDevice == 0:
			return fmt.Errorf("device %s: %s is no device", d.Name, node)
		}
	}
	return nil
}

// checkPaths sees that every path has one spelling and that none lies below another, which the program may write.
func (w *Workload) checkPaths(state string, reserved []string) error {
	refuse := func(subject, got, want string) error {
		return &refusal.Error{Code: "E_PATH", Subject: w.Unit + ": " + subject, Got: strconv.Quote(refusal.Clip(got, 200)), Want: want}
	}
	type place struct{ subject, from, to string }
	var places []place
	for _, keep := range w.Overlay.Keep {
		places = append(places, place{"overlay.keep", keep, keep})
	}
	for _, m := range w.Mounts {
		if within(m.From, state) || within(state, m.From) {
			return refuse("mounts", m.From, "nothing of kMO's own state")
		}
		places = append(places, place{"mounts", m.From, m.To})
	}
	for _, d := range w.Doors {
		places = append(places, place{"doors", d.From, d.To})
	}
	for _, f := range w.Files {
		places = append(places, place{"files", f.To, f.To})
	}
	for i, inner := range places {
		for _, p := range []string{inner.from, inner.to} {
			if !clean(p) {
				return refuse(inner.subject, p, "a clean absolute path")
			}
		}
		if at := slices.IndexFunc(reserved, func(folder string) bool { return within(inner.to, folder) }); at >= 0 {
			return refuse("path inside", inner.to, "a path outside "+reserved[at])
		}
		for j, outer := range places {
			if i != j && within(inner.to, outer.to) {
				return refuse("path inside", inner.to, "a path that does not lie within "+outer.to)
			}
		}
	}
	return nil
}

// clean says whether p is an absolute path with one spelling and no way out.
func clean(p string) bool {
	return path.IsAbs(p) && path.Clean(p) == p && p != "/" && len(p) <= 4096 && !strings.ContainsFunc(p, func(r rune) bool { return r < ' ' })
}

func within(inner, outer string) bool {
	return inner == outer || strings.HasPrefix(inner, strings.TrimSuffix(outer, "/")+"/")
}
