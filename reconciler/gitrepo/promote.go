package gitrepo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/go-git/go-billy/v5/osfs"
	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/cache"
	"github.com/go-git/go-git/v5/plumbing/format/idxfile"
	"github.com/go-git/go-git/v5/plumbing/format/packfile"
	"github.com/go-git/go-git/v5/storage/filesystem"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/reconciler"
)

// mergeAt is how many packs the copy may have before the small ones are made one, and smallPack what small is.
const (
	mergeAt   = 64
	smallPack = 4096
)

// quarantine makes an empty pack file in a folder of its own. done closes it and clears what was not promoted.
func (r *Repository) quarantine() (f *os.File, done func(), err error) {
	dir, err := os.MkdirTemp(r.Dir, "quarantine-")
	if err != nil {
		return nil, nil, err
	}
	f, err = os.OpenFile(filepath.Join(dir, "new.pack"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o400)
	if err != nil {
		return nil, nil, errors.Join(err, os.RemoveAll(dir))
	}
	return f, func() { f.Close(); _ = os.RemoveAll(dir) }, nil
}

// admit judges the pack in quarantine and promotes it with the branch's new commit. After an error the copy is as it was.
// whole means that the copy is damaged: the pack must stand alone, and the damaged packs go once it is in.
func (r *Repository) admit(ctx context.Context, f *os.File, tip plumbing.Hash, whole bool) (reconciler.Commit, error) {
	base, held := r.own, r.own.has
	if whole {
		base, held = nil, func(plumbing.Hash) bool { return false }
	}
	idx, err := index(ctx, f, r.Limits, held)
	if err != nil {
		return reconciler.Commit{}, err
	}
	path := strings.TrimSuffix(f.Name(), ".pack")
	p, err := newPack(path, idx, r.Limits)
	if err != nil {
		return reconciler.Commit{}, err
	}
	defer p.close()
	quarantine := &store{limits: r.Limits, base: base, packs: []*pack{p}}
	commit, err := r.commit(quarantine, tip)
	if errors.Is(err, errAbsent) {
		err = refuse("E_PACK", "the pack", "no commit "+tip.String(), "the commit that the branch is at")
	}
	if err != nil {
		return commit, err
	}
	head, err := parseCommit(commit.Raw)
	if err != nil {
		return commit, err
	}
	known := r.checked
	if whole {
		known = map[plumbing.Hash]extent{}
	}
	if err := checkTree(ctx, quarantine, head.tree, r.Limits, known); err != nil {
		return commit, fmt.Errorf("commit %s: %w", tip, err)
	}
	err = r.locked(func() error {
		if err := r.promote(f, idx); err != nil {
			return err
		}
		if whole {
			r.dropDamaged(ctx)
		}
		return r.moveTip(tip)
	})
	if err != nil {
		return commit, fmt.Errorf("promoting: %v", err)
	}
	if len(r.own.present()) > mergeAt {
		_ = r.locked(func() error { return r.merge(ctx) }) // the next fetch tries again
	}
	return r.commit(r.own, tip)
}

// promote moves a judged pack into the copy: synced, the pack first, its index last.
func (r *Repository) promote(f *os.File, idx *idxfile.MemoryIndex) error {
	if n, err := idx.Count(); n == 0 || err != nil {
		return err
	}
	path := strings.TrimSuffix(f.Name(), ".pack")
	done := make(chan error, 1)
	go func() { done <- f.Sync() }()
	err := writeSynced(path+".idx", 0o400, func(w io.Writer) error {
		_, err := idxfile.NewEncoder(w).Encode(idx)
		return err
	})
	if err := errors.Join(err, <-done); err != nil {
		return err
	}
	dir := filepath.Join(r.Dir, "objects/pack")
	to := filepath.Join(dir, "pack-"+plumbing.Hash(idx.PackfileChecksum).String())
	for _, suffix := range []string{".pack", ".idx"} {
		if err := os.Rename(path+suffix, to+suffix); err != nil {
			return err
		}
	}
	if err := syncFolder(dir); err != nil {
		return err
	}
	p, err := newPack(to, idx, r.Limits)
	if err != nil {
		return err
	}
	r.own.put(p)
	return nil
}

// put adds a pack, in the place of one with the same name if there is one.
func (s *store) put(p *pack) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, old := range s.packs {
		if old.name == p.name {
			old.close()
			s.packs[i] = p
			return
		}
	}
	s.packs = append(s.packs, p)
}

// moveTip is the commit point of a fetch.
func (r *Repository) moveTip(tip plumbing.Hash) error {
	path := filepath.Join(r.Dir, "refs/heads", filepath.FromSlash(r.Branch))
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	temporary := filepath.Join(r.Dir, "refs", "new")
	if err := os.RemoveAll(temporary); err != nil {
		return err
	}
	err := writeSynced(temporary, 0o600, func(w io.Writer) error {
		_, err := fmt.Fprintln(w, tip)
		return err
	})
	if err == nil {
		err = os.Rename(temporary, path)
	}
	if err == nil {
		err = syncFolder(filepath.Dir(path))
	}
	if err == nil {
		r.tip = tip
	}
	return err
}

// loadTip reads where the copy is. What cannot be read is a reason to fetch everything again, not an error.
func (r *Repository) loadTip() error {
	text, err := readRegular(filepath.Join(r.Dir, "refs/heads", filepath.FromSlash(r.Branch)), 100)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	h, next, bad := parseRef(strings.TrimSpace(string(text)))
	if err == nil && bad == nil && next == "" {
		if _, err = r.commit(r.own, h); err == nil {
			r.tip = h
		}
	}
	if r.tip.IsZero() {
		r.own.damaged.Store(true)
	}
	return nil
}

// dropDamaged reads every pack of the copy again and removes those that are not whole. It is called when a whole fetch is in.
func (r *Repository) dropDamaged(ctx context.Context) {
	dir := filepath.Join(r.Dir, "objects/pack")
	names, _ := filepath.Glob(filepath.Join(dir, "pack-*.pack"))
	left := false
	for _, name := range names {
		path := strings.TrimSuffix(name, ".pack")
		if err := r.verify(ctx, path); err != nil && ctx.Err() == nil {
			for _, file := range []string{path + ".idx", name} {
				err := os.Remove(file)
				left = left || err != nil && !errors.Is(err, fs.ErrNotExist)
			}
		}
	}
	r.own.damaged.Store(false)
	if err := r.own.refresh(); err != nil || left {
		r.own.damaged.Store(true)
	}
}

// verify reads a pack whole and compares it with its index.
func (r *Repository) verify(ctx context.Context, path string) error {
	p, err := openPack(path, r.Limits)
	if err != nil {
		return err
	}
	defer p.close()
	idx, err := index(ctx, p.file, r.Limits, func(plumbing.Hash) bool { return true })
	if err != nil {
		return err
	}
	if idx.PackfileChecksum != p.idx.PackfileChecksum {
		return errors.New("an index of another pack")
	}
	entries, err := idx.Entries()
	for err == nil {
		var e *idxfile.Entry
		if e, err = entries.Next(); err == nil {
			if at, missing := p.idx.FindOffset(e.Hash); missing != nil || uint64(at) != e.Offset {
				return errors.New("an index of another pack")
			}
		}
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// merge makes the small packs one, with deltas, and removes them once it is in.
func (r *Repository) merge(ctx context.Context) error {
	var small []*pack
	var ids []plumbing.Hash
	seen := map[plumbing.Hash]bool{}
	for _, p := range r.own.present() {
		if n, err := p.idx.Count(); err != nil || n >= smallPack {
			continue
		}
		entries, err := p.idx.EntriesByOffset()
		for err == nil {
			var e *idxfile.Entry
			if e, err = entries.Next(); err == nil && !seen[e.Hash] {
				seen[e.Hash] = true
				ids = append(ids, e.Hash)
			}
		}
		small = append(small, p)
	}
	f, done, err := r.quarantine()
	if err != nil {
		return err
	}
	defer done()
	all := filesystem.NewStorage(osfs.New(r.Dir), cache.NewObjectLRU(16<<20))
	if _, err := packfile.NewEncoder(f, all, false).Encode(ids, 10); err != nil {
		return err
	}
	idx, err := index(ctx, f, r.Limits, r.own.has)
	if err != nil {
		return err
	}
	if n, err := idx.Count(); err != nil || int(n) != len(ids) {
		return errors.New("merging: objects are missing")
	}
	if err := r.promote(f, idx); err != nil {
		return err
	}
	for _, p := range small {
		if p.name == "pack-"+plumbing.Hash(idx.PackfileChecksum).String() {
			continue
		}
		path := filepath.Join(r.Dir, "objects/pack", p.name)
		if err := errors.Join(os.Remove(path+".idx"), os.Remove(path+".pack")); err != nil {
			return err
		}
	}
	return r.own.refresh()
}

// sweep removes what a killed process left: quarantines, and packs without an index.
func (r *Repository) sweep() error {
	left, err := filepath.Glob(filepath.Join(r.Dir, "quarantine-*"))
	if err != nil {
		return err
	}
	packs, err := filepath.Glob(filepath.Join(r.Dir, "objects/pack/pack-*.pack"))
	if err != nil {
		return err
	}
	for _, p := range packs {
		if _, err := os.Lstat(strings.TrimSuffix(p, ".pack") + ".idx"); errors.Is(err, os.ErrNotExist) {
			left = append(left, p)
		}
	}
	for _, path := range left {
		if err := os.RemoveAll(path); err != nil {
			return err
		}
	}
	return nil
}

// locked runs do while no other process promotes.
func (r *Repository) locked(do func() error) error {
	f, err := os.OpenFile(filepath.Join(r.Dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		return fmt.Errorf("locking the copy: %v", err)
	}
	return do()
}

func writeSynced(path string, mode os.FileMode, write func(io.Writer) error) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	return errors.Join(write(f), f.Sync(), f.Close())
}

func syncFolder(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// short is the form of an id for people.
func short(id string) string { return refusal.Clip(id, 12)[:min(12, len(id))] }
