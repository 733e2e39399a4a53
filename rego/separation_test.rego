package kmo.separation_test

import data.kmo.example_test as example
import data.kmo.separation

test_good if {
	separation.deny == set() with input as example.good
	separation.evaluated == {"KT020"} with input as example.good
}

test_kt020 if {
	every parts in [[true, true, false], [true, false, true], [false, true, true], [true, true, true]] {
		example.ids(separation.deny) == {"KT020"} with input as example.changed({"trust": parts[0], "policy": parts[1], "other": parts[2]})
	}
}

test_kt020_near if {
	every parts in [[true, false, false], [false, true, false], [false, false, true], [false, false, false]] {
		separation.deny == set() with input as example.changed({"trust": parts[0], "policy": parts[1], "other": parts[2]})
	}
	separation.deny == set() with input as example.changed({"base": "", "trust": true, "policy": true})
	separation.deny == set() with input as example.changed({"policy": true, "revert": true})
}

both(more) := object.union(example.changed(object.union({"policy": true, "apart": true}, more)), {"rules": ["before", "after"]})

test_kt020_one_after_the_other if {
	separation.deny == set() with input as both({})
	separation.deny == set() with input as both({"trust": true, "other": true})
	separation.deny == set() with input as example.changed({"trust": true, "other": true, "apart": true})
	every more in [{"apart": false}, {"apart": false, "trust": true}] {
		example.ids(separation.deny) == {"KT020"} with input as both(more)
	}
	example.ids(separation.deny) == {"KT020"} with input as object.union(both({}), {"rules": ["before"]})
	example.ids(separation.deny) == {"KT020"} with input as example.changed({"policy": true, "apart": true})
}
