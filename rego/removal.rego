# METADATA
# title: removal
# description: A change that takes much away is a mistake until proven otherwise.
package kmo.removal

import data.kmo.plan

evaluated contains "KT016" if {
	input.version == 1
	input.totals.before >= 0
	input.totals.after >= 0
	input.totals.removed >= 0
	data.limits.removed.percent > 0
	data.limits.removed.units > 0
	data.limits.removed.single > 0
}

# METADATA
# title: removal of many units, or of the last
# description: |
#   More than 30 % of the units or more than 10 of them go at once, or none is left on this host. One unit may always go unless
#   it is the last. A revert is not judged: it takes back what was added, and what it goes back to was judged.
# custom:
#   id: KT016
#   passes: fewer removals in one change; several changes, one after the other
#   waivable: false
deny contains plan.overall("KT016", "units", msg) if {
	not input.change.revert
	input.totals.removed > data.limits.removed.units
	msg := sprintf("%d units would go; want at most %d in one change", [input.totals.removed, data.limits.removed.units])
}

deny contains plan.overall("KT016", "units", msg) if {
	not input.change.revert
	input.totals.removed > data.limits.removed.single
	input.totals.removed * 100 > input.totals.before * data.limits.removed.percent
	msg := sprintf(
		"%d of %d units would go; want at most %d %% of them in one change",
		[input.totals.removed, input.totals.before, data.limits.removed.percent],
	)
}

deny contains plan.overall("KT016", "units", msg) if {
	not input.change.revert
	input.totals.before > 0
	input.totals.after == 0
	msg := sprintf("none of %d units would be left on this host; want at least one", [input.totals.before])
}
