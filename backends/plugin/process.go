package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/kindos/kmo/policy/refusal"
)

// The bounds on a plugin's output.
const (
	maxLine   = 1 << 10          // bytes of a line that are kept
	maxLines  = 50               // lines a second
	maxFlood  = 16 << 20         // bytes in floodTime that end the process
	floodTime = 10 * time.Second // the time maxFlood counts for
	drainTime = time.Second      // for what a dead plugin has written before it died
)

// process is a plugin's process, a child of ours, in a process group of its own. It is killed by that handle alone, before it
// is reaped, so that no other process can have its number.
type process struct {
	cmd            *exec.Cmd
	dir            string // where its socket must be; removed in the end
	memory         int64  // resident bytes that end it
	stdout, stderr *os.File
	floods         *flood
	done           chan struct{} // closed when it is reaped

	mu     sync.Mutex
	pid    int // 0 until it runs
	reaped bool
	why    string // why it was killed, if it was
	ended  string // how it ended; set before done is closed
}

// newProcess is a process still without a command.
func newProcess(memory int64) *process {
	p := &process{memory: memory, done: make(chan struct{})}
	p.floods = &flood{excess: func() { p.kill(fmt.Sprintf("it wrote more than %d MiB in %v", maxFlood>>20, floodTime)) }}
	return p
}

// Start starts the process. Its thread stays locked until the process ended: Linux ties a child's life to the thread that made it.
func (p *process) Start(context.Context) error {
	theirs, err := p.pipes()
	if err != nil {
		return err
	}
	own(p.cmd)
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := p.cmd.Start()
		for _, end := range theirs {
			end.Close()
		}
		if err == nil {
			p.begin()
		}
		started <- err
		if err == nil {
			p.wait()
		}
	}()
	return <-started
}

// begin is the moment from which the process can be killed; it may have been wanted dead before.
func (p *process) begin() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pid = p.cmd.Process.Pid
	if p.why != "" {
		killGroup(p.cmd.Process)
	}
}

func (p *process) pipes() (theirs []*os.File, err error) {
	for _, pipe := range []struct {
		ours   **os.File
		theirs *io.Writer
	}{{&p.stdout, &p.cmd.Stdout}, {&p.stderr, &p.cmd.Stderr}} {
		r, w, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		*pipe.ours, *pipe.theirs = r, w
		theirs = append(theirs, w)
	}
	return theirs, nil
}

// wait returns when the process has ended and been reaped, its group with it.
func (p *process) wait() {
	stop := p.watch()
	err := reap(p)
	stop()
	p.mu.Lock()
	p.ended = "exit status 0"
	if err != nil {
		p.ended = err.Error()
	}
	if p.why != "" {
		p.ended = "killed: " + p.why
	}
	p.mu.Unlock()
	for _, pipe := range []*os.File{p.stdout, p.stderr} {
		pipe.SetReadDeadline(time.Now().Add(drainTime)) //nolint:errcheck // a pipe that somebody else still holds must not be waited for
	}
	close(p.done)
}

// watch kills the process when it uses more memory than it may.
func (p *process) watch() (stop func()) {
	ticker := time.NewTicker(time.Second)
	stopped := make(chan struct{})
	go func() {
		for {
			select {
			case <-stopped:
				return
			case <-ticker.C:
				used := resident(p.cmd.Process)
				if p.memory > 0 && used > p.memory {
					p.kill(fmt.Sprintf("it uses %d MiB of memory, more than %d MiB", used>>20, p.memory>>20))
				}
			}
		}
	}()
	return func() { ticker.Stop(); close(stopped) }
}

// forget lets go of what an ended process leaves on our side. Nobody reads its pipes any more.
func (p *process) forget() {
	for _, pipe := range []*os.File{p.stdout, p.stderr} {
		if pipe != nil {
			pipe.Close()
		}
	}
	if p.dir != "" {
		os.RemoveAll(p.dir) //nolint:errcheck // an empty folder of ours, or one with a dead socket
	}
}

// kill ends the process and its group, at once.
func (p *process) kill(why string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.reaped {
		return
	}
	if p.why == "" {
		p.why = why
	}
	if p.pid != 0 {
		killGroup(p.cmd.Process)
	}
}

// Kill is what go-plugin calls when the plugin did not end by itself.
func (p *process) Kill(context.Context) error {
	p.kill("it did not end when it was told to")
	return nil
}

// Wait returns when the process is reaped.
func (p *process) Wait(context.Context) error {
	<-p.done
	return nil
}

// Stdout is the handshake, and then nothing that matters.
func (p *process) Stdout() io.ReadCloser { return p.floods.reader(p.stdout) }

// Stderr is what the plugin has to say.
func (p *process) Stderr() io.ReadCloser { return p.floods.reader(p.stderr) }

// Name is the program's path.
func (p *process) Name() string { return p.cmd.Path }

// ID is the process's number.
func (p *process) ID() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pid == 0 {
		return ""
	}
	return strconv.Itoa(p.pid)
}

// Diagnose adds nothing to go-plugin's own words.
func (p *process) Diagnose(context.Context) string { return "" }

// PluginToHost accepts one address: a unix socket in the folder that was made for this process.
func (p *process) PluginToHost(network, address string) (string, string, error) {
	if network != "unix" || filepath.Dir(address) != p.dir {
		return "", "", &refusal.Error{
			Code: codeForeign, Subject: "plugin handshake", Got: refusal.Clip(network+" "+address, maxLine), Want: "a unix socket in " + p.dir,
		}
	}
	found, err := os.Lstat(address)
	if err == nil && found.Mode().Type() != os.ModeSocket {
		err = errors.New(address + " is no socket")
	}
	return network, address, err
}

// HostToPlugin is the same address: both see one file system.
func (p *process) HostToPlugin(network, address string) (string, string, error) {
	return network, address, nil
}

// dial connects to the plugin's socket and makes sure that it is this process which listens there.
func (p *process) dial(ctx context.Context, address string) (net.Conn, error) {
	conn, err := (&net.Dialer{}).DialUnix(ctx, "unix", nil, &net.UnixAddr{Name: address, Net: "unix"})
	if err != nil {
		return nil, err
	}
	if err := checkPeer(conn, p.cmd.Process.Pid); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return conn, nil
}

// flood counts what a plugin writes, by whatever way.
type flood struct {
	excess func()

	mu    sync.Mutex
	since time.Time
	bytes int
}

func (f *flood) add(n int) {
	f.mu.Lock()
	if now := time.Now(); now.Sub(f.since) > floodTime {
		f.since, f.bytes = now, 0
	}
	f.bytes += n
	over := f.bytes > maxFlood
	f.mu.Unlock()
	if over {
		f.excess()
	}
}

func (f *flood) reader(r io.ReadCloser) io.ReadCloser { return &metered{r, f} }

func (f *flood) writer(w io.Writer) io.Writer {
	return writerFunc(func(p []byte) (int, error) {
		f.add(len(p))
		return w.Write(p)
	})
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

type metered struct {
	io.ReadCloser
	flood *flood
}

// Read ends, like a closed pipe, where a dead plugin's pipe is still held by somebody else.
func (m *metered) Read(p []byte) (int, error) {
	n, err := m.ReadCloser.Read(p)
	m.flood.add(n)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = io.EOF
	}
	return n, err
}

// lineLog turns what is written to it into lines that fit a log, and keeps the last few for the error that may follow.
type lineLog struct {
	say func(level slog.Level, line string)

	mu      sync.Mutex
	partial []byte // at most maxLine
	last    []string
	fatal   string // the first line of a Go program's last words
	second  time.Time
	lines   int // in this second
	dropped int
}

// Write takes any piece of text.
func (l *lineLog) Write(text []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for rest := text; len(rest) > 0; {
		i := strings.IndexByte(string(rest[:min(len(rest), maxLine)]), '\n')
		if i < 0 {
			l.partial = append(l.partial, rest[:min(len(rest), maxLine-min(maxLine, len(l.partial)))]...)
			rest = rest[min(len(rest), maxLine):]
			continue
		}
		l.partial = append(l.partial, rest[:min(i, maxLine-min(maxLine, len(l.partial)))]...)
		l.flush()
		rest = rest[i+1:]
	}
	return len(text), nil
}

func (l *lineLog) flush() {
	line := refusal.Clip(strings.TrimSpace(string(l.partial)), maxLine)
	l.partial = l.partial[:0]
	if line == "" {
		return
	}
	if l.fatal == "" && isFatal(line) {
		l.fatal = line
	}
	l.last = append(l.last[max(0, len(l.last)-2):], refusal.Clip(line, 300))
	if now := time.Now(); now.Sub(l.second) > time.Second {
		if l.dropped > 0 {
			l.say(slog.LevelWarn, fmt.Sprintf("%d lines dropped", l.dropped))
		}
		l.second, l.lines, l.dropped = now, 0, 0
	}
	if l.lines++; l.lines > maxLines {
		l.dropped++
		return
	}
	l.say(levelOf(line), line)
}

// levelOf reads the level that package slog, in either of its forms, or the Go runtime wrote into a line.
func levelOf(line string) slog.Level {
	upper := strings.ToUpper(line[:min(len(line), 200)])
	for _, level := range []slog.Level{slog.LevelError, slog.LevelWarn} {
		if strings.Contains(upper, "LEVEL="+level.String()) || strings.Contains(upper, `"LEVEL":"`+level.String()+`"`) {
			return level
		}
	}
	if isFatal(line) {
		return slog.LevelError
	}
	return slog.LevelDebug
}

func isFatal(line string) bool {
	return strings.HasPrefix(line, "panic: ") || strings.HasPrefix(line, "fatal error: ")
}

// tail is the last lines, or what a Go program died of, for an error.
func (l *lineLog) tail() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fatal != "" {
		return l.fatal
	}
	return strings.Join(l.last, " | ")
}
