// Package docker runs OCI images by a container engine: Docker Engine or Podman, which answer the same API.
//
// The engine never pulls and never resolves a name: a workload's content is sent to it as an image of one layer, under its digest
// (package layer), and a container is made of the image's id. The engine's copy is its own; it is not looked at again.
//
// What a workload is lies in the labels of its container, and what labels cannot hold, because it changes, in the state folder, which is
// trusted, mode 0700, this user's own:
//
//	instance                      what tells this folder's containers from those of others on the same engine; lost, it is not made anew beside what it named
//	work/<workload>/record.json   restarts, which process the program is, how the last one ended, whether hooks are due
//	work/<workload>/commands      the engine's ids of the commands that are executed in it: a later process ends those that an earlier one has left
//	work/<workload>/files         the unit's files, mounted into the container
//	images/<content root>         the id of the image that a content has become
//	kept/<unit>/<path>            kept paths, which outlive their workloads
//
// Labels of a container:
//
//	kmo.instance   the state folder's
//	kmo.role       workload, or hook: a preInit hook is a container of its own, of the same image and mounts
//	kmo.name, kmo.unit, kmo.spec, kmo.ports
//	kmo.workload   all of it as JSON, without the contents of its files
//
// Secret files lie in Options.Memory and are mounted from there. When they are gone, because the host was started again, the workload
// is damaged until it is applied again.
//
// A container has no restart policy: an ended program is started again by this process, after a pause, with its hooks. It is told of an
// end by the program's pidfd and by the engine's events, and looks at all containers now and then. Containers of ours that nobody made to
// the end are removed; nobody else's is touched.
//
// That a program runs is believed of the engine while the process lives that was seen in the container's cgroup. Podman learns of no end
// when its conmon has gone before: such a container is made anew, and how its program ended is not known.
//
// A program has no capability and can gain none, a read-only root, and the engine's own seccomp filter. With Overlay.Size it may write
// to /tmp, a tmpfs of that size unless the unit has something else there, and to /dev/shm, another of at most 64 MiB; both are new at each
// start and count as the workload's memory.
// A port whose number on this host the unit names is published on every address, any other on the loopback.
//
// A folder of the host is mounted if no component of its path is a link. That is looked at before each start; the engine then opens
// the path itself, so a path that others may rename things in is not safe to mount.
package docker

import (
	"log/slog"
	"time"
)

// The names of the two backends.
const (
	Docker = "docker"
	Podman = "podman"
)

// Options are what a Backend needs. Name and State are.
type Options struct {
	Name    string                           // Docker or Podman
	Socket  string                           // the engine's; "" is where it usually is
	State   string                           // the state folder; made if there is none
	Memory  string                           // a folder on storage that is memory, for secrets; "" is the first of /run/kmo and /dev/shm/kmo that can be that
	Logger  *slog.Logger                     // nil is silent
	Backoff func(restarts int) time.Duration // pause before a program is started again; nil is 1 s doubling to 1 min

	// Look says that nothing but Fingerprint is to be asked: nothing is made in State, and nothing of the engine's is taken over, watched or
	// cleared. Any other method returns an error.
	Look bool
}
