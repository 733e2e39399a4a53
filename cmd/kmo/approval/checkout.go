package approval

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kindos/kmo/cmd/kmo/review"
	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/policy/trust"
	"github.com/kindos/kmo/reconciler"
	"github.com/kindos/kmo/reconciler/gitrepo"
	"github.com/kindos/kmo/reconciler/template"
)

// checkout is a site's checked-out repository, and what its branch is compared with.
type checkout struct{ repo, base string }

func (a *checkout) add(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&a.repo, "repo", "C", ".", "the site's checked-out repository")
	cmd.Flags().StringVar(&a.base, "base", "", "the commit whose content the hosts run; the branch's upstream if not given, none for the first deployment")
}

// change is what lies between two commits of a site.
type change struct {
	*trust.Review
	verifier      *trust.Verifier
	source        *gitrepo.Repository
	before, after reconciler.Commit
	old, now      *template.Site // old is nil where nothing ran
}

// compare finds what a revision changes against the base.
func (a *checkout) compare(ctx context.Context, source *gitrepo.Repository, revision string) (*change, error) {
	before, after, err := a.commits(ctx, source, revision)
	if err != nil {
		return nil, err
	}
	c := &change{source: source, before: before, after: after}
	if c.now, c.verifier, err = judges(after); err != nil {
		return nil, err
	}
	if before.ID != "" {
		if c.old, err = template.Load(before.Tree); err != nil {
			return nil, fmt.Errorf("the base: %w", err)
		}
	}
	c.Review, err = c.verifier.Review(ctx, before, after, source)
	return c, err
}

// read reads both sides of a changed unit.
func (c *change) read(u trust.Reviewed) (unit review.Unit, err error) {
	unit = review.Unit{Reviewed: u}
	var version int
	if _, err := fmt.Sscanf(u.Unit, "@root-%d", &version); err == nil {
		roots, err := trust.Roots(c.after.Tree)
		if err != nil {
			return unit, err
		}
		if unit.Before.Fields, err = review.Fields(roots[version-2].Root); err != nil {
			return unit, err
		}
		unit.After.Fields, err = review.Fields(roots[version-1].Root)
		return unit, err
	}
	if c.before.ID != "" {
		if unit.Before, err = review.Read(c.before.Tree, c.old, u.UnitFacts); err != nil {
			return unit, err
		}
	}
	unit.After, err = review.Read(c.after.Tree, c.now, u.UnitFacts)
	return unit, err
}

// judges is a commit's site and its verifier, pinned to the first trust root that it brings: what is approved is judged by a host's own.
func judges(commit reconciler.Commit) (*template.Site, *trust.Verifier, error) {
	site, err := template.Load(commit.Tree)
	if err != nil {
		return nil, nil, err
	}
	roots, err := trust.Roots(commit.Tree)
	if err != nil {
		return nil, nil, err
	}
	return site, &trust.Verifier{Site: string(site.Config.Site), Branch: string(site.Config.Branch), Pin: roots[0].Pin, Describe: reconciler.Declare()}, nil
}

// bases is how many commits before the head are proposed as a base.
const bases = 5

// noBase says that the head is compared with itself, as it is after a pull, and what else it can be compared with.
func (a *checkout) noBase(ctx context.Context, c *change) error {
	head := c.after
	text := "nothing to compare: the base, " + cmp.Or(a.base, "the branch's upstream") + ", is the head itself.\n" +
		"--base must name the commit that the hosts run, which 'kmo status' on one of them shows as good"
	list, err := a.git(ctx, "log", "--first-parent", "--skip=1", fmt.Sprintf("--max-count=%d", bases), "--format=%H %s", head.ID)
	if err != nil {
		return err
	}
	for _, line := range strings.Split(list, "\n") {
		id, subject, _ := strings.Cut(line, " ")
		before, err := c.source.At(ctx, id)
		if err != nil {
			break // there is none before the first
		}
		changed, _, err := c.verifier.Compare(ctx, before, head, c.source)
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

// open copies the checked-out branch to where it can be read as a host reads it; done clears the copy.
func (a *checkout) open(ctx context.Context) (source *gitrepo.Repository, done func() error, err error) {
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

// commits reads the two sides of the change to a revision.
func (a *checkout) commits(ctx context.Context, source *gitrepo.Repository, revision string) (before, after reconciler.Commit, err error) {
	if after, err = source.Head(ctx); err != nil {
		return before, after, err
	}
	id, err := a.git(ctx, "rev-parse", "--verify", "--end-of-options", revision+"^{commit}")
	if err != nil {
		return before, after, err
	}
	if id != after.ID {
		if after, err = source.At(ctx, id); err != nil {
			return before, after, err
		}
	}
	base := a.base
	if base == "none" {
		return before, after, nil
	}
	if base == "" {
		base = "@{upstream}"
	}
	if id, err = a.git(ctx, "rev-parse", "--verify", "--end-of-options", base+"^{commit}"); err != nil {
		return before, after, fmt.Errorf("--base %s: %w; --base none is a first deployment", base, err)
	}
	before, err = source.At(ctx, id)
	return before, after, err
}

// git asks git about the checked-out repository.
func (a *checkout) git(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "git", append([]string{"-C", a.repo}, args...)...)
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return "", fmt.Errorf("git %s: %s", args[0], strings.TrimSpace(string(exit.Stderr)))
	}
	return strings.TrimSpace(string(out)), err
}

// short is a commit's id for people.
func short(id string) string { return id[:min(len(id), 12)] }
