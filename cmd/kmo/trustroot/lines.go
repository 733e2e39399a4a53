package trustroot

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/kindos/kmo/policy/trust"
	"github.com/kindos/kmo/policy/trust/signature"
)

// lines say all that a trust root says, one thing each: what two roots differ in are the lines that only one of them has.
func lines(r *trust.Root) (all []string) {
	if r == nil {
		return nil
	}
	add := func(format string, a ...any) { all = append(all, fmt.Sprintf(format, a...)) }
	add("site %s", r.Site)
	for _, p := range r.Principals {
		keys, emails := p.Keys, p.Emails
		p.Keys, p.Emails = nil, nil
		add("principal %s: %s", p.Name, fields(p, "name"))
		for _, email := range emails {
			add("principal %s: writes as %s", p.Name, email)
		}
		for _, k := range keys {
			add("principal %s: key %s", p.Name, keyLine(k))
		}
	}
	for _, role := range r.Roles {
		add("role %s: %d of %s", role.Name, role.Threshold, names(role.Members))
	}
	for _, tier := range r.Tiers {
		add("tier %d: %s", tier.Tier, fields(tier, "tier"))
	}
	for _, p := range r.Units {
		add("path %s: tier %d", p.Path, p.Tier)
	}
	rest := *r
	rest.Principals, rest.Roles, rest.Tiers, rest.Units = nil, nil, nil, nil
	if text := fields(rest, "version", "site"); text != "" {
		for _, one := range strings.Split(text, "; ") {
			add("%s", one)
		}
	}
	return all
}

// keyLine is one key: its id and kind, and what it may.
func keyLine(k trust.Key) string {
	id := "that cannot be read: " + k.Public
	if public, err := signature.ParseKey(k.Public); err == nil {
		id = signature.KeyID(public) + " " + public.Type()
	}
	text := id + " for " + names(k.Uses)
	if !k.From.IsZero() {
		text += ", from " + k.From.UTC().Format(time.RFC3339)
	}
	if k.Revoked != nil {
		text += ", revoked: " + k.Revoked.Reason
		if k.Revoked.Rebad {
			text += ", with all that it signed"
		}
	}
	return text
}

// fields are the fields that are set, as the file names them, but some.
func fields(value any, but ...string) string {
	text, err := json.Marshal(value)
	var set map[string]any
	if err == nil {
		err = json.Unmarshal(text, &set)
	}
	if err != nil {
		return err.Error()
	}
	var list []string
	for name, value := range set {
		if slices.Contains(but, name) {
			continue
		}
		text, _ := json.Marshal(value) // it came from JSON
		list = append(list, name+" "+strings.Trim(string(text), `"`))
	}
	slices.Sort(list)
	return strings.Join(list, "; ")
}

// printChange prints what a new root has and the old, which may be nil, has not, and the other way round. It says whether there is anything.
func printChange(w io.Writer, old, next *trust.Root) bool {
	before, after := lines(old), lines(next)
	only := func(list, other []string, sign string) (found bool) {
		for _, line := range list {
			if !slices.Contains(other, line) {
				_, _ = fmt.Fprintf(w, "%s %s\n", sign, line)
				found = true
			}
		}
		return found
	}
	gone := only(before, after, "-")
	return only(after, before, "+") || gone
}
