package policy

import (
	"bytes"
	"encoding"
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/reconciler/template"
	"github.com/kindos/kmo/registry"
	shipped "github.com/kindos/kmo/rego"
)

// What the reconciler puts where Input says any.
func parts() map[string]reflect.Type {
	return map[string]reflect.Type{
		"Unit.Before": reflect.TypeFor[template.Unit](), "Unit.After": reflect.TypeFor[template.Unit](),
		"Unit.Workloads": reflect.TypeFor[[]backends.Workload](), "Unit.Images": reflect.TypeFor[[]registry.Description](),
	}
}

// schemas makes the JSON Schema of the input document: from the Go types what there is, from their comments what it is, from the shape what
// must be.
type schemas struct {
	t     *testing.T
	docs  map[string]map[string]string // by package path, of a type, or a type and a field
	defs  map[string]any
	parts map[string]reflect.Type
}

func (s *schemas) of(t reflect.Type, shape *shape, where string) map[string]any {
	out := s.plain(t, shape, where)
	if want := map[kind]string{text: "string", truth: "boolean", integer: "integer", list: "array", object: "object"}[shape.kind]; want != "" && want != out["type"] {
		s.t.Errorf("%s: its type says %v, its shape %s", where, out["type"], want)
	}
	if nullable := slices.Contains([]reflect.Kind{reflect.Slice, reflect.Map, reflect.Pointer, reflect.Interface}, t.Kind()); nullable && !shape.must && out["type"] != nil {
		out["type"] = []any{out["type"], "null"}
	}
	return out
}

func (s *schemas) plain(t reflect.Type, shape *shape, where string) map[string]any {
	switch {
	case t == reflect.TypeFor[time.Time]():
		return map[string]any{"type": "string", "format": "date-time"}
	case t.Implements(reflect.TypeFor[encoding.TextMarshaler]()), reflect.PointerTo(t).Implements(reflect.TypeFor[encoding.TextMarshaler]()):
		return map[string]any{"type": "string"}
	case t == reflect.TypeFor[[]byte]():
		return map[string]any{"type": "string", "contentEncoding": "base64"}
	}
	switch t.Kind() {
	case reflect.Pointer:
		return s.plain(t.Elem(), shape, where)
	case reflect.Slice:
		return map[string]any{"type": "array", "items": s.of(t.Elem(), orAnything(shape.elem), where+"[_]")}
	case reflect.Map:
		return map[string]any{"type": "object", "additionalProperties": s.of(t.Elem(), orAnything(shape.elem), where+"[_]")}
	case reflect.Struct:
		return s.object(t, shape, where)
	case reflect.Bool:
		return map[string]any{"type": "boolean"}
	case reflect.Int, reflect.Int64, reflect.Uint32:
		return map[string]any{"type": "integer"}
	case reflect.String:
		return map[string]any{"type": "string"}
	}
	s.t.Fatalf("%s: no schema for %v", where, t)
	return nil
}

func (s *schemas) object(t reflect.Type, shape *shape, where string) map[string]any {
	properties, required := map[string]any{}, []string{}
	for _, f := range reflect.VisibleFields(t) {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if f.Name == "_" || name == "-" {
			continue
		}
		below := shape.fields[name]
		if below == nil {
			below = orAnything(shape.elem)
		}
		property := s.property(t, f, below, where+"."+name)
		doc := f.Tag.Get("doc")
		if doc == "" {
			doc = s.doc(t.PkgPath(), t.Name()+"."+f.Name)
		}
		if doc != "" {
			property["description"] = doc
		}
		if properties[name] = property; below.must {
			required = append(required, name)
		}
	}
	for name := range shape.fields {
		if properties[name] == nil {
			s.t.Errorf("%s.%s: the shape has it, the type does not", where, name)
		}
	}
	out := map[string]any{"type": "object", "properties": properties}
	if len(required) > 0 {
		slices.Sort(required)
		out["required"] = required
	}
	if shape.closed {
		out["additionalProperties"] = false
	}
	return out
}

// property is the schema of a field; that of a unit's template, which is there twice, is a definition.
func (s *schemas) property(t reflect.Type, f reflect.StructField, shape *shape, where string) map[string]any {
	part := s.parts[t.Name()+"."+f.Name]
	if part == nil {
		return s.of(f.Type, shape, where)
	}
	if part.Kind() == reflect.Slice {
		return s.of(part, shape, where)
	}
	if f.Name == "After" {
		def := s.plain(part, shape, where)
		def["type"], def["description"] = []any{"object", "null"}, s.doc(part.PkgPath(), part.Name())
		s.defs["template"] = def
	}
	return map[string]any{"$ref": "#/$defs/template"}
}

func orAnything(s *shape) *shape {
	if s == nil {
		return of(anything)
	}
	return s
}

// doc is what the source says of a type or a field.
func (s *schemas) doc(pkg, name string) string {
	if s.docs[pkg] == nil {
		s.docs[pkg] = map[string]string{}
		files, _ := filepath.Glob(filepath.Join("..", strings.TrimPrefix(pkg, "github.com/kindos/kmo/"), "*.go"))
		for _, path := range files {
			file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ParseComments)
			if err != nil {
				s.t.Fatal(err)
			}
			s.read(s.docs[pkg], file)
		}
	}
	return s.docs[pkg][name]
}

func (*schemas) read(docs map[string]string, file *ast.File) {
	line := func(group *ast.CommentGroup) string { return strings.Join(strings.Fields(group.Text()), " ") }
	for _, decl := range file.Decls {
		gen, is := decl.(*ast.GenDecl)
		if !is {
			continue
		}
		for _, spec := range gen.Specs {
			named, is := spec.(*ast.TypeSpec)
			if !is {
				continue
			}
			docs[named.Name.Name] = line(gen.Doc)
			fields, is := named.Type.(*ast.StructType)
			if !is {
				continue
			}
			for _, field := range fields.Fields.List {
				for _, name := range field.Names {
					docs[named.Name.Name+"."+name.Name] = strings.TrimSpace(line(field.Doc) + " " + line(field.Comment))
				}
			}
		}
	}
}

// TestInputSchema: input.schema.json is what the types and the shape say. go generate writes it.
func TestInputSchema(t *testing.T) {
	s := &schemas{t: t, docs: map[string]map[string]string{}, defs: map[string]any{}, parts: parts()}
	top := s.of(reflect.TypeFor[Input](), inputShape(), "input")
	top["$schema"], top["$id"], top["$defs"] = "https://json-schema.org/draft/2020-12/schema", "urn:kmo:schema:input:1", s.defs
	top["title"], top["description"] = "input", s.doc("github.com/kindos/kmo/policy", "Input")
	top["properties"].(map[string]any)["version"].(map[string]any)["const"] = 1
	var want bytes.Buffer
	enc := json.NewEncoder(&want)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", " ")
	if err := enc.Encode(top); err != nil {
		t.Fatal(err)
	}
	const path = "../docs/schema/input.schema.json" // a link to the file here, which is embedded
	if *update {
		if err := os.WriteFile(path, want.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want.Bytes()) {
		t.Error("input.schema.json is not what the types say: run go generate ./policy")
	}
}

// Every input of the corpus is as the schema says, but for those that ask for what nothing knows.
func TestInputSchemaTakesTheCorpus(t *testing.T) {
	c, err := readCorpus()
	if err != nil {
		t.Fatal(err)
	}
	text, err := Schema()
	if err != nil {
		t.Fatal(err)
	}
	document, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	compiler := jsonschema.NewCompiler()
	if err := compiler.AddResource("input.json", document); err != nil {
		t.Fatal(err)
	}
	schema, err := compiler.Compile("input.json")
	if err != nil {
		t.Fatal(err)
	}
	judge := func(name string, patch []operation) {
		text, err := c.input(patch)
		if err != nil {
			t.Fatal(err)
		}
		value, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
		if err != nil {
			t.Fatal(err)
		}
		_, refused := decode(text)
		if err := schema.Validate(value); err != nil && refused == nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	judge("base", nil)
	for _, id := range shipped.IDs() {
		for _, patches := range []map[string][]operation{c.cases[id].Trip, c.cases[id].Near} {
			for _, name := range slices.Sorted(maps.Keys(patches)) {
				judge(fmt.Sprintf("%s, %s", id, name), patches[name])
			}
		}
	}
	if err := schema.Validate(map[string]any{}); err == nil {
		t.Error("it takes an empty document")
	}
}
