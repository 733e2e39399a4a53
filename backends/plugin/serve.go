// Package plugin is the contract of package backends across a process.
//
// The plugin's side is one call, which returns when the agent lets go of it:
//
//	func main() { plugin.Serve(myBackend, nil) }
//
// The agent's side is [Open], whose [Client] is a backends.Backend like any other. It starts the plugin as a child, starts it
// again when it died, and ends it with Close, which no workload notices. The wire is hashicorp/go-plugin with gRPC
// (wire/backend.proto): a unix socket in a folder of the agent's own, and certificates made for this one process.
//
// What a plugin must know:
//
//   - Its environment is PATH, TMPDIR, what go-plugin needs, and what Options.Env gives; its stdin is empty.
//   - It may be a script. Then its interpreter reads it as /proc/self/fd/3, so it must stand alone.
//   - It is killed with its process group, and dies with the agent. What is to outlive it must be in a session of its own and
//     must not hold its stdout or stderr.
//   - What it writes to stderr becomes log lines of the agent: 1 KiB a line, 50 lines a second; more is counted and dropped.
//   - An error a caller may tell apart keeps its kind: ErrNotFound, *FeatureError, *StartError, *refusal.Error, the context's
//     errors. Any other keeps its text.
//
// What the agent does about a plugin that is not well: an answer that is larger than 16 MiB, answers something else than was
// asked, is no answer of the protocol or does not come within the bound of its method; more than 16 MiB of output in ten
// seconds; more resident memory than Options.Memory: each ends that process, with its group, and is an ordinary error of the
// call. A binary that is not what was pinned is refused, KT023, before it runs.
package plugin

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"

	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/plugin/wire"
)

// The bounds of the wire.
const (
	maxMessage = 16 << 20 // bytes of one message, either way
	maxChunk   = 32 << 10 // bytes of one piece of log
	maxOutput  = 64 << 10 // bytes of a command's output
	maxText    = 4 << 10  // bytes of any text for people: an error, a detail
)

//go:generate go -C internal/generate run . ../../wire backend.proto

// handshake is what makes a program ours to start. It is no secret and proves nothing; the certificates and the socket do.
func handshake() goplugin.HandshakeConfig {
	return goplugin.HandshakeConfig{ProtocolVersion: 1, MagicCookieKey: "KMO_PLUGIN", MagicCookieValue: "backend"}
}

// Serve offers a backend to the agent that started this process, and returns when that agent lets go of it. A process that was
// not started by an agent is told so on stderr and ends with status 1. A nil logger is slog.Default.
func Serve(b backends.Backend, logger *slog.Logger) {
	if logger == nil {
		logger = slog.Default()
	}
	lines := &lineLog{say: func(level slog.Level, line string) { logger.Log(context.Background(), level, line) }}
	goplugin.Serve(&goplugin.ServeConfig{
		HandshakeConfig: handshake(),
		Plugins:         goplugin.PluginSet{pluginName: &dispenser{backend: b}},
		Logger:          hclog.New(&hclog.LoggerOptions{Name: "plugin", Level: hclog.Warn, Output: lines}),
		GRPCServer: func(options []grpc.ServerOption) *grpc.Server {
			return grpc.NewServer(append(options, grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage))...)
		},
	})
}

// InProcess returns b as seen through the wire, without a process: for tests, so that what crosses the wire is what is tested.
func InProcess(b backends.Backend) (seen backends.Backend, hangUp func(), err error) {
	listener := bufconn.Listen(maxChunk)
	server := grpc.NewServer(grpc.MaxRecvMsgSize(maxMessage))
	wire.RegisterBackendServer(server, &served{backend: b})
	go server.Serve(listener) //nolint:errcheck // it ends with Stop
	conn, err := grpc.NewClient("passthrough:plugin", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
	if err != nil {
		server.Stop()
		return nil, nil, err
	}
	hangUp = func() {
		conn.Close() //nolint:errcheck // nothing is left to be lost
		server.Stop()
	}
	return &remote{wire: wire.NewBackendClient(conn)}, hangUp, nil
}

// served answers the wire from a backend.
type served struct {
	wire.UnimplementedBackendServer
	backend backends.Backend
}

func (s *served) Fingerprint(ctx context.Context, r *wire.FingerprintRequest) (*wire.FingerprintAnswer, error) {
	able, err := s.backend.Fingerprint(ctx)
	if err != nil {
		return nil, toWire(err)
	}
	answer := fromFingerprint(able)
	answer.Id = r.Id
	return answer, nil
}

func (s *served) Observe(ctx context.Context, r *wire.ObserveRequest) (*wire.ObserveAnswer, error) {
	list, err := s.backend.Observe(ctx)
	if err != nil {
		return nil, toWire(err)
	}
	answer := &wire.ObserveAnswer{Id: r.Id, Workloads: make([]*wire.Status, 0, len(list))}
	for i := range list {
		answer.Workloads = append(answer.Workloads, fromStatus(&list[i]))
	}
	return answer, nil
}

func (s *served) Apply(ctx context.Context, r *wire.ApplyRequest) (*wire.ApplyAnswer, error) {
	w, err := readWorkload(r.Workload)
	var able backends.Fingerprint
	if err == nil {
		able, err = s.backend.Fingerprint(ctx)
	}
	if err == nil {
		err = able.Admit(w) // so that no plugin served by this package can forget to
	}
	if err == nil {
		err = s.backend.Apply(ctx, w)
	}
	if err != nil {
		return nil, toWire(err)
	}
	return &wire.ApplyAnswer{Id: r.Id}, nil
}

func (s *served) Remove(ctx context.Context, r *wire.RemoveRequest) (*wire.RemoveAnswer, error) {
	if err := s.backend.Remove(ctx, r.Name); err != nil {
		return nil, toWire(err)
	}
	return &wire.RemoveAnswer{Id: r.Id}, nil
}

func (s *served) Logs(r *wire.LogsRequest, stream grpc.ServerStreamingServer[wire.LogsAnswer]) error {
	ctx := stream.Context()
	log, err := s.backend.Logs(ctx, r.Name, backends.LogOptions{Follow: r.Follow, Tail: int(r.Tail)})
	if err != nil {
		return toWire(err)
	}
	stop := context.AfterFunc(ctx, func() { log.Close() }) // wakes a reader that waits for more
	defer func() {
		if stop() {
			log.Close()
		}
	}()
	if err := stream.Send(&wire.LogsAnswer{Id: r.Id}); err != nil {
		return err
	}
	chunk := make([]byte, maxChunk)
	for {
		n, err := log.Read(chunk)
		if n > 0 {
			if err := stream.Send(&wire.LogsAnswer{Id: r.Id, Text: chunk[:n]}); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return toWire(err)
		}
	}
}

func (s *served) Exec(ctx context.Context, r *wire.ExecRequest) (*wire.ExecAnswer, error) {
	execer, ok := s.backend.(backends.Execer)
	if !ok {
		return nil, toWire(&backends.FeatureError{Feature: backends.Exec, Detail: "it runs no commands inside workloads"})
	}
	code, output, err := execer.Exec(ctx, r.Name, r.Argv)
	if err != nil {
		return nil, toWire(err)
	}
	return &wire.ExecAnswer{Id: r.Id, Status: int64(code), Output: output[:min(len(output), maxOutput)]}, nil
}

// toWire gives an error the form in which it travels.
func toWire(err error) error {
	code := codes.Unknown
	switch {
	case errors.Is(err, context.Canceled):
		code = codes.Canceled
	case errors.Is(err, context.DeadlineExceeded):
		code = codes.DeadlineExceeded
	}
	st := status.New(code, line(err.Error()))
	if fault := fromError(err); fault != nil {
		if detailed, err := st.WithDetails(fault); err == nil {
			st = detailed
		}
	}
	return st.Err()
}
