// Command kmo deploys what a Git branch says on this host, and takes it back when it is not healthy. `kmo help` is its manual.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/kindos/kmo/backends/gvisor"
	"github.com/kindos/kmo/backends/lxc"
	"github.com/kindos/kmo/backends/microvm"
	"github.com/kindos/kmo/backends/process"
	"github.com/kindos/kmo/backends/wasm"
	"github.com/kindos/kmo/cmd/kmo/approval"
	"github.com/kindos/kmo/cmd/kmo/cli"
	"github.com/kindos/kmo/cmd/kmo/head"
	"github.com/kindos/kmo/cmd/kmo/trustroot"
	"github.com/kindos/kmo/policy/refusal"
)

// version is set by the linker.
var version = "development"

func main() {
	if len(os.Args) > 1 { // this binary again, as part of a workload: nothing of the command line below applies
		switch os.Args[1] {
		case process.StageArg:
			process.Stage()
		case lxc.GuestArg:
			os.Exit(lxc.Guest(os.Args[2:]))
		case wasm.GuestArg:
			os.Exit(wasm.Guest(os.Args[2:]))
		case gvisor.GuestArg:
			os.Exit(gvisor.Guest(os.Args[2:]))
		case microvm.MonitorArg:
			os.Exit(microvm.Monitor(os.Args[2:]))
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process
	code := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run is the command as a function: what it prints and its exit status.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	root := rootCommand()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	cmd, err := root.ExecuteContextC(ctx)
	var exit cli.Status
	var usage cli.Usage
	switch {
	case err == nil:
		return cli.ExitGood
	case errors.As(err, &exit):
		return int(exit)
	case errors.As(err, &usage):
		_, _ = fmt.Fprintf(stderr, "kmo: %v\nSee '%s --help'.\n", err, cmd.CommandPath())
		return cli.ExitUsage
	}
	return complain(stderr, err)
}

// complain prints an error, of a refusal every reason, and returns the exit status.
func complain(stderr io.Writer, err error) int {
	for _, one := range refusal.All(err) {
		_, _ = fmt.Fprintf(stderr, "kmo: refused: %v\n", one)
	}
	if refusal.Of(err) != nil {
		return cli.ExitRefused
	}
	_, _ = fmt.Fprintf(stderr, "kmo: %v\n", err)
	return cli.ExitError
}

const longHelp = `kMO deploys what a Git branch says on this host, if the change is signed, approved, allowed and authentic. When the result is not
healthy it goes back, in Git as well as on the host.

Exit statuses: 0 good, 1 error, 2 usage, 3 refused, 4 reverted or stuck.`

// rootCommand is every command there is.
func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "kmo",
		Short:         "git push is the deployment",
		Long:          longHelp,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.NoArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return cli.Usage{Err: err} })
	root.AddCommand(
		demoCommand(), agentCommand(), reconcileCommand(), planCommand(), statusCommand(), logsCommand(), explainCommand(),
		approval.Approve(), approval.List(), head.Command(), stateCommand(), siteCommand(), trustroot.Command(), keyCommand(), imageCommand(), policyCommand(), auditCommand(), backendCommand(),
		versionCommand(), completionCommand(),
	)
	root.CompletionOptions.DisableDefaultCmd = true // there is ours
	root.SetHelpCommand(helpCommand())
	strictly(root)
	return root
}

// strictly makes every mistake in a command's words a usage error.
func strictly(cmd *cobra.Command) {
	rule := cmd.Args
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if cmd.HasAvailableSubCommands() && len(args) > 0 {
			return unknownCommand(cmd, args[0])
		}
		if err := rule(cmd, args); err != nil {
			return cli.Usage{Err: err}
		}
		return nil
	}
	for _, sub := range cmd.Commands() {
		strictly(sub)
	}
}

// unknownCommand names the commands that word may have been meant for.
func unknownCommand(cmd *cobra.Command, word string) error {
	cmd.SuggestionsMinimumDistance = 2
	if near := cmd.SuggestionsFor(word); len(near) > 0 {
		return cli.Usagef("%s has no command %q; did you mean %s?", cmd.CommandPath(), word, strings.Join(near, " or "))
	}
	return cli.Usagef("%s has no command %q", cmd.CommandPath(), word)
}

func helpCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "help [COMMAND]",
		Short:   "The help of a command",
		Long:    "The help of a command.\n\nExit statuses: 0 good, 2 usage (there is no such command).",
		Example: "  kmo help image push",
		Args:    cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			found, rest, err := cmd.Root().Find(args)
			if err != nil {
				return cli.Usage{Err: err}
			}
			if len(rest) > 0 {
				return unknownCommand(found, rest[0])
			}
			return found.Help()
		},
	}
}
