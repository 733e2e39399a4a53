package plugin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/plugin/wire"
	"github.com/kindos/kmo/policy/refusal"
)

// codeForeign is the refusal of an answer that is none to what was asked.
const codeForeign refusal.Code = "E_PLUGIN"

// remote is a backend at the other end of one connection.
type remote struct {
	name string // of the backend that was asked for; empty for any
	wire wire.BackendClient
	ids  atomic.Uint64
}

// brokenError says that this end of the wire is not to be talked to any more: it is gone, or does not keep to the protocol.
type brokenError struct {
	err  error
	gone bool // the connection was lost, so the process may be ending by itself
}

func (e *brokenError) Error() string { return e.err.Error() }
func (e *brokenError) Unwrap() error { return e.err }

// saidError is an error of the other side: its text, and what it is.
type saidError struct {
	text string
	kind error
}

func (e *saidError) Error() string { return e.text }
func (e *saidError) Unwrap() error { return e.kind }

// Fingerprint asks the plugin what it can do.
func (r *remote) Fingerprint(ctx context.Context) (backends.Fingerprint, error) {
	id := r.ids.Add(1)
	answer, err := r.wire.Fingerprint(ctx, &wire.FingerprintRequest{Id: id})
	if err = r.judge(ctx, "fingerprint", id, answer.GetId(), err); err != nil {
		return backends.Fingerprint{}, err
	}
	if r.name != "" && answer.Backend != r.name {
		return backends.Fingerprint{}, r.foreign("fingerprint", fmt.Sprintf("it is backend %q", refusal.Clip(answer.Backend, 100)), r.name)
	}
	return toFingerprint(answer), nil
}

// Observe asks the plugin for its workloads.
func (r *remote) Observe(ctx context.Context) ([]backends.Status, error) {
	id := r.ids.Add(1)
	answer, err := r.wire.Observe(ctx, &wire.ObserveRequest{Id: id})
	if err = r.judge(ctx, "observe", id, answer.GetId(), err); err != nil {
		return nil, err
	}
	list, err := toStatuses(answer.Workloads)
	if err != nil {
		return nil, r.foreign("observe", err.Error(), "workloads sorted by name, each with a spec of 32 bytes and a state of the contract")
	}
	return list, nil
}

// Apply has the plugin apply w.
func (r *remote) Apply(ctx context.Context, w backends.Workload) error {
	text, err := json.Marshal(w)
	if err != nil {
		return fmt.Errorf("workload %s: %v", w.Name, err)
	}
	id := r.ids.Add(1)
	answer, err := r.wire.Apply(ctx, &wire.ApplyRequest{Id: id, Workload: text})
	return r.judge(ctx, "apply", id, answer.GetId(), err)
}

// Remove has the plugin remove the workload.
func (r *remote) Remove(ctx context.Context, name string) error {
	id := r.ids.Add(1)
	answer, err := r.wire.Remove(ctx, &wire.RemoveRequest{Id: id, Name: name})
	return r.judge(ctx, "remove", id, answer.GetId(), err)
}

// Logs streams the workload's log from the plugin.
func (r *remote) Logs(ctx context.Context, name string, options backends.LogOptions) (io.ReadCloser, error) {
	ctx, cancel := context.WithCancel(ctx)
	id := r.ids.Add(1)
	stream, err := r.wire.Logs(ctx, &wire.LogsRequest{Id: id, Name: name, Follow: options.Follow, Tail: int64(options.Tail)})
	var answer *wire.LogsAnswer
	if err == nil {
		answer, err = stream.Recv()
	}
	if err = r.judge(ctx, "logs", id, answer.GetId(), err); err != nil {
		cancel()
		return nil, err
	}
	return &logStream{remote: r, ctx: ctx, cancel: cancel, id: id, stream: stream, rest: answer.Text}, nil
}

// Exec has the plugin run a command in the workload.
func (r *remote) Exec(ctx context.Context, name string, argv []string) (int, []byte, error) {
	id := r.ids.Add(1)
	answer, err := r.wire.Exec(ctx, &wire.ExecRequest{Id: id, Name: name, Argv: argv})
	if err = r.judge(ctx, "exec", id, answer.GetId(), err); err != nil {
		return 0, nil, err
	}
	return int(answer.Status), answer.Output[:min(len(answer.Output), maxOutput)], nil
}

// foreign is the refusal of an answer to something that was not asked.
func (r *remote) foreign(call, got, want string) error {
	return &brokenError{err: &refusal.Error{Code: codeForeign, Subject: strings.TrimSpace("plugin "+r.name) + ", answer to " + call, Got: got, Want: want}}
}

// judge says what came of a call: the error in the form in which the backend returned it, or what is wrong with the wire.
func (r *remote) judge(ctx context.Context, call string, asked, answered uint64, err error) error {
	if err == nil {
		if asked != answered {
			return r.foreign(call, fmt.Sprintf("request id %d", answered), fmt.Sprint(asked))
		}
		return nil
	}
	st := status.Convert(err)
	awaitDeadline(ctx, st.Code())
	if ctx.Err() != nil {
		return fmt.Errorf("%s: %w", call, context.Cause(ctx))
	}
	text := line(st.Message())
	for _, detail := range st.Details() {
		if fault, ok := detail.(*wire.Fault); ok {
			if kind := toError(fault); kind != nil {
				return &saidError{text: text, kind: kind}
			}
		}
	}
	switch st.Code() {
	case codes.Unknown:
		return errors.New(text)
	case codes.Canceled:
		return &saidError{text: text, kind: context.Canceled}
	case codes.DeadlineExceeded:
		return &saidError{text: text, kind: context.DeadlineExceeded}
	default:
		return &brokenError{err: fmt.Errorf("%s: %s: %s", call, st.Code(), text), gone: st.Code() == codes.Unavailable}
	}
}

// awaitDeadline waits for the caller's deadline where the other side, which has the same, was a little ahead of it.
func awaitDeadline(ctx context.Context, code codes.Code) {
	deadline, ok := ctx.Deadline()
	if ok && (code == codes.Canceled || code == codes.DeadlineExceeded) && time.Until(deadline) < 100*time.Millisecond {
		<-ctx.Done()
	}
}

// logStream is a log that arrives piece by piece.
type logStream struct {
	remote *remote
	ctx    context.Context // it is the stream's, and ends with Close
	cancel context.CancelFunc
	id     uint64
	stream grpc.ServerStreamingClient[wire.LogsAnswer]
	rest   []byte
}

func (l *logStream) Read(p []byte) (int, error) {
	for len(l.rest) == 0 {
		answer, err := l.stream.Recv()
		if errors.Is(err, io.EOF) {
			return 0, io.EOF
		}
		if err = l.remote.judge(l.ctx, "logs", l.id, answer.GetId(), err); err != nil {
			l.cancel()
			return 0, err
		}
		l.rest = answer.Text
	}
	n := copy(p, l.rest)
	l.rest = l.rest[n:]
	return n, nil
}

func (l *logStream) Close() error {
	l.cancel()
	return nil
}
