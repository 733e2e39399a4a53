# METADATA
# title: an example of the input
# description: One unit that changes, as 'kmo policy schema' describes it. 'kmo policy eval -o json' prints a real one.
package site_test.example

good := with_env({"LOG_LEVEL": "info"})

with_env(env) := {
	"version": 1,
	"site": {"name": "north-sea", "branch": "main", "registries": ["reg.example"]},
	"host": {"name": "edge-1", "zone": "edge", "os": "linux", "arch": "amd64", "labels": {}},
	"commit": "c0ffee",
	"change": {"commit": "c0ffee", "base": "ba5e", "signer": "alice", "revert": false, "policy": false, "other": true},
	"units": [{
		"name": "relay",
		"before": null,
		"after": {"unit": "relay", "tier": 3, "intent": {"kind": "feature", "ticket": "EDGE-12"}, "run": {"env": env}},
	}],
}

ids(findings) := {finding.id | some finding in findings}
