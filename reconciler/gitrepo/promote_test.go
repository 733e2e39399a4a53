package gitrepo

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/google/go-cmp/cmp"
)

// noise is text that does not compress below three quarters.
func noise(seed byte, n int) string {
	raw := make([]byte, n*3/4)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(raw)
	return base64.StdEncoding.EncodeToString(raw)
}

// rewrite puts the branch at a commit without parents that has one file of noise.
func (w *world) rewrite(seed byte, n int) string {
	w.t.Helper()
	id := w.commitOf(w.treeOf("100644", "noise", w.object("blob", noise(seed, n))))
	w.point(id)
	return id
}

// point moves the branch of the bare repository.
func (w *world) point(id string) {
	w.t.Helper()
	if err := os.WriteFile(filepath.Join(w.bare, "refs/heads/main"), []byte(id+"\n"), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

// packedBytes is how many bytes a copy's packs and indexes have.
func packedBytes(t *testing.T, r *Repository) (n int) {
	for _, text := range contents(t, filepath.Join(r.Dir, "objects/pack")) {
		n += len(text)
	}
	return n
}

// keeping is a copy of at most 300 KiB that keeps some commits, on a clock that the test turns.
func (w *world) keeping(now *time.Time, ids ...string) *Repository {
	return w.open(func(r *Repository) {
		r.Limits.Copy, r.Now = 300<<10, func() time.Time { return *now }
		r.Keep = func() ([]string, error) { return ids, nil }
	})
}

func readAt(r *Repository, id, path string) (string, error) {
	c, err := r.At(context.Background(), id)
	if err != nil {
		return "", err
	}
	text, err := fs.ReadFile(c.Tree, path)
	return string(text), err
}

// A remote that rewrites its branch at each look fills the copy to its limit, and drives nothing out that must stay.
func TestCopyIsBounded(t *testing.T) {
	w := newWorld(t)
	w.commit("a", "1", "b/c", "2")
	accepted := w.commit("a", "3")
	now := time.Unix(1700000000, 0)
	r := w.keeping(&now, accepted)
	head(t, r)
	stop := make(chan struct{})
	var readers sync.WaitGroup
	defer func() { close(stop); readers.Wait() }()
	readers.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if text, err := readAt(r, accepted, "b/c"); text != "2" || err != nil {
				t.Errorf("the accepted commit's file is %q, %v", text, err)
				return
			}
		}
	})
	var ids []string
	for i := range 12 {
		now = now.Add(2 * judging)
		ids = append(ids, w.rewrite(byte(i), 100<<10))
		if got := head(t, r); got != ids[i] {
			t.Fatalf("head is %s, want %s", got, ids[i])
		}
		if n := packedBytes(t, r); n > 300<<10 {
			t.Errorf("after %d rewrites the copy has %d bytes, want at most %d", i+1, n, 300<<10)
		}
	}
	if text, err := readAt(r, ids[11], "noise"); text != noise(11, 100<<10) || err != nil {
		t.Errorf("the branch's file: %d bytes, %v", len(text), err)
	}
	if _, err := r.At(context.Background(), ids[0]); !errors.Is(err, errAbsent) {
		t.Errorf("the first that was rewritten: %v, want it gone", err)
	}
	w.run(r.Dir, "git", "fsck", "--strict", "--full")
	w.point(accepted)
	w.run(w.work, "git", "reset", "-q", "--hard", accepted)
	want := w.commit("a", "4") // on what was kept
	if got := head(t, r); got != want {
		t.Errorf("head is %s, want %s", got, want)
	}
}

// Where it is in doubt what must stay, or all of it must, the new pack is refused and the copy is as it was.
func TestCopyIsFull(t *testing.T) {
	w := newWorld(t)
	now := time.Unix(1700000000, 0)
	for name, c := range map[string]struct {
		keep func(ids []string) func() ([]string, error)
		wait time.Duration
		text string
	}{
		"nobody says": {func([]string) func() ([]string, error) { return nil }, 2 * judging, "no record says"},
		"no answer": {func([]string) func() ([]string, error) {
			return func() ([]string, error) { return nil, errors.New("the journal is locked") }
		}, 2 * judging, "the journal is locked"},
		"an absent commit": {func([]string) func() ([]string, error) {
			return func() ([]string, error) { return []string{strings.Repeat("3", 40)}, nil }
		}, 2 * judging, "no such object"},
		"no commit id": {func([]string) func() ([]string, error) {
			return func() ([]string, error) { return []string{"main"}, nil }
		}, 2 * judging, "40 lower-case hex digits"},
		"all is kept": {func(ids []string) func() ([]string, error) {
			return func() ([]string, error) { return ids, nil }
		}, 2 * judging, "at most 307200 bytes"},
		"handed out just now": {func([]string) func() ([]string, error) {
			return func() ([]string, error) { return nil, nil }
		}, time.Minute, "at most 307200 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			r := w.keeping(&now)
			var ids []string
			for i := range 3 {
				ids = append(ids, w.rewrite(byte(i), 120<<10))
				head(t, r)
				now = now.Add(c.wait)
			}
			r.Keep = c.keep(ids)
			next := w.rewrite(9, 120<<10)
			w.refused(t, "E_LIMIT", next, r)
			if _, err := r.Head(context.Background()); err == nil || !strings.Contains(err.Error(), c.text) {
				t.Errorf("%v; want %q in it", err, c.text)
			}
			now = now.Add(2 * judging)
			r.Keep = func() ([]string, error) { return ids[:1], nil }
			if got := head(t, r); got != next {
				t.Errorf("once there is room head is %s, want %s", got, next)
			}
			if text, err := readAt(r, ids[0], "noise"); text != noise(0, 120<<10) || err != nil {
				t.Errorf("what is kept: %d bytes, %v", len(text), err)
			}
		})
	}
	t.Run("objects", func(t *testing.T) {
		r := w.open(func(r *Repository) { r.Limits.Objects = 3 })
		for i := range 8 {
			w.rewrite(byte(i), 100)
			head(t, r)
		}
		w.refused(t, "E_LIMIT", w.rewrite(9, 100), r)
	})
}

// A pack that is wanted in part is written anew: deltas stay deltas, and one whose base goes becomes whole.
func TestSift(t *testing.T) {
	var now time.Time
	w := newWorld(t)
	base, dead := []byte("text of a file that is long enough to be a base"), []byte("text of a file to which nothing leads, a base too")
	files := map[string]string{"a": string(base), "far": string(dead) + "far", "id": string(base) + "id", "near": string(base) + "near"}
	var tree []byte
	for _, name := range slices.Sorted(maps.Keys(files)) {
		h := plumbing.ComputeHash(plumbing.BlobObject, []byte(files[name]))
		tree = append(tree, "100644 "+name+"\x00"+string(h[:])...)
	}
	commit := fmt.Appendf(nil, "tree %s\nauthor A <a@b> 1 +0000\ncommitter A <a@b> 1 +0000\n\nx\n", plumbing.ComputeHash(plumbing.TreeObject, tree))
	first := plumbing.ComputeHash(plumbing.CommitObject, commit).String()
	baseID, deadID, junk := plumbing.ComputeHash(plumbing.BlobObject, base), plumbing.ComputeHash(plumbing.BlobObject, dead), noise(1, 150<<10)
	byID := delta(len(base), len(base)+2, "id")
	p := &madePack{}
	p.object(plumbing.BlobObject, dead).onto(delta(len(dead), len(dead)+3, "far")).object(plumbing.CommitObject, commit)
	p.add(plumbing.REFDeltaObject, len(byID), baseID[:], byID).object(plumbing.BlobObject, []byte(junk)).object(plumbing.TreeObject, tree)
	p.object(plumbing.BlobObject, base).onto(delta(len(base), len(base)+4, "near"))
	blob, leaf, other, second := site(noise(2, 150<<10))
	q := &madePack{}
	q.object(plumbing.BlobObject, blob).object(plumbing.TreeObject, leaf).object(plumbing.CommitObject, other)
	dir := filepath.Join(t.TempDir(), "copy")
	var r *Repository
	for _, c := range []struct {
		id   string
		pack []byte
	}{{first, p.done()}, {second, q.done()}} {
		s := liar(t, advert(c.id), func(a http.ResponseWriter) { _, _ = io.WriteString(a, lines("NAK\n")+string(c.pack)) })
		r = w.keeping(&now, first)
		r.Close()
		r = &Repository{Dir: dir, Remote: s.URL + "/site.git", Branch: "main", Limits: r.Limits, Keep: r.Keep}
		r.Limits.Copy = 200 << 10
		if err := r.Open(); err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		if got := head(t, r); got != c.id {
			t.Fatalf("head is %s, want %s", got, c.id)
		}
	}
	got := map[string]string{}
	for name := range files {
		text, err := readAt(r, first, name)
		if err != nil {
			t.Error(err)
		}
		got[name] = text
	}
	if diff := cmp.Diff(files, got); diff != "" {
		t.Errorf("the files of the first commit:\n%s", diff)
	}
	for what, h := range map[string]plumbing.Hash{"junk": plumbing.ComputeHash(plumbing.BlobObject, []byte(junk)), "the dead base": deadID} {
		if r.own.has(h) {
			t.Errorf("%s is still there", what)
		}
	}
	kinds := map[string]plumbing.ObjectType{}
	for _, pack := range r.own.present() {
		for name, text := range files {
			if at, err := pack.idx.FindOffset(plumbing.ComputeHash(plumbing.BlobObject, []byte(text))); err == nil {
				head, _, err := pack.header(at)
				if err != nil {
					t.Fatal(err)
				}
				kinds[name] = head.Type
			}
		}
	}
	want := map[string]plumbing.ObjectType{"a": plumbing.BlobObject, "far": plumbing.BlobObject, "id": plumbing.REFDeltaObject, "near": plumbing.OFSDeltaObject}
	if diff := cmp.Diff(want, kinds); diff != "" {
		t.Errorf("how the files are packed:\n%s", diff)
	}
	w.run(dir, "git", "fsck", "--strict", "--full")
}

// A copy that is full and found damaged is made whole all the same.
func TestFullAndDamaged(t *testing.T) {
	w := newWorld(t)
	now := time.Unix(1700000000, 0)
	first := w.commit("a", noise(1, 240<<10))
	r := w.keeping(&now, first)
	head(t, r)
	w.run(r.Dir, "sh", "-c", "chmod u+w objects/pack/*.pack && printf xxxx | dd of=$(ls objects/pack/*.pack) bs=1 seek=5000 conv=notrunc status=none")
	if _, err := readAt(r, first, "a"); err == nil {
		t.Fatal("no damage")
	}
	second := w.commit("b", "1")
	if got := head(t, r); got != second {
		t.Fatalf("head is %s, want %s", got, second)
	}
	if text, err := readAt(r, first, "a"); text != noise(1, 240<<10) || err != nil {
		t.Errorf("the file: %d bytes, %v", len(text), err)
	}
	if n := packedBytes(t, r); n > 300<<10 {
		t.Errorf("the copy has %d bytes, want at most %d", n, 300<<10)
	}
	w.run(r.Dir, "git", "fsck", "--strict", "--full")
}

// Wherever a process is killed while packs take the place of others, the next one has a sound copy and ends what was begun.
func TestKilledWhileMakingRoom(t *testing.T) {
	w := newWorld(t)
	now := time.Unix(1700000000, 0)
	kept := w.commit("a", "1", "b/c", noise(1, 10<<10))
	r := w.keeping(&now, kept)
	head(t, r)
	for i := range 2 {
		now = now.Add(2 * judging)
		w.rewrite(byte(i), 120<<10)
		head(t, r)
	}
	now = now.Add(2 * judging)
	before := contents(t, r.Dir)
	tip := w.rewrite(3, 160<<10)
	head(t, r)
	after := contents(t, r.Dir)
	var gone []string // packs, without suffix
	for path := range before {
		if name, ok := strings.CutSuffix(path, ".idx"); ok && after[path] == "" {
			gone = append(gone, name)
		}
	}
	if len(gone) != 2 {
		t.Fatalf("%d packs went, want 2", len(gone))
	}
	branch, note := "/refs/heads/main", ""
	for _, name := range gone {
		note += filepath.Base(name) + "\n"
	}
	both := maps.Clone(before)
	maps.Copy(both, after)
	with := func(all map[string]string, path, text string) map[string]string {
		all = maps.Clone(all)
		all[path] = text
		return all
	}
	half := with(both, "/gone", note)
	delete(half, gone[0]+".idx")
	less := maps.Clone(half)
	delete(less, gone[0]+".pack")
	for name, files := range map[string]map[string]string{
		"before the branch moved":    with(both, branch, before[branch]),
		"before packs were noted":    both,
		"while they were noted":      with(both, "/.gone123", note[:9]),
		"before any was removed":     with(both, "/gone", note),
		"after an index":             half,
		"after one":                  less,
		"after all were removed":     with(after, "/gone", note),
		"in the middle of sifting":   with(before, "/quarantine-1/new1.pack", "PACK"),
		"with one pack in, no index": with(before, "/objects/pack/pack-"+strings.Repeat("4", 40)+".pack", "PACK"),
	} {
		t.Run(name, func(t *testing.T) {
			w.point(tip)
			dir := t.TempDir()
			for path, text := range files {
				path = filepath.Join(dir, path)
				if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(text), 0o600)); err != nil {
					t.Fatal(err)
				}
			}
			again := w.keeping(&now, kept)
			again.Close()
			again = &Repository{Dir: dir, Remote: w.bare, Branch: "main", Limits: again.Limits, Keep: again.Keep, Now: again.Now}
			if err := again.Open(); err != nil {
				t.Fatal(err)
			}
			defer again.Close()
			check := func(want string) {
				t.Helper()
				if got := head(t, again); got != want || again.own.damaged.Load() {
					t.Errorf("head is %s, want %s; damaged is %v", got, want, again.own.damaged.Load())
				}
				if text, err := readAt(again, kept, "b/c"); text != noise(1, 10<<10) || err != nil {
					t.Errorf("what is kept: %d bytes, %v", len(text), err)
				}
				w.run(dir, "git", "fsck", "--strict", "--full", "--connectivity-only", "--unreachable")
				w.run(dir, "git", "fsck", "--strict", "--full")
			}
			check(tip)
			check(w.rewrite(7, 160<<10))
			if n := packedBytes(t, again); n > 300<<10 {
				t.Errorf("the copy has %d bytes, want at most %d", n, 300<<10)
			}
			for _, left := range []string{"gone", ".gone123", "quarantine-1"} {
				if _, err := os.Lstat(filepath.Join(dir, left)); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("%s is left", left)
				}
			}
		})
	}
}
