package template

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v4"
	"go.yaml.in/yaml/v4/plugin/loaderlimits"

	"github.com/kindos/kmo/policy/refusal"
)

// Limits of one YAML file. They are checked on the bytes before a tree is built, so that a hostile file costs no more than reading it.
const (
	maxFile     = 1 << 20 // bytes
	maxDepth    = 16      // nested mappings and lists
	maxMarks    = 20_000  // line ends, commas, colons and opening brackets: there are no more values than that
	maxProblems = 50      // reported for one file
	maxShown    = 80      // bytes of a text from outside that are shown
)

// kind is what a node of a file is.
type kind int

const (
	scalar kind = iota
	list
	mapping
)

// node is a value of a file with the place where it stands.
type node struct {
	file      string
	line, col int
	kind      kind
	text      string // of a scalar
	other     string // what a plain scalar is to YAML if it is no string: "null", "bool", "int", "float", "timestamp"; "" otherwise
	keys      []*node
	values    []*node // of a mapping, beside keys; of a list
}

// get returns the value of a mapping's key, nil if there is none.
func (n *node) get(key string) *node {
	if n == nil || n.kind != mapping {
		return nil
	}
	for i, k := range n.keys {
		if k.text == key {
			return n.values[i]
		}
	}
	return nil
}

// at walks down a path of keys and of positions in lists, as far as it leads: a fault in something that is not there stands where
// it should be.
func (n *node) at(path ...any) *node {
	for _, step := range path {
		var next *node
		switch step := step.(type) {
		case string:
			next = n.get(step)
		case int:
			if n.kind == list && step < len(n.values) {
				next = n.values[step]
			}
		}
		if next == nil {
			break
		}
		n = next
	}
	return n
}

// what names the node's kind for people.
func (n *node) what() string {
	switch {
	case n.kind == mapping:
		return "a mapping"
	case n.kind == list:
		return "a list"
	case n.other == "null":
		return "nothing"
	case n.other != "":
		return show(n.text) + ", which YAML reads as " + n.other
	}
	return show(n.text)
}

// show quotes a text from outside.
func show(text string) string { return `"` + refusal.Clip(text, maxShown) + `"` }

// problems are the faults of one file.
type problems struct {
	list []*refusal.Error
	at   []*node // where each of them stands
	more int
}

// full says whether no further fault of the file is shown.
func (p *problems) full() bool { return len(p.list) >= maxProblems }

// add records a fault at a node. field is the path of keys that leads there.
func (p *problems) add(n *node, field, got, want string) {
	if p.full() {
		p.more++
		return
	}
	subject := fmt.Sprintf("%s:%d:%d", n.file, n.line, n.col)
	if field != "" {
		subject += " " + refusal.Clip(field, maxShown)
	}
	p.at = append(p.at, n)
	p.list = append(p.list, &refusal.Error{Code: "E_DECODE", Subject: subject, Got: got, Want: want})
}

// err joins the faults in the order of the file, nil if there are none.
func (p *problems) err() error {
	order := make([]int, len(p.list))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int {
		x, y := p.at[a], p.at[b]
		return cmp.Or(strings.Compare(x.file, y.file), cmp.Compare(x.line, y.line), cmp.Compare(x.col, y.col))
	})
	var all []error
	for _, i := range order {
		all = append(all, p.list[i])
	}
	if p.more > 0 {
		last := *p.list[order[len(order)-1]]
		last.Got = fmt.Sprintf("%s (and %d more faults in this file)", last.Got, p.more)
		all[len(all)-1] = &last
	}
	return errors.Join(all...)
}

// parse reads one YAML file: one document, one mapping, nothing that needs resolving.
func parse(file string, data []byte, p *problems) *node {
	top := &node{file: file, line: 1, col: 1, kind: mapping}
	if !screen(top, data, p) {
		return nil
	}
	loader, err := yaml.NewLoader(bytes.NewReader(data), yaml.WithUniqueKeys(false),
		yaml.WithPlugin(loaderlimits.New(loaderlimits.DepthValue(maxDepth))))
	if err != nil {
		p.add(top, "", refusal.Clip(err.Error(), maxShown), "one YAML mapping")
		return nil
	}
	var document, second yaml.Node
	if err := loader.Load(&document); err != nil {
		p.syntax(top, err)
		return nil
	}
	if err := loader.Load(&second); err == nil {
		p.add(&node{file: file, line: second.Line, col: second.Column}, "", "another document", "one document in a file")
	} else if !errors.Is(err, io.EOF) {
		p.syntax(top, err)
	}
	if len(document.Content) != 1 || document.Content[0].Kind != yaml.MappingNode {
		p.add(top, "", "no mapping", "one YAML mapping: key: value")
		return nil
	}
	return convert(file, document.Content[0], "", p)
}

// syntax records what the YAML reader has to say.
func (p *problems) syntax(top *node, err error) {
	var fault *yaml.LoadError
	switch {
	case errors.Is(err, io.EOF):
		p.add(top, "", "an empty file", "one YAML mapping")
	case errors.As(err, &fault):
		at := *top
		if fault.Mark.Line > 0 {
			at.line, at.col = fault.Mark.Line, max(1, fault.Mark.Column)
		}
		text, want := fault.Message, "YAML"
		if fault.ContextMsg != "" {
			text += " (" + fault.ContextMsg + ")"
		}
		if strings.Contains(fault.Message, "max depth") {
			text, want = "too deep", fmt.Sprintf("at most %d nested mappings and lists", maxDepth)
		}
		p.add(&at, "", refusal.Clip(text, 2*maxShown), want)
	default:
		p.add(top, "", refusal.Clip(err.Error(), 2*maxShown), "YAML")
	}
}

// screen looks at the bytes alone. It says whether they may be parsed.
func screen(top *node, data []byte, p *problems) bool {
	switch {
	case len(data) > maxFile:
		p.add(top, "", fmt.Sprintf("%d bytes or more", len(data)), fmt.Sprintf("at most %d bytes", maxFile))
	case bytes.HasPrefix(data, []byte("\xef\xbb\xbf")):
		p.add(top, "", "a byte order mark", "UTF-8 without one")
	case !utf8.Valid(data):
		p.add(place(top, data, invalidAt(data)), "", "bytes that are no UTF-8", "UTF-8")
	case unseen(data).what != "":
		p.add(place(top, data, unseen(data).at), "", unseen(data).what, "text that people see")
	case marks(data) > maxMarks:
		p.add(top, "", fmt.Sprintf("%d lines, commas, colons and brackets", marks(data)), fmt.Sprintf("at most %d", maxMarks))
	case bytes.HasPrefix(data, []byte("%")) || bytes.Contains(data, []byte("\n%")):
		p.add(place(top, data, bytes.Index(append([]byte("\n"), data...), []byte("\n%"))), "", "a YAML directive", "no line that begins with %")
	default:
		return true
	}
	return false
}

// hidden says of a character that a reviewer would not see what it does: controls, line ends that only YAML takes for such, and
// those that turn the direction of reading.
func hidden(r rune) bool {
	switch {
	case r == '\n', r == '\t', r == '\r':
		return false
	case r < ' ', r == 0x7f, r >= 0x80 && r < 0xa0:
		return true
	case r == 0x2028, r == 0x2029, r >= 0x202a && r <= 0x202e, r >= 0x2066 && r <= 0x2069:
		return true
	case r == 0x200b, r == 0x200e, r == 0x200f, r == 0x2060, r == 0xfeff:
		return true
	}
	return false
}

// finding is something in a text, and the byte where it stands.
type finding struct {
	at   int
	what string // "" if there is none
}

// unseen finds the first thing in a text that people do not see, or that makes them see another text.
func unseen(text []byte) finding {
	if at := bytes.IndexFunc(text, hidden); at >= 0 {
		r, _ := utf8.DecodeRune(text[at:])
		return finding{at, fmt.Sprintf("the character %U, which people do not see", r)}
	}
	for at, b := range text {
		if b == '\r' && (at+1 == len(text) || text[at+1] != '\n') {
			return finding{at, "a carriage return alone, which ends a line that people see go on"}
		}
	}
	return finding{}
}

// marks counts the bytes that can begin or end a value: a bound on the number of values that costs one pass and no memory.
func marks(data []byte) int {
	n := 1
	for i, b := range data {
		switch b {
		case '\n', '\r', ',', ':', '[', '{':
			n++
		case '-', '?':
			if i+1 < len(data) && data[i+1] <= ' ' {
				n++
			}
		}
	}
	return n
}

// place is the line and column of a byte.
func place(top *node, data []byte, at int) *node {
	before := data[:max(0, min(at, len(data)))]
	return &node{file: top.file, line: 1 + bytes.Count(before, []byte("\n")), col: len(before) - bytes.LastIndexByte(before, '\n')}
}

// invalidAt is where data stops being UTF-8.
func invalidAt(data []byte) int {
	at := 0
	for at < len(data) {
		r, size := utf8.DecodeRune(data[at:])
		if r == utf8.RuneError && size == 1 {
			break
		}
		at += size
	}
	return at
}

// convert turns YAML's tree into ours, and records everything in it that would need resolving (anchors, aliases, tags, merge keys), and what
// an escape hides in a key or a value.
func convert(file string, from *yaml.Node, field string, p *problems) *node {
	n := &node{file: file, line: from.Line, col: from.Column}
	switch {
	case from.Anchor != "" && from.Kind != yaml.AliasNode:
		p.add(n, field, "an anchor, &"+refusal.Clip(from.Anchor, maxShown), "the value written out where it is used")
	case from.Style&yaml.TaggedStyle != 0 || from.Tag == "!":
		p.add(n, field, "a tag, "+refusal.Clip(from.Tag, maxShown), "the value without a tag")
	}
	switch from.Kind {
	case yaml.AliasNode:
		p.add(n, field, "an alias, *"+refusal.Clip(from.Value, maxShown), "the value written out")
		n.other = "alias"
	case yaml.SequenceNode:
		n.kind = list
		for i, child := range from.Content {
			n.values = append(n.values, convert(file, child, fmt.Sprintf("%s[%d]", field, i), p))
		}
	case yaml.MappingNode:
		n.kind = mapping
		convertPairs(file, n, from.Content, field, p)
	default:
		n.text = from.Value
		if from.Style == 0 {
			n.other = plainKind(from)
		}
		if from.Style&yaml.DoubleQuotedStyle != 0 { // the only texts with escapes; the bytes of the others were screened
			if found := unseen([]byte(n.text)); found.what != "" {
				p.add(n, field, found.what+", by an escape", "text that people see")
			}
		}
	}
	return n
}

// convertPairs reads the keys and values of a mapping. A key that comes twice is recorded, and its first value kept.
func convertPairs(file string, n *node, pairs []*yaml.Node, field string, p *problems) {
	seen := make(map[string]*node, len(pairs)/2)
	for i := 0; i+1 < len(pairs); i += 2 {
		key := convert(file, pairs[i], field, p)
		if key.other == "bool" && pairs[i].ShortTag() == "!!str" {
			key.other = "" // the key "on" is a word to every reader that matters
		}
		below := join(field, key.text)
		value := convert(file, pairs[i+1], below, p)
		switch first := seen[key.text]; {
		case key.kind != scalar || key.other == "alias":
			p.add(key, field, "a key that is no word", "key: value")
			continue
		case key.other == "merge":
			p.add(key, field, "a merge key, <<", "the keys written out")
			continue
		case key.other != "":
			p.add(key, field, "the key "+key.what(), fmt.Sprintf("%q, in quotes", refusal.Clip(key.text, maxShown)))
			continue
		case first != nil:
			p.add(key, below, fmt.Sprintf("the same key again; it is at line %d too", first.line), "each key once")
			continue
		}
		seen[key.text] = key
		n.keys, n.values = append(n.keys, key), append(n.values, value)
	}
}

// plainKind says what a plain scalar is to a YAML reader if it is no string to each of them: "" if it is.
func plainKind(from *yaml.Node) string {
	if tag := strings.TrimPrefix(from.ShortTag(), "!!"); tag != "str" {
		return tag
	}
	switch strings.ToLower(from.Value) {
	case "yes", "no", "on", "off", "y", "n":
		return "bool"
	}
	if sexagesimal(from.Value) {
		return "int"
	}
	return ""
}

// sexagesimal says whether old YAML readers take a text for a number of base 60: 22:22 is 1342 to them.
func sexagesimal(text string) bool {
	text = strings.TrimLeft(text, "+-")
	parts := strings.Split(text, ":")
	if len(parts) < 2 {
		return false
	}
	for i, part := range parts {
		if part == "" || strings.Trim(part, "0123456789") != "" || i > 0 && (len(part) > 2 || len(part) == 2 && part[0] > '5') {
			return false
		}
	}
	return true
}

// join is the path of a key.
func join(field, key string) string {
	if field == "" {
		return key
	}
	return field + "." + key
}
