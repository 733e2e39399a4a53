package template

import (
	"encoding"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/kindos/kmo/policy/refusal"
)

// maxText bounds, in characters, a string whose type has no smaller bound.
const maxText = 16384

// decoder fills Go values from a file's tree by their types. It is immutable once made.
type decoder struct {
	structs map[reflect.Type]*shape
	texts   map[reflect.Type]textShape
}

// shape is a struct as a mapping.
type shape struct {
	fields  []field
	exactly bool // exactly one of the fields marked one is set, not at most one
}

// field is a key of a mapping with what its tags say.
type field struct {
	name     string
	index    int
	need     bool
	one      bool
	min, max int64    // of a number; max of a text, in characters
	items    [2]int   // of a list
	enum     []string // words a string, or each string of a list, may be
	unique   bool
	doc      string
}

// textShape is a text's rule with its pattern compiled.
type textShape struct {
	textRule
	match *regexp.Regexp
}

// newDecoder prepares the types of the three files.
func newDecoder() *decoder {
	d := &decoder{structs: make(map[reflect.Type]*shape), texts: make(map[reflect.Type]textShape)}
	for t, rule := range textRules() {
		d.texts[t] = textShape{rule, regexp.MustCompile(`^(?:` + rule.pattern + `)$`)}
	}
	for _, t := range []reflect.Type{reflect.TypeFor[Config](), reflect.TypeFor[Unit](), reflect.TypeFor[Profile]()} {
		d.learn(t)
	}
	return d
}

// Decode reads one YAML file of kMO's own, the agent's for one, as strictly as a site's: data into into, a pointer to a struct whose
// tags are those of this package's types. Keys that are not there leave what into has. Every fault of the file is a refusal, joined.
func Decode(file string, data []byte, into any) error {
	d, p := newDecoder(), &problems{}
	d.learn(reflect.TypeOf(into).Elem())
	if n := parse(file, data, p); n != nil {
		d.decode(n, into, p)
	}
	return p.err()
}

// learn reads the tags of a type and of all types below it.
func (d *decoder) learn(t reflect.Type) {
	if _, ok := d.texts[t]; ok || d.structs[t] != nil {
		return
	}
	switch t.Kind() {
	case reflect.Pointer, reflect.Slice, reflect.Map:
		d.learn(t.Elem())
	case reflect.Struct:
		s := &shape{}
		d.structs[t] = s
		for i := range t.NumField() {
			f := t.Field(i)
			if f.Name == "_" {
				s.exactly = true
				continue
			}
			s.fields = append(s.fields, readTags(i, f.Tag))
			d.learn(f.Type)
		}
	}
}

// readTags reads the tags of a field as types.go lays them down.
func readTags(index int, tag reflect.StructTag) field {
	f := field{index: index, need: tag.Get("need") != "", one: tag.Get("one") != "", unique: tag.Get("unique") != "", doc: tag.Get("doc")}
	f.name, _, _ = strings.Cut(tag.Get("json"), ",")
	f.min, _ = strconv.ParseInt(tag.Get("min"), 10, 64)
	f.max, _ = strconv.ParseInt(tag.Get("max"), 10, 64)
	f.enum = strings.Fields(tag.Get("enum"))
	low, high, _ := strings.Cut(tag.Get("items"), "-")
	f.items[0], _ = strconv.Atoi(low)
	f.items[1], _ = strconv.Atoi(high)
	return f
}

// decode fills into, a pointer to a struct, from a mapping. Keys that are not there leave what into has.
func (d *decoder) decode(n *node, into any, p *problems) {
	d.value(n, reflect.ValueOf(into).Elem(), field{}, "", p)
}

// value fills one value. rules is what the tags of the field it belongs to say, path the keys that lead to it.
func (d *decoder) value(n *node, v reflect.Value, rules field, path string, p *problems) {
	if n.other == "alias" {
		return // recorded when the file was read
	}
	if n.other == "null" {
		p.add(n, path, "no value", "a value, or no key at all")
		return
	}
	if text, ok := d.texts[v.Type()]; ok {
		d.text(n, v, text, path, p)
		return
	}
	switch v.Kind() {
	case reflect.Pointer:
		made := reflect.New(v.Type().Elem())
		d.value(n, made.Elem(), rules, path, p)
		v.Set(made)
	case reflect.Struct:
		d.structure(n, v, path, p)
	case reflect.Map:
		d.table(n, v, rules, path, p)
	case reflect.Slice:
		d.list(n, v, rules, path, p)
	case reflect.String:
		str(n, v, rules, path, p)
	case reflect.Bool:
		if n.kind != scalar || n.other != "bool" || n.text != "true" && n.text != "false" {
			p.add(n, path, n.what(), "true or false")
			return
		}
		v.SetBool(n.text == "true")
	case reflect.Int, reflect.Int64:
		number(n, v, rules, path, p)
	default:
		p.add(n, path, n.what(), "no such key: nothing reads a value of its type, "+v.Type().String())
	}
}

// structure fills a struct from a mapping.
func (d *decoder) structure(n *node, v reflect.Value, path string, p *problems) {
	if n.kind != mapping {
		p.add(n, path, n.what(), "a mapping: key: value")
		return
	}
	if v.Type() == reflect.TypeFor[Open]() {
		return
	}
	s := d.structs[v.Type()]
	var chosen []string
	for i, key := range n.keys {
		at := slices.IndexFunc(s.fields, func(f field) bool { return f.name == key.text })
		if at < 0 && p.full() {
			p.more++ // a hint costs time
			continue
		}
		if at < 0 {
			p.add(key, join(path, key.text), "the unknown key "+show(key.text), s.hint(key.text))
			continue
		}
		f := s.fields[at]
		if f.one {
			chosen = append(chosen, f.name)
		}
		d.value(n.values[i], v.Field(f.index), f, join(path, f.name), p)
	}
	for _, f := range s.fields {
		if f.need && n.get(f.name) == nil {
			p.add(n, join(path, f.name), "no such key", "it: "+f.doc)
		}
	}
	if len(chosen) > 1 || s.exactly && len(chosen) == 0 {
		got := "none of them"
		if len(chosen) > 1 {
			got = strings.Join(chosen, " and ")
		}
		p.add(n, path, got, "one of "+words(s.names(true)))
	}
}

// names lists the keys of a mapping, or those of which only one may be there.
func (s *shape) names(one bool) []string {
	var names []string
	for _, f := range s.fields {
		if f.one || !one {
			names = append(names, f.name)
		}
	}
	return names
}

// hint says which keys there are and which one was meant.
func (s *shape) hint(key string) string {
	names := s.names(false)
	if len(names) == 0 {
		return "no key"
	}
	return "one of " + words(names) + meant(key, names)
}

// meant asks after the name that is nearest to what was written, "" if none is near.
func meant(wrote string, names []string) string {
	best, least := "", 1+len(wrote)/3
	for _, name := range names {
		if n := distance(strings.ToLower(wrote), strings.ToLower(name)); n <= least && (best == "" || n < least) {
			best, least = name, n
		}
	}
	if best == "" {
		return ""
	}
	return "; did you mean " + best + "?"
}

// distance is the number of letters to change, add, drop or swap that turns a into b.
func distance(a, b string) int {
	if len(a) > 64 || len(b) > 64 {
		return 64
	}
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
	}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			rows[i][j] = min(rows[i-1][j]+1, rows[i][j-1]+1, rows[i-1][j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				rows[i][j] = min(rows[i][j], rows[i-2][j-2]+1)
			}
		}
	}
	return rows[len(a)][len(b)]
}

// words lists names for people.
func words(names []string) string {
	if len(names) < 2 {
		return strings.Join(names, "")
	}
	last := len(names) - 1
	return strings.Join(names[:last], ", ") + " or " + names[last]
}

// table fills a map from a mapping.
func (d *decoder) table(n *node, v reflect.Value, rules field, path string, p *problems) {
	if n.kind != mapping {
		p.add(n, path, n.what(), "a mapping: key: value")
		return
	}
	made := reflect.MakeMapWithSize(v.Type(), len(n.keys))
	for i, key := range n.keys {
		k, value := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
		below := join(path, key.text)
		d.value(key, k, field{}, below, p)
		d.value(n.values[i], value, rules, below, p)
		made.SetMapIndex(k, value)
	}
	v.Set(made)
}

// list fills a slice from a list. What rules says of words holds for its members.
func (d *decoder) list(n *node, v reflect.Value, rules field, path string, p *problems) {
	if n.kind != list {
		p.add(n, path, n.what(), "a list: [a, b]")
		return
	}
	if low, high := rules.items[0], rules.items[1]; high > 0 && (len(n.values) < low || len(n.values) > high) {
		p.add(n, path, fmt.Sprintf("%d members", len(n.values)), fmt.Sprintf("%d to %d", low, high))
		return
	}
	member := field{enum: rules.enum}
	if v.Type().Elem().Kind() == reflect.Slice { // a list of commands: each has a word, at least
		member.items = [2]int{1, 64}
	}
	made := reflect.MakeSlice(v.Type(), len(n.values), len(n.values))
	seen := make(map[string]bool, len(n.values))
	for i, value := range n.values {
		below := fmt.Sprintf("%s[%d]", path, i)
		d.value(value, made.Index(i), member, below, p)
		if rules.unique && value.kind == scalar {
			if seen[value.text] {
				p.add(value, below, value.what()+" again", "each once")
			}
			seen[value.text] = true
		}
	}
	v.Set(made)
}

// text fills a value of a text type.
func (d *decoder) text(n *node, v reflect.Value, rule textShape, path string, p *problems) {
	if n.kind != scalar || n.other != "" && (rule.number == 0 || n.other != "int") {
		p.add(n, path, n.what(), rule.want)
		return
	}
	if len(n.text) > 4*rule.max || utf8.RuneCountInString(n.text) > rule.max || !rule.match.MatchString(n.text) {
		p.add(n, path, n.what(), rule.want)
		return
	}
	if u, ok := v.Addr().Interface().(encoding.TextUnmarshaler); ok {
		if err := u.UnmarshalText([]byte(n.text)); err != nil {
			p.add(n, path, n.what(), strings.TrimPrefix(refusal.Clip(err.Error(), 2*maxShown), "want "))
		}
		return
	}
	v.SetString(n.text)
}

// str fills a plain string. A scalar that some YAML reader would not take for a string needs quotes.
func str(n *node, v reflect.Value, rules field, path string, p *problems) {
	limit := int64(maxText)
	if rules.max > 0 {
		limit = rules.max
	}
	switch {
	case n.kind != scalar:
		p.add(n, path, n.what(), "a text")
	case len(rules.enum) > 0 && !slices.Contains(rules.enum, n.text):
		p.add(n, path, n.what(), words(rules.enum))
	case n.other != "":
		p.add(n, path, n.what(), show(n.text)+" in quotes, if the text is meant")
	case int64(utf8.RuneCountInString(n.text)) > limit:
		p.add(n, path, fmt.Sprintf("%d characters", utf8.RuneCountInString(n.text)), fmt.Sprintf("at most %d", limit))
	case rules.need && n.text == "":
		p.add(n, path, "an empty text", "a text")
	default:
		v.SetString(n.text)
	}
}

// number fills an integer: plain decimal digits, no sign, no leading zero.
func number(n *node, v reflect.Value, rules field, path string, p *problems) {
	want := fmt.Sprintf("a whole number, %d to %d", rules.min, rules.max)
	plain := n.kind == scalar && n.other == "int" && strings.Trim(n.text, "0123456789") == "" && (n.text == "0" || n.text[0] != '0')
	value, err := strconv.ParseInt(n.text, 10, 64)
	if !plain || err != nil || value < rules.min || value > rules.max {
		p.add(n, path, n.what(), want)
		return
	}
	v.SetInt(value)
}
