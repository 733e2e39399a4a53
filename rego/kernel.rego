# METADATA
# title: kernel
# description: What reaches the host's kernel, and what it boots.
package kmo.kernel

import data.kmo.plan

evaluated contains "KT012" if {
	input.version == 1
	is_array(data.limits.sysctls)
}

# METADATA
# title: kernel modules, sysctls off the list, kexec or boot files outside tier 0
# description: |
#   Nothing in a unit is called a kernel module or a sysctl. What leads to them are mounts of the folders they and the boot
#   files lie in, or of those around, capabilities that load or boot, and programs that do: as a hook, a probe, an
#   argument, the image's own program, or within a script. Sysctls that each workload has of its own are on a list.
# custom:
#   id: KT012
#   passes: none of it, sysctls of the list in a command of their own, such as [sysctl, -w, net.ipv4.tcp_fin_timeout=30], or a unit of tier 0
#   waivable: true
deny contains plan.finding("KT012", i, path, msg) if {
	some [i, path, found] in reached
	input.units[i].tier != 0
	msg := sprintf("%s, in tier %d; want none of it, or a unit of tier 0", [found, input.units[i].tier])
}

reached contains [i, plan.mounted(i, from), sprintf("mounts %q, where the kernel's modules, settings or boot files are", [from])] if {
	some [i, from, path] in plan.mounts
	regex.match(folders, path)
}

folders := concat("|", [
	`^/(usr|(usr/|usr/local/)?lib|usr/local|etc|proc)?$`,
	`^/(boot|efi|sys|proc/(sys|sysrq-trigger|kcore)|vmlinuz[^/]*|initrd\.img[^/]*)(/|$)`,
	`^/((usr/|usr/local/)?lib|(var/)?run|etc)/(modules|(modules-load|modprobe|depmod|sysctl|dracut\.conf|mkinitcpio|grub)\.d|kernel|dracut|initramfs-tools)(/|$)`,
	`^/etc/(sysctl|dracut|mkinitcpio)\.conf$|^/etc/default/grub`,
])

reached contains [i, "security.capabilities", sprintf("capability %q, by which the kernel is changed or booted", [name])] if {
	some [i, "capabilities", value] in plan.asks
	some name in value
	trim_prefix(upper(name), "CAP_") in {"SYS_MODULE", "SYS_BOOT", "SYS_RAWIO"}
}

reached contains [i, path, found] if {
	some i, text in plan.written
	regex.match(sign, text)
	some [path, argv] in lines(i)
	some found in faults(argv)
}

reached contains [i, path, sprintf("a script with %q", [bare(named)])] if {
	some i, text in plan.written
	regex.match(sign, text)
	some [path, script] in plan.contents(input.units[i])
	startswith(script, "#!")
	some named in regex.find_n(word, lower(script), 1)
}

tools := {
	"bootctl", "depmod", "dkms", "dracut", "efibootmgr", "extlinux", "flashrom", "fw_setenv", "grub-install", "grub-mkconfig", "grub2-install",
	"grub2-mkconfig", "insmod", "installkernel", "kernel-install", "kexec", "kmod", "kpatch", "lilo", "mkinitcpio", "mkinitramfs", "modprobe", "mokutil",
	"rmmod", "update-grub", "update-initramfs",
}

# What every fault has in it somewhere.
sign := sprintf(`%s|/(proc/)?sys/`, [concat("|", tools | {"sysctl"})])

# A tool as a word of its own, or a setting that is written to.
word := sprintf(`(^|[^a-z0-9_.=-])(%s)($|[^a-z0-9_.-])|(>|\btee( -a)?|of=) *"?/(proc/sys|sys)/`, [concat("|", tools | {"sysctl"})])

# [path, argv] of what a unit starts, its program among it where an image may have more than one.
lines(i) := {[path, argv] | some [i, path, argv] in plan.commands} | {["run.args", argv] |
	some argv in started(i)
}

started(i) := {args |
	some variant in input.units[i].after.variants
	some format in {"image", "lxc"}
	variant[format]
	args := [part | some part in input.units[i].after.run.args]
} | {array.concat(entrypoint, args) |
	some k, workload in input.units[i].workloads
	workload.format in {"image", "lxc"}
	entrypoint := [part | some part in input.units[i].images[k].config.entrypoint]
	args := given([part | some part in workload.run.args], [part | some part in input.units[i].images[k].config.cmd])
}

given(args, _) := args if count(args) > 0

given([], cmd) := cmd

faults(argv) := (({sprintf("runs %q", [name]) | some name in (plan.programs(argv) & tools)} | {sprintf("runs sysctl with %q", [argument]) |
	"sysctl" in plan.programs(argv)
	some at, name in argv
	plan.base(name) == "sysctl"
	some argument in array.slice(argv, at + 1, count(argv))
	not regex.match(`^(-[eNnqw]+|--(write|values|names|ignore|quiet))$`, argument)
	not replace(split(argument, "=")[0], "/", ".") in data.limits.sysctls
}) | {sprintf("runs a command line with %q", [bare(named)]) |
	some argument in argv
	regex.match(`[^A-Za-z0-9_./:=@,+-]`, argument)
	some named in regex.find_n(word, lower(argument), 1)
}) | {sprintf("writes to %q", [argument]) |
	plan.programs(argv) & {"cp", "dd", "install", "ln", "mv", "sed", "tee", "truncate"} != set()
	some argument in argv
	regex.match(`^(of=)?/(proc/sys|sys)/`, argument)
}

# What was found, without the signs around it.
bare(named) := trim(named, " \t\n;&|$(){}\"'`")
