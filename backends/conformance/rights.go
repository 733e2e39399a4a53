package conformance

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/kindos/kmo/backends"
)

// rightsChecks are about what is given beyond the default confinement, to a workload that asks for it and to no other.
func rightsChecks() []check {
	return []check{
		{"a capability is given", capabilityGiven},
		{"a namespace is shared with the host", namespaceShared},
		{"all of the host is given", privilegeGiven},
		{"the base can be written where that is asked for", baseWritable},
		{"the filter can be switched off", filterOff},
		{"what is missing of its confinement is told of a workload", missingTold},
	}
}

// told starts a workload as root, which is the user that every runtime can give rights to, and returns what its kernel says of it.
func (b *bench) told(security backends.Security, steps ...string) map[string]string {
	b.Helper()
	w := b.unit("relay", append(steps, "cat /proc/self/status", "wait")...)
	w.Run.User, w.Security = 0, security
	w = b.apply(w)
	b.line(w.Name, "waiting")
	quoted := b.line(w.Name, "cat /proc/self/status:")
	text, err := strconv.Unquote(quoted)
	if err != nil {
		b.Fatalf("/proc/self/status is %.300s", quoted)
	}
	told := map[string]string{"name": w.Name}
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(line, ":")
		told[name] = strings.TrimSpace(value)
	}
	return told
}

// capable says whether a process has a capability.
func (b *bench) capable(told map[string]string, number int) bool {
	b.Helper()
	mask, err := strconv.ParseUint(told["CapEff"], 16, 64)
	if err != nil {
		b.Fatalf("CapEff is %q", told["CapEff"])
	}
	return mask&(1<<number) != 0
}

func capabilityGiven(b *bench) {
	if !b.has(backends.Capabilities) {
		return // the refusal of it is checked with the others
	}
	const admin = 12 // CAP_NET_ADMIN
	if told := b.told(backends.Security{}); b.capable(told, admin) {
		b.Errorf("who asks for no capability has %s", told["CapEff"])
	}
	if told := b.told(backends.Security{Capabilities: []string{"CAP_NET_ADMIN"}}); !b.capable(told, admin) {
		b.Errorf("who asks for CAP_NET_ADMIN has %s", told["CapEff"])
	}
}

func namespaceShared(b *bench) {
	if !b.has(backends.HostNamespace) {
		return // the refusal of it is checked with the others
	}
	name, err := os.Hostname()
	if err != nil {
		b.Fatal(err)
	}
	told := b.told(backends.Security{Host: []string{"uts"}}, "cat /proc/sys/kernel/hostname")
	if got, want := b.line(told["name"], "cat /proc/sys/kernel/hostname:"), fmt.Sprintf("%q", name+"\n"); got != want {
		b.Errorf("in the host's uts namespace the host is named %s, want %s", got, want)
	}
}

func privilegeGiven(b *bench) {
	if !b.has(backends.Privileged) {
		return // the refusal of it is checked with the others
	}
	const mount = 21 // CAP_SYS_ADMIN
	if told := b.told(backends.Security{Privileged: true}); !b.capable(told, mount) {
		b.Errorf("who is to have all of the host has %s", told["CapEff"])
	}
}

func baseWritable(b *bench) {
	if !b.has(backends.WritableBase) {
		return // the refusal of it is checked with the others
	}
	before := contentSum(b)
	told := b.told(backends.Security{WritableBase: true}, "write /etc/x text", "cat /etc/x")
	if got := b.line(told["name"], "cat /etc/x:"); got != `"text"` {
		b.Errorf("what was written to the base reads as %s", got)
	}
	if after := contentSum(b); after != before {
		b.Errorf("the image's content has changed: %s, was %s", after, before)
	}
}

func filterOff(b *bench) {
	if !b.has(backends.Unconfined) {
		return // the refusal of it is checked with the others
	}
	if told := b.told(backends.Security{Unconfined: true}); told["Seccomp"] != "0" {
		b.Errorf("without a filter the kernel says Seccomp %s, want 0", told["Seccomp"])
	}
}

func missingTold(b *bench) {
	w := b.apply(b.unit("relay", "wait"))
	s := b.up(w.Name)
	for _, line := range b.able.Missing {
		if (strings.HasPrefix(line, "seccomp") || strings.HasPrefix(line, "apparmor")) && !slices.Contains(s.Unapplied, line) {
			b.Errorf("the fingerprint says %q, the workload that only %q is unapplied", line, s.Unapplied)
		}
	}
}
