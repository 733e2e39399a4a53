package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/kindos/kmo/reconciler"
	"github.com/kindos/kmo/registry"
)

// unit is the text of a demo unit; rest follows the lines that all of them have.
func (d *demo) unit(name, program string, tier int, rest string) (path, text string) {
	return filepath.Join("units", name, "unit.yaml"), fmt.Sprintf(`unit: %s
tier: %d
intent: {kind: feature, summary: "the demo"}
variants:
%sresources: {cpu: {max: 200m}, memory: {max: 128Mi}, pids: {max: 64}, disk: {max: 16Mi}}
%s`, name, tier, d.pins[program], rest)
}

// serving is the rest of a unit that answers HTTP. One with a network of its own listens on all of that, or nobody reaches it.
func (d *demo) serving() string {
	run, start := "run: {ports: [{name: http}], user: 65532}\n", "2s"
	switch d.format() {
	case registry.OCI:
		run, start = "run: {ports: [{name: http}], user: 65532, env: {ADDRESS: 0.0.0.0}}\n", "30s"
	case registry.WASM:
		start = "30s"
	}
	return run + "health: {http: {port: http, path: /healthz}, every: 200ms, start: " + start + ", failures: 3}\ngate: {bake: 300ms}\n"
}

const (
	ticking = `run: {user: 65532}
health: {process: {}, every: 200ms, start: 2s, failures: 3}
gate: {bake: 300ms}
`
)

// files makes a commit's files of path and text pairs.
func files(pairs ...string) map[string]string {
	all := make(map[string]string)
	for i := 0; i < len(pairs); i += 2 {
		all[pairs[i]] = pairs[i+1]
	}
	return all
}

// acts is the story.
func (d *demo) acts() []act {
	bus, busText := d.unit("bus", "bus", 3, ticking)
	serving := d.serving()
	relay, relayText := d.unit("relay", "relay-1", 3, "needs: [bus]\n"+serving)
	_, privileged := d.unit("relay", "relay-1", 3, "needs: [bus]\nsecurity: {privileged: true}\n"+serving)
	_, broken := d.unit("relay", "relay-2", 3, "needs: [bus]\n"+serving)
	ledger, ledgerText := d.unit("ledger", "relay-1", 1, serving)
	return []act{
		{"v1: a program on " + d.backend + " that needs a WASM module", func(ctx context.Context) error {
			if err := d.commit(ctx, "bus and relay", true, files(bus, busText, relay, relayText)); err != nil {
				return err
			}
			return d.approve(ctx, "none", "approve the site", "bob", "carol")
		}, reconciler.Converged, "", d.serves("relay", "relay 1")},
		{"a commit that nobody signed", func(ctx context.Context) error {
			return d.commit(ctx, "hello", false, files("README.md", "a site\n"))
		}, reconciler.Refused, "E_SIG_MISSING", nil},
		{"a unit that asks for all of the host", func(ctx context.Context) error {
			return d.commit(ctx, "privileged", true, files(relay, privileged))
		}, reconciler.Refused, "KT001", nil},
		{"an image whose bytes were changed in the registry, and the sha256 in the commit with them", func(ctx context.Context) error {
			pins, err := d.tampered(ctx)
			if err != nil {
				return err
			}
			return d.commit(ctx, "relay as the registry has it", true, files(relay, strings.Replace(relayText, d.pins["relay-1"], pins, 1)))
		}, reconciler.Refused, "E_MERKLE_ROOT", nil},
		{"a tier-1 unit without its quorum", func(ctx context.Context) error {
			return d.commit(ctx, "ledger", true, files(relay, relayText, ledger, ledgerText))
		}, reconciler.Refused, "KT018", nil},
		{"the same, approved by two people", func(ctx context.Context) error {
			return d.approve(ctx, d.good(), "approve ledger", "bob", "carol")
		}, reconciler.Converged, "", d.serves("ledger", "relay 1")},
		{"v2: answers 500 when asked for its health", func(ctx context.Context) error {
			return d.commit(ctx, "relay v2", true, files(relay, broken))
		}, reconciler.Reverted, "500", d.takenBack},
	}
}

// tampered changes a byte of relay-1 in the registry, makes its manifest fit, and returns the pins of a commit that follows the registry:
// the sha256 that it has now, with the root of what was reviewed. Whoever can do both cannot find other bytes with that root.
func (d *demo) tampered(ctx context.Context) (pins string, err error) {
	program, err := os.ReadFile(d.program("relay-1"))
	if err != nil {
		return "", err
	}
	program[len(program)/2] ^= 1
	path := filepath.Join(d.dir, "tampered")
	if err := os.WriteFile(path, program, 0o755); err != nil {
		return "", err
	}
	err = withStore(func(store *registry.Store) error {
		pins, err = d.pushImage(ctx, store, path, "relay-1", d.format())
		return err
	})
	now, reviewed := strings.SplitAfter(pins, "\n"), strings.SplitAfter(d.pins["relay-1"], "\n")
	return now[0] + reviewed[1] + reviewed[2], err
}

// good is the commit that the host runs.
func (d *demo) good() string {
	rec, err := reconciler.FileJournal{Path: filepath.Join(d.state(), "journal.json")}.Load()
	if err != nil {
		return ""
	}
	return rec.Good
}
