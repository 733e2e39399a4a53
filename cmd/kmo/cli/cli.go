// Package cli is what the commands of kmo share: their mistakes and exit statuses, their output, and the keys that they are given.
package cli

import (
	"encoding/json"
	"fmt"
	"io"

	"github.com/spf13/cobra"
)

// The exit statuses.
const (
	ExitGood     = 0
	ExitError    = 1
	ExitUsage    = 2
	ExitRefused  = 3
	ExitReverted = 4 // reverted or stuck
)

// Status is an error that is only an exit status: everything has been said.
type Status int

// Error says the number.
func (s Status) Error() string { return fmt.Sprintf("exit status %d", int(s)) }

// Usage is a mistake in the command's words.
type Usage struct{ Err error }

// Error is that of Err.
func (u Usage) Error() string { return u.Err.Error() }

// Unwrap is Err.
func (u Usage) Unwrap() error { return u.Err }

// Usagef is such a mistake, as [fmt.Errorf] writes it.
func Usagef(format string, a ...any) error { return Usage{fmt.Errorf(format, a...)} }

// Group is a command that only has others below it.
func Group(name, short string, below ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: name, Short: short, Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	cmd.AddCommand(below...)
	return cmd
}

// OneArg wants one argument, which what names.
func OneArg(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != 1 {
			return Usagef("%s takes one argument, %s; got %d", cmd.Name(), what, len(args))
		}
		return nil
	}
}

// Folder is the argument that may be left out for the present folder.
func Folder(args []string) string {
	if len(args) == 0 {
		return "."
	}
	return args[0]
}

// Output is the flag -o.
type Output struct{ format string }

// Add gives cmd the flag.
func (o *Output) Add(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&o.format, "output", "o", "text", "text or json")
	cmd.PreRunE = func(*cobra.Command, []string) error {
		if o.format != "text" && o.format != "json" {
			return Usagef("output %q: want text or json", o.format)
		}
		return nil
	}
}

// Print writes value as JSON, or with text for people.
func (o *Output) Print(w io.Writer, value any, text func(io.Writer)) error {
	if o.format == "json" {
		encoder := json.NewEncoder(w)
		encoder.SetIndent("", "  ")
		return encoder.Encode(value)
	}
	text(w)
	return nil
}
