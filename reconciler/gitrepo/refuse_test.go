package gitrepo

import "github.com/kindos/kmo/policy/refusal"

func code(err error) refusal.Code {
	if r := refusal.Of(err); r != nil {
		return r.Code
	}
	return ""
}
