package trustroot

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kindos/kmo/cmd/kmo/cli"
	"github.com/kindos/kmo/policy/trust"
	"github.com/kindos/kmo/policy/trust/signature"
)

// editing is what the commands that make the next version have in common.
type editing struct {
	folder string
	yes    bool
}

func (e *editing) add(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&e.folder, "site", "C", ".", "the site's folder")
	cmd.Flags().BoolVarP(&e.yes, "yes", "y", false, "do not ask")
}

const editHelp = `

It goes into root.draft.json, on top of what is there; the version in force stays as it is. What will change is shown first. Then the
draft is signed with 'kmo trust sign': by the threshold of the version in force, and by that of the new one.

Exit statuses: 0 written, 1 error or not written, 2 usage, 3 refused (a root that nothing would accept).`

// change makes the next version out of the draft or of the version in force.
func (e *editing) change(cmd *cobra.Command, alter func(next *trust.Root) error) error {
	s, err := open(e.folder)
	if err != nil {
		return err
	}
	from := s.next
	if from == nil {
		from = s.newest()
	}
	if from == nil {
		return fmt.Errorf("%s: there is no trust root; 'kmo trust init' makes one", filepath.Join(e.folder, trust.RootPath(1)))
	}
	next, err := clone(from)
	if err != nil {
		return err
	}
	next.Version = len(s.roots) + 1
	if err := alter(next); err != nil {
		return err
	}
	file, err := trust.SignRoot(*next)
	if err != nil {
		return err
	}
	out := cmd.ErrOrStderr()
	_, _ = fmt.Fprintf(out, "trust root %d of %s\n", next.Version, next.Site)
	if !printChange(out, s.newest(), next) {
		return fmt.Errorf("nothing changes: that is what trust root %d says already", len(s.roots))
	}
	if len(s.sides) > 0 && slices.ContainsFunc(s.sides, func(side trust.Side) bool { return len(side.Signed) > 0 }) {
		_, _ = fmt.Fprintln(out, "The draft's signatures go: they are of another text.")
	}
	if err := confirm(cmd, e.yes, "Write the draft"); err != nil {
		return err
	}
	return s.keep(cmd.OutOrStdout(), file)
}

func clone(r *trust.Root) (*trust.Root, error) {
	text, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	return parse(text)
}

// parse reads what `kmo trust show -o json` prints.
func parse(text []byte) (*trust.Root, error) {
	var root trust.Root
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.DisallowUnknownFields()
	err := decoder.Decode(&root)
	return &root, err
}

func addCommand() *cobra.Command {
	e := &editing{}
	var class, org, key string
	var emails, uses []string
	cmd := &cobra.Command{
		Use:   "add NAME",
		Short: "Add a person or a machine, or a key of theirs, in the next trust root",
		Long:  "Add a person or a machine to the next trust root, or, to one that is there, a key, e-mails and uses." + editHelp,
		Example: `  kmo trust add erin --email erin@example.org --key erin.pub --use commit,approve
  kmo trust add erin --key erin-yubikey.pub --use approve     # one more key
  kmo trust add edge-7 --class robot --key host.key.pub --use revert`,
		Args: cli.OneArg("a principal's name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if key == "" && len(emails) == 0 || key != "" && len(uses) == 0 {
				return cli.Usagef("trust add needs --key FILE with --use, or --email")
			}
			return e.change(cmd, func(next *trust.Root) error {
				p := find(next, args[0])
				if p == nil {
					next.Principals = append(next.Principals, trust.Principal{Name: args[0], Class: class, Org: org})
					p = &next.Principals[len(next.Principals)-1]
				}
				p.Emails = append(p.Emails, emails...)
				if key == "" {
					return nil
				}
				public, err := cli.PublicKey(key)
				if err != nil {
					return err
				}
				p.Keys = append(p.Keys, trust.Key{Public: cli.Authorized(public), Uses: uses})
				for _, use := range uses {
					join(next, use, p.Name)
				}
				return nil
			})
		},
	}
	e.add(cmd)
	cmd.Flags().StringVar(&class, "class", "human", "human or robot, of a new principal")
	cmd.Flags().StringVar(&org, "org", "", "the organisation of a new principal")
	cmd.Flags().StringVar(&key, "key", "", "the public key's file")
	cmd.Flags().StringSliceVar(&uses, "use", nil, "what the key is for: root, commit, approve, revert, image, head, custody; the principal gets those roles")
	cmd.Flags().StringSliceVar(&emails, "email", nil, "an e-mail of the principal's author lines")
	return cmd
}

func find(r *trust.Root, name string) *trust.Principal {
	i := slices.IndexFunc(r.Principals, func(p trust.Principal) bool { return p.Name == name })
	if i < 0 {
		return nil
	}
	return &r.Principals[i]
}

// join makes a principal a member of a role.
func join(r *trust.Root, role, name string) {
	i := slices.IndexFunc(r.Roles, func(have trust.Role) bool { return have.Name == role })
	if i < 0 {
		r.Roles = append(r.Roles, trust.Role{Name: role, Threshold: 1})
		i = len(r.Roles) - 1
	}
	if !slices.Contains(r.Roles[i].Members, name) {
		r.Roles[i].Members = append(r.Roles[i].Members, name)
	}
}

func removeCommand() *cobra.Command {
	e := &editing{}
	revoked := &trust.Revoked{}
	cmd := &cobra.Command{
		Use:   "remove NAME|KEY-ID",
		Short: "Take a principal out of the next trust root, or revoke a key in it",
		Long: `Take a principal out of the next trust root, or revoke one key in it, named by its id. A revoked key stays listed, with the reason, and signs
nothing any more, whatever date is written on it. With --rebad what it has signed is bad too: hosts refuse it.` + editHelp,
		Example: `  kmo trust remove erin
  kmo trust remove SHA256:qk3… --reason 'laptop lost in Oslo'
  kmo trust remove erin --reason 'key stolen' --rebad`,
		Args: cli.OneArg("a principal's name or a key's id"),
		RunE: func(cmd *cobra.Command, args []string) error {
			byKey := strings.HasPrefix(args[0], "SHA256:")
			if (byKey || revoked.Rebad) && revoked.Reason == "" {
				return cli.Usagef("trust remove needs --reason TEXT for a key, and with --rebad")
			}
			return e.change(cmd, func(next *trust.Root) error {
				if byKey {
					return revoke(next, args[0], revoked)
				}
				p := find(next, args[0])
				if p == nil {
					return fmt.Errorf("%s is no principal of the trust root", args[0])
				}
				for i := range next.Roles {
					next.Roles[i].Members = slices.DeleteFunc(next.Roles[i].Members, func(member string) bool { return member == args[0] })
				}
				next.Roles = slices.DeleteFunc(next.Roles, func(role trust.Role) bool { return len(role.Members) == 0 })
				if !revoked.Rebad {
					next.Principals = slices.DeleteFunc(next.Principals, func(p trust.Principal) bool { return p.Name == args[0] })
					return nil
				}
				for i := range p.Keys { // they stay listed: what they have signed is known by them
					p.Keys[i].Revoked = revoked
				}
				return nil
			})
		},
	}
	e.add(cmd)
	cmd.Flags().StringVar(&revoked.Reason, "reason", "", "why, for everybody to read")
	cmd.Flags().BoolVar(&revoked.Rebad, "rebad", false, "what was signed with it is bad too")
	return cmd
}

// revoke marks the key with that id.
func revoke(r *trust.Root, id string, how *trust.Revoked) error {
	k, err := keyOf(r, func(_ trust.Principal, k string) bool { return k == id })
	if err == nil {
		k.Revoked = how
	}
	return err
}

// keyOf is the one key that is meant and not revoked.
func keyOf(r *trust.Root, meant func(p trust.Principal, id string) bool) (found *trust.Key, err error) {
	for i, p := range r.Principals {
		for j, k := range p.Keys {
			public, err := signature.ParseKey(k.Public)
			if err != nil || k.Revoked != nil || !meant(p, signature.KeyID(public)) {
				continue
			}
			if found != nil {
				return nil, errors.New("more than one key is meant; name it by its id, which 'kmo trust show' prints")
			}
			found = &r.Principals[i].Keys[j]
		}
	}
	if found == nil {
		return nil, errors.New("the trust root has no such key that is not revoked; 'kmo trust show' prints their ids")
	}
	return found, nil
}

func rotateCommand() *cobra.Command {
	e := &editing{}
	var key, old, from string
	revoked := &trust.Revoked{}
	cmd := &cobra.Command{
		Use:   "rotate NAME --key FILE | rotate --from FILE",
		Short: "Replace a principal's key in the next trust root, or take all of it from a file",
		Long: `Replace a principal's key in the next trust root: the new key gets the uses of the old one, which is revoked. Or, with --from, take the whole
text from a file: 'kmo trust show -o json', edited. That is how thresholds, tiers, paths, floors and tripwires are changed.` + editHelp,
		Example: `  kmo trust rotate alice --key alice-2027.pub
  kmo trust rotate alice --old SHA256:qk3… --key new.pub --reason 'laptop lost' --rebad
  kmo trust show -o json >root.json && $EDITOR root.json && kmo trust rotate --from root.json`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if (from == "") == (len(args) == 0 || key == "") {
				return cli.Usagef("trust rotate needs a principal's name and --key FILE, or --from FILE")
			}
			if from != "" {
				text, err := readFile(cmd, from)
				if err != nil {
					return err
				}
				root, err := parse(text)
				if err != nil {
					return fmt.Errorf("%s: %w; want what 'kmo trust show -o json' prints", from, err)
				}
				return e.change(cmd, func(next *trust.Root) error {
					root.Version = next.Version
					*next = *root
					return nil
				})
			}
			public, err := cli.PublicKey(key)
			if err != nil {
				return err
			}
			return e.change(cmd, func(next *trust.Root) error {
				k, err := keyOf(next, func(p trust.Principal, id string) bool { return p.Name == args[0] && (old == "" || old == id) })
				if err != nil {
					return fmt.Errorf("%s: %w", args[0], err)
				}
				k.Revoked = revoked
				p := find(next, args[0])
				p.Keys = append(p.Keys, trust.Key{Public: cli.Authorized(public), Uses: k.Uses})
				return nil
			})
		},
	}
	e.add(cmd)
	cmd.Flags().StringVar(&key, "key", "", "the new public key's file")
	cmd.Flags().StringVar(&old, "old", "", "the id of the key that is replaced; the principal's only one if not given")
	cmd.Flags().StringVar(&from, "from", "", "a file with the whole text, - for the standard input")
	cmd.Flags().StringVar(&revoked.Reason, "reason", "replaced", "why, for everybody to read")
	cmd.Flags().BoolVar(&revoked.Rebad, "rebad", false, "what was signed with the old key is bad too")
	return cmd
}
