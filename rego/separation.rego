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
#   A change of files under trust/ or policy/ stands alone in its commit and judges the commits after it. A host that meets
#   such a commit together with others, because they came quickly or it was away, takes them as one change if each trust
#   root was brought by itself, and the rules before and the rules after both judge all of it. The very first commit of a site is no change: there is nothing before
#   it, and the pinned root judges it. A revert is not judged: what it goes back to was.
# custom:
#   id: KT020
#   passes: one commit for trust/, one for policy/, one for everything else, in the order in which they are to take effect
#   waivable: false
deny contains plan.overall("KT020", concat(" ", parts), msg) if {
	input.change.base != ""
	not input.change.revert
	parts := [name |
		some [name, touched] in [["trust/", input.change.trust], ["policy/", input.change.policy], ["units/", input.change.other]]
		touched
	]
	count(parts) > 1
	some guarded in ["trust/", "policy/"]
	guarded in parts
	not apart
	msg := sprintf(
		"%s change in one step since %s; want a commit in which %s alone is other than there, and, once that is accepted, the rest again",
		[concat(" and ", parts), input.change.base, parts[0]],
	)
}

# In commits of their own, and where the rules change, both the base's and the head's are asked: no rule is in force afterwards that did not
# judge. A trust root judges the next by itself.
apart if {
	input.change.apart
	not input.change.policy
}

apart if {
	input.change.apart
	input.rules[1]
}
