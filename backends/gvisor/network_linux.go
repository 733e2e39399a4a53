package gvisor

import (
	"context"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends/process/netns"
)

// openNetwork makes a network whose socket lies in a folder; the calling thread is this one's alone. runsc takes the addresses off what is
// in it: each sandbox needs one of its own.
func openNetwork(r runtime, dir string) (*netns.Network, error) {
	n, err := netns.Open()
	if err != nil {
		return nil, err
	}
	err = n.Do(hide)
	if err == nil {
		err = n.Reach(context.Background(), netns.WayOut{Slirp: r.Slirp, Folder: dir, Bound: true})
	}
	if err != nil {
		_ = n.Close()
		return nil, err
	}
	return n, nil
}

// rootMark was in the host's network namespace alone until Linux 6.9. By it runsc knows that namespace, which it refuses.
const rootMark = "/proc/sys/net/core/rmem_default"

// hide keeps runsc from taking any namespace for the host's. Below /proc/sys/net every namespace has folders of its own, so that
// nothing less can be covered for all.
func hide() error {
	if unix.Access(rootMark, unix.F_OK) != nil {
		return nil
	}
	if err := unix.Mount("tmpfs", "/proc/sys/net", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_RDONLY, "mode=0555"); err != nil {
		return fmt.Errorf("covering /proc/sys/net: %v", err)
	}
	return nil
}
