package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/kindos/kmo/cmd/kmo/cli"
	"github.com/kindos/kmo/cmd/kmo/review"
	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/reconciler"
	"github.com/kindos/kmo/registry/merkle"
)

// ask makes a command that gets one value of a host and prints it; the value's own outcome may become the exit status.
func ask[T any](cmd *cobra.Command, flags *hostFlags, method, path string, query func(args []string) url.Values, text func(io.Writer, T), outcome func(T) error) *cobra.Command {
	out := &cli.Output{}
	flags.add(cmd)
	out.Add(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, err := dial(cmd.Context(), flags)
		if err != nil {
			return err
		}
		defer func() { _ = c.close() }()
		var value T
		if err := c.get(cmd.Context(), method, path, query(args), &value); err != nil {
			return err
		}
		if err := out.Print(cmd.OutOrStdout(), value, func(w io.Writer) { text(w, value) }); err != nil {
			return err
		}
		return outcome(value)
	}
	return cmd
}

func reconcileCommand() *cobra.Command {
	return ask(&cobra.Command{
		Use:   "reconcile",
		Short: "Look at the branch now, do what is to be done, say how it ended",
		Long: `Look at the branch now, do what is to be done, and say how it ended. A running agent is asked to; without one this command does it.

Exit statuses: 0 converged, 1 error or waiting, 2 usage, 3 refused, 4 reverted or stuck.`,
		Example: "  kmo reconcile\n  kmo reconcile -o json | jq .reason",
		Args:    cobra.NoArgs,
	}, &hostFlags{makes: true}, "POST", "/reconcile", noQuery, printRecord, func(rec reconciler.Record) error { return exitOf(rec) })
}

func noQuery([]string) url.Values { return nil }

// exitOf is an outcome as an exit status. While a commit is being tried nothing is good yet; a head that is refused waits for a person then, too.
func exitOf(rec reconciler.Record) error {
	if rec.Trying != "" && rec.Outcome != reconciler.Refused {
		return cli.Status(cli.ExitError)
	}
	switch rec.Outcome {
	case reconciler.Converged:
		return nil
	case reconciler.Refused:
		return cli.Status(cli.ExitRefused)
	case reconciler.Reverted, reconciler.Stuck:
		return cli.Status(cli.ExitReverted)
	}
	return cli.Status(cli.ExitError)
}

// short is a commit's id for people.
func short(id string) string {
	if id == "" {
		return "-"
	}
	return id[:min(len(id), 12)]
}

func printRecord(w io.Writer, rec reconciler.Record) {
	outcome := cmp.Or(string(rec.Outcome), "nothing tried yet")
	if rec.Trying != "" {
		watched := ""
		if rec.Stage == reconciler.StageWatch {
			watched = ", its gate is watched"
		}
		_, _ = fmt.Fprintf(w, "trying %s%s; last: ", short(rec.Trying), watched)
	}
	_, _ = fmt.Fprintf(w, "%s  head %s  good %s", outcome, short(rec.Head), short(rec.Good))
	if !rec.When.IsZero() {
		_, _ = fmt.Fprintf(w, "  since %s", rec.When.Local().Format(time.DateTime))
	}
	_, _ = fmt.Fprintln(w)
	if rec.Reason != "" {
		_, _ = fmt.Fprintf(w, "  at %s: %s\n", rec.Stage, strings.ReplaceAll(rec.Reason, "\n", "\n    "))
	}
	if rec.Clock != "" {
		_, _ = fmt.Fprintf(w, "  %s\n", rec.Clock)
	}
}

func statusCommand() *cobra.Command {
	flags := &hostFlags{}
	cmd := &cobra.Command{
		Use:   "status",
		Short: "What this host runs, and how the last reconcile ended",
		Long: `What this host runs, and how the last reconcile ended.

Exit statuses: 0 converged, 1 error, waiting or still trying, 2 usage, 3 refused, 4 reverted or stuck.`,
		Example: "  kmo status\n  kmo status --watch\n  kmo status -o json | jq -r '.workloads[].name'",
		Args:    cobra.NoArgs,
	}
	cmd = ask(cmd, flags, "GET", "/status", noQuery, printStatus, func(s Status) error {
		if s.Error != "" {
			return cli.Status(cli.ExitError)
		}
		return exitOf(s.Record)
	})
	once := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if !flags.glances {
			return once(cmd, args)
		}
		if cmd.Flag("output").Value.String() == "json" {
			return cli.Usagef("--watch draws for people; want it or -o json")
		}
		return redraw(cmd, func(out io.Writer) {
			cmd.SetOut(out)
			if err := once(cmd, args); err != nil {
				if exit := cli.Status(0); !errors.As(err, &exit) {
					_, _ = fmt.Fprintln(out, "kmo:", err)
				}
			}
		})
	}
	cmd.Flags().BoolVarP(&flags.glances, "watch", "w", false, "draw again every second, in place, until interrupted")
	return cmd
}

// redraw draws in place every second until the context ends.
func redraw(cmd *cobra.Command, draw func(io.Writer)) error {
	screen := cmd.OutOrStdout()
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for {
		var frame strings.Builder
		draw(&frame)
		text := frame.String() + "\n"
		if forPeople(screen) != screen { // a terminal: home, each line cleared to its end, then all below: no flicker
			text = "\x1b[H" + strings.ReplaceAll(frame.String(), "\n", "\x1b[K\n") + "\x1b[J"
		}
		_, _ = io.WriteString(screen, text)
		select {
		case <-cmd.Context().Done():
			return nil
		case <-ticker.C:
		}
	}
}

func printStatus(w io.Writer, s Status) {
	agent := "no agent is running"
	if s.Agent {
		agent = "agent " + s.Version
	}
	_, _ = fmt.Fprintf(w, "%s on %s, zone %s, branch %s (%s)\n", s.Site, s.Record.Host, s.Zone, s.Branch, agent)
	printRecord(w, s.Record)
	if s.Error != "" {
		_, _ = fmt.Fprintf(w, "  the agent cannot go on: %s\n", s.Error)
	}
	if s.Trouble != "" {
		_, _ = fmt.Fprintf(w, "  workloads: %s\n", s.Trouble)
	}
	if len(s.Workloads) == 0 {
		return
	}
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(table, "\nWORKLOAD\tBACKEND\tSTATE\tUP\tRESTARTS\tMEMORY\tADDRESS\tDETAIL")
	for _, have := range s.Workloads {
		var addresses []string
		for _, a := range have.Addresses {
			addresses = append(addresses, refusal.Clip(a.Port+"="+a.Address, 200))
		}
		up := "-"
		if !have.Started.IsZero() && have.State == "running" {
			up = time.Since(have.Started).Round(time.Second).String()
		}
		_, _ = fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%d\t%s\t%s\t%s\n", have.Name, have.Backend, have.State, up, have.Restarts,
			mebibytes(have.Usage.Memory), strings.Join(addresses, " "), have.Detail)
	}
	_ = table.Flush()
}

func mebibytes(n int64) string { return strconv.FormatFloat(float64(n)/(1<<20), 'f', 1, 64) + "Mi" }

func logsCommand() *cobra.Command {
	flags := &hostFlags{}
	var follow bool
	var tail int
	cmd := &cobra.Command{
		Use:   "logs UNIT|WORKLOAD",
		Short: "What a workload wrote, oldest first",
		Long: `What a workload wrote, stdout and stderr in one stream, oldest first. A unit's name stands for its newest workload.

Exit statuses: 0 good, 1 error (there is no such workload), 2 usage.`,
		Example: "  kmo logs camera-relay\n  kmo logs camera-relay --tail 20 --follow",
		Args:    cli.OneArg("the name of a unit or a workload"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if tail < 0 {
				return cli.Usagef("--tail %d: want 0 (all) or more lines", tail)
			}
			c, err := dial(cmd.Context(), flags)
			if err != nil {
				return err
			}
			defer func() { _ = c.close() }()
			if follow && !c.agent {
				return errors.New("no agent is running: --follow would keep one from starting; want an agent, or no --follow")
			}
			body, err := c.do(cmd.Context(), "GET", "/logs", url.Values{"name": args, "tail": {strconv.Itoa(tail)}, "follow": {strconv.FormatBool(follow)}})
			if err != nil {
				return err
			}
			defer func() { _ = body.Close() }()
			if _, err = io.Copy(forPeople(cmd.OutOrStdout()), body); cmd.Context().Err() != nil {
				return nil
			}
			return err
		},
	}
	flags.add(cmd)
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on until interrupted")
	cmd.Flags().IntVarP(&tail, "tail", "n", 0, "only the last so many lines; 0 is all")
	return cmd
}

// forPeople is w, and on a terminal without what would steer it.
func forPeople(w io.Writer) io.Writer {
	if file, ok := w.(*os.File); ok && term.IsTerminal(int(file.Fd())) {
		return plainText{w}
	}
	return w
}

// plainText shows control characters instead of sending them, but for ends of lines and tabs.
type plainText struct{ io.Writer }

func (p plainText) Write(text []byte) (int, error) {
	shown := bytes.Map(func(r rune) rune {
		if r == '\n' || r == '\t' || unicode.IsGraphic(r) {
			return r
		}
		return '?'
	}, text)
	if _, err := p.Writer.Write(shown); err != nil {
		return 0, err
	}
	return len(text), nil
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "The version of this binary",
		Long:    "The version of this binary.\n\nExit statuses: 0 good, 2 usage.",
		Example: "  kmo version",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "kmo", version)
			return err
		},
	}
}

func completionCommand() *cobra.Command {
	write := map[string]func(root *cobra.Command, w io.Writer) error{
		"bash":       func(root *cobra.Command, w io.Writer) error { return root.GenBashCompletionV2(w, true) },
		"fish":       func(root *cobra.Command, w io.Writer) error { return root.GenFishCompletion(w, true) },
		"powershell": (*cobra.Command).GenPowerShellCompletionWithDesc,
		"zsh":        (*cobra.Command).GenZshCompletion,
	}
	shells := slices.Sorted(maps.Keys(write))
	return &cobra.Command{
		Use:       "completion SHELL",
		Short:     "Print what a shell needs to complete kmo's words",
		Long:      "Print what a shell needs to complete kmo's words: " + strings.Join(shells, ", ") + ".\n\nExit statuses: 0 good, 2 usage.",
		Example:   "  kmo completion bash > /etc/bash_completion.d/kmo\n  source <(kmo completion zsh)",
		Args:      cli.OneArg("a shell: " + strings.Join(shells, ", ")),
		ValidArgs: shells,
		RunE: func(cmd *cobra.Command, args []string) error {
			one, ok := write[args[0]]
			if !ok {
				return cli.Usagef("shell %q: want %s", args[0], strings.Join(shells, ", "))
			}
			return one(cmd.Root(), cmd.OutOrStdout())
		},
	}
}

// background is for closing what a cancelled context must not keep open.
func background() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), 10*time.Second)
}

func planCommand() *cobra.Command {
	return ask(&cobra.Command{
		Use:   "plan [COMMIT]",
		Short: "What a commit would do to this host, without doing it",
		Long: `What a commit would do to this host, without doing it: the units that change and their fields, the steps, what the rules say, which
approvals count and which are missing. Without a commit it is the branch's head.

Exit statuses: 0 it would run, 1 error, 2 usage, 3 it would be refused.`,
		Example: "  kmo plan\n  kmo plan 3f9a2c1d -o json | jq .steps",
		Args:    cobra.MaximumNArgs(1),
	}, &hostFlags{}, "GET", "/plan", revisionQuery, printPlan, func(p reconciler.Preview) error {
		if p.Stage != "" {
			return cli.Status(cli.ExitRefused)
		}
		return nil
	})
}

func explainCommand() *cobra.Command {
	return ask(&cobra.Command{
		Use:   "explain [COMMIT]",
		Short: "Why a commit was accepted, refused or reverted here",
		Long: `Why a commit was accepted, refused or reverted on this host, in plain words, with the records of the audit log behind it. Each decision is
made again, from the same input by the same rules, and it says whether the answer is the same. Without a commit it is the branch's head.

Exit statuses: 0 good, 1 error, 2 usage.`,
		Example: "  kmo explain 3f9a2c1d\n  kmo explain -o json",
		Args:    cobra.MaximumNArgs(1),
	}, &hostFlags{}, "GET", "/explain", revisionQuery, printExplanation, func(Explanation) error { return nil })
}

// printExplanation tells it in plain words.
func printExplanation(w io.Writer, e Explanation) {
	_, _ = fmt.Fprintf(w, "commit %s\n", e.Commit)
	switch {
	case e.Within != "":
		_, _ = fmt.Fprintf(w, "  not judged by itself: it came in as part of an accepted head, and is in the history of the good commit %s\n", short(e.Within))
	case len(e.Records) == 0:
		_, _ = fmt.Fprintln(w, "  this host has not judged it")
	}
	for _, record := range e.Records {
		lines := inWords(record)
		if replayed := e.Replayed[record.Index]; replayed != "" {
			lines = append(lines, refusal.Clip(replayed, 500))
		}
		_, _ = fmt.Fprintf(w, "%s  #%d %s\n", record.Time.Local().Format("2006-01-02 15:04:05"), record.Index, strings.Join(lines, "\n    "))
	}
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
	if policy, err := merkle.Parse(p.Policy); err == nil && p.Stage != "policy" {
		_, _ = fmt.Fprintf(w, "policy %s: allowed, %d rules\n", policy.Short(), p.Rules)
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
				_, _ = fmt.Fprintf(w, "  %s: %s -> %s\n", change.Path, compact(change.Before), compact(change.After))
			}
		}
		for _, line := range review.Approvals(unit) {
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

// compact is a value in one line of JSON, at most 120 bytes of it and none that would steer a terminal.
func compact(value any) string {
	if value == nil {
		return "nothing"
	}
	text, err := json.Marshal(value)
	if err != nil {
		return err.Error()
	}
	return refusal.Clip(string(text), 120)
}
