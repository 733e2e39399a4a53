// Package refusal says why something may not be.
//
// A refusal is final for its input: a person must act, and trying again changes nothing. Every package that checks something
// returns one; every other error means that the world did not answer and is worth another try.
package refusal

import (
	"errors"
	"fmt"
	"strings"
	"unicode"
)

// Code names a kind of refusal: "E_SIG_MISSING", "KT001". Tests and scripts compare codes, never texts.
type Code string

// Error is one refusal. Code and Subject are always set.
type Error struct {
	Code    Code   `json:"code"`
	Subject string `json:"subject"`        // what was judged: a commit, a unit and field, a blob
	Got     string `json:"got,omitempty"`  // what was found, quoted and clipped where it came from outside
	Want    string `json:"want,omitempty"` // what would pass
	Err     error  `json:"-"`              // the cause, if a caller may test for it
}

// Error is one line: code, subject, what was found, what would pass.
func (e *Error) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %s", e.Code, e.Subject)
	if e.Got != "" {
		fmt.Fprintf(&b, ": %s", e.Got)
	}
	if e.Want != "" {
		fmt.Fprintf(&b, "; want %s", e.Want)
	}
	return b.String()
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Of returns the first refusal in err's tree, or nil if err is not a refusal.
func Of(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return nil
}

// All returns every refusal in err's tree, in order: a file with three faults is refused once, with three reasons.
func All(err error) []*Error {
	switch e := any(err).(type) { // each error of the tree by itself, so not errors.As
	case nil:
		return nil
	case *Error:
		return []*Error{e}
	case interface{ Unwrap() []error }:
		var all []*Error
		for _, one := range e.Unwrap() {
			all = append(all, All(one)...)
		}
		return all
	}
	return All(errors.Unwrap(err))
}

// Clip makes text from outside fit to be shown: control characters out, at most n bytes.
func Clip(text string, n int) string {
	text = strings.Map(func(r rune) rune {
		if !unicode.IsGraphic(r) || r == '\ufffd' || r != ' ' && unicode.IsSpace(r) { // nor what turns a line's direction
			return '?'
		}
		return r
	}, text)
	if len(text) <= n {
		return text
	}
	return strings.ToValidUTF8(text[:n], "") + "…"
}
