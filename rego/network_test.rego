package kmo.network_test

import data.kmo.example_test as example
import data.kmo.network

env(value) := example.after({"run": {"env": {"UPSTREAM": value}}})

taking(ports) := example.after({"run": {"ports": ports}})

test_good if {
	network.deny == set() with input as example.good
	network.evaluated == {"KT025", "KT026"} with input as example.good
}

test_not_evaluated_without_lists if {
	network.evaluated == set() with input as example.good with data.limits as {}
	network.evaluated == {"KT026"} with input as object.union(example.good, {"site": {"forbidden": null}})
}

test_kt025_says_what if {
	network.deny == {{
		"id": "KT025", "unit": "relay", "path": "run.env.UPSTREAM",
		"msg": "names 10.9.3.4, which is of 10.9.0.0/16; want no address of that, but what is needed from there as a secret or a file",
	}} with input as env("http://10.9.3.4/")
}

test_kt025_spellings if {
	every text in [
		"http://169.254.169.254/", "169.254.1", "http://2852039166", "0xA9FEA9FE", "025177524776", "0251.0376.1.1", "0xa9.254.1.1", "169.16689662",
		"169.077524776", "[::a9fe:a9fe]", "http://metadata/", "metadata.google.internal", "instance-data", "fd00:ec2::254", "100.100.100.200",
	] {
		example.ids(network.deny) == {"KT025"} with input as env(text)
	}
}

test_kt025_near if {
	every text in ["251.254.1.1", "1.169.254.3", "metadata", "10.90.0.1", "999.9.9.9", "12:00:00", "a::b::c", "12852039166"] {
		network.deny == set() with input as env(text)
	}
}

test_kt025_everywhere if {
	file := {"to": "/etc/x", "mode": 420, "content": base64.encode("10.9.0.1")}
	example.paths(network.deny) == {"files[/etc/x]"} with input as example.planned({"files": [file]})
	example.paths(network.deny) == {"run.args"} with input as example.planned({"run": {"args": ["10.9.0.1"]}})
	example.paths(network.deny) == {"hooks.exit"} with input as example.planned({"hooks": {"exit": [["/app", "10.9.0.1"]]}})
	example.paths(network.deny) == {"health.http.path"} with input as example.after({"health": {"http": {"path": "/?to=10.9.0.1"}}})
}

test_kt026 if {
	example.paths(network.deny) == {"run.ports[1].host"} with input as taking([{"host": 1024}, {"host": 1023}])
	example.paths(network.deny) == {"run.ports[0].host"} with input as taking([{"host": 6443}])
	network.deny == set() with input as taking([{"port": 80}, {"host": 6444}, {}])
}

test_kt026_final_plan if {
	unit := object.union(example.good.units[0], {"ports": [80]})
	example.paths(network.deny) == {"run.ports[] of the workload"} with input as object.union(example.good, {"units": [unit]})
	listening := object.union(unit, {"after": {"run": {"ports": [{"port": 80}]}}})
	example.paths(network.deny) == {"run.ports[0].port"} with input as object.union(example.good, {"units": [listening]})
}
