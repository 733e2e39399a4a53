package wasm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// another is a copy of a module that is not the same: it has one more section, which says nothing.
func another(t *testing.T, module string) string {
	t.Helper()
	text, err := os.ReadFile(module)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "module.wasm")
	if err := os.WriteFile(path, append(text, 0, 2, 1, 'x'), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// Compiling is done for one module at a time, and once for each, however many ask.
func TestCompilesOneAtATime(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "modules")
	c, err := openCache(dir, binaries.runner)
	if err != nil {
		t.Fatal(err)
	}
	var asking sync.WaitGroup
	for _, module := range []string{binaries.program, another(t, binaries.program)} {
		for range 3 {
			asking.Go(func() {
				if _, err := c.ready(t.Context(), module, 65532); err != nil {
					t.Error(err)
				}
			})
		}
	}
	over := make(chan struct{})
	go func() { asking.Wait(); close(over) }()
	seen, most := map[string]bool{}, 0
	for waiting := true; waiting; {
		select {
		case <-over:
			waiting = false
		case <-time.After(time.Millisecond):
		}
		halves, err := filepath.Glob(filepath.Join(dir, unfinished+"*"))
		if err != nil {
			t.Fatal(err)
		}
		most = max(most, len(halves))
		for _, half := range halves {
			seen[half] = true
		}
	}
	if most > 1 || len(seen) > 2 {
		t.Errorf("2 modules were compiled %d times, %d at once", len(seen), most)
	}
}

// A compiler that is not done in time on a busy host blames no module; one that had the processors for so long does.
func TestSlowCompilerBlamesNobody(t *testing.T) {
	c, err := openCache(filepath.Join(t.TempDir(), "modules"), binaries.runner)
	if err != nil {
		t.Fatal(err)
	}
	c.wall = 50 * time.Millisecond
	endless, held, err := os.Pipe() // a module that is never read to its end
	if err != nil {
		t.Fatal(err)
	}
	defer endless.Close()
	defer held.Close()
	err = c.compile(t.Context(), endless, filepath.Join(c.dir, "module"), 65532)
	var fault *moduleError
	if err == nil || errors.As(err, &fault) || !strings.Contains(err.Error(), "not done within 50ms") {
		t.Errorf("error %#v, want one of the host's that says how long it took", err)
	}
}

// Whoever waits for another's compiler waits no longer than its own context.
func TestWaitingForACompilerEnds(t *testing.T) {
	c, err := openCache(filepath.Join(t.TempDir(), "modules"), binaries.runner)
	if err != nil {
		t.Fatal(err)
	}
	<-c.turn
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := c.ready(ctx, binaries.program, 65532); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v, want the context's", err)
	}
}

// Machine code whose sum is gone is made anew.
func TestDamagedCodeIsMadeAnew(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "modules")
	before := machineCodeIn(t, dir, binaries.program)
	for what, spoil := range map[string]func() error{
		"no sum": func() error { return os.Remove(filepath.Join(before.dir, sumFile)) },
		"a changed byte": func() error {
			files, err := filepath.Glob(filepath.Join(before.dir, "wazero-*", "*"))
			if err != nil || len(files) == 0 {
				return fmt.Errorf("%q: %v", files, err)
			}
			text, err := os.ReadFile(files[0])
			if err != nil {
				return err
			}
			text[len(text)/2] ^= 1
			return errors.Join(os.Chmod(files[0], 0o600), os.WriteFile(files[0], text, 0o600))
		},
		"no code": func() error { return os.RemoveAll(before.dir) },
		"a sum cut short": func() error {
			return errors.Join(os.Chmod(filepath.Join(before.dir, sumFile), 0o600), os.Truncate(filepath.Join(before.dir, sumFile), 5))
		},
	} {
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		if after := machineCodeIn(t, dir, binaries.program); fmt.Sprint(after) != fmt.Sprint(before) {
			t.Errorf("%s: it is %v, was %v", what, after, before)
		}
	}
}
