package kmo.tiers_test

import data.kmo.example_test as example
import data.kmo.tiers

test_good if {
	tiers.deny == set() with input as example.good
	tiers.evaluated == {"KT018", "KT019"} with input as example.good
}

test_kt018_says_who if {
	tiers.deny == {{
		"id": "KT018", "unit": "relay", "path": "approvals/relay",
		"msg": "tier 1, upgrade: 1 of 3 approvals, 2 missing; counted: bob; not counted: carol (expired), SHA256:x (unknown key), unknown (no reason given); want 2 more from other principals (kmo approve)",
	}} with input as example.counted({
		"tier": 1, "tierBefore": 1, "need": 3, "counted": [{"principal": "bob"}],
		"uncounted": [{"principal": "carol", "why": "expired"}, {"principal": "", "key": "SHA256:x", "why": "unknown key"}, {}],
	})
}

test_kt018_one_principal_counts_once if {
	example.ids(tiers.deny) == {"KT018"} with input as example.counted({"need": 2, "counted": [{"principal": "bob"}, {"principal": "bob"}]})
	example.ids(tiers.deny) == {"KT018"} with input as example.counted({"need": 1, "counted": [{"principal": ""}]})
	tiers.deny == set() with input as example.counted({"need": 2, "counted": [{"principal": "bob"}, {"principal": "carol"}]})
}

test_kt018_cools_down if {
	some denial in tiers.deny with input as example.counted({"need": 1, "counted": [{"principal": "bob"}], "uncounted": [], "cools": "2026-11-02T12:00:00Z"})
	denial.msg == "tier 2, upgrade: it has its approvals and cools down until 2026-11-02T12:00:00Z; want no more than to wait"
}

test_kt018_nothing_established if {
	example.ids(tiers.deny) == {"KT018"} with input as example.changed({"units": []})
	tiers.deny == set() with input as example.changed({"units": [], "revert": true})
}

test_kt018_revert if tiers.deny == set() with input as object.union(example.counted({"need": 2}), {"change": {"revert": true}})

test_kt018_unknown_signer if example.ids(tiers.deny) == {"KT018"} with input as example.changed({"signer": ""})

test_kt018_nobody if {
	some denial in tiers.deny with input as example.counted({"need": 1})
	contains(denial.msg, "counted: nobody; not counted: nobody")
}

test_kt019 if {
	example.ids(tiers.deny) == {"KT019"} with input as example.counted({"tierBefore": 1})
	tiers.deny == set() with input as example.counted({"tierBefore": -1})
	tiers.deny == set() with input as example.counted({"tierBefore": 3})
}
