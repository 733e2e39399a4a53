package kmo.hooks_test

import data.kmo.example_test as example
import data.kmo.hooks

probed(argv) := example.after({"health": {"exec": {"argv": argv}}})

hooked(argv) := example.after({"hooks": {"preInit": [argv]}})

test_good if {
	hooks.deny == set() with input as example.good
	hooks.evaluated == {"KT027"} with input as example.good
}

test_kt027 if {
	every argv in [
		["/bin/sh", "-c", "x"], ["bash"], ["busybox", "sh"], ["/usr/bin/env", "-i", "/bin/dash"], ["curl", "x"], ["timeout", "5", "wget", "x"],
		["python3.12", "-c", "x"], ["nodejs", "-e", "x"], ["/app", "x | sh"], ["/app", "-c", "a; b"],
	] {
		example.ids(hooks.deny) == {"KT027"} with input as hooked(argv)
		example.paths(hooks.deny) == {"hooks.preInit"} with input as hooked(argv)
		example.paths(hooks.deny) == {"health.exec.argv"} with input as probed(argv)
	}
}

test_kt027_near if {
	every argv in [
		["/app", "migrate"], ["/app/shell"], ["/app", "sh"], ["/app", "-c", "/etc/x"], ["python3", "-m", "x"], ["nice", "/app"], [], ["/app", "a|b"],
		["/app", "--from", "https://x.example"],
	] {
		hooks.deny == set() with input as hooked(argv)
		hooks.deny == set() with input as probed(argv)
	}
}

test_kt027_does_not_repeat_arguments if {
	denials := hooks.deny with input as hooked(["curl", "-u", "hunter2"])
	count(denials) == 1
	every denial in denials {
		not contains(denial.msg, "hunter2")
	}
}

test_t70_final_plan if {
	example.paths(hooks.deny) == {"hooks.exit"} with input as example.planned({"hooks": {"exit": [["sh"]]}})
}
