package microvm

import (
	"context"
	"errors"
	"io"
	"net"
	"strconv"
	"strings"
	"testing"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/conformance"
	"github.com/kindos/kmo/backends/process"
)

func run(t *testing.T, b *Backend, name string, argv ...string) string {
	t.Helper()
	status, said, err := b.Exec(t.Context(), name, argv)
	if err != nil || status != 0 {
		t.Fatalf("%q: %d, %v: %s", argv, status, err, said)
	}
	return strings.TrimSpace(string(said))
}

// A machine reaches what this host reaches and asks its resolver, and reaches nothing that listens on its loopback; its own ports are reached.
func TestNetwork(t *testing.T) {
	b, _ := begin(t)
	alone, every := conformance.Greeting(t, "127.0.0.1"), conformance.Greeting(t, "")
	free, err := process.ChoosePort("public", "public", func(int) bool { return true })
	if err != nil {
		t.Fatal(err)
	}
	w := workload("relay", "serve http", "serve public", "wait")
	w.Run.Ports = []backends.Port{{Name: "http", Port: 80}, {Name: "public", Port: 8080, Host: free}}
	if err := b.Apply(t.Context(), w); err != nil {
		t.Fatal(err)
	}
	mine := conformance.HostAddress(t)
	for _, address := range []string{"10.0.2.2", "10.0.2.3", "10.0.2.15", "10.0.2.100", "10.0.3.2", "10.0.3.3", "127.0.0.1", "127.0.1.1", "0.0.0.0", mine} {
		if said := run(t, b, w.Name, "/probe", "get", net.JoinHostPort(address, alone)); !strings.HasPrefix(said, "error: ") {
			t.Errorf("by %s the host's loopback answers %q", address, said)
		}
	}
	if said := run(t, b, w.Name, "/probe", "get", net.JoinHostPort(mine, every)); said != "got hello" {
		t.Errorf("there is no way out to this host's %s: %s", mine, said)
	}
	// What this host's resolver knows is not known here; that it answers is seen.
	if said := run(t, b, w.Name, "/probe", "resolve", "localhost.kmo.test."); !strings.HasPrefix(said, "resolved ") && !strings.Contains(said, "on 10.0.2.3:53: no such host") {
		t.Errorf("no resolver answers: %s", said)
	}
	addresses := status(t, b, w.Name).Addresses
	if len(addresses) != 2 {
		t.Fatalf("it is at %v", addresses)
	}
	for _, at := range []string{addresses[0].Address, addresses[1].Address, net.JoinHostPort(mine, strconv.Itoa(free))} {
		until(t, "an answer at "+at, func() (string, bool) { return get(t.Context(), at) })
	}
	_, port, err := net.SplitHostPort(addresses[0].Address)
	if err != nil {
		t.Fatal(err)
	}
	if said, ok := get(t.Context(), net.JoinHostPort(mine, port)); ok {
		t.Errorf("a port that the unit leaves open is reached from outside: %q", said)
	}
}

func get(ctx context.Context, address string) (string, bool) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return err.Error(), false
	}
	defer conn.Close()
	_, err = io.WriteString(conn, "GET / HTTP/1.0\r\n\r\n")
	text, also := io.ReadAll(conn)
	if err = errors.Join(err, also); err != nil {
		return err.Error(), false
	}
	return string(text), strings.Contains(string(text), "200 OK")
}

// What is not applied is said: always that a disk is not looked at again, and of a way out where slirp4netns is not.
func TestSaysWhatIsNotApplied(t *testing.T) {
	b, _ := begin(t)
	says := func(words string) bool { return strings.Contains(strings.Join(b.missing(), "\n"), words) }
	const content, network = "content: the cached disk of an image is not looked at again", "network: none beyond published ports"
	if !says(content) || says(network) || says("vmm-user") {
		t.Errorf("it says %q", b.missing())
	}
	for _, line := range backends.Concerning(b.Missing(), "secrets", "limit-memory", "limit-cpu", "limit-pids") {
		if !says(line) {
			t.Errorf("it says %q, and not what its keeper does: %q", b.missing(), line)
		}
	}
	t.Setenv("PATH", t.TempDir())
	if !says(network) {
		t.Errorf("without slirp4netns it says %q", b.missing())
	}
}
