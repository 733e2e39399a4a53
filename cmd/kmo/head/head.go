// Package head holds the commands that say which commit a site's branch is at: what hosts ask for where the trust root sets freshness.
package head

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kindos/kmo/cmd/kmo/cli"
	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/policy/trust"
	"github.com/kindos/kmo/reconciler/template"
)

// Command is `kmo head`.
func Command() *cobra.Command {
	return cli.Group("head", "Say that a commit is the newest, where hosts ask for that", signCommand())
}

// signing is what `kmo head sign` is told.
type signing struct {
	repo, key, remote string
	valid             time.Duration
	push              bool
}

func signCommand() *cobra.Command {
	s := &signing{}
	cmd := &cobra.Command{
		Use:   "sign [REV]",
		Short: "Sign that a commit is the newest of the branch, for a time",
		Long: `Sign that a commit is the newest of the site's branch, until a time, and keep the statement at ` + trust.HeadRef + ` of the repository.
With --push it goes to the remote, where hosts look for it. Hosts whose trust root sets freshness accept nothing without one that has not
expired, so it is signed again after each push and well before it expires: by a machine, with a key of the role head.

It says that the commit is the newest, not that it is good. Without REV it is the upstream of the branch that is checked out.

Exit statuses: 0 signed, 1 error, 2 usage, 3 refused (a key whose head statements hosts do not count).`,
		Example: "  git push && kmo head sign --key ~/.ssh/id_ed25519 --push\n  kmo head sign origin/main --key head.key --valid 6h --push    # in a timer",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			rev := "@{upstream}"
			if len(args) > 0 {
				rev = args[0]
			}
			return s.run(cmd, rev)
		},
	}
	cmd.Flags().StringVarP(&s.repo, "repo", "C", ".", "the site's repository")
	cmd.Flags().StringVar(&s.key, "key", "", "the key that signs: a private key file, a public one for the ssh-agent's, or without it, the agent's only key")
	cmd.Flags().DurationVar(&s.valid, "valid", 0, "how long the statement is good; as long as the trust root lets it be if not given")
	cmd.Flags().BoolVar(&s.push, "push", false, "push it to the remote")
	cmd.Flags().StringVar(&s.remote, "remote", "origin", "the remote to push to")
	return cmd
}

func (s *signing) run(cmd *cobra.Command, rev string) error {
	ctx := cmd.Context()
	commit, err := s.git(ctx, nil, "rev-parse", "--verify", "--end-of-options", rev+"^{commit}")
	if err != nil {
		return err
	}
	config, root, err := s.site(ctx, commit)
	if err != nil {
		return err
	}
	valid := s.valid
	if valid == 0 {
		valid = root.Age()
	}
	if valid <= 0 || root.Age() == 0 {
		return cli.Usagef("no time to be good for: the trust root of %s sets no freshness, or --valid is %v", commit, s.valid)
	}
	if valid > root.Age() {
		return cli.Usagef("--valid %v: the trust root has hosts believe a statement for %v", valid, root.Age())
	}
	key, done, err := cli.Signer(s.key)
	if err != nil {
		return err
	}
	defer func() { _ = done() }()
	now := time.Now().UTC()
	if err := root.MayState(key.PublicKey(), now); err != nil {
		return err
	}
	stated := trust.HeadStatement{Site: string(config.Site), Branch: string(config.Branch), Commit: commit, Issued: now, Expires: now.Add(valid)}
	file, err := trust.SignHead(stated, key)
	if err != nil {
		return err
	}
	if err := s.keep(ctx, file); err != nil {
		return err
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s of %s is at %s until %s, signed by %s\n", stated.Branch, stated.Site, commit, stated.Expires.Format(time.RFC3339), root.Owner(key.PublicKey()))
	return err
}

// site reads what a commit says of the site and its newest trust root.
func (s *signing) site(ctx context.Context, commit string) (config template.Config, root *trust.Root, err error) {
	text, err := s.git(ctx, nil, "cat-file", "blob", commit+":site.yaml")
	if err != nil {
		return config, nil, err
	}
	if err := template.Decode("site.yaml", []byte(text), &config); err != nil {
		return config, nil, err
	}
	var chain trust.Chain
	for version := 1; ; version++ {
		file, err := s.git(ctx, nil, "cat-file", "blob", commit+":"+trust.RootPath(version))
		if err != nil && len(chain) > 0 {
			return config, chain.Newest(), nil
		}
		if err == nil {
			chain, err = chain.Then([]byte(file))
		}
		if err != nil {
			return config, nil, err
		}
	}
}

// keep writes the statement into the repository, and to the remote.
func (s *signing) keep(ctx context.Context, file []byte) error {
	blob, err := s.git(ctx, file, "hash-object", "-w", "--stdin")
	if err != nil {
		return err
	}
	if _, err := s.git(ctx, nil, "update-ref", trust.HeadRef, strings.TrimSpace(blob)); err != nil || !s.push {
		return err
	}
	_, err = s.git(ctx, nil, "push", "-q", "--end-of-options", s.remote, "+"+trust.HeadRef+":"+trust.HeadRef)
	return err
}

// git runs git in the repository.
func (s *signing) git(ctx context.Context, stdin []byte, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "git", append([]string{"-C", s.repo}, args...)...)
	cmd.Stdin = bytes.NewReader(stdin)
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return "", fmt.Errorf("git %s: %s", args[0], refusal.Clip(strings.TrimSpace(string(exit.Stderr)), 500))
	}
	if args[0] == "rev-parse" {
		out = bytes.TrimSpace(out)
	}
	return string(out), err
}
