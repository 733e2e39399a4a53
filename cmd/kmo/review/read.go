package review

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/kindos/kmo/policy/trust"
	"github.com/kindos/kmo/reconciler/template"
)

// Read reads what a changed unit is in a commit's tree, nil for none; site is that tree's.
func Read(tree fs.FS, site *template.Site, u trust.UnitFacts) (side Side, err error) {
	side.Files = map[string]File{}
	if tree == nil || site == nil {
		return side, nil
	}
	var fields any
	switch {
	case u.Unit == "@policy":
		return side, side.add(tree, "policy", nil, false)
	case u.Unit == "@site":
		fields = site.Config
		err = side.add(tree, "site.yaml", nil, true)
	case strings.HasPrefix(u.Unit, "@root-"):
		return side, nil // its caller knows both
	default:
		unit := site.Unit(u.Unit)
		if unit == nil {
			return side, nil
		}
		fields = unit
		var secrets []string
		for _, s := range unit.Secrets {
			secrets = append(secrets, "units/"+u.Unit+"/"+string(s.From))
		}
		err = side.add(tree, "units/"+u.Unit, secrets, false)
		if err == nil && unit.Profile != "" {
			err = side.add(tree, "profiles/"+string(unit.Profile)+".yaml", nil, true)
		}
	}
	if err == nil {
		side.Fields, err = Fields(fields)
	}
	return side, err
}

// Fields is a value as its JSON has it, with numbers as they are written.
func Fields(v any) (fields any, err error) {
	text, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encoding a unit: %w", err)
	}
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.UseNumber()
	return fields, decoder.Decode(&fields)
}

// add reads a file, or every file of a folder. A unit.yaml is among its unit's fields.
func (s *Side) add(tree fs.FS, name string, secrets []string, fields bool) error {
	return fs.WalkDir(tree, name, func(name string, entry fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || entry.IsDir() {
			return err
		}
		data, err := fs.ReadFile(tree, name)
		if err != nil {
			return fmt.Errorf("reading %s: %w", name, err)
		}
		info, err := entry.Info()
		if err != nil {
			return fmt.Errorf("reading %s: %w", name, err)
		}
		s.Files[name] = File{Data: data, Mode: info.Mode(), Secret: slices.Contains(secrets, name) || secretFile(name, data),
			Fields: fields || strings.HasPrefix(name, "units/") && strings.Count(name, "/") == 2 && strings.HasSuffix(name, "/unit.yaml")}
		return nil
	})
}

// walk calls report for every field that differs, in the order of their paths. Lists of named things are told apart by the names, lists of
// plain values are one field, and others go by position.
func walk(path string, before, after any, report func(path string, before, after any)) {
	if reflect.DeepEqual(before, after) {
		return
	}
	left, right, sep, ok := members(before, after)
	if !ok {
		report(path, before, after)
		return
	}
	keys := slices.Collect(maps.Keys(left))
	keys = append(keys, slices.Collect(maps.Keys(right))...)
	slices.SortFunc(keys, func(a, b string) int {
		if sep == "[" && len(a) != len(b) && strings.Trim(a+b, "0123456789]") == "" { // positions
			return len(a) - len(b)
		}
		return strings.Compare(a, b)
	})
	for _, key := range slices.Compact(keys) {
		sub := path + sep + key
		if path == "" {
			sub = key
		}
		walk(sub, left[key], right[key], report)
	}
}

// members are the fields of two objects or the elements of two lists, by what stands after sep in their paths.
func members(before, after any) (left, right map[string]any, sep string, ok bool) {
	left, leftIs := before.(map[string]any)
	right, rightIs := after.(map[string]any)
	if (leftIs || before == nil) && (rightIs || after == nil) && len(left)+len(right) > 0 {
		return left, right, ".", true
	}
	old, oldIs := before.([]any)
	now, nowIs := after.([]any)
	if !oldIs && before != nil || !nowIs && after != nil || len(old)+len(now) == 0 {
		return nil, nil, "", false
	}
	for _, name := range []string{"name", "to", "path", "tier"} {
		left, ok := named(old, name)
		right, also := named(now, name)
		if ok && also {
			return left, right, "[", true
		}
	}
	left, right = map[string]any{}, map[string]any{}
	for _, one := range []struct {
		list []any
		into map[string]any
	}{{old, left}, {now, right}} {
		for i, element := range one.list {
			switch element.(type) {
			case map[string]any, []any:
			default:
				return nil, nil, "", false
			}
			one.into[fmt.Sprintf("%d]", i)] = element
		}
	}
	return left, right, "[", true
}

// named are the elements of a list by a field of theirs, if each has it and none has another's.
func named(list []any, field string) (map[string]any, bool) {
	all := make(map[string]any, len(list))
	for _, element := range list {
		object, _ := element.(map[string]any)
		name := object[field]
		switch name.(type) {
		case string, json.Number:
		default:
			return nil, false
		}
		key := fmt.Sprint(name) + "]"
		if all[key] != nil {
			return nil, false
		}
		all[key] = object
	}
	return all, true
}
