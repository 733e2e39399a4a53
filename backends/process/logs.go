package process

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/kindos/kmo/backends"
)

// The program itself appends to its log: no pipe ties it to this process. So the log is bounded from outside: what is over
// the bound is copied to the older part and the file truncated. What is written between the two is lost.
const (
	logFile   = "log"
	olderFile = "log.1"
	lookEvery = 200 * time.Millisecond // how often a followed log is looked at
)

func openLog(dir string) (*os.File, error) {
	return os.OpenFile(filepath.Join(dir, logFile), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
}

// trim moves a log that has outgrown size to the older part, of which the last size bytes stay.
func trim(dir string, size int64) error {
	now := filepath.Join(dir, logFile)
	found, err := os.Stat(now)
	if err != nil || found.Size() <= size {
		return err
	}
	from, err := os.Open(now)
	if err != nil {
		return err
	}
	defer from.Close()
	if _, err := from.Seek(max(found.Size()-size, 0), io.SeekStart); err != nil {
		return err
	}
	to, err := os.OpenFile(filepath.Join(dir, olderFile), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = io.CopyN(to, from, size)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return errors.Join(err, to.Close(), os.Truncate(now, 0))
}

// readLog returns both parts, or the last lines of them; with Follow it goes on until ctx ends or the log is gone.
func readLog(ctx context.Context, dir string, options backends.LogOptions) (io.ReadCloser, error) {
	now, err := os.Open(filepath.Join(dir, logFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil, backends.ErrNotFound
	}
	if err != nil {
		return nil, err
	}
	parts := []*os.File{now}
	older, err := os.Open(filepath.Join(dir, olderFile))
	if err == nil {
		parts = []*os.File{older, now}
	}
	tail := options.Tail
	var readers []io.Reader
	for i := len(parts) - 1; i >= 0; i-- {
		section, lines, err := lastLines(parts[i], tail)
		if err != nil {
			return nil, errors.Join(err, closeAll(parts))
		}
		readers = append([]io.Reader{section}, readers...)
		if options.Tail > 0 {
			if tail -= lines; tail <= 0 {
				break
			}
		}
	}
	text := io.MultiReader(readers...)
	if !options.Follow {
		return &parted{text, parts}, nil
	}
	found, err := now.Stat()
	if err != nil {
		return nil, errors.Join(err, closeAll(parts))
	}
	r, w := io.Pipe()
	go func() {
		_, err := io.Copy(w, text)
		if err == nil {
			err = follow(ctx, w, now, found.Size())
		}
		w.CloseWithError(errors.Join(err, closeAll(parts)))
	}()
	return r, nil
}

// parted reads what lies in several files and closes them all.
type parted struct {
	io.Reader
	files []*os.File
}

func (p *parted) Close() error { return closeAll(p.files) }

func closeAll(files []*os.File) (err error) {
	for _, f := range files {
		err = errors.Join(err, f.Close())
	}
	return err
}

// lastLines is the part of a file, as long as it is now, with its last n lines; all of it for n = 0.
func lastLines(f *os.File, n int) (section io.Reader, lines int, err error) {
	found, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	if n <= 0 {
		return io.NewSectionReader(f, 0, found.Size()), 0, nil
	}
	buffer := make([]byte, 32<<10)
	for end := found.Size(); end > 0; {
		start := max(end-int64(len(buffer)), 0)
		chunk := buffer[:end-start]
		if _, err := f.ReadAt(chunk, start); err != nil && !errors.Is(err, io.EOF) {
			return nil, 0, err
		}
		for at := len(chunk); at > 0; {
			at = bytes.LastIndexByte(chunk[:at], '\n')
			if at < 0 {
				break
			}
			from := start + int64(at) + 1
			if from == found.Size() {
				continue // the end of the last line, not of the one before it
			}
			if lines++; lines == n {
				return io.NewSectionReader(f, from, found.Size()-from), lines, nil
			}
		}
		end = start
	}
	if found.Size() > 0 {
		lines++
	}
	return io.NewSectionReader(f, 0, found.Size()), lines, nil
}

// follow copies what is appended. A file that has become shorter was truncated: it is read from its beginning.
func follow(ctx context.Context, w io.Writer, f *os.File, at int64) error {
	ticker := time.NewTicker(lookEvery)
	defer ticker.Stop()
	for {
		found, err := f.Stat()
		if err != nil {
			return err
		}
		if found.Size() < at {
			at = 0
		}
		n, err := io.Copy(w, io.NewSectionReader(f, at, found.Size()-at))
		if at += n; err != nil {
			return err
		}
		if _, err := os.Stat(f.Name()); err != nil {
			return nil // the workload was removed
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// since is what was logged after an offset, at most the last 4 KiB of it.
func since(dir string, offset int64) string {
	f, err := os.Open(filepath.Join(dir, logFile))
	if err != nil {
		return ""
	}
	defer f.Close()
	found, err := f.Stat()
	if err != nil || found.Size() <= offset {
		return ""
	}
	offset = max(offset, found.Size()-4096)
	text := make([]byte, found.Size()-offset)
	n, err := f.ReadAt(text, offset)
	if err != nil && !errors.Is(err, io.EOF) {
		return ""
	}
	return string(text[:n])
}
