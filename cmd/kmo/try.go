package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kindos/kmo/cmd/kmo/cli"
	"github.com/kindos/kmo/policy"
	"github.com/kindos/kmo/policy/audit"
	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/reconciler"
)

// evalRun is what `kmo policy eval` does.
type evalRun struct {
	cli.Output
	host          hostFlags
	folder, input string
	trace         bool
}

func policyEvalCommand() *cobra.Command {
	e := &evalRun{}
	cmd := &cobra.Command{
		Use:   "eval [COMMIT]",
		Short: "Judge a commit or an input document, and say which rule said what",
		Long: `Judge a commit on this host as the agent would, without doing anything: by the rules that are in force for it, or with --policy by those of a
folder. Without a commit it is the branch's head. A commit that this host runs already changes nothing, and no rule has much to say of it: for
rules over what was, there is 'kmo policy try'.

--input judges a document from a file ('-' is the standard input) instead, one as 'kmo policy schema' describes it or what -o json has printed: by
the rules of --policy, or else as 'kmo policy check' without a folder takes them. The tests of a folder's rules are not run.

--trace says of each rule that has findings what they are and the values of its variables, and of each of the site's rules that has none how far
it got and what did not hold there.

Exit statuses: 0 it would pass, 1 error, 2 usage, 3 it is denied, or refused before any rule is asked.`,
		Example: "  kmo policy eval --policy policy --trace\n  kmo policy eval 3f9a2c1d -o json >judged.json\n  kmo policy eval --input judged.json --trace",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if e.input != "" && len(args) > 0 {
				return cli.Usagef("a commit and --input: want one of them")
			}
			evaluation, err := e.evaluate(cmd.Context(), cmd.InOrStdin(), args)
			if err != nil {
				return err
			}
			if err := e.Print(cmd.OutOrStdout(), evaluation, evaluation.text); err != nil {
				return err
			}
			if len(evaluation.Decision.Denied) > 0 {
				return cli.Status(cli.ExitRefused)
			}
			return nil
		},
	}
	e.host.add(cmd)
	e.Add(cmd)
	cmd.Flags().StringVar(&e.folder, "policy", "", "a folder of a site's rules that judge instead of those in force")
	cmd.Flags().StringVar(&e.input, "input", "", "a file with an input document, or - for the standard input")
	cmd.Flags().BoolVar(&e.trace, "trace", false, "say what each rule found, or what kept it from that")
	return cmd
}

func (e *evalRun) evaluate(ctx context.Context, stdin io.Reader, args []string) (evaluation Evaluation, err error) {
	var document []byte
	if e.input == "" {
		c, err := dial(ctx, &e.host)
		if err != nil {
			return evaluation, err
		}
		defer func() { _ = c.close() }()
		query := url.Values{"revision": args, "trace": {strconv.FormatBool(e.trace && e.folder == "")}}
		if err := c.get(ctx, "GET", "/decision", query, &evaluation); err != nil || e.folder == "" {
			return evaluation, err
		}
		document = evaluation.Decision.Input
	} else if document, err = readNamed(e.input, stdin); err != nil {
		return evaluation, err
	}
	layers, folder, err := rulesHere(e.folder)
	if err != nil {
		return evaluation, err
	}
	set, err := policy.Draft(layers...)
	if err != nil {
		return evaluation, placed(folder, err)
	}
	var printed Evaluation
	if json.Unmarshal(document, &printed) == nil && len(printed.Decision.Input) > 0 {
		document = printed.Decision.Input
	}
	if !e.trace {
		evaluation.Decision, err = set.Replay(ctx, document)
		return evaluation, err
	}
	evaluation.Decision, evaluation.Said, err = set.Trace(ctx, document)
	for i := range evaluation.Said {
		said := &evaluation.Said[i]
		said.At, said.Failed = placedText(folder, said.At), placedText(folder, said.Failed)
	}
	return evaluation, err
}

// readNamed reads a file, or what comes in if it is called "-".
func readNamed(name string, stdin io.Reader) ([]byte, error) {
	if name == "-" {
		return io.ReadAll(stdin)
	}
	return os.ReadFile(name)
}

func (e Evaluation) text(w io.Writer) {
	var judged policy.Input
	_ = json.Unmarshal(e.Decision.Input, &judged) // for its commit only
	verdict := fmt.Sprintf("allowed by policy %s after %d rules", e.Decision.Policy.Short(), len(e.Decision.Evaluated))
	if n := len(e.Decision.Denied); n > 0 {
		verdict = fmt.Sprintf("denied by policy %s", e.Decision.Policy.Short())
	}
	_, _ = fmt.Fprintf(w, "commit %s, %d units that change: %s\n", short(judged.Commit), len(judged.Units), verdict)
	for _, denial := range e.Decision.Denied {
		_, _ = fmt.Fprintf(w, "  %s\n", inOneLine(denial))
	}
	for _, denial := range e.Decision.Waived {
		_, _ = fmt.Fprintf(w, "  waived: %s\n", inOneLine(denial))
	}
	for _, warning := range e.Decision.Warned {
		_, _ = fmt.Fprintf(w, "  warning: %s\n", inOneLine(warning))
	}
	for _, said := range e.Said {
		if said.Finding == nil {
			_, _ = fmt.Fprintf(w, "\n%s: %s finds nothing; it gets to %s\n", said.At, said.Rule, strings.ReplaceAll(said.Failed, "\n", "\n    "))
			continue
		}
		_, _ = fmt.Fprintf(w, "\n%s: %s finds %s\n", said.At, said.Rule, inOneLine(*said.Finding))
		for _, name := range slices.Sorted(maps.Keys(said.Values)) {
			_, _ = fmt.Fprintf(w, "    %s = %s\n", name, said.Values[name])
		}
	}
}

// inOneLine is a finding as explain shows it.
func inOneLine(d policy.Denial) string {
	return strings.Join(strings.Fields(fmt.Sprintf("%s %s %s", d.ID, d.Unit, d.Path)), " ") + ": " + d.Msg
}

// Trial is a recorded decision that other rules would have made otherwise.
type Trial struct {
	Index  int64           `json:"index"` // in the audit log
	Time   time.Time       `json:"time"`
	Commit string          `json:"commit"`
	Was    []policy.Denial `json:"was,omitempty"`   // what denied it; none: it was allowed
	Would  []policy.Denial `json:"would,omitempty"` // what would have; none: it would have been allowed
	Error  string          `json:"error,omitempty"` // why it cannot be judged again
}

// Trials are what rules would have said of the past.
type Trials struct {
	Decisions int     `json:"decisions"`
	Same      int     `json:"same"`      // allowed as before, or denied by the same rules
	Denied    int     `json:"denied"`    // was allowed, would have been denied
	Allowed   int     `json:"allowed"`   // was denied, would have been allowed
	Otherwise int     `json:"otherwise"` // was denied, would have been denied by other rules
	Unjudged  int     `json:"unjudged"`
	Changes   []Trial `json:"changes"` // all but the same, oldest first
}

func policyTryCommand() *cobra.Command {
	out, flags, history := &cli.Output{}, &hostFlags{}, 0
	cmd := &cobra.Command{
		Use:   "try FOLDER",
		Short: "What the rules of a folder would have said of this host's last decisions",
		Long: `Judge the last decisions of this host's audit log again, by the shipped rules and those of a folder, and say which would have changed: what was
allowed and would have been denied, and by what, and the reverse. Nothing else is done.

Exit statuses: 0 nothing that was allowed would have been denied, 1 error, 2 usage, 3 something would have been, or the rules do not load.`,
		Example: "  kmo policy try policy --history 100\n  kmo policy try policy -o json | jq '.changes[] | {commit, would}'",
		Args:    cli.OneArg("the folder of the rules"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if history < 1 {
				return cli.Usagef("--history %d: want 1 or more decisions", history)
			}
			layers, err := layersOf(args[0])
			if err != nil {
				return err
			}
			set, err := policy.Draft(layers...)
			if err != nil {
				return placed(args[0], err)
			}
			trials, err := try(cmd.Context(), flags, set, history)
			if err != nil {
				return err
			}
			if err := out.Print(cmd.OutOrStdout(), trials, trials.text); err != nil {
				return err
			}
			if trials.Denied > 0 {
				return cli.Status(cli.ExitRefused)
			}
			return nil
		},
	}
	flags.add(cmd)
	out.Add(cmd)
	cmd.Flags().IntVarP(&history, "history", "n", 100, "how many of the last decisions")
	return cmd
}

// try judges the last n recorded decisions by other rules.
func try(ctx context.Context, flags *hostFlags, set *policy.Set, n int) (Trials, error) {
	trials := Trials{Changes: []Trial{}}
	c, err := dial(ctx, flags)
	if err != nil {
		return trials, err
	}
	defer func() { _ = c.close() }()
	trials.Decisions, err = c.records(ctx, url.Values{"last": {strconv.Itoa(n)}, "kind": {"decision"}}, func(record audit.Record) error {
		var entry reconciler.DecisionEntry
		if err := json.Unmarshal(record.Body, &entry); err != nil {
			return fmt.Errorf("decision %d of the audit log: %w", record.Index, err)
		}
		now, err := set.Replay(ctx, entry.Decision.Input)
		if err != nil && refusal.Of(err) == nil {
			return err
		}
		trials.add(Trial{Index: record.Index, Time: record.Time, Commit: record.Commit, Was: entry.Decision.Denied, Would: now.Denied}, err)
		return nil
	})
	return trials, err
}

// add counts one.
func (t *Trials) add(one Trial, err error) {
	who := func(denials []policy.Denial) (ids []string) {
		for _, d := range denials {
			ids = append(ids, d.ID+" "+d.Unit)
		}
		return slices.Compact(ids)
	}
	switch was, would := who(one.Was), who(one.Would); {
	case err != nil:
		t.Unjudged++
		one.Error, one.Would = err.Error(), nil
	case slices.Equal(was, would):
		t.Same++
		return
	case len(was) == 0:
		t.Denied++
	case len(would) == 0:
		t.Allowed++
	default:
		t.Otherwise++
	}
	t.Changes = append(t.Changes, one)
}

func (t Trials) text(w io.Writer) {
	for _, one := range t.Changes {
		verdict := func(denials []policy.Denial) string {
			if len(denials) == 0 {
				return "allowed"
			}
			lines := []string{"denied by"}
			for _, d := range denials {
				lines = append(lines, inOneLine(d))
			}
			return strings.Join(lines, "\n      ")
		}
		would := "would have been " + verdict(one.Would)
		if one.Error != "" {
			would = "cannot be judged again: " + refusal.Clip(one.Error, 500)
		}
		_, _ = fmt.Fprintf(w, "%s  %s  #%d\n    was %s\n    %s\n", short(one.Commit), one.Time.Local().Format(time.DateTime), one.Index, verdict(one.Was), would)
	}
	_, _ = fmt.Fprintf(w, "%d decisions: %d the same, %d allowed that would have been denied, %d denied that would have been allowed, %d denied by other rules, %d not judged\n",
		t.Decisions, t.Same, t.Denied, t.Allowed, t.Otherwise, t.Unjudged)
}
