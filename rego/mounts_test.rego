package kmo.mounts_test

import data.kmo.example_test as example
import data.kmo.mounts

mounting(from) := example.after({"mounts": [{"from": from}]})

test_good if {
	mounts.deny == set() with input as example.good
	mounts.evaluated == {"KT003", "KT004", "KT022"} with input as example.good
}

test_kt003 if {
	every from in ["/", "//./", "/etc", "/proc/1", "/sys/", "//dev", "/boot", "/root", "/var/lib", "/var/lib/kmo/x", "relay", "/srv/.."] {
		example.ids(mounts.deny) - {"KT022"} == {"KT003"} with input as mounting(from)
		example.paths(mounts.deny) == {"mounts[0].from"} with input as mounting(from)
	}
}

test_kt003_near if {
	every from in ["/srv/relay", "/etcetera", "/srv/.hidden", "/srv/a..b", "/var/lib/kmo2", "/rooted"] {
		mounts.deny == set() with input as mounting(from)
	}
}

test_kt003_says_why if {
	mounts.deny == {{
		"id": "KT003", "unit": "relay", "path": "mounts[0].from",
		"msg": "mounts \"/etc/ssl\", which is in /etc; want a folder made for the workload, such as /srv/relay",
	}} with input as mounting("/etc/ssl")
}

test_t70_final_plan if {
	input_ := example.planned({"mounts": [{"from": "/srv/../etc"}]})
	example.ids(mounts.deny) == {"KT003"} with input as input_
	example.paths(mounts.deny) == {"mounts[] of the workload"} with input as input_
}

test_kt004 if {
	every from in ["/run", "/var/run", "/run/docker.sock", "/run/user/1/podman", "/run/user/1", "/x/containerd.sock", "/run/kmo"] {
		example.ids(mounts.deny) == {"KT004"} with input as mounting(from)
	}
}

test_kt004_engines if {
	engines := {"host": {"engines": ["/srv/engine/docker", "/opt/podman.socket"]}}
	every from in ["/srv/engine/docker", "/srv/engine", "/srv//engine/", "/srv", "/opt", "/opt/podman.socket"] {
		example.ids(mounts.deny) == {"KT004"} with input as object.union(mounting(from), engines)
	}
	every from in ["/srv/engine/dockers", "/srv/engines", "/opt/podman"] {
		mounts.deny == set() with input as object.union(mounting(from), engines)
	}
}

test_kt004_near if {
	every from in ["/run/relay", "/run/dockerish", "/x/docker.sock.d"] {
		mounts.deny == set() with input as mounting(from)
	}
}

test_kt022 if {
	every from in ["/usr/local/bin/kmo", "/usr/local/bin", "//usr/local/./bin/", "/usr/local/bin/kmo/x", "/var/lib/kmo", "/var/lib", "/var/lib/kmo/audit", "/"] {
		"KT022" in example.ids(mounts.deny) with input as mounting(from)
		"KT022" in example.ids(mounts.deny) with input as example.planned({"mounts": [{"from": from, "readOnly": true}]})
	}
	every from in ["/usr/local/bin2", "/usr/local/bin/kmod", "/var/lib/kmo-relay", "/usr/local/lib"] {
		mounts.deny == set() with input as mounting(from)
	}
}
