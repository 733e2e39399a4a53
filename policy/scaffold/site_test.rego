package site_test

import data.site
import data.site_test.example

test_good if site.deny == set() with input as example.good

test_debug if {
	debug := example.with_env({"DEBUG": "1"})
	site.deny == {{
		"id": "SITE001", "unit": "relay", "path": "run.env.DEBUG",
		"msg": "DEBUG is \"1\"; want it left out",
	}} with input as debug
}
