# An input in which nothing is wrong, and ways to put something in.
package kmo.example_test

sha := "abababababababababababababababababababababababababababababababab"

root := concat("", ["kmo1:sha3-256:", sha])

ref := concat("", ["reg.example/relay@sha256:", sha])

input_of(units) := {
	"version": 1,
	"commit": "c",
	"time": "2026-01-02T03:04:05.6Z",
	"site": {"name": "north-sea", "registries": ["reg.example", "mirror.example/edge/"], "forbidden": ["10.9.0.0/16"], "freeze": [], "burned": []},
	"host": {"state": "/var/lib/kmo", "own": ["/usr/local/bin/kmo"], "cpu": 4000, "memory": 1000, "pids": 1000, "disk": 1000},
	"change": {
		"commit": "c", "base": "b", "signer": "alice", "revert": false, "trust": false, "policy": false, "other": true, "statements": ["image", "image", "", ""], "burned": [],
		"units": [{"unit": "relay", "back": "", "action": "upgrade", "to": root, "tier": 2, "tierBefore": 2, "need": 0, "counted": null, "uncounted": null}],
	},
	"totals": {"before": 10, "after": 10, "removed": 0, "cpu": 0, "memory": 900, "pids": 900, "disk": 900},
	"units": units,
}

template := {"variants": [{"image": ref, "merkle": root}], "run": {"user": 65532}}

workload := {
	"image": {"ref": ref, "root": root},
	"run": {"user": 65532},
	"resources": {"cpu": 4000, "memory": 1, "pids": 1, "disk": 1},
	"hooks": {},
	"security": {},
}

good := input_of([{"name": "relay", "tier": 2, "before": null, "after": template, "workloads": [workload], "ports": []}])

# The good input with more in the template.
after(more) := input_of([{"name": "relay", "tier": 2, "before": null, "after": object.union(template, more), "workloads": [], "ports": []}])

# The good input with more in the workload.
planned(more) := input_of([{"name": "relay", "tier": 2, "before": null, "after": template, "workloads": [object.union(workload, more)], "ports": []}])

# The good input with more in the facts, and in those of its unit.
changed(more) := object.union(good, {"change": more})

counted(more) := changed({"units": [object.union(good.change.units[0], more)]})

ids(findings) := {finding.id | some finding in findings}

paths(findings) := {finding.path | some finding in findings}
