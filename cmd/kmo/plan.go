package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kindos/kmo/policy/trust"
	"github.com/kindos/kmo/reconciler"
)

func planCommand() *cobra.Command {
	return ask(&cobra.Command{
		Use:   "plan [COMMIT]",
		Short: "What a commit would do to this host, without doing it",
		Long: `What a commit would do to this host, without doing it: the units that change and their fields, the steps, what the rules say, which
approvals count and which are missing. Without a commit it is the branch's head.

Exit statuses: 0 it would run, 1 error, 2 usage, 3 it would be refused.`,
		Example: "  kmo plan\n  kmo plan 3f9a2c1d -o json | jq .steps",
		Args:    cobra.MaximumNArgs(1),
	}, "GET", "/plan", revisionQuery, printPlan, func(p reconciler.Preview) error {
		if p.Stage != "" {
			return status(exitRefused)
		}
		return nil
	})
}

func explainCommand() *cobra.Command {
	return ask(&cobra.Command{
		Use:   "explain [COMMIT]",
		Short: "Why a commit was accepted, refused or reverted here",
		Long: `Why a commit was accepted, refused or reverted on this host, in plain words, with the records of the audit log behind it. Without a
commit it is the branch's head.

Exit statuses: 0 good, 1 error, 2 usage.`,
		Example: "  kmo explain 3f9a2c1d\n  kmo explain -o json",
		Args:    cobra.MaximumNArgs(1),
	}, "GET", "/explain", revisionQuery, printExplanation, func(Explanation) error { return nil })
}

func revisionQuery(args []string) url.Values {
	if len(args) == 0 {
		return nil
	}
	return url.Values{"revision": args}
}

func printPlan(w io.Writer, p reconciler.Preview) {
	_, _ = fmt.Fprintf(w, "commit %s, compared with %s\n", short(p.Commit), short(p.Good))
	if p.Facts.Signer != "" {
		_, _ = fmt.Fprintf(w, "signed by %s\n", p.Facts.Signer)
	}
	for _, refused := range p.Refusals {
		_, _ = fmt.Fprintf(w, "refused at %s: %v\n", p.Stage, refused)
	}
	for _, warning := range p.Facts.Warnings {
		_, _ = fmt.Fprintf(w, "warning: %s\n", warning)
	}
	for _, warning := range p.Warned {
		_, _ = fmt.Fprintf(w, "warning: %s %s: %s\n", warning.ID, warning.Unit, warning.Msg)
	}
	for _, unit := range p.Facts.Units {
		_, _ = fmt.Fprintf(w, "\nunit %s (%s, tier %d)\n", unit.Unit, unit.Action, unit.Tier)
		for _, change := range p.Changes {
			if change.Unit == unit.Unit {
				_, _ = fmt.Fprintf(w, "  %s: %s -> %s\n", strings.TrimPrefix(change.Path+" ", " "), compact(change.Before), compact(change.After))
			}
		}
		for _, line := range approvalsInWords(unit) {
			_, _ = fmt.Fprintf(w, "  %s\n", line)
		}
	}
	_, _ = fmt.Fprintln(w)
	for _, step := range p.Steps {
		_, _ = fmt.Fprintf(w, "%s %s on %s: %s\n", step.Op, step.Name, step.Backend, step.Reason)
		if len(step.Replaces) > 0 {
			_, _ = fmt.Fprintf(w, "  %s goes first: both need %s\n", strings.Join(step.Replaces, ", "), strings.Join(slices.Compact(step.Because), ", "))
		}
	}
	for _, skip := range p.Skipped {
		_, _ = fmt.Fprintf(w, "not here: %s: %s\n", skip.Unit, skip.Why)
	}
	if len(p.Steps) == 0 && p.Stage == "" {
		_, _ = fmt.Fprintln(w, "nothing to do")
	}
}

// compact is a value in one line of JSON, at most 120 bytes of it.
func compact(value any) string {
	if value == nil {
		return "nothing"
	}
	text, err := json.Marshal(value)
	if err != nil {
		return err.Error()
	}
	if len(text) > 120 {
		return string(text[:117]) + "..."
	}
	return string(text)
}

// approvalsInWords says which approvals of a unit count, which do not and why, and how many are missing.
func approvalsInWords(u trust.UnitFacts) []string {
	if u.Need == 0 && len(u.Uncounted) == 0 {
		return nil
	}
	lines := []string{fmt.Sprintf("%s: %d of %d approvals", u.Unit, len(u.Counted), u.Need)}
	if n := u.Missing(); n > 0 {
		lines[0] += fmt.Sprintf(", %d missing", n)
	}
	for _, a := range u.Counted {
		lines = append(lines, "  counts: "+a.Principal)
	}
	for _, a := range u.Uncounted {
		who := a.Principal
		if who == "" {
			who = a.File
		}
		lines = append(lines, fmt.Sprintf("  does not count: %s: %s %s", who, a.Code, a.Why))
	}
	return lines
}
