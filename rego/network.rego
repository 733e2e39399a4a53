# METADATA
# title: network
# description: Which ports of the host a workload may take, and where it may not be sent.
package kmo.network

import data.kmo.plan

evaluated contains "KT025" if {
	input.version == 1
	is_array(input.site.forbidden)
	count(data.limits.networks) > 0
}

evaluated contains "KT026" if {
	input.version == 1
	data.limits.ports.least > 0
	is_array(data.limits.ports.reserved)
}

# METADATA
# title: egress to a forbidden network
# description: |
#   Environment, arguments, hooks, probes or files that name an address of cloud metadata, which hands out the machine's own
#   credentials, or of a network that site.yaml of the trusted base forbids, such as that of management. A name of the
#   metadata service counts, and so do its address as one number, in octal or hexadecimal, and within an IPv6 address.
# custom:
#   id: KT025
#   passes: addresses outside the networks of site.yaml's forbidden and of cloud metadata; what a unit needs of those, as a secret or a file
#   waivable: true
deny contains plan.finding("KT025", i, path, msg) if {
	some i, written in plan.written
	regex.match(notable, written)
	some [path, text] in plan.texts(input.units[i])
	some [found, network] in destinations(lower(text))
	msg := sprintf("names %s, which is of %s; want no address of that, but what is needed from there as a secret or a file", [found, network])
}

# What every destination has in it somewhere: four numbers with three dots, two colons with hexadecimal digits, or a sign of metadata.
notable := concat("|", [`[0-9](\.|%2e|[。．｡])[0-9]+(\.|%2e|[。．｡])[0-9]`, `(^|[^0-9a-z"])[0-9a-f]{0,4}:[0-9a-f]{0,4}:`, metadata])

# The metadata service by name, and by spellings of 169.254.169.254 that resolvers take and no parser of addresses does.
metadata := concat("", [
	`\b(metadata\.google\.internal|metadata\.goog|metadata\.azure\.internal|instance-data(\.ec2\.internal)?)\b|//metadata([/:]|$)`,
	`|(?:^|[^0-9a-z.]|[^0-9.]\.)(2852039166|0x0*a9fea9fe|0+25177524776|(169|0+251|0x0*a9)(\.|%2e|[。．｡])`,
	`(254(\.|%2e|[。．｡])|0+376\.|0x0*fe\.|16689662|0+77524776|0x0*fea9fe)[0-9a-fx.]*)|\ba9fe:a9fe\b`,
])

# [what is named, of which network] A spelling is only asked for where no address was found: it would be the same again.
destinations(text) := found if {
	found := {[address, network] |
		some address in addresses(text)
		some network in array.concat(data.limits.networks, input.site.forbidden)
		net.cidr_contains(network, address)
	}
	count(found) > 0
} else := {[trim(match, "/.:,=@ "), "cloud metadata"] | some match in regex.find_n(metadata, text, 64)}

# Addresses as parsers read them; a version of five numbers is none.
addresses(text) := {address |
	some match in regex.find_all_string_submatch_n(`(?:^|[^0-9.]|[^0-9.]\.)((?:[0-9]{1,3}\.){3}[0-9]{1,3})\b`, text, 256)
	address := match[1]
	net.cidr_is_valid(concat("", [address, "/32"]))
} | {address |
	some address in regex.find_n(`[0-9a-f]{0,4}(?::[0-9a-f]{0,4}){2,7}`, text, 256)
	net.cidr_is_valid(concat("", [address, "/128"]))
}

# METADATA
# title: port of the host that is not for units
# description: |
#   Ports below 1024, where people expect the host's own services, and those of container engines, clusters and kMO's own
#   messages. Where a backend has no network of its own, the port that the program listens on is the host's.
# custom:
#   id: KT026
#   passes: run.ports without host, for which a free port is chosen, or a host port of 1024 or more that is not reserved
#   waivable: true
deny contains plan.finding("KT026", i, place(i, number), msg) if {
	some i, unit in input.units
	some number in taken(unit)
	reason := kept(number)
	msg := sprintf("takes port %d of the host, which is %s; want no host port, for which a free one is chosen, or another one", [number, reason])
}

taken(unit) := {port.host | some port in unit.after.run.ports; port.host} | {number | some number in unit.ports}

kept(number) := sprintf("below %d", [data.limits.ports.least]) if number < data.limits.ports.least

else := "reserved for engines and clusters" if number in data.limits.ports.reserved

# Where the template says it.
place(i, number) := min({sprintf("run.ports[%d].%s", [j, field]) |
	some j, port in input.units[i].after.run.ports
	some field in ["host", "port"]
	port[field] == number
} | {"run.ports[] of the workload"})
