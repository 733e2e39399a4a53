package policy

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/kindos/kmo/policy/refusal"
	shipped "github.com/kindos/kmo/rego"
)

// altered is the shipped layer with one file passed through edit; an edit that changes nothing is a defect of the test.
func altered(t *testing.T, name string, edit func(string) string) fs.FS {
	t.Helper()
	layer := fstest.MapFS{}
	err := fs.WalkDir(shipped.Rules(), ".", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		text, err := fs.ReadFile(shipped.Rules(), path)
		layer[path] = &fstest.MapFile{Data: text}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	before := ""
	if layer[name] != nil {
		before = string(layer[name].Data)
	}
	after := edit(before)
	if after == before {
		t.Fatalf("%s: the edit changes nothing", name)
	}
	if layer[name] = (&fstest.MapFile{Data: []byte(after)}); after == "" {
		layer[name].Data = nil
	}
	return layer
}

func replace(old, with string) func(string) string {
	return func(text string) string { return strings.ReplaceAll(text, old, with) }
}

func add(more string) func(string) string {
	return func(text string) string { return text + "\n" + more + "\n" }
}

// site is a site's policy folder: the module, and a test if it brings none.
func site(module string) fstest.MapFS {
	return fstest.MapFS{
		"site.rego":      {Data: []byte(module)},
		"site_test.rego": {Data: []byte("package site_test\n\ntest_it if true\n")},
	}
}

// refused wants a refusal with the code, and every text somewhere in it.
func refused(t *testing.T, err error, code string, texts ...string) {
	t.Helper()
	found := false
	for _, one := range refusal.All(err) {
		found = found || string(one.Code) == code
	}
	if !found {
		t.Fatalf("got %v, want a refusal with code %s", err, code)
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("got %q, want %q in it", err, text)
		}
	}
}

func TestLoadRefusesShippedLayer(t *testing.T) {
	gone := func(string) string { return "" }
	for _, c := range []struct {
		name, file string
		edit       func(string) string
		code, text string
	}{
		{"T65 T63 KT021 trips on package renamed", "hooks.rego", replace("package kmo.hooks", "package kmo.hooks2"), "KT021", "package kmo.hooks: missing or renamed"},
		{"T65 T63 KT021 trips on file emptied", "hooks.rego", gone, "KT021", "rego/hooks.rego"},
		{"T65 rules gone", "hooks.rego", func(string) string { return "package kmo.hooks\n" }, "KT021", "without rules"},
		{"T65 syntax error", "hooks.rego", add("deny contains {"), "E_POLICY_COMPILE", "rego/hooks.rego:"},
		{"T65 builtin error", "hooks.rego", add(`deny contains x if x := to_number(input.commit)`), "E_POLICY_ERROR", "to_number"},
		{"T65 rule says nothing", "hooks.rego", replace(`evaluated contains "KT027" if input.version == 1`, `evaluated contains "KT027" if input.version == 2`), "KT021", "KT027 did not look"},
		{"U-32 must-trip does not trip", "confinement.rego", replace(`"privileged", value`, `"priviledged", value`), "KT021", `KT001 on the fixture`},
		{"U-32 near miss trips", "removal.rego", replace("input.change.revert\n\tinput.totals.removed > data", "input.change.nothing\n\tinput.totals.removed > data"), "KT021", "KT016 on the near miss"},
		{"U-31 http.send", "hooks.rego", add(`deny contains x if x := http.send({"method": "get", "url": "http://x.example"})`), "E_POLICY_COMPILE", "undefined function http.send"},
		{"U-33 data missing", "limits.json", func(string) string { return "{}" }, "KT021", "KT016"},
		{"limits gone", "limits.json", gone, "KT021", "limits.json"},
		{"capabilities gone", "capabilities.json", gone, "KT021", "capabilities.json"},
		{"builtin that is not known", "capabilities.json", replace(`"abs"`, `"abs", "http.sendd"`), "E_POLICY_COMPILE", "http.sendd"},
		{"package that is not shipped", "more.rego", add("package kmo.more\n\ndeny contains 1 if false"), "KT021", "kmo.more"},
		{"site's package in the shipped layer", "more.rego", add("package site\n\ndeny contains 1 if false"), "KT021", "package site"},
		{"T66 with", "hooks.rego", add(`other if count(deny) == 0 with input as {}`), "E_POLICY_COMPILE", "with in *_test.rego only"},
		{"old syntax", "hooks.rego", add(`deny[x] { x := 1 }`), "E_POLICY_COMPILE", "rego/hooks.rego:"},
		{"strict: unused import", "removal.rego", replace("import data.kmo.plan", "import data.kmo.plan\nimport data.kmo.hooks"), "E_POLICY_COMPILE", "unused"},
	} {
		t.Run(c.name, func(t *testing.T) {
			set, err := Load(altered(t, c.file, c.edit))
			refused(t, err, c.code, c.text)
			if set != nil {
				t.Error("got a set beside the refusal")
			}
		})
	}
}

func TestLoadRefusesSiteLayer(t *testing.T) {
	rule := "deny contains {\"id\": \"SITE1\", \"unit\": \"\", \"path\": \"\", \"msg\": \"x\"} if input.site.name == \"none\"\n"
	for _, c := range []struct {
		name, module, code, text string
	}{
		{"T64 shipped package redefined", "package kmo.hooks\n\n" + rule, "E_POLICY_COMPILE", "can only add denials"},
		{"package beside", "package kmo\n\n" + rule, "E_POLICY_COMPILE", "package kmo"},
		{"package that begins alike", "package sitemap\n\n" + rule, "E_POLICY_COMPILE", "package sitemap"},
		{"data overridden", "package limits\n\n" + rule, "E_POLICY_COMPILE", "package limits"},
		{"T66 http.send", "package site\n\n" + rule + `deny contains x if x := http.send({})`, "E_POLICY_COMPILE", "undefined function http.send"},
		{"T66 opa.runtime", "package site\n\n" + rule + `deny contains x if x := opa.runtime()`, "E_POLICY_COMPILE", "undefined function opa.runtime"},
		{"U-31 time.now_ns", "package site\n\n" + rule + `deny contains x if x := time.now_ns()`, "E_POLICY_COMPILE", "undefined function time.now_ns"},
		{"U-31 net.lookup_ip_addr", "package site\n\n" + rule + `deny contains x if x := net.lookup_ip_addr("x.example")`, "E_POLICY_COMPILE", "undefined function net.lookup_ip_addr"},
		{"U-31 rand.intn", "package site\n\n" + rule + `deny contains x if x := rand.intn("a", 3)`, "E_POLICY_COMPILE", "undefined function rand.intn"},
		{"U-31 uuid.rfc4122", "package site\n\n" + rule + `deny contains x if x := uuid.rfc4122("a")`, "E_POLICY_COMPILE", "undefined function uuid.rfc4122"},
		{"U-31 trace", "package site\n\n" + rule + `deny contains x if x := trace("a")`, "E_POLICY_COMPILE", "undefined function trace"},
		{"T66 with mocks a function", "package site\n\n" + rule + `x if count("a") == 2 with count as 2`, "E_POLICY_COMPILE", "policy/site.rego:"},
		{"T66 with mocks the shipped rules", "package site\n\n" + rule + `x if count(data.kmo.hooks.deny) == 0 with data.kmo.hooks.deny as set()`, "E_POLICY_COMPILE", "want with in *_test.rego only"},
		{"allow rule", "package site\n\n" + rule + "allow if input.commit", "E_POLICY_COMPILE", "nothing can allow"},
		{"deny that is no set", "package site\n\ndeny := true\n", "E_POLICY_COMPILE", "deny contains"},
		{"deny function", "package site\n\ndeny(x) := x\n", "E_POLICY_COMPILE", "deny contains"},
		{"U-33 no rule that judges", "package site\n\nx := 1\n", "KT021", "without a deny or a warn rule"},
		{"error on a fixture", "package site\n\n" + rule + "deny contains x if x := to_number(input.commit)", "E_POLICY_ERROR", "to_number"},
		{"finding without a form", "package site\n\ndeny contains \"no\" if input.commit\n", "E_POLICY_ERROR", "a finding no"},
		{"shipped id", "package site\n\n" + `deny contains {"id": "KT001", "unit": "", "path": "", "msg": "x"} if input.commit`, "E_POLICY_ERROR", "KT001"},
		{"id in lower case", "package site\n\n" + `deny contains {"id": "site1", "unit": "", "path": "", "msg": "x"} if input.commit`, "E_POLICY_ERROR", "site1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := Load(shipped.Rules(), site(c.module))
			refused(t, err, c.code, c.text)
		})
	}
	good := "package site\n\n" + rule
	for _, c := range []struct {
		name, file, text, code, want string
	}{
		{"no tests", "site_test.rego", "package site_test\n\nx := 1\n", "E_POLICY_COMPILE", "rules without tests"},
		{"test that fails", "site_test.rego", "package site_test\n\ntest_it if false\n", "E_POLICY_COMPILE", "data.site_test.test_it: the test does not pass"},
		{"test of another package", "site_test.rego", "package kmo.hooks\n\ntest_it if true\n", "E_POLICY_COMPILE", "package kmo.hooks"},
		{"data file", "data.json", "{}", "E_POLICY_COMPILE", "policy/data.json: not a module"},
		{"U-11 4 MiB of rules", "big.rego", "package site\n#" + strings.Repeat("x", 5<<20), "E_LIMIT", "more files or bytes"},
	} {
		t.Run(c.name, func(t *testing.T) {
			layer := site(good)
			layer[c.file] = &fstest.MapFile{Data: []byte(c.text)}
			_, err := Load(shipped.Rules(), layer)
			refused(t, err, c.code, c.want)
		})
	}
	t.Run("U-02 symbolic link", func(t *testing.T) {
		folder := t.TempDir()
		if err := os.Symlink("/etc/passwd", filepath.Join(folder, "site.rego")); err != nil {
			t.Fatal(err)
		}
		_, err := Load(shipped.Rules(), os.DirFS(folder))
		refused(t, err, "E_PATH", "policy/site.rego: not a regular file")
	})
	t.Run("all faults at once", func(t *testing.T) {
		_, err := Load(shipped.Rules(), site("package site\n\nallow if true\n\ndeny := 1\n"))
		if got := len(refusal.All(err)); got != 2 {
			t.Errorf("got %d refusals, want 2: %v", got, err)
		}
	})
}

func TestLoadTakes(t *testing.T) {
	for name, layers := range map[string][]fs.FS{
		"a site without a policy folder":          {shipped.Rules(), os.DirFS(filepath.Join(t.TempDir(), "policy"))},
		"T63 KT021 passes an empty policy folder": {shipped.Rules(), fstest.MapFS{"README.md": {Data: []byte("none yet")}}},
		"T63 KT021 passes two layers of a site":   {shipped.Rules(), site("package site\n\nwarn contains 1 if false\n"), site("package site.more\n\ndeny contains 1 if false\n")},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := Load(layers...); err != nil {
				t.Fatal(err)
			}
		})
	}
	t.Run("no layer", func(t *testing.T) {
		_, err := Load()
		refused(t, err, "KT021")
	})
	t.Run("a layer that cannot be read is no refusal", func(t *testing.T) {
		_, err := Load(shipped.Rules(), os.DirFS("\x00"))
		if err == nil || refusal.Of(err) != nil {
			t.Errorf("got %v, want an error that is no refusal", err)
		}
	})
	t.Run("U-34 the previous set goes on", func(t *testing.T) {
		set := load(t)
		if _, err := Load(shipped.Rules(), site("package kmo\n")); err == nil {
			t.Fatal("got a set, want a refusal")
		}
		decision, err := set.Decide(context.Background(), many(t, 1))
		if err := errors.Join(err, decision.Refusal()); err != nil {
			t.Error(err)
		}
	})
	t.Run("the digest names the rules", func(t *testing.T) {
		one, other := load(t), load(t)
		if one.Digest() != other.Digest() || one.Digest().IsZero() {
			t.Errorf("got %v and %v, want the same", one.Digest(), other.Digest())
		}
		more, err := Load(shipped.Rules(), site("package site\n\ndeny contains 1 if false\n"))
		if err != nil {
			t.Fatal(err)
		}
		if more.Digest() == one.Digest() {
			t.Error("a site's rule leaves the digest as it was")
		}
	})
}
