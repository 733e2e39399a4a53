package main

import (
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/kindos/kmo/cmd/kmo/cli"
)

// TestHelp: whoever reads a command's help finds what it does, examples that name it, and its exit statuses.
func TestHelp(t *testing.T) {
	seen := 0
	var look func(cmd *cobra.Command)
	look = func(cmd *cobra.Command) {
		for _, below := range cmd.Commands() {
			look(below)
		}
		if cmd.Hidden || cmd.HasAvailableSubCommands() {
			return
		}
		seen++
		t.Run(cmd.CommandPath(), func(t *testing.T) {
			if cmd.Short == "" || strings.HasSuffix(cmd.Short, ".") {
				t.Errorf("short help %q; want one line without a full stop", cmd.Short)
			}
			if !strings.Contains(cmd.Long, "\nExit statuses: 0 ") {
				t.Errorf("its help does not end with its exit statuses:\n%s", cmd.Long)
			}
			if !strings.Contains(cmd.Example, cmd.CommandPath()) {
				t.Errorf("no example runs %s:\n%s", cmd.CommandPath(), cmd.Example)
			}
			var out, said strings.Builder
			code := run(t.Context(), append(strings.Fields(cmd.CommandPath())[1:], "--help"), strings.NewReader(""), &out, &said)
			if code != cli.ExitGood || said.String() != "" || !strings.Contains(out.String(), "Exit statuses:") || !strings.Contains(out.String(), "Examples:") {
				t.Errorf("--help: status %d, stderr %q, stdout:\n%s", code, &said, &out)
			}
			for _, line := range strings.Split(out.String(), "\n") {
				if len([]rune(line)) > 170 {
					t.Errorf("a line of %d characters: %s", len(line), line)
				}
			}
		})
	}
	root := rootCommand()
	root.InitDefaultHelpCmd()
	look(root)
	if seen < 20 {
		t.Errorf("%d commands, want all of them", seen)
	}
}
