# METADATA
# title: what the changed units ask for
# description: |
#   Lists that several rules walk, made once a decision. Each entry starts with the unit's place in input.units, so that a
#   rule which finds something gets at the unit without a search. Template and workloads are judged alike: the template for
#   the hosts that run another variant, the workloads for what profiles and variables made of it.
package kmo.plan

# What asks for nothing.
nothing := {null, false, 0, "", [], {}}

formats := {"appimage", "image", "lxc", "native", "wasm"}

# [place, field of security, what is asked]
asks contains [i, key, value] if {
	some i, unit in input.units
	some key, value in unit.after.security
	not value in nothing
}

asks contains [i, key, value] if {
	some i, unit in input.units
	some workload in unit.workloads
	some key, value in workload.security
	not value in nothing
}

# [place, folder of the host as written, its clean path]
mounts contains [i, mount.from, clean(mount.from)] if {
	some i, unit in input.units
	some mount in unit.after.mounts
}

mounts contains [i, mount.from, clean(mount.from)] if {
	some i, unit in input.units
	some workload in unit.workloads
	some mount in workload.mounts
}

# [place, path, argv] of what is run inside a workload beside its program. Probes stand in the template only.
commands contains [i, concat(".", ["hooks", moment]), argv] if {
	some i, unit in input.units
	some moment, list in unit.after.hooks
	some argv in list
}

commands contains [i, concat(".", ["hooks", moment]), argv] if {
	some i, unit in input.units
	some workload in unit.workloads
	some moment, list in workload.hooks
	some argv in list
}

commands contains [i, "health.exec.argv", unit.after.health.exec.argv] if some i, unit in input.units

# [place, image reference, kmo1 root]
images contains [i, ref, object.get(variant, "merkle", "")] if {
	some i, unit in input.units
	some variant in unit.after.variants
	some format, ref in variant
	format in formats
}

images contains [i, workload.image.ref, object.get(workload.image, "root", "")] if {
	some i, unit in input.units
	some workload in unit.workloads
}

# All that a unit writes down, and what its images say of themselves, in one text of small letters: one look at it spares most units the rest.
written[i] := lower(concat("\n", array.concat([asked], brought))) if {
	some i, unit in input.units
	asked := json.marshal([
		object.get(unit, ["after", "run"], null), object.get(unit, ["after", "hooks"], null), object.get(unit, ["after", "health"], null),
		[[workload.run, object.get(workload, "hooks", null)] | some workload in unit.workloads],
		[image.config | some image in unit.images],
	])
	brought := [content | some [_, content] in contents(unit)]
}

# [path, text] of everything the unit writes down.
texts(unit) := array.flatten([
	[written |
		some env in environments(unit)
		some name, value in env
		written := [concat(".", ["run.env", name]), concat("=", [name, value])]
	],
	[["run.args", concat(" ", args)] | some args in arguments(unit)],
	[[concat(".", ["hooks", moment]), concat(" ", argv)] | some hooks in hookings(unit); some moment, commands in hooks; some argv in commands],
	[["health.exec.argv", concat(" ", argv)] | argv := unit.after.health.exec.argv; is_array(argv)],
	[["health.http.path", path] | path := unit.after.health.http.path; is_string(path)],
	contents(unit),
])

contents(unit) := [[sprintf("files[%s]", [file.to]), base64.decode(file.content)] |
	some workload in unit.workloads
	some file in workload.files
	is_string(file.content)
]

environments(unit) := {env | env := unit.after.run.env; is_object(env)} | {env | some workload in unit.workloads; env := workload.run.env; is_object(env)}

arguments(unit) := {args | args := unit.after.run.args; is_array(args)} | {args | some workload in unit.workloads; args := workload.run.args; is_array(args)}

hookings(unit) := {hooks | hooks := unit.after.hooks; is_object(hooks)} | {hooks | some workload in unit.workloads; hooks := workload.hooks; is_object(hooks)}

# The base names of what argv starts: its first word, and every word once that is a wrapper.
programs(argv) := {name} if {
	name := base(argv[0])
	not name in wrappers
} else := {base(word) | some word in argv}

base(word) := lower(parts[count(parts) - 1]) if parts := split(word, "/")

# Programs whose arguments name the program that is run.
wrappers := {
	"busybox", "chpst", "chroot", "chrt", "doas", "env", "exec", "gosu", "ionice", "nice", "nohup", "nsenter", "runuser",
	"setpriv", "setsid", "stdbuf", "su", "su-exec", "sudo", "taskset", "time", "timeout", "tini", "toybox", "unshare", "xargs",
}

# The path without ".", empty parts and a slash at the end. A ".." stays: it has no meaning that a reader can check.
clean(path) := path if regex.match(`^(/[^/.][^/]*)+$`, path)

else := concat("", ["/", concat("/", [part |
	some part in split(path, "/")
	not part in {"", "."}
])])

# Where the template says that it mounts it, or that only the plan does.
mounted(i, from) := min({sprintf("mounts[%d].from", [j]) |
	some j, mount in input.units[i].after.mounts
	mount.from == from
} | {"mounts[] of the workload"})

# Where the template names an image, or that only the plan does.
named(i, ref) := min(paths) if {
	paths := {sprintf("variants[%d].%s", [j, format]) |
		some j, variant in input.units[i].after.variants
		some format in formats
		variant[format] == ref
	}
	count(paths) > 0
} else := "image of the workload"

# One denial or warning.
finding(id, i, path, msg) := {"id": id, "unit": input.units[i].name, "path": path, "msg": msg}

# One that no single unit is to blame for.
overall(id, path, msg) := {"id": id, "unit": "", "path": path, "msg": msg}
