# METADATA
# title: the site's own rules
# description: They can only add denials (deny) and warnings (warn) to those of the tripwires.
package site

# METADATA
# title: debug mode
# description: A unit that runs in debug mode tells too much, and is slow.
deny contains {"id": "SITE001", "unit": unit.name, "path": "run.env.DEBUG", "msg": msg} if {
	some unit in input.units
	value := unit.after.run.env.DEBUG
	msg := sprintf("DEBUG is %q; want it left out", [value])
}
