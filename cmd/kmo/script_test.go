//go:build linux

package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/plugin"
	"github.com/kindos/kmo/cmd/kmo/cli"
	"github.com/kindos/kmo/cmd/kmo/thishost"
	"github.com/kindos/kmo/reconciler"
	"github.com/kindos/kmo/registry"
)

// patience is how long a script waits for an outcome.
const patience = 30 * time.Second

// TestScripts plays testdata/*.txtar: what people type, on the real binary, git and processes. Beside the commands of testscript there are
//
//	kmo, git …            the command; ! if it must fail
//	exits N COMMAND …     the command's exit status
//	registry [NAME:PASS]  a registry on the loopback, its address in $REGISTRY
//	gitserver NAME:PASS   site.git over HTTP for who knows the password, its address in $GITSERVER; it repeats every wrong one
//	flip [REPOSITORY]     from now on the registry changes the last byte of each of the repository's blobs; without one it is honest again
//	await OUTCOME [RE]    until 'kmo status' says that the remote's head ended so, for a reason that matches, and converged means running
//	await-status RE       until what 'kmo status -o json' prints matches; ! until it does not
//	get UNIT PATH         what the unit answers, after a line with the status
//	capture NAME RE       sets $NAME to the first group in what was printed last
//	fill FROM TO          copies a file, with $NAMES in it filled in
//	alive PID             the process is there; ! if it must not be
//	page PAGE FOLDER      does in the folder what a page of docs/ tells its reader to do
//	loopback              the agent and all below it listen on nothing but unix sockets of their owner
//
// and the shell scripts of testdata/bin, which are what a user would type, too. At its end each script's agent is stopped and its
// workloads are removed; it fails if a process, a mount or a cgroup is left.
func TestScripts(t *testing.T) {
	b := binaries(t)
	bin, err := filepath.Abs(filepath.Join("testdata", "bin"))
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir:                "testdata",
		WorkdirRoot:        t.TempDir(),
		RequireUniqueNames: true,
		Setup:              func(env *testscript.Env) error { return setUp(env, b, bin) },
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"kmo": command("kmo"), "git": command("git"), "exits": exits, "registry": serveRegistry, "gitserver": serveGit, "flip": flip, "await": await,
			"await-status": awaitStatus, "get": get, "capture": capture, "fill": fill, "alive": alive, "loopback": loopback, "page": page,
		},
	})
}

// TestDemo: 'kmo demo' plays every act to its end, and leaves nothing.
func TestDemo(t *testing.T) {
	b := binaries(t)
	folder, err := os.MkdirTemp("/tmp", "kmo-demo-test-") // short: sockets lie below it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(folder) })
	cmd := exec.CommandContext(t.Context(), b.kmo, "demo")
	cmd.Env = append(os.Environ(), "TMPDIR="+folder)
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "\n7 acts ended as they must, in ") {
		t.Fatalf("%v:\n%s", err, out)
	}
	if left, err := os.ReadDir(folder); err != nil || len(left) > 0 {
		t.Errorf("%v is left, %v", left, err)
	}
	t.Logf("%s", out)
}

// A demo that nobody listens to any more, or whose terminal goes away, leaves nothing either.
func TestDemoAbandoned(t *testing.T) {
	b := binaries(t)
	for name, abandon := range map[string]func(cmd *exec.Cmd, out io.Closer, folder string) error{
		"its output is closed": func(_ *exec.Cmd, out io.Closer, _ string) error { return out.Close() },
		"it hangs up":          func(cmd *exec.Cmd, _ io.Closer, _ string) error { return cmd.Process.Signal(syscall.SIGHUP) },
		"its agent is killed": func(_ *exec.Cmd, _ io.Closer, folder string) error {
			agent := processesOf(b, folder, "agent")
			if len(agent) != 1 {
				return fmt.Errorf("agents %v, want one", agent)
			}
			return syscall.Kill(agent[0], syscall.SIGKILL)
		},
	} {
		t.Run(name, func(t *testing.T) {
			folder, err := os.MkdirTemp("/tmp", "kmo-demo-test-") // short: sockets lie below it
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = os.RemoveAll(folder) })
			cmd := exec.CommandContext(t.Context(), b.kmo, "demo")
			cmd.Env = append(os.Environ(), "TMPDIR="+folder)
			out, err := cmd.StdoutPipe()
			if err = errors.Join(err, cmd.Start()); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(out, make([]byte, 20)); err != nil { // the first act
				t.Fatal(err)
			}
			if err := abandon(cmd, out, folder); err != nil {
				t.Fatal(err)
			}
			if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() != cli.ExitError {
				t.Errorf("it ended with %v, want status %d", err, cli.ExitError)
			}
			if left, err := os.ReadDir(folder); err != nil || len(left) > 0 {
				t.Errorf("%v is left, %v", left, err)
			}
			if left := processesOf(b, folder, ""); len(left) > 0 {
				t.Errorf("processes %v are left", left)
			}
		})
	}
}

// setUp gives a script its home and its state folder, whose path must be short, and clears up after it.
func setUp(env *testscript.Env, b built, bin string) error {
	folder, err := os.MkdirTemp("/tmp", "kmo-")
	if err != nil {
		return err
	}
	state := filepath.Join(folder, "state")
	t := env.T().(interface{ Errorf(string, ...any) })
	env.Defer(func() {
		if err := clear(b, state); err != nil {
			t.Errorf("clearing up: %v", err)
		}
		_ = os.RemoveAll(folder)
	})
	env.Values[imagesKey{}] = &imageServer{honest: registry.Memory()}
	home := filepath.Join(env.WorkDir, "home")
	for name, value := range map[string]string{
		"PATH": bin + ":" + b.dir + ":" + os.Getenv("PATH"), "HOME": home, "PROGRAMS": b.programs, "KMO": b.kmo, "DOCS": filepath.Join(bin, "../../../../docs"),
		"KMO_CONFIG": filepath.Join(env.WorkDir, "agent.yaml"), "KMO_STATE": state, "GIT_CONFIG_NOSYSTEM": "1", "SSH_AUTH_SOCK": "",
	} {
		env.Setenv(name, value)
	}
	if err := os.Mkdir(home, 0o755); err != nil {
		return err
	}
	config := fmt.Sprintf("[user]\nname = alice\nemail = alice@example.org\nsigningkey = %[1]s/keys/alice\n[gpg]\nformat = ssh\n"+
		"[gpg \"ssh\"]\nallowedSignersFile = %[1]s/allowed\n[init]\ndefaultBranch = main\n[advice]\ndetachedHead = false\n", env.WorkDir)
	return os.WriteFile(filepath.Join(home, ".gitconfig"), []byte(config), 0o644)
}

// clear stops the agent over a state folder, removes its workloads by the backends' own hands, whatever the journal says, and looks for
// what is left.
func clear(b built, state string) error {
	var errs []error
	for _, pid := range processesOf(b, state, "agent") {
		_ = syscall.Kill(pid, syscall.SIGTERM) // or it has ended
	}
	if err := until(func() bool { return len(processesOf(b, state, "")) == 0 }); err != nil {
		errs = append(errs, fmt.Errorf("processes %v are left: %w", processesOf(b, state, ""), err))
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for _, name := range builtInNames() {
		folder := filepath.Join(state, "backends", name)
		if _, err := os.Stat(folder); err != nil {
			continue
		}
		errs = append(errs, removeAll(ctx, b, name, folder, filepath.Join(filepath.Dir(state), "plugins")))
		group := fmt.Sprintf("kmo/%s-%x", name, sha256.Sum256([]byte(folder)))[:len(name)+13]
		left, err := filepath.Glob(filepath.Join("/sys/fs/cgroup", "*", group))
		if err != nil || len(left) > 0 {
			errs = append(errs, fmt.Errorf("cgroups are left: %v, %v", left, err))
		}
	}
	doors, release := thishost.Doors(state)
	errs = append(errs, os.RemoveAll(doors)) // the units of a script that failed are still linked
	release()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(mounts), state) {
		errs = append(errs, fmt.Errorf("mounts are left, %v", err))
	}
	return errors.Join(errs...)
}

// removeAll removes every workload of a backend.
func removeAll(ctx context.Context, b built, name, folder, sockets string) error {
	client, err := plugin.Open(ctx, plugin.Options{Name: name, Cmd: []string{b.kmo, "backend", "serve", name, "--state", folder}, Dir: sockets})
	if err != nil {
		return err
	}
	list, err := client.Observe(ctx)
	errs := []error{err}
	for _, status := range list {
		errs = append(errs, client.Remove(ctx, status.Name))
		if status.PID != 0 && until(func() bool { return !running(status.PID) }) != nil {
			errs = append(errs, fmt.Errorf("%s: process %d is left", status.Name, status.PID))
		}
	}
	return errors.Join(append(errs, client.Close())...)
}

// processesOf are the processes of the binary that speak of a state folder, by argument or environment; first is their first argument.
func processesOf(b built, state, first string) (pids []int) {
	all, _ := filepath.Glob("/proc/[0-9]*")
	for _, folder := range all {
		exe, _ := os.Readlink(folder + "/exe")
		line, _ := os.ReadFile(folder + "/cmdline")
		environ, _ := os.ReadFile(folder + "/environ")
		argv := strings.Split(string(line), "\x00")
		if exe == b.kmo && len(argv) > 1 && (first == "" || argv[1] == first) &&
			(strings.Contains(string(line), state) || strings.Contains(string(environ), "KMO_STATE="+state+"\x00")) {
			pid, _ := strconv.Atoi(filepath.Base(folder))
			pids = append(pids, pid)
		}
	}
	return pids
}

// until polls for what a process elsewhere brings about.
func until(done func() bool) error {
	for deadline := time.Now().Add(patience); !done(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			return fmt.Errorf("%v have gone by", patience)
		}
	}
	return nil
}

func command(name string) func(*testscript.TestScript, bool, []string) {
	return func(ts *testscript.TestScript, neg bool, args []string) {
		if err := ts.Exec(name, args...); (err != nil) != neg {
			ts.Fatalf("%s %s: %v", name, strings.Join(args, " "), err)
		}
	}
}

func exits(ts *testscript.TestScript, neg bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want || neg {
		ts.Fatalf("exit status %d, want %d", got, want)
	}
}

// imageServer is a registry that may ask for a password, and may lie.
type imageServer struct {
	honest http.Handler
	login  string // NAME:PASS, "" for nobody's

	mu   sync.Mutex
	lies string // repository whose blobs are changed
}

func (s *imageServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if s.login != "" && !known(w, r, s.login) {
		return
	}
	s.mu.Lock()
	lies := s.lies != "" && r.Method == http.MethodGet && strings.HasPrefix(r.URL.Path, "/v2/"+s.lies+"/blobs/")
	s.mu.Unlock()
	if !lies {
		s.honest.ServeHTTP(w, r)
		return
	}
	kept := httptest.NewRecorder()
	s.honest.ServeHTTP(kept, r)
	body := kept.Body.Bytes()
	body[len(body)-1] ^= 1
	for key, values := range kept.Header() {
		w.Header()[key] = values
	}
	w.WriteHeader(kept.Code)
	_, _ = w.Write(body)
}

// imagesKey is where a script's values hold its imageServer.
type imagesKey struct{}

// known asks for a password, and throws a wrong one back, in red.
func known(w http.ResponseWriter, r *http.Request, login string) bool {
	name, pass, _ := r.BasicAuth()
	if name+":"+pass == login {
		return true
	}
	w.Header().Set("WWW-Authenticate", `Basic realm="kmo"`)
	http.Error(w, "\x1b[31mwho are you, "+r.Header.Get("Authorization")+", "+name+" "+pass+"?", http.StatusUnauthorized)
	return false
}

// serveGit is Git's own server behind a password.
func serveGit(ts *testscript.TestScript, _ bool, args []string) {
	folder, err := exec.Command("git", "--exec-path").Output()
	ts.Check(err)
	backend := &cgi.Handler{Path: filepath.Join(strings.TrimSpace(string(folder)), "git-http-backend"), Stderr: io.Discard,
		Env: []string{"GIT_PROJECT_ROOT=" + ts.Getenv("WORK"), "GIT_HTTP_EXPORT_ALL=1", "HOME=" + ts.Getenv("HOME"), "REMOTE_USER=kmo"}}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if known(w, r, args[0]) {
			backend.ServeHTTP(w, r)
		}
	}))
	ts.Defer(server.Close)
	ts.Setenv("GITSERVER", server.URL)
}

func serveRegistry(ts *testscript.TestScript, _ bool, args []string) {
	images := ts.Value(imagesKey{}).(*imageServer)
	images.login = strings.Join(args, "")
	server := httptest.NewServer(images)
	ts.Defer(server.Close)
	ts.Setenv("REGISTRY", server.Listener.Addr().String())
}

func flip(ts *testscript.TestScript, _ bool, args []string) {
	images := ts.Value(imagesKey{}).(*imageServer)
	images.mu.Lock()
	defer images.mu.Unlock()
	images.lies = strings.Join(args, "")
}

// askStatus runs 'kmo status -o json'.
func askStatus(ts *testscript.TestScript) (Status, string) {
	cmd := exec.Command(ts.Getenv("KMO"), "status", "-o", "json")
	cmd.Env = []string{"KMO_CONFIG=" + ts.Getenv("KMO_CONFIG"), "KMO_STATE=" + ts.Getenv("KMO_STATE"), "PATH=" + ts.Getenv("PATH")}
	out, err := cmd.Output()
	var s Status
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && len(out) == 0 {
		return s, string(exit.Stderr)
	}
	ts.Check(json.Unmarshal(out, &s))
	return s, string(out)
}

func await(ts *testscript.TestScript, _ bool, args []string) {
	want, pattern := reconciler.Outcome(args[0]), regexp.MustCompile(strings.Join(args[1:], ""))
	head := ""
	if out, err := exec.Command("git", "-C", filepath.Join(ts.Getenv("WORK"), "site.git"), "rev-parse", "main").Output(); err == nil {
		head = strings.TrimSpace(string(out))
	}
	var said string
	err := until(func() bool {
		var s Status
		s, said = askStatus(ts)
		if head == "" {
			head = s.Record.Head
		}
		rec := s.Record
		if want == reconciler.Reverted && len(args) == 1 { // the head will have moved to the revert
			return rec.Outcome == want && rec.Good == rec.Head && len(rec.Bad) > 0 && rec.Bad[0].Commit == head
		}
		idle := slices.ContainsFunc(s.Workloads, func(have reconciler.Have) bool { return have.State != backends.Running })
		return rec.Outcome == want && rec.Trying == "" && rec.Head == head && pattern.MatchString(rec.Reason) && !(idle && want == reconciler.Converged)
	})
	_, _ = io.WriteString(ts.Stdout(), said)
	if err != nil {
		ts.Fatalf("%s of %s is not %v: %v", head, want, pattern, err)
	}
}

func awaitStatus(ts *testscript.TestScript, neg bool, args []string) {
	pattern := regexp.MustCompile(args[0])
	var said string
	err := until(func() bool {
		_, said = askStatus(ts)
		return pattern.MatchString(said) != neg
	})
	_, _ = io.WriteString(ts.Stdout(), said)
	ts.Check(err)
}

func get(ts *testscript.TestScript, _ bool, args []string) {
	s, _ := askStatus(ts)
	at := slices.IndexFunc(s.Workloads, func(have reconciler.Have) bool { return have.Unit() == args[0] && len(have.Addresses) > 0 })
	if at < 0 {
		ts.Fatalf("%s has no address", args[0])
	}
	var response *http.Response
	var err error
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		response, err = http.Get("http://" + s.Workloads[at].Addresses[0].Address + args[1])
		if !errors.Is(err, syscall.ECONNREFUSED) || time.Now().After(deadline) { // who has just been started does not listen yet
			break
		}
	}
	ts.Check(err)
	defer func() { _ = response.Body.Close() }()
	body, err := io.ReadAll(response.Body)
	ts.Check(err)
	_, _ = fmt.Fprintf(ts.Stdout(), "%s\n%s", response.Status, body)
}

func capture(ts *testscript.TestScript, _ bool, args []string) {
	found := regexp.MustCompile("(?m)" + args[1]).FindStringSubmatch(ts.ReadFile("stdout"))
	if len(found) != 2 {
		ts.Fatalf("%s: nothing of what was printed matches", args[1])
	}
	ts.Setenv(args[0], found[1])
}

func fill(ts *testscript.TestScript, _ bool, args []string) {
	to := ts.MkAbs(args[1])
	ts.Check(os.MkdirAll(filepath.Dir(to), 0o755))
	ts.Check(os.WriteFile(to, []byte(os.Expand(ts.ReadFile(args[0]), ts.Getenv)), 0o644))
}

func alive(ts *testscript.TestScript, neg bool, args []string) {
	pid, err := strconv.Atoi(args[0])
	ts.Check(err)
	if running(pid) == neg {
		ts.Fatalf("process %d: running %v", pid, !neg)
	}
}

// running says whether a process is there and has not ended: one that nobody has waited for yet has.
func running(pid int) bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, _ := strings.Cut(string(text), ") ")
	return err == nil && !strings.HasPrefix(rest, "Z") && !strings.HasPrefix(rest, "X")
}

// loopback looks at every socket of the agent and of what it started, workloads apart.
func loopback(ts *testscript.TestScript, _ bool, _ []string) {
	b, err := builds()
	ts.Check(err)
	pids := processesOf(b, ts.Getenv("KMO_STATE"), "")
	if len(pids) < 2 {
		ts.Fatalf("processes %v; want the agent and a plugin", pids)
	}
	if len(listening(ts, os.Getpid())) == 0 {
		ts.Fatalf("this very process listens, with the registry, and is not seen to") // so the look below can fail
	}
	for _, pid := range pids {
		if ports := listening(ts, pid); len(ports) > 0 {
			ts.Fatalf("process %d listens on %v", pid, ports)
		}
	}
	for _, path := range []string{ts.Getenv("KMO_STATE"), filepath.Join(ts.Getenv("KMO_STATE"), "agent.sock"), filepath.Join(ts.Getenv("KMO_STATE"), "plugins")} {
		found, err := os.Stat(path)
		ts.Check(err)
		if found.Mode().Perm()&0o077 != 0 {
			ts.Fatalf("%s is %v; want it for its owner alone", path, found.Mode())
		}
	}
}

// listening are the addresses on which a process takes connections or datagrams, as the kernel writes them.
func listening(ts *testscript.TestScript, pid int) (addresses []string) {
	sockets := map[string]bool{}
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	ts.Check(err)
	for _, file := range files {
		if to, err := os.Readlink(file); err == nil && strings.HasPrefix(to, "socket:[") {
			sockets[strings.Trim(to, "socket:[]")] = true
		}
	}
	for _, kind := range []string{"tcp", "tcp6", "udp", "udp6", "raw", "raw6"} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, kind))
		ts.Check(err)
		for _, line := range strings.Split(string(text), "\n")[1:] {
			fields := strings.Fields(line) // sl local remote st … inode is the tenth
			if len(fields) > 9 && sockets[fields[9]] && (!strings.HasPrefix(kind, "tcp") || fields[3] == "0A") {
				addresses = append(addresses, kind+" "+fields[1])
			}
		}
	}
	return addresses
}
