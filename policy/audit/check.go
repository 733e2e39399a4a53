package audit

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/google/renameio/v2"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// Verify reads everything again from the disk, and compares it with the checkpoint and with what this process has read and written.
func (l *Log) Verify() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	fresh, err := l.afresh()
	if err != nil {
		return err
	}
	defer fresh.file.Close()
	tree, torn, err := fresh.check()
	if err != nil {
		return err
	}
	if mended := l.signer != nil && l.broken == nil; mended && (torn || int64(len(fresh.ends)) > tree.N) {
		return l.inconsistent(fmt.Sprintf("more than %d records", tree.N), fmt.Sprintf("%d, as the checkpoint says", tree.N))
	}
	fresh.cut(tree.N)
	return fresh.compare(l.sure, "what was read or written before")
}

// afresh is the log with nothing read of it yet, from the files that have its names now.
func (l *Log) afresh() (*Log, error) {
	file, err := os.Open(l.path("records"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, l.inconsistent(err.Error(), "the files records and checkpoint")
	}
	if err != nil {
		return nil, fmt.Errorf("audit log: %w", err)
	}
	return &Log{options: l.options, verifier: l.verifier, file: file}, nil
}

// check reads the log and compares it with its checkpoint. A crash can have left one line more than the checkpoint has, whole or torn.
func (l *Log) check() (tree Tree, torn bool, err error) {
	if tree, err = l.readCheckpoint(); err != nil {
		return tree, false, err
	}
	if torn, err = l.scan(); err != nil {
		return tree, false, err
	}
	n := int64(len(l.ends))
	if n < tree.N || n > tree.N+1 || n == tree.N+1 && torn {
		return tree, false, l.inconsistent(fmt.Sprintf("%d records", n), fmt.Sprintf("%d, as the checkpoint says", tree.N))
	}
	return tree, torn, l.compare(tree, "the checkpoint")
}

// recover reads the log, checks it, and finishes an append that a crash has cut short.
func (l *Log) recover() error {
	tree, torn, err := l.check()
	if errors.Is(err, fs.ErrNotExist) && l.fileSize() == 0 {
		if err = l.checkpoint(); err == nil {
			tree, torn, err = l.check()
		}
	}
	if errors.Is(err, fs.ErrNotExist) {
		return l.inconsistent("records without a checkpoint", "both")
	}
	if err != nil {
		return err
	}
	if err := l.compare(l.options.Seen, "what was seen of it"); err != nil {
		return err
	}
	n := int64(len(l.ends))
	if n > tree.N && l.options.Seen.N >= n { // its checkpoint was there, and the disk has lost it
		return l.checkpoint()
	}
	if torn || n > tree.N {
		l.cut(tree.N)
		if err := errors.Join(l.file.Truncate(l.size()), l.file.Sync()); err != nil {
			return fmt.Errorf("audit log: dropping a line without a checkpoint: %w", err)
		}
	}
	return l.syncFolder() // the checkpoint was read; that its name is on the disk is what whoever reads relies on
}

// scan reads every whole line into ends and hashes, and says whether bytes without a newline follow.
func (l *Log) scan() (torn bool, err error) {
	reader := bufio.NewReaderSize(io.NewSectionReader(l.file, 0, 1<<62), 1<<16)
	for {
		line, err := readLine(reader)
		if errors.Is(err, io.EOF) {
			return len(line) > 0, nil
		}
		if err != nil {
			return false, fmt.Errorf("audit log %s: %w", l.options.Dir, err)
		}
		var r struct {
			Index int64 `json:"index"`
		}
		if err := json.Unmarshal(line, &r); err != nil || r.Index != int64(len(l.ends)) {
			return false, l.inconsistent(fmt.Sprintf("line %d is no record of that index", len(l.ends)), "records in order")
		}
		if err := l.include(line); err != nil {
			return false, err
		}
	}
}

// readLine returns a line without its newline, io.EOF with what is left at the end.
func readLine(reader *bufio.Reader) (line []byte, err error) {
	for {
		part, err := reader.ReadSlice('\n')
		line = append(line, part...)
		switch {
		case err == nil:
			return line[:len(line)-1], nil
		case !errors.Is(err, bufio.ErrBufferFull):
			return line, err
		case len(line) > maxRecord:
			return nil, fmt.Errorf("a line of more than %d bytes", maxRecord)
		}
	}
}

// Extends refuses a log that does not go on from a tree that was seen of it before; by says where.
func (l *Log) Extends(seen Tree, by string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.compare(seen, by)
}

// compare checks that a tree seen earlier is a beginning of this log.
func (l *Log) compare(seen tlog.Tree, by string) error {
	if seen.N > int64(len(l.ends)) {
		return l.inconsistent(fmt.Sprintf("%d records", len(l.ends)), fmt.Sprintf("at least %d, as %s says", seen.N, by))
	}
	if seen == (tlog.Tree{}) {
		return nil
	}
	got, err := l.tree(seen.N)
	if err != nil {
		return err
	}
	if got != seen {
		return l.inconsistent(fmt.Sprintf("root %v over %d records", got.Hash, seen.N), fmt.Sprintf("%v, as %s says", seen.Hash, by))
	}
	return nil
}

// checkpoint signs the present tree and makes it durable.
func (l *Log) checkpoint() error {
	tree, err := l.tree(int64(len(l.ends)))
	if err != nil {
		return err
	}
	text := fmt.Sprintf("%s\n%d\n%v\n", l.options.Name, tree.N, tree.Hash)
	signed, err := note.Sign(&note.Note{Text: text}, l.signer)
	if err != nil {
		return err
	}
	if err := renameio.WriteFile(l.path("checkpoint"), signed, 0o600, renameio.WithTempDir(l.options.Dir)); err != nil {
		return err
	}
	return l.syncFolder()
}

// syncFolder has the names in the folder on the disk.
func (l *Log) syncFolder() error {
	dir, err := os.Open(l.options.Dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// readCheckpoint is the tree that the log's own checkpoint speaks of.
func (l *Log) readCheckpoint() (Tree, error) {
	file, err := os.ReadFile(l.path("checkpoint"))
	if err != nil {
		return Tree{}, fmt.Errorf("audit log: %w", err)
	}
	tree, at, err := openCheckpoint(file, l.verifier)
	if err != nil {
		return Tree{}, l.inconsistent(fmt.Sprintf("checkpoint, byte %d: %v", at, err), "name, size and root, signed by this host's key as "+l.options.Name)
	}
	return tree, nil
}
