package trustroot

import (
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kindos/kmo/cmd/kmo/cli"
	"github.com/kindos/kmo/policy/trust"
)

// Founding is what a site's first trust root is made of.
type Founding struct {
	Site      string
	people    []string
	hosts     []string
	sealers   []string
	staters   []string
	freshness time.Duration
	sign      string
	threshold int
}

// Add gives a command the flags.
func (f *Founding) Add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.Site, "name", "", "the site's name")
	cmd.Flags().StringVar(&f.sign, "sign", "", "key that signs the root: a private key file, or a public one for the ssh-agent's")
	cmd.Flags().IntVar(&f.threshold, "threshold", 1, "how many of the people must sign a trust root; with more than one, the first is a draft until so many have signed it")
	cmd.Flags().StringArrayVar(&f.people, "person", nil, "NAME=EMAIL=PUBLIC-KEY-FILE of one who may commit and approve; repeat")
	cmd.Flags().StringArrayVar(&f.sealers, "sealer", nil, "NAME=PUBLIC-KEY-FILE of a machine that seals images: with one, tiers 0 to 2 ask for its statement of each; repeat")
	cmd.Flags().DurationVar(&f.freshness, "freshness", 0, "how old a head statement may be: with it, hosts accept only what somebody has lately signed to be the newest ('kmo head sign')")
	cmd.Flags().StringArrayVar(&f.staters, "head", nil, "NAME=PUBLIC-KEY-FILE of a machine that signs head statements; without one, people do; repeat")
	cmd.Flags().StringArrayVar(&f.hosts, "host", nil, "NAME=PUBLIC-KEY-FILE of a host that may revert; repeat")
}

// Sign makes the first trust root and signs it.
func (f *Founding) Sign(cmd *cobra.Command) ([]byte, error) {
	if f.Site == "" || len(f.people) == 0 {
		return nil, cli.Usagef("%s needs --name and at least one --person", strings.TrimPrefix(cmd.CommandPath(), "kmo "))
	}
	root, err := f.root()
	if err != nil {
		return nil, err
	}
	key, done, err := cli.Signer(f.sign)
	if err != nil {
		return nil, err
	}
	defer func() { _ = done() }()
	return trust.SignRoot(root, key)
}

// Write puts what Sign has made into a folder, and prints the pin, or, of a draft, who must sign yet. It says on notes which tiers are weaker
// than they should be.
func (f *Founding) Write(w, notes io.Writer, folder string, file []byte) error {
	at, err := open(folder)
	if err != nil {
		return err
	}
	if len(at.roots) > 0 {
		return fmt.Errorf("%s is there already, and never overwritten: 'kmo trust add', 'remove' and 'rotate' make the next version", filepath.Join(folder, trust.RootPath(1)))
	}
	if err := at.keep(w, file); err != nil {
		return err
	}
	for i, should := range trust.DefaultTiers() {
		if tier := f.tiers()[i]; tier.Need < should.Need {
			_, _ = fmt.Fprintf(notes, "tier %d needs only %d of %d approvals: name more people with --person\n", i, tier.Need, should.Need)
		}
	}
	return nil
}

// root is the founding root: everybody named may do all that people may do.
func (f *Founding) root() (trust.Root, error) {
	root := trust.Root{Version: 1, Site: f.Site, Tiers: f.tiers()}
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
	staters, err := robots(&root, "--head", f.staters, trust.RoleHead)
	if err != nil {
		return root, err
	}
	if f.freshness > 0 {
		root.Freshness = f.freshness.String()
	}
	if f.freshness > 0 && len(staters) == 0 {
		staters = slices.Clone(people)
		for i := range people {
			key := &root.Principals[i].Keys[0]
			key.Uses = append(key.Uses, trust.RoleHead)
		}
	}
	root.Roles = []trust.Role{
		{Name: trust.RoleRoot, Threshold: f.threshold, Members: people},
		{Name: trust.RoleCommit, Threshold: 1, Members: people},
		{Name: trust.RoleApprove, Threshold: 1, Members: slices.Clone(people)},
	}
	if len(hosts) > 0 {
		root.Roles = append(root.Roles, trust.Role{Name: trust.RoleRevert, Threshold: 1, Members: hosts})
	}
	if len(staters) > 0 {
		root.Roles = append(root.Roles, trust.Role{Name: trust.RoleHead, Threshold: 1, Members: staters})
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
func (f *Founding) tiers() []trust.Tier {
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
