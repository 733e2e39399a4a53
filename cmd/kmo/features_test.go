package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/conformance"
)

// The table of features is made of what the suite found to be true of each backend. -update writes it.
func TestFeatureTable(t *testing.T) {
	files, err := filepath.Glob("../../backends/*/testdata/features/*.json")
	if err != nil {
		t.Fatal(err)
	}
	more, err := filepath.Glob("../../backends/*/testdata/features/*/*.json") // where one driver has several backends
	if err != nil {
		t.Fatal(err)
	}
	var all []conformance.Found
	for _, path := range append(files, more...) {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var found conformance.Found
		if err := json.Unmarshal(text, &found); err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		all = append(all, found)
	}
	slices.SortFunc(all, func(a, b conformance.Found) int {
		order := func(f conformance.Found) string {
			return fmt.Sprintf("%02d %s", slices.Index(builtInNames(), f.Backend), f.Format)
		}
		return strings.Compare(order(a), order(b))
	})
	for _, name := range builtInNames() {
		if !slices.ContainsFunc(all, func(f conformance.Found) bool { return f.Backend == name }) {
			t.Errorf("the suite has found nothing about %s", name)
		}
	}
	const path = "../../docs/features.md"
	if *update {
		if err := os.WriteFile(path, []byte(featureTable(all)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(path)
	if err != nil || string(text) != featureTable(all) {
		t.Errorf("%s is not what the suite found (%v); go test ./cmd/kmo -run FeatureTable -update writes it", path, err)
	}
}

func featureTable(all []conformance.Found) string {
	var b strings.Builder
	b.WriteString("<!-- Written by TestFeatureTable of cmd/kmo from what the suite found to be true. -->\n# What each backend can do\n\n" +
		"A unit that asks for what its backend lacks is refused when it is planned, or runs by its next variant. What a host does not let a backend do,\n" +
		"`kmo backend check NAME` says there.\n\n| feature | it means |")
	for _, f := range all {
		name := f.Backend
		if string(f.Format) != f.Backend {
			name += " (" + string(f.Format) + ")"
		}
		fmt.Fprintf(&b, " %s |", name)
	}
	b.WriteString("\n| --- | --- |" + strings.Repeat(" --- |", len(all)) + "\n| isolation | how strongly it separates from the host |")
	for _, f := range all {
		fmt.Fprintf(&b, " %s |", f.Isolation)
	}
	b.WriteString("\n")
	for _, feature := range backends.Features() {
		fmt.Fprintf(&b, "| `%s` | %s |", feature.Feature, feature.Meaning)
		for _, f := range all {
			says := ""
			if slices.Contains(f.Features, feature.Feature) {
				says = "yes"
			}
			fmt.Fprintf(&b, " %s |", says)
		}
		b.WriteString("\n")
	}
	return b.String()
}

// The page of the tripwires is what the rules say of themselves. -update writes it.
func TestTripwirePage(t *testing.T) {
	page, err := tripwirePage()
	if err != nil {
		t.Fatal(err)
	}
	const path = "../../docs/tripwires.md"
	if *update {
		if err := os.WriteFile(path, []byte(page), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if text, err := os.ReadFile(path); err != nil || string(text) != page {
		t.Errorf("%s is not what the rules say (%v); go test ./cmd/kmo -run TripwirePage -update writes it", path, err)
	}
}
