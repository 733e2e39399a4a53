// Package netns gives a workload a network of its own without touching the host's: no bridge, no firewall, no address of it.
//
// A [Network] is a network namespace with a loopback, held by a thread of this process. What runs in it reaches the world by
// slirp4netns, where that is installed, which is user-mode networking: the traffic leaves as this process's own, the host's
// loopback is not reached, names are asked of [Resolver]. Without it there is no way out.
//
// A port is published by a forwarder in this process: it takes TCP connections on the host and makes them again on the loopback inside,
// from where they seem to come. One that nobody inside takes is reset. What brings a TCP of its own has no loopback there: its ports are
// published by slirp4netns.
//
//	network, err := netns.Open()
//	err = network.Reach(ctx, netns.WayOut{})      // the world, if slirp4netns is there
//	err = network.Publish("127.0.0.1:8080", 80)
//	… start what joins network.Path()
package netns

import "errors"

// What a network with a way out has.
const (
	Address  = "10.0.2.100"
	Resolver = "10.0.2.3" // its name server
)

// Slirp is the command that makes a way out.
const Slirp = "slirp4netns"

// ErrNoWayOut says that slirp4netns is not installed.
var ErrNoWayOut = errors.New(Slirp + " is not installed: install the package " + Slirp + " for a way out of a workload's own network")
