//go:build !linux

package process

import (
	"context"
	"errors"
	"io"

	"github.com/kindos/kmo/backends"
)

// Keeper is there on Linux only.
type Keeper struct{}

// Open says that programs are kept on Linux only.
func Open(o Options) (*Keeper, error) { return nil, errors.New(o.Backend + " needs Linux") }

var errLinux = errors.New("needs Linux")

// Close does nothing.
func (*Keeper) Close() error { return nil }

// Features is empty.
func (*Keeper) Features() []backends.Feature { return nil }

// Missing names all of it.
func (*Keeper) Missing() []string { return []string{"everything: needs Linux"} }

// Mounts is false.
func (*Keeper) Mounts() bool { return false }

// Confines is false.
func (*Keeper) Confines() bool { return false }

// Bounds is false.
func (*Keeper) Bounds(string) bool { return false }

// Kernel is empty.
func (*Keeper) Kernel() string { return "" }

// Observe returns an error.
func (*Keeper) Observe(context.Context) ([]backends.Status, error) { return nil, errLinux }

// Apply returns an error.
func (*Keeper) Apply(context.Context, backends.Workload) error { return errLinux }

// Remove returns an error.
func (*Keeper) Remove(context.Context, string) error { return errLinux }

// Logs returns an error.
func (*Keeper) Logs(context.Context, string, backends.LogOptions) (io.ReadCloser, error) {
	return nil, errLinux
}

// Exec returns an error.
func (*Keeper) Exec(context.Context, string, []string) (int, []byte, error) { return 0, nil, errLinux }
