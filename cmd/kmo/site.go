package main

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"

	"github.com/kindos/kmo/cmd/kmo/cli"
	"github.com/kindos/kmo/cmd/kmo/trustroot"
	"github.com/kindos/kmo/policy/trust"
	"github.com/kindos/kmo/policy/trust/signature"
	"github.com/kindos/kmo/reconciler/template"
)

func keyCommand() *cobra.Command {
	return cli.Group("key", "Make and show signing keys", &cobra.Command{
		Use:   "new FILE",
		Short: "Make an Ed25519 SSH key: FILE and FILE.pub",
		Long: `Make an Ed25519 SSH key without a passphrase: FILE, mode 0600, and FILE.pub. It is for hosts and tests; people use ssh-keygen, an
ssh-agent or a security key, and every command here takes those.

Exit statuses: 0 made, 1 error (a file that is there is never overwritten), 2 usage.`,
		Example: "  kmo key new /etc/kmo/host.key",
		Args:    cli.OneArg("the file to make"),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := newKey(args[0])
			if err == nil {
				_, err = fmt.Fprintln(cmd.OutOrStdout(), id)
			}
			return err
		},
	}, &cobra.Command{
		Use:     "show FILE",
		Short:   "Print the id of a public or private key",
		Long:    "Print the id by which kMO knows a key: its OpenSSH fingerprint.\n\nExit statuses: 0 good, 1 error, 2 usage, 3 refused (a kind of key that nothing accepts).",
		Example: "  kmo key show ~/.ssh/id_ed25519.pub",
		Args:    cli.OneArg("a key file"),
		RunE: func(cmd *cobra.Command, args []string) error {
			public, err := cli.PublicKey(args[0])
			if err == nil {
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s %s\n", signature.KeyID(public), public.Type())
			}
			return err
		},
	})
}

// newKey makes a key pair and returns its id.
func newKey(path string) (string, error) {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return "", err
	}
	block, err := ssh.MarshalPrivateKey(private, "")
	if err != nil {
		return "", err
	}
	line, err := ssh.NewPublicKey(public)
	if err != nil {
		return "", err
	}
	if err := cli.WriteNew(path, pem.EncodeToMemory(block), 0o600); err != nil {
		return "", err
	}
	return signature.KeyID(line), cli.WriteNew(path+".pub", ssh.MarshalAuthorizedKey(line), 0o644)
}

func siteCommand() *cobra.Command {
	return cli.Group("site", "Make and check a site's repository", siteInitCommand(), siteCheckCommand(), sitePinCommand())
}

func siteInitCommand() *cobra.Command {
	f := &trustroot.Founding{}
	var branch string
	var zones, registries []string
	cmd := &cobra.Command{
		Use:   "init FOLDER",
		Short: "Write site.yaml and the first trust root, and print the pin",
		Long: `Write site.yaml and trust/1.root.json into a folder, and print the pin that hosts are given. People sign commits, approvals and the
root; hosts sign reverts and nothing else.

Exit statuses: 0 written, 1 error (a file that is there is never overwritten), 2 usage, 3 refused (a root that nothing would accept).`,
		Example: `  git init site
  kmo site init site --name north-sea --zone canary --zone edge-a --sign ~/.ssh/id_ed25519 \
      --person alice=alice@example.org=$HOME/.ssh/id_ed25519.pub --host edge-1=/etc/kmo/host.key.pub`,
		Args: cli.OneArg("the site's folder"),
		RunE: func(cmd *cobra.Command, args []string) error {
			root, err := f.Sign(cmd)
			if err != nil {
				return err
			}
			config := fmt.Sprintf("site: %s\nbranch: %s\nzones: [%s]\n", f.Site, branch, strings.Join(zones, ", "))
			if len(registries) > 0 {
				config += fmt.Sprintf("registries: [%s]\n", strings.Join(registries, ", "))
			}
			var parsed template.Config
			if err := template.Decode("site.yaml", []byte(config), &parsed); err != nil {
				return err
			}
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return err
			}
			if err := cli.WriteNew(filepath.Join(args[0], "site.yaml"), []byte(config), 0o644); err != nil {
				return err
			}
			return f.Write(cmd.OutOrStdout(), cmd.ErrOrStderr(), args[0], root)
		},
	}
	f.Add(cmd)
	cmd.Flags().StringVar(&branch, "branch", "main", "the branch that hosts follow")
	cmd.Flags().StringArrayVar(&zones, "zone", []string{"edge"}, "a zone, in the order in which changes go out; repeat")
	cmd.Flags().StringArrayVar(&registries, "registry", nil, "where images may come from; repeat")
	return cmd
}

func sitePinCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "pin [FOLDER]",
		Short:   "Print the pin of a site's trust root, as agent.yaml has it",
		Long:    "Print the pin of a site's trust root, as agent.yaml has it.\n\nExit statuses: 0 good, 1 error, 2 usage, 3 refused (no valid trust root).",
		Example: "  kmo site pin . >> agent.yaml",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			roots, err := trust.Roots(os.DirFS(cli.Folder(args)))
			if err != nil {
				return err
			}
			return trustroot.PrintPin(cmd.OutOrStdout(), roots[0].Pin)
		},
	}
}

func siteCheckCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "check [FOLDER]",
		Short: "Check a site's files as a host would read them",
		Long: `Check a site's files as a host would read them: site.yaml, profiles, units, the dependency graph, the trust root and the site's own
rules with their tests. Signatures, approvals and tripwires are for 'kmo plan'.

Exit statuses: 0 good, 1 error, 2 usage, 3 refused.`,
		Example: "  kmo site check\n  kmo site check ~/sites/north-sea",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			folder, err := os.OpenRoot(cli.Folder(args))
			if err != nil {
				return err
			}
			defer func() { _ = folder.Close() }()
			site, err := template.Load(folder.FS())
			faults := []error{err}
			_, err = trust.Roots(folder.FS())
			faults = append(faults, err)
			if sub, err := fs.Sub(folder.FS(), "policy"); err == nil {
				_, err := rules(sub)
				faults = append(faults, err)
			}
			if err := errors.Join(faults...); err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: %d units, good\n", site.Config.Site, len(site.Units))
			return err
		},
	}
}
