package conformance

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/kindos/kmo/backends"
)

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
