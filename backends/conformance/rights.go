package conformance

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
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

// tun is a device that every user may open and most hosts have.
const tun = "/dev/net/tun"

func secretsArrive(b *bench) {
	if !b.has(backends.Secrets) {
		return // the refusal of it is checked with the others
	}
	secret := "canary-" + filepath.Base(b.TempDir()) + strings.Repeat("-of-a-secret", 3)
	w := b.unit("relay", "cat /run/secrets/token", "mode /run/secrets/token", "wait")
	w.Files = []backends.File{{To: "/run/secrets/token", Mode: 0o400, Content: []byte(secret), Secret: true}}
	w = b.apply(w)
	arrived := func(times int) {
		b.Helper()
		b.poll(fmt.Sprint("the secret, read ", times, " times"), func() (string, bool) {
			text := b.log(w.Name)
			return text, strings.Count(text, fmt.Sprintf("cat /run/secrets/token: %q", secret)) == times && strings.Count(text, "waiting\n") == times
		})
	}
	arrived(1)
	if got := b.line(w.Name, "mode /run/secrets/token:"); got != "0400" && b.format != backends.WASM { // WASI has no modes
		b.Errorf("mode is %s, want 0400", got)
	}
	b.reopen()
	b.kill(b.until(w.Name, "running", running))
	arrived(2) // a new process has it still
	if s, _ := b.status(w.Name); strings.Contains(fmt.Sprintf("%+v", s), secret) {
		b.Errorf("the status tells the secret: %+v", s)
	}
	for _, dir := range b.subject.Disk {
		b.without(dir, secret)
	}
}

// without looks for a secret in all files of a folder but the workload's own log, which says what it was asked to say.
func (b *bench) without(dir, secret string) {
	b.Helper()
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return nil // what has gone meanwhile holds nothing
		}
		text, err := os.ReadFile(path)
		if err == nil && bytes.Contains(text, []byte(secret)) && !bytes.Contains(text, []byte("cat /run/secrets/token:")) {
			b.Errorf("%s holds the secret", path)
		}
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
}

// door is a folder on memory, as the agent makes it.
func (b *bench) door() string {
	b.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "kmo-door-")
	if err == nil {
		b.Cleanup(func() { _ = os.RemoveAll(dir) })
		err = os.Chmod(dir, 0o777) // both units' users write in it
	}
	if err != nil {
		b.Fatal(err)
	}
	return dir
}

func poolShared(b *bench) {
	if !b.has(backends.MemoryPool) {
		return // the refusal of it is checked with the others
	}
	doors := []backends.Door{{From: b.door(), To: "/pool", Via: "memory"}}
	writer := b.unit("writer", "map /pool/frames first", "wait")
	writer.Doors = doors
	writer = b.apply(writer)
	b.line(writer.Name, "waiting")
	if got := b.line(writer.Name, "map /pool/frames:"); got != "ok" {
		b.Fatalf("mapping a file of the pool: %s", got)
	}
	reader := b.unit("reader", "cat /pool/frames", "wait")
	reader.Doors = doors
	reader = b.apply(reader)
	b.line(reader.Name, "waiting")
	if got := b.line(reader.Name, "cat /pool/frames:"); !strings.HasPrefix(got, `"first`) {
		b.Errorf("the other unit reads %.100s, want first", got)
	}
}

func socketReached(b *bench) {
	if !b.has(backends.Sockets) {
		return // the refusal of it is checked with the others
	}
	doors := []backends.Door{{From: b.door(), To: "/doors", Via: "socket"}}
	bus := b.unit("bus", "listen /doors/bus", "wait")
	bus.Doors = doors
	bus = b.apply(bus)
	b.line(bus.Name, "waiting")
	relay := b.unit("relay", "dial /doors/bus", "wait")
	relay.Doors = doors
	relay = b.apply(relay)
	b.line(relay.Name, "waiting")
	if got := b.line(relay.Name, "dial /doors/bus:"); got != `"welcome"` {
		b.Errorf("by the socket came %s, want welcome", got)
	}
}

func deviceGiven(b *bench) {
	if !b.has(backends.Devices) {
		return // the refusal of it is checked with the others
	}
	w := b.unit("relay", "open "+tun, "wait")
	w.Resources.Devices = []backends.Device{{Name: "tun", Nodes: []string{tun}}}
	w = b.apply(w)
	b.line(w.Name, "waiting")
	if got := b.line(w.Name, "open "+tun+":"); got != "ok" {
		b.Errorf("opening the device: %s", got)
	}
	without := b.apply(b.unit("other", "open "+tun, "wait"))
	b.line(without.Name, "waiting")
	if got := b.line(without.Name, "open "+tun+":"); !strings.HasPrefix(got, "error") {
		b.Errorf("opening a device that was not given: %s", got)
	}
}
