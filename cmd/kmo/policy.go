package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/spf13/cobra"

	"github.com/kindos/kmo/cmd/kmo/cli"
	"github.com/kindos/kmo/policy"
	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/rego"
)

func policyCommand() *cobra.Command {
	return cli.Group("policy", "The rules that judge a change: write, test and try them", policyInitCommand(), policyCheckCommand(), policyTestCommand(),
		policyEvalCommand(), policyTryCommand(), policyFormatCommand(), policyListCommand(), policyDocsCommand(), policySchemaCommand())
}

// ruleFolder is the folder of a site's rules that a command is given: policy/ without one.
func ruleFolder(args []string) string {
	if len(args) == 0 {
		return "policy"
	}
	return args[0]
}

// layersOf are the shipped rules and those of a folder.
func layersOf(folder string) ([]fs.FS, error) {
	if _, err := os.ReadDir(folder); err != nil {
		return nil, fmt.Errorf("the folder of the site's rules: %w; want one with *.rego ('kmo policy init' makes it)", err)
	}
	return []fs.FS{rego.Rules(), os.DirFS(folder)}, nil
}

// placed says of refusals, which know a site's rules as policy/, where their files are.
func placed(folder string, err error) error {
	for _, one := range refusal.All(err) {
		one.Subject = placedText(folder, one.Subject)
	}
	return err
}

// placedText is the same for a text whose first line is a place.
func placedText(folder, text string) string {
	line, rest, more := strings.Cut(text, "\n")
	line = strings.Replace(line, "policy/", filepath.ToSlash(filepath.Clean(folder))+"/", 1)
	if more {
		return line + "\n" + rest
	}
	return line
}

func policyInitCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "init [FOLDER]",
		Short: "Write a first rule with its tests",
		Long: `Write a first rule with its tests, an example of the input that it judges, and a README.md, into a folder that is new or empty: policy/
without one.

Exit statuses: 0 written, 1 error (a folder that holds something is left as it is), 2 usage.`,
		Example: "  kmo policy init\n  kmo policy check",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			folder := ruleFolder(args)
			if found, err := os.ReadDir(folder); err == nil && len(found) > 0 {
				return fmt.Errorf("%s: it holds %s; want a folder that is new or empty", folder, found[0].Name())
			} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			files, err := policy.Scaffold()
			if err != nil {
				return err
			}
			if err := os.CopyFS(folder, files); err != nil {
				return err
			}
			names, err := fs.Glob(files, "*")
			for _, name := range names {
				_, _ = fmt.Fprintln(cmd.OutOrStdout(), filepath.Join(folder, name))
			}
			return err
		},
	}
}

func policyCheckCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "check [FOLDER]",
		Short: "Load a site's rules as a host would, and look for what is probably wrong",
		Long: `Load a site's rules as a host would: compile them strictly, run their tests, and see that every forbidden input is still denied. What a
host would load and is probably wrong is refused, too: a rule that reads what the input does not have (kmo policy schema), and a finding in
another form than {"id", "unit", "path", "msg"} with a message "found; want what would pass". Every fault is said at once, with its file, line
and column. Without a folder it is policy/, and where there is none, the shipped rules alone.

Exit statuses: 0 good, 1 error, 2 usage, 3 refused.`,
		Example: "  kmo policy check\n  kmo policy check ~/sites/north-sea/policy",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			layers, folder, err := rulesHere(strings.Join(args, ""))
			if err != nil {
				return err
			}
			set, err := policy.Check(layers...)
			if err != nil {
				return placed(folder, err)
			}
			what := "the shipped rules alone"
			if folder != "" {
				what = "the shipped rules and those of " + folder
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "good: %s, %s\n", set.Digest(), what)
			return err
		},
	}
}

// rulesHere are the shipped rules with those of the folder that is named, or with those of policy/ if there is such a folder.
func rulesHere(named string) (layers []fs.FS, folder string, err error) {
	if named == "" {
		if _, err := os.Stat("policy"); errors.Is(err, fs.ErrNotExist) {
			return []fs.FS{rego.Rules()}, "", nil
		}
		named = "policy"
	}
	layers, err = layersOf(named)
	return layers, named, err
}

// testRun is what `kmo policy test` does.
type testRun struct {
	cli.Output
	match           string
	coverage, watch bool
	folder          string
}

// testReport is what it prints as JSON.
type testReport struct {
	Tests    []policy.Test    `json:"tests"`
	Coverage *policy.Coverage `json:"coverage,omitempty"`
}

func policyTestCommand() *cobra.Command {
	t := &testRun{}
	cmd := &cobra.Command{
		Use:   "test [FOLDER]",
		Short: "Run the tests of a site's rules, and say what was compared where one fails",
		Long: `Run the tests of a site's rules: every test_… of *_test.rego. Of one that fails it says where it stands, which expression did not hold, and
the values in it. --coverage says which lines of the rules no test reaches. --watch runs them again at each save, until interrupted. Without a
folder it is policy/.

Exit statuses: 0 all pass, 1 error (as when no test is called so), 2 usage, 3 refused (a test fails, there is none, or the rules do not load).`,
		Example: "  kmo policy test --coverage\n  kmo policy test --run ticket --watch\n  kmo policy test -o json | jq '.tests[] | select(.passed | not)'",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			t.folder = ruleFolder(args)
			if _, err := regexp.Compile(t.match); err != nil {
				return cli.Usagef("--run: %w", err)
			}
			if !t.watch {
				return t.run(cmd.Context(), cmd.OutOrStdout())
			}
			return watchFolder(cmd.Context(), t.folder, func() {
				if err := t.run(cmd.Context(), cmd.OutOrStdout()); err != nil && !errors.As(err, new(cli.Status)) {
					complain(cmd.ErrOrStderr(), err)
				}
			})
		},
	}
	t.Add(cmd)
	cmd.Flags().StringVar(&t.match, "run", "", "only tests whose name (data.site_test.test_…) this regular expression matches")
	cmd.Flags().BoolVar(&t.coverage, "coverage", false, "say how many of the rules' lines the tests reach, and which they do not")
	cmd.Flags().BoolVarP(&t.watch, "watch", "w", false, "run again at each save, until interrupted")
	return cmd
}

func (t *testRun) run(ctx context.Context, w io.Writer) error {
	layers, err := layersOf(t.folder)
	if err != nil {
		return err
	}
	report := testReport{}
	if report.Tests, err = policy.RunTests(ctx, t.match, layers...); err != nil {
		return placed(t.folder, err)
	}
	if len(report.Tests) == 0 && t.match != "" {
		return fmt.Errorf("--run %s: no test is called so; 'kmo policy test' without it shows them all", t.match)
	}
	if len(report.Tests) == 0 {
		return &refusal.Error{Code: "E_POLICY_COMPILE", Subject: t.folder, Got: "no tests", Want: "rules test_… in *_test.rego beside those that judge"}
	}
	if t.coverage {
		covered, err := policy.Cover(ctx, t.match, layers...)
		if err != nil {
			return placed(t.folder, err)
		}
		for i, line := range covered.Missed {
			covered.Missed[i] = placedText(t.folder, line)
		}
		report.Coverage = &covered
	}
	failed := false
	for i := range report.Tests {
		test := &report.Tests[i]
		failed = failed || !test.Passed && !test.Todo
		test.At = placedText(t.folder, test.At)
		for j, why := range test.Why {
			test.Why[j] = placedText(t.folder, why)
		}
	}
	if err := t.Print(w, report, report.text); err != nil {
		return err
	}
	if failed {
		return cli.Status(cli.ExitRefused)
	}
	return nil
}

func (r testReport) text(w io.Writer) {
	passed, todo := 0, 0
	for _, test := range r.Tests {
		switch {
		case test.Passed:
			passed++
		case test.Todo:
			todo++
		default:
			_, _ = fmt.Fprintf(w, "%s: %s fails\n", test.At, test.Name)
			for _, why := range test.Why {
				_, _ = fmt.Fprintf(w, "  %s\n", strings.ReplaceAll(why, "\n", "\n    "))
			}
		}
	}
	_, _ = fmt.Fprintf(w, "%d of %d tests pass", passed, len(r.Tests)-todo)
	if todo > 0 {
		_, _ = fmt.Fprintf(w, ", %d are to do", todo)
	}
	_, _ = fmt.Fprintln(w)
	if c := r.Coverage; c != nil {
		_, _ = fmt.Fprintf(w, "they reach %.1f %% of %d lines\n", c.Percent, c.Lines)
		for _, line := range c.Missed {
			_, _ = fmt.Fprintf(w, "  %s is not reached\n", line)
		}
	}
}

// watchFolder does something now, and again at each change of a rule below a folder, until ctx ends.
func watchFolder(ctx context.Context, folder string, do func()) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return err
	}
	defer func() { _ = watcher.Close() }()
	for {
		err := filepath.WalkDir(folder, func(path string, entry fs.DirEntry, err error) error {
			if err != nil || !entry.IsDir() {
				return err
			}
			return watcher.Add(path) // twice is once
		})
		if err != nil {
			return fmt.Errorf("watching %s: %w", folder, err)
		}
		if do(); !changed(ctx, watcher) {
			return nil
		}
	}
}

// changed waits until something has changed and nothing has for a moment; false is the end.
func changed(ctx context.Context, watcher *fsnotify.Watcher) bool {
	var quiet <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return false
		case <-quiet:
			return true
		case _, open := <-watcher.Errors:
			if !open {
				return false
			}
			quiet = time.After(100 * time.Millisecond) // something may have been missed
		case event := <-watcher.Events:
			if ext := filepath.Ext(event.Name); event.Op != fsnotify.Chmod && (ext == ".rego" || ext == "") { // or a folder
				quiet = time.After(100 * time.Millisecond)
			}
		}
	}
}

func policyFormatCommand() *cobra.Command {
	check := false
	cmd := &cobra.Command{
		Use:   "fmt [FOLDER]",
		Short: "Write a site's rules as opa fmt does",
		Long: `Write a site's rules as opa fmt does, and list the files that were changed. Without a folder it is policy/.

Exit statuses: 0 good, 1 error, 2 usage, 3 refused (a file is no Rego; with --check, a file would be changed).`,
		Example: "  kmo policy fmt\n  kmo policy fmt --check policy",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			folder := ruleFolder(args)
			layers, err := layersOf(folder)
			if err != nil {
				return err
			}
			files, err := policy.Format(layers[1])
			for _, name := range slices.Sorted(maps.Keys(files)) {
				path := filepath.Join(folder, filepath.FromSlash(name))
				if !check {
					err = errors.Join(err, os.WriteFile(path, files[name], 0o644)) // which keeps the mode of a file that is there
				}
				_, _ = fmt.Fprintln(cmd.OutOrStdout(), path)
			}
			if err == nil && check && len(files) > 0 {
				return cli.Status(cli.ExitRefused)
			}
			return placed(folder, err)
		},
	}
	cmd.Flags().BoolVar(&check, "check", false, "change nothing: only list the files that would be")
	return cmd
}

func policyListCommand() *cobra.Command {
	out := &cli.Output{}
	cmd := &cobra.Command{
		Use:     "list",
		Short:   "List the tripwires that no site can switch off",
		Long:    "List the tripwires that no site can switch off. 'kmo policy docs' says more of each.\n\nExit statuses: 0 good, 1 error, 2 usage.",
		Example: "  kmo policy list\n  kmo policy list -o json | jq -r '.[] | select(.waivable) | .id'",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			all, err := policy.Tripwires()
			if err != nil {
				return err
			}
			return out.Print(cmd.OutOrStdout(), all, func(w io.Writer) {
				table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
				_, _ = fmt.Fprintln(table, "ID\tWAIVABLE\tTITLE")
				for _, one := range all {
					_, _ = fmt.Fprintf(table, "%s\t%s\t%s\n", one.ID, yesNo(one.Waivable), one.Title)
				}
				_ = table.Flush()
			})
		},
	}
	out.Add(cmd)
	return cmd
}

func yesNo(yes bool) string {
	if yes {
		return "yes"
	}
	return "no"
}

func policyDocsCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "docs",
		Short: "Print the page of the tripwires",
		Long: `Print the page of the tripwires, as Markdown: of each its id, its title, why it is there, what it lets pass, and whether a waiver could pass
it. It is made of what the rules say of themselves.

Exit statuses: 0 good, 1 error, 2 usage.`,
		Example: "  kmo policy docs | less",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			page, err := tripwirePage()
			if err == nil {
				_, err = io.WriteString(cmd.OutOrStdout(), page)
			}
			return err
		},
	}
}

// tripwirePage is docs/tripwires.md.
func tripwirePage() (string, error) {
	all, err := policy.Tripwires()
	if err != nil {
		return "", err
	}
	var b strings.Builder
	b.WriteString(`<!-- Printed by 'kmo policy docs' from what the rules in rego/ say of themselves. -->
# Tripwires

What no site can switch off: its own rules can only deny more. KT021 and KT023 have no rule: without them no change is judged at all.

| id | refuses | a waiver can pass it |
| --- | --- | --- |
`)
	for _, one := range all {
		fmt.Fprintf(&b, "| [%s](#%s) | %s | %s |\n", one.ID, strings.ToLower(one.ID), one.Title, yesNo(one.Waivable))
	}
	b.WriteString("\n[trust.md](trust.md) says how a rule that can be waived is waived for a while.\n")
	for _, one := range all {
		fmt.Fprintf(&b, "\n## %s\n\n%s\n\n**Refuses:** %s.\n\n**Passes:** %s.\n", one.ID, one.Description, one.Title, one.Passes)
	}
	return b.String(), nil
}

func policySchemaCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "schema",
		Short: "Print the JSON Schema of what rules can look at",
		Long: `Print the JSON Schema of the input document, version 1: everything that a rule can look at, and what each part of it is. 'kmo policy check'
holds rules against it.

Exit statuses: 0 good, 1 error, 2 usage.`,
		Example: "  kmo policy schema | jq '.properties.change.properties | map_values(.description)'",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			text, err := policy.Schema()
			if err == nil {
				_, err = cmd.OutOrStdout().Write(text)
			}
			return err
		},
	}
}
