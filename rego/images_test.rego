package kmo.images_test

import data.kmo.example_test as example
import data.kmo.images

variant(ref, root) := example.after({"variants": [{"image": ref, "merkle": root}]})

pinned(name) := concat("@sha256:", [name, example.sha])

test_good if {
	images.deny == set() with input as example.good
	images.evaluated == {"KT006", "KT007", "KT008", "KT009"} with input as example.good
}

test_kt006 if {
	every ref in ["reg.example/relay:1", "reg.example/relay", pinned("reg.example/relay:1"), concat("", [pinned("reg.example/relay"), "0"])] {
		example.ids(images.deny) == {"KT006"} with input as variant(ref, example.root)
		example.paths(images.deny) == {"variants[0].image"} with input as variant(ref, example.root)
	}
}

test_kt006_final_plan if {
	input_ := example.planned({"image": {"ref": "reg.example/relay:1"}})
	example.ids(images.deny) == {"KT006"} with input as input_
	example.paths(images.deny) == {"image of the workload"} with input as input_
}

test_kt007 if {
	every root in ["", "sha256:00", concat("", ["kmo1:sha3-256:", replace(example.sha, "ab", "00")])] {
		example.ids(images.deny) == {"KT007"} with input as variant(example.ref, root)
	}
	example.ids(images.deny) == {"KT007"} with input as example.after({"variants": [{"wasm": example.ref}]})
	example.ids(images.deny) == {"KT007"} with input as example.planned({"image": {"root": ""}})
}

test_kt009 if {
	every name in ["evil.example/relay", "reg.example.evil/relay", "relay", "mirror.example/other/relay"] {
		example.ids(images.deny) == {"KT009"} with input as variant(pinned(name), example.root)
	}
	example.ids(images.deny) == {"KT009"} with input as object.union(example.good, {"site": {"registries": [""]}})
}

test_kt009_near if {
	every name in ["mirror.example/edge", "mirror.example/edge/relay", "reg.example/a/b"] {
		images.deny == set() with input as variant(pinned(name), example.root)
	}
}

sealed(tier, known) := object.union(example.good, {"units": [object.union(example.good.units[0], {"tier": tier, "images": known})]})

test_kt008 if {
	every known in [[], [{}], [null], [{"root": example.root}], [{"root": example.root, "signer": ""}], [{"signer": "k"}], [{"root": "other", "signer": "k"}]] {
		images.deny == {{
			"id": "KT008", "unit": "relay", "path": "variants[0].image",
			"msg": sprintf("image %q has no statement of role image, which tier 1 asks for; want one by a key of that role (kmo image seal)", [example.ref]),
		}} with input as sealed(1, known)
		images.deny == set() with input as sealed(2, known)
	}
	images.deny == set() with input as sealed(1, [{"root": example.root, "signer": "k"}])
}

test_kt008_not_evaluated_without_tiers if not "KT008" in images.evaluated with input as example.changed({"statements": []})

custody(tier, links) := object.union(sealed(tier, [{"root": example.root, "signer": "k", "custody": links}]), {"change": {"custody": {
	"steps": [["author", "release"], ["release"], [], []],
	"keys": [{"principal": "ann", "key": "a"}, {"principal": "rob", "key": "r"}],
}}})

link(step, who, key, more) := object.union({"step": step, "principal": who, "key": key, "why": "", "in": [], "out": [concat("", ["sha256:", example.sha])], "uncovered": []}, more)

chain := [link("author", "ann", "a", {}), link("release", "rob", "r", {})]

test_kt008_custody_near if {
	images.deny == set() with input as custody(0, chain)
	images.deny == set() with input as custody(1, [link("release", "rob", "r", {"out": [example.root]})])
	images.deny == set() with input as custody(2, [])
	images.deny == set() with input as object.union(custody(2, chain), {"change": {"custody": {"steps": [["release"], ["release"], ["release"], []]}}})
}

test_kt008_custody if {
	every links in [
		[], null, [chain[1]], [chain[0]],
		[chain[0], link("release", "eve", "e", {})],
		[chain[0], link("release", "rob", "a", {})],
		[chain[0], link("release", "rob", "r", {"why": "it follows another link"})],
		[chain[0], link("release", "rob", "r", {"uncovered": ["git:1"]})],
		[chain[0], link("release", "rob", "r", {"out": ["sha256:other"]})],
		[link("author", "rob", "r", {}), chain[1]],
	] {
		example.ids(images.deny) == {"KT008"} with input as custody(0, links)
	}
}

test_kt008_roles_apart if {
	same := [link("author", "rob", "r", {}), chain[1]]
	images.deny == {{
		"id": "KT008", "unit": "relay", "path": "variants[0].image",
		"msg": sprintf("image %q does not have the custody that tier 1 asks for, release: rob has taken the steps author and release; want a chain that holds (kmo image custody, kmo image seal --custody)", [example.ref]),
	}} with input as custody(1, same)
}
