package kmo.confinement_test

import data.kmo.confinement
import data.kmo.example_test as example

test_good if {
	confinement.deny == set() with input as example.good
	confinement.evaluated == {"KT001", "KT002", "KT005", "KT010", "KT011", "KT014"} with input as example.good
}

test_not_evaluated_without_limits if confinement.evaluated == set() with input as example.good with data.limits as {}

test_kt001_privileged if {
	every input_ in [example.after({"security": {"privileged": true}}), example.planned({"security": {"privileged": true}})] {
		example.ids(confinement.deny) == {"KT001", "KT010"} with input as input_
	}
}

test_kt001_devices if {
	every input_ in [example.after({"resources": {"devices": ["all"]}}), example.planned({"resources": {"devices": [{"name": "camera"}, {"name": "tty", "nodes": ["/dev/"]}]}})] {
		example.ids(confinement.deny) == {"KT001"} with input as input_
		example.paths(confinement.deny) == {"resources.devices"} with input as input_
	}
}

test_kt002_each if {
	every namespace in ["pid", "ipc", "uts", "user", "cgroup", "network"] {
		example.ids(confinement.deny) == {"KT002"} with input as example.after({"security": {"host": [namespace]}})
	}
}

test_kt005_off_the_list if {
	confinement.deny == {{
		"id": "KT005", "unit": "relay", "path": "security.capabilities",
		"msg": "capability \"CAP_SYS_ADMIN\"; want none but CAP_AUDIT_WRITE, CAP_CHOWN, CAP_FOWNER, CAP_FSETID, CAP_KILL, CAP_NET_BIND_SERVICE",
	}} with input as example.after({"security": {"capabilities": ["CAP_CHOWN", "CAP_SYS_ADMIN"]}})
}

test_kt010 if {
	every input_ in [
		example.after({"run": {"user": 0}}), example.planned({"run": {"user": 0}}), example.after({"security": {"escalation": true}}),
		example.planned({"files": [{"to": "/bin/x", "mode": 2541}]}),
	] {
		example.ids(confinement.deny) == {"KT010"} with input as input_
	}
}

test_kt010_near if {
	every input_ in [example.after({"run": {"user": null}}), example.planned({"files": [{"to": "/bin/x", "mode": 493}]})] {
		confinement.deny == set() with input as input_
	}
}

test_kt011 if example.ids(confinement.deny) == {"KT011"} with input as example.planned({"security": {"writableBase": true}})

test_kt014 if example.ids(confinement.deny) == {"KT014"} with input as example.after({"security": {"unconfined": true}})

test_asking_for_nothing if {
	confinement.deny == set() with input as example.after({"security": {
		"privileged": false, "escalation": false, "writableBase": false, "unconfined": false, "capabilities": [], "host": null,
	}})
}
