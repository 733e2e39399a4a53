package microvm

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// What makes a machine has a user of its own, which is no other's, and no rights.
func TestEmulatorHasNoRights(t *testing.T) {
	b, _ := begin(t)
	seen := map[string]bool{"0": true, "65532": true}
	for _, unit := range []string{"relay", "other"} {
		w := workload(unit, "wait")
		if err := b.Apply(t.Context(), w); err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", emulator(t, status(t, b, w.Name).PID)))
		if err != nil {
			t.Fatal(err)
		}
		is := map[string]string{}
		for line := range strings.Lines(string(text)) {
			name, value, _ := strings.Cut(line, ":")
			is[name] = strings.Join(strings.Fields(value), " ")
		}
		user, _, _ := strings.Cut(is["Uid"], " ")
		if want := strings.TrimSpace(strings.Repeat(user+" ", 4)); is["Uid"] != want || seen[user] {
			t.Errorf("its users are %q; want one of its own", is["Uid"])
		}
		seen[user] = true
		none := strings.Repeat("0", 16)
		for name, want := range map[string]string{"Groups": "", "CapInh": none, "CapPrm": none, "CapEff": none, "CapBnd": none, "CapAmb": none, "NoNewPrivs": "1"} {
			if is[name] != want {
				t.Errorf("its %s is %q, want %q", name, is[name], want)
			}
		}
	}
}

// The user of a VMM is never the workload's.
func TestUserOfItsOwn(t *testing.T) {
	w := workload("relay")
	w.Run.User = vmmUser(w)
	if user := vmmUser(w); user == w.Run.User || user == 0 {
		t.Errorf("user %d is the workload's, or root", user)
	}
}
