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
}
