// Package approval has the commands with which people approve a change and see who has: kmo approve and kmo approvals.
package approval

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"
	"golang.org/x/term"

	"github.com/kindos/kmo/cmd/kmo/cli"
	"github.com/kindos/kmo/cmd/kmo/review"
	"github.com/kindos/kmo/policy/trust"
	"github.com/kindos/kmo/policy/trust/signature"
)

// approving is what `kmo approve` is told.
type approving struct {
	checkout
	key    string
	units  []string
	valid  time.Duration
	intent trust.Intent
	waives []string
	reason string
	yes    bool
}

// Approve is the command kmo approve.
func Approve() *cobra.Command {
	a := &approving{}
	cmd := &cobra.Command{
		Use:   "approve",
		Short: "Approve what the checked-out branch changes, as a signed file to commit",
		Long: `Approve what the checked-out branch changes against --base, unit by unit: it shows what is signed, asks, and writes one file for each unit
under approvals/. Commit and push those files; hosts count them. An approval names contents, so it survives a rebase and
dies with the slightest change.

What is shown is everything that the approval covers: images by their digests, each field of the unit after its profile, the lines of its
other files, and of secrets that they change. Then who has approved already, whose approvals do not count and why, and who may still.
Characters that do not show, or would steer the terminal, are quoted. It asks on a terminal only: a script says --yes.

Without --base the upstream is what hosts run: right before a push. After a pull there is nothing between the two, and it says which commits
can be the base instead.

The key is a private SSH key file, a public one whose private half the ssh-agent holds, or, without --key, the agent's only key.

With --waive it is a waiver instead: those rules' denials of exactly this content pass until it expires, in at most 14 days. That takes as
many as a change of tier 0 does, whatever the unit's tier, and its approvals besides. 'kmo policy list' says which rules can be waived.

Exit statuses: 0 approved, 1 error or not approved, 2 usage, 3 refused.`,
		Example: `  git commit -S -am "relay: lower latency"
  kmo approve --base origin/main --key ~/.ssh/id_ed25519
  git add approvals && git commit -S -m "approve relay" && git push
  git pull && kmo approve --base 3f9a2c1d    # what 'kmo status' on a host shows as good
  kmo approve --unit relay --waive KT010 --reason 'the vendor fixes it in May' --valid 72h`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.run(cmd) },
	}
	a.add(cmd)
	cmd.Flags().StringVar(&a.key, "key", "", "the key that signs")
	cmd.Flags().StringArrayVar(&a.units, "unit", nil, "only this unit; repeat. Without it, every changed unit whose tier needs approvals")
	cmd.Flags().DurationVar(&a.valid, "valid", 7*24*time.Hour, "how long the approval counts")
	cmd.Flags().StringVar(&a.intent.Summary, "summary", "", "why, in one line")
	cmd.Flags().StringVar(&a.intent.Ticket, "ticket", "", "where it was asked for")
	cmd.Flags().StringSliceVar(&a.waives, "waive", nil, "not an approval but a waiver of these rules; needs --unit and --reason")
	cmd.Flags().StringVar(&a.reason, "reason", "", "why the rules are waived")
	cmd.Flags().BoolVarP(&a.yes, "yes", "y", false, "do not ask")
	return cmd
}

// longest is how long an approval may count.
const longest = 366 * 24 * time.Hour

func (a *approving) run(cmd *cobra.Command) (err error) {
	if a.valid <= 0 || a.valid > longest {
		return cli.Usagef("--valid %v: want more than nothing and at most %v", a.valid, longest)
	}
	if (len(a.waives) > 0) != (a.reason != "") || len(a.waives) > 0 && (len(a.units) == 0 || a.valid > trust.MaxWaiver) {
		return cli.Usagef("--waive needs --unit, --reason, and --valid of at most %v", trust.MaxWaiver)
	}
	ctx := cmd.Context()
	source, done, err := a.open(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done()) }()
	c, err := a.compare(ctx, source, "HEAD")
	if err != nil {
		return err
	}
	c.Units = slices.DeleteFunc(c.Units, func(u trust.Reviewed) bool {
		return len(a.units) == 0 && u.Need == 0 || len(a.units) > 0 && !slices.Contains(a.units, u.Unit)
	})
	switch {
	case len(c.Units) > 0:
	case c.before.ID == c.after.ID:
		return a.noBase(ctx, c)
	default:
		return errors.New("nothing to approve: no changed unit needs it")
	}
	key, hangUp, err := cli.Signer(a.key)
	if err != nil {
		return err
	}
	defer func() { _ = hangUp() }()
	var approvals []trust.Predicate
	for _, unit := range c.Units {
		base, err := trust.Base(ctx, c.before, c.after, &unit.UnitFacts, source)
		if err != nil {
			return err
		}
		approval := trust.NewApproval(c.verifier.Site, c.verifier.Branch, base, unit.UnitFacts, time.Now().Add(a.valid), a.intent)
		if len(a.waives) > 0 {
			approval = approval.Waiving(a.waives, a.reason)
		}
		approvals = append(approvals, approval)
	}
	if err := a.show(cmd, c, key, approvals); err != nil {
		return err
	}
	for _, approval := range approvals {
		if err := a.sign(cmd.OutOrStdout(), approval, key); err != nil {
			return err
		}
	}
	return nil
}

// sign writes a signed approval's file and names it.
func (a *approving) sign(out io.Writer, approval trust.Predicate, key ssh.Signer) error {
	name, data, err := trust.SignApproval(approval, key)
	if err == nil {
		err = a.keep(name, data)
	}
	if err == nil {
		_, err = fmt.Fprintln(out, name)
	}
	return err
}

// keep writes an approval's file into the checked-out site.
func (a *approving) keep(name string, data []byte) error {
	path := filepath.Join(a.repo, filepath.FromSlash(name))
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, data, 0o644)
}

// show prints exactly what will be signed, and by whom, and asks.
func (a *approving) show(cmd *cobra.Command, c *change, key ssh.Signer, approvals []trust.Predicate) error {
	out := cmd.ErrOrStderr()
	root := c.Root
	if err := root.MayApprove(key.PublicKey(), time.Now()); err != nil {
		return err
	}
	who := root.Owner(key.PublicKey())
	_, _ = fmt.Fprintf(out, "commit %s\ncompared with %s\n", c.after.ID, orNothing(c.before.ID))
	for i, p := range approvals {
		unit, err := c.read(c.Units[i])
		if err != nil {
			return err
		}
		_, _ = fmt.Fprintf(out, "\n%s\n", review.Head(unit.Reviewed))
		for _, line := range slices.Concat(signed(p), unit.Lines(), indent(review.Quorum(unit.Reviewed))) {
			_, _ = fmt.Fprintln(out, line)
		}
	}
	_, _ = fmt.Fprintln(out)
	for _, u := range c.Units {
		if slices.Contains(u.Authors, who) && root.Tiers[u.Tier].ExcludeAuthor {
			_, _ = fmt.Fprintf(out, "warning: %s wrote part of this, and tier %d of %s does not count its authors: somebody else must approve\n", who, u.Tier, u.Unit)
		}
	}
	if a.yes {
		return nil
	}
	return ask(cmd.InOrStdin(), out, fmt.Sprintf("Approve as %s (%s)?", who, signature.KeyID(key.PublicKey())))
}

// signed are the lines of what an approval says, but for what its unit's change is.
func signed(p trust.Predicate) []string {
	var lines []string
	if len(p.Waives) > 0 {
		lines = []string{"  WAIVES " + review.Plain(strings.Join(p.Waives, ", ")) + " because " + review.Plain(p.Reason) + ", as a change of tier 0"}
	}
	lines = append(lines, "  from "+orNothing(p.From.String()), "  to   "+orNothing(p.To.String()))
	for _, profile := range p.Profiles {
		lines = append(lines, fmt.Sprintf("  with profile %s from %s to %s", profile.Name, orNothing(profile.From.String()), orNothing(profile.To.String())))
	}
	return append(lines, fmt.Sprintf("  for %s, branch %s, after commit %s, until %s", p.Site, p.Branch, p.Base, p.Expires.Format(time.RFC3339)),
		"  summary "+orNothing(review.Plain(p.Intent.Summary)), "  ticket  "+orNothing(review.Plain(p.Intent.Ticket)))
}

func indent(lines []string) []string {
	for i := range lines {
		lines[i] = "  " + lines[i]
	}
	return lines
}

// ask asks on a terminal; everything but yes is no, and so is having no terminal.
func ask(in io.Reader, out io.Writer, question string) error {
	file, is := in.(*os.File)
	if !is || !term.IsTerminal(int(file.Fd())) {
		return errors.New("not approved: there is no terminal to ask on; --yes approves what was shown without asking")
	}
	_, _ = fmt.Fprint(out, question, " [y/N] ")
	answer, _ := bufio.NewReader(in).ReadString('\n') // no answer is no
	if !slices.Contains([]string{"y", "yes"}, strings.ToLower(strings.TrimSpace(answer))) {
		return errors.New("not approved")
	}
	return nil
}

func orNothing(text string) string {
	if text == "" {
		return "nothing"
	}
	return text
}
