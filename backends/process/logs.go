package process

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math"
	"os"
	"path/filepath"
	"sort"
	"time"

	"github.com/kindos/kmo/backends"
	"golang.org/x/sys/unix"
)

// The program itself appends to its log: no pipe ties it to this process. So the log is trimmed from outside: what is over
// the size is copied to the older part and the file truncated. What is written between the two is lost.
const (
	logFile   = "log"
	olderFile = "log.1"
	lookEvery = 200 * time.Millisecond // how often a followed log is looked at

	trimEvery = time.Second           // between two looks at all logs
	trimSoon  = 50 * time.Millisecond // after one that grew by more than half of its size meanwhile
	logTimes  = 16                    // so many times its size is where the kernel stops a log, keeper or not
)

func openLog(dir string) (*os.File, error) {
	return os.OpenFile(filepath.Join(dir, logFile), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
}

// trim moves a log that has outgrown size to the older part, of which the last size bytes stay. It returns how long the log was
// and is. Holes were never written, and are not kept.
func trim(dir string, size int64) (before, after int64, err error) {
	now := filepath.Join(dir, logFile)
	found, err := os.Stat(now)
	if err != nil {
		return 0, 0, err
	}
	before = found.Size()
	if before <= size {
		return before, before, nil
	}
	from, err := os.Open(now)
	if err != nil {
		return before, before, err
	}
	defer from.Close()
	text, err := solid(from, 0, before, size)
	if err != nil {
		return before, before, err
	}
	if text.size > 0 {
		to, err := os.OpenFile(filepath.Join(dir, olderFile), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
		if err != nil {
			return before, before, err
		}
		_, err = io.Copy(to, text.from(0))
		if err := errors.Join(err, to.Close()); err != nil { // the log is cut all the same: a full disk is the worse evil
			return before, 0, errors.Join(err, os.Truncate(now, 0))
		}
	}
	return before, 0, os.Truncate(now, 0)
}

// extents are the parts of a file that were written, read as if there were nothing between them.
type extents struct {
	file *os.File
	list []extent
	size int64
}

// extent is a part of a file: where it begins in the file and among the extents, and its length.
type extent struct{ from, at, size int64 }

// solid finds what was written between two offsets, or the last most bytes of it.
func solid(f *os.File, from, to, most int64) (*extents, error) {
	e := &extents{file: f}
	for from < to {
		start, err := f.Seek(from, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) || err == nil && start >= to {
			break
		}
		if err != nil {
			return nil, err
		}
		stop, err := f.Seek(start, unix.SEEK_HOLE)
		if errors.Is(err, unix.ENXIO) {
			break // truncated meanwhile
		}
		if err != nil {
			return nil, err
		}
		from = min(stop, to)
		e.list = append(e.list, extent{from: start, size: from - start})
		e.size += from - start
		for e.size-e.list[0].size >= most {
			e.size -= e.list[0].size
			e.list = e.list[1:]
		}
	}
	if over := e.size - most; over > 0 {
		e.list[0].from += over
		e.list[0].size -= over
		e.size = most
	}
	at := int64(0)
	for i := range e.list {
		e.list[i].at = at
		at += e.list[i].size
	}
	return e, nil
}

// ReadAt reads across extents.
func (e *extents) ReadAt(p []byte, at int64) (n int, err error) {
	i := sort.Search(len(e.list), func(i int) bool { return e.list[i].at+e.list[i].size > at })
	for ; i < len(e.list) && n < len(p); i++ {
		skip := at + int64(n) - e.list[i].at
		m, err := e.file.ReadAt(p[n:min(int64(len(p)), int64(n)+e.list[i].size-skip)], e.list[i].from+skip)
		if n += m; err != nil {
			return n, err
		}
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (e *extents) from(at int64) io.Reader { return io.NewSectionReader(e, at, e.size-at) }

// readLog returns both parts, or the last lines of them; with Follow it goes on until ctx or the keeper's own ends, the reader is
// closed or the log is gone.
func readLog(ctx, keeper context.Context, dir string, options backends.LogOptions) (io.ReadCloser, error) {
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
	var end int64 // of what is read of now; what follows begins there
	for i := len(parts) - 1; i >= 0; i-- {
		found, err := parts[i].Stat()
		if err != nil {
			return nil, errors.Join(err, closeAll(parts))
		}
		section, lines, err := lastLines(parts[i], found.Size(), tail)
		if err != nil {
			return nil, errors.Join(err, closeAll(parts))
		}
		if parts[i] == now {
			end = found.Size()
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
	r, w := io.Pipe()
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		defer cancel()
		defer context.AfterFunc(keeper, cancel)()
		_, err := io.Copy(w, text)
		if err == nil {
			err = follow(ctx, w, now, end)
		}
		w.CloseWithError(errors.Join(err, closeAll(parts)))
	}()
	return &followed{r, cancel}, nil
}

// followed ends following when it is closed, whether or not anything more is written.
type followed struct {
	*io.PipeReader
	cancel context.CancelFunc
}

func (f *followed) Close() error {
	f.cancel()
	return f.PipeReader.Close()
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

// lastLines is the part of a file's first size bytes with their last n lines; all of them for n = 0.
func lastLines(f *os.File, size int64, n int) (section io.Reader, lines int, err error) {
	text, err := solid(f, 0, size, math.MaxInt64)
	if err != nil {
		return nil, 0, err
	}
	if n <= 0 {
		return text.from(0), 0, nil
	}
	buffer := make([]byte, 32<<10)
	for end := text.size; end > 0; {
		start := max(end-int64(len(buffer)), 0)
		chunk := buffer[:end-start]
		if _, err := text.ReadAt(chunk, start); err != nil && !errors.Is(err, io.EOF) {
			return nil, 0, err
		}
		for at := len(chunk); at > 0; {
			at = bytes.LastIndexByte(chunk[:at], '\n')
			if at < 0 {
				break
			}
			from := start + int64(at) + 1
			if from == text.size {
				continue // the end of the last line, not of the one before it
			}
			if lines++; lines == n {
				return text.from(from), lines, nil
			}
		}
		end = start
	}
	if text.size > 0 {
		lines++
	}
	return text.from(0), lines, nil
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
		text, err := solid(f, at, found.Size(), math.MaxInt64)
		if err != nil {
			return err
		}
		if _, err := io.Copy(w, text.from(0)); err != nil {
			return err
		}
		at = found.Size()
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
	written, err := solid(f, offset, found.Size(), 4096)
	if err != nil {
		return ""
	}
	text, err := io.ReadAll(written.from(0))
	if err != nil {
		return ""
	}
	return string(text)
}
