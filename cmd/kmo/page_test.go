//go:build linux

package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/rogpeppe/go-internal/testscript"
)

// page does what a page of docs/ tells its reader to do, in a folder: of ```console it runs what stands after "$ " and compares what is printed with
// what stands below, "…" being anything; a block with a path after its language is that file; and commands that it only names are there.
func page(ts *testscript.TestScript, _ bool, args []string) {
	text, err := os.ReadFile(filepath.Join(ts.Getenv("DOCS"), args[0]))
	ts.Check(err)
	played := 0
	for _, block := range regexp.MustCompile("(?ms)^```([^\n]*)\n(.*?)^```$").FindAllStringSubmatch(string(text), -1) {
		language, path, isFile := strings.Cut(block[1], " ")
		if isFile {
			ts.Check(os.WriteFile(filepath.Join(ts.MkAbs(args[1]), path), []byte(block[2]), 0o644))
		}
		if language != "console" {
			continue
		}
		for _, one := range strings.Split("\n"+block[2], "\n$ ")[1:] {
			lines := strings.Split(one, "\n")
			shell := lines[0]
			for lines = lines[1:]; strings.HasSuffix(shell, "\\") && len(lines) > 0; lines = lines[1:] {
				shell += "\n" + lines[0]
			}
			play(ts, ts.MkAbs(args[1]), shell, strings.TrimSpace(strings.Join(lines, "\n")))
			played++
		}
	}
	for _, named := range regexp.MustCompile("`kmo ([a-z]+(?: [a-z]+)*)").FindAllStringSubmatch(string(text), -1) {
		play(ts, ts.MkAbs(args[1]), "kmo "+named[1]+" --help >/dev/null", "")
	}
	if played == 0 {
		ts.Fatalf("%s tells its reader to do nothing", args[0])
	}
}

// play runs one command of a page. One below which nothing stands must end well.
func play(ts *testscript.TestScript, folder, shell, want string) {
	cmd := exec.Command("sh", "-c", shell)
	cmd.Dir = folder
	for _, name := range []string{"PATH", "HOME", "KMO_CONFIG", "KMO_STATE", "GIT_CONFIG_NOSYSTEM", "SSH_AUTH_SOCK"} {
		cmd.Env = append(cmd.Env, name+"="+ts.Getenv(name))
	}
	out, err := cmd.CombinedOutput()
	ts.Logf("$ %s\n%s", shell, out)
	if want == "" {
		ts.Check(err)
		return
	}
	if err != nil && !errors.As(err, new(*exec.ExitError)) {
		ts.Check(err)
	}
	if pattern := strings.ReplaceAll(regexp.QuoteMeta(want), "…", "(?s:.*)"); !regexp.MustCompile("^" + pattern + "$").MatchString(strings.TrimSpace(string(out))) {
		ts.Fatalf("the page says of %s\n%s\nand it is\n%s", shell, want, out)
	}
}
