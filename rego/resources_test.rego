package kmo.resources_test

import data.kmo.example_test as example
import data.kmo.resources

test_good if {
	resources.deny == set() with input as example.good
	resources.evaluated == {"KT013"} with input as example.good
}

test_not_evaluated_without_limits if resources.evaluated == set() with input as example.good with data.limits as {}

test_kt013_missing if {
	every kind in ["cpu", "memory", "pids", "disk"] {
		resources.deny == {{
			"id": "KT013", "unit": "relay", "path": sprintf("resources.%s.max", [kind]),
			"msg": sprintf("no bound for %s; want %s: {max: …}", [kind, kind]),
		}} with input as example.planned({"resources": {kind: 0}})
	}
}

test_kt013_cpu_beyond_the_host if {
	example.paths(resources.deny) == {"resources.cpu.max"} with input as example.planned({"resources": {"cpu": 4001}})
}

test_kt013_share if {
	every kind in ["memory", "pids", "disk"] {
		example.ids(resources.deny) == {"KT013"} with input as object.union(example.good, {"totals": {kind: 901}})
	}
}
