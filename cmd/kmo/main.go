// Command kmo deploys what a Git branch says on this host, and takes it back when it is not healthy. `kmo help` is its manual.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/kindos/kmo/backends/process"
	"github.com/kindos/kmo/backends/wasm"
	"github.com/kindos/kmo/policy/refusal"
)

// version is set by the linker.
var version = "development"

// The exit statuses.
const (
	exitGood     = 0
	exitError    = 1
	exitUsage    = 2
	exitRefused  = 3
	exitReverted = 4 // reverted or stuck
)

// status is an error that is only an exit status: everything has been said.
type status int

func (s status) Error() string { return fmt.Sprintf("exit status %d", int(s)) }

// usageError is a mistake in the command's words.
type usageError struct{ error }

func main() {
	if len(os.Args) > 1 { // this binary again, as part of a workload: nothing of the command line below applies
		switch os.Args[1] {
		case process.StageArg:
			process.Stage()
		case wasm.GuestArg:
			os.Exit(wasm.Guest(os.Args[2:]))
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
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
	err := root.ExecuteContext(ctx)
	var exit status
	var usage usageError
	switch {
	case err == nil:
		return exitGood
	case errors.As(err, &exit):
		return int(exit)
	case errors.As(err, &usage):
		_, _ = fmt.Fprintf(stderr, "kmo: %v\nSee '%s --help'.\n", err, "kmo")
		return exitUsage
	}
	for _, one := range refusal.All(err) {
		_, _ = fmt.Fprintf(stderr, "kmo: refused: %v\n", one)
	}
	if refusal.Of(err) != nil {
		return exitRefused
	}
	_, _ = fmt.Fprintf(stderr, "kmo: %v\n", err)
	return exitError
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
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.AddCommand(
		demoCommand(), agentCommand(), reconcileCommand(), planCommand(), statusCommand(), logsCommand(), explainCommand(),
		approveCommand(), siteCommand(), keyCommand(), imageCommand(), policyCommand(), backendCommand(), versionCommand(),
	)
	return root
}
