package reconciler

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/kindos/kmo/backends"
)

// doorTime is for clearing the doors that nobody sees any more.
const doorTime = 10 * time.Second

// openDoors makes the folders that a workload shares with others. Only they see them: the folder above is this agent's alone.
func openDoors(w backends.Workload) error {
	for _, door := range w.Doors {
		if err := os.MkdirAll(door.From, 0o700); err != nil {
			return err
		}
		if err := os.Chmod(door.From, 0o777|os.ModeSticky); err != nil { // each of them is another user
			return err
		}
	}
	return nil
}

// closeDoors removes the doors of units that no workload sees any more.
func closeDoors(ctx context.Context, folder string, workloads []backends.Workload) error {
	if folder == "" {
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, doorTime, fmt.Errorf("not cleared within %v", doorTime))
	defer cancel()
	open := map[string]bool{}
	for _, w := range workloads {
		for _, door := range w.Doors {
			open[door.Unit] = true
		}
	}
	found, err := os.ReadDir(folder)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	for _, unit := range found {
		if !open[unit.Name()] {
			err = errors.Join(err, removeTree(ctx, filepath.Join(folder, unit.Name())))
		}
	}
	_ = os.Remove(folder) // if it is empty
	return err
}

// removeTree removes a folder and all that is below, of any depth: os.RemoveAll holds a descriptor open for each level. What lies deeper is moved up
// to the first level, so that two are enough.
func removeTree(ctx context.Context, path string) error {
	top, err := os.OpenRoot(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer top.Close()
	for ctx.Err() == nil {
		names, err := children(top, ".")
		if err != nil {
			return err
		}
		if len(names) == 0 {
			return os.Remove(path)
		}
		for _, name := range names {
			if err := flatten(ctx, top, name); err != nil {
				return err
			}
		}
	}
	return context.Cause(ctx)
}

// flatten removes what has that name at the first level; folders in it are moved beside it, under names that are new.
func flatten(ctx context.Context, top *os.Root, name string) error {
	for ctx.Err() == nil {
		err := top.Remove(name)
		if err == nil || errors.Is(err, os.ErrNotExist) {
			return nil
		}
		names, listed := children(top, name)
		if listed != nil || len(names) == 0 {
			return errors.Join(err, listed)
		}
		for _, child := range names {
			at := filepath.Join(name, child)
			if top.Remove(at) == nil {
				continue
			}
			if err := top.Rename(at, rand.Text()); err != nil {
				return err
			}
		}
	}
	return context.Cause(ctx)
}

// children are some of the names in a folder, at most a thousand.
func children(top *os.Root, folder string) ([]string, error) {
	opened, err := top.Open(folder)
	if err != nil {
		return nil, err
	}
	defer opened.Close()
	names, err := opened.Readdirnames(1000)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return names, err
}
