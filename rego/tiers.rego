# METADATA
# title: tiers
# description: Whether the approvals that count are enough for what the change touches.
package kmo.tiers

import data.kmo.plan

evaluated contains id if {
	input.version == 1
	input.change.commit
	some id in ["KT018", "KT019"]
}

# METADATA
# title: quorum missing
# description: |
#   Each changed unit needs the approvals of its tier, from distinct principals, for exactly this change of content, and the
#   time that the tier asks for from then on. A unit that changes but of which nothing was established has none. A revert that needs no quorum says so in the facts.
# custom:
#   id: KT018
#   passes: as many approvals as the tier asks for (kmo approve), or a change to a tier-3 unit
#   waivable: false
deny contains {"id": "KT018", "unit": facts.unit, "path": path, "msg": msg} if {
	not input.change.revert
	some facts in input.change.units
	facts.need > 0
	counted := {approval.principal | some approval in facts.counted} - {""}
	count(counted) < facts.need
	path := concat("/", ["approvals", facts.unit])
	msg := sprintf(
		"tier %d, %s: %d of %d approvals, %d missing; counted: %s; not counted: %s; want %d more from other principals (kmo approve)",
		[
			facts.tier, facts.action, count(counted), facts.need, facts.need - count(counted),
			listing(counted), listing(uncounted(facts)), facts.need - count(counted),
		],
	)
}

# They are complete, and the tier gives others time to object.
deny contains {"id": "KT018", "unit": facts.unit, "path": concat("/", ["approvals", facts.unit]), "msg": msg} if {
	not input.change.revert
	some facts in input.change.units
	msg := sprintf("tier %d, %s: it has its approvals and cools down until %s; want no more than to wait", [facts.tier, facts.action, facts.cools])
}

deny contains plan.finding("KT018", i, "", msg) if {
	not input.change.revert
	some i, unit in input.units
	not unit.name in judged
	unit.before != unit.after
	msg := "the unit changes, but nothing was established about who approved it; want it among the changed units of the commit"
}

deny contains plan.overall("KT018", "", msg) if {
	object.get(input.change, "signer", "") == ""
	msg := "the commit's signer is no known principal; want a commit signed with a key of the trust root"
}

judged contains facts.unit if some facts in input.change.units

uncounted(facts) := [text |
	some approval in facts.uncounted
	who := [name | some key in ["principal", "key", "file"]; name := object.get(approval, key, ""); name != ""]
	text := sprintf("%s (%s)", [array.concat(who, ["unknown"])[0], object.get(approval, "why", "no reason given")])
]

listing(names) := concat(", ", names) if count(names) > 0

else := "nobody"

# METADATA
# title: tier lowered
# description: A unit is judged by the most sensitive tier that the trusted base gives it, never by a weaker one that the change brings.
# custom:
#   id: KT019
#   passes: a tier at least as sensitive as before
#   waivable: false
deny contains {"id": "KT019", "unit": facts.unit, "path": "tier", "msg": msg} if {
	some facts in input.change.units
	facts.tierBefore >= 0
	facts.tier > facts.tierBefore
	msg := sprintf("tier %d where the accepted commit has %d; want %d or less", [facts.tier, facts.tierBefore, facts.tierBefore])
}
