package template

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"go.yaml.in/yaml/v4"
)

var update = flag.Bool("update", false, "write docs/schema")

// schemaOf is the JSON Schema of one file, made from the same tags and rules that the decoder reads.
func schemaOf(d *decoder, title string, t reflect.Type) map[string]any {
	s := schemas{decoder: d, defs: make(map[string]any), later: make(map[string]string)}
	file := "unit"
	if title == "site" {
		file = "site"
	}
	for _, row := range notYet() {
		if row.file == file {
			s.later[row.path] = "This build refuses it"
			if row.but != "" {
				s.later[row.path] += " unless it is " + row.but
			}
			s.later[row.path] += ": " + row.why + "."
		}
	}
	top := s.object(t, "")
	top["$schema"] = "https://json-schema.org/draft/2020-12/schema"
	top["$id"] = "urn:kmo:schema:" + title
	top["title"] = title
	top["$defs"] = s.defs
	return top
}

// schemas collects the definitions of one schema.
type schemas struct {
	*decoder
	defs  map[string]any
	later map[string]string // by path of keys
}

// object is the schema of a struct.
func (s *schemas) object(t reflect.Type, path string) map[string]any {
	out := map[string]any{"type": "object"}
	if t == reflect.TypeFor[Open]() {
		s.defs["Any"] = anything()
		return map[string]any{"type": "object", "$ref": "#/$defs/Any"}
	}
	properties, required, one := map[string]any{}, []string{}, []any{}
	for _, f := range s.structs[t].fields {
		below := join(path, f.name)
		property := s.value(t.Field(f.index).Type, f, below)
		property["description"] = f.doc
		if later := s.later[below]; later != "" {
			property["description"] = f.doc + ". " + later
		}
		properties[f.name] = property
		if f.need {
			required = append(required, f.name)
		}
		if f.one {
			one = append(one, map[string]any{"required": []string{f.name}})
		}
	}
	out["properties"], out["additionalProperties"] = properties, false
	if len(required) > 0 {
		out["required"] = required
	}
	if len(one) > 0 {
		if !s.structs[t].exactly {
			one = append(one, map[string]any{"not": map[string]any{"anyOf": slices.Clone(one)}})
		}
		out["oneOf"] = one
	}
	return out
}

// value is the schema of a value of type t in a field.
func (s *schemas) value(t reflect.Type, f field, path string) map[string]any {
	if rule, ok := s.texts[t]; ok {
		s.defs[t.Name()] = text(rule.textRule)
		return map[string]any{"$ref": "#/$defs/" + t.Name()}
	}
	switch t.Kind() {
	case reflect.Pointer:
		return s.value(t.Elem(), f, path)
	case reflect.Struct:
		return s.object(t, path)
	case reflect.Map:
		return map[string]any{"type": "object", "propertyNames": s.value(t.Key(), field{}, path), "additionalProperties": s.value(t.Elem(), f, path)}
	case reflect.Slice:
		member := field{enum: f.enum}
		if t.Elem().Kind() == reflect.Slice {
			member.items = [2]int{1, 64}
		}
		out := map[string]any{"type": "array", "items": s.value(t.Elem(), member, path), "maxItems": f.items[1]}
		if f.items[0] > 0 {
			out["minItems"] = f.items[0]
		}
		if f.unique {
			out["uniqueItems"] = true
		}
		return out
	case reflect.Bool:
		return map[string]any{"type": "boolean"}
	case reflect.Int, reflect.Int64:
		return map[string]any{"type": "integer", "minimum": f.min, "maximum": f.max}
	case reflect.String:
		return plainText(f)
	}
	panic(fmt.Sprintf("no schema for %v at %s", t, path))
}

// plainPart is what any text is made of.
const plainPart = `[^` + controls + `]|[\t\n]|\r\n`

// plainText is the schema of a string.
func plainText(f field) map[string]any {
	if len(f.enum) > 0 {
		return map[string]any{"enum": f.enum}
	}
	out := map[string]any{"type": "string", "maxLength": int64(maxText), "pattern": ecma("^(?:" + plainPart + ")*$")}
	if f.max > 0 {
		out["maxLength"] = f.max
	}
	if f.need {
		out["minLength"] = 1
	}
	return out
}

// text is the schema of a text type.
func text(rule textRule) map[string]any {
	out := map[string]any{"type": "string", "maxLength": rule.max, "pattern": ecma("^(?:" + rule.pattern + ")$"), "description": rule.want}
	if rule.number > 0 {
		out["type"], out["minimum"], out["maximum"] = []string{"string", "integer"}, 1, rule.number
	}
	return out
}

// anything is the schema of a value of any kind: its keys and texts hold nothing that people do not see.
func anything() map[string]any {
	pattern, again := ecma("^(?:"+plainPart+")*$"), map[string]any{"$ref": "#/$defs/Any"}
	return map[string]any{"pattern": pattern, "propertyNames": map[string]any{"pattern": pattern}, "items": again, "additionalProperties": again}
}

// ecma spells a pattern as JSON Schema has it, and goPattern back: the two differ in characters above U+00FF.
func ecma(pattern string) string {
	return regexp.MustCompile(`\\x\{([0-9a-f]{4})\}`).ReplaceAllString(pattern, `\u$1`)
}

func goPattern(pattern string) (jsonschema.Regexp, error) {
	compiled, err := regexp.Compile(regexp.MustCompile(`\\u([0-9a-f]{4})`).ReplaceAllString(pattern, `\x{$1}`))
	return compiled, err
}

// kinds are the files that have a schema.
func kinds() map[string]func() any {
	return map[string]func() any{
		"site": func() any { return new(Config) }, "unit": func() any { return &Unit{Tier: -1} }, "profile": func() any { return new(Profile) },
	}
}

// TestSchemas: docs/schema is what the types say. go generate writes it.
func TestSchemas(t *testing.T) {
	d := newDecoder()
	for name, value := range kinds() {
		var want bytes.Buffer
		enc := json.NewEncoder(&want)
		enc.SetEscapeHTML(false)
		enc.SetIndent("", "  ")
		if err := enc.Encode(schemaOf(d, name, reflect.TypeOf(value()).Elem())); err != nil {
			t.Fatal(err)
		}
		file := filepath.Join("..", "..", "docs", "schema", name+".schema.json")
		if *update {
			if err := os.WriteFile(file, want.Bytes(), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		got, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want.Bytes()) {
			t.Errorf("%s is not what the types say: run go generate ./reconciler/template", file)
		}
	}
}

// TestFreeTexts lists every key of a unit that takes any text, with what looks at it: a key that is new here is one that the rules do not see
// until somebody has thought of it.
func TestFreeTexts(t *testing.T) {
	looked := map[string]string{
		"run.args": "KT015", "run.env": "KT015",
		"hooks.preInit": "KT015, KT027", "hooks.postInit": "KT015, KT027", "hooks.exit": "KT015, KT027",
		"health.exec.argv": "KT015, KT027", "health.http.path": "KT015",
		"intent.summary": "people", "intent.ticket": "people",
	}
	for _, row := range notYet() {
		looked[row.path] = "refused"
	}
	d := newDecoder()
	var walk func(t reflect.Type, path string, rules field) []string
	walk = func(t reflect.Type, path string, rules field) (free []string) {
		if looked[path] == "refused" {
			return nil
		}
		switch t.Kind() {
		case reflect.Pointer, reflect.Slice, reflect.Map:
			return walk(t.Elem(), path, rules)
		case reflect.Struct:
			for _, f := range d.structs[t].fields {
				free = append(free, walk(t.Field(f.index).Type, join(path, f.name), f)...)
			}
		case reflect.String:
			if _, bounded := d.texts[t]; len(rules.enum) == 0 && (!bounded || t == reflect.TypeFor[URLPath]()) {
				return []string{path}
			}
		}
		return free
	}
	free := walk(reflect.TypeFor[Unit](), "", field{})
	for _, path := range free {
		if looked[path] == "" {
			t.Errorf("%s takes any text, and no rule is known to look at it", path)
		}
	}
	if len(free) != 9 {
		t.Errorf("free texts are %v, want 9: the walk has missed some", free)
	}
}

// judges are the two that must agree: the schema in docs and the decoder.
type judges struct {
	d       *decoder
	schemas map[string]*jsonschema.Schema
}

func newJudges(t *testing.T) judges {
	t.Helper()
	j := judges{d: newDecoder(), schemas: make(map[string]*jsonschema.Schema)}
	for name := range kinds() {
		compiler := jsonschema.NewCompiler()
		compiler.DefaultDraft(jsonschema.Draft2020)
		compiler.UseRegexpEngine(goPattern)
		schema, err := compiler.Compile(filepath.Join("..", "..", "docs", "schema", name+".schema.json"))
		if err != nil {
			t.Fatal(err)
		}
		j.schemas[name] = schema
	}
	return j
}

// judge returns what the schema and the decoder say of a document, which is JSON and so YAML too.
func (j judges) judge(t *testing.T, kind, text string) (schema, decoder error) {
	t.Helper()
	document, err := jsonschema.UnmarshalJSON(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	var p problems
	if top := parse(kind+".yaml", []byte(text), &p); top != nil {
		j.d.decode(top, kinds()[kind](), &p)
	}
	return j.schemas[kind].Validate(document), p.err()
}

func TestSchemaAndDecoderAgree(t *testing.T) {
	j := newJudges(t)
	whole := relayFile + `
secrets: [{from: token.sops.yaml, key: token, to: /run/secrets/token}]
mounts: [{from: /srv/data, to: /data, readOnly: true}]
links: [{to: message-bus, via: bus}]
security: {privileged: true, capabilities: [CAP_NET_RAW], host: [pid]}
`
	whole = strings.Replace(whole, "disk: {max: 256Mi}", "disk: {max: 256Mi}\n  devices: [camera]", 1)
	whole = strings.Replace(whole, "count: all", "count: 3\n  prefer: [{label: {sensor: cam-1}, weight: 50}]\n  spread: zone", 1)
	whole = strings.Replace(whole, "gate: {bake: 60s}", "gate: {bake: 60s, deadline: 5m, metrics: [{name: p99, scrape: {port: http, path: /metrics, query: q}, worse: 20%}]}", 1)
	whole = strings.Replace(whole, "to: /etc/relay.toml}", "to: /etc/relay.toml, mode: \"0600\"}", 1)
	documents := map[string]string{
		"unit": whole, "profile": edgeSmall,
		"site": siteFile + "forbidden: [10.9.0.0/16, \"fd12::/48\"]\nburned: [" + sha + "]\nfreeze: [{from: \"2026-12-20T00:00:00Z\", to: \"2027-01-04T00:00:00Z\", why: holidays}]\nrollout: {bake: 5m, maxUnavailable: 10%, missing: 20%}\ngate: {bake: 1m}\nevents: {a: b}\nsnapshots: {}\nretention: {}\n",
	}
	for kind, text := range documents {
		var tree any
		if err := yaml.Unmarshal([]byte(text), &tree); err != nil {
			t.Fatal(err)
		}
		good, err := json.Marshal(tree)
		if err != nil {
			t.Fatal(err)
		}
		if schema, decoder := j.judge(t, kind, string(good)); schema != nil || decoder != nil {
			t.Fatalf("%s: the schema says %v, the decoder %v", kind, schema, decoder)
		}
		tried, bad := 0, 0
		mutate(tree, func() {
			changed, err := json.Marshal(tree)
			if err != nil {
				t.Fatal(err)
			}
			tried++
			schema, decoder := j.judge(t, kind, string(changed))
			if schema != nil {
				bad++
			}
			if (schema == nil) != (decoder == nil) {
				t.Errorf("%s\nthe schema says: %v\nthe decoder says: %v", changed, schema, decoder)
			}
		})
		if kind == "unit" && (tried < 500 || bad < tried/2 || bad == tried) {
			t.Errorf("%s: %d documents tried, %d refused: that shows nothing", kind, tried, bad)
		}
	}
}

// mutate changes one thing of a tree after the other, calls try, and puts it back.
func mutate(tree any, try func()) {
	replacements := []any{"text", "", "10%", "64Mi", "/a/../b", "\x00", "/\u202e", "/\u009b", "a\r", "a\r\n\tb", strings.Repeat("a", maxText+1), 0, 3, 70000, -1, 1.5, true, nil, []any{}, []any{"a", "a"},
		map[string]any{"x": "y"}}
	switch node := tree.(type) {
	case map[string]any:
		for key, value := range node {
			for _, other := range replacements {
				node[key] = other
				try()
			}
			delete(node, key)
			try()
			node[key] = value
			mutate(value, try)
		}
		for _, key := range []string{"unknown", "http", "tcp", "wasm", "port", ""} {
			if _, ok := node[key]; !ok {
				node[key] = map[string]any{"port": "http"}
				try()
				delete(node, key)
			}
		}
	case []any:
		for i, value := range node {
			for _, other := range replacements {
				node[i] = other
				try()
			}
			node[i] = value
			mutate(value, try)
		}
	}
}
