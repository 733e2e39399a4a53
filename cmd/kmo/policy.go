package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/microvm"
	"github.com/kindos/kmo/backends/native"
	"github.com/kindos/kmo/backends/plugin"
	"github.com/kindos/kmo/backends/wasm"
	"github.com/kindos/kmo/rego"
)

func policyCommand() *cobra.Command {
	return group("policy", "The rules that judge a change", &cobra.Command{
		Use:   "check [FOLDER]",
		Short: "Load a site's rules as a host would: compile, run their tests, try every fixture",
		Long: `Load a site's rules as a host would: compile them strictly, run their tests, and see that every forbidden input is still denied.
Without a folder only the shipped rules are loaded.

Exit statuses: 0 good, 1 error, 2 usage, 3 refused.`,
		Example: "  kmo policy check policy/",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var site fs.FS
			if len(args) == 1 {
				if _, err := os.ReadDir(args[0]); err != nil {
					return err
				}
				site = os.DirFS(args[0])
			}
			set, err := rules(site)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "good: %s\n", set.Digest())
			return err
		},
	}, &cobra.Command{
		Use:     "list",
		Short:   "List the tripwires that no site can switch off",
		Long:    "List the ids of the tripwires that no site can switch off.\n\nExit statuses: 0 good, 2 usage.",
		Example: "  kmo policy list",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), strings.Join(rego.IDs(), "\n"))
			return err
		},
	})
}

// builtIn opens the built-in backend of that name over its state folder. This list is every backend in this binary.
func builtIn(name, state string, stderr io.Writer) (backends.Backend, error) {
	logger := newLogger(stderr)
	switch name {
	case "native":
		return native.Open(native.Options{State: state, Logger: logger})
	case "wasm":
		return wasm.Open(wasm.Options{State: state, Logger: logger})
	case microvm.Name:
		return microvm.Open(microvm.Options{State: state, Logger: logger})
	}
	return nil, usageError{fmt.Errorf("no built-in backend %q; there are %s", name, strings.Join(builtIns(), " and "))}
}

func builtIns() []string { return []string{"native", "wasm"} }

func backendCommand() *cobra.Command {
	var state string
	serve := &cobra.Command{
		Use:    "serve NAME",
		Short:  "Be the plugin process of a built-in backend; the agent starts this",
		Hidden: true,
		Args:   oneArg("a built-in backend"),
		RunE: func(cmd *cobra.Command, args []string) error {
			backend, err := builtIn(args[0], state, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			plugin.Serve(backend, newLogger(cmd.ErrOrStderr()))
			if closer, ok := backend.(io.Closer); ok {
				return closer.Close()
			}
			return nil
		},
	}
	serve.Flags().StringVar(&state, "state", "", "the backend's state folder")
	out := &output{}
	list := &cobra.Command{
		Use:     "list",
		Short:   "List the built-in backends and what they can do on this host",
		Long:    "List the built-in backends and what they can do on this host, measured now.\n\nExit statuses: 0 good, 1 error, 2 usage.",
		Example: "  kmo backend list\n  kmo backend list -o json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			prints, err := fingerprints(cmd)
			if err != nil {
				return err
			}
			return out.print(cmd.OutOrStdout(), prints, func(w io.Writer) { printBackends(w, prints) })
		},
	}
	out.add(list)
	return group("backend", "What this host can run things with", list, serve)
}

// fingerprints asks every built-in backend, over a state folder of its own that is gone afterwards.
func fingerprints(cmd *cobra.Command) (prints []backends.Fingerprint, err error) {
	folder, err := os.MkdirTemp("", "kmo-backend-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(folder)) }()
	for _, name := range builtIns() {
		backend, err := builtIn(name, filepath.Join(folder, name), cmd.ErrOrStderr())
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		print, err := backend.Fingerprint(cmd.Context())
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		prints = append(prints, print)
		if closer, ok := backend.(io.Closer); ok {
			if err := closer.Close(); err != nil {
				return nil, err
			}
		}
	}
	return prints, nil
}

func printBackends(w io.Writer, prints []backends.Fingerprint) {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(table, "BACKEND\tVERSION\tFORMATS\tPLATFORMS\tISOLATION\tFEATURES")
	for _, p := range prints {
		_, _ = fmt.Fprintf(table, "%s\t%s\t%v\t%v\t%d\t%v\n", p.Backend, p.Version, p.Formats, p.Platforms, p.Isolation, slices.Sorted(slices.Values(p.Features)))
	}
	_ = table.Flush()
	for _, p := range prints {
		for _, missing := range p.Missing {
			_, _ = fmt.Fprintf(w, "%s, not on this host: %s\n", p.Backend, missing)
		}
	}
}
