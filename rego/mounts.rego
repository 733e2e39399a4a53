# METADATA
# title: mounts
# description: Which folders of the host a workload may see.
package kmo.mounts

import data.kmo.plan

evaluated contains id if {
	input.version == 1
	input.host.state != ""
	is_array(input.host.own)
	some id in ["KT003", "KT004", "KT022"]
}

# METADATA
# title: mount of the host's own folders
# description: |
#   A mount of /, /etc, /proc, /sys, /dev, /boot, root's home or kMO's own state, of anything in them or of a folder around
#   kMO's state; a path that is not absolute, or goes through "..", is refused because nobody can read off where it leads.
# custom:
#   id: KT003
#   passes: a folder made for the workload, such as /srv/NAME
#   waivable: true
deny contains plan.finding("KT003", i, plan.mounted(i, from), msg) if {
	some [i, from, _] in plan.mounts
	some reason in reasons(from)
	msg := sprintf("mounts %q, %s; want a folder made for the workload, such as /srv/%s", [from, reason, input.units[i].name])
}

reasons(from) := {"which is not absolute"} if not startswith(from, "/")

else := {"which goes through \"..\""} if ".." in split(from, "/")

else := {"which is the whole host"} if plan.clean(from) == "/"

else := owned(path) | state(path) if path := plan.clean(from)

owned(path) := {sprintf("which is in %s", [trim_suffix(folder, "/")]) |
	some folder in regex.find_n(`^/(etc|proc|sys|dev|boot|root|var/root)(/|$)`, path, 1)
}

state(path) := {"which holds kMO's own state" | related(path, plan.clean(input.host.state))}

# METADATA
# title: mount of a runtime's socket
# description: Who reaches the socket of docker, podman, containerd, crio or kMO is root on the host; so is who reaches the folder it lies in.
# custom:
#   id: KT004
#   passes: no socket of a runtime, and not /run itself; a socket of another program, or a folder such as /run/NAME
#   waivable: true
deny contains plan.finding("KT004", i, plan.mounted(i, from), msg) if {
	some [i, from, path] in plan.mounts
	regex.match(sockets, path)
	msg := sprintf("mounts %q, where sockets of container runtimes lie; want a folder made for the workload, such as /run/%s", [from, input.units[i].name])
}

deny contains plan.finding("KT004", i, plan.mounted(i, from), msg) if {
	some [i, from, path] in plan.mounts
	not regex.match(sockets, path)
	some engine in input.host.engines
	related(path, plan.clean(engine))
	msg := sprintf("mounts %q, by which %s is reached, where this host has a runtime; want a folder made for the workload, such as /srv/%s", [from, engine, input.units[i].name])
}

# /run and each user's own, what runtimes keep in them, and their sockets wherever they lie.
sockets := concat("|", [
	`^/(var/)?run(/user(/[^/]+)?)?$`,
	`^/(var/)?run/(user/[^/]+/)?(docker|podman|libpod|containerd|crio|cri-dockerd|dockershim|buildkit|kmo|k3s)(\.sock|\.pid)?(/|$)`,
	`/(docker|podman|containerd|crio|cri-dockerd|dockershim|buildkitd|kmo)\.sock$`,
])

# METADATA
# title: mount of what kMO is made of
# description: |
#   kMO's own binary, the agent's file, its keys, its state and its plugins are changed by who runs the host and by self-update,
#   and by no unit; who can read the key can sign as this host. A mount of any of them, of what a link to it leads to, of
#   anything in it or of a folder around it is refused, one that cannot be written too.
# custom:
#   id: KT022
#   passes: a folder made for the workload, such as /srv/NAME
#   waivable: false
deny contains plan.finding("KT022", i, plan.mounted(i, from), msg) if {
	some [i, from, path] in plan.mounts
	reached := {owned | some owned in own; related(path, owned)}
	count(reached) > 0
	msg := sprintf("mounts %q, by which %s is reached, a part of kMO; want a folder made for the workload, such as /srv/%s", [from, min(reached), input.units[i].name])
}

own := {plan.clean(path) | some path in array.concat([input.host.state], input.host.own)}

within(_, "/")

within(path, folder) if path == folder

within(path, folder) if startswith(path, concat("", [folder, "/"]))

related(path, folder) if within(path, folder)

related(path, folder) if within(folder, path)
