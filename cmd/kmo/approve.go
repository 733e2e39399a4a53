package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"

	"github.com/kindos/kmo/cmd/kmo/cli"
	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/policy/trust"
	"github.com/kindos/kmo/policy/trust/signature"
	"github.com/kindos/kmo/reconciler"
	"github.com/kindos/kmo/reconciler/gitrepo"
	"github.com/kindos/kmo/reconciler/template"
)

// approving is what `kmo approve` is told.
type approving struct {
	repo, base, key string
	units           []string
	valid           time.Duration
	intent          trust.Intent
	yes             bool
}

func approveCommand() *cobra.Command {
	a := &approving{}
	cmd := &cobra.Command{
		Use:   "approve",
		Short: "Approve what the checked-out branch changes, as a signed file to commit",
		Long: `Approve what the checked-out branch changes against --base, unit by unit: it shows what is signed, asks, and writes one file for each unit
under approvals/. Commit and push those files; hosts count them. An approval names contents, so it survives a rebase and
dies with the slightest change.

Without --base the upstream is what hosts run: right before a push. After a pull there is nothing between the two, and it says which commits
can be the base instead.

The key is a private SSH key file, a public one whose private half the ssh-agent holds, or, without --key, the agent's only key.

Exit statuses: 0 approved, 1 error or not approved, 2 usage, 3 refused.`,
		Example: `  git commit -S -am "relay: lower latency"
  kmo approve --base origin/main --key ~/.ssh/id_ed25519
  git add approvals && git commit -S -m "approve relay" && git push
  git pull && kmo approve --base 3f9a2c1d    # what 'kmo status' on a host shows as good`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.run(cmd) },
	}
	cmd.Flags().StringVarP(&a.repo, "repo", "C", ".", "the site's checked-out repository")
	cmd.Flags().StringVar(&a.base, "base", "", "the commit whose content the hosts run; the branch's upstream if not given, none for the first deployment")
	cmd.Flags().StringVar(&a.key, "key", "", "the key that signs")
	cmd.Flags().StringArrayVar(&a.units, "unit", nil, "only this unit; repeat. Without it, every changed unit whose tier needs approvals")
	cmd.Flags().DurationVar(&a.valid, "valid", 7*24*time.Hour, "how long the approval counts")
	cmd.Flags().StringVar(&a.intent.Summary, "summary", "", "why, in one line")
	cmd.Flags().StringVar(&a.intent.Ticket, "ticket", "", "where it was asked for")
	cmd.Flags().BoolVarP(&a.yes, "yes", "y", false, "do not ask")
	return cmd
}

// longest is how long an approval may count.
const longest = 366 * 24 * time.Hour

func (a *approving) run(cmd *cobra.Command) (err error) {
	if a.valid <= 0 || a.valid > longest {
		return cli.Usagef("--valid %v: want more than nothing and at most %v", a.valid, longest)
	}
	source, done, err := a.open(cmd.Context())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done()) }()
	before, after, err := a.commits(cmd.Context(), source)
	if err != nil {
		return err
	}
	verifier, err := judges(after)
	if err != nil {
		return err
	}
	changed, root, err := verifier.Compare(cmd.Context(), before, after, source)
	if err != nil {
		return err
	}
	changed = slices.DeleteFunc(changed, func(u trust.UnitFacts) bool {
		return len(a.units) == 0 && u.Need == 0 || len(a.units) > 0 && !slices.Contains(a.units, u.Unit)
	})
	switch {
	case len(changed) > 0:
	case before.ID == after.ID:
		return a.noBase(cmd.Context(), source, verifier, after)
	default:
		return errors.New("nothing to approve: no changed unit needs it")
	}
	key, hangUp, err := cli.Signer(a.key)
	if err != nil {
		return err
	}
	defer func() { _ = hangUp() }()
	authors, err := root.Authors(cmd.Context(), before, after, changed, source)
	if err != nil {
		return err
	}
	var approvals []trust.Predicate
	for _, unit := range changed {
		base, err := trust.Base(cmd.Context(), before, after, &unit, source)
		if err != nil {
			return err
		}
		approvals = append(approvals, trust.NewApproval(verifier.Site, verifier.Branch, base, unit, time.Now().Add(a.valid), a.intent))
	}
	if err := a.show(cmd, root, key, after, approvals, authors); err != nil {
		return err
	}
	for _, approval := range approvals {
		if err := a.sign(cmd.OutOrStdout(), approval, key); err != nil {
			return err
		}
	}
	return nil
}

// judges is the verifier of a commit's site, pinned to the first trust root that it brings: what is approved is judged by a host's own.
func judges(commit reconciler.Commit) (*trust.Verifier, error) {
	site, err := template.Load(commit.Tree)
	if err != nil {
		return nil, err
	}
	roots, err := trust.Roots(commit.Tree)
	if err != nil {
		return nil, err
	}
	return &trust.Verifier{Site: string(site.Config.Site), Branch: string(site.Config.Branch), Pin: roots[0].Pin, Describe: reconciler.Declare()}, nil
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

// bases is how many commits before the head are proposed as a base.
const bases = 5

// noBase says that the head is compared with itself, as it is after a pull, and what else it can be compared with.
func (a *approving) noBase(ctx context.Context, source *gitrepo.Repository, verifier *trust.Verifier, head reconciler.Commit) error {
	text := "nothing to approve: the base, " + cmp.Or(a.base, "the branch's upstream") + ", is the head itself.\n" +
		"--base must name the commit that the hosts run, which 'kmo status' on one of them shows as good"
	list, err := a.git(ctx, "log", "--first-parent", "--skip=1", fmt.Sprintf("--max-count=%d", bases), "--format=%H %s", head.ID)
	if err != nil {
		return err
	}
	for _, line := range strings.Split(list, "\n") {
		id, subject, _ := strings.Cut(line, " ")
		before, err := source.At(ctx, id)
		if err != nil {
			break // there is none before the first
		}
		changed, _, err := verifier.Compare(ctx, before, head, source)
		if err != nil {
			return err
		}
		var need []string
		for _, unit := range changed {
			if unit.Need > 0 {
				need = append(need, unit.Unit)
			}
		}
		text += fmt.Sprintf("\n  --base %s  %s: %s to approve", short(id), refusal.Clip(subject, 60), cmp.Or(strings.Join(need, ", "), "nothing"))
	}
	return errors.New(text + "\n  --base none  if no host runs anything yet")
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
func (a *approving) show(cmd *cobra.Command, root *trust.Root, key ssh.Signer, after reconciler.Commit, approvals []trust.Predicate, authors map[string]map[string]bool) error {
	out := cmd.ErrOrStderr()
	id := signature.KeyID(key.PublicKey())
	if err := root.MayApprove(key.PublicKey(), time.Now()); err != nil {
		return err
	}
	who := root.Owner(key.PublicKey())
	_, _ = fmt.Fprintf(out, "commit %s\n", after.ID)
	for _, p := range approvals {
		_, _ = fmt.Fprintf(out, "%s: %s, tier %d, needs %d approvals\n  from %s\n  to   %s\n", p.Unit, p.Action, p.Tier, root.Tiers[p.Tier].Need, orNothing(p.From.String()), orNothing(p.To.String()))
		for _, profile := range p.Profiles {
			_, _ = fmt.Fprintf(out, "  with profile %s from %s to %s\n", profile.Name, orNothing(profile.From.String()), orNothing(profile.To.String()))
		}
		_, _ = fmt.Fprintf(out, "  for %s, branch %s, after commit %s, until %s\n", p.Site, p.Branch, p.Base, p.Expires.Format(time.RFC3339))
		_, _ = fmt.Fprintf(out, "  summary %s\n  ticket  %s\n", orNothing(p.Intent.Summary), orNothing(p.Intent.Ticket))
	}
	for _, p := range approvals {
		if authors[p.Unit][who] && root.Tiers[p.Tier].ExcludeAuthor {
			_, _ = fmt.Fprintf(out, "warning: %s wrote part of this, and tier %d of %s does not count its authors: somebody else must approve\n", who, p.Tier, p.Unit)
		}
	}
	if a.yes {
		return nil
	}
	_, _ = fmt.Fprintf(out, "Approve as %s (%s)? [y/N] ", who, id)
	answer, _ := bufio.NewReader(cmd.InOrStdin()).ReadString('\n') // no answer is no
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

// open copies the checked-out branch to where it can be read as a host reads it; done clears the copy.
func (a *approving) open(ctx context.Context) (source *gitrepo.Repository, done func() error, err error) {
	if a.repo, err = a.git(ctx, "rev-parse", "--show-toplevel"); err != nil {
		return nil, nil, err
	}
	folder, err := a.git(ctx, "rev-parse", "--path-format=absolute", "--git-common-dir")
	if err != nil {
		return nil, nil, err
	}
	branch, err := a.git(ctx, "symbolic-ref", "--short", "HEAD")
	if err != nil {
		return nil, nil, fmt.Errorf("no branch is checked out in %s, and approvals are of a branch: git switch to it (%w)", a.repo, err)
	}
	copied, err := os.MkdirTemp("", "kmo-approve-")
	if err != nil {
		return nil, nil, err
	}
	source = &gitrepo.Repository{Dir: filepath.Join(copied, "site"), Remote: folder, Branch: branch}
	if err := source.Open(); err != nil {
		return nil, nil, errors.Join(err, os.RemoveAll(copied))
	}
	return source, func() error { return errors.Join(source.Close(), os.RemoveAll(copied)) }, nil
}

// commits reads the two sides of the change.
func (a *approving) commits(ctx context.Context, source *gitrepo.Repository) (before, after reconciler.Commit, err error) {
	if after, err = source.Head(ctx); err != nil {
		return before, after, err
	}
	base := a.base
	if base == "none" {
		return before, after, nil
	}
	if base == "" {
		base = "@{upstream}"
	}
	id, err := a.git(ctx, "rev-parse", "--verify", "--end-of-options", base+"^{commit}")
	if err != nil {
		return before, after, fmt.Errorf("--base %s: %w; --base none approves a first deployment", base, err)
	}
	before, err = source.At(ctx, id)
	return before, after, err
}

// git asks git about the checked-out repository.
func (a *approving) git(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "git", append([]string{"-C", a.repo}, args...)...)
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return "", fmt.Errorf("git %s: %s", args[0], strings.TrimSpace(string(exit.Stderr)))
	}
	return strings.TrimSpace(string(out)), err
}
