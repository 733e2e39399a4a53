# METADATA
# title: freeze
# description: When nothing is changed.
package kmo.freeze

import data.kmo.plan

evaluated contains "KT017" if {
	input.version == 1
	is_array(input.site.freeze)
	time.parse_rfc3339_ns(input.time) > 0
}

# METADATA
# title: change in a freeze window
# description: |
#   In a window of freeze in site.yaml of the trusted base, by trusted time, no unit changes and no policy. A revert goes back to
#   what was there. A change of site.yaml alone, which has the approvals of its tier, can end the freeze for the commits
#   after it. What a host takes that has accepted nothing yet is no change.
# custom:
#   id: KT017
#   passes: the same after the window; a revert; or first a commit that ends the freeze and in which site.yaml alone changes
#   waivable: false
deny contains plan.overall("KT017", "freeze in site.yaml", msg) if {
	not input.change.revert
	input.change.base != ""
	some window in input.site.freeze
	now := time.parse_rfc3339_ns(input.time)
	now >= time.parse_rfc3339_ns(window.from)
	now < time.parse_rfc3339_ns(window.to)
	changed := [facts.unit | some facts in input.change.units; facts.unit != "@site"]
	count(changed) > 0
	msg := sprintf(
		"%s at %s, within the freeze from %s to %s%s; want it after that, or first a commit that ends the freeze in site.yaml alone",
		[concat(", ", array.slice(changed, 0, 10)), input.time, window.from, window.to, reason(window.why)],
	)
}

reason("") := ""

reason(why) := sprintf(" (%s)", [why]) if why != ""
