package kmo.past_test

import data.kmo.example_test as example
import data.kmo.past

burning(listed) := object.union(example.good, {"site": {"burned": [listed]}})

test_good if {
	past.deny == set() with input as example.good
	past.evaluated == {"KT024", "KT028"} with input as example.good
}

test_not_evaluated_without_lists if {
	past.evaluated == set() with input as object.union(example.good, {"site": {"burned": null}})
	past.evaluated == set() with input as example.changed({"burned": null})
}

test_kt024_image if {
	root := concat("", ["kmo1:sha3-256:", replace(example.sha, "ab", "cd")])
	image := object.union(example.good.units[0], {"after": {"variants": [{"wasm": example.ref, "merkle": root}]}})
	every listed in [concat("", ["sha256:", example.sha]), root] {
		example.paths(past.deny) == {"variants[0].wasm"} with input as object.union(burning(listed), {"units": [image]})
	}
	every listed in [concat("", ["sha256:", root]), example.sha, ""] {
		past.deny == set() with input as object.union(burning(listed), {"units": [image]})
	}
}

test_kt024_content if {
	example.paths(past.deny) == {"", "variants[0].image"} with input as burning(example.root)
	past.deny == {{"id": "KT024", "unit": "relay", "path": "", "msg": "its content is that of commit c0, bad; want other content, signed with a good key"}} with input as example.changed({"burned": [{"unit": "relay", "commit": "c0", "why": "bad"}]})
}

test_kt028 if {
	example.ids(past.deny) == {"KT028"} with input as example.counted({"back": "c0"})
	past.deny == set() with input as example.counted({"back": "c0", "action": "downgrade"})
	past.deny == set() with input as object.union(example.counted({"back": "c0"}), {"change": {"revert": true}})
}
