package policy

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/kindos/kmo/policy/refusal"
)

// plain is text as encoding/json reads it.
func plain(t *testing.T, text []byte) any {
	t.Helper()
	var tree any
	if err := json.Unmarshal(text, &tree); err != nil {
		t.Fatal(err)
	}
	return tree
}

// fromValue is a value of OPA's as encoding/json would have read it.
func fromValue(t *testing.T, value ast.Value) any {
	t.Helper()
	tree, err := ast.JSON(value)
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(tree)
	if err != nil {
		t.Fatal(err)
	}
	return plain(t, text)
}

// FuzzReplay puts any bytes to the rules: nothing panics, what is read is what encoding/json reads, and what passes is what a few lines of Go,
// written from the tripwires' text, let pass too.
func FuzzReplay(f *testing.F) {
	set, c := load(f), readFixtures(f)
	for _, id := range slices.Sorted(maps.Keys(c.cases)) {
		for _, patches := range []map[string][]operation{c.cases[id].Trip, c.cases[id].Near} {
			for _, name := range slices.Sorted(maps.Keys(patches)) {
				input, err := c.input(patches[name])
				if err != nil {
					f.Fatal(err)
				}
				f.Add(input)
			}
		}
	}
	f.Add([]byte(`{"version":1}`))
	f.Add([]byte(`[[[[`))
	f.Fuzz(func(t *testing.T, text []byte) {
		if value, err := decode(text); err == nil {
			if want, got := plain(t, text), fromValue(t, value); !reflect.DeepEqual(want, got) {
				t.Fatalf("read otherwise:\n%s", cmp.Diff(want, got))
			}
		}
		decision, err := set.Replay(context.Background(), text)
		if err != nil {
			if refusal.Of(err) == nil || decision.Refusal() == nil {
				t.Fatalf("got %v and %v, want refusals", err, decision.Refusal())
			}
			return
		}
		if decision.Refusal() != nil {
			return
		}
		if faults := forbidden(plain(t, text)); len(faults) > 0 {
			t.Fatalf("allowed, in spite of %v", faults)
		}
	})
}

// forbidden is some of the tripwires again, the slow and plain way.
func forbidden(input any) []string {
	var faults []string
	at := func(node any, path ...string) any {
		for _, key := range path {
			object, _ := node.(map[string]any)
			node = object[key]
		}
		return node
	}
	list := func(node any) []any { l, _ := node.([]any); return l }
	change := at(input, "change")
	for _, facts := range list(at(change, "units")) {
		who := map[any]bool{}
		for _, approval := range list(at(facts, "counted")) {
			who[at(approval, "principal")] = true
		}
		delete(who, "")
		if need, _ := at(facts, "need").(float64); float64(len(who)) < need && at(change, "revert") != true {
			faults = append(faults, "KT018")
		}
	}
	apart := at(change, "apart") == true && len(list(at(input, "rules"))) > 1
	if at(change, "base") != "" && at(change, "revert") != true && at(change, "policy") == true && at(change, "other") == true && !apart {
		faults = append(faults, "KT020")
	}
	asks := func(node any) {
		if security, ok := at(node, "security").(map[string]any); ok {
			for key, value := range security {
				if len(list(value)) > 0 && key == "host" || value == true {
					faults = append(faults, key)
				}
			}
		}
		for _, mount := range list(at(node, "mounts")) {
			from := fmt.Sprint(at(mount, "from"))
			if strings.Contains(from+"/", "/../") || !strings.HasPrefix(from, "/") || strings.HasPrefix(from+"/", "/etc/") {
				faults = append(faults, "KT003 "+from)
			}
		}
	}
	for _, unit := range list(at(input, "units")) {
		asks(at(unit, "after"))
		for _, variant := range list(at(unit, "after", "variants")) {
			for _, format := range []string{"image", "wasm", "native", "lxc", "appimage"} {
				if ref, ok := at(variant, format).(string); ok && (!strings.Contains(ref, "@sha256:") || at(variant, "merkle") == nil) {
					faults = append(faults, "KT006 "+ref)
				}
			}
		}
		for _, workload := range list(at(unit, "workloads")) {
			asks(workload)
			if user, ok := at(workload, "run", "user").(float64); !ok || user < 1 {
				faults = append(faults, "KT010")
			}
		}
	}
	return faults
}
