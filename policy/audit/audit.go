// Package audit is the tamper-evident log of what was decided.
//
// A [Log] is a folder with two files. "records" has one JSON object a line, in order:
//
//	{"index":0,"time":"2026-11-22T22:46:00Z","kind":"decision","commit":"9f0c…","body":{…}}
//
// "checkpoint" is a signed note (golang.org/x/mod/sumdb/note, C2SP's tlog-checkpoint): the log's name, the number of records and the root of
// the RFC 6962 tree (SHA-256) over the lines without their newline:
//
//	edge-1.north-sea/kmo-audit
//	42
//	CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=
//
//	— edge-1.north-sea/kmo-audit Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE+xeMcTOAYQ8=
//
// A record is in both files, on the disk, before Append returns: first the line, then the checkpoint. A crash or a fault between them leaves one
// line that no checkpoint speaks of, torn or whole; Open drops it. A line that can be read may still not be on the disk, for a Sync that failed
// keeps it in memory as if it were, and what it speaks of was not applied. Anything else that differs from the checkpoint is E_LOG_CONSISTENCY.
//
//	log, err := audit.Open(audit.Options{Dir: dir, Name: "edge-1.north-sea/kmo-audit", Key: key})
//	index, err := log.Append("decision", decision) // before what it speaks of is applied
//
// [Log.Prove] makes a file that shows to whoever has the log's [Log.Key] that a record is in it, and [Check] looks at one, on any machine. It is
// a C2SP tlog-proof (c2sp.org/tlog-proof@v1): the record's line as "extra", which the proof then covers, its index, the hashes from its
// neighbour up to the root's child, and the checkpoint:
//
//	c2sp.org/tlog-proof@v1
//	extra eyJpbmRleCI6MSwi…
//	index 1
//	gSKyXoYZUgZ6jduWYrkDOARinOMGJveXjgMkBTcdPlQ=
//	B95lDa8R83lS8n0eG+o0buTxRKQTYFi//1U8anccXmA=
//
//	edge-1.north-sea/kmo-audit
//	42
//	…
package audit

import (
	"bufio"
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/kindos/kmo/policy/refusal"
)

// maxRecord bounds one line, so that a damaged file costs no more memory than a record may.
const maxRecord = 32 << 20

// Options say which log.
type Options struct {
	Dir   string             // created if it is not there
	Name  string             // of the log and its key: no spaces, no plus sign
	Key   ed25519.PrivateKey // the host's
	Clock func() time.Time   // nil for the wall clock

	// Seen is a tree that somebody else has seen of this log, the zero Tree if nobody has: a log that is shorter or other is refused.
	Seen Tree
}

// Tree is the size and root of a log at one time. Its JSON is {"N":…,"Hash":"<base64>"}.
type Tree = tlog.Tree

// Record is one entry.
type Record struct {
	Index  int64           `json:"index"`
	Time   time.Time       `json:"time"`
	Kind   string          `json:"kind"`             // decision, gate, revert, …
	Commit string          `json:"commit,omitempty"` // the body's key "commit"
	Body   json.RawMessage `json:"body"`
}

// Log is an open log. Only one process may have it open. Its methods may be called concurrently.
type Log struct {
	options  Options
	key      string      // the verifier's, as C2SP writes it
	signer   note.Signer // nil if it is only read
	verifier note.Verifier

	mu     sync.Mutex // guards what follows
	file   *os.File
	ends   []int64     // offset after each record's newline
	hashes []tlog.Hash // tlog's stored hashes
	sure   tlog.Tree   // what is known to be on the disk
	broken error       // set when file and checkpoint may differ, until the log was read again
}

// Open opens or creates a log, and checks every record against the checkpoint.
func Open(options Options) (*Log, error) {
	l := &Log{options: options}
	if err := l.keys(); err != nil {
		return nil, fmt.Errorf("audit log %s: %v", options.Dir, err)
	}
	if err := os.MkdirAll(options.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("audit log: %w", err)
	}
	if err := l.read(os.O_CREATE); err != nil {
		return nil, err
	}
	return l, nil
}

// Read opens a log, which nobody may have open meanwhile, to look at it: whatever Open would mend is left as it is, and a line without a
// checkpoint is not part of it. The log's name is what its checkpoint says, which the key must have signed.
func Read(dir string, key ed25519.PublicKey) (*Log, error) {
	l := &Log{options: Options{Dir: dir}}
	checkpoint, err := os.ReadFile(l.path("checkpoint"))
	if err == nil {
		l.file, err = os.Open(l.path("records"))
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, l.inconsistent(err.Error(), "the files records and checkpoint")
	}
	if err != nil {
		return nil, fmt.Errorf("audit log: %w", err)
	}
	name, _, _ := strings.Cut(string(checkpoint), "\n")
	l.options.Name = name
	if err = l.verifies(key); err != nil {
		err = l.inconsistent(fmt.Sprintf("a checkpoint of %q", refusal.Clip(name, 100)), "one that begins with the log's name")
	} else if l.sure, _, err = l.check(); err == nil {
		l.cut(l.sure.N)
		return l, nil
	}
	l.file.Close()
	return nil, err
}

// read opens the file, and checks and mends what is in it.
func (l *Log) read(create int) error {
	file, err := os.OpenFile(l.path("records"), os.O_RDWR|create, 0o600)
	if err != nil {
		return fmt.Errorf("audit log: %w", err)
	}
	l.file = file
	if err := l.recover(); err != nil {
		file.Close()
		return err
	}
	l.sure, err = l.tree(int64(len(l.ends)))
	return err
}

// again reads the log after a write that failed, by the code that reads it after a crash: the disk may have room again.
func (l *Log) again() error {
	fresh := &Log{options: l.options, key: l.key, signer: l.signer, verifier: l.verifier}
	fresh.options.Seen = l.sure
	if err := fresh.read(0); err != nil {
		return err
	}
	if fresh.sure.N > l.sure.N { // the checkpoint is there, but that its folder says so may not be on the disk
		if err := fresh.checkpoint(); err != nil {
			fresh.file.Close()
			return err
		}
	}
	l.file.Close()
	l.file, l.ends, l.hashes, l.sure, l.broken = fresh.file, fresh.ends, fresh.hashes, fresh.sure, nil
	return nil
}

// Close releases the file.
func (l *Log) Close() error { return l.file.Close() }

// about is what a record's body says of commits: the one it speaks of, and others that share its fate.
type about struct {
	Commit string   `json:"commit"`
	Range  []string `json:"range"`
}

// Append makes one record of v durable and returns its index. v marshals to a JSON object; its keys "commit" and "range", if it has them, are
// what ByCommit finds.
func (l *Log) Append(kind string, v any) (index int64, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.broken != nil {
		if err := l.again(); err != nil {
			return 0, fmt.Errorf("audit log %s: an earlier write: %v; reading it again: %w", l.options.Dir, l.broken, err)
		}
	}
	body, err := json.Marshal(v)
	if err != nil {
		return 0, fmt.Errorf("audit record: %v", err)
	}
	var about about
	if err := json.Unmarshal(body, &about); err != nil {
		return 0, fmt.Errorf("audit record: %v", err)
	}
	r := Record{Index: int64(len(l.ends)), Time: l.now(), Kind: kind, Commit: about.Commit, Body: body}
	line, err := json.Marshal(r)
	if err != nil {
		return 0, fmt.Errorf("audit record: %v", err)
	}
	if len(line) >= maxRecord {
		return 0, &refusal.Error{Code: "E_LIMIT", Subject: "audit record " + kind, Got: fmt.Sprintf("%d bytes", len(line)), Want: fmt.Sprintf("fewer than %d", maxRecord)}
	}
	start := l.size()
	if _, err = l.file.WriteAt(append(line, '\n'), start); err == nil {
		err = l.file.Sync()
	}
	if err == nil {
		err = l.include(line)
	}
	if err == nil {
		err = l.checkpoint()
	}
	if err != nil {
		l.broken = err // whether the line is on the disk is for the next Append to find out; until then nobody is told of it
		l.cut(l.sure.N)
		return 0, fmt.Errorf("audit log %s: %w", l.options.Dir, err)
	}
	l.sure, err = l.tree(int64(len(l.ends)))
	return r.Index, err
}

// Records calls f with each record, oldest first, until it returns an error, and returns that.
func (l *Log) Records(f func(Record) error) error { return l.from(0, f) }

// Last returns the newest n records, oldest first.
func (l *Log) Last(n int) (records []Record, err error) {
	l.mu.Lock()
	start := max(0, len(l.ends)-n)
	l.mu.Unlock()
	err = l.from(start, func(r Record) error { records = append(records, r); return nil })
	return records, err
}

// ByCommit returns the records that speak of a commit, oldest first.
func (l *Log) ByCommit(id string) (records []Record, err error) {
	err = l.from(0, func(r Record) error {
		if r.SpeaksOf(id) {
			records = append(records, r)
		}
		return nil
	})
	return records, err
}

// SpeaksOf says whether a record is about a commit, given by its whole id.
func (r Record) SpeaksOf(id string) bool {
	var also about
	if r.Commit != id && bytes.Contains(r.Body, []byte(id)) && json.Unmarshal(r.Body, &also) != nil {
		return false // Append had read it
	}
	return r.Commit == id || slices.Contains(also.Range, id)
}

// Record returns one record.
func (l *Log) Record(index int64) (r Record, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	line, err := l.line(index)
	if err == nil {
		err = json.Unmarshal(line, &r)
	}
	return r, err
}

// line reads one record's line again, and holds it against what was read or written before.
func (l *Log) line(index int64) ([]byte, error) {
	if n := l.sure.N; index < 0 || index >= n {
		return nil, fmt.Errorf("audit record %d: the log has %d, counted from 0", index, n)
	}
	start := int64(0)
	if index > 0 {
		start = l.ends[index-1]
	}
	file, err := os.Open(l.path("records"))
	if err != nil {
		return nil, fmt.Errorf("audit log: %w", err)
	}
	defer file.Close()
	line := make([]byte, l.ends[index]-1-start)
	if _, err := file.ReadAt(line, start); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("audit log: %w", err)
	}
	if tlog.RecordHash(line) != l.hashes[tlog.StoredHashIndex(0, index)] {
		return nil, l.inconsistent(fmt.Sprintf("other bytes at record %d", index), "those that were read or written before")
	}
	return line, nil
}

// Tree is the log's size and root, for another machine to remember.
func (l *Log) Tree() (Tree, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.tree(int64(len(l.ends)))
}

// include adds one line, on the disk already, to the tree.
func (l *Log) include(line []byte) error {
	more, err := tlog.StoredHashes(int64(len(l.ends)), line, tlog.HashReaderFunc(l.stored))
	if err != nil {
		return err
	}
	l.ends = append(l.ends, l.size()+int64(len(line))+1)
	l.hashes = append(l.hashes, more...)
	return nil
}

// cut forgets every line after the first n.
func (l *Log) cut(n int64) {
	l.ends, l.hashes = l.ends[:n], l.hashes[:tlog.StoredHashCount(n)]
}

func (l *Log) stored(indexes []int64) ([]tlog.Hash, error) {
	out := make([]tlog.Hash, len(indexes))
	for i, index := range indexes {
		if index < 0 || index >= int64(len(l.hashes)) {
			return nil, fmt.Errorf("hash %d of %d", index, len(l.hashes))
		}
		out[i] = l.hashes[index]
	}
	return out, nil
}

func (l *Log) tree(n int64) (tlog.Tree, error) {
	root, err := tlog.TreeHash(n, tlog.HashReaderFunc(l.stored))
	return tlog.Tree{N: n, Hash: root}, err
}

// keys makes note's signer and verifier from the host's key.
func (l *Log) keys() error {
	if len(l.options.Key) != ed25519.PrivateKeySize {
		return fmt.Errorf("a key of %d bytes, want ed25519", len(l.options.Key))
	}
	public, _ := l.options.Key.Public().(ed25519.PublicKey)
	if err := l.verifies(public); err != nil {
		return err
	}
	prefix, _, _ := strings.Cut(l.key[len(l.options.Name)+1:], "+")
	seed := base64.StdEncoding.EncodeToString(append([]byte{1}, l.options.Key.Seed()...)) // 1 is note's ed25519
	var err error
	l.signer, err = note.NewSigner("PRIVATE+KEY+" + l.options.Name + "+" + prefix + "+" + seed)
	return err
}

// verifies makes note's verifier from the public half.
func (l *Log) verifies(public ed25519.PublicKey) (err error) {
	if l.key, err = note.NewEd25519VerifierKey(l.options.Name, public); err == nil {
		l.verifier, err = note.NewVerifier(l.key)
	}
	return err
}

// Key is what others check the log's checkpoints and proofs with, as C2SP writes it: name, hash and key, with a plus sign between.
func (l *Log) Key() string { return l.key }

// from reads records beginning with one index, by a descriptor of its own: a write that fails closes the log's.
func (l *Log) from(first int, f func(Record) error) error {
	l.mu.Lock()
	file, err := os.Open(l.path("records"))
	start, end := int64(0), l.size()
	if first > 0 {
		start = l.ends[first-1]
	}
	l.mu.Unlock()
	if err != nil {
		return fmt.Errorf("audit log: %w", err)
	}
	defer file.Close()
	reader := bufio.NewReaderSize(io.NewSectionReader(file, start, end-start), 1<<16)
	for {
		line, err := readLine(reader)
		if errors.Is(err, io.EOF) && len(line) == 0 {
			return nil
		}
		if err != nil {
			return fmt.Errorf("audit log %s: %w", l.options.Dir, err)
		}
		var r Record
		if err := json.Unmarshal(line, &r); err != nil {
			return l.inconsistent("a line that is no record", "records")
		}
		if err := f(r); err != nil {
			return err
		}
	}
}

func (l *Log) inconsistent(got, want string) error {
	return &refusal.Error{Code: "E_LOG_CONSISTENCY", Subject: "audit log " + l.options.Dir, Got: got, Want: want}
}

func (l *Log) path(name string) string { return filepath.Join(l.options.Dir, name) }

// size is where the next record begins.
func (l *Log) size() int64 {
	if len(l.ends) == 0 {
		return 0
	}
	return l.ends[len(l.ends)-1]
}

func (l *Log) fileSize() int64 {
	stat, err := l.file.Stat()
	if err != nil {
		return -1
	}
	return stat.Size()
}

func (l *Log) now() time.Time {
	if l.options.Clock == nil {
		return time.Now().UTC()
	}
	return l.options.Clock().UTC()
}
