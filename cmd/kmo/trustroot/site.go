package trustroot

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/renameio/v2"

	"github.com/kindos/kmo/cmd/kmo/cli"
	"github.com/kindos/kmo/policy/trust"
)

// draftName is the next version's file while people are yet to sign it. No host reads it.
const draftName = "root.draft.json"

// site is a site's folder with the trust roots in it.
type site struct {
	folder string
	roots  trust.Chain
	draft  []byte       // the file; nil if there is none
	next   *trust.Root  // in the draft
	sides  []trust.Side // who must sign it
}

// open reads a folder that may not be a site yet.
func open(folder string) (*site, error) {
	s := &site{folder: folder}
	if _, err := os.Stat(filepath.Join(folder, "trust")); err == nil {
		if s.roots, err = trust.Roots(os.DirFS(folder)); err != nil {
			return nil, err
		}
	}
	var err error
	s.draft, err = os.ReadFile(filepath.Join(folder, draftName))
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err == nil {
		s.next, s.sides, err = s.roots.Draft(s.draft)
	}
	return s, err
}

// newest is the version in force; nil if there is none.
func (s *site) newest() *trust.Root {
	if len(s.roots) == 0 {
		return nil
	}
	return s.roots.Newest()
}

// keep writes the file of the next version: under trust/ if both sides have signed it, else as the draft. It says what is next.
func (s *site) keep(w io.Writer, file []byte) error {
	next, sides, err := s.roots.Draft(file)
	if err != nil {
		return err
	}
	draft := filepath.Join(s.folder, draftName)
	if missing(sides) > 0 {
		if err := os.MkdirAll(s.folder, 0o755); err != nil {
			return err
		}
		if err := renameio.WriteFile(draft, file, 0o644, renameio.WithTempDir(s.folder)); err != nil {
			return err
		}
		_, _ = fmt.Fprintf(w, "%s: version %d\n", draft, next.Version)
		printSides(w, sides)
		return nil
	}
	chain, err := s.roots.Then(file)
	if err != nil {
		return err
	}
	path := filepath.Join(s.folder, trust.RootPath(next.Version))
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := cli.WriteNew(path, file, 0o644); err != nil {
		return err
	}
	if err := os.Remove(draft); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if next.Version == 1 {
		return PrintPin(w, chain[0].Pin)
	}
	_, err = fmt.Fprintf(w, "%s: both sides have signed. Commit it alone, have it approved as @root-%d ('kmo approve', tier 0), and push\n", path, next.Version)
	return err
}

func missing(sides []trust.Side) (n int) {
	for _, side := range sides {
		n += side.Missing()
	}
	return n
}

// printSides says of each side how far it is.
func printSides(w io.Writer, sides []trust.Side) {
	for _, side := range sides {
		_, _ = fmt.Fprintf(w, "  root %d asks for %d: signed by %s", side.Version, side.Need, names(side.Signed))
		if side.Missing() > 0 {
			_, _ = fmt.Fprintf(w, "; %d more of %s", side.Missing(), names(side.May))
		}
		_, _ = fmt.Fprintln(w)
	}
}

func names(list []string) string {
	if len(list) == 0 {
		return "nobody"
	}
	return strings.Join(list, ", ")
}

// PrintPin prints a pin as agent.yaml has it.
func PrintPin(w io.Writer, pin trust.Pin) error {
	_, err := fmt.Fprintf(w, "trust:\n  sha256: %s\n  kmo1: %s\n", pin.SHA256, pin.Root)
	return err
}
