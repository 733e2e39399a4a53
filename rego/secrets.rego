# METADATA
# title: secrets
# description: What looks like a secret has no place in a repository.
package kmo.secrets

import data.kmo.plan

evaluated contains "KT015" if input.version == 1

# METADATA
# title: secret in plain text
# description: |
#   Environment, arguments, hooks, probes and files must not hold what is plainly a secret: private keys, tokens of known
#   make, passwords in URLs or assignments, and literals under a name such as DB_PASSWORD. The message never repeats the value.
# custom:
#   id: KT015
#   passes: the secret in a SOPS or age file under secrets, and its path in the environment, such as DB_PASSWORD_FILE
#   waivable: true
deny contains plan.finding("KT015", i, path, msg) if {
	some i in suspects
	some [path, text] in plan.texts(input.units[i])
	some kind in found(text)
	msg := sprintf("holds %s in plain text; want it encrypted under secrets, and its path here", [kind])
}

deny contains plan.finding("KT015", i, concat(".", ["run.env", name]), msg) if {
	some i in suspects
	some env in plan.environments(input.units[i])
	some name, value in env
	regex.match(`(?i)(^|_)(PASSWORD|PASSWD|PASSPHRASE|TOKEN|SECRET|API_?KEY|(ACCESS|PRIVATE|SECRET|ENCRYPTION|SIGNING)_?KEY|CREDENTIALS?)$`, name)
	not harmless(value)
	msg := "holds a literal under the name of a secret; want it encrypted under secrets, and its path here under a name that ends in _FILE"
}

# A path, a reference to something else, or a switch.
harmless(value) if regex.match(`(?i)^(|/.*|\$.*|<.*>|\{\{.*|true|false|yes|no|on|off|none|[0-9])$`, value)

# Units in whose text there is any sign of a secret. All other rules here look at these only.
suspects contains i if {
	some i, text in plan.written
	suspicious(text)
}

suspicious(text) if {
	some sign in ["@", "pass", "secret", "token", "credential", "eyj", "akia", "asia", "aiza", "xox", "k_live_"]
	contains(text, sign)
}

suspicious(text) if regex.match(`key["' :=\\-]`, text)

suspicious(text) if regex.match(`gh[pousr]_`, text)

suspicious(text) if regex.match(`pat[_-]`, text)

patterns := {
	"a private key": `-----BEGIN ([A-Z0-9]+ )*PRIVATE KEY( BLOCK)?-----`,
	"an AWS access key": `\b(AKIA|ASIA)[0-9A-Z]{16}\b`,
	"a GitHub token": `\b(gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{60,})`,
	"a GitLab token": `\bglpat-[A-Za-z0-9_-]{20,}`,
	"a Slack token": `\bxox[abeoprs]-[A-Za-z0-9-]{10,}`,
	"a Stripe key": `\b[sr]k_live_[A-Za-z0-9]{16,}`,
	"a Google API key": `\bAIza[A-Za-z0-9_-]{35}`,
	"an age key": `\bAGE-SECRET-KEY-1[0-9A-Z]{40,}`,
	"a JSON web token": `\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}`,
	"a password in a URL": `://[^/\s:@"']*:[^/\s:@"'$<{]{6,}@`,
}

assignment := `(?i)(password|passwd|passphrase|secret|token|(api|access|private|secret|encryption|signing)[_-]?key)["']?(\s*[:=]\s*|\s+)["']?([^\s"'$<{/*%()\[\],;&|\\-][^\s"'<>{}()\[\],;&|\\]{7,})`

found(text) := {kind | some kind, pattern in patterns; regex.match(pattern, text)} | {"an assigned password or token" |
	some match in regex.find_all_string_submatch_n(assignment, text, 64)
	random(match)
}

# A word of the language is no password: a letter and a digit, and not a path to a file. Without "=" or ":" between name and value it
# takes the form of an option, and 12 characters.
random(match) if {
	value := match[4]
	regex.match(`[0-9]`, value)
	regex.match(`[A-Za-z]`, value)
	not regex.match(`^([\w.-]*/)*[\w.-]+\.[a-z]{2,5}$|^(file|env|vault|sops|kmo1|sha256|https?):`, value)
	not bare(match)
}

bare(match) if {
	trim_space(match[3]) == ""
	count(match[4]) < 12
}
