package gitrepo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/go-git/go-billy/v5/osfs"
	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/cache"
	"github.com/go-git/go-git/v5/plumbing/format/idxfile"
	"github.com/go-git/go-git/v5/plumbing/format/packfile"
	"github.com/go-git/go-git/v5/storage/filesystem"
	"github.com/google/renameio/v2"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/reconciler"
)

// mergeAt is how many packs the copy may have before the small ones are made one, and smallPack what small is.
const (
	mergeAt   = 64
	smallPack = 4096
)

// judging is how long whoever was handed a commit may take until it is among those of Keep.
const judging = time.Hour

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
	err = r.locked(func() error { return r.take(ctx, p, tip, whole) })
	if err != nil {
		return commit, fmt.Errorf("promoting: %w", err)
	}
	if len(r.own.present()) > mergeAt {
		_ = r.locked(func() error { return r.merge(ctx) }) // the next fetch tries again
	}
	return r.commit(r.own, tip)
}

// take moves the branch to a judged pack's commit. Where the copy has no room for the pack, smaller packs take the place of some:
// they are in before the branch moves, and those go after it has, so that the copy is sound wherever it is interrupted.
func (r *Repository) take(ctx context.Context, p *pack, tip plumbing.Hash, whole bool) error {
	smaller, gone, err := r.makeRoom(ctx, p, tip, whole)
	defer func() {
		for _, one := range smaller {
			one.close()
		}
	}()
	if err != nil {
		return err
	}
	for _, one := range append(smaller, p) {
		if err := r.promote(one); err != nil {
			return err
		}
	}
	if whole {
		r.dropDamaged(ctx)
	}
	if err := r.moveTip(tip); err != nil {
		return err
	}
	return r.remove(gone)
}

// promote moves a pack from quarantine into the copy: synced, the pack first, its index last.
func (r *Repository) promote(in *pack) error {
	if n, err := in.idx.Count(); n == 0 || err != nil {
		return err
	}
	path := strings.TrimSuffix(in.file.Name(), ".pack")
	done := make(chan error, 1)
	go func() { done <- in.file.Sync() }()
	err := writeSynced(path+".idx", func(w io.Writer) error {
		_, err := idxfile.NewEncoder(w).Encode(in.idx)
		return err
	})
	if err := errors.Join(err, <-done); err != nil {
		return err
	}
	dir := filepath.Join(r.Dir, "objects/pack")
	to := filepath.Join(dir, in.promoted())
	for _, suffix := range []string{".pack", ".idx"} {
		if err := os.Rename(path+suffix, to+suffix); err != nil {
			return err
		}
	}
	if err := syncFolder(dir); err != nil {
		return err
	}
	p, err := newPack(to, in.idx, r.Limits)
	if err != nil {
		return err
	}
	r.own.put(p)
	return nil
}

// promoted is the pack's name in the copy.
func (p *pack) promoted() string { return "pack-" + plumbing.Hash(p.idx.PackfileChecksum).String() }

// makeRoom returns nothing where the copy has room for a new pack. Else it leaves out what nothing leads to once the branch is at tip,
// and returns smaller packs, in quarantine, and those whose place they take. The copy stays as it is; what still does not fit is refused.
func (r *Repository) makeRoom(ctx context.Context, p *pack, tip plumbing.Hash, whole bool) (smaller, gone []*pack, err error) {
	have := r.own.present()
	full := r.fits(append(have, p))
	if n, err := p.idx.Count(); full == nil || n == 0 || err != nil {
		return nil, nil, err
	}
	after, smaller, gone, err := r.reduce(ctx, have, p, tip, whole)
	switch {
	case ctx.Err() != nil:
		return smaller, nil, ctx.Err()
	case err != nil:
		full.Got += "; nothing was left out: " + refusal.Clip(err.Error(), 200)
		return smaller, nil, full
	}
	if full = r.fits(after); full != nil {
		return smaller, nil, full
	}
	return smaller, gone, nil
}

// fits refuses packs that are more than a copy may be. The objects are counted because every index is held in memory.
func (r *Repository) fits(packs []*pack) *refusal.Error {
	var bytes, objects int64
	for _, p := range packs {
		n, _ := p.idx.Count()
		objects += n
		bytes += p.size + 28*n + 1072 // and its index
	}
	if bytes <= r.Limits.Copy && objects <= r.most() {
		return nil
	}
	return refuse("E_LIMIT", "the copy with the new pack", fmt.Sprintf("%d bytes, %d objects", bytes, objects),
		fmt.Sprintf("at most %d bytes and %d objects of what the branch or this host's own record leads to", r.Limits.Copy, r.most()))
}

func (r *Repository) most() int64 { return 8 * int64(r.Limits.Objects) }

// reduce sorts the copy's packs by what is live in them: all, and they stay; some, and a smaller one is written; nothing. What is in
// more than one pack counts in the first; if the copy is damaged, in the new one. after is all that the copy would have.
func (r *Repository) reduce(ctx context.Context, have []*pack, p *pack, tip plumbing.Hash, whole bool) (after, smaller, gone []*pack, err error) {
	from := &store{limits: r.Limits, packs: []*pack{p}, borrow: []*store{r.own}}
	live, err := r.live(ctx, from, tip)
	if err == nil && whole {
		_, _, err = claim(p, live)
	}
	after = []*pack{p}
	for i := 0; err == nil && i < len(have); i++ {
		if have[i].name == p.promoted() {
			continue // the new one replaces it
		}
		var mine map[plumbing.Hash]bool
		var all bool
		if mine, all, err = claim(have[i], live); all {
			after = append(after, have[i])
			continue
		}
		gone = append(gone, have[i])
		if err == nil && len(mine) > 0 {
			var less *pack
			if less, err = r.sift(ctx, have[i], mine, live, from, fmt.Sprint(strings.TrimSuffix(p.file.Name(), ".pack"), i)); err == nil {
				after, smaller = append(after, less), append(smaller, less)
			}
		}
	}
	for _, less := range smaller { // in the copy already, if a process was killed before it removed the larger one
		gone = slices.DeleteFunc(gone, func(old *pack) bool { return old.name == less.promoted() })
	}
	for h, unclaimed := range live {
		if in, _ := p.idx.Contains(h); unclaimed && !in && err == nil {
			err = fmt.Errorf("object %s is in no pack", h)
		}
	}
	return after, smaller, gone, err
}

// claim takes what is live in a pack and in none before it. all says that this is everything the pack has.
func claim(p *pack, live map[plumbing.Hash]bool) (mine map[plumbing.Hash]bool, all bool, err error) {
	entries, err := p.entries()
	mine = map[plumbing.Hash]bool{}
	for _, e := range entries {
		if live[e.Hash] {
			live[e.Hash], mine[e.Hash] = false, true
		}
	}
	return mine, err == nil && len(mine) == len(entries), err
}

// sift writes what is wanted of a pack to one in quarantine, and judges that as if a remote had sent it.
func (r *Repository) sift(ctx context.Context, p *pack, want, live map[plumbing.Hash]bool, from *store, path string) (*pack, error) {
	f, err := os.OpenFile(path+".pack", os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o400)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	out, err := newPacker(f, r.Limits.Copy)
	if err == nil {
		err = out.sift(ctx, p, want, from.read)
	}
	if err == nil {
		err = out.finish()
	}
	if err != nil {
		return nil, err
	}
	idx, err := index(ctx, f, r.Limits, func(h plumbing.Hash) bool { _, ok := live[h]; return ok })
	if err != nil {
		return nil, err
	}
	for h := range want {
		if ok, _ := idx.Contains(h); !ok {
			return nil, fmt.Errorf("object %s was not copied", h)
		}
	}
	return newPack(path, idx, r.Limits)
}

// live has every object that must stay once the branch is at tip: what that, the commits of Keep and those lately handed out lead to.
// All of it is read and hashed, so that nothing is removed from a copy that is not sound. True means that no pack has claimed it.
func (r *Repository) live(ctx context.Context, from *store, tip plumbing.Hash) (map[plumbing.Hash]bool, error) {
	if r.Keep == nil {
		return nil, errors.New("no record says what else must stay")
	}
	ids, err := r.Keep()
	if err != nil {
		return nil, err
	}
	todo := append(slices.Collect(maps.Keys(r.handed)), tip)
	for _, id := range ids {
		h, err := parseID(id)
		if err != nil {
			return nil, err
		}
		todo = append(todo, h)
	}
	live := map[plumbing.Hash]bool{}
	for len(todo) > 0 {
		h := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if live[h] {
			continue
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if live[h] = true; int64(len(live)) > r.most() {
			return nil, fmt.Errorf("more than %d objects are needed", r.most())
		}
		kind, content, err := from.read(h)
		if err != nil {
			return nil, err
		}
		for _, next := range links(kind, content) {
			if !live[next] {
				todo = append(todo, next)
			}
		}
	}
	return live, nil
}

// moveTip is the commit point of a fetch.
func (r *Repository) moveTip(tip plumbing.Hash) error {
	path := filepath.Join(r.Dir, "refs/heads", filepath.FromSlash(r.Branch))
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	err := renameio.WriteFile(path, []byte(tip.String()+"\n"), 0o600, renameio.WithTempDir(r.Dir))
	if err == nil {
		err = syncFolder(filepath.Dir(path))
	}
	if err == nil {
		r.tip = tip
	}
	return err
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

// merge makes the small packs one, with deltas, and removes them once it is in.
func (r *Repository) merge(ctx context.Context) error {
	var small []*pack
	var ids []plumbing.Hash
	seen := map[plumbing.Hash]bool{}
	for _, p := range r.own.present() {
		if n, err := p.idx.Count(); err != nil || n >= smallPack {
			continue
		}
		entries, err := p.entries()
		if err != nil {
			return err
		}
		for _, e := range entries {
			if !seen[e.Hash] {
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
	merged, err := newPack(strings.TrimSuffix(f.Name(), ".pack"), idx, r.Limits)
	if err != nil {
		return err
	}
	defer merged.close()
	if err := r.promote(merged); err != nil {
		return err
	}
	return r.remove(slices.DeleteFunc(small, func(p *pack) bool { return p.name == merged.promoted() }))
}

// remove takes packs out of the copy. What is held must have all that it leads to, and with some of them gone that may not be so:
// they are noted first, and whoever opens the copy next ends what was begun.
func (r *Repository) remove(gone []*pack) error {
	if len(gone) == 0 {
		return nil
	}
	var names bytes.Buffer
	for _, p := range gone {
		fmt.Fprintln(&names, p.name)
	}
	err := r.removeNoted() // what could not be removed before
	if err == nil {
		err = renameio.WriteFile(filepath.Join(r.Dir, "gone"), names.Bytes(), 0o600, renameio.WithTempDir(r.Dir))
	}
	if err == nil {
		err = syncFolder(r.Dir)
	}
	if err == nil {
		err = r.removeNoted()
	}
	if err = errors.Join(err, r.own.refresh()); err != nil {
		r.own.damaged.Store(true)
	}
	return err
}

func (r *Repository) removeNoted() error {
	note, dir := filepath.Join(r.Dir, "gone"), filepath.Join(r.Dir, "objects/pack")
	text, err := os.ReadFile(note)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for name := range strings.FieldsSeq(string(text)) {
		for _, suffix := range []string{".idx", ".pack"} {
			if one := os.Remove(filepath.Join(dir, filepath.Base(name)+suffix)); !errors.Is(one, fs.ErrNotExist) {
				err = errors.Join(err, one)
			}
		}
	}
	if err = errors.Join(err, syncFolder(dir)); err != nil {
		return err
	}
	return os.Remove(note)
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

func writeSynced(path string, write func(io.Writer) error) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o400)
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
