# METADATA
# title: what was before
# description: What must not come again, and what may only come again as what it is.
package kmo.past

import data.kmo.plan

evaluated contains id if {
	input.version == 1
	is_array(input.site.burned)
	is_array(input.change.burned)
	some id in ["KT024", "KT028"]
}

# METADATA
# title: burned signer, content or image
# description: |
#   An image or a unit's content that site.yaml of the trusted base lists as burned, by sha256 or kmo1 root; content that a commit
#   brought which is burned on this host, or which was signed with a key that the trust root has revoked with all that it
#   signed (rebad). Approvals do not help. A revert is judged too: it goes back to nothing that is burned.
# custom:
#   id: KT024
#   passes: another image, or other content that a good key has signed; what comes in place of burned content is no longer that
#   waivable: false
deny contains plan.finding("KT024", i, plan.named(i, ref), msg) if {
	count(input.site.burned) > 0
	some [i, ref, root] in plan.images
	some listed in input.site.burned
	listed in {root, regex.replace(ref, `^.*@`, "")}
	msg := sprintf("image %q is burned as %s; want another image", [ref, listed])
}

deny contains {"id": "KT024", "unit": facts.unit, "path": "", "msg": msg} if {
	some facts in input.change.units
	facts.to in input.site.burned
	msg := sprintf("its content %s is burned; want other content", [facts.to])
}

deny contains {"id": "KT024", "unit": one.unit, "path": "", "msg": msg} if {
	some one in input.change.burned
	msg := sprintf("its content is that of commit %s, %s; want other content, signed with a good key", [one.commit, one.why])
}

# METADATA
# title: downgrade that does not say so
# description: |
#   A unit gets an image that this host accepted before the one which it replaces, by their sha256 in the commits that were
#   accepted here. Who approves that is to know: the unit says intent: {kind: rollback}, and the approvals are of a
#   downgrade. A unit that was removed meanwhile is compared with what it was last. A revert says so itself.
# custom:
#   id: KT028
#   passes: "intent: {kind: rollback, …} in unit.yaml, with approvals of that; or an image that was not there before"
#   waivable: true
deny contains {"id": "KT028", "unit": facts.unit, "path": "intent.kind", "msg": msg} if {
	not input.change.revert
	some facts in input.change.units
	facts.back != ""
	facts.action != "downgrade"
	msg := sprintf(
		"an image of commit %s comes again in place of a newer one, as %s; want intent: {kind: rollback}, and approvals of that",
		[facts.back, facts.action],
	)
}
