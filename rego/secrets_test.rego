package kmo.secrets_test

import data.kmo.example_test as example
import data.kmo.secrets

env(name, value) := example.after({"run": {"env": {name: value}}})

file(text) := example.planned({"files": [{"to": "/etc/x", "mode": 420, "content": base64.encode(text)}]})

test_good if {
	secrets.deny == set() with input as example.good
	secrets.evaluated == {"KT015"} with input as example.good
}

test_kt015_known_makes if {
	every text in [
		"-----BEGIN RSA PRIVATE KEY-----", "AKIAIOSFODNN7EXAMPLE", concat("", ["ghp_", example.sha]), "glpat-aaaaaaaaaaaaaaaaaaaaaaaa",
		"xoxb-aaaaaaaaaaaa", "sk_live_aaaaaaaaaaaaaaaaaaaa", "AIzaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
		concat("", ["AGE-SECRET-KEY-1", upper(example.sha)]), "eyJhbGciOiJI.eyJzdWIiOiIx.dozjgNryP4J3", "https://relay:hunter2@x.example",
	] {
		example.ids(secrets.deny) == {"KT015"} with input as file(text)
		example.paths(secrets.deny) == {"files[/etc/x]"} with input as file(text)
		example.paths(secrets.deny) == {"run.env.X"} with input as env("X", text)
	}
}

test_kt015_assignments if {
	every text in ["password = \"hunter2hunter2\"", "token: a1b2c3d4e5f6", "--api-key a1b2c3d4e5f6g7", "{\"client_secret\":\"a8f5f167f44f\"}"] {
		example.ids(secrets.deny) == {"KT015"} with input as file(text)
	}
}

test_kt015_names if {
	every name in ["PASSWORD", "DB_PASSWORD", "API_KEY", "apikey", "GIT_TOKEN", "SIGNING_KEY"] {
		example.paths(secrets.deny) == {concat(".", ["run.env", name])} with input as env(name, "correct horse")
	}
	every value in ["", "/run/secrets/x", "${X}", "true", "0"] {
		secrets.deny == set() with input as env("PASSWORD", value)
	}
}

test_kt015_near if {
	every text in [
		"-----BEGIN PUBLIC KEY-----", "AKIAIOSFODNN7EXAMPL", "password = changeme", "a token lasts 30 minutes", "token = /run/secrets/t1",
		"private_key = keys/edge1.pem", "postgres://relay@db.example/x1", "secret: sops:abcdefgh1", "token abcdef123",
	] {
		secrets.deny == set() with input as file(text)
	}
}

test_kt015_arguments_and_hooks if {
	example.paths(secrets.deny) == {"run.args"} with input as example.planned({"run": {"args": ["--token", "a1b2c3d4e5f6g7h8"]}})
	example.paths(secrets.deny) == {"run.args"} with input as example.after({"run": {"args": ["--token=a1b2c3d4e5f6g7h8"]}})
	example.paths(secrets.deny) == {"hooks.exit"} with input as example.planned({"hooks": {"exit": [["/app", "--password=hunter2hunter2"]]}})
	example.paths(secrets.deny) == {"hooks.exit"} with input as example.after({"hooks": {"exit": [["/app", "--password=hunter2hunter2"]]}})
	example.paths(secrets.deny) == {"run.env.TOKEN"} with input as example.planned({"run": {"env": {"TOKEN": "x"}}})
}

test_kt015_probes if {
	example.paths(secrets.deny) == {"health.exec.argv"} with input as example.after({"health": {"exec": {"argv": ["/app", "--token=a1b2c3d4e5f6g7h8"]}}})
	example.paths(secrets.deny) == {"health.http.path"} with input as example.after({"health": {"http": {"port": "http", "path": "/healthz?token=a1b2c3d4e5f6"}}})
	secrets.deny == set() with input as example.after({"health": {"exec": {"argv": ["/app", "--token-file", "/run/secrets/t1"]}}})
	secrets.deny == set() with input as example.after({"health": {"http": {"port": "http", "path": "/healthz?token=session"}}})
	secrets.deny == set() with input as example.after({"health": {"exec": null, "http": null, "tcp": {"port": "token"}}})
}

test_u36_value_is_not_repeated if {
	denials := secrets.deny with input as file("password = \"hunter2hunter2\"")
	count(denials) == 1
	every denial in denials {
		not contains(denial.msg, "hunter2")
	}
}

test_empty_file if secrets.deny == set() with input as example.planned({"files": [{"to": "/etc/x", "mode": 420, "content": null}]})
