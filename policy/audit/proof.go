package audit

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/kindos/kmo/policy/refusal"
)

const (
	proofHeader = "c2sp.org/tlog-proof@v1"
	maxProof    = maxRecord/3*4 + 1<<20 // the record's line in base64, and some
	maxHashes   = 63                    // a tree has no more levels
)

// Proven is what a proof shows.
type Proven struct {
	Log    string    `json:"log"`  // the log's name
	Size   int64     `json:"size"` // when it signed the checkpoint: records
	Root   tlog.Hash `json:"root"` // then, in base64
	Record Record    `json:"record"`
}

// Checkpoint is the log's signed checkpoint, for another machine to keep, and the tree it speaks of.
func (l *Log) Checkpoint() ([]byte, Tree, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.signed()
}

func (l *Log) signed() ([]byte, Tree, error) {
	file, err := os.ReadFile(l.path("checkpoint"))
	if err != nil {
		return nil, Tree{}, fmt.Errorf("audit log: %w", err)
	}
	tree, at, err := openCheckpoint(file, l.verifier)
	if err == nil && tree != l.sure {
		err = fmt.Errorf("it speaks of %d records", tree.N)
	}
	if err != nil {
		return nil, Tree{}, l.inconsistent(fmt.Sprintf("checkpoint, byte %d: %v", at, err), fmt.Sprintf("that of the %d records that were read or written before", l.sure.N))
	}
	return file, tree, nil
}

// Prove makes a proof that a record is in the log.
func (l *Log) Prove(index int64) ([]byte, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	line, err := l.line(index)
	if err != nil {
		return nil, err
	}
	checkpoint, tree, err := l.signed()
	if err != nil {
		return nil, err
	}
	hashes, err := tlog.ProveRecord(tree.N, index, tlog.HashReaderFunc(l.stored))
	if err != nil {
		return nil, err
	}
	return proof{line: line, index: index, hashes: hashes, checkpoint: checkpoint}.marshal(), nil
}

// Check says what a proof shows to whoever trusts that key, as Key returns it. It needs nothing but the two.
func Check(file []byte, key string) (Proven, error) {
	verifier, err := verifierOf(key)
	if err != nil {
		return Proven{}, err
	}
	p, err := parseProof(file)
	if err != nil {
		return Proven{}, err
	}
	begin := len(file) - len(p.checkpoint)
	tree, at, err := openCheckpoint(p.checkpoint, verifier)
	if err != nil {
		return Proven{}, misfit("E_LOG_CONSISTENCY", begin+at, err.Error(), "a checkpoint of "+verifier.Name()+" that this key has signed")
	}
	var r Record
	if err := json.Unmarshal(p.line, &r); err != nil || r.Index != p.index {
		return Proven{}, misfit("E_LOG_CONSISTENCY", len(proofHeader)+1, "a line that is no record of that index", fmt.Sprintf("record %d", p.index))
	}
	if err := tlog.CheckRecord(p.hashes, tree.N, tree.Hash, p.index, tlog.RecordHash(p.line)); err != nil {
		root := begin + bytes.Index(p.checkpoint, []byte(tree.Hash.String()))
		return Proven{}, misfit("E_LOG_CONSISTENCY", root, fmt.Sprintf("the root %v of %d records, which the lines above do not lead to", tree.Hash, tree.N), "the root that record, index and hashes lead to")
	}
	return Proven{Log: verifier.Name(), Size: tree.N, Root: tree.Hash, Record: r}, nil
}

// OpenCheckpoint is the tree that a checkpoint speaks of which that key has signed.
func OpenCheckpoint(file []byte, key string) (Tree, error) {
	verifier, err := verifierOf(key)
	if err != nil {
		return Tree{}, err
	}
	tree, at, err := openCheckpoint(file, verifier)
	if err != nil {
		return Tree{}, &refusal.Error{Code: "E_LOG_CONSISTENCY", Subject: fmt.Sprintf("checkpoint, byte %d", at), Got: err.Error(), Want: "name, size and root, signed by " + key}
	}
	return tree, nil
}

func verifierOf(key string) (note.Verifier, error) {
	verifier, err := note.NewVerifier(key)
	if err != nil {
		return nil, fmt.Errorf("verifier key %q: %v; want NAME+HASH+KEY, as 'kmo audit verify' prints it", refusal.Clip(key, 200), err)
	}
	return verifier, nil
}

// openCheckpoint reads a checkpoint, which has one spelling but for signatures by others. With an error comes the offset of what does not fit.
func openCheckpoint(file []byte, verifier note.Verifier) (tree Tree, at int, err error) {
	opened, err := note.Open(file, note.VerifierList(verifier))
	signatures := max(0, bytes.LastIndex(file, []byte("\n\n"))+2)
	switch unverified := (*note.UnverifiedNoteError)(nil); {
	case errors.As(err, &unverified):
		return tree, signatures, fmt.Errorf("no signature by %s", verifier.Name())
	case errors.As(err, new(*note.InvalidSignatureError)):
		return tree, signatures, errors.New("a signature that does not verify")
	case err != nil:
		return tree, 0, errors.New("bytes that are no signed note")
	}
	for _, s := range opened.Sigs {
		if _, err := base64.StdEncoding.Strict().DecodeString(s.Base64); err != nil {
			return tree, bytes.LastIndex(file, []byte(s.Base64)), errors.New("a signature that is not in its one spelling")
		}
	}
	lines := strings.Split(opened.Text, "\n")
	if len(lines) != 4 || lines[0] != verifier.Name() {
		return tree, 0, fmt.Errorf("%d lines that begin with %q", len(lines)-1, refusal.Clip(lines[0], 100))
	}
	if tree.N, err = number(lines[1]); err != nil {
		return Tree{}, len(lines[0]) + 1, err
	}
	if tree.Hash, err = hash(lines[2]); err != nil {
		return Tree{}, len(lines[0]) + 1 + len(lines[1]) + 1, err
	}
	return tree, 0, nil
}

// number reads a decimal of one spelling.
func number(text string) (int64, error) {
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < 0 || strconv.FormatInt(n, 10) != text {
		return 0, fmt.Errorf("%q, no number", refusal.Clip(text, 40))
	}
	return n, nil
}

// hash reads a hash of one spelling.
func hash(text string) (tlog.Hash, error) {
	h, err := tlog.ParseHash(text)
	if err != nil || h.String() != text {
		return tlog.Hash{}, fmt.Errorf("%q, no hash", refusal.Clip(text, 60))
	}
	return h, nil
}

// proof is a tlog-proof, read but not yet checked.
type proof struct {
	line       []byte // the record's
	index      int64
	hashes     tlog.RecordProof
	checkpoint []byte
}

func (p proof) marshal() []byte {
	b := fmt.Appendf(nil, "%s\nextra %s\nindex %d\n", proofHeader, base64.StdEncoding.EncodeToString(p.line), p.index)
	for _, h := range p.hashes {
		b = fmt.Appendf(b, "%v\n", h)
	}
	return append(append(b, '\n'), p.checkpoint...)
}

// parseProof reads a proof, which has one spelling.
func parseProof(file []byte) (p proof, err error) {
	if len(file) > maxProof {
		return p, &refusal.Error{Code: "E_LIMIT", Subject: "proof", Got: fmt.Sprintf("%d bytes", len(file)), Want: fmt.Sprintf("at most %d", maxProof)}
	}
	at := 0
	next := func(prefix, want string) (string, error) {
		line, _, whole := bytes.Cut(file[at:], []byte("\n"))
		rest, fits := bytes.CutPrefix(line, []byte(prefix))
		if !whole || !fits {
			return "", misfit("E_DECODE", at, strconv.Quote(refusal.Clip(string(line[:min(len(line), 60)]), 60)), want)
		}
		at += len(line) + 1
		return string(rest), nil
	}
	text, err := next(proofHeader, "a C2SP tlog-proof, which begins with "+proofHeader)
	if err == nil && text != "" {
		err = misfit("E_DECODE", len(proofHeader), strconv.Quote(refusal.Clip(text, 60)), "the end of the first line")
	}
	if err != nil {
		return p, err
	}
	begin := at
	if text, err = next("extra ", "the line extra, with the record"); err != nil {
		return p, err
	}
	if p.line, err = base64.StdEncoding.Strict().DecodeString(text); err != nil || strings.Contains(text, "\r") {
		return p, misfit("E_DECODE", begin, "no standard base64", "the record's line in it")
	}
	begin = at
	if text, err = next("index ", "the line index"); err != nil {
		return p, err
	}
	if p.index, err = number(text); err != nil {
		return p, misfit("E_DECODE", begin, err.Error(), "the record's index")
	}
	for {
		begin = at
		if text, err = next("", "a hash, or the empty line before the checkpoint"); err != nil {
			return p, err
		}
		if text == "" {
			p.checkpoint = file[at:]
			return p, nil
		}
		one, err := hash(text)
		if err != nil || len(p.hashes) == maxHashes {
			return p, misfit("E_DECODE", begin, strconv.Quote(refusal.Clip(text, 60)), fmt.Sprintf("at most %d hashes and an empty line", maxHashes))
		}
		p.hashes = append(p.hashes, one)
	}
}

func misfit(code refusal.Code, at int, got, want string) error {
	return &refusal.Error{Code: code, Subject: fmt.Sprintf("proof, byte %d", at), Got: got, Want: want}
}
