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
	"slices"
	"time"

	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"github.com/hashicorp/go-plugin/runner"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/plugin/wire"
	"github.com/kindos/kmo/policy/refusal"
)

const (
	pluginName = "backend" // the one thing a plugin of ours has to offer
	plainPath  = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	maxDir     = 65 // bytes of Options.Dir; the path of a unix socket has at most 107
)

// The times of a plugin.
const (
	lookTime  = 30 * time.Second // for Fingerprint and Observe
	workTime  = 15 * time.Minute // for Apply, Remove and Exec, which run hooks; callers ask for less
	pingTime  = 2 * time.Second  // for a sign of life from a plugin whose caller gave up
	stopTime  = 2 * time.Second  // from Close to the kill
	firstWait = 200 * time.Millisecond
	longWait  = 30 * time.Second // between two starts of a plugin that keeps dying
	wellTime  = time.Minute      // a plugin that lived so long begins anew with firstWait
)

// Options says which plugin, and what it gets.
type Options struct {
	Name  string   // of the backend it must be
	Cmd   []string // of a plugin that is part of this program: argv, argv[0] a path
	Found *Found   // of any other: what Find returned
	Env   []string // NAME=value, what the plugin may know beside the plain environment
	Dir   string   // a folder of our own, 0700, for sockets and temporary files; made if missing
	// Memory is how many bytes the plugin may have resident before it is killed; 0 means 1 GiB, less means no bound.
	Memory int64
	// StartTime is how long the plugin may take to be ready; 0 means 10 s.
	StartTime time.Duration
	Logger    *slog.Logger // nil for none
}

// Client is a backend in a plugin's process. It starts the process again when it died, after a pause that grows; calls within
// the pause fail at once. It never finds a process again that it did not start itself.
type Client struct {
	options Options
	now     func() time.Time
	busy    chan struct{} // holds one token: whoever has it may change the fields below
	present *session
	deaths  int       // in a row
	wait    time.Time // no start before
	last    string    // how the last one ended
	closed  bool
}

var (
	_ backends.Backend = (*Client)(nil)
	_ backends.Execer  = (*Client)(nil)
)

// session is one process of the plugin.
type session struct {
	remote *remote
	health grpc_health_v1.HealthClient
	proc   *process
	lines  *lineLog
	client *goplugin.Client
	since  time.Time

	address string // of its socket
}

// Open starts the plugin and returns it once it is ready to be asked. Both values may be set: a plugin that has not started and may another time is
// returned with the reason, and each call tries that again. It is nil if it is refused, or ctx has ended.
func Open(ctx context.Context, options Options) (*Client, error) {
	if (len(options.Cmd) == 0) == (options.Found == nil) {
		return nil, errors.New("plugin options: one of Cmd and Found is needed")
	}
	if options.Memory == 0 {
		options.Memory = 1 << 30
	}
	if options.StartTime == 0 {
		options.StartTime = 10 * time.Second
	}
	if options.Logger == nil {
		options.Logger = slog.New(slog.DiscardHandler)
	}
	if err := privateDir(options.Dir); err != nil {
		return nil, err
	}
	clearOld(options.Dir)
	c := &Client{options: options, now: time.Now, busy: make(chan struct{}, 1)}
	_, err := c.session(ctx)
	if err != nil && (refusal.Of(err) != nil || ctx.Err() != nil) {
		return nil, err
	}
	return c, err
}

// Close ends the plugin's process. Workloads go on.
func (c *Client) Close() error {
	c.busy <- struct{}{}
	defer func() { <-c.busy }()
	c.closed = true
	if c.present != nil {
		c.present.close()
		c.present = nil
	}
	return nil
}

// Fingerprint implements backends.Backend.
func (c *Client) Fingerprint(ctx context.Context) (able backends.Fingerprint, err error) {
	err = c.call(ctx, lookTime, func(ctx context.Context, r *remote) (err error) {
		able, err = r.Fingerprint(ctx)
		return err
	})
	return able, err
}

// Observe implements backends.Backend.
func (c *Client) Observe(ctx context.Context) (list []backends.Status, err error) {
	err = c.call(ctx, lookTime, func(ctx context.Context, r *remote) (err error) {
		list, err = r.Observe(ctx)
		return err
	})
	return list, err
}

// Apply implements backends.Backend.
func (c *Client) Apply(ctx context.Context, w backends.Workload) error {
	return c.call(ctx, workTime, func(ctx context.Context, r *remote) error { return r.Apply(ctx, w) })
}

// Remove implements backends.Backend.
func (c *Client) Remove(ctx context.Context, name string) error {
	return c.call(ctx, workTime, func(ctx context.Context, r *remote) error { return r.Remove(ctx, name) })
}

// Exec implements backends.Execer. A plugin whose backend is no Execer answers with a *FeatureError.
func (c *Client) Exec(ctx context.Context, name string, argv []string) (status int, output []byte, err error) {
	err = c.call(ctx, workTime, func(ctx context.Context, r *remote) (err error) {
		status, output, err = r.Exec(ctx, name, argv)
		return err
	})
	return status, output, err
}

// Logs implements backends.Backend. The log ends with the plugin's process, with an error.
func (c *Client) Logs(ctx context.Context, name string, options backends.LogOptions) (io.ReadCloser, error) {
	s, err := c.session(ctx)
	if err != nil {
		return nil, err
	}
	slow := time.AfterFunc(lookTime, func() { s.proc.kill(fmt.Sprintf("it gave no log in %v", lookTime)) })
	defer slow.Stop()
	log, err := s.remote.Logs(ctx, name, options)
	if err != nil {
		return nil, c.judge(ctx, s, err)
	}
	return &judgedLog{log, func(err error) error { return c.judge(ctx, s, err) }}, nil
}

// judgedLog is a log whose errors are judged like those of a call.
type judgedLog struct {
	io.ReadCloser
	judge func(error) error
}

func (l *judgedLog) Read(p []byte) (int, error) {
	n, err := l.ReadCloser.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = l.judge(err)
	}
	return n, err
}

// call asks the present process, within a bound.
func (c *Client) call(ctx context.Context, bound time.Duration, do func(context.Context, *remote) error) error {
	s, err := c.session(ctx)
	if err != nil {
		return err
	}
	bounded, cancel := context.WithTimeoutCause(ctx, bound, fmt.Errorf("no answer in %v: %w", bound, context.DeadlineExceeded))
	defer cancel()
	err = do(bounded, s.remote)
	if err != nil && bounded.Err() != nil && ctx.Err() == nil {
		s.proc.kill(fmt.Sprintf("it gave no answer in %v", bound))
	}
	return c.judge(ctx, s, err)
}

// judge ends a process that is not to be talked to any more, and says how it ended.
func (c *Client) judge(ctx context.Context, s *session, err error) error {
	var broken *brokenError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &broken):
		if !broken.gone || !s.ended(pingTime/4) {
			s.proc.kill("it does not keep to the protocol")
			s.ended(stopTime)
		}
		return fmt.Errorf("plugin %s: %w; it has ended: %s", c.options.Name, broken.err, s.epitaph())
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		go s.ping()
	}
	return err
}

// ping kills a process that gives no sign of life.
func (s *session) ping() {
	ctx, cancel := context.WithTimeout(context.Background(), pingTime)
	defer cancel()
	if _, err := s.health.Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: goplugin.GRPCServiceName}); err != nil {
		s.proc.kill(fmt.Sprintf("it gave no sign of life in %v", pingTime))
	}
}

// ended waits for the process to end.
func (s *session) ended(within time.Duration) bool {
	select {
	case <-s.proc.done:
		return true
	case <-time.After(within):
		return false
	}
}

// epitaph is how the process ended.
func (s *session) epitaph() string {
	s.proc.mu.Lock()
	ended := s.proc.ended
	s.proc.mu.Unlock()
	if tail := s.lines.tail(); tail != "" {
		ended += "; its last words: " + tail
	}
	return ended
}

func (s *session) close() {
	grace := time.AfterFunc(stopTime, func() { s.proc.kill("it did not end when it was told to") })
	defer grace.Stop()
	s.client.Kill()
	s.proc.forget()
}

// session returns the present process, or starts one if there is none and the pause is over.
func (c *Client) session(ctx context.Context) (*session, error) {
	select {
	case c.busy <- struct{}{}:
		defer func() { <-c.busy }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if c.closed {
		return nil, fmt.Errorf("plugin %s is closed", c.options.Name)
	}
	if c.present != nil {
		select {
		case <-c.present.proc.done:
			c.bury(c.present)
		default:
			return c.present, nil
		}
	}
	if left := c.wait.Sub(c.now()); left > 0 {
		return nil, fmt.Errorf("plugin %s has ended %d times: %s; started again in %v", c.options.Name, c.deaths, c.last, left.Round(time.Millisecond))
	}
	s, err := c.start(ctx)
	if err != nil {
		if refusal.Of(err) == nil && ctx.Err() == nil {
			c.mourn(0, err.Error())
		}
		return nil, fmt.Errorf("plugin %s: %w", c.options.Name, err)
	}
	c.present = s
	return s, nil
}

// bury clears what is left of a process that ended.
func (c *Client) bury(s *session) {
	s.close()
	c.present = nil
	c.mourn(c.now().Sub(s.since), s.epitaph())
	c.options.Logger.Warn("plugin ended", "backend", c.options.Name, "err", c.last)
}

// mourn sets the pause before the next start: none after the first death, then twice as long each time.
func (c *Client) mourn(lived time.Duration, how string) {
	if lived > wellTime {
		c.deaths = 0
	}
	c.deaths++
	c.last = how
	if c.deaths > 1 {
		c.wait = c.now().Add(min(longWait, firstWait<<min(c.deaths-2, 10)))
	}
}

// start starts a process and shakes hands with it.
func (c *Client) start(ctx context.Context) (_ *session, err error) {
	program, file, err := c.program()
	if err != nil {
		return nil, err
	}
	if file != nil {
		defer file.Close()
	}
	say := func(level slog.Level, line string) {
		c.options.Logger.Log(context.Background(), level, line, "backend", c.options.Name)
	}
	s := &session{since: c.now(), lines: &lineLog{say: say}, proc: newProcess(c.options.Memory)}
	config := c.config(s, program)
	s.client = goplugin.NewClient(config)
	deadline, cancel := context.WithTimeoutCause(ctx, c.options.StartTime, fmt.Errorf("not ready in %v", c.options.StartTime))
	defer cancel()
	stop := context.AfterFunc(deadline, func() { s.proc.kill(context.Cause(deadline).Error()) })
	defer func() {
		if !stop() && err == nil {
			err = context.Cause(deadline)
		}
		if err != nil {
			s.proc.kill("it did not start well")
			s.close()
			err = s.startError(deadline, err)
		}
	}()
	address, err := s.client.Start()
	if err != nil {
		return nil, err
	}
	s.address = address.String()
	if config.TLSConfig == nil || config.TLSConfig.RootCAs == nil {
		return nil, &refusal.Error{Code: codeForeign, Subject: "plugin handshake", Got: "no certificate", Want: "the certificate of this one process"}
	}
	protocol, err := s.client.Client()
	if err != nil {
		return nil, err
	}
	raw, err := protocol.Dispense(pluginName)
	if err != nil {
		return nil, err
	}
	conn, ok := raw.(grpc.ClientConnInterface)
	if !ok {
		return nil, fmt.Errorf("the dispenser gave %T, want a connection", raw)
	}
	s.remote = &remote{name: c.options.Name, wire: wire.NewBackendClient(conn)}
	s.health = grpc_health_v1.NewHealthClient(conn)
	_, err = s.health.Check(deadline, &grpc_health_v1.HealthCheckRequest{Service: goplugin.GRPCServiceName})
	return s, err
}

// startError says why a process did not come to be ready.
func (s *session) startError(deadline context.Context, err error) error {
	if r := refusal.Of(err); r != nil {
		return r
	}
	if deadline.Err() != nil {
		err = context.Cause(deadline)
	}
	text := "starting: " + line(err.Error())
	if tail := s.lines.tail(); tail != "" {
		text += "; its last words: " + tail
	}
	if ctxErr := context.Cause(deadline); errors.Is(ctxErr, context.Canceled) || errors.Is(ctxErr, context.DeadlineExceeded) {
		return &saidError{text: text, kind: ctxErr}
	}
	return errors.New(text)
}

// program is the command that is to be run. The file, if there is one, must stay open until it runs.
func (c *Client) program() (cmd *exec.Cmd, file *os.File, err error) {
	if c.options.Found == nil {
		return &exec.Cmd{Path: c.options.Cmd[0], Args: c.options.Cmd, Dir: "/"}, nil, nil
	}
	file, err = c.options.Found.open()
	if err != nil {
		return nil, nil, err
	}
	cmd = &exec.Cmd{Args: []string{c.options.Found.Path}, Dir: "/"}
	runFile(cmd, file)
	return cmd, file, nil
}

// config is go-plugin's, with our own runner: a plain environment, a group of its own, one folder for the socket.
func (c *Client) config(s *session, program *exec.Cmd) *goplugin.ClientConfig {
	run := func(_ hclog.Logger, cmd *exec.Cmd, dir string) (runner.Runner, error) {
		s.proc.dir, s.proc.cmd = dir, program
		program.Env = append(cmd.Env, "PATH="+plainPath, "TMPDIR="+dir)
		program.Env = append(program.Env, c.options.Env...)
		return s.proc, nil
	}
	return &goplugin.ClientConfig{
		HandshakeConfig:  handshake(),
		Plugins:          goplugin.PluginSet{pluginName: &dispenser{}},
		AllowedProtocols: []goplugin.Protocol{goplugin.ProtocolGRPC},
		RunnerFunc:       run,
		AutoMTLS:         true,
		SkipHostEnv:      true,
		StartTimeout:     c.options.StartTime,
		UnixSocketConfig: &goplugin.UnixSocketConfig{TempDir: c.options.Dir},
		Logger:           hclog.NewNullLogger(),
		Stderr:           s.lines,
		SyncStdout:       s.proc.floods.writer(s.lines),
		SyncStderr:       s.proc.floods.writer(s.lines),
		GRPCDialOptions: []grpc.DialOption{
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return s.proc.dial(ctx, s.address) }),
			grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)),
		},
	}
}

// dispenser joins the service to go-plugin's server and client.
type dispenser struct {
	goplugin.NetRPCUnsupportedPlugin
	backend backends.Backend // on the plugin's side
}

// GRPCServer registers the service.
func (d *dispenser) GRPCServer(_ *goplugin.GRPCBroker, server *grpc.Server) error {
	wire.RegisterBackendServer(server, &served{backend: d.backend})
	return nil
}

// GRPCClient returns the connection.
func (d *dispenser) GRPCClient(_ context.Context, _ *goplugin.GRPCBroker, conn *grpc.ClientConn) (any, error) {
	return conn, nil
}

// clearOld removes what an agent that was killed has left: folders older than a minute whose socket nobody listens on.
func clearOld(dir string) {
	old, _ := filepath.Glob(filepath.Join(dir, "plugin-dir*")) // the pattern is good
	for _, one := range old {
		found, err := os.Lstat(one)
		if err != nil || !found.IsDir() || time.Since(found.ModTime()) < time.Minute {
			continue
		}
		sockets, _ := filepath.Glob(filepath.Join(one, "plugin*")) // the pattern is good
		if !slices.ContainsFunc(sockets, answers) {
			os.RemoveAll(one) //nolint:errcheck // it is only in the way
		}
	}
}

func answers(socket string) bool {
	conn, err := net.DialTimeout("unix", socket, time.Second)
	if err == nil {
		conn.Close()
	}
	return err == nil
}

// privateDir makes a folder that is nobody else's, or makes sure that it is.
func privateDir(dir string) error {
	if !filepath.IsAbs(dir) || len(dir) > maxDir {
		return fmt.Errorf("plugin folder %q: want an absolute path of at most %d bytes, or a socket in it has no place", dir, maxDir)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("plugin folder: %v", err)
	}
	found, err := os.Lstat(dir)
	if err != nil {
		return fmt.Errorf("plugin folder: %v", err)
	}
	if !found.IsDir() || found.Mode().Perm() != 0o700 {
		return fmt.Errorf("plugin folder %s: it is %v, want a folder with mode drwx------", dir, found.Mode())
	}
	return nil
}
