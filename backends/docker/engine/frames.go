package engine

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// maxFrame bounds what is believed of a frame's length. Engines cut lines at 16 KiB.
const maxFrame = 1 << 20

// Frames reads what an engine says of a container's two streams: for each piece a header of 8 bytes, of which the first is the stream and
// the last four the length. It calls each for every piece, and returns nil at the end of the stream.
func Frames(r io.Reader, each func(piece []byte) error) error {
	in := bufio.NewReaderSize(r, 64<<10)
	var piece []byte
	for {
		var head [8]byte
		if _, err := io.ReadFull(in, head[:]); err != nil {
			return ended(err)
		}
		size := binary.BigEndian.Uint32(head[4:])
		if head[0] > 3 || size > maxFrame {
			return fmt.Errorf("stream of a container: a frame of stream %d with %d bytes; want stream 0 to 3 and at most %d", head[0], size, maxFrame)
		}
		if cap(piece) < int(size) {
			piece = make([]byte, size)
		}
		piece = piece[:size]
		if _, err := io.ReadFull(in, piece); err != nil {
			return ended(err)
		}
		if err := each(piece); err != nil {
			return err
		}
	}
}

// ended takes a stream that breaks off for one that has ended: so it does when its container, or the engine, goes.
func ended(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return nil
	}
	return err
}

// Stamps tells pieces of a log that were read before from those that were not, when a log is asked for again since the last of them. Each
// begins with its time. Several may have the same: an engine cuts a long line into pieces of one time.
type Stamps struct {
	last string // of the newest piece
	seen int    // so many pieces had it
	from string // what was last when the log was asked for again
	skip int    // so many pieces of that time are still to come again
}

// Again begins to read from the last time, which it returns.
func (s *Stamps) Again() string {
	s.from, s.skip = s.last, s.seen
	return s.last
}

// New returns the text of a piece, and false if it was read before.
func (s *Stamps) New(piece []byte) (text []byte, ok bool) {
	stamp, text, ok := bytes.Cut(piece, []byte(" "))
	switch at := string(stamp); {
	case !ok || at < s.from:
		return nil, false
	case at == s.from && s.skip > 0:
		s.skip--
		return nil, false
	case at == s.last:
		s.seen++
	default:
		s.last, s.seen = at, 1
	}
	return text, true
}

// Output keeps the first or the last bytes of what is written.
type Output struct {
	Most int
	Last bool
	Text []byte
}

// Add takes the next bytes. It returns no error.
func (o *Output) Add(piece []byte) error {
	if o.Last {
		o.Text = append(o.Text, piece...)
		o.Text = o.Text[max(len(o.Text)-o.Most, 0):]
		return nil
	}
	o.Text = append(o.Text, piece[:min(len(piece), o.Most-len(o.Text))]...)
	return nil
}
