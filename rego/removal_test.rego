package kmo.removal_test

import data.kmo.example_test as example
import data.kmo.removal

removing(before, after, removed) := object.union(example.good, {"totals": {"before": before, "after": after, "removed": removed}})

test_good if {
	removal.deny == set() with input as example.good
	removal.evaluated == {"KT016"} with input as example.good
}

test_not_evaluated_without_limits if removal.evaluated == set() with input as example.good with data.limits as {}

test_kt016 if {
	every totals in [[100, 89, 11], [13, 9, 4], [1, 0, 1]] {
		example.ids(removal.deny) == {"KT016"} with input as removing(totals[0], totals[1], totals[2])
		removal.deny == set() with input as object.union(removing(totals[0], totals[1], totals[2]), {"change": {"revert": true}})
	}
}

test_kt016_near if {
	every totals in [[100, 90, 10], [10, 7, 3], [2, 1, 1], [0, 0, 0]] {
		removal.deny == set() with input as removing(totals[0], totals[1], totals[2])
	}
}
