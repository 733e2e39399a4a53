package policy

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/kindos/kmo/policy/refusal"
)

// document reads an input document straight into OPA's values, and holds it against what the rules take for granted on the way. Reading
// with encoding/json and converting afterwards takes three times as long, most of a decision.
type document struct {
	text  []byte // valid JSON
	at    int
	terms []ast.Term           // allocated ahead, many at a time
	seen  map[string]*ast.Term // short texts, which repeat from unit to unit
	free  *shape               // of what no rule looks at
}

// decode refuses a document that is too large, not JSON, names a member twice, or is not as the rules expect, so that
// no rule passes over a value for its type.
func decode(text []byte) (ast.Object, error) {
	if len(text) > maxInput {
		return nil, &refusal.Error{Code: codeLimit, Subject: "policy input", Got: fmt.Sprintf("%d bytes", len(text)), Want: fmt.Sprintf("at most %d", maxInput)}
	}
	if !json.Valid(text) {
		return nil, malformed("input", "no JSON, or more than one value", "one JSON object")
	}
	d := document{text: text, seen: map[string]*ast.Term{}, free: of(anything)}
	root, f := d.value(inputShape())
	if f != nil {
		return nil, malformed("input"+f.path, f.got, f.want)
	}
	input, _ := root.Value.(ast.Object)
	return input, consistent(input)
}

// consistent checks what holds between members.
func consistent(input ast.Object) error {
	if version := member(input, "version"); version.Compare(ast.Number("1")) != 0 {
		return malformed("input.version", version.String(), "1")
	}
	if commit := member(member(input, "change"), "commit"); commit.Compare(member(input, "commit")) != 0 {
		return malformed("input.change.commit", commit.String(), "that of input.commit")
	}
	units, ok := member(input, "units").(*ast.Array)
	if !ok { // none, or null
		return nil
	}
	seen := map[ast.Value]bool{}
	for i := range units.Len() {
		name := member(units.Elem(i).Value, "name")
		if name == ast.String("") || seen[name] {
			return malformed(fmt.Sprintf("input.units[%d].name", i), name.String(), "each unit once, by name")
		}
		seen[name] = true
	}
	return nil
}

// member is nil where value is no object, or has no such member.
func member(value ast.Value, key string) ast.Value {
	if object, ok := value.(ast.Object); ok {
		if term := object.Get(ast.StringTerm(key)); term != nil {
			return term.Value
		}
	}
	return nil
}

func (d *document) term(value ast.Value) *ast.Term {
	if len(d.terms) == 0 {
		d.terms = make([]ast.Term, 256)
	}
	term := &d.terms[0]
	d.terms = d.terms[1:]
	term.Value = value
	return term
}

// next is the next byte that is not space.
func (d *document) next() byte {
	for {
		switch b := d.text[d.at]; b {
		case ' ', '\t', '\n', '\r':
			d.at++
		default:
			return b
		}
	}
}

func (d *document) value(s *shape) (*ast.Term, *fault) {
	switch d.next() {
	case '{':
		if f := s.is(object, "an object"); f != nil {
			return nil, f
		}
		return d.object(s)
	case '[':
		if f := s.is(list, "a list"); f != nil {
			return nil, f
		}
		return d.list(s)
	case '"':
		value := d.string()
		if f := s.is(text, ""); f != nil {
			f.got = refusal.Clip(value.String(), 100)
			return nil, f
		}
		return value, nil
	case 't':
		d.at += len("true")
		return d.term(ast.Boolean(true)), s.is(truth, "true")
	case 'f':
		d.at += len("false")
		return d.term(ast.Boolean(false)), s.is(truth, "false")
	case 'n':
		d.at += len("null")
		return d.term(ast.NullValue), s.null()
	}
	return d.number(s)
}

func (d *document) object(s *shape) (*ast.Term, *fault) {
	var members [][2]*ast.Term
	var missing []string
	d.at++
	for d.next() != '}' {
		if d.text[d.at] == ',' {
			d.at++
			d.next()
		}
		key := d.string()
		named, _ := key.Value.(ast.String)
		name := string(named)
		d.next()
		d.at++ // the colon
		field, known := s.field(name, d.free)
		if !known {
			return nil, &fault{path: "." + name, got: "unknown", want: "no field that no rule knows"}
		}
		value, f := d.value(field)
		if f != nil {
			return nil, f.below("." + name)
		}
		members = append(members, [2]*ast.Term{key, value})
	}
	d.at++
	if twice(members) {
		return nil, &fault{got: "a member named twice", want: "each member once"}
	}
	for name, field := range s.fields {
		there := func(m [2]*ast.Term) bool { return m[0].Value == ast.String(name) }
		if field.must && !slices.ContainsFunc(members, there) {
			missing = append(missing, name)
		}
	}
	if len(missing) > 0 {
		slices.Sort(missing)
		return nil, &fault{path: "." + missing[0], got: "missing", want: s.fields[missing[0]].kind.String()}
	}
	return d.term(ast.NewObject(members...)), nil
}

func twice(members [][2]*ast.Term) bool {
	if len(members) > 24 {
		seen := make(map[ast.Value]bool, len(members))
		for _, m := range members {
			seen[m[0].Value] = true
		}
		return len(seen) < len(members)
	}
	for i, m := range members {
		for _, n := range members[:i] {
			if m[0].Value == n[0].Value {
				return true
			}
		}
	}
	return false
}

func (d *document) list(s *shape) (*ast.Term, *fault) {
	elem := s.elem
	if elem == nil {
		elem = s
	}
	var elems []*ast.Term
	d.at++
	for d.next() != ']' {
		if d.text[d.at] == ',' {
			d.at++
		}
		value, f := d.value(elem)
		if f != nil {
			return nil, f.below("[" + strconv.Itoa(len(elems)) + "]")
		}
		elems = append(elems, value)
	}
	d.at++
	return d.term(ast.NewArray(elems...)), nil
}

// string reads a text. Only one with a backslash or a byte above ASCII needs the decoder.
func (d *document) string() *ast.Term {
	start := d.at
	plain := true
	for d.at++; d.text[d.at] != '"'; d.at++ {
		if d.text[d.at] == '\\' {
			plain = false
			d.at++
		} else if d.text[d.at] >= 0x80 {
			plain = false
		}
	}
	d.at++
	quoted := d.text[start:d.at]
	raw := quoted[1 : len(quoted)-1]
	if !plain {
		var decoded string
		_ = json.Unmarshal(quoted, &decoded) // valid: the whole document is
		return d.term(ast.String(decoded))
	}
	if len(raw) > 48 {
		return d.term(ast.String(raw))
	}
	term := d.seen[string(raw)]
	if term == nil {
		term = d.term(ast.String(raw))
		d.seen[string(raw)] = term
	}
	return term
}

// number reads a number. One too long or too large to compare in no time is refused wherever it stands.
func (d *document) number(s *shape) (*ast.Term, *fault) {
	start := d.at
	for d.at < len(d.text) && (d.text[d.at] == '-' || d.text[d.at] == '+' || d.text[d.at] == '.' || d.text[d.at]|0x20 == 'e' || d.text[d.at]-'0' < 10) {
		d.at++
	}
	digits := string(d.text[start:d.at])
	if f := s.is(integer, digits); f != nil {
		return nil, f
	}
	if _, err := strconv.ParseInt(digits, 10, 64); err == nil {
		return d.term(ast.Number(digits)), nil
	} else if s.kind == integer {
		return nil, &fault{got: digits, want: "a whole number"}
	}
	_, err := strconv.ParseFloat(digits, 64)
	if exponent := strings.IndexAny(digits, "eE"); err != nil || len(digits) > 32 || exponent >= 0 && len(digits)-exponent > len("e-308") {
		return nil, &fault{got: digits, want: "a number of at most 32 characters within 64 bits"}
	}
	return d.term(ast.Number(digits)), nil
}
