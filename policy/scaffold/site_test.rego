package site_test

import data.site
import data.site_test.example

test_good if not "SITE001" in example.ids(site.deny) with input as example.good

test_debug if {
	some finding in site.deny with input as example.with_env({"DEBUG": "1"})
	finding.id == "SITE001"
	finding.unit == "relay"
	finding.msg == "DEBUG is \"1\"; want it left out"
}
