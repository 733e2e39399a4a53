package policy

import (
	"encoding/json"
	"errors"
	"strings"
	"time"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/registry/merkle"
)

// Decision is what the rules said about one change, with everything needed to say it again: the audit log keeps it.
type Decision struct {
	Denied    []Denial        `json:"denied,omitempty"` // sorted by id, unit and path; none and Evaluated complete: the change may run
	Warned    []Denial        `json:"warned,omitempty"`
	Evaluated []string        `json:"evaluated"` // ids of the shipped rules that looked, sorted
	Policy    merkle.Digest   `json:"policy"`    // the set that judged
	Input     json.RawMessage `json:"input"`     // the very bytes that were judged
	Took      time.Duration   `json:"took"`      // ns
}

// Denial is one finding of one rule.
type Denial struct {
	ID   string `json:"id"`             // KT…, a site's own, or E_… where no judgement came about
	Unit string `json:"unit,omitempty"` // "" for the change as a whole
	Msg  string `json:"msg"`            // "what was found; want what would pass"
	Path string `json:"path"`           // the field in unit.yaml, or the file
}

// Refusal is nil if the change may run. Otherwise it joins one *refusal.Error a denial, with the rule's id as its code. The zero Decision
// is a refusal, and so is one in which a required rule did not look.
func (d Decision) Refusal() error {
	if len(d.Denied) == 0 {
		if missing := unlooked(d.Evaluated); len(missing) > 0 {
			return &refusal.Error{Code: codeMissing, Subject: "policy", Got: strings.Join(missing, ", ") + " did not look at the change", Want: "every required rule evaluated"}
		}
		return nil
	}
	faults := make([]error, len(d.Denied))
	for i, denial := range d.Denied {
		faults[i] = denial.refusal()
	}
	return errors.Join(faults...)
}

func (d Denial) refusal() error {
	subject := d.Unit
	if subject == "" {
		subject = "the change"
	}
	if d.Path != "" {
		subject += ", " + d.Path
	}
	got, want, _ := strings.Cut(d.Msg, "; want ")
	return &refusal.Error{Code: refusal.Code(d.ID), Subject: subject, Got: got, Want: want}
}

// denialOf shows a judgement that did not come about as the denial it amounts to.
func denialOf(err error) Denial {
	e := refusal.Of(err)
	msg := e.Got
	if e.Want != "" {
		msg += "; want " + e.Want
	}
	return Denial{ID: string(e.Code), Path: e.Subject, Msg: msg}
}
