package approval

import (
	"cmp"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/kindos/kmo/cmd/kmo/cli"
	"github.com/kindos/kmo/cmd/kmo/review"
	"github.com/kindos/kmo/policy/trust"
)

// listing is what `kmo approvals -o json` prints.
type listing struct {
	Commit string           `json:"commit"`
	Base   string           `json:"base"` // "" for a first deployment
	Enough bool             `json:"enough"`
	Units  []trust.Reviewed `json:"units"`
}

// List is the command kmo approvals.
func List() *cobra.Command {
	a, out := &checkout{}, &cli.Output{}
	cmd := &cobra.Command{
		Use:   "approvals [REVISION]",
		Short: "Which approvals of a revision count, which do not and why, and who is missing",
		Long: `Which approvals of a revision of the checked-out branch count, which do not and why, unit by unit, and whose are missing. It counts as a
host counts that runs --base and gets the revision; without one it is the branch's head. What a host itself has accepted
since, 'kmo plan' there knows.

Without --base the upstream is what hosts run. Where that is the revision itself, as after a pull, it says which commits can be the base.

Exit statuses: 0 every unit has its approvals, 1 error, 2 usage, 3 some are missing, or the revision would be refused before they are counted.`,
		Example: `  kmo approvals
  kmo approvals --base 3f9a2c1d origin/main    # the base is what 'kmo status' on a host shows as good
  kmo approvals -o json | jq -r '.units[] | select(.need > (.counted | length)) | .open[]'`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			revision := "HEAD"
			if len(args) > 0 {
				revision = args[0]
			}
			return a.list(cmd, revision, out)
		},
	}
	a.add(cmd)
	out.Add(cmd)
	return cmd
}

func (a *checkout) list(cmd *cobra.Command, revision string, out *cli.Output) (err error) {
	source, done, err := a.open(cmd.Context())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done()) }()
	c, err := a.compare(cmd.Context(), source, revision)
	if err != nil {
		return err
	}
	if c.before.ID == c.after.ID {
		return a.noBase(cmd.Context(), c)
	}
	list := listing{Commit: c.after.ID, Base: c.before.ID, Enough: true, Units: append([]trust.Reviewed{}, c.Units...)}
	for _, u := range c.Units {
		list.Enough = list.Enough && u.Missing() == 0
	}
	if err := out.Print(cmd.OutOrStdout(), list, list.print); err != nil || list.Enough {
		return err
	}
	return cli.Status(cli.ExitRefused)
}

func (l listing) print(w io.Writer) {
	_, _ = fmt.Fprintf(w, "commit %s, compared with %s\n", l.Commit, cmp.Or(l.Base, "nothing"))
	if len(l.Units) == 0 {
		_, _ = fmt.Fprintln(w, "no unit differs")
	}
	for _, u := range l.Units {
		_, _ = fmt.Fprintf(w, "\n%s\n", review.Head(u))
		for _, line := range review.Quorum(u) {
			_, _ = fmt.Fprintln(w, "  "+line)
		}
	}
}
