# METADATA
# title: resources
# description: No workload without bounds, and no host promised twice.
package kmo.resources

import data.kmo.plan

evaluated contains "KT013" if {
	input.version == 1
	input.totals.memory >= 0
	input.host.memory >= 0
	data.limits.share > 0
}

# METADATA
# title: missing or excessive limits
# description: |
#   Each workload has bounds for cpu, memory, pids and disk. The bounds of all workloads on this host stay within the
#   host's share for memory, pids and disk; cpu may be promised more than once, but not to one workload beyond the host.
# custom:
#   id: KT013
#   passes: max for cpu, memory, pids and disk in resources, and a sum below the host's share
#   waivable: true
deny contains plan.finding("KT013", i, sprintf("resources.%s.max", [kind]), msg) if {
	some i, unit in input.units
	some workload in unit.workloads
	not bounded(workload.resources)
	some kind in ["cpu", "memory", "pids", "disk"]
	object.get(workload.resources, kind, 0) < 1
	msg := sprintf("no bound for %s; want %s: {max: …}", [kind, kind])
}

deny contains plan.finding("KT013", i, "resources.cpu.max", msg) if {
	some i, unit in input.units
	some workload in unit.workloads
	workload.resources.cpu > input.host.cpu
	msg := sprintf("cpu bound of %dm is more than this host's %dm; want at most that", [workload.resources.cpu, input.host.cpu])
}

deny contains plan.overall("KT013", "resources", msg) if {
	some kind in ["memory", "pids", "disk"]
	share := floor((input.host[kind] * data.limits.share) / 100)
	input.totals[kind] > share
	msg := sprintf(
		"the units of this host are bound to %v of %s, its share is %v (%d %% of %v); want smaller bounds or fewer units",
		[input.totals[kind], kind, share, data.limits.share, input.host[kind]],
	)
}

bounded(resources) if {
	resources.cpu > 0
	resources.memory > 0
	resources.pids > 0
	resources.disk > 0
}
