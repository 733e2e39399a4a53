package conformance

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/policy/refusal"
)

// seenChecks are about what the workload sees of the world and the world of it.
func seenChecks() []check {
	return []check{
		{"logs: both streams, tail, and none of an unknown workload", logsTail},
		{"logs: follow until the context ends", logsFollow},
		{"the environment holds nothing of the host's", cleanEnv},
		{"arguments, folder and user are those asked for", askedIdentity},
		{"files arrive with mode and content", filesArrive},
		{"secrets arrive, outlive a process, and lie on no disk", secretsArrive},
		{"a memory pool is shared", poolShared},
		{"a unix socket of one unit is reached by another", socketReached},
		{"a device is given to the workload's user", deviceGiven},
		{"a chosen port is told and stays the same", chosenPort},
		{"a fixed port is the one asked for", fixedPort},
		{"a mapped port is published", mappedPort},
		{"a network of its own has who resolves names", resolverTold},
		{"what two workloads listen on inside is each one's own", samePort},
		{"a low port is listened on", lowPort},
		{"a port of the host's network is the program's own", hostNetwork},
		{"only ours are seen", onlyOurs},
		{"exec runs inside and tells status and output", execInside},
		{"a folder of the host is mounted", mounted},
		{"a folder of the host that is not there blames nobody, a link does", mountMissing},
	}
}

func logsTail(b *bench) {
	w := b.apply(b.unit("relay", "say one", "warn two", "say three", "wait"))
	b.line(w.Name, "waiting")
	b.line(w.Name, "two")
	text := b.log(w.Name)
	if strings.Index(text, "one") > strings.Index(text, "three") || !strings.HasSuffix(text, "\n") {
		b.Errorf("log %q is not oldest first", text)
	}
	tail, err := b.logs(w.Name, backends.LogOptions{Tail: 2})
	if want := strings.Join(strings.SplitAfter(text, "\n")[2:], ""); err != nil || tail != want {
		b.Errorf("the last two lines are %q (error %v), want %q", tail, err, want)
	}
	if _, err := b.logs("nothing-00000000", backends.LogOptions{}); !errors.Is(err, backends.ErrNotFound) {
		b.Errorf("logs of an unknown workload: error %v, want ErrNotFound", err)
	}
	b.kill(b.until(w.Name, "running", running))
	b.poll("two starts in the log", func() (string, bool) {
		text := b.log(w.Name)
		return text, strings.Count(text, "one\n") == 2
	})
}

func logsFollow(b *bench) {
	w := b.apply(b.unit("relay", "say one", "wait"))
	b.line(w.Name, "waiting")
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	log, err := b.backend.Logs(ctx, w.Name, backends.LogOptions{Follow: true})
	if err != nil {
		b.Fatal(err)
	}
	defer log.Close()
	pieces := make(chan string, 100)
	go func() {
		defer close(pieces)
		for chunk := make([]byte, 1024); ; {
			n, err := log.Read(chunk)
			pieces <- string(chunk[:n])
			if err != nil {
				return
			}
		}
	}()
	b.kill(b.until(w.Name, "running", running))
	var seen strings.Builder
	deadline := time.After(b.patience)
	for strings.Count(seen.String(), "waiting\n") < 2 {
		select {
		case piece := <-pieces:
			seen.WriteString(piece)
		case <-deadline:
			b.Fatalf("following a log over a restart showed %q, want two starts", seen.String())
		}
	}
	cancel()
	for {
		select {
		case _, more := <-pieces:
			if !more {
				return
			}
		case <-deadline:
			b.Fatal("the log goes on although its context has ended")
		}
	}
}

// cleanEnv allows what a runtime must set for any program, and what was asked for.
func cleanEnv(b *bench) {
	b.Setenv("KMO_CONFORMANCE_CANARY", "of the host")
	b.reopen()
	w := b.unit("relay", "env", "wait")
	w.Image.Config.Env = []string{"FROM_IMAGE=1", "BOTH=image"}
	w.Run.Env = map[string]string{"FROM_RUN": "a b=c", "BOTH": "run"}
	w = b.apply(w)
	b.line(w.Name, "env end")
	text := b.log(w.Name)
	for _, want := range []string{"env FROM_IMAGE=1\n", "env FROM_RUN=a b=c\n", "env BOTH=run\n"} {
		if !strings.Contains(text, want) {
			b.Errorf("environment has no line %q: %s", want, text)
		}
	}
	allowed := append([]string{"FROM_IMAGE", "FROM_RUN", "BOTH", "PATH", "HOME", "HOSTNAME", "PWD", "TERM", "TMPDIR", "USER", "container", "APPDIR", "end"}, b.subject.Sets...)
	for line := range strings.Lines(text) {
		name, _, _ := strings.Cut(strings.TrimSpace(strings.TrimPrefix(line, "env ")), "=")
		if strings.HasPrefix(line, "env ") && !slices.Contains(allowed, name) {
			b.Errorf("the environment holds %q, which nobody asked for", line)
		}
	}
}

func askedIdentity(b *bench) {
	w := b.unit("relay", "args", "dir", "id", "wait")
	w.Image.Config.Cmd, w.Image.Config.Dir, w.Image.Config.User = []string{"say not-this"}, "/nowhere", "12345"
	w.Run.Dir = "/"
	w = b.apply(w)
	b.line(w.Name, "waiting")
	if got, want := b.line(w.Name, "args"), fmt.Sprintf("%q", w.Run.Args); got != want {
		b.Errorf("arguments are %s, want %s", got, want)
	}
	if got := b.line(w.Name, "dir"); got != "/" {
		b.Errorf("folder is %s, want /", got)
	}
	if got, want := b.line(w.Name, "id"), fmt.Sprint(w.Run.User, w.Run.User); got != want && b.format != backends.WASM {
		b.Errorf("uid and gid are %s, want %s", got, want)
	}
	fromImage := b.unit("other")
	fromImage.Run.Args, fromImage.Image.Config.Cmd = nil, []string{"say from-the-image", "wait"}
	b.line(b.apply(fromImage).Name, "from-the-image")
}

func filesArrive(b *bench) {
	if !b.has(backends.Files) {
		return // the refusal of it is checked with the others
	}
	w := b.unit("relay", "cat /etc/relay/relay.toml", "mode /etc/relay/relay.toml", "cat /relay.bin", "wait")
	w.Files = []backends.File{
		{To: "/etc/relay/relay.toml", Mode: 0o440, Content: []byte("key = 1\n")},
		{To: "/relay.bin", Mode: 0o444, Content: []byte("\x00\xff")},
	}
	w = b.apply(w)
	b.line(w.Name, "waiting")
	if got := b.line(w.Name, "cat /etc/relay/relay.toml:"); got != `"key = 1\n"` {
		b.Errorf("content is %s", got)
	}
	if got := b.line(w.Name, "mode /etc/relay/relay.toml:"); got != "0440" && b.format != backends.WASM { // WASI has no modes
		b.Errorf("mode is %s, want 0440", got)
	}
	if got := b.line(w.Name, "cat /relay.bin:"); got != `"\x00\xff"` {
		b.Errorf("content is %s", got)
	}
	w.Files[0].Content = []byte("key = 2\n")
	changed := b.apply(w)
	b.line(changed.Name, "waiting")
	if got := b.line(changed.Name, "cat /etc/relay/relay.toml:"); got != `"key = 2\n"` {
		b.Errorf("P-07 content of the new spec is %s", got)
	}
}

func chosenPort(b *bench) {
	w := b.unit("relay", "serve http", "wait")
	w.Run.Ports = []backends.Port{{Name: "http"}}
	w = b.apply(w)
	s := b.answers(w.Name)
	address := s.Addresses[0].Address
	b.kill(b.until(w.Name, "running", running))
	b.until(w.Name, "running again", func(s backends.Status) bool { return running(s) && s.Restarts == 1 })
	if again := b.answers(w.Name); again.Addresses[0].Address != address {
		b.Errorf("after a restart the address is %s, it was %s", again.Addresses[0].Address, address)
	}
	b.reopen()
	if again := b.answers(w.Name); again.Addresses[0].Address != address {
		b.Errorf("a new process tells the address %s, it was %s", again.Addresses[0].Address, address)
	}
	other := b.unit("relay", "serve http", "say other", "wait")
	other.Run.Ports = w.Run.Ports
	other = b.apply(other)
	if s := b.answers(other.Name); s.Addresses[0].Address == address {
		b.Errorf("two workloads have the address %s", address)
	}
}

func fixedPort(b *bench) {
	port := freePort(b)
	w := b.unit("relay", "serve http", "wait")
	w.Run.Ports = []backends.Port{{Name: "http", Host: port}}
	w = b.apply(w)
	if s := b.answers(w.Name); !strings.HasSuffix(s.Addresses[0].Address, fmt.Sprint(":", port)) {
		b.Errorf("address is %s, want port %d", s.Addresses[0].Address, port)
	}
}

func mappedPort(b *bench) {
	if !b.has(backends.PortMap) {
		return // the refusal of it is checked with the others
	}
	inside, outside := freePort(b), freePort(b)
	w := b.unit("relay", "serve http", "wait")
	w.Run.Ports = []backends.Port{{Name: "http", Port: inside, Host: outside}}
	w = b.apply(w)
	if s := b.answers(w.Name); !strings.HasSuffix(s.Addresses[0].Address, fmt.Sprint(":", outside)) {
		b.Errorf("address is %s, want port %d", s.Addresses[0].Address, outside)
	}
}

// resolverTold: what the image was built with is not asked, which knows nothing of this host.
func resolverTold(b *bench) {
	if !b.has(backends.OwnNetwork) {
		return // the host's is not the backend's to say
	}
	w := b.apply(b.unit("relay", "cat /etc/resolv.conf", "wait"))
	b.line(w.Name, "waiting")
	if got := b.line(w.Name, "cat /etc/resolv.conf:"); !strings.Contains(got, "nameserver ") {
		b.Errorf("/etc/resolv.conf is %s, want a line with a name server", got)
	}
}

// samePort: what two workloads listen on inside is each one's own.
func samePort(b *bench) {
	if !b.has(backends.OwnNetwork) {
		return
	}
	inside := freePort(b)
	var at []string
	for _, name := range []string{"relay", "ledger"} {
		w := b.unit(name, "serve http", "wait")
		w.Run.Ports = []backends.Port{{Name: "http", Port: inside}}
		at = append(at, b.answers(b.apply(w).Name).Addresses[0].Address)
	}
	if at[0] == at[1] {
		b.Errorf("two workloads that listen on %d inside are both at %s", inside, at[0])
	}
}

func lowPort(b *bench) {
	if !b.has(backends.LowPorts) {
		return // the refusal of it is checked with the others
	}
	w := b.unit("relay", "serve http", "wait")
	w.Run.Ports = []backends.Port{{Name: "http", Port: 81}}
	b.answers(b.apply(w).Name)
}

func hostNetwork(b *bench) {
	if !b.has(backends.HostNetwork) {
		return // the refusal of it is checked with the others
	}
	port := freePort(b)
	w := b.unit("relay", "serve http", "wait")
	w.Run.Ports = []backends.Port{{Name: "http", Port: port}}
	w.Security.Host = []string{"network"}
	w = b.apply(w)
	if s := b.answers(w.Name); !strings.HasSuffix(s.Addresses[0].Address, fmt.Sprint(":", port)) {
		b.Errorf("address is %s, want port %d, which is not another's to publish", s.Addresses[0].Address, port)
	}
}

// answers waits until the workload's one port, http, answers, and returns its status.
func (b *bench) answers(name string) (s backends.Status) {
	b.Helper()
	b.poll("an answer from "+name, func() (string, bool) {
		s, _ = b.status(name)
		if len(s.Addresses) != 1 || s.Addresses[0].Port != "http" {
			return fmt.Sprintf("addresses %v, want one of port http", s.Addresses), false
		}
		page, err := get(s.Addresses[0].Address)
		return fmt.Sprint(page, err), err == nil && strings.Contains(page, "serve http")
	})
	return s
}

func freePort(b *bench) int {
	b.Helper()
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		b.Fatal(err)
	}
	port := netip.MustParseAddrPort(l.Addr().String()).Port()
	if err := l.Close(); err != nil {
		b.Fatal(err)
	}
	return int(port)
}

func onlyOurs(b *bench) {
	if b.subject.Stranger == nil {
		return // there are no others in this runtime
	}
	untouched := b.subject.Stranger(b.T)
	if list := b.observe(); len(list) != 0 {
		b.Errorf("observe lists %v, which are not ours", names(list))
	}
	w := b.apply(b.unit("relay", "wait"))
	b.until(w.Name, "running", running)
	if list := b.observe(); len(list) != 1 {
		b.Errorf("observe lists %v, want one", names(list))
	}
	b.remove(w.Name)
	untouched(b.T)
}

func execInside(b *bench) {
	execer, ok := b.backend.(backends.Execer)
	if !b.has(backends.Exec) {
		if ok {
			_, _, err := execer.Exec(b.Context(), "nothing-00000000", []string{"/app"})
			b.lacks(backends.Exec, err)
		}
		return
	}
	if !ok {
		b.Fatal("the fingerprint says exec, the backend is no Execer")
	}
	w := b.unit("relay", "wait")
	w.Run.Env = map[string]string{"INSIDE": "yes"}
	w = b.apply(w)
	b.line(w.Name, "waiting")
	code, output, err := execer.Exec(b.Context(), w.Name, []string{"/app", "say out", "warn err", "env", "exit 7"})
	if err != nil || code != 7 {
		b.Errorf("exec: status %d, error %v; want 7", code, err)
	}
	for _, want := range []string{"out\n", "err\n", "env INSIDE=yes\n"} {
		if !strings.Contains(string(output), want) {
			b.Errorf("output %q has no %q", output, want)
		}
	}
	if _, _, err := execer.Exec(b.Context(), "nothing-00000000", []string{"/app"}); !errors.Is(err, backends.ErrNotFound) {
		b.Errorf("exec in an unknown workload: error %v, want ErrNotFound", err)
	}
	ctx, cancel := context.WithTimeout(b.Context(), 300*time.Millisecond)
	defer cancel()
	begun := time.Now()
	if _, _, err := execer.Exec(ctx, w.Name, []string{"/app", "wait"}); err == nil {
		b.Error("exec of a command that goes on for ever: no error when its context ended")
	}
	if took := time.Since(begun); took > b.patience/2 {
		b.Errorf("exec went on for %v after its context ended", took)
	}
}

func mounted(b *bench) {
	if !b.has(backends.Mounts) {
		return // the refusal of it is checked with the others
	}
	dir := b.hostDir()
	w := b.unit("relay", "cat /host/file", "write /host/new text", "wait")
	w.Mounts = []backends.Mount{{From: dir, To: "/host", ReadOnly: true}}
	w = b.apply(w)
	b.line(w.Name, "waiting")
	if got := b.line(w.Name, "cat /host/file:"); got != `"of the host"` {
		b.Errorf("the mounted file is %s", got)
	}
	if got := b.line(w.Name, "write /host/new:"); !strings.HasPrefix(got, "error") {
		b.Errorf("writing to a read-only mount: %s", got)
	}
	w.Mounts[0].ReadOnly = false
	writing := b.apply(w)
	b.line(writing.Name, "waiting")
	if got := b.line(writing.Name, "write /host/new:"); got != "ok" {
		b.Errorf("writing to a mount: %s", got)
	}
}

func mountMissing(b *bench) {
	if !b.has(backends.Mounts) {
		return // the refusal of it is checked with the others
	}
	dir := b.TempDir()
	absent, link := filepath.Join(dir, "absent"), filepath.Join(dir, "link")
	if err := os.Symlink(dir, link); err != nil {
		b.Fatal(err)
	}
	refused := func(from string) (backends.Workload, error) {
		w := b.unit("relay", "wait")
		w.Mounts = []backends.Mount{{From: from, To: "/host", ReadOnly: true}}
		w = seal(w)
		b.names = append(b.names, w.Name)
		err := b.backend.Apply(b.Context(), w)
		if err == nil {
			b.Fatalf("mounting %s: no error", from)
		}
		b.gone(w.Name)
		b.remove(w.Name)
		if b.subject.Leaks != nil {
			if left := b.subject.Leaks(b.T); len(left) > 0 {
				b.Errorf("mounting %s left behind: %q", from, left)
			}
		}
		return w, err
	}
	var start *backends.StartError
	if _, err := refused(link); !errors.As(err, &start) {
		b.Errorf("mounting a link: error %v, want a *StartError", err)
	}
	w, err := refused(absent)
	var feature *backends.FeatureError
	if errors.As(err, &start) || errors.As(err, &feature) || refusal.Of(err) != nil {
		b.Errorf("mounting what is not there: error %v, want one that blames nobody", err)
	}
	if err := os.Mkdir(absent, 0o755); err != nil {
		b.Fatal(err)
	}
	b.apply(w)
	b.up(w.Name)
}
