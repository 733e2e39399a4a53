# METADATA
# title: images
# description: How a unit names the bytes it runs.
package kmo.images

import data.kmo.plan

evaluated contains id if {
	input.version == 1
	input.site
	some id in ["KT006", "KT007", "KT009"]
}

evaluated contains "KT008" if {
	input.version == 1
	count(input.change.statements) == 4
}

# METADATA
# title: image not pinned
# description: A tag can be moved after the review; only sha256 names bytes. A tag beside it says something that nobody checks.
# custom:
#   id: KT006
#   passes: host/repository@sha256:… with 64 lower-case hex digits and no tag
#   waivable: true
deny contains plan.finding("KT006", i, plan.named(i, ref), msg) if {
	some [i, ref, _] in plan.images
	not regex.match(`^(\[[0-9a-f:]+\](:[0-9]+)?/|[A-Za-z0-9.-]+(:[0-9]+)?/)?[a-z0-9._-]+(/[a-z0-9._-]+)*@sha256:[0-9a-f]{64}$`, ref)
	msg := sprintf("image %q is not named by sha256 alone; want host/repository@sha256:<64 hex digits>, without a tag", [ref])
}

# METADATA
# title: image without a kmo1 root
# description: The kmo1 root is what the bytes are checked against, chunk by chunk, beside the registry's own sha256.
# custom:
#   id: KT007
#   passes: "merkle: kmo1:sha3-256:… for every variant, as kmo image digest and kmo image seal print it"
#   waivable: true
deny contains plan.finding("KT007", i, plan.named(i, ref), msg) if {
	some [i, ref, root] in plan.images
	not sealed(root)
	msg := sprintf("image %q has kmo1 root %q; want merkle: kmo1:sha3-256:<64 hex digits>, as kmo image seal prints it", [ref, root])
}

sealed(root) if {
	regex.match(`^kmo1:sha3-256:[0-9a-f]{64}$`, root)
	not endswith(root, ":0000000000000000000000000000000000000000000000000000000000000000")
}

# METADATA
# title: image without a statement
# description: |
#   Where the trust root's tier asks for it, each image that would run here has a statement beside it, signed by a key of the role
#   image that is good now, about these very bytes. Anybody may put statements beside an image: one by another key, or
#   about another image, is none. What no registry says now is not there either; it is asked again at the next look.
#
#   Where the tier asks for custody too, the statement's chain has each of those steps by a member of the role custody, with a
#   key that is good now; every link is signed and follows the one before, starts from what those before have made, and the
#   last has made the image. In tiers 0 and 1 nobody has taken two of the steps author, approve and release.
# custom:
#   id: KT008
#   passes: kmo image seal with a key of the role image, and --custody where it is asked for, or a tier that asks for none
#   waivable: true
deny contains plan.finding("KT008", i, plan.named(i, workload.image.ref), msg) if {
	some i, unit in input.units
	role := input.change.statements[unit.tier]
	role != ""
	some k, workload in unit.workloads
	not stated(unit, k)
	msg := sprintf(
		"image %q has no statement of role %s, which tier %d asks for; want one by a key of that role (kmo image seal)",
		[workload.image.ref, role, unit.tier],
	)
}

stated(unit, k) if {
	unit.images[k].signer != ""
	unit.images[k].root == unit.workloads[k].image.root
}

deny contains plan.finding("KT008", i, plan.named(i, workload.image.ref), msg) if {
	some i, unit in input.units
	steps := input.change.custody.steps[unit.tier]
	steps != []
	some k, workload in unit.workloads
	stated(unit, k)
	faults := custody_faults(unit, k, steps)
	faults != set()
	msg := sprintf(
		"image %q does not have the custody that tier %d asks for, %s: %s; want a chain that holds (kmo image custody, kmo image seal --custody)",
		[workload.image.ref, unit.tier, concat(", ", steps), concat("; ", faults)],
	)
}

# The links of an image's chain; none where there is none.
links(unit, k) := chain if {
	chain := unit.images[k].custody
	is_array(chain)
} else := []

# Whether a link is signed by a member of the role custody, with a key of theirs that is good now.
by_custodian(link) if {
	link.why == ""
	some known in input.change.custody.keys
	known.key == link.key
	known.principal == link.principal
}

custody_faults(unit, k, steps) := union({
	{sprintf("nobody of the role custody has taken the step %s", [step]) |
		some step in steps
		count([link | some link in links(unit, k); link.step == step; by_custodian(link)]) == 0
	},
	{sprintf("link %d, %s by %s: %s", [n, link.step, link.principal, link.why]) | some n, link in links(unit, k); link.why != ""},
	{sprintf("link %d, %s by %s, is signed with no key of theirs for custody", [n, link.step, link.principal]) |
		some n, link in links(unit, k)
		link.why == ""
		not by_custodian(link)
	},
	{sprintf("link %d, %s by %s, starts from %s, which no link before has made", [n, link.step, link.principal, digest]) |
		some n, link in links(unit, k)
		some digest in link.uncovered
	},
	{"its last link has not made the image" | not made(unit, k)},
	{sprintf("%s has taken the steps %s", [who, concat(" and ", taken)]) |
		unit.tier <= 1
		some who in {link.principal | some link in links(unit, k)}
		taken := {link.step | some link in links(unit, k); link.principal == who; link.step in {"approve", "author", "release"}}
		count(taken) > 1
	},
})

made(unit, k) if {
	chain := links(unit, k)
	workload := unit.workloads[k]
	some digest in chain[count(chain) - 1].out
	digest in {workload.image.root, split(workload.image.ref, "@")[1]}
}

# METADATA
# title: registry off the list
# description: Images come from the registries that site.yaml of the trusted base lists, by host or by host and repository.
# custom:
#   id: KT009
#   passes: an image of a registry in site.yaml's registries; a new registry is added in an earlier commit
#   waivable: true
deny contains plan.finding("KT009", i, plan.named(i, ref), msg) if {
	some [i, ref, _] in plan.images
	not strings.any_prefix_match(ref, listed)
	msg := sprintf("image %q is of no listed registry; want one of %v (registries in site.yaml, as already accepted)", [ref, input.site.registries])
}

# What a reference of a listed registry begins with.
listed contains concat("", [trim_suffix(registry, "/"), mark]) if {
	some registry in input.site.registries
	registry != ""
	some mark in ["/", "@"]
}
