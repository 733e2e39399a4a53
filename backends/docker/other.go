//go:build !linux

package docker

import (
	"context"
	"errors"
	"io"

	"github.com/kindos/kmo/backends"
)

// Backend is there on Linux only.
type Backend struct{}

var errLinux = errors.New("needs Linux")

// Open says that containers are kept on Linux only.
func Open(o Options) (*Backend, error) { return nil, errors.New(o.Name + " needs Linux") }

// Close does nothing.
func (*Backend) Close() error { return nil }

// Fingerprint returns an error.
func (*Backend) Fingerprint(context.Context) (backends.Fingerprint, error) {
	return backends.Fingerprint{}, errLinux
}

// Observe returns an error.
func (*Backend) Observe(context.Context) ([]backends.Status, error) { return nil, errLinux }

// Apply returns an error.
func (*Backend) Apply(context.Context, backends.Workload) error { return errLinux }

// Remove returns an error.
func (*Backend) Remove(context.Context, string) error { return errLinux }

// Logs returns an error.
func (*Backend) Logs(context.Context, string, backends.LogOptions) (io.ReadCloser, error) {
	return nil, errLinux
}

// Exec returns an error.
func (*Backend) Exec(context.Context, string, []string) (int, []byte, error) { return 0, nil, errLinux }
