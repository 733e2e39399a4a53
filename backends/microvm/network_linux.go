package microvm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"

	"github.com/kindos/kmo/backends/microvm/machine"
	"github.com/kindos/kmo/backends/process/monitor"
	"github.com/kindos/kmo/backends/process/netns"
)

// connect makes the network that the VMM runs in: what that reaches on its loopback, and hands on to the machine, is the machine's own.
// Where nothing makes a way out there is none. It ends with the monitor.
func connect(o orders) (*netns.Network, error) {
	n, err := netns.Open()
	if err != nil || o.Firecracker { // which has no network to hand on
		return n, err
	}
	if err := n.Reach(context.Background(), netns.WayOut{}); err != nil && !errors.Is(err, netns.ErrNoWayOut) {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

// forwards are the ports that the VMM publishes: Firecracker on this host, QEMU in its network, by this host's numbers.
func forwards(m *monitor.Monitor, o orders) (list []machine.Forward) {
	for _, p := range m.Workload.Run.Ports {
		f := machine.Forward{Address: "127.0.0.1", Host: p.Host, Guest: p.Port}
		if o.Firecracker && slices.Contains(m.Public, p.Name) {
			f.Address = ""
		}
		list = append(list, f)
	}
	return list
}

// publish makes what QEMU publishes in its network reachable on this host.
func publish(m *monitor.Monitor, n *netns.Network) error {
	for _, p := range m.Workload.Run.Ports {
		address := "127.0.0.1"
		if slices.Contains(m.Public, p.Name) {
			address = ""
		}
		if err := n.Publish(net.JoinHostPort(address, strconv.Itoa(p.Host)), p.Host); err != nil {
			return fmt.Errorf("publishing port %s: %v", p.Name, err)
		}
	}
	return nil
}
