package plugin

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/plugin/wire"
	"github.com/kindos/kmo/policy/refusal"
)

func TestOpen(t *testing.T) {
	state := t.TempDir()
	c := open(t, options(t, "fake", state))
	print, err := c.Fingerprint(t.Context())
	if err != nil || print.Backend != "fake" || !print.Has(backends.Exec) {
		t.Errorf("fingerprint %+v, error %v", print, err)
	}
	if err := c.Apply(t.Context(), workload("relay-1")); err != nil {
		t.Fatal(err)
	}
	pid := c.present.proc.pid
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	dead(t, pid)
	if _, err := c.Observe(t.Context()); err == nil {
		t.Error("a closed client answers")
	}
	again := open(t, options(t, "fake", state))
	list, err := again.Observe(t.Context())
	if err != nil || len(list) != 1 || list[0].Name != "relay-1" {
		t.Errorf("a new plugin process sees %+v, error %v; want relay-1", list, err)
	}
}

func TestOpenRefusesBadFolders(t *testing.T) {
	open := shortDir(t)
	if err := os.Chmod(open, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"", "relative", "/" + strings.Repeat("long/", 20), open} {
		o := options(t, "fake", t.TempDir())
		o.Dir = dir
		if c, err := Open(t.Context(), o); err == nil {
			c.Close()
			t.Errorf("folder %q: no error", dir)
		}
	}
	if _, err := Open(t.Context(), Options{Dir: open}); err == nil {
		t.Error("neither Cmd nor Found: no error")
	}
}

// TestBadAnswers: whatever a plugin does, the call returns an error soon, and the process is gone with all its group.
func TestBadAnswers(t *testing.T) {
	tests := []struct {
		name    string
		mode    []string
		within  time.Duration // of the caller
		memory  int64
		refused bool
		says    string
	}{
		{"U-42 hangs", []string{"hang"}, 300 * time.Millisecond, 0, false, "deadline"},
		{"U-42 stopped", []string{"freeze"}, 300 * time.Millisecond, 0, false, "deadline"},
		{"U-42 eats memory", []string{"eat"}, time.Minute, 200 << 20, false, "MiB of memory, more than 200 MiB"},
		{"U-42 floods stderr", []string{"flood"}, time.Minute, 0, false, "it wrote more than 16 MiB"},
		{"U-42 returns 1 GB", []string{"raw", "gigabyte"}, time.Minute, -1, false, "larger than max"},
		{"U-42 answers garbage", []string{"raw", "noise"}, time.Minute, 0, false, "observe: Internal"},
		{"U-42 crashes", []string{"crash"}, time.Minute, 0, false, "it was the butler"},
		{"T71 answers another request", []string{"raw", "other id"}, time.Minute, 0, true, "request id"},
		{"T71 unsorted names", []string{"raw", "unsorted"}, time.Minute, 0, true, `workload "a" after "b"`},
		{"T71 one name twice", []string{"raw", "twice"}, time.Minute, 0, true, `workload "a" after "a"`},
		{"T71 no state of the contract", []string{"raw", "state"}, time.Minute, 0, true, `state "dancing?[2J"`},
		{"T71 no spec", []string{"raw", "spec"}, time.Minute, 0, true, "0 bytes"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			o := options(t, tt.mode...)
			o.Memory = tt.memory
			c := open(t, o)
			s := c.present
			ctx, cancel := context.WithTimeout(t.Context(), tt.within)
			defer cancel()
			_, err := c.Observe(ctx)
			if err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Fatalf("error %v, want one that says %q", err, tt.says)
			}
			if r := refusal.Of(err); (r != nil && r.Code == "E_PLUGIN") != tt.refused {
				t.Errorf("error %v: refused E_PLUGIN should be %t", err, tt.refused)
			}
			if len(err.Error()) > 4*maxText {
				t.Errorf("the error has %d bytes", len(err.Error()))
			}
			if tt.mode[0] != "hang" { // it still gives signs of life, so it is not ended for an impatient caller
				dead(t, s.proc.pid)
			}
		})
	}
}

func TestAnotherBackend(t *testing.T) {
	c := open(t, options(t, "raw", "good"))
	_, err := c.Fingerprint(t.Context())
	if r := refusal.Of(err); r == nil || r.Code != "E_PLUGIN" || !strings.Contains(err.Error(), `it is backend "another"`) {
		t.Errorf("error %v, want E_PLUGIN", err)
	}
}

// TestHangIsEnded: a plugin that gives no answer within our own bound is ended.
func TestHangIsEnded(t *testing.T) {
	c := open(t, options(t, "hang"))
	s := c.present
	err := c.call(t.Context(), 100*time.Millisecond, func(ctx context.Context, r *remote) error {
		_, err := r.Observe(ctx)
		return err
	})
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "no answer in 100ms") {
		t.Errorf("error %v, want no answer in 100ms", err)
	}
	dead(t, s.proc.pid)
}

// TestBadHandshakes: a plugin that does not begin well is no plugin.
func TestBadHandshakes(t *testing.T) {
	certificate := strings.Repeat("A", 100)
	tests := []struct {
		name string
		mode []string
		says string
	}{
		{"U-41 forged handshake, TCP", []string{"say", "1|1|tcp|127.0.0.1:80|grpc|\n"}, "E_PLUGIN: plugin handshake: tcp 127.0.0.1:80; want a unix socket in "},
		{"U-41 forged handshake, a socket elsewhere", []string{"say", "1|1|unix|/run/docker.sock|grpc|\n"}, "E_PLUGIN: plugin handshake: unix /run/docker.sock"},
		{"U-41 forged handshake, out of the folder", []string{"say", "1|1|unix|DIR/../x|grpc|\n"}, "E_PLUGIN: plugin handshake"},
		{"U-41 forged handshake, no socket", []string{"say", "1|1|unix|DIR/none|grpc|\n"}, "no such file"},
		{"U-41 forged handshake, another certificate", []string{"say", "1|1|unix|DIR/none|grpc|" + certificate + "\n"}, "starting"},
		{"U-41 forged handshake, net/rpc", []string{"say", "1|1|unix|DIR/none|netrpc|\n"}, "starting"},
		{"U-41 forged handshake, another protocol", []string{"say", "1|9|unix|DIR/none|grpc|\n"}, "version"},
		{"U-41 forged handshake, words", []string{"say", "\x1b[2Jhello\n"}, "Unrecognized remote plugin message: ?[2Jhello"},
		{"U-42 endless handshake", []string{"endless"}, "starting"},
		{"U-42 no handshake", []string{"say", ""}, "not ready in 1s"},
		{"U-41 another process answers", []string{"proxy", os.TempDir()}, "listens there"},
		{"it ends at once", []string{"die"}, "because of this"},
		{"it does not exist", nil, "no such file"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			o := options(t, tt.mode...)
			o.StartTime = time.Second
			if tt.mode == nil {
				o.Cmd = []string{"/nowhere/kmo"}
			}
			c, err := Open(t.Context(), o)
			if err == nil {
				c.Close()
				t.Fatal("no error")
			}
			if !strings.Contains(err.Error(), tt.says) {
				t.Errorf("error %v, want one that says %q", err, tt.says)
			}
			if strings.ContainsAny(err.Error(), "\n\x1b") || len(err.Error()) > 2*maxText {
				t.Errorf("the error is not fit to be shown: %q", err)
			}
		})
	}
}

// TestEnvironment: the plugin inherits nothing, so it sees no secret of the agent's.
func TestEnvironment(t *testing.T) { t.Run("U-36 U-41 environment not inherited", environment) }

func environment(t *testing.T) {
	t.Setenv("KMO_CANARY", "secret")
	o := options(t, "env")
	o.Env = []string{"KMO_STATE=/somewhere"}
	print, err := open(t, o).Fingerprint(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	given := false
	for _, pair := range print.Missing {
		name, _, _ := strings.Cut(pair, "=")
		given = given || pair == "KMO_STATE=/somewhere"
		if !strings.HasPrefix(name, "PLUGIN_") && name != "PATH" && name != "TMPDIR" && name != "KMO_PLUGIN" && name != "KMO_STATE" {
			t.Errorf("the plugin's environment holds %q", pair)
		}
	}
	if !given {
		t.Errorf("the plugin was not given KMO_STATE: %q", print.Missing)
	}
}

// TestGroup: the plugin's children end with it, even if they hold its output, and by its own end as well as by ours.
func TestGroup(t *testing.T) {
	for _, how := range []string{"close", "death"} {
		t.Run("U-42 group ends by "+how, func(t *testing.T) {
			c := open(t, options(t, "family"))
			print, err := c.Fingerprint(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			child, err := strconv.Atoi(print.Version)
			if err != nil || !alive(child) {
				t.Fatalf("child %q does not live", print.Version)
			}
			if how == "close" {
				c.Close()
			} else if err := syscall.Kill(c.present.proc.pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			dead(t, child)
		})
	}
}

// TestRestart: a plugin that died is started again, first at once, then after pauses that grow.
func TestRestart(t *testing.T) {
	c := open(t, options(t, "fake", t.TempDir()))
	now := time.Now()
	c.now = func() time.Time { return now }
	if err := c.Apply(t.Context(), workload("relay-1")); err != nil {
		t.Fatal(err)
	}
	die := func() {
		t.Helper()
		if err := syscall.Kill(c.present.proc.pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		<-c.present.proc.done
	}
	die()
	list, err := c.Observe(t.Context())
	if err != nil || len(list) != 1 {
		t.Fatalf("after a first death: %v, error %v", list, err)
	}
	for _, pause := range []time.Duration{200 * time.Millisecond, 400 * time.Millisecond, 800 * time.Millisecond} {
		die()
		_, err := c.Observe(t.Context())
		if err == nil || !strings.Contains(err.Error(), "started again in "+pause.String()) || refusal.Of(err) != nil {
			t.Fatalf("in the pause: error %v, want started again in %v", err, pause)
		}
		now = now.Add(pause)
		if _, err := c.Observe(t.Context()); err != nil {
			t.Fatalf("after the pause: %v", err)
		}
	}
	now = now.Add(2 * time.Minute)
	die()
	if _, err := c.Observe(t.Context()); err != nil {
		t.Errorf("after a long life: %v", err)
	}
}

// TestDeathInCall: the call in flight fails, with what the plugin said last; a log that was followed ends with an error.
func TestDeathInCall(t *testing.T) {
	c := open(t, options(t, "hang"))
	if err := c.Apply(t.Context(), workload("relay-1")); err != nil {
		t.Fatal(err)
	}
	log, err := c.Logs(t.Context(), "relay-1", backends.LogOptions{Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	failed := make(chan error, 2)
	go func() {
		_, err := c.Observe(t.Context())
		failed <- err
	}()
	go func() {
		_, err := log.Read(make([]byte, 1))
		failed <- err
	}()
	pid := c.present.proc.pid
	time.AfterFunc(100*time.Millisecond, func() { syscall.Kill(pid, syscall.SIGKILL) })
	for range 2 {
		if err := <-failed; err == nil || !strings.Contains(err.Error(), "signal: killed") || refusal.Of(err) != nil {
			t.Errorf("error %v, want an ordinary one that says signal: killed", err)
		}
	}
}

// TestStalePid: a process that is reaped is never signalled again, whoever has its number by then.
func TestStalePid(t *testing.T) { t.Run("go-plugin#320 a stale pid", stalePid) }

func stalePid(t *testing.T) {
	c := open(t, options(t, "fake", t.TempDir()))
	proc := c.present.proc
	syscall.Kill(proc.pid, syscall.SIGKILL)
	<-proc.done
	other := startSleep(t)
	proc.mu.Lock()
	proc.cmd.Process.Pid, proc.pid = other, other // as if the number had come to somebody else
	proc.mu.Unlock()
	proc.kill("by mistake")
	c.Close()
	if proc.why != "" || !alive(other) {
		t.Errorf("process %d, which is another by now, was killed", other)
	}
}

func startSleep(t *testing.T) int {
	t.Helper()
	sleep := exec.Command("/bin/sleep", "1000")
	sleep.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := sleep.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sleep.Process.Kill(); sleep.Wait() })
	return sleep.Process.Pid
}

// TestLeftovers: what an agent that was killed has left in the folder does not keep a plugin from starting.
func TestLeftovers(t *testing.T) {
	t.Run("nomad#5891 U-41 leftovers of an earlier agent", leftovers)
}

func leftovers(t *testing.T) {
	o := options(t, "fake", t.TempDir())
	old := filepath.Join(o.Dir, "plugin-dir1")
	if err := os.MkdirAll(old, 0o700); err != nil {
		t.Fatal(err)
	}
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(old, "plugin1")})
	if err != nil {
		t.Fatal(err)
	}
	listener.SetUnlinkOnClose(false)
	listener.Close()
	long := time.Now().Add(-time.Hour)
	if err := os.Chtimes(old, long, long); err != nil {
		t.Fatal(err)
	}
	open(t, o)
	if _, err := os.Stat(old); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the leftover socket is still there: %v", err)
	}
}

// TestAgentDies: nobody is left to talk to a plugin whose agent was killed, so it is killed too.
func TestAgentDies(t *testing.T) {
	dir := shortDir(t)
	agent := exec.Command(os.Args[0], "plugin", "agent", t.TempDir(), dir)
	said, err := agent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(said).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil || !alive(pid) {
		t.Fatalf("the agent's plugin is %q", line)
	}
	agent.Process.Kill()
	agent.Wait()
	dead(t, pid)
	os.RemoveAll(dir)
}

// TestStderr: the plugin's words become lines, bounded and fit to be shown.
func TestStderr(t *testing.T) {
	var log logged
	o := options(t, "chatter")
	o.Logger = log.logger()
	c := open(t, o)
	if _, err := c.Observe(t.Context()); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); !strings.Contains(log.String(), "line 1"); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("no line of the plugin was logged: %q", log.String())
		}
	}
	c.Close()
	text := log.String()
	if !strings.Contains(text, "?[2Jred?") || strings.Contains(text, "\x1b") {
		t.Errorf("control characters: %.200q", text)
	}
	if lines := strings.Count(text, "msg=\"line "); lines == 0 || lines > 3*maxLines {
		t.Errorf("%d of 1000 lines were logged, want some and at most %d a second", lines, maxLines)
	}
	for line := range strings.Lines(text) {
		if len(line) > maxLine+200 {
			t.Errorf("a line of %d bytes", len(line))
		}
	}
}

// TestStrangers: every listener of a plugin refuses whoever has not the agent's certificate.
func TestStrangers(t *testing.T) {
	t.Run("U-40 every listener wants the agent's certificate", strangers)
}

func strangers(t *testing.T) {
	c := open(t, options(t, "fake", t.TempDir()))
	paths := listeners(t, c.present.proc.pid)
	if len(paths) != 1 || filepath.Dir(paths[0]) != c.present.proc.dir {
		t.Fatalf("the plugin listens on %q, want one socket in %s", paths, c.present.proc.dir)
	}
	if found, err := os.Stat(filepath.Dir(paths[0])); err != nil || found.Mode().Perm() != 0o700 {
		t.Errorf("the socket's folder has mode %v, want 0700", found.Mode())
	}
	for name, with := range map[string]credentials.TransportCredentials{
		"no TLS":         insecure.NewCredentials(),
		"no certificate": credentials.NewTLS(&tls.Config{InsecureSkipVerify: true}),
	} {
		conn, err := grpc.NewClient("unix:"+paths[0], grpc.WithTransportCredentials(with))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		if _, err := wire.NewBackendClient(conn).Observe(ctx, &wire.ObserveRequest{}); err == nil {
			t.Errorf("a peer with %s is answered", name)
		}
	}
}

// listeners lists what a process listens on: unix sockets by path, others by family.
func listeners(t *testing.T, pid int) []string {
	t.Helper()
	inodes := map[string]bool{}
	handles, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	for _, handle := range handles {
		if to, err := os.Readlink(handle); err == nil && strings.HasPrefix(to, "socket:[") {
			inodes[strings.Trim(to, "socket:[]")] = true
		}
	}
	var paths []string
	for _, family := range []string{"unix", "tcp", "tcp6"} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, family))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			f := strings.Fields(line)
			switch {
			case family == "unix" && len(f) > 7 && f[3] == "00010000" && inodes[f[6]]:
				paths = append(paths, f[7])
			case family != "unix" && len(f) > 9 && f[3] == "0A" && inodes[f[9]]:
				paths = append(paths, family+" "+f[1])
			}
		}
	}
	return paths
}
