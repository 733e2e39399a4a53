package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the generated parts of docs/")

const module = "github.com/kindos/kmo/"

// room is what a package may import of ours, and the large modules it alone may name.
type room struct {
	ours  string
	large string
}

// house is the import map of docs/architecture.md: strictly downward, and each large module in one place.
func house() map[string]room {
	return map[string]room{
		"rego":                     {},
		"policy/refusal":           {},
		"registry/merkle":          {"", "golang.org/x/crypto/sha3"},
		"registry":                 {"policy/refusal registry/merkle", "github.com/google/go-containerregistry github.com/sigstore/sigstore github.com/secure-systems-lab/go-securesystemslib"},
		"backends":                 {"policy/refusal registry/merkle", ""},
		"policy/trust":             {"policy/refusal policy/trust/signature registry/merkle", ""},
		"policy/trust/signature":   {"policy/refusal", "github.com/hiddeco/sshsig"},
		"policy/audit":             {"policy/refusal", "golang.org/x/mod"},
		"policy":                   {"policy/refusal policy/trust registry/merkle rego", "github.com/open-policy-agent/opa"},
		"backends/plugin":          {"backends policy/refusal registry/merkle backends/plugin/wire", "github.com/hashicorp/go-plugin google.golang.org/grpc"},
		"backends/plugin/wire":     {"", "google.golang.org/protobuf google.golang.org/grpc"},
		"backends/process":         {"backends backends/process/cgroup backends/process/monitor backends/process/secret backends/process/stage policy/refusal registry/merkle", ""},
		"backends/process/monitor": {"backends backends/process/stage", ""},
		"backends/process/secret":  {"backends", ""},
		"backends/appimage":        {"backends backends/process registry/merkle", "github.com/diskfs/go-diskfs"},
		"backends/docker":          {"backends backends/docker/engine backends/docker/layer backends/docker/plan backends/docker/program backends/process backends/process/monitor backends/process/secret policy/refusal registry/merkle", "github.com/moby/moby"},
		"backends/docker/engine":   {"", "github.com/moby/moby"},
		"backends/docker/layer":    {"", ""},
		"backends/docker/plan":     {"backends backends/docker/engine backends/process backends/process/secret backends/process/stage policy/refusal", "github.com/moby/moby"},
		"backends/docker/program":  {"backends backends/process/cgroup backends/process/stage", ""},
		"backends/gvisor":          {"backends backends/process backends/process/monitor backends/process/netns backends/process/stage", "github.com/opencontainers/runtime-spec github.com/cyphar/filepath-securejoin"},
		"backends/kubernetes":      {"backends registry/merkle", "k8s.io/client-go"},
		"backends/process/cgroup":  {"backends", ""},
		"backends/process/stage":   {"", "github.com/cyphar/filepath-securejoin"},
		"backends/process/netns":   {"", ""},
		"backends/lxc":             {"backends backends/process backends/process/monitor backends/process/netns backends/process/stage", ""},
		"backends/native":          {"backends backends/process registry/merkle", ""},
		"backends/wasm":            {"backends backends/process backends/process/stage policy/refusal registry/merkle", "github.com/tetratelabs/wazero"},
		"backends/fake":            {"backends registry/merkle", ""},
		"backends/conformance":     {"backends policy/refusal backends/plugin registry/merkle", ""},
		"reconciler/template":      {"backends policy/refusal registry/merkle", "go.yaml.in/yaml/v4"},
		"reconciler/gate":          {"backends policy/refusal", ""},
		"reconciler":               {"backends policy policy/audit policy/refusal policy/trust reconciler/gate reconciler/template", ""},
		"reconciler/gitrepo":       {"policy/refusal policy/trust reconciler", "github.com/go-git/go-git/v5 github.com/go-git/go-billy/v5 github.com/fsnotify/fsnotify"},
		"backends/microvm":         {"backends backends/microvm/boot backends/microvm/channel backends/microvm/machine backends/process backends/process/monitor backends/process/netns backends/process/stage", ""},
		"backends/microvm/boot":    {"", "github.com/pierrec/lz4"},
		"backends/microvm/channel": {"backends backends/process/stage", ""},
		"backends/microvm/machine": {"backends/microvm/channel backends/process/stage", ""},
		"backends/microvm/guest":   {"backends backends/microvm/channel backends/process/cgroup backends/process/stage", ""},
	}
}

// goPackage is what `go list -json` says of a package.
type goPackage struct {
	ImportPath string
	Imports    []string
}

func listPackages(t *testing.T) map[string]goPackage {
	t.Helper()
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports", module+"...").Output()
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]goPackage{}
	decoder := json.NewDecoder(strings.NewReader(string(out)))
	for {
		var p goPackage
		if err := decoder.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all[strings.TrimPrefix(p.ImportPath, module)] = p
	}
}

func TestImportsGoDownward(t *testing.T) {
	rooms := house()
	large := map[string][]string{}
	for name, room := range rooms {
		for _, m := range strings.Fields(room.large) {
			large[m] = append(large[m], name)
		}
	}
	for name, p := range listPackages(t) {
		if strings.HasPrefix(name, "cmd/") || strings.HasPrefix(name, "fixtures/") || strings.Contains(name, "/internal/") || strings.Contains(name, "/testprogram") {
			continue
		}
		room, known := rooms[name]
		if !known {
			t.Errorf("package %s has no place in the house", name)
			continue
		}
		for _, path := range p.Imports {
			if ours, is := strings.CutPrefix(path, module); is && !slices.Contains(strings.Fields(room.ours), ours) {
				t.Errorf("%s imports %s, which it may not", name, ours)
			}
			for m, owners := range large {
				if (path == m || strings.HasPrefix(path, m+"/")) && !slices.Contains(owners, name) {
					t.Errorf("%s imports %s, which belongs to %v", name, path, owners)
				}
			}
		}
	}
}

var (
	rowPattern = regexp.MustCompile(`^\| ((?:T|U-|P-)[0-9]{2}) \| ([^|]*) \|`)
	idPattern  = regexp.MustCompile(`\b(T[0-9]{2}|U-[0-9]{2}|P-?[0-9]{2})(?:[^0-9]|$)`)
)

// TestEveryThreatHasATest keeps docs/threats.md: each row names the test files that show it, found by the row's id in a test's name or
// table. A row without one says why it comes later, or the test fails.
func TestEveryThreatHasATest(t *testing.T) {
	shown := threatTests(t)
	path := filepath.Join("..", "..", "docs", "threats.md")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(text), "\n")
	rows := 0
	for i, line := range lines {
		row := rowPattern.FindStringSubmatch(line)
		if row == nil {
			continue
		}
		rows++
		where := strings.Join(slices.Sorted(maps.Keys(shown[row[1]])), ", ")
		if where == "" {
			_, cell, _ := strings.Cut(strings.TrimPrefix(line, row[0]), " ")
			if !strings.HasPrefix(cell, "later: ") {
				t.Errorf("%s has no test, and the row does not say why it comes later", row[1])
			}
			continue
		}
		lines[i] = fmt.Sprintf("| %s | %s | %s |", row[1], row[2], where)
	}
	if rows < 100 {
		t.Errorf("%d rows, want every T, U and P row", rows)
	}
	if made := strings.Join(lines, "\n"); made != string(text) {
		if !*update {
			t.Error("docs/threats.md is not what the tests say; go test ./cmd/kmo -run Threat -update")
		} else if err := os.WriteFile(path, []byte(made), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// threatTests maps ids to the test files that name them in a string or a function's name.
func threatTests(t *testing.T) map[string]map[string]bool {
	t.Helper()
	shown := map[string]map[string]bool{}
	root := filepath.Join("..", "..")
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !(strings.HasSuffix(path, "_test.go") || strings.HasSuffix(path, ".txtar")) || strings.HasSuffix(path, "house_test.go") {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		lines := strings.Split(string(text), "\n")
		for i, line := range lines {
			if strings.HasPrefix(strings.TrimSpace(line), "//") || strings.HasPrefix(line, "#") && !doesSomething(lines[i+1:]) {
				continue
			}
			for _, id := range testIDs(line) {
				if shown[id] == nil {
					shown[id] = map[string]bool{}
				}
				shown[id][filepath.ToSlash(name)] = true
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return shown
}

// doesSomething says whether a script's lines begin with a command: an id in a comment stands for what is done right below it.
func doesSomething(lines []string) bool {
	return len(lines) > 0 && strings.TrimSpace(lines[0]) != "" && !strings.HasPrefix(lines[0], "#") && !strings.HasPrefix(lines[0], "-- ")
}

// TestAnIDStandsForACommand: a comment alone shows nothing.
func TestAnIDStandsForACommand(t *testing.T) {
	for text, want := range map[string]bool{"kmo status": true, "": false, "\nkmo status": false, "# more\nkmo status": false, "-- file --": false} {
		if got := doesSomething(strings.Split(text, "\n")); got != want {
			t.Errorf("%q: %v, want %v", text, got, want)
		}
	}
	if doesSomething(nil) {
		t.Error("the end of a script is no command")
	}
}

var functionID = regexp.MustCompile(`^func Test[A-Za-z]*?((?:[TUP][0-9]{2})+)`)

// testIDs finds ids in a line: in its strings as they are, in a test function's name without their dash.
func testIDs(line string) []string {
	var ids []string
	for _, found := range idPattern.FindAllStringSubmatch(line, -1) {
		ids = append(ids, canonical(found[1]))
	}
	if strings.HasPrefix(line, "func Fuzz") {
		ids = append(ids, "U-44")
	}
	if found := functionID.FindStringSubmatch(line); found != nil {
		for at := 0; at+3 <= len(found[1]); at += 3 {
			ids = append(ids, canonical(found[1][at:at+3]))
		}
	}
	return ids
}

func canonical(id string) string {
	if id[0] == 'T' || id[1] == '-' {
		return id
	}
	return id[:1] + "-" + id[1:]
}
