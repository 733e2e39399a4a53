package engine

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptrace"
	"strings"
	"sync/atomic"
)

// MaxAnswer bounds an answer of an engine, in bytes: a list of a thousand containers has some megabytes. A log and what a
// command writes are streams, each piece of which Frames bounds; the events are an answer like any other, and are asked for again when it is over.
const MaxAnswer = 32 << 20

// answer is what an engine may still say to one request.
type answer struct {
	engine, request string
	left            atomic.Int64
}

// line is a connection to an engine. It carries one answer at a time.
type line struct {
	net.Conn
	now atomic.Pointer[answer] // nil is without a bound
}

// Read is that of the connection, and ends with the bound.
func (l *line) Read(p []byte) (int, error) {
	n, err := l.Conn.Read(p)
	if a := l.now.Load(); a != nil && a.left.Add(-int64(n)) < 0 {
		return 0, fmt.Errorf("%s: the answer to %s is longer than %d bytes; want at most that", a.engine, a.request, MaxAnswer)
	}
	return n, err
}

// line dials an engine. What becomes a stream the client dials by itself, past what bound hangs on to: the answer to that, the handshake, is
// bounded until the context ends with which it was asked for.
func (e Endpoint) line(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := e.dial(ctx, network, address)
	if err != nil {
		return nil, err
	}
	l, first := &line{Conn: conn}, e.answer("a handshake")
	l.now.Store(first)
	context.AfterFunc(ctx, func() { l.now.CompareAndSwap(first, nil) })
	return l, nil
}

func (e Endpoint) answer(request string) *answer {
	a := &answer{engine: e.Name, request: request}
	a.left.Store(MaxAnswer)
	return a
}

// bound bounds the answer to a request, which the client reads itself, as a whole.
func (e Endpoint) bound(r *http.Request) error {
	var a *answer
	if !strings.HasSuffix(r.URL.Path, "/logs") {
		a = e.answer(r.Method + " " + r.URL.Path)
	}
	*r = *r.WithContext(httptrace.WithClientTrace(r.Context(), &httptrace.ClientTrace{GotConn: func(got httptrace.GotConnInfo) {
		if l, ok := got.Conn.(*line); ok {
			l.now.Store(a)
		}
	}}))
	return nil
}
