// Package review shows people what a change of a site is: field by field where the files have fields, line by line where they have not.
// It is pure: values in, text out. What is shown is what an approval covers; of secrets it is only that they change, and nothing that the
// files hold can steer the terminal it is shown on.
package review

import (
	"bytes"
	"cmp"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/rogpeppe/go-internal/diff"

	"github.com/kindos/kmo/policy/trust"
	"github.com/kindos/kmo/registry/merkle"
)

// Side is what a unit is on one side of a change.
type Side struct {
	Fields any             // what its files say, with profiles and defaults; nil if it is not there
	Files  map[string]File // by path in the site
}

// File is one file of a unit.
type File struct {
	Data   []byte
	Mode   fs.FileMode
	Secret bool // its lines are never shown
	Fields bool // Side.Fields says what it says
}

// Unit is one unit's change.
type Unit struct {
	trust.Reviewed
	Before, After Side
}

// Head is one line about a unit's change and its quorum.
func Head(u trust.Reviewed) string {
	return fmt.Sprintf("%s: %s, tier %d, needs %d approvals", u.Unit, u.Action, u.Tier, u.Need)
}

// Quorum says in lines which approvals of a unit count, which do not and why, how many are missing and whose would count.
func Quorum(u trust.Reviewed) []string {
	lines := Approvals(u.UnitFacts)
	if len(u.Authors) > 0 {
		lines = append(lines, "  written by: "+Plain(strings.Join(u.Authors, ", ")))
	}
	if u.Missing() > 0 {
		who := Plain(strings.Join(u.Open, ", "))
		if who == "" {
			who = "nobody of the trust root"
		}
		lines = append(lines, "  may still approve: "+who)
	}
	return lines
}

// Approvals says in lines which approvals and waivers of a unit count, which do not and why, and how many are missing.
func Approvals(u trust.UnitFacts) []string {
	if u.Need == 0 && len(u.Uncounted) == 0 {
		return waivers(u)
	}
	lines := []string{fmt.Sprintf("%s: %d of %d approvals", u.Unit, len(u.Counted), u.Need)}
	if n := u.Missing(); n > 0 {
		lines[0] += fmt.Sprintf(", %d missing", n)
	}
	for _, a := range u.Counted {
		lines = append(lines, "  counts: "+Plain(a.Principal))
	}
	for _, a := range u.Uncounted {
		who := a.Principal
		if who == "" {
			who = a.File
		}
		lines = append(lines, Plain(fmt.Sprintf("  does not count: %s: %s %s", who, a.Code, a.Why)))
	}
	if !u.Cools.IsZero() {
		lines = append(lines, "  waits until "+u.Cools.Format(time.RFC3339))
	}
	return append(lines, waivers(u)...)
}

func waivers(u trust.UnitFacts) (lines []string) {
	for _, w := range u.Waivers {
		var by []string
		for _, a := range w.Counted {
			by = append(by, a.Principal)
		}
		slices.Sort(by)
		text := fmt.Sprintf("%s: %s waived by %s: %s", u.Unit, w.ID, strings.Join(by, ", "), w.Reason)
		if w.Missing > 0 {
			text = fmt.Sprintf("%s: %s not waived, %d approvals missing; by %s: %s", u.Unit, w.ID, w.Missing, cmp.Or(strings.Join(by, ", "), "nobody"), w.Reason)
		}
		lines = append(lines, Plain(text))
	}
	return lines
}

// Lines are the whole change of a unit: its images, its fields, its files.
func (u Unit) Lines() []string {
	var images, fields, files []string
	walk("", u.Before.Fields, u.After.Fields, func(path string, before, after any) {
		if isImage(path) {
			images = append(images, "    "+Plain(path), "      from "+value(before), "      to   "+value(after))
			return
		}
		fields = append(fields, fmt.Sprintf("    %s: %s -> %s", Plain(path), value(before), value(after)))
	})
	names := slices.Collect(maps.Keys(u.Before.Files))
	names = append(names, slices.Collect(maps.Keys(u.After.Files))...)
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		files = append(files, u.file(name, len(images)+len(fields) > 0)...)
	}
	var all []string
	for _, part := range []struct {
		title string
		lines []string
	}{{"  images", images}, {"  fields", fields}, {"  files", files}} {
		if len(part.lines) > 0 {
			all = append(append(all, part.title), part.lines...)
		}
	}
	return all
}

// isImage says whether a field names an image or its root.
func isImage(field string) bool {
	rest, is := strings.CutPrefix(field, "variants[")
	_, name, _ := strings.Cut(rest, "].")
	return is && slices.Contains([]string{"image", "lxc", "wasm", "appimage", "native", "merkle"}, name)
}

// file is one file's change; said means that fields were shown.
func (u Unit) file(name string, said bool) []string {
	before, had := u.Before.Files[name]
	after, has := u.After.Files[name]
	sameMode := !had || !has || before.Mode == after.Mode
	if had && has && sameMode && bytes.Equal(before.Data, after.Data) {
		return nil
	}
	title := "    " + Plain(name)
	switch {
	case !has:
		title += ": removed, " + size(before)
	case !had:
		title += ": new, " + size(after)
	}
	if !sameMode {
		title += fmt.Sprintf(": mode %04o -> %04o", before.Mode.Perm(), after.Mode.Perm())
	}
	switch {
	case before.Secret || after.Secret:
		return []string{title + ": a secret, whose content is not shown", "      from " + digest(before, had), "      to   " + digest(after, has)}
	case (before.Fields || after.Fields) && said:
		return []string{title + ": as its fields say"}
	case !has || had && bytes.Equal(before.Data, after.Data):
		return []string{title}
	case !text(before.Data) || !text(after.Data):
		return []string{title + ": not text", "      from " + digest(before, had), "      to   " + digest(after, has)}
	}
	return append([]string{title}, difference(before.Data, after.Data)...)
}

func size(f File) string { return fmt.Sprintf("%d bytes", len(f.Data)) }

func digest(f File, there bool) string {
	if !there {
		return "nothing"
	}
	return fmt.Sprintf("%s, %v", size(f), merkle.BlobRoot(f.Data))
}

func text(data []byte) bool { return utf8.Valid(data) && !bytes.ContainsRune(data, 0) }

// difference is the lines that differ, with three around them.
func difference(before, after []byte) (lines []string) {
	all := strings.Split(strings.TrimSuffix(string(diff.Diff("before", before, "after", after)), "\n"), "\n")
	for _, line := range all[min(3, len(all)):] { // after the names
		lines = append(lines, "      "+Plain(line))
	}
	return lines
}

// value is a field's value in one line.
func value(v any) string {
	switch v := v.(type) {
	case nil:
		return "nothing"
	case string:
		return strconv.Quote(v)
	case []any:
		var all []string
		for _, one := range v {
			all = append(all, value(one))
		}
		return "[" + strings.Join(all, ", ") + "]"
	case map[string]any:
		var all []string
		for _, key := range slices.Sorted(maps.Keys(v)) {
			all = append(all, strconv.Quote(key)+": "+value(v[key]))
		}
		return "{" + strings.Join(all, ", ") + "}"
	}
	return fmt.Sprint(v)
}

// Plain is a line with nothing in it that a person would not see, or that would steer a terminal: such a line is quoted as Go does.
func Plain(line string) string {
	hidden := func(r rune) bool {
		return r != '\t' && (!unicode.IsGraphic(r) || r == utf8.RuneError || r != ' ' && unicode.IsSpace(r))
	}
	if !strings.ContainsFunc(line, hidden) {
		return line
	}
	return strconv.Quote(line) + " (quoted: it has characters that do not show)"
}

// secretFile says whether a file is a secret by its name or its content, whatever the unit says of it.
func secretFile(name string, data []byte) bool {
	name = path.Base(name)
	return strings.Contains(name, ".sops.") || strings.HasSuffix(name, ".age") || bytes.Contains(data, []byte("ENC[AES256_GCM")) ||
		bytes.Contains(data, []byte("BEGIN AGE ENCRYPTED FILE")) || bytes.Contains(data, []byte("PRIVATE KEY-----"))
}
