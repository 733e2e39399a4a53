// Package trustroot is `kmo trust`: how a site's trust root is made, changed, signed by those who must, and looked at.
package trustroot

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kindos/kmo/cmd/kmo/cli"
	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/policy/trust"
	"github.com/kindos/kmo/policy/trust/signature"
)

// Command is `kmo trust`.
func Command() *cobra.Command {
	return cli.Group("trust", "Make, change and check a site's trust root", initCommand(), addCommand(), removeCommand(), rotateCommand(), signCommand(), showCommand(), checkCommand())
}

func initCommand() *cobra.Command {
	f := &Founding{}
	cmd := &cobra.Command{
		Use:   "init FOLDER",
		Short: "Write a site's first trust root, and print the pin",
		Long: `Write trust/1.root.json into a site's folder, and print the pin that hosts are given. 'kmo site init' does the same, and writes site.yaml as
well. With --threshold 2 or more it is root.draft.json until so many people have signed it with 'kmo trust sign'.

Exit statuses: 0 written, 1 error (a root that is there is never overwritten), 2 usage, 3 refused (a root that nothing would accept).`,
		Example: `  kmo trust init site --name north-sea --threshold 2 --sign ~/.ssh/id_ed25519 \
      --person alice=alice@example.org=alice.pub --person bob=bob@example.org=bob.pub --person carol=carol@example.org=carol.pub`,
		Args: cli.OneArg("the site's folder"),
		RunE: func(cmd *cobra.Command, args []string) error {
			file, err := f.Sign(cmd)
			if err != nil {
				return err
			}
			return f.Write(cmd.OutOrStdout(), cmd.ErrOrStderr(), args[0], file)
		},
	}
	f.Add(cmd)
	return cmd
}

func signCommand() *cobra.Command {
	var folder, key string
	var yes bool
	cmd := &cobra.Command{
		Use:   "sign",
		Short: "Sign the next trust root",
		Long: `Sign root.draft.json: it shows what changes and who has signed, asks, and adds a signature. The role root of both the version in force and
the new one must be satisfied; the file goes from one to the next by mail or on a branch. With the last signature it becomes
trust/N.root.json, to be committed alone.

Exit statuses: 0 signed, 1 error or not signed, 2 usage, 3 refused.`,
		Example: "  kmo trust sign --key ~/.ssh/id_ed25519_sk\n  kmo trust sign -C ~/sites/north-sea --yes",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := open(folder)
			if err != nil {
				return err
			}
			if s.next == nil {
				return fmt.Errorf("%s: there is no draft to sign; 'kmo trust add', 'remove' and 'rotate' make one", filepath.Join(folder, draftName))
			}
			signer, done, err := cli.Signer(key)
			if err != nil {
				return err
			}
			defer func() { _ = done() }()
			file, err := trust.CosignRoot(s.draft, signer)
			if err != nil {
				return err
			}
			_, sides, err := s.roots.Draft(file)
			if err != nil {
				return err
			}
			if signed := func(side trust.Side) int { return len(side.Signed) }; slices.EqualFunc(sides, s.sides, func(a, b trust.Side) bool { return signed(a) == signed(b) }) {
				return &refusal.Error{Code: "E_SIG_UNKNOWN_KEY", Subject: filepath.Join(folder, draftName), Got: "key " + signature.KeyID(signer.PublicKey()) + ", with which nobody more has signed",
					Want: "a good key for the role root, of a member who has not signed yet"}
			}
			out := cmd.ErrOrStderr()
			_, _ = fmt.Fprintf(out, "trust root %d of %s\n", s.next.Version, s.next.Site)
			printChange(out, s.newest(), s.next)
			printSides(out, s.sides)
			if err := confirm(cmd, yes, "Sign it"); err != nil {
				return err
			}
			return s.keep(cmd.OutOrStdout(), file)
		},
	}
	cmd.Flags().StringVarP(&folder, "site", "C", ".", "the site's folder")
	cmd.Flags().StringVar(&key, "key", "", "the key that signs: a private key file, or a public one for the ssh-agent's; the agent's only key if not given")
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}

// confirm asks; no answer is no.
func confirm(cmd *cobra.Command, yes bool, what string) error {
	if yes {
		return nil
	}
	_, _ = fmt.Fprintf(cmd.ErrOrStderr(), "%s? [y/N] ", what)
	answer, _ := bufio.NewReader(cmd.InOrStdin()).ReadString('\n')
	if !slices.Contains([]string{"y", "yes"}, strings.ToLower(strings.TrimSpace(answer))) {
		return errors.New("not done; --yes does not ask")
	}
	return nil
}

func showCommand() *cobra.Command {
	var folder string
	out := &cli.Output{}
	cmd := &cobra.Command{
		Use:   "show [VERSION]",
		Short: "Print a trust root",
		Long: `Print a version of the trust root, the one in force if none is given, or the draft. As JSON it is what is signed: edited, 'kmo trust
rotate --from' takes it for the next version.

Exit statuses: 0 good, 1 error, 2 usage, 3 refused (the chain of versions is broken).`,
		Example: "  kmo trust show\n  kmo trust show draft\n  kmo trust show 2 -o json",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := open(folder)
			if err != nil {
				return err
			}
			root := s.newest()
			switch {
			case len(args) == 1 && args[0] == "draft":
				root = s.next
			case len(args) == 1:
				n, err := strconv.Atoi(args[0])
				if err != nil || n < 1 {
					return cli.Usagef("version %q: want a number or draft", args[0])
				}
				root = nil
				if n <= len(s.roots) {
					root = s.roots[n-1].Root
				}
			}
			if root == nil {
				return fmt.Errorf("%s has no such trust root: there are %d versions", folder, len(s.roots))
			}
			return out.Print(cmd.OutOrStdout(), root, func(w io.Writer) {
				_, _ = fmt.Fprintf(w, "version %d\n%s\n", root.Version, strings.Join(lines(root), "\n"))
			})
		},
	}
	cmd.Flags().StringVarP(&folder, "site", "C", ".", "the site's folder")
	out.Add(cmd)
	return cmd
}

// Checked is what `kmo trust check` prints as JSON.
type Checked struct {
	Version int          `json:"version"` // in force; 0 if there is only a draft
	Pin     trust.Pin    `json:"pin"`     // of version 1
	Draft   int          `json:"draft"`   // version of the draft; 0 if there is none
	Sides   []trust.Side `json:"sides"`   // who must sign it
}

func checkCommand() *cobra.Command {
	out := &cli.Output{}
	cmd := &cobra.Command{
		Use:   "check [FOLDER]",
		Short: "Check every version of a site's trust root, and who must sign the draft",
		Long: `Check every version of a site's trust root as a host would walk them: each signed by the thresholds of the version before and its own. Of a
draft it says what changes and who has yet to sign.

Exit statuses: 0 good, 1 error, 2 usage, 3 refused.`,
		Example: "  kmo trust check\n  kmo trust check ~/sites/north-sea -o json",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := open(cli.Folder(args))
			if err != nil {
				return err
			}
			if len(s.roots) == 0 && s.next == nil {
				return fmt.Errorf("%s: there is no trust root; 'kmo trust init' makes one", filepath.Join(s.folder, trust.RootPath(1)))
			}
			c := Checked{Version: len(s.roots), Sides: append([]trust.Side{}, s.sides...)}
			if len(s.roots) > 0 {
				c.Pin = s.roots[0].Pin
			}
			if s.next != nil {
				c.Draft = s.next.Version
			}
			return out.Print(cmd.OutOrStdout(), c, s.print)
		},
	}
	out.Add(cmd)
	return cmd
}

func (s *site) print(w io.Writer) {
	if len(s.roots) > 0 {
		_, _ = fmt.Fprintf(w, "%s: trust root %d, good\n", s.roots.Newest().Site, len(s.roots))
	}
	if s.next != nil {
		_, _ = fmt.Fprintf(w, "draft of trust root %d\n", s.next.Version)
		printChange(w, s.newest(), s.next)
		printSides(w, s.sides)
	}
}

// readFile reads a file, or the standard input where it is "-".
func readFile(cmd *cobra.Command, name string) ([]byte, error) {
	if name == "-" {
		return io.ReadAll(io.LimitReader(cmd.InOrStdin(), 1<<20+1))
	}
	return os.ReadFile(name)
}
