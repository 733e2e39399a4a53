package reconciler

import (
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/kindos/kmo/policy/trust"
)

// site replaces site.yaml by the default one with more lines.
func (w *world) site(more string) {
	w.files["site.yaml"] = "site: north-sea\nbranch: main\nzones: [edge]\nregistries: [reg.example]\n" + more
}

// TestTripwiresHaveTheirFacts plays what a rule can only see by what Go has found out. In each story v1 is accepted; what comes after is refused,
// or runs where code is empty.
func TestTripwiresHaveTheirFacts(t *testing.T) {
	for _, test := range []struct {
		name   string
		before func(w *world)
		change func(w *world)
		code   string
	}{
		{"T63 KT025 trips on a network that the accepted site.yaml forbids", func(w *world) { w.site("forbidden: [10.9.0.0/16]\n") },
			func(w *world) { w.site(""); w.unit("relay", "http://10.9.0.1/", "") }, "KT025: relay, run.args: names 10.9.0.1"},
		{"T63 KT025 passes what only the new site.yaml forbids", nil,
			func(w *world) { w.site("forbidden: [10.9.0.0/16]\n"); w.unit("relay", "http://10.9.0.1/", "") }, ""},
		{"T63 KT026 trips on a port of the host", nil,
			func(w *world) { w.ports("relay", "{name: http, host: 6443}") }, "KT026: relay, run.ports[0].host: takes port 6443"},
		{"T63 KT026 trips on the program's own port, where the backend gives it no other", nil,
			func(w *world) { w.ports("relay", "{name: http, port: 6443}") }, "KT026: relay, run.ports[0].port: takes port 6443"},
		{"T63 KT026 passes a port of the backend's choice", nil, func(w *world) { w.ports("relay", "{name: http}") }, ""},
		{"T63 KT012 trips on what loads a module, in a tier that is not 0", nil,
			func(w *world) { w.unit("relay", "2", "hooks: {preInit: [[/sbin/modprobe, nbd]]}\n") }, `KT012: relay, hooks.preInit: runs "modprobe", in tier 3`},
		{"T63 KT017 trips within a freeze of the accepted site.yaml, though the new one ends it", func(w *world) { w.site(frozen()) },
			func(w *world) { w.site(""); w.unit("relay", "2", "") }, "KT017: the change, freeze in site.yaml: relay at "},
		{"T63 KT017 passes site.yaml alone", func(w *world) { w.site(frozen()) }, func(w *world) { w.site("") }, ""},
		{"T63 KT017 passes the change that brings the freeze", nil, func(w *world) { w.site(frozen()); w.unit("relay", "2", "") }, ""},
		{"T63 KT022 trips on a mount of what kMO is made of", nil,
			func(w *world) { w.unit("relay", "2", "mounts: [{from: /opt/./kmo, to: /x}]\n") }, "KT022: relay, mounts[0].from: mounts \"/opt/./kmo\", by which /opt/kmo/bin is reached"},
		{"T63 KT008 trips on an image that nobody has sealed", func(w *world) { w.asksForStatements() },
			func(w *world) { w.images.sealed = false; w.unit("relay", "2", "") }, "KT008: relay, variants[0].image: "},
		{"T63 KT008 passes one that was sealed", func(w *world) { w.asksForStatements() }, func(w *world) { w.unit("relay", "2", "") }, ""},
		{"T63 KT024 trips on an image that the accepted site.yaml burns, though the new one does not", func(w *world) { w.site("burned: [" + image(9) + "]\n") },
			func(w *world) { w.site(""); w.image(9) }, "KT024: relay, variants[0].image: "},
		{"T63 KT024 passes another image", func(w *world) { w.site("burned: [" + image(9) + "]\n") }, func(w *world) { w.image(6) }, ""},
		{"T63 KT028 trips on an older image", func(w *world) {
			w.image(6)
			w.push("v0")
			w.reconcile(Converged)
			w.files = maps.Clone(w.files)
			w.image(7)
		},
			func(w *world) { w.image(6) }, "KT028: relay, intent.kind: an image of commit "},
		{"T63 KT028 passes it as a rollback", func(w *world) {
			w.image(6)
			w.push("v0")
			w.reconcile(Converged)
			w.files = maps.Clone(w.files)
			w.image(7)
		},
			func(w *world) { w.image(6); w.files["units/relay/unit.yaml"] += "intent: {kind: rollback}\n" }, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			story(t, func(t *testing.T, w *world) {
				w.r.Host.Own = []string{"/opt/kmo/bin"}
				w.unit("relay", "1", "")
				if test.before != nil {
					test.before(w)
				}
				w.push("v1")
				w.reconcile(Converged)
				w.files = maps.Clone(w.files)
				test.change(w)
				w.push("v2")
				want := Converged
				if test.code != "" {
					want = Refused
				}
				if rec := w.reconcile(want); !strings.HasPrefix(rec.Reason, test.code) {
					t.Errorf("%s at %s: %s; want %s", rec.Outcome, rec.Stage, rec.Reason, test.code)
				}
			})
		})
	}
}

// asksForStatements makes a root whose tiers ask for a statement of each image, which there is.
func (w *world) asksForStatements() {
	w.root = w.found(func(r *trust.Root) {
		for i := range r.Tiers {
			r.Tiers[i].Statement = trust.RoleImage
		}
		r.Principals = append(r.Principals, trust.Principal{Name: "builder", Class: "robot", Keys: []trust.Key{{Public: public(key(w.t, 5)), Uses: []string{trust.RoleImage}}}})
		r.Roles = append(r.Roles, trust.Role{Name: trust.RoleImage, Threshold: 1, Members: []string{"builder"}})
	})
	w.files["trust/1.root.json"] = string(w.root)
	w.r.Trust.Pin = trust.PinOf(w.root)
	w.images.sealed = true
}

// image is the digest of an image of the world by its number.
func image(n int) string { return fmt.Sprintf("sha256:%064x", n) }

// image has relay run an image.
func (w *world) image(n int) {
	text := w.files["units/relay/unit.yaml"]
	at := strings.Index(text, "sha256:")
	w.files["units/relay/unit.yaml"] = text[:at] + image(n) + text[at+len(image(n)):]
}

// frozen is a freeze that has begun and lasts.
func frozen() string {
	now := time.Now().UTC()
	return fmt.Sprintf("freeze: [{from: %q, to: %q}]\n", now.Add(-time.Hour).Format(time.RFC3339), now.Add(time.Hour).Format(time.RFC3339))
}

// ports makes a unit take ports.
func (w *world) ports(name, ports string) {
	path := "units/" + name + "/unit.yaml"
	w.files[path] = strings.Replace(w.files[path], "user: 65532", "user: 65532, ports: ["+ports+"]", 1)
}
