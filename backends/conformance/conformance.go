// Package conformance is the contract of package backends as a test, for the backends of kMO and of others alike.
//
// A backend's test is one call:
//
//	func TestConformance(t *testing.T) {
//		program := conformance.Build(t, "linux", runtime.GOARCH)
//		conformance.Test(t, func(t *testing.T) conformance.Subject {
//			dir := t.TempDir()
//			return conformance.Subject{
//				Open:   func(t *testing.T) backends.Backend { return open(t, dir) },
//				Images: map[backends.Format]backends.Image{backends.Native: {Content: program}},
//				Leaks:  func(t *testing.T) []string { return whatIsLeft(dir) },
//			}
//		})
//	}
//
// Every check runs for every format, once on the value and once over gRPC, each on a subject of its own. What the fingerprint
// does not promise is not asked of a backend; then its refusal is what is checked. What it does promise must be exercised by some
// check: a feature that none knows is a failure, until there is one. The images hold one program, package testprogram, which tells in
// the workload's log what it sees.
package conformance

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kindos/kmo/backends"
)

// Subject is a backend under test, with state of its own. Open and Images are needed.
type Subject struct {
	// Open returns a backend over the subject's state as a new process would: it shares nothing with an earlier one but that
	// state. If it is an io.Closer, Close is the end of that process, which no workload may notice.
	Open func(t *testing.T) backends.Backend
	// At is Open over a state folder that is given: one on a full disk. Nil: nothing is kept on a disk of this host.
	At func(t *testing.T, state string) backends.Backend
	// Dies says that the process that keeps the workloads may be killed at any moment, and that the next one sees to what it left. The suite
	// does so to this test binary, started again: At is needed.
	Dies bool
	// Images holds the test program in each format to be tested: Content, and ContentRoot where the backend looks at it. The
	// program is at /app inside, where a format has an inside. Without Content it is the runtime that fetches what Ref names.
	Images map[backends.Format]backends.Image
	// User is the uid the workloads run as; 0 means 65532.
	User int
	// Programs says what the workloads' programs are. Checks that look at a program are left out where there is none, and named in the
	// test's log.
	Programs Programs
	// Table is a folder with a file for each format that says what the suite found to be true: documents are made of them. They are
	// compared, and with KMO_UPDATE=1 written. "" is none.
	Table string
	// Patience is how long what the contract promises without a time may take; 0 means 20 s.
	Patience time.Duration
	// Disk lists folders on disk in which the backend and its runtime keep things. No secret may be found there.
	Disk []string
	// Leaks names what is left of workloads on this host: processes, mounts, cgroups, folders. It is called when all are
	// removed, and must return nothing then. Kept paths are no leak.
	Leaks func(t *testing.T) []string
	// Kill ends a workload's program from outside. Nil means SIGKILL to Status.PID.
	Kill func(t *testing.T, s backends.Status)
	// Used is how much of the processor a workload's program has used, where the backend does not tell it. Nil: Status.Usage tells.
	Used func(t *testing.T, s backends.Status) time.Duration
	// Sets names variables, beside the usual ones, that the runtime puts into the environment of every program.
	Sets []string
	// Damage changes, behind the backend's back, something of a running workload that Observe must notice. Nil: there is no such thing.
	Damage func(t *testing.T, w backends.Workload)
	// Stranger starts something in the same runtime that is not kMO's, and returns a check that it is untouched. Nil: there is no such thing.
	Stranger func(t *testing.T) (check func(t *testing.T))
}

// Programs are what a subject's programs are.
type Programs int

// The kinds of programs.
const (
	Real     Programs = iota // they run
	Imagined                 // the backend plays them; they have no clock: what takes its time without being asked is not seen
	Played                   // the runtime says that they run, and there are none; the fingerprint must promise what Table says, which others wrote
	None                     // nothing runs, and nothing says so
)

// programless says that there is no program to look at.
func (s Subject) programless() bool { return s.Programs == Played || s.Programs == None }

// Test checks a backend. New makes a fresh subject; what it starts it clears by t.Cleanup.
func Test(t *testing.T, newSubject func(t *testing.T) Subject) {
	for _, route := range routes() {
		t.Run(route.name, func(t *testing.T) {
			for _, format := range formats(t, newSubject) {
				t.Run(string(format), func(t *testing.T) { testFormat(t, newSubject, route, format) })
			}
		})
	}
}

func testFormat(t *testing.T, newSubject func(t *testing.T) Subject, route route, format backends.Format) {
	subject := newSubject(t)
	asked, left := checks(subject)
	made, able, proven := 0, backends.Fingerprint{}, map[backends.Feature]bool{}
	for _, check := range asked {
		t.Run(check.name, func(t *testing.T) {
			b := newBench(t, newSubject(t), route, format)
			made, able, b.proven = made+1, b.able, proven
			check.run(b)
			b.clear()
		})
	}
	for _, check := range left {
		t.Logf("not asked of what runs nothing: %s", check.name)
	}
	t.Logf("exercised: %v", slices.Sorted(maps.Keys(proven)))
	if made < len(asked) {
		return // not all of them were to be run
	}
	found := Found{Backend: able.Backend, Format: format, Isolation: able.Isolation}
	for _, feature := range able.Features {
		if proven[feature] || subject.Programs == Played {
			found.Features = append(found.Features, feature)
			continue
		}
		t.Errorf("the fingerprint has %s, which no check exercises", feature)
	}
	if subject.Table != "" && !t.Failed() {
		compare(t, subject, found)
	}
}

// Found is what the suite found to be true of a backend and a format: a file of Subject.Table.
type Found struct {
	Backend   string             `json:"backend"`
	Format    backends.Format    `json:"format"`
	Isolation backends.Isolation `json:"isolation"`
	Features  []backends.Feature `json:"features"` // that were promised and exercised; every other was refused
}

// compare holds what was found against the table. A host that has less than the table is told so, and is a failure only where CI is set.
func compare(t *testing.T, subject Subject, found Found) {
	t.Helper()
	path := filepath.Join(subject.Table, string(found.Format)+".json")
	text, err := json.MarshalIndent(found, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	if os.Getenv("KMO_UPDATE") != "" && subject.Programs != Played {
		if err := errors.Join(os.MkdirAll(subject.Table, 0o755), os.WriteFile(path, append(text, '\n'), 0o644)); err != nil { // to be committed
			t.Fatal(err)
		}
	}
	var table Found
	written, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(written, &table)
	}
	if err != nil {
		t.Fatalf("%v; KMO_UPDATE=1 writes it", err)
	}
	for _, feature := range found.Features {
		if !slices.Contains(table.Features, feature) {
			t.Errorf("%s is true, and not in %s; KMO_UPDATE=1 writes it", feature, path)
		}
	}
	for _, feature := range table.Features {
		if !slices.Contains(found.Features, feature) {
			say := t.Logf
			if os.Getenv("CI") != "" {
				say = t.Errorf
			}
			say("%s says %s, which this host does not have", path, feature)
		}
	}
	if table.Backend != found.Backend || table.Isolation != found.Isolation {
		t.Errorf("%s says %s, %s; it is %s, %s", path, table.Backend, table.Isolation, found.Backend, found.Isolation)
	}
}

func formats(t *testing.T, newSubject func(t *testing.T) Subject) []backends.Format {
	subject := newSubject(t)
	backend := subject.Open(t)
	able, err := backend.Fingerprint(t.Context())
	if closer, ok := backend.(io.Closer); ok {
		err = errors.Join(err, closer.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	var formats []backends.Format
	for _, format := range able.Formats {
		if _, ok := subject.Images[format]; ok {
			formats = append(formats, format)
		}
	}
	if len(formats) == 0 || len(formats) != len(subject.Images) {
		t.Fatalf("the fingerprint says formats %q, the subject has %d images", able.Formats, len(subject.Images))
	}
	return formats
}

// check is one rule of the contract.
type check struct {
	name string
	run  func(b *bench)
}

// checks lists every rule, in the order in which a new backend comes to fulfil them. Of what runs nothing some are not asked.
func checks(s Subject) (asked, left []check) {
	asked = slices.Concat(askedChecks(), refusalChecks())
	left = slices.Concat(lifeChecks(), seenChecks(), faultChecks(), writeChecks(), boundChecks(), rightsChecks())
	if s.programless() {
		return asked, left
	}
	return append(left, asked...), nil
}

// Build builds the test program for a platform, statically, and returns its path. It lives as long as the test.
func Build(t testing.TB, goos, goarch string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "app")
	build := exec.CommandContext(context.Background(), "go", "build", "-trimpath", "-ldflags=-s -w", "-o", path,
		"github.com/kindos/kmo/backends/conformance/testprogram")
	build.Env = append(os.Environ(), "GOOS="+goos, "GOARCH="+goarch, "CGO_ENABLED=0")
	if output, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building the test program: %v\n%s", err, output)
	}
	if err := os.Chmod(path, 0o755); err != nil { // a program is to be executed
		t.Fatal(err)
	}
	return path
}

// Demo plays kmo demo on a built-in backend. Engine is where its runtime is, "" where it usually is.
func Demo(t *testing.T, backend, engine string) {
	t.Helper()
	root, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "github.com/kindos/kmo").Output()
	if err != nil {
		t.Fatal(err)
	}
	at := strings.TrimSpace(string(root))
	turn, err := os.Open(filepath.Join(at, "Makefile")) // of who builds and plays there: other packages' tests do, too
	if err == nil {
		err = syscall.Flock(int(turn.Fd()), syscall.LOCK_EX)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer turn.Close()
	if output, err := exec.CommandContext(t.Context(), "make", "-C", at, "build").CombinedOutput(); err != nil {
		t.Fatalf("building the demo: %v\n%s", err, output)
	}
	folder, err := os.MkdirTemp("/tmp", "kmo-demo-") // short: sockets lie below it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(folder) })
	demo := exec.CommandContext(t.Context(), filepath.Join(at, "bin/kmo"), "demo", "--backend", backend, "--engine", engine)
	demo.Env = append(os.Environ(), "TMPDIR="+folder)
	output, err := demo.CombinedOutput()
	if err != nil || !strings.Contains(string(output), " acts ended as they must, in ") {
		t.Fatalf("%v:\n%s", err, output)
	}
	if left, err := os.ReadDir(folder); err != nil || len(left) > 0 {
		t.Errorf("%v is left, %v", left, err)
	}
	t.Logf("%s", output)
}

// Greeting says hello to whoever calls at an address of this host, and returns the port: what a workload may reach, or must not.
func Greeting(t *testing.T, address string) (port string) {
	t.Helper()
	listener, err := net.Listen("tcp", net.JoinHostPort(address, "0"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(conn, "hello")
			_ = conn.Close()
		}
	}()
	if _, port, err = net.SplitHostPort(listener.Addr().String()); err != nil {
		t.Fatal(err)
	}
	return port
}

// HostAddress is one of this host's that is not its loopback.
func HostAddress(t *testing.T) string {
	t.Helper()
	found, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, one := range found {
		if at, ok := one.(*net.IPNet); ok && at.IP.To4() != nil && at.IP.IsGlobalUnicast() {
			return at.IP.String()
		}
	}
	t.Fatal("this host has no address of version 4 but its loopback; want one to reach from within")
	return ""
}
