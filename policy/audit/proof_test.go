package audit

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/kindos/kmo/policy/refusal"
)

// public is the public half of the key that signs a log.
func public(o Options) ed25519.PublicKey { return o.Key.Public().(ed25519.PublicKey) }

// reader opens a log that was written to look at it.
func reader(t testing.TB, o Options) *Log {
	t.Helper()
	l, err := Read(o.Dir, public(o))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// inconsistent says whether err is E_LOG_CONSISTENCY.
func inconsistent(err error) bool {
	r := refusal.Of(err)
	return r != nil && r.Code == "E_LOG_CONSISTENCY"
}

// flips are bits to turn: the lowest, the one between small and capital letters, and the one that is no ASCII.
var flips = []byte{0x01, 0x20, 0x80}

// TestEveryByteT73: whichever byte of the log is changed, it is seen at opening, at reading, and by who has it open.
func TestEveryByteT73(t *testing.T) {
	o, l := filled(t, 3)
	for _, name := range []string{"records", "checkpoint"} {
		whole, err := os.ReadFile(l.path(name))
		if err != nil {
			t.Fatal(err)
		}
		for at := range whole {
			for _, bit := range flips {
				harmed := bytes.Clone(whole)
				harmed[at] ^= bit
				if err := os.WriteFile(l.path(name), harmed, 0o600); err != nil {
					t.Fatal(err)
				}
				_, atOpening := Open(o)
				_, atReading := Read(o.Dir, public(o))
				if live := l.Verify(); !inconsistent(atOpening) || !inconsistent(atReading) || !inconsistent(live) {
					t.Fatalf("%s, byte %d, bit %#x: opening %v; reading %v; verifying %v", name, at, bit, atOpening, atReading, live)
				}
			}
		}
		if err := os.WriteFile(l.path(name), whole, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	open(t, o)
}

// TestRead: who reads has what the checkpoint speaks of, and leaves all as it is.
func TestRead(t *testing.T) {
	o, l := filled(t, 3)
	want, err := l.Tree()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.file.WriteAt([]byte(`{"index":3,`), l.size()); err != nil { // as a crash leaves it
		t.Fatal(err)
	}
	r := reader(t, o)
	got, err := r.Tree()
	if err != nil || got != want || r.Key() != l.Key() || !strings.HasPrefix(r.Key(), "edge-1.north-sea/kmo-audit+") {
		t.Errorf("%v of %s, want %v of %s: %v", got, r.Key(), want, l.Key(), err)
	}
	if err := r.Verify(); err != nil {
		t.Error("what a crash leaves is taken for harm:", err)
	}
	if err := l.Verify(); !inconsistent(err) {
		t.Error("somebody else wrote to an open log, and", err)
	}
	if size := r.fileSize(); size != l.size()+11 {
		t.Errorf("the file has %d bytes now", size)
	}
	if one, err := r.Record(1); err != nil || one.Index != 1 || string(one.Body) != `{"commit":"c1","reason":"reason 1"}` {
		t.Errorf("%+v, %v", one, err)
	}
	for _, index := range []int64{-1, 3} {
		if _, err := r.Record(index); err == nil || !strings.Contains(err.Error(), "the log has 3, counted from 0") {
			t.Errorf("record %d: %v", index, err)
		}
	}
	for _, name := range []string{"records", "checkpoint"} {
		if err := os.Rename(l.path(name), o.Dir+name); err != nil {
			t.Fatal(err)
		}
		if _, err := Read(o.Dir, public(o)); !inconsistent(err) {
			t.Errorf("%s is gone: %v", name, err)
		}
		if err := l.Verify(); err == nil {
			t.Errorf("%s is gone, and an open log does not see it", name)
		}
		if err := os.Rename(o.Dir+name, l.path(name)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestReplayedT73: an older pair of files, whole and signed, is seen by who has seen more of the log: its own process, the journal, another machine.
func TestReplayedT73(t *testing.T) {
	o, l := filled(t, 5)
	old := o
	old.Dir = filepath.Join(t.TempDir(), "old")
	if err := os.CopyFS(old.Dir, os.DirFS(o.Dir)); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Append("gate", entry{}); err != nil {
		t.Fatal(err)
	}
	kept, seen, err := l.Checkpoint()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(filepath.Join(o.Dir, "older"), os.DirFS(old.Dir)); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"records", "checkpoint"} {
		if err := os.Rename(filepath.Join(o.Dir, "older", name), l.path(name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Verify(); !inconsistent(err) || !strings.Contains(err.Error(), "5 records; want at least 6") {
		t.Error("the process that wrote more:", err)
	}
	if _, err := l.Prove(1); !inconsistent(err) {
		t.Error("a proof against the older checkpoint:", err)
	}
	r := reader(t, o)
	if err := r.Extends(seen, "the journal"); !inconsistent(err) || !strings.Contains(err.Error(), "at least 6, as the journal says") {
		t.Error("the journal:", err)
	}
	if tree, err := OpenCheckpoint(kept, r.Key()); err != nil || tree != seen {
		t.Errorf("the kept checkpoint: %v, want %v: %v", tree, seen, err)
	}
	o.Seen = seen
	if _, err := Open(o); !inconsistent(err) {
		t.Error("opening:", err)
	}
	first, err := reader(t, old).Tree()
	if err != nil || r.Extends(first, "itself") != nil || l.Extends(first, "the past") != nil {
		t.Error("a log does not go on from its own past", err)
	}
	if err := l.Extends(Tree{N: 5, Hash: tlog.Hash{1}}, "a stranger"); !inconsistent(err) {
		t.Error("another past:", err)
	}
}

// TestProve: each record of logs of each size is proved, and code that is not ours agrees.
func TestProve(t *testing.T) {
	for n := range 9 {
		_, l := filled(t, n)
		for index := range int64(n) {
			file, err := l.Prove(index)
			if err != nil {
				t.Fatal(err)
			}
			got, err := Check(file, l.Key())
			if err != nil || got.Log != "edge-1.north-sea/kmo-audit" || got.Size != int64(n) || got.Record.Index != index {
				t.Errorf("%d of %d: %+v, %v", index, n, got, err)
			}
			independently(t, file, l.Key(), index)
		}
		if _, err := l.Prove(int64(n)); err == nil {
			t.Errorf("record %d of %d is proved", n, n)
		}
	}
}

// independently checks a proof as its format says, with x/mod alone.
func independently(t *testing.T, file []byte, key string, index int64) {
	t.Helper()
	verifier, err := note.NewVerifier(key)
	if err != nil {
		t.Fatal(err)
	}
	head, checkpoint, _ := strings.Cut(string(file), "\n\n")
	lines := strings.Split(head, "\n")
	line, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(lines[1], "extra "))
	if err != nil || lines[0] != "c2sp.org/tlog-proof@v1" || lines[2] != "index "+strconv.FormatInt(index, 10) {
		t.Fatalf("%q %v", lines, err)
	}
	var hashes tlog.RecordProof
	for _, text := range lines[3:] {
		h, err := tlog.ParseHash(text)
		if err != nil {
			t.Fatal(err)
		}
		hashes = append(hashes, h)
	}
	opened, err := note.Open([]byte(checkpoint), note.VerifierList(verifier))
	if err != nil {
		t.Fatal(err)
	}
	tree, err := tlog.ParseTree([]byte("go.sum database tree\n" + strings.SplitN(opened.Text, "\n", 2)[1]))
	if err != nil {
		t.Fatal(err)
	}
	if err := tlog.CheckRecord(hashes, tree.N, tree.Hash, index, tlog.RecordHash(line)); err != nil {
		t.Errorf("record %d of %d: %v", index, tree.N, err)
	}
}

// TestProofEveryByteT73: a proof with any byte changed, cut anywhere, or with anything behind it, shows nothing, and the refusal says where.
func TestProofEveryByteT73(t *testing.T) {
	_, l := filled(t, 5)
	file, err := l.Prove(2)
	if err != nil {
		t.Fatal(err)
	}
	refused := func(what string, file []byte) {
		t.Helper()
		got, err := Check(file, l.Key())
		if r := refusal.Of(err); r == nil || !strings.HasPrefix(r.Subject, "proof, byte ") || got.Log != "" {
			t.Fatalf("%s: %+v, %v", what, got, err)
		}
	}
	for at := range file {
		for _, bit := range flips {
			harmed := bytes.Clone(file)
			harmed[at] ^= bit
			refused(fmt.Sprintf("byte %d, bit %#x", at, bit), harmed)
		}
		refused("cut at "+strconv.Itoa(at), file[:at])
	}
	refused("more behind it", append(bytes.Clone(file), '\n'))
	other, err := l.Prove(3)
	if err != nil {
		t.Fatal(err)
	}
	lines, others := bytes.SplitAfter(file, []byte("\n")), bytes.SplitAfter(other, []byte("\n"))
	lines[1] = others[1]
	refused("another record in its place", bytes.Join(lines, nil))
	lines[2] = others[2]
	refused("and another index", bytes.Join(lines, nil))
}

// TestProofT73 is what is said of proofs and checkpoints that do not fit, each with its place.
func TestProofT73(t *testing.T) {
	_, l := filled(t, 5)
	file, err := l.Prove(2)
	if err != nil {
		t.Fatal(err)
	}
	other := options(t)
	other.Key = ed25519.NewKeyFromSeed([]byte(strings.Repeat("x", 32)))
	stranger := open(t, other)
	change := func(old, new string) string { return strings.Replace(string(file), old, new, 1) }
	for name, tt := range map[string]struct{ file, key, want string }{
		"no proof":            {"hello\n", l.Key(), `E_DECODE: proof, byte 0: "hello"; want a C2SP tlog-proof, which begins with c2sp.org/tlog-proof@v1`},
		"another version":     {change("@v1", "@v10"), l.Key(), `E_DECODE: proof, byte 22: "0"; want the end of the first line`},
		"no record in it":     {change("extra ", "index "), l.Key(), "E_DECODE: proof, byte 23: "},
		"another index":       {change("\nindex 2", "\nindex 3"), l.Key(), "E_LOG_CONSISTENCY: proof, byte 23: a line that is no record of that index; want record 3"},
		"an index of two":     {change("\nindex 2", "\nindex 02"), l.Key(), `"02", no number; want the record's index`},
		"another host's key":  {string(file), stranger.Key(), "no signature by edge-1.north-sea/kmo-audit"},
		"a key that is none":  {string(file), "edge-1", "verifier key "},
		"a byte of the size":  {change("\n5\n", "\n6\n"), l.Key(), "a signature that does not verify; want a checkpoint of edge-1.north-sea/kmo-audit that this key has signed"},
		"a hash too few":      {strings.Join(append(strings.SplitAfter(string(file), "\n")[:3], strings.SplitAfter(string(file), "\n")[4:]...), ""), l.Key(), "which the lines above do not lead to"},
		"windows line ends":   {strings.ReplaceAll(string(file), "\n", "\r\n"), l.Key(), "E_DECODE: proof, byte 22: "},
		"more than may be":    {strings.Repeat("x", maxProof+1), l.Key(), "E_LIMIT: proof: "},
		"more hashes than is": {change("\n\n", strings.Repeat("\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=", 64)+"\n\n"), l.Key(), "at most 63 hashes"},
	} {
		if _, err := Check([]byte(tt.file), tt.key); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %s", name, err, tt.want)
		}
	}
	checkpoint, _, err := l.Checkpoint()
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct{ file, key, want string }{
		"another host's": {string(checkpoint), stranger.Key(), "E_LOG_CONSISTENCY: checkpoint, byte 75: no signature by "},
		"no note":        {"hello", l.Key(), "E_LOG_CONSISTENCY: checkpoint, byte 0: bytes that are no signed note"},
		"no key":         {string(checkpoint), "x", "verifier key "},
	} {
		if _, err := OpenCheckpoint([]byte(tt.file), tt.key); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %s", name, err, tt.want)
		}
	}
	if err := os.WriteFile(l.path("records"), bytes.Replace(must(os.ReadFile(l.path("records")))(t), []byte("reason 2"), []byte("reason X"), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Prove(2); !inconsistent(err) {
		t.Error("a record that was changed under an open log is proved:", err)
	}
}

// must is a value without an error.
func must[T any](value T, err error) func(t testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return value
	}
}

func FuzzCheck(f *testing.F) {
	_, l := filled(f, 5)
	key := l.Key()
	for index := range int64(5) {
		f.Add(must(l.Prove(index))(f))
	}
	f.Fuzz(func(t *testing.T, file []byte) {
		p, err := parseProof(file)
		if err == nil && !bytes.Equal(p.marshal(), file) {
			t.Errorf("two spellings of one proof:\n%s\n%s", file, p.marshal())
		}
		if got, err := Check(file, key); err == nil {
			independently(t, file, key, got.Record.Index)
		} else if refusal.Of(err) == nil {
			t.Errorf("no refusal: %v", err)
		}
	})
}

func FuzzOpenCheckpoint(f *testing.F) {
	_, l := filled(f, 5)
	key := l.Key()
	checkpoint, want, err := l.Checkpoint()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(checkpoint)
	f.Fuzz(func(t *testing.T, file []byte) {
		if got, err := OpenCheckpoint(file, key); err == nil && got != want { // the key has signed one tree only
			t.Errorf("%v, want %v", got, want)
		} else if err != nil && refusal.Of(err) == nil {
			t.Errorf("no refusal: %v", err)
		}
	})
}
