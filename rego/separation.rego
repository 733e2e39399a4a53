# METADATA
# title: separation
# description: What judges a change is not changed by it.
package kmo.separation

import data.kmo.plan

evaluated contains "KT020" if {
	input.version == 1
	is_string(input.change.base)
	is_boolean(input.change.trust)
	is_boolean(input.change.policy)
	is_boolean(input.change.other)
}

# METADATA
# title: trust or policy mixed with other changes
# description: |
#   A change of files under trust/ or policy/ stands alone in its commit and judges the commits after it. The very first
#   commit of a site is no change: there is nothing before it, and the pinned root judges it.
# custom:
#   id: KT020
#   passes: one commit for trust/, one for policy/, one for everything else, in the order in which they are to take effect
#   waivable: false
deny contains plan.overall("KT020", concat(" ", parts), msg) if {
	input.change.base != ""
	parts := [name |
		some [name, touched] in [["trust/", input.change.trust], ["policy/", input.change.policy], ["units/", input.change.other]]
		touched
	]
	count(parts) > 1
	some guarded in ["trust/", "policy/"]
	guarded in parts
	msg := sprintf("%s change together; want trust/ and policy/ each alone in a commit of its own", [concat(" and ", parts)])
}
