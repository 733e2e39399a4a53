package kmo.kernel_test

import data.kmo.example_test as example
import data.kmo.kernel

hooked(argv) := example.after({"hooks": {"preInit": [argv]}})

mounting(from) := example.after({"mounts": [{"from": from}]})

# The good input with a workload that runs more than one program.
started(run, config) := object.union(example.good, {"units": [object.union(example.good.units[0], {
	"workloads": [object.union(example.workload, {"format": "image", "run": run})],
	"images": [{"config": config}],
})]})

test_good if {
	kernel.deny == set() with input as example.good
	kernel.evaluated == {"KT012"} with input as example.good
}

test_not_evaluated_without_limits if kernel.evaluated == set() with input as example.good with data.limits as {}

test_kt012_mounts if {
	every from in [
		"/lib/modules", "/usr/lib/modules/6.1", "/lib", "/usr", "/boot/grub", "/efi", "/sys/module", "//proc/./sys", "/etc/modprobe.d", "/run/sysctl.d/x",
		"/usr/local/lib/modules-load.d", "/vmlinuz", "/etc/default/grub", "/",
	] {
		example.paths(kernel.deny) == {"mounts[0].from"} with input as mounting(from)
	}
	every from in ["/srv/lib/modules", "/usr/share", "/lib/modules2", "/bootstrap", "/etcetera", "/usr/lib/x86_64-linux-gnu"] {
		kernel.deny == set() with input as mounting(from)
	}
}

test_kt012_capabilities if {
	every name in ["CAP_SYS_MODULE", "sys_boot", "CAP_SYS_RAWIO"] {
		example.paths(kernel.deny) == {"security.capabilities"} with input as example.after({"security": {"capabilities": ["CAP_KILL", name]}})
	}
}

test_kt012_commands if {
	every argv in [
		["modprobe", "nbd"], ["/sbin/insmod", "/x.ko"], ["busybox", "modprobe", "nbd"], ["/usr/bin/env", "A=b", "kexec", "-e"], ["sysctl", "-p"],
		["sysctl", "-w", "kernel.panic=1"], ["sysctl", "-w", "net.ipv4.tcp_fin_timeout=1", "vm/swappiness=1"], ["/bin/sh", "-c", "a && modprobe nbd"],
		["/bin/sh", "-c", "echo 1 >/proc/sys/kernel/panic"], ["tee", "/proc/sys/kernel/panic"], ["dd", "if=/x", "of=/sys/power/state"], ["MODPROBE"], ["sh", "-c", "a&&modprobe nbd"],
	] {
		example.paths(kernel.deny) == {"hooks.preInit"} with input as hooked(argv)
		example.paths(kernel.deny) == {"health.exec.argv"} with input as example.after({"health": {"exec": {"argv": argv}}})
	}
}

test_kt012_commands_near if {
	every argv in [
		["/app", "sysctl"], ["sysctl", "-w", "net.ipv4.tcp_fin_timeout=30"], ["sysctl", "net/ipv4/tcp_syncookies=1"], ["/app", "--modprobe=no"],
		["/app/modprobe-exporter"], ["cat", "/proc/sys/kernel/hostname"], ["/app", "-c", "/etc/sysctl.conf"], [],
	] {
		kernel.deny == set() with input as hooked(argv)
	}
}

test_kt012_program if {
	example.paths(kernel.deny) == {"run.args"} with input as example.after({"run": {"args": ["modprobe", "nbd"]}})
	every started_ in [
		started({"user": 1, "args": ["modprobe"]}, {}), started({"user": 1, "args": ["modprobe"]}, {"entrypoint": ["/bin/busybox"]}),
		started({"user": 1}, {"entrypoint": ["/sbin/kexec"]}), started({"user": 1}, {"entrypoint": null, "cmd": ["kexec", "-e"]}),
	] {
		example.paths(kernel.deny) == {"run.args"} with input as started_
	}
	every started_ in [
		started({"user": 1, "args": ["modprobe"]}, {"entrypoint": ["/app"]}), started({"user": 1, "args": ["/app"]}, {"cmd": ["kexec"]}),
	] {
		kernel.deny == set() with input as started_
	}
	native := {"variants": [{"native": example.ref, "merkle": example.root}], "run": {"args": ["modprobe"]}}
	kernel.deny == set() with input as example.after(native)
}

test_kt012_scripts if {
	file := {"to": "/start.sh", "mode": 493, "content": base64.encode("#!/bin/sh\n/sbin/modprobe nbd\n")}
	example.paths(kernel.deny) == {"files[/start.sh]"} with input as example.planned({"files": [file]})
	text := object.union(file, {"content": base64.encode("modprobe is not ours to run\n")})
	kernel.deny == set() with input as example.planned({"files": [text]})
}

test_kt012_tier_0 if {
	zero := object.union(example.good.units[0], {"tier": 0, "after": {"mounts": [{"from": "/lib/modules"}]}})
	kernel.deny == set() with input as object.union(example.good, {"units": [zero]})
}
