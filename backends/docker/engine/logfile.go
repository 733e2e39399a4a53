package engine

import (
	"bytes"
	"errors"
	"io"
	"os"
)

// LogFile reads the log that Podman writes of a container, which its own API follows without an end and tells the times of to the
// second only. Each line is "<time> <stream> <F or P> <text>"; one marked P goes on in the next. A log that has become too long is
// begun anew as another file of the same name.
type LogFile struct {
	path string
	file *os.File
	rest []byte // of a line that is not written to its end
}

// OpenLog opens a log. There may be none yet.
func OpenLog(path string) *LogFile { return &LogFile{path: path} }

// Close closes it.
func (l *LogFile) Close() error {
	if l.file == nil {
		return nil
	}
	return l.file.Close()
}

// Next calls each for every piece that was written since the last call.
func (l *LogFile) Next(each func(piece []byte) error) error {
	for {
		if l.file == nil {
			f, err := os.Open(l.path)
			if errors.Is(err, os.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			l.file = f
		}
		text, err := io.ReadAll(l.file)
		if err != nil {
			return err
		}
		l.rest = append(l.rest, text...)
		for {
			line, rest, ok := bytes.Cut(l.rest, []byte("\n"))
			if !ok {
				break
			}
			l.rest = rest
			if err := each(said(line)); err != nil {
				return err
			}
		}
		same, err := l.same()
		if err != nil || same {
			return err
		}
		err = l.file.Close()
		if l.file, l.rest = nil, nil; err != nil {
			return err
		}
	}
}

// same says whether the name still means the file that is read.
func (l *LogFile) same() (bool, error) {
	own, err := l.file.Stat()
	if err != nil {
		return false, err
	}
	now, err := os.Stat(l.path)
	if errors.Is(err, os.ErrNotExist) {
		return true, nil // its container is gone
	}
	return err != nil || os.SameFile(own, now), err
}

// said is what a line of the log says.
func said(line []byte) []byte {
	parts := bytes.SplitN(line, []byte(" "), 4)
	if len(parts) < 4 {
		return nil
	}
	if string(parts[2]) == "P" {
		return parts[3]
	}
	return append(bytes.Clone(parts[3]), '\n')
}

// Tail keeps the last lines of pieces.
func Tail(pieces [][]byte, lines int) [][]byte {
	if lines <= 0 {
		return pieces
	}
	for i := len(pieces) - 1; i >= 0; i-- {
		if bytes.HasSuffix(pieces[i], []byte("\n")) || i == len(pieces)-1 {
			if lines == 0 {
				return pieces[i+1:]
			}
			lines--
		}
	}
	return pieces
}
