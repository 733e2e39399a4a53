package audit

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/kindos/kmo/policy/refusal"
)

type entry struct {
	Commit string `json:"commit"`
	Reason string `json:"reason"`
}

func options(t testing.TB) Options {
	return Options{
		Dir: filepath.Join(t.TempDir(), "audit"), Name: "edge-1.north-sea/kmo-audit", Key: ed25519.NewKeyFromSeed(make([]byte, 32)),
		Clock: func() time.Time { return time.Date(2026, 11, 22, 22, 46, 0, 0, time.UTC) },
	}
}

func open(t testing.TB, o Options) *Log {
	t.Helper()
	l, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// filled is a log with n records.
func filled(t testing.TB, n int) (Options, *Log) {
	t.Helper()
	o := options(t)
	l := open(t, o)
	for i := range n {
		index, err := l.Append("decision", entry{Commit: fmt.Sprint("c", i%3), Reason: fmt.Sprint("reason ", i)})
		if err != nil || index != int64(i) {
			t.Fatal(index, err)
		}
	}
	return o, l
}

// TestAgain: a write that fails is no end of the log; once the disk takes it, it goes on, and it never goes on from less than was there.
func TestAgain(t *testing.T) {
	o, l := filled(t, 3)
	away := o.Dir + ".away"
	fails := func() {
		t.Helper()
		if _, err := l.Append("gate", map[string]string{"commit": "c9"}); err == nil {
			t.Fatal("appended to a log that is not there")
		}
	}
	if err := os.Rename(o.Dir, away); err != nil {
		t.Fatal(err)
	}
	fails()
	fails()
	if err := os.Rename(away, o.Dir); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Append("gate", map[string]string{"commit": "c9"}); err != nil {
		t.Fatal("the log is back:", err)
	}
	if err := l.Verify(); err != nil {
		t.Error(err)
	}
	open(t, o)
	t.Run("from less than was there", func(t *testing.T) {
		o, l = filled(t, 3)
		short, _ := filled(t, 2)
		if err := os.Rename(o.Dir, o.Dir+".away"); err != nil {
			t.Fatal(err)
		}
		fails()
		if err := os.Rename(short.Dir, o.Dir); err != nil {
			t.Fatal(err)
		}
		fails()
	})
}

// TestLostWrite: a line whose Sync failed is read from memory as if it were on the disk, and may be nowhere after the next start.
func TestLostWrite(t *testing.T) {
	goesOn := func(t *testing.T, o Options, l *Log, want int64) {
		t.Helper()
		l.broken = syscall.EIO
		index, err := l.Append("gate", entry{Reason: "next"})
		if err == nil {
			err = l.Verify()
		}
		last, errLast := l.Last(1)
		if index != want || err != nil || errLast != nil || string(last[0].Body) != `{"commit":"","reason":"next"}` {
			t.Errorf("index %d, want %d; %+v; %v, %v", index, want, last, err, errLast)
		}
		open(t, o)
	}
	t.Run("its checkpoint is not written", func(t *testing.T) {
		o, l := filled(t, 3)
		if _, err := l.file.WriteAt([]byte(`{"index":3,"time":"2026-11-22T22:46:00Z","kind":"gate","body":{"reason":"lost"}}`+"\n"), l.size()); err != nil {
			t.Fatal(err)
		}
		goesOn(t, o, l, 3)
	})
	t.Run("its checkpoint is", func(t *testing.T) {
		o, l := filled(t, 3)
		sure := l.sure
		if _, err := l.Append("gate", entry{Reason: "on the disk"}); err != nil {
			t.Fatal(err)
		}
		l.sure = sure // as where the Sync of the folder failed
		goesOn(t, o, l, 4)
	})
	t.Run("nobody is told of it", func(t *testing.T) {
		o, l := filled(t, 3)
		if err := os.Mkdir(filepath.Join(o.Dir, "x"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(os.Rename(l.path("checkpoint"), o.Dir+".away"), os.Rename(filepath.Join(o.Dir, "x"), l.path("checkpoint"))); err != nil {
			t.Fatal(err)
		}
		if _, err := l.Append("gate", entry{}); err == nil {
			t.Fatal("a folder was replaced by a checkpoint")
		}
		tree, err1 := l.Tree()
		last, err2 := l.Last(9)
		if tree.N != 3 || len(last) != 3 || err1 != nil || err2 != nil {
			t.Errorf("%v and %d records, want the 3 that are sure: %v, %v", tree, len(last), err1, err2)
		}
	})
}

// TestReadBesideAgain: who reads goes on reading while the log is opened anew.
func TestReadBesideAgain(t *testing.T) {
	l := open(t, options(t))
	for range 3 {
		if _, err := l.Append("decision", entry{Reason: strings.Repeat("x", 1<<17)}); err != nil { // more than is read at once
			t.Fatal(err)
		}
	}
	n := 0
	err := l.Records(func(Record) error {
		n++
		l.broken = syscall.EIO
		_, err := l.Append("gate", entry{})
		return err
	})
	if n != 3 || err != nil {
		t.Errorf("%d records, want 3: %v", n, err)
	}
}

func TestAppendAndRead(t *testing.T) {
	o, l := filled(t, 7)
	if err := l.Verify(); err != nil {
		t.Error(err)
	}
	l = open(t, o)
	last, err := l.Last(2)
	if err != nil || len(last) != 2 || last[1].Index != 6 || last[1].Kind != "decision" || last[1].Commit != "c0" || string(last[1].Body) != `{"commit":"c0","reason":"reason 6"}` {
		t.Errorf("%+v %v", last, err)
	}
	if all, err := l.Last(100); err != nil || len(all) != 7 {
		t.Error(len(all), err)
	}
	about, err := l.ByCommit("c0")
	if err != nil {
		t.Fatal(err)
	}
	var indexes []int64
	for _, r := range about {
		indexes = append(indexes, r.Index)
	}
	if diff := cmp.Diff([]int64{0, 3, 6}, indexes); diff != "" {
		t.Error(diff)
	}
	stop := errors.New("enough")
	if err := l.Records(func(Record) error { return stop }); err != stop {
		t.Error(err)
	}
	if _, err := l.Append("gate", "not an object"); err == nil {
		t.Error("a body that is no object is taken")
	}
	if index, err := l.Append("gate", struct{}{}); index != 7 || err != nil {
		t.Error(index, err)
	}
	file, err := os.ReadFile(l.path("checkpoint"))
	if err != nil || !strings.HasPrefix(string(file), "edge-1.north-sea/kmo-audit\n8\n") {
		t.Errorf("%s %v", file, err)
	}
}

func TestT73(t *testing.T) {
	for _, tt := range []struct {
		name string
		harm func(records, checkpoint []byte) ([]byte, []byte)
		text string
	}{
		{"truncated", func(r, c []byte) ([]byte, []byte) { return r[:strings.LastIndex(string(r[:len(r)-1]), "\n")+1], c }, "4 records; want 5"},
		{"truncated within a line", func(r, c []byte) ([]byte, []byte) { return r[:len(r)-3], c }, "4 records; want 5"},
		{"entry edited", func(r, c []byte) ([]byte, []byte) {
			return []byte(strings.Replace(string(r), "reason 2", "reason X", 1)), c
		}, "root"},
		{"entry edited, same JSON", func(r, c []byte) ([]byte, []byte) {
			return []byte(strings.Replace(string(r), `"kind":"decision"`, `"kind": "decision"`, 1)), c
		}, "root"},
		{"two entries swapped", func(r, c []byte) ([]byte, []byte) {
			lines := strings.SplitAfter(string(r), "\n")
			lines[1], lines[2] = lines[2], lines[1]
			return []byte(strings.Join(lines, "")), c
		}, "records in order"},
		{"two entries more", func(r, c []byte) ([]byte, []byte) {
			return append(r, `{"index":5,"time":"2026-11-22T22:46:00Z","kind":"x","body":{}}`+"\n"+`{"index":6,"time":"2026-11-22T22:46:00Z","kind":"x","body":{}}`+"\n"...), c
		}, "7 records; want 5"},
		{"one entry more and a torn one", func(r, c []byte) ([]byte, []byte) {
			return append(r, `{"index":5,"time":"2026-11-22T22:46:00Z","kind":"x","body":{}}`+"\n{"...), c
		}, "6 records; want 5"},
		{"checkpoint gone", func(r, c []byte) ([]byte, []byte) { return r, nil }, "records without a checkpoint"},
		{"checkpoint of a smaller size", func(r, c []byte) ([]byte, []byte) {
			return r, []byte(strings.Replace(string(c), "\n5\n", "\n4\n", 1))
		}, "does not verify"},
		{"records gone", func(r, c []byte) ([]byte, []byte) { return nil, c }, "0 records; want 5"},
	} {
		t.Run("T73 "+tt.name, func(t *testing.T) {
			o, l := filled(t, 5)
			records, err1 := os.ReadFile(l.path("records"))
			checkpoint, err2 := os.ReadFile(l.path("checkpoint"))
			if err1 != nil || err2 != nil {
				t.Fatal(err1, err2)
			}
			records, checkpoint = tt.harm(records, checkpoint)
			if err := os.WriteFile(l.path("records"), records, 0o600); err != nil {
				t.Fatal(err)
			}
			if checkpoint == nil {
				os.Remove(l.path("checkpoint"))
			} else if err := os.WriteFile(l.path("checkpoint"), checkpoint, 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := Open(o)
			if r := refusal.Of(err); r == nil || r.Code != "E_LOG_CONSISTENCY" || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("got %v, want E_LOG_CONSISTENCY with %q", err, tt.text)
			}
			if err := l.Verify(); err == nil {
				t.Error("an open log does not see it")
			}
			if _, err := Read(o.Dir, public(o)); !inconsistent(err) {
				t.Error("who reads does not see it:", err)
			}
		})
	}
	t.Run("T73 checkpoint older than the witness", func(t *testing.T) {
		o, l := filled(t, 5)
		old, err := l.Tree()
		if err != nil {
			t.Fatal(err)
		}
		keep := map[string][]byte{}
		for _, name := range []string{"records", "checkpoint"} {
			if keep[name], err = os.ReadFile(l.path(name)); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := l.Append("gate", entry{}); err != nil {
			t.Fatal(err)
		}
		if o.Seen, err = l.Tree(); err != nil {
			t.Fatal(err)
		}
		open(t, o)
		for name, file := range keep { // restored from a backup, both together
			if err := os.WriteFile(l.path(name), file, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := Open(o); refusal.Of(err) == nil || !strings.Contains(err.Error(), "5 records; want at least 6") {
			t.Error(err)
		}
		o.Seen = tlog.Tree{N: 5, Hash: tlog.Hash{1}}
		if _, err := Open(o); refusal.Of(err) == nil {
			t.Error("another history of the same length is taken")
		}
		o.Seen = old
		open(t, o)
	})
	t.Run("another host's key", func(t *testing.T) {
		o, _ := filled(t, 1)
		o.Key = ed25519.NewKeyFromSeed([]byte(strings.Repeat("x", 32)))
		if _, err := Open(o); refusal.Of(err) == nil {
			t.Error(err)
		}
	})
}

// TestCrash cuts an append at every byte of its line, and between its line and its checkpoint.
func TestCrash(t *testing.T) {
	o, l := filled(t, 3)
	before, err := os.ReadFile(l.path("checkpoint"))
	if err != nil {
		t.Fatal(err)
	}
	start := l.size()
	if _, err := l.Append("gate", entry{Commit: "x"}); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(l.path("records"))
	if err != nil {
		t.Fatal(err)
	}
	for end := start; end <= int64(len(whole)); end++ {
		for name, file := range map[string][]byte{"records": whole[:end], "checkpoint": before} {
			if err := os.WriteFile(l.path(name), file, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		again, err := Open(o)
		if err != nil {
			t.Fatalf("cut at %d of %d: %v", end, len(whole), err)
		}
		index, err := again.Append("gate", entry{Commit: "y"})
		if err == nil {
			err = again.Verify()
		}
		if index != 3 || err != nil {
			t.Errorf("cut at %d of %d: index %d, %v", end, len(whole), index, err)
		}
		if err := again.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestLostCheckpoint: the disk has lost the newest checkpoint, of which the journal knows: its line stays.
func TestLostCheckpoint(t *testing.T) {
	o, l := filled(t, 3)
	before, err := os.ReadFile(l.path("checkpoint"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Append("gate", entry{}); err != nil {
		t.Fatal(err)
	}
	if o.Seen, err = l.Tree(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(l.path("checkpoint"), before, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		again := open(t, o)
		if got, err := again.Tree(); err != nil || got != o.Seen {
			t.Errorf("%v (%v), want %v", got, err, o.Seen)
		}
	}
}

func TestWriteFault(t *testing.T) {
	o, l := filled(t, 2)
	l.file.Close()
	if _, err := l.Append("gate", entry{}); err == nil {
		t.Fatal("a write to a closed file succeeds")
	}
	if _, err := l.Append("gate", entry{}); err != nil {
		t.Error("the log is not read again:", err)
	}
	if l := open(t, o); l.Verify() != nil {
		t.Error("the log is not whole after a fault")
	}
}

func BenchmarkOpen10000(b *testing.B) {
	o, l := filled(b, 1)
	for range 9999 { // in one go: what is measured is Open
		line := fmt.Appendf(nil, `{"index":%d,"time":"2026-11-22T22:46:00Z","kind":"decision","commit":"c","body":{"reason":"%s"}}`, len(l.ends), strings.Repeat("x", 900))
		if _, err := l.file.WriteAt(append(line, '\n'), l.size()); err != nil {
			b.Fatal(err)
		}
		if err := l.include(line); err != nil {
			b.Fatal(err)
		}
	}
	if err := l.checkpoint(); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		l, err := Open(o)
		if err != nil {
			b.Fatal(err)
		}
		l.Close()
	}
}

func BenchmarkAppend(b *testing.B) {
	l := open(b, options(b))
	for b.Loop() {
		if _, err := l.Append("decision", entry{Reason: strings.Repeat("x", 900)}); err != nil {
			b.Fatal(err)
		}
	}
}
