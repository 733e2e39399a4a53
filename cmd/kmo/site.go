package main

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"

	"github.com/kindos/kmo/cmd/kmo/cli"
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

// founding is what `kmo site init` is told.
type founding struct {
	name, branch, sign string
	zones, registries  []string
	people, hosts      []string
	sealers            []string
}

func siteInitCommand() *cobra.Command {
	f := &founding{}
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
			if err := f.write(cmd.OutOrStdout(), args[0]); err != nil {
				return err
			}
			printShort(cmd.ErrOrStderr(), f.tiers())
			return nil
		},
	}
	cmd.Flags().StringVar(&f.name, "name", "", "the site's name")
	cmd.Flags().StringVar(&f.branch, "branch", "main", "the branch that hosts follow")
	cmd.Flags().StringVar(&f.sign, "sign", "", "key that signs the root: a private key file, or a public one for the ssh-agent's")
	cmd.Flags().StringArrayVar(&f.zones, "zone", []string{"edge"}, "a zone, in the order in which changes go out; repeat")
	cmd.Flags().StringArrayVar(&f.registries, "registry", nil, "where images may come from; repeat")
	cmd.Flags().StringArrayVar(&f.people, "person", nil, "NAME=EMAIL=PUBLIC-KEY-FILE of one who may commit and approve; repeat")
	cmd.Flags().StringArrayVar(&f.sealers, "sealer", nil, "NAME=PUBLIC-KEY-FILE of a machine that seals images: with one, tiers 0 to 2 ask for its statement of each; repeat")
	cmd.Flags().StringArrayVar(&f.hosts, "host", nil, "NAME=PUBLIC-KEY-FILE of a host that may revert; repeat")
	return cmd
}

func (f *founding) write(w io.Writer, folder string) error {
	if f.name == "" || len(f.people) == 0 {
		return cli.Usagef("site init needs --name and at least one --person")
	}
	root, err := f.root()
	if err != nil {
		return err
	}
	key, done, err := cli.Signer(f.sign)
	if err != nil {
		return err
	}
	defer func() { _ = done() }()
	file, err := trust.SignRoot(root, key)
	if err != nil {
		return err
	}
	if _, err := trust.ParseRoot(file); err != nil {
		return err
	}
	config := fmt.Sprintf("site: %s\nbranch: %s\nzones: [%s]\n", f.name, f.branch, strings.Join(f.zones, ", "))
	if len(f.registries) > 0 {
		config += fmt.Sprintf("registries: [%s]\n", strings.Join(f.registries, ", "))
	}
	var parsed template.Config
	if err := template.Decode("site.yaml", []byte(config), &parsed); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(folder, "trust"), 0o755); err != nil {
		return err
	}
	if err := cli.WriteNew(filepath.Join(folder, "site.yaml"), []byte(config), 0o644); err != nil {
		return err
	}
	if err := cli.WriteNew(filepath.Join(folder, trust.RootPath(1)), file, 0o644); err != nil {
		return err
	}
	return printPin(w, file)
}

// root is the founding root: everybody named may do all that people may do, one of them is enough for a new root.
func (f *founding) root() (trust.Root, error) {
	root := trust.Root{Version: 1, Site: f.name, Tiers: f.tiers()}
	var people []string
	for _, text := range f.people {
		parts := strings.SplitN(text, "=", 3)
		if len(parts) != 3 {
			return root, cli.Usagef("--person %q: want NAME=EMAIL=PUBLIC-KEY-FILE", text)
		}
		public, err := cli.PublicKey(parts[2])
		if err != nil {
			return root, err
		}
		people = append(people, parts[0])
		root.Principals = append(root.Principals, trust.Principal{Name: parts[0], Class: "human", Emails: []string{parts[1]},
			Keys: []trust.Key{{Public: cli.Authorized(public), Uses: []string{trust.RoleRoot, trust.RoleCommit, trust.RoleApprove}}}})
	}
	hosts, err := robots(&root, "--host", f.hosts, trust.RoleRevert)
	if err != nil {
		return root, err
	}
	sealers, err := robots(&root, "--sealer", f.sealers, trust.RoleImage)
	if err != nil {
		return root, err
	}
	root.Roles = []trust.Role{
		{Name: trust.RoleRoot, Threshold: 1, Members: people},
		{Name: trust.RoleCommit, Threshold: 1, Members: people},
		{Name: trust.RoleApprove, Threshold: 1, Members: slices.Clone(people)},
	}
	if len(hosts) > 0 {
		root.Roles = append(root.Roles, trust.Role{Name: trust.RoleRevert, Threshold: 1, Members: hosts})
	}
	if len(sealers) > 0 {
		root.Roles = append(root.Roles, trust.Role{Name: trust.RoleImage, Threshold: 1, Members: sealers})
	}
	return root, nil
}

// robots adds machines that each have one key for one use, and returns their names.
func robots(root *trust.Root, flag string, texts []string, use string) (names []string, err error) {
	for _, text := range texts {
		name, path, ok := strings.Cut(text, "=")
		if !ok {
			return nil, cli.Usagef("%s %q: want NAME=PUBLIC-KEY-FILE", flag, text)
		}
		public, err := cli.PublicKey(path)
		if err != nil {
			return nil, err
		}
		names = append(names, name)
		root.Principals = append(root.Principals, trust.Principal{Name: name, Class: "robot", Keys: []trust.Key{{Public: cli.Authorized(public), Uses: []string{use}}}})
	}
	return names, nil
}

// tiers are the default tiers as far as so many people can give their approvals.
func (f *founding) tiers() []trust.Tier {
	tiers := trust.DefaultTiers()
	for i := range tiers {
		tier := &tiers[i]
		others := len(f.people)
		if tier.ExcludeAuthor = tier.ExcludeAuthor && others > 1; tier.ExcludeAuthor {
			others--
		}
		tier.Need = min(tier.Need, others)
		if len(f.sealers) > 0 && i < 3 {
			tier.Statement = trust.RoleImage
		}
	}
	return tiers
}

// printShort says which tiers need fewer approvals than they should.
func printShort(w io.Writer, tiers []trust.Tier) {
	for i, should := range trust.DefaultTiers() {
		if tiers[i].Need < should.Need {
			_, _ = fmt.Fprintf(w, "tier %d needs only %d of %d approvals: name more people with --person\n", i, tiers[i].Need, should.Need)
		}
	}
}

func sitePinCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "pin [FOLDER]",
		Short:   "Print the pin of a site's trust root, as agent.yaml has it",
		Long:    "Print the pin of a site's trust root, as agent.yaml has it.\n\nExit statuses: 0 good, 1 error, 2 usage, 3 refused (no valid trust root).",
		Example: "  kmo site pin . >> agent.yaml",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			file, err := os.ReadFile(filepath.Join(cli.Folder(args), trust.RootPath(1)))
			if err != nil {
				return err
			}
			if _, err := trust.ParseRoot(file); err != nil {
				return err
			}
			return printPin(cmd.OutOrStdout(), file)
		},
	}
}

func printPin(w io.Writer, file []byte) error {
	pin := trust.PinOf(file)
	_, err := fmt.Fprintf(w, "trust:\n  sha256: %s\n  kmo1: %s\n", pin.SHA256, pin.Root)
	return err
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
