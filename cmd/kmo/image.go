package main

import (
	"cmp"
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/cmd/kmo/cli"
	"github.com/kindos/kmo/cmd/kmo/review"
	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/registry"
	"github.com/kindos/kmo/registry/merkle"
)

func imageCommand() *cobra.Command {
	return cli.Group("image", "Push, seal, verify and digest what units run", imageDigestCommand(), imagePushCommand(), imageSealCommand(), imageLinkCommand(), imageCustodyCommand(), imageVerifyCommand())
}

// withStore calls f with a store that is gone afterwards.
func withStore(f func(*registry.Store) error) (err error) {
	folder, err := os.MkdirTemp("", "kmo-image-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(folder)) }()
	return f(&registry.Store{Dir: folder, Keychain: registry.UserKeychain()})
}

func imageDigestCommand() *cobra.Command {
	out := &cli.Output{}
	cmd := &cobra.Command{
		Use:     "digest FILE",
		Short:   "Print a file's sha256 and its kmo1 blob root",
		Long:    "Print a file's sha256 and its kmo1 blob root.\n\nExit statuses: 0 good, 1 error, 2 usage.",
		Example: "  kmo image digest relay.wasm",
		Args:    cli.OneArg("a file"),
		RunE: func(cmd *cobra.Command, args []string) error {
			sum, root, err := registry.DigestFile(args[0])
			if err != nil {
				return err
			}
			return out.Print(cmd.OutOrStdout(), map[string]string{"sha256": sum, "kmo1": root.String()}, func(w io.Writer) { _, _ = fmt.Fprintf(w, "sha256:%s\n%s\n", sum, root) })
		},
	}
	out.Add(cmd)
	return cmd
}

func imagePushCommand() *cobra.Command {
	out := &cli.Output{}
	var as string
	cmd := &cobra.Command{
		Use:   "push FILE PLACE",
		Short: "Push one file as an image, and print the lines of unit.yaml that pin it",
		Long: `Push one file as an image of one layer, and print the lines of unit.yaml that pin it. PLACE is HOST/REPOSITORY, or oci-layout:/FOLDER.

Exit statuses: 0 pushed, 1 error, 2 usage, 3 refused.`,
		Example: "  kmo image push relay.wasm reg.example/relay --as wasm",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 2 {
				return fmt.Errorf("push takes two arguments, a file and a place; got %d", len(args))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if !slices.Contains([]string{"native", "wasm", "appimage", "image"}, as) {
				return cli.Usagef("--as %s: want native, wasm, appimage or image", as)
			}
			place, err := registry.ParsePlace(args[1])
			if err != nil {
				return err
			}
			return withStore(func(store *registry.Store) error {
				ref, root, err := store.PushFile(cmd.Context(), args[0], place, registry.Format(as))
				if err != nil {
					return err
				}
				return printPinned(cmd, out, as, ref, root)
			})
		},
	}
	cmd.Flags().StringVar(&as, "as", "native", "what it is: native, wasm, appimage, or image (a static program, as the /app of an image)")
	out.Add(cmd)
	return cmd
}

// printPinned prints an image as a variant of unit.yaml names it.
func printPinned(cmd *cobra.Command, out *cli.Output, as string, ref registry.Reference, root merkle.Digest) error {
	value := map[string]string{as: ref.String(), "merkle": root.String()}
	return out.Print(cmd.OutOrStdout(), value, func(w io.Writer) { _, _ = fmt.Fprintf(w, "%s: %s\nmerkle: %s\n", as, ref, root) })
}

func imageSealCommand() *cobra.Command {
	out := &cli.Output{}
	var key, custody string
	var intent registry.Intent
	cmd := &cobra.Command{
		Use:   "seal IMAGE",
		Short: "Compute an image's kmo1 root and put the signed statement beside it",
		Long: `Compute an image's kmo1 root from all of its bytes, sign the statement of it, push that beside the image as a referrer, and print the
lines of unit.yaml that pin both. IMAGE is named by digest.

With --custody the statement carries how the image came to be: a file of links, each signed by who took the step (kmo image link), of which the
last has made the image. With --intent it says what the image is for. Hosts read one statement of an image: where a tier asks for
custody, seal with it from the start.

Exit statuses: 0 sealed, 1 error, 2 usage, 3 refused (a chain that does not hold, or ends in another image).`,
		Example: `  kmo image seal reg.example/relay@sha256:… --key ~/.ssh/id_ed25519
  kmo image seal reg.example/relay@sha256:… --key release.key --custody relay.custody.json --intent security --summary "CVE-2026-1"`,
		Args: cli.OneArg("an image by digest"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ref, err := registry.ParseReference(args[0])
			if err != nil {
				return err
			}
			signer, err := cli.PrivateKey(key)
			if err != nil {
				return err
			}
			sealing, err := sealingOf(custody, intent)
			if err != nil {
				return err
			}
			return withStore(func(store *registry.Store) error {
				root, err := store.Seal(cmd.Context(), ref, signer, sealing)
				if err != nil {
					return err
				}
				return printPinned(cmd, out, "image", ref, root)
			})
		},
	}
	cmd.Flags().StringVar(&key, "key", "", "the private key file that signs")
	cmd.Flags().StringVar(&custody, "custody", "", "the file of links that kmo image link has written")
	cmd.Flags().StringVar(&intent.Kind, "intent", "", "what the image is for: "+strings.Join(intents(), ", "))
	cmd.Flags().StringVar(&intent.Summary, "summary", "", "the same in one line; with --intent")
	cmd.Flags().StringVar(&intent.From, "from", "", "the image before, by digest; with --intent")
	out.Add(cmd)
	return cmd
}

func intents() []string { return []string{"feature", "fix", "security", "rollback", "config"} }

// sealingOf is what a statement is to say beside roots.
func sealingOf(custody string, intent registry.Intent) (sealing registry.Sealing, err error) {
	switch {
	case intent.Kind != "" && !slices.Contains(intents(), intent.Kind):
		return sealing, cli.Usagef("--intent %s: want one of %s", intent.Kind, strings.Join(intents(), ", "))
	case intent.Kind != "":
		sealing.Intent = &intent
	case intent != registry.Intent{}:
		return sealing, cli.Usagef("--summary and --from need --intent")
	}
	if custody != "" {
		file, err := os.ReadFile(custody)
		if err != nil {
			return sealing, err
		}
		if sealing.Custody, err = registry.ParseCustody(file); err != nil {
			return sealing, fmt.Errorf("%s: %w", custody, err)
		}
	}
	return sealing, nil
}

func imageLinkCommand() *cobra.Command {
	var key string
	var step registry.CustodyStep
	cmd := &cobra.Command{
		Use:   "link FILE",
		Short: "Add a signed link to a file that says how an image came to be",
		Long: `Add a link to a custody file, or begin one: which step was taken, by whom, from what and to what, signed together with the link before.
Each --in must be what a link before has as --out. What is named is named by digest: git:COMMIT, sha256:HEX or kmo1:sha3-256:HEX.

Exit statuses: 0 added, 1 error, 2 usage, 3 refused (a chain that would not hold).`,
		Example: `  kmo image link relay.custody.json --step author --principal ann --out git:$(git rev-parse HEAD) --key ann.key
  kmo image link relay.custody.json --step build --principal ci --in git:$(git rev-parse HEAD) --out sha256:… --key ci.key
  kmo image link relay.custody.json --step release --principal rob --in sha256:… --out sha256:… --key rob.key`,
		Args: cli.OneArg("the custody file"),
		RunE: func(_ *cobra.Command, args []string) error {
			signer, err := cli.PrivateKey(key)
			if err != nil {
				return err
			}
			var chain registry.Custody
			file, err := os.ReadFile(args[0])
			if err == nil {
				chain, err = registry.ParseCustody(file)
			} else if errors.Is(err, fs.ErrNotExist) {
				err = nil
			}
			if err == nil {
				chain, err = chain.With(step, signer)
			}
			if err != nil {
				return err
			}
			if file, err = json.MarshalIndent(chain, "", " "); err != nil {
				return err
			}
			return os.WriteFile(args[0], append(file, '\n'), 0o644)
		},
	}
	cmd.Flags().StringVar(&step.Step, "step", "", "the step: "+strings.Join(registry.CustodySteps(), ", "))
	cmd.Flags().StringVar(&step.Principal, "principal", "", "who took it, as the trust root has them")
	cmd.Flags().StringArrayVar(&step.In, "in", nil, "from what; repeat")
	cmd.Flags().StringArrayVar(&step.Out, "out", nil, "to what; repeat")
	cmd.Flags().StringVar(&key, "key", "", "the private key file that signs")
	return cmd
}

// custodyOf is what `kmo image custody -o json` prints.
type custodyOf struct {
	Image  string                 `json:"image"`
	Signer string                 `json:"signer"` // "" if it is not known whose
	Intent *registry.Intent       `json:"intent"`
	Links  []registry.CustodyFact `json:"links"`
}

func imageCustodyCommand() *cobra.Command {
	out := &cli.Output{}
	var root, as, sealer string
	cmd := &cobra.Command{
		Use:   "custody IMAGE",
		Short: "Print how an image came to be, as its statement says, and what it is for",
		Long: `Print the custody chain and the intent in the statement beside an image, with each link verified: signed, after the link before, from what
links before have made. Whose the keys are, and whether the chain is enough for a tier, hosts judge (KT008). With --sealer
only a statement by that key is taken; without, any that leads to the root.

Exit statuses: 0 every link holds, 1 error, 2 usage, 3 refused (no statement, or a link that does not hold).`,
		Example: "  kmo image custody reg.example/relay@sha256:… --root kmo1:sha3-256:… --sealer release.key.pub",
		Args:    cli.OneArg("an image by digest"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ref, err := registry.ParseReference(args[0])
			if err != nil {
				return err
			}
			var keys []crypto.PublicKey
			if sealer != "" {
				public, err := cli.PublicKey(sealer)
				if err != nil {
					return err
				}
				plain, ok := public.(ssh.CryptoPublicKey)
				if !ok {
					return cli.Usagef("--sealer %s: a security key seals no images", sealer)
				}
				keys = append(keys, plain.CryptoPublicKey())
			}
			return withStore(func(store *registry.Store) error {
				want, err := rootOf(cmd.Context(), store, ref, root)
				if err != nil {
					return err
				}
				d, err := store.Describe(cmd.Context(), ref, want, registry.Format(as), keys...)
				if err != nil {
					return err
				}
				if d.Statement == nil || len(keys) > 0 && d.Signer == "" {
					return &refusal.Error{Code: "E_CUSTODY", Subject: "image " + ref.String(), Got: "no statement beside it that leads to its root, by a key that is asked for", Want: "kmo image seal --custody"}
				}
				custody := custodyOf{ref.String(), d.Signer, d.Statement.Predicate.Intent, d.Statement.Predicate.Custody.Verify()}
				if err := out.Print(cmd.OutOrStdout(), custody, custody.print); err != nil {
					return err
				}
				if slices.ContainsFunc(custody.Links, func(l registry.CustodyFact) bool { return l.Why != "" || len(l.Uncovered) > 0 }) {
					return cli.Status(cli.ExitRefused)
				}
				return nil
			})
		},
	}
	cmd.Flags().StringVar(&root, "root", "", "the kmo1 root it must have")
	cmd.Flags().StringVar(&as, "as", "image", "what it is: image, native, wasm, appimage or lxc")
	cmd.Flags().StringVar(&sealer, "sealer", "", "the public key file of who must have sealed it")
	out.Add(cmd)
	return cmd
}

func (c custodyOf) print(w io.Writer) {
	say := func(format string, a ...any) { _, _ = fmt.Fprintln(w, review.Plain(fmt.Sprintf(format, a...))) }
	say("image %s", c.Image)
	say("sealed by %s", cmp.Or(c.Signer, "a key that is not checked"))
	if c.Intent != nil {
		say("intent %s: %q, from %s to %s", c.Intent.Kind, c.Intent.Summary, cmp.Or(c.Intent.From, "nothing"), c.Intent.To)
	}
	if len(c.Links) == 0 {
		say("no custody chain")
	}
	for i, l := range c.Links {
		say("%d %s by %s (%s)", i, l.Step, l.Principal, cmp.Or(l.Key, "not signed"))
		for _, in := range l.In {
			say("  in  %s", in)
		}
		for _, made := range l.Out {
			say("  out %s", made)
		}
		for _, in := range l.Uncovered {
			say("  does not hold: no link before has made %s", in)
		}
		if l.Why != "" {
			say("  does not hold: %s", l.Why)
		}
	}
}

// rootOf is the root that is asked for, or that an image's bytes have.
func rootOf(ctx context.Context, store *registry.Store, ref registry.Reference, text string) (merkle.Digest, error) {
	if text == "" {
		return store.Root(ctx, ref)
	}
	root, err := merkle.Parse(text)
	if err != nil {
		err = cli.Usage{Err: err}
	}
	return root, err
}

func imageVerifyCommand() *cobra.Command {
	out := &cli.Output{}
	var root, as string
	cmd := &cobra.Command{
		Use:   "verify IMAGE",
		Short: "Fetch an image and check every byte against its digests",
		Long: `Fetch an image as a host would and check every byte against its sha256 and the kmo1 root that a unit pins. Without --root it
prints the root that its bytes have.

Exit statuses: 0 good, 1 error, 2 usage, 3 refused.`,
		Example: "  kmo image verify reg.example/relay@sha256:… --root kmo1:sha3-256:…",
		Args:    cli.OneArg("an image by digest"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ref, err := registry.ParseReference(args[0])
			if err != nil {
				return err
			}
			return withStore(func(store *registry.Store) error {
				want, err := rootOf(cmd.Context(), store, ref, root)
				if err != nil {
					return err
				}
				_, err = store.Fetch(cmd.Context(), ref, want, registry.Format(as))
				if err != nil {
					return err
				}
				return printPinned(cmd, out, as, ref, want)
			})
		},
	}
	cmd.Flags().StringVar(&root, "root", "", "the kmo1 root it must have")
	cmd.Flags().StringVar(&as, "as", "image", "what it is: image, native, wasm, appimage or lxc")
	out.Add(cmd)
	return cmd
}

// images is the store as the reconciler asks for it.
type images struct {
	store *registry.Store
	blind bool // something may run here that no backend sees
	mu    sync.Mutex
	jobs  map[string]*job // what registries are asked, by what that is
}

// job is a question to a registry that is under way, or one that ended while nobody waited.
type job struct {
	done      chan struct{}
	ended     time.Time // zero while it is under way; images.mu guards it
	described any
	content   registry.Content
	err       error
}

// news is how long the end of a job is told to who asks for it next; after that it is begun anew.
const news = 5 * time.Minute

func (i *images) Describe(ctx context.Context, image backends.Image, format backends.Format, sealers []crypto.PublicKey) (any, error) {
	what := "describe"
	for _, key := range sealers { // what counts is part of the question
		id, err := registry.KeyID(key)
		if err != nil {
			return nil, err
		}
		what += " " + id
	}
	job, err := i.ask(ctx, what, image, format, func(ctx context.Context, job *job, ref registry.Reference) error {
		described, err := i.store.Describe(ctx, ref, image.Root, registry.Format(format), sealers...)
		job.described = described
		return err
	})
	if err != nil {
		return nil, err
	}
	return job.described, nil
}

func (i *images) Fetch(ctx context.Context, image backends.Image, format backends.Format) (backends.Image, error) {
	job, err := i.ask(ctx, "fetch", image, format, func(ctx context.Context, job *job, ref registry.Reference) (err error) {
		job.content, err = i.store.Fetch(ctx, ref, image.Root, registry.Format(format))
		return err
	})
	if err != nil {
		return image, err
	}
	return fetched(image, job.content), nil
}

// ask has a job done and waits for it until ctx ends.
func (i *images) ask(ctx context.Context, what string, image backends.Image, format backends.Format, do func(context.Context, *job, registry.Reference) error) (*job, error) {
	ref, err := registry.ParseReference(image.Ref)
	if err != nil {
		return nil, err
	}
	key := fmt.Sprintln(what, image.Ref, image.Root, format)
	job := i.join(key, func(job *job) error { return do(context.WithoutCancel(ctx), job, ref) })
	select {
	case <-job.done:
	case <-ctx.Done():
		return nil, fmt.Errorf("%s: %w", image.Ref, context.Cause(ctx))
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.jobs[key] == job {
		delete(i.jobs, key)
	}
	return job, job.err
}

// join joins a job that is under way, or begins it. It goes on while the reconciler looks elsewhere, so that a slow registry keeps nobody
// from a newer commit, and ends with the process.
func (i *images) join(key string, do func(*job) error) *job {
	i.mu.Lock()
	defer i.mu.Unlock()
	maps.DeleteFunc(i.jobs, func(_ string, known *job) bool { return !known.ended.IsZero() && time.Since(known.ended) > news })
	if known := i.jobs[key]; known != nil {
		return known
	}
	begun := &job{done: make(chan struct{})}
	i.jobs[key] = begun
	go func() {
		defer close(begun.done)
		begun.err = do(begun)
		i.mu.Lock()
		defer i.mu.Unlock()
		begun.ended = time.Now()
		if begun.err == nil && begun.described == nil { // the store has what was fetched; what was described is told once
			delete(i.jobs, key)
		}
	}()
	return begun
}

func (i *images) Check(ctx context.Context, image backends.Image) error {
	return i.store.Check(ctx, registry.Content{Path: image.Content, Root: image.ContentRoot})
}

func (i *images) Repair(ctx context.Context, image backends.Image, format backends.Format) (backends.Image, error) {
	ref, err := registry.ParseReference(image.Ref)
	if err != nil {
		return image, err
	}
	content, err := i.store.Repair(ctx, ref, image.Root, registry.Format(format))
	return fetched(image, content), err
}

func (i *images) Clear(ctx context.Context, keep []backends.Workload, inUse []string) ([]string, error) {
	if i.blind {
		return nil, nil
	}
	var pins []registry.Pin
	for _, workload := range keep {
		ref, err := registry.ParseReference(workload.Image.Ref)
		if err != nil {
			return nil, err
		}
		pins = append(pins, registry.Pin{Ref: ref, Root: workload.Image.Root, Format: registry.Format(workload.Format)})
	}
	return i.store.Clear(ctx, pins, inUse)
}

// fetched is image with what the store says of it.
func fetched(image backends.Image, content registry.Content) backends.Image {
	image.Content, image.ContentRoot = content.Path, content.Root
	image.Config = backends.ImageConfig(content.Config)
	return image
}
