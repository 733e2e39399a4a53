package kmo.freeze_test

import data.kmo.example_test as example
import data.kmo.freeze

frozen(from, to) := {"site": {"freeze": [{"from": from, "to": to, "why": "holidays"}]}}

now := frozen("2026-01-02T03:04:05Z", "2026-01-02T03:04:06Z")

test_good if {
	freeze.deny == set() with input as example.good
	freeze.evaluated == {"KT017"} with input as example.good
}

test_not_evaluated_without_lists if freeze.evaluated == set() with input as object.union(example.good, {"site": {"freeze": null}})

test_kt017_says_when if {
	freeze.deny == {{
		"id": "KT017", "unit": "", "path": "freeze in site.yaml",
		"msg": "relay at 2026-01-02T03:04:05.6Z, within the freeze from 2026-01-02T03:04:05Z to 2026-01-02T03:04:06Z (holidays); want it after that, or first a commit that ends the freeze in site.yaml alone",
	}} with input as object.union(example.good, now)
}

at(time) := object.union(object.union(example.good, now), {"time": time})

test_kt017_without_a_reason if {
	some denial in freeze.deny with input as object.union(example.good, {"site": {"freeze": [{"from": "2026-01-01T00:00:00Z", "to": "2026-01-03T00:00:00Z", "why": ""}]}})
	contains(denial.msg, "to 2026-01-03T00:00:00Z; want")
}

test_kt017_bounds if {
	count(freeze.deny) == 1 with input as at("2026-01-02T03:04:05Z")
	count(freeze.deny) == 0 with input as at("2026-01-02T03:04:04.999999999Z")
	count(freeze.deny) == 0 with input as at("2026-01-02T03:04:06Z")
}

test_kt017_what_passes if {
	every more in [{"revert": true}, {"base": ""}, {"units": []}, {"units": [{"unit": "@site"}]}] {
		freeze.deny == set() with input as object.union(example.changed(more), now)
	}
	every more in [{"units": [{"unit": "@site"}, {"unit": "relay"}]}, {"units": [{"unit": "@policy"}]}] {
		count(freeze.deny) == 1 with input as object.union(example.changed(more), now)
	}
}
