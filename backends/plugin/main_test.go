package plugin

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	goplugin "github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/fake"
	"github.com/kindos/kmo/backends/plugin/wire"
	"github.com/kindos/kmo/registry/merkle"
)

// TestMain makes this test's own binary the plugin, good or bad: "plugin MODE …" as its arguments.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "plugin" {
		act(os.Args[2], os.Args[3:])
		return
	}
	os.Exit(m.Run())
}

// act is the plugin's side.
func act(mode string, args []string) {
	switch mode {
	case "fake":
		Serve(&fake.Backend{Dir: args[0]}, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	case "hang":
		Serve(&fake.Backend{Before: func(_ context.Context, call, _ string) error {
			if call == "Observe" {
				select {} // whatever its context says
			}
			return nil
		}}, slog.Default())
	case "freeze", "crash", "eat", "flood", "chatter":
		Serve(&fake.Backend{Before: func(_ context.Context, call, _ string) error {
			if call == "Observe" {
				misbehave(mode)
			}
			return nil
		}}, slog.Default())
	case "env":
		Serve(&fake.Backend{Print: backends.Fingerprint{Backend: "fake", Missing: os.Environ()}}, slog.Default())
	case "family":
		child := exec.Command("/bin/sleep", "1000")
		child.Stdout, child.Stderr = os.Stdout, os.Stderr
		if err := child.Start(); err != nil {
			panic(err)
		}
		Serve(&fake.Backend{Print: backends.Fingerprint{Backend: "fake", Version: fmt.Sprint(child.Process.Pid)}}, slog.Default())
	case "proxy": // the one that shakes hands is another process
		child := exec.Command(os.Args[0], "plugin", "fake", args[0])
		child.Stdout, child.Stderr, child.Env = os.Stdout, os.Stderr, os.Environ()
		child.Run() //nolint:errcheck // it is killed
	case "raw":
		serveRaw(args[0])
	case "say": // a handshake as it should not be
		text := strings.ReplaceAll(args[0], "DIR", os.Getenv("PLUGIN_UNIX_SOCKET_DIR"))
		fmt.Print(text)
		time.Sleep(time.Hour)
	case "endless":
		for piece := bytes.Repeat([]byte("1|"), 1<<15); ; {
			if _, err := os.Stdout.Write(piece); err != nil {
				return
			}
		}
	case "die":
		fmt.Fprintln(os.Stderr, "because of this")
		os.Exit(3)
	case "agent": // an agent with a plugin, for the test that kills it
		c, err := Open(context.Background(), Options{Name: "fake", Cmd: []string{os.Args[0], "plugin", "fake", args[0]}, Dir: args[1]})
		if err != nil {
			panic(err)
		}
		fmt.Println(c.present.proc.pid)
		time.Sleep(time.Hour)
	}
}

func misbehave(mode string) {
	switch mode {
	case "freeze":
		syscall.Kill(os.Getpid(), syscall.SIGSTOP)
		time.Sleep(time.Hour)
	case "crash":
		panic("it was the butler")
	case "eat":
		var eaten [][]byte
		for {
			piece := make([]byte, 1<<20)
			for i := 0; i < len(piece); i += 4096 {
				piece[i] = 1
			}
			eaten = append(eaten, piece)
			time.Sleep(time.Duration(len(eaten)/200) * time.Millisecond)
		}
	case "flood":
		for piece := bytes.Repeat([]byte("water\n"), 1<<12); ; {
			os.Stderr.Write(piece)
		}
	case "chatter":
		fmt.Fprintln(os.Stderr, "\x1b[2Jred\x07", strings.Repeat("long", 1<<16))
		for i := range 1000 {
			fmt.Fprintln(os.Stderr, "line", i)
		}
	}
}

// serveRaw is a plugin that keeps to go-plugin but not to us.
func serveRaw(mode string) {
	goplugin.Serve(&goplugin.ServeConfig{
		HandshakeConfig: handshake(),
		Plugins:         goplugin.PluginSet{pluginName: &rawPlugin{mode: mode}},
		GRPCServer: func(options []grpc.ServerOption) *grpc.Server {
			if mode == "gigabyte" || mode == "noise" {
				options = append(options, grpc.ForceServerCodecV2(&rawCodec{encoding.GetCodecV2("proto"), mode}))
			}
			return grpc.NewServer(append(options, grpc.MaxSendMsgSize(1<<31-1))...)
		},
	})
}

type rawPlugin struct {
	goplugin.NetRPCUnsupportedPlugin
	wire.UnimplementedBackendServer
	mode string
}

func (p *rawPlugin) GRPCServer(_ *goplugin.GRPCBroker, server *grpc.Server) error {
	wire.RegisterBackendServer(server, p)
	return nil
}

func (p *rawPlugin) GRPCClient(context.Context, *goplugin.GRPCBroker, *grpc.ClientConn) (any, error) {
	return nil, nil
}

func (p *rawPlugin) Fingerprint(_ context.Context, r *wire.FingerprintRequest) (*wire.FingerprintAnswer, error) {
	return &wire.FingerprintAnswer{Id: r.Id, Backend: "another"}, nil
}

func (p *rawPlugin) Observe(_ context.Context, r *wire.ObserveRequest) (*wire.ObserveAnswer, error) {
	good := func(name string) *wire.Status {
		return &wire.Status{Name: name, Spec: make([]byte, 32), State: string(backends.Running)}
	}
	answer := &wire.ObserveAnswer{Id: r.Id, Workloads: []*wire.Status{good("a"), good("b")}}
	switch p.mode {
	case "other id":
		answer.Id++
	case "unsorted":
		slices.Reverse(answer.Workloads)
	case "twice":
		answer.Workloads[1].Name = "a"
	case "state":
		answer.Workloads[0].State = "dancing\x1b[2J"
	case "spec":
		answer.Workloads[0].Spec = nil
	}
	return answer, nil
}

// rawCodec answers Observe with bytes of its own.
type rawCodec struct {
	encoding.CodecV2
	mode string
}

func (c *rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	if _, ok := v.(*wire.ObserveAnswer); !ok {
		return c.CodecV2.Marshal(v)
	}
	if c.mode == "noise" {
		return mem.BufferSlice{mem.SliceBuffer("\xff\xff\xff\xff\x0fno message")}, nil
	}
	return mem.BufferSlice{mem.SliceBuffer(make([]byte, 1<<30))}, nil
}

// logged is a logger whose lines a test can read.
type logged struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func (l *logged) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// shortDir is a folder whose path leaves room for a socket's.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "kmo")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if left, _ := filepath.Glob(filepath.Join(dir, "plugin-dir*")); len(left) > 0 {
			t.Errorf("left behind: %q", left)
		}
		os.RemoveAll(dir)
	})
	return dir
}

// options are those of a plugin in this binary.
func options(t testing.TB, mode ...string) Options {
	return Options{Name: "fake", Cmd: append([]string{os.Args[0], "plugin"}, mode...), Dir: shortDir(t)}
}

func open(t testing.TB, o Options) *Client {
	t.Helper()
	c, err := Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func workload(name string) backends.Workload {
	return backends.Workload{
		Name: name, Unit: "relay", Spec: merkle.Digest{1}, Format: backends.Native, Image: backends.Image{Content: "imaginary"},
		Run: backends.Run{Grace: time.Second},
	}
}

// dead waits until a process is no more.
func dead(t *testing.T, pid int) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); alive(pid); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("process %d lives on", pid)
		}
	}
}

func alive(pid int) bool {
	if runtime.GOOS == "linux" {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err == nil && !strings.Contains(string(text), ") Z ")
	}
	return syscall.Kill(pid, 0) == nil
}
