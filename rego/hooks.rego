# METADATA
# title: hooks
# description: A hook is a program of the image with its arguments, and nothing that was reviewed nowhere.
package kmo.hooks

import data.kmo.plan

evaluated contains "KT027" if input.version == 1

# METADATA
# title: hook that runs a shell or downloads
# description: |
#   A hook that starts a shell, hands code to an interpreter, downloads, or pipes into a shell runs what no review saw. The
#   message never repeats the arguments: they may hold what nobody else should read.
# custom:
#   id: KT027
#   passes: a program of the image with plain arguments, such as [/app, migrate]
#   waivable: true
deny contains plan.finding("KT027", i, concat(".", ["hooks", moment]), msg) if {
	some [i, moment, argv] in plan.hooks
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

fault(argv) := "is a shell" if {
	some name in programs(argv)
	name in shells
} else := "downloads" if {
	some name in programs(argv)
	name in downloaders
} else := "hands code to an interpreter" if {
	some name in programs(argv)
	regex.match(`^(python|perl|ruby|node|nodejs|deno|bun|php|lua|tclsh|awk|gawk|mawk)[0-9.]*$`, name)
	some argument in argv
	regex.match(`^(-[A-Za-z]*[ceEpr]|--eval|--print|--run|eval)$`, argument)
} else := "pipes into a shell" if {
	some argument in argv
	regex.match(`\|\s*([a-z/]*/)?(ba|da|a|z|k|mk)?sh\b`, argument)
} else := "takes a command line in -c" if {
	argv[1] == "-c"
	regex.match(`[\s;&|$<>]`, argv[2])
}

# The base names of what argv starts: its first word, and every word once that is a wrapper.
programs(argv) := {lower(base(argv[0]))} if not lower(base(argv[0])) in wrappers

else := {lower(base(word)) | some word in argv}

base(word) := parts[count(parts) - 1] if parts := split(word, "/")
