package trust

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/policy/trust/signature"
)

// member finds a principal of the root to change.
func member(r *Root, name string) *Principal { return r.principal(name) }

func TestRootInvalid(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(w *world, r *Root)
		text   string
	}{
		{"T11 one key under two principals", func(w *world, r *Root) {
			member(r, "bob").Keys = append(member(r, "bob").Keys, member(r, "alice").Keys...)
		}, "belongs to alice and to bob"},
		{"U-20 one key twice under one principal", func(w *world, r *Root) {
			member(r, "bob").Keys = append(member(r, "bob").Keys, member(r, "bob").Keys...)
		}, "belongs to bob and to bob"},
		{"a principal without a key", func(w *world, r *Root) { member(r, "bob").Keys = nil }, "principal bob has no key"},
		{"a threshold of 0", func(w *world, r *Root) { r.Roles[0].Threshold = 0 }, "threshold 0"},
		{"a threshold above the members", func(w *world, r *Root) { r.Roles[3].Threshold = 2 }, "threshold 2 with 1 principals"},
		{"a threshold of a role that tiers count", func(w *world, r *Root) { r.Roles[0].Threshold = 2 }, "tiers say how many"},
		{"a member that is no principal", func(w *world, r *Root) { r.Roles[0].Members[0] = "zoe" }, `member "zoe" is no principal`},
		{"a member twice", func(w *world, r *Root) { r.Roles[0].Members[0] = "bob" }, `member "bob" is no principal or there twice`},
		{"an unknown role", func(w *world, r *Root) { r.Roles[0].Name = "king" }, `role "king" is unknown`},
		{"a role twice", func(w *world, r *Root) { r.Roles = append(r.Roles, r.Roles[0]) }, "there twice"},
		{"no role commit", func(w *world, r *Root) { r.Roles = append(r.Roles[:1], r.Roles[2:]...) }, "no role commit"},
		{"an unknown use of a key", func(w *world, r *Root) { member(r, "bob").Keys[0].Uses = []string{"all"} }, `has use "all"`},
		{"an unknown class", func(w *world, r *Root) { member(r, "bob").Class = "cat" }, `class "cat"`},
		{"a principal twice", func(w *world, r *Root) { member(r, "bob").Name = "alice" }, "there twice"},
		{"an e-mail of two", func(w *world, r *Root) { member(r, "bob").Emails[0] = "ALICE@kos.dev" }, "belongs to alice"},
		{"a tier that cannot be met", func(w *world, r *Root) { r.Tiers[0].Need = 6 }, "only 5 principals may give one"},
		{"more organisations than there are", func(w *world, r *Root) { r.Tiers[0].Orgs = 3 }, "asks for 3 organisations"},
		{"tier 2 without approvals", func(w *world, r *Root) { r.Tiers[2].Need = 0 }, "at least 1 for tiers 0 to 2"},
		{"tier 3 needs more than tier 2", func(w *world, r *Root) { r.Tiers[3].Need = 2 }, "none needing more"},
		{"three tiers", func(w *world, r *Root) { r.Tiers = r.Tiers[:3] }, "3 tiers"},
		{"tiers out of order", func(w *world, r *Root) { r.Tiers[2].Tier = 3 }, "in order"},
		{"a statement of a role that nobody has", func(w *world, r *Root) { r.Tiers[0].Statement = "image" }, `tier 0 asks for a statement of role "image"`},
		{"a statement of another role", func(w *world, r *Root) { r.Tiers[0].Statement = "commit" }, `tier 0 asks for a statement of role "commit"`},
		{"a statement for tier 1 and none for tier 0", func(w *world, r *Root) {
			member(r, "host").Keys[0].Uses = []string{"revert", "image"}
			r.Roles = append(r.Roles, Role{Name: "image", Threshold: 1, Members: []string{"host"}})
			r.Tiers[1].Statement = "image"
		}, `tier 0 asks for a statement of role ""`},
		{"a bad pattern", func(w *world, r *Root) { r.Units[0].Path = "units/[" }, "unit pattern"},
		{"a bad floor", func(w *world, r *Root) { r.Floors = []string{"main"} }, `floor "main"`},
		{"a key with a comment", func(w *world, r *Root) { member(r, "bob").Keys[0].Public += " bob@kos.dev" }, "nothing else"},
		{"a key with options", func(w *world, r *Root) {
			member(r, "bob").Keys[0].Public = "no-touch-required " + member(r, "bob").Keys[0].Public
		}, "nothing else"},
		{"T07 a small RSA key", func(w *world, r *Root) {
			w.keygen("small", "-t", "rsa", "-b", "2048")
			member(r, "bob").Keys[0].Public = publicLine(w.keys["small"].PublicKey())
		}, "rsa with 2048 bits"},
		{"no site", func(w *world, r *Root) { r.Site = "" }, "no version or no site"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t, nil)
			tt.change(w, &w.root)
			_, err := SignRoot(w.root, w.keys["alice"])
			found := false
			for _, r := range refusal.All(err) {
				found = found || r.Code == "E_ROOT_INVALID" && strings.Contains(r.Error(), tt.text)
			}
			if !found {
				t.Errorf("got %v, want E_ROOT_INVALID with %q", err, tt.text)
			}
		})
	}
}

// TestRootDoors sets each field that is not acted on yet: none is ignored.
func TestRootDoors(t *testing.T) {
	for name, change := range map[string]func(r *Root){
		"keyless": func(r *Root) { r.Principals[0].Keyless = "https://issuer alice" },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, nil)
			change(&w.root)
			_, err := SignRoot(w.root, w.keys["alice"])
			if err == nil || !strings.Contains(err.Error(), "E_ROOT_INVALID: trust root: "+name+" is set, and not acted on yet: leave it out") {
				t.Error(err)
			}
		})
	}
}

func TestRootSignatures(t *testing.T) {
	w := newWorld(t, func(w *world, r *Root) {
		for i := range r.Roles {
			if r.Roles[i].Name == RoleRoot {
				r.Roles[i] = Role{Name: RoleRoot, Threshold: 2, Members: []string{"alice", "bob"}}
			}
		}
		member(r, "bob").Keys[0].Uses = append(member(r, "bob").Keys[0].Uses, RoleRoot)
		member(r, "alice").Keys = append(member(r, "alice").Keys, w.key("alice2", RoleRoot))
	})
	file := []byte(w.files["trust/1.root.json"]) // signed by alice alone
	want := func(name string, file []byte, code string) {
		t.Helper()
		if _, err := ParseRoot(file); codeOf(err) != code {
			t.Errorf("%s: %v, want %q", name, err, code)
		}
	}
	cosign := func(file []byte, name string) []byte {
		t.Helper()
		out, err := CosignRoot(file, w.keys[name])
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	want("T26 one of two", file, "E_ROOT_THRESHOLD")
	want("T10 one person with two keys", cosign(file, "alice2"), "E_ROOT_THRESHOLD")
	want("T12 one signature twice", cosign(file, "alice"), "E_ROOT_THRESHOLD")
	want("somebody without the role", cosign(file, "carol"), "E_ROOT_THRESHOLD")
	both := cosign(file, "bob")
	want("two people", both, "")
	if PinOf(both) == PinOf(file) {
		t.Error("two files with one pin")
	}
	var e signature.Envelope
	if err := json.Unmarshal(both, &e); err != nil {
		t.Fatal(err)
	}
	for i := range e.Payload {
		if c := e.Payload[i]; c != 'A' && i%40 == 0 {
			broken := e
			broken.Payload = e.Payload[:i] + "A" + e.Payload[i+1:]
			data, err := json.Marshal(broken)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := ParseRoot(data); refusal.Of(err) == nil {
				t.Errorf("payload changed at %d: %v", i, err)
			}
		}
	}
}
