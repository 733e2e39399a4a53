// Package channel is what a machine's guest and its monitor say to each other, over one stream of bytes: a virtio-serial port of QEMU's,
// a vsock connection of Firecracker's.
//
// A frame is its kind, one byte; the id of what it speaks of, four bytes, big-endian, 0 being the workload's program; the length of its
// body, four bytes, big-endian; and the body, at most [MaxToGuest] bytes towards the guest and [MaxToHost] from it. The order:
//
//	guest  Hello                       its kernel has booted
//	host   Build{Setup}                what is to be built
//	guest  Built or Fault{stage.Failure}
//	host   Exec…                       the preInit hooks, and later everything else that is run inside
//	host   Run                         start the program
//	guest  Started or Fault
//	guest  Output…                     of the program and of commands, as it comes
//	guest  Usage{backends.Usage}       now and then, when it has changed
//	host   Signal{number}              to the program or a command
//	guest  Ended{End}                  a command has; or the program has, and all that was written is where it belongs
//
// The host trusts nothing that it reads: an id it does not know is of no consequence; what it does not wait for of the program ends the
// machine, and so does a frame too large.
package channel

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"sync"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/process/stage"
)

// Kind is what a frame says.
type Kind byte

// The kinds.
const (
	Hello   Kind = 'H'
	Build   Kind = 'S'
	Built   Kind = 'B'
	Run     Kind = 'R'
	Started Kind = 'A'
	Exec    Kind = 'X'
	Output  Kind = 'O'
	Signal  Kind = 'G'
	Ended   Kind = 'E'
	Fault   Kind = 'F'
	Usage   Kind = 'U'
)

// The bounds of a body.
const (
	MaxToGuest = 64 << 20 // files are in it
	MaxToHost  = 1 << 20
)

// Port is the name of the virtio-serial port, and the tag of the shared folders. Where there is a vsock instead, Vsock is the port of the
// host's that the guest calls, and Publish the guest's at which the host asks, by a number and a newline, for a TCP port of the guest's.
const (
	Port    = "kmo"
	Vsock   = 1024
	Publish = 1025
)

// Setup is all that a guest is told of its workload.
type Setup struct {
	Stage     stage.Orders       `json:"stage"`     // the program; Root.Content and the binds are paths of the guest's
	Resources backends.Resources `json:"resources"` // the program's bounds that the guest's kernel keeps
	Disk      string             `json:"disk"`      // the guest's device of the base's disk, to be mounted at [Base]
	Shared    bool               `json:"shared"`    // a file system of the host's is to be mounted at [Shares]
	Address   string             `json:"address"`   // of eth0, with its prefix length; "" is none
	Gateway   string             `json:"gateway"`
}

// Where a guest mounts what it builds from.
const (
	Base    = "/base"
	Shares  = "/shares"
	Scratch = "/scratch"
)

// End is how a program or a command ended.
type End struct {
	Code int  `json:"code"` // 128 + signal
	OOM  bool `json:"oom,omitempty"`
}

// Frame is one thing said.
type Frame struct {
	Kind Kind
	ID   uint32
	Body []byte
}

// Decode reads a body that is JSON.
func (f Frame) Decode(into any) error {
	if err := json.Unmarshal(f.Body, into); err != nil {
		return fmt.Errorf("frame %c: %v", f.Kind, err)
	}
	return nil
}

// Conn sends and receives frames. Send may be called concurrently; Receive by one.
type Conn struct {
	stream io.ReadWriter
	max    int // of a body received

	mu sync.Mutex // of sending
}

// Open speaks over a stream, and receives bodies of at most max bytes.
func Open(stream io.ReadWriter, limit int) *Conn { return &Conn{stream: stream, max: limit} }

const head = 9

// Send sends a frame with these bytes for its body.
func (c *Conn) Send(kind Kind, id uint32, body []byte) error {
	text := make([]byte, head, head+len(body))
	text[0] = byte(kind)
	binary.BigEndian.PutUint32(text[1:], id)
	binary.BigEndian.PutUint32(text[5:], uint32(len(body)))
	c.mu.Lock()
	defer c.mu.Unlock()
	_, err := c.stream.Write(append(text, body...))
	return err
}

// Say sends a frame with a value as JSON for its body.
func (c *Conn) Say(kind Kind, id uint32, value any) error {
	body, err := json.Marshal(value)
	if err != nil {
		return err
	}
	return c.Send(kind, id, body)
}

// Receive waits for a frame.
func (c *Conn) Receive() (Frame, error) {
	var text [head]byte
	if _, err := io.ReadFull(c.stream, text[:]); err != nil {
		return Frame{}, err
	}
	size := binary.BigEndian.Uint32(text[5:])
	if uint64(size) > uint64(c.max) {
		return Frame{}, fmt.Errorf("a frame of %d bytes; want at most %d", size, c.max)
	}
	f := Frame{Kind: Kind(text[0]), ID: binary.BigEndian.Uint32(text[1:]), Body: make([]byte, size)}
	_, err := io.ReadFull(c.stream, f.Body)
	return f, err
}

// Writer sends what is written to it as Output.
func (c *Conn) Writer(id uint32) io.Writer { return output{c, id} }

type output struct {
	conn *Conn
	id   uint32
}

func (o output) Write(text []byte) (int, error) {
	for rest := text; len(rest) > 0; {
		piece := rest[:min(len(rest), MaxToHost)]
		if err := o.conn.Send(Output, o.id, piece); err != nil {
			return 0, err
		}
		rest = rest[len(piece):]
	}
	return len(text), nil
}
