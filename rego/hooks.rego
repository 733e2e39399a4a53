# METADATA
# title: hooks
# description: A hook or a probe is a program of the image with its arguments, and nothing that was reviewed nowhere.
package kmo.hooks

import data.kmo.plan

evaluated contains "KT027" if input.version == 1

# METADATA
# title: hook or probe that runs a shell or downloads
# description: |
#   A hook or an exec probe that starts a shell, hands code to an interpreter, downloads, or pipes into a shell runs what no
#   review saw. The message never repeats the arguments: they may hold what nobody else should read.
# custom:
#   id: KT027
#   passes: a program of the image with plain arguments, such as [/app, migrate]
#   waivable: true
deny contains plan.finding("KT027", i, path, msg) if {
	some [i, path, argv] in plan.commands
	regex.match(notable, concat(" ", argv))
	reason := fault(argv)
	msg := sprintf("runs %q, which %s; want a program of the image with plain arguments, such as [/app, migrate]", [argv[0], reason])
}

shells := {
	"ash", "bash", "cmd", "cmd.exe", "csh", "dash", "elvish", "fish", "ksh", "mksh", "nu", "powershell", "powershell.exe",
	"pwsh", "rbash", "sh", "tcsh", "toysh", "yash", "zsh",
}

downloaders := {"aria2c", "axel", "curl", "ftp", "ftpget", "git", "lftp", "nc", "ncat", "rsync", "scp", "sftp", "socat", "tftp", "wget", "wget2"}

# Programs whose arguments name the program that is run.
wrappers := {
	"busybox", "chpst", "chroot", "chrt", "doas", "env", "exec", "gosu", "ionice", "nice", "nohup", "nsenter", "runuser",
	"setpriv", "setsid", "stdbuf", "su", "su-exec", "sudo", "taskset", "time", "timeout", "tini", "toybox", "unshare", "xargs",
}

# What every fault has in it somewhere. One look here spares most commands the rest.
notable := concat("", [
	`(?i)(^|[ /])(`, concat("|", ((shells | downloaders) | wrappers)), `)( |$)|(^|[ /])(`, concat("|", interpreters), `)|\||^[^ ]+ -c `,
])

interpreters := {"awk", "bun", "deno", "gawk", "lua", "mawk", "node", "perl", "php", "python", "ruby", "tclsh"}

fault(argv) := reason if {
	names := programs(argv)
	reason := starts(names)
} else := "pipes into a shell" if {
	some argument in argv
	contains(argument, "|")
	regex.match(`\|\s*([a-z/]*/)?(ba|da|a|z|k|mk)?sh\b`, argument)
} else := "takes a command line in -c" if {
	argv[1] == "-c"
	regex.match(`[\s;&|$<>]`, argv[2])
} else := "hands code to an interpreter" if {
	some name in programs(argv)
	regex.replace(name, `(js)?[0-9.]*$`, "") in interpreters
	some argument in argv
	regex.match(`^(-[A-Za-z]*[ceEpr]|--eval|--print|--run|eval)$`, argument)
}

starts(names) := "is a shell" if {
	some name in names
	name in shells
} else := "downloads" if {
	some name in names
	name in downloaders
}

# The base names of what argv starts: its first word, and every word once that is a wrapper.
programs(argv) := {name} if {
	name := base(argv[0])
	not name in wrappers
} else := {base(word) | some word in argv}

base(word) := lower(parts[count(parts) - 1]) if parts := split(word, "/")
