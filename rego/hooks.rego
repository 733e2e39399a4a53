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

# What every fault has in it somewhere. One look here spares most commands the rest.
notable := concat("", [
	`(?i)(^|[ /])(`, concat("|", ((shells | downloaders) | plan.wrappers)), `)( |$)|(^|[ /])(`, concat("|", interpreters), `)|\||^[^ ]+ -c `,
])

interpreters := {"awk", "bun", "deno", "gawk", "lua", "mawk", "node", "perl", "php", "python", "ruby", "tclsh"}

fault(argv) := reason if {
	names := plan.programs(argv)
	reason := starts(names)
} else := "pipes into a shell" if {
	some argument in argv
	contains(argument, "|")
	regex.match(`\|\s*([a-z/]*/)?(ba|da|a|z|k|mk)?sh\b`, argument)
} else := "takes a command line in -c" if {
	argv[1] == "-c"
	regex.match(`[\s;&|$<>]`, argv[2])
} else := "hands code to an interpreter" if {
	some name in plan.programs(argv)
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
