package engine

import (
	"bufio"
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
