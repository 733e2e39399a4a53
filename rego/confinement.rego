# METADATA
# title: confinement
# description: What a workload may ask for beyond the default confinement.
package kmo.confinement

import data.kmo.plan

evaluated contains id if {
	input.version == 1
	some id in ["KT001", "KT002", "KT005", "KT010", "KT011", "KT014"]
	data.limits.capabilities
}

# METADATA
# title: privileged workload
# description: A privileged workload, or one with all devices, is the host.
# custom:
#   id: KT001
#   passes: security.privileged left out, and devices named one by one in resources.devices
#   waivable: true
deny contains plan.finding("KT001", i, "security.privileged", msg) if {
	some [i, "privileged", value] in plan.asks
	msg := sprintf("privileged is %v; want it left out: name the devices or capabilities that are needed", [value])
}

deny contains plan.finding("KT001", i, "resources.devices", msg) if {
	some i, unit in input.units
	some device in unit.after.resources.devices
	msg := every_device(device)
}

deny contains plan.finding("KT001", i, "resources.devices", msg) if {
	some i, unit in input.units
	some workload in unit.workloads
	some device in workload.resources.devices
	some named in array.concat([device.name], object.get(device, "nodes", []))
	msg := every_device(named)
}

every_device(device) := sprintf("devices hold %q, which is every device; want single devices by name", [device]) if {
	regex.match(`^(all|\*|/|/dev/?)$`, device)
}

# METADATA
# title: namespace of the host
# description: A workload in the host's PID, IPC, UTS, user, cgroup or network namespace sees and reaches what is not its own.
# custom:
#   id: KT002
#   passes: security.host left out; ports are published with run.ports
#   waivable: true
deny contains plan.finding("KT002", i, "security.host", msg) if {
	some [i, "host", value] in plan.asks
	msg := sprintf("shares the host's namespaces %v; want none: publish ports with run.ports", [value])
}

# METADATA
# title: capability off the list
# description: Capabilities outside the allow-list lead to the host.
# custom:
#   id: KT005
#   passes: only capabilities of the allow-list in security.capabilities, spelled CAP_…
#   waivable: true
deny contains plan.finding("KT005", i, "security.capabilities", msg) if {
	some [i, "capabilities", value] in plan.asks
	some name in value
	not name in data.limits.capabilities
	msg := sprintf("capability %q; want none but %s", [name, concat(", ", data.limits.capabilities)])
}

# METADATA
# title: root
# description: |
#   A workload that runs as user 0, can become it through set-uid files, or brings such files. A privileged workload has
#   root's rights whatever its user.
# custom:
#   id: KT010
#   passes: run.user of 1 or more, security.escalation and security.privileged left out, no set-uid or set-gid mode on a file
#   waivable: true
deny contains plan.finding("KT010", i, "run.user", msg) if {
	some i, unit in input.units
	unit.after.run.user < 1
	is_number(unit.after.run.user)
	msg := root_user(unit.after.run.user)
}

deny contains plan.finding("KT010", i, "run.user", msg) if {
	some i, unit in input.units
	some workload in unit.workloads
	workload.run.user < 1
	msg := root_user(workload.run.user)
}

deny contains plan.finding("KT010", i, concat(".", ["security", field]), msg) if {
	some [i, field, value] in plan.asks
	field in {"escalation", "privileged"}
	msg := sprintf("%s is %v, which makes root reachable; want it left out", [field, value])
}

deny contains plan.finding("KT010", i, sprintf("files[%s]", [file.to]), msg) if {
	some i, unit in input.units
	some workload in unit.workloads
	some file in workload.files
	bits.and(file.mode, 3072) != 0
	msg := sprintf("file mode %s is set-uid or set-gid; want 0755 or less", [format_int(file.mode, 8)])
}

root_user(user) := sprintf("user is %v, which is root; want 1 or more, 65532 if any will do", [user])

# METADATA
# title: writable base
# description: The base of a workload is what was verified; a base that can be written is no longer that.
# custom:
#   id: KT011
#   passes: security.writableBase left out; what must be written goes into the overlay or a kept path
#   waivable: true
deny contains plan.finding("KT011", i, "security.writableBase", msg) if {
	some [i, "writableBase", value] in plan.asks
	msg := sprintf("writableBase is %v; want it left out: write to the overlay or a kept path", [value])
}

# METADATA
# title: unconfined workload
# description: Without seccomp and LSM every fault in the kernel is in reach.
# custom:
#   id: KT014
#   passes: security.unconfined left out
#   waivable: true
deny contains plan.finding("KT014", i, "security.unconfined", msg) if {
	some [i, "unconfined", value] in plan.asks
	msg := sprintf("unconfined is %v; want it left out", [value])
}
