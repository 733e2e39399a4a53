package kubernetes

import (
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
)

// drift says which field of ours is not as it was applied, "" for none. What was not asked for is not looked at: it is the cluster's,
// or another's.
func drift(want, have any, path string) string {
	switch want := want.(type) {
	case map[string]any:
		have, ok := have.(map[string]any)
		if !ok && len(want) > 0 {
			return path + " is missing"
		}
		for _, name := range slices.Sorted(maps.Keys(want)) {
			if found := drift(want[name], have[name], strings.TrimPrefix(path+"."+name, ".")); found != "" {
				return found
			}
		}
		return ""
	case []any:
		return driftList(want, have, path)
	}
	if reflect.DeepEqual(want, have) {
		return ""
	}
	if have == nil {
		have = "not set"
	}
	if strings.Contains(path, ".env[") { // may be what only the workload is to know
		return path + " is not as it was applied"
	}
	return fmt.Sprintf("%s is %v, want %v", path, have, want)
}

// driftList compares the elements of one name with each other, and lists without names from one end to the other.
func driftList(want []any, have any, path string) string {
	list, _ := have.([]any)
	for i, element := range want {
		by, name := named(element)
		at := fmt.Sprintf("%s[%v]", path, name)
		if by == "" {
			if len(list) != len(want) {
				return fmt.Sprintf("%s has %d elements, want %d", path, len(list), len(want))
			}
			if found := drift(element, list[i], fmt.Sprintf("%s[%d]", path, i)); found != "" {
				return found
			}
			continue
		}
		found := slices.IndexFunc(list, func(other any) bool {
			fields, ok := other.(map[string]any)
			return ok && reflect.DeepEqual(fields[by], name)
		})
		if found < 0 {
			return at + " is missing"
		}
		if found := drift(element, list[found], at); found != "" {
			return found
		}
	}
	return ""
}

// named is the field that tells the elements of a list apart, and its value.
func named(element any) (by string, name any) {
	fields, _ := element.(map[string]any)
	for _, by := range []string{"mountPath", "name", "key"} {
		if name, ok := fields[by]; ok {
			return by, name
		}
	}
	return "", nil
}

// plain is a value as it reads from its JSON form.
func plain(value any) any {
	text, err := json.Marshal(value)
	if err != nil {
		return nil
	}
	var read any
	if err := json.Unmarshal(text, &read); err != nil {
		return nil
	}
	return read
}
