package gitrepo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp/capability"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp/sideband"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/policy/trust"
	"github.com/kindos/kmo/reconciler"
)

// Head returns the branch's commit; beside an error its id alone, where the remote has said that much. Whether it descends from what was accepted before is not asked here: a rewritten branch is
// for trust to judge.
func (r *Repository) Head(ctx context.Context) (reconciler.Commit, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	commit, err := r.withStatement(r.head(ctx))
	if err == nil {
		r.handed[r.tip] = r.Now()
	}
	return commit, err
}

func (r *Repository) head(ctx context.Context) (reconciler.Commit, error) {
	now := r.Now()
	maps.DeleteFunc(r.handed, func(_ plumbing.Hash, when time.Time) bool { return now.Sub(when) > judging })
	if r.remote.scheme == "" {
		tip, err := lookLocal(r.remote.repositoryDir(), r.Branch, r.Limits)
		if err != nil {
			return reconciler.Commit{}, err
		}
		if err := r.readStatement(); err != nil {
			return named(tip), err
		}
		if tip == r.tip && !r.own.damaged.Load() {
			if commit, err := r.tipCommit(); err == nil {
				return commit, nil
			}
		}
	}
	bounded, cancel := context.WithTimeoutCause(ctx, r.Limits.Duration,
		refuse("E_LIMIT", "the fetch", "not done after "+r.Limits.Duration.String(), "all of it in that time"))
	defer cancel()
	bounded, idle := context.WithCancelCause(bounded)
	defer idle(nil)
	damaged := r.own.damaged.Load()
	commit, err := r.fetch(bounded, idle)
	if err != nil && !damaged && r.own.damaged.Load() { // found just now: our disk's fault, not the remote's
		commit, err = r.fetch(bounded, idle)
	}
	if err != nil && ctx.Err() == nil && bounded.Err() != nil {
		err = context.Cause(bounded)
	}
	return commit, err
}

// tipCommit is the commit that the copy is at, read once.
func (r *Repository) tipCommit() (reconciler.Commit, error) {
	if id := r.tip.String(); r.last.ID == id {
		return r.last, nil
	}
	commit, err := r.commit(r.own, r.tip)
	if err == nil {
		r.last = commit
	}
	return commit, err
}

// fetch brings what the copy lacks into quarantine and has it admitted.
func (r *Repository) fetch(ctx context.Context, idle context.CancelCauseFunc) (reconciler.Commit, error) {
	whole := r.own.damaged.Load()
	f, done, err := r.quarantine()
	if err != nil {
		return reconciler.Commit{}, err
	}
	defer done()
	bring := r.receive
	if r.remote.scheme == "" {
		if bring = r.collect; whole || r.tip.IsZero() {
			bring = r.first
		}
	}
	tip, err := bring(ctx, idle, f, whole)
	if err != nil {
		return named(tip), err
	}
	if tip == r.tip && !whole {
		return r.tipCommit()
	}
	commit, err := r.admit(ctx, f, tip, whole)
	if err != nil {
		return named(tip), err
	}
	return commit, nil
}

// named is a commit of which nothing is known but its id, and not even that where the branch was not found.
func named(tip plumbing.Hash) reconciler.Commit {
	if tip.IsZero() {
		return reconciler.Commit{}
	}
	return reconciler.Commit{ID: tip.String()}
}

// first fetches all of a local remote through git where there is one, for git keeps the deltas; and reads it itself elsewhere.
func (r *Repository) first(ctx context.Context, idle context.CancelCauseFunc, f *os.File, whole bool) (plumbing.Hash, error) {
	tip, err := r.receive(ctx, idle, f, whole)
	if err == nil || refusal.Of(err) != nil || ctx.Err() != nil {
		return tip, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return tip, err
	}
	if err := f.Truncate(0); err != nil {
		return tip, err
	}
	return r.collect(ctx, idle, f, whole)
}

// collect reads a local remote's objects itself: from its commit to what the copy has. What it reads is judged afterwards, by
// the index and the checks, from the bytes that were written.
func (r *Repository) collect(ctx context.Context, _ context.CancelCauseFunc, f *os.File, whole bool) (plumbing.Hash, error) {
	dir := r.remote.repositoryDir()
	tip, err := lookLocal(dir, r.Branch, r.Limits)
	if err != nil {
		return tip, err
	}
	if err := r.openSource(); err != nil {
		return tip, err
	}
	out, err := newPacker(f, r.Limits.Bytes)
	if err != nil {
		return tip, err
	}
	seen, unpacked := map[plumbing.Hash]bool{tip: true}, int64(0)
	for todo := []plumbing.Hash{tip}; len(todo) > 0; {
		h := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if !whole && r.own.has(h) {
			continue
		}
		if ctx.Err() != nil {
			return tip, ctx.Err()
		}
		kind, content, err := r.source.read(h)
		if errors.Is(err, errAbsent) {
			err = refuse("E_PACK", "the remote", "no object "+h.String()+", which its branch needs", "every object that the branch needs")
		}
		if err != nil {
			return tip, err
		}
		if unpacked += int64(len(content)); unpacked > r.Limits.Bytes*r.Limits.Ratio || len(seen) > r.Limits.Objects {
			return tip, tooLarge("the fetch", int64(len(seen)), int64(r.Limits.Objects), "objects")
		}
		for _, next := range links(kind, content) {
			if !seen[next] {
				seen[next] = true
				todo = append(todo, next)
			}
		}
		if err := out.add(kind, content); err != nil {
			return tip, err
		}
	}
	return tip, out.finish()
}

// links lists where a commit or a folder leads. A malformed one leads nowhere: it is refused later.
func links(kind plumbing.ObjectType, content []byte) []plumbing.Hash {
	var all []plumbing.Hash
	switch kind {
	case plumbing.CommitObject:
		c, _ := parseCommit(content)
		all = append(all, c.parents...)
		if !c.tree.IsZero() {
			all = append(all, c.tree)
		}
	case plumbing.TreeObject:
		entries, _ := parseTree(content)
		for _, e := range entries {
			if e.mode != modeModule {
				all = append(all, e.id)
			}
		}
	}
	return all
}

// branchName is the allow-list for a branch; checkBranch adds what a pattern cannot say.
var branchName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._/-]{0,199}$`)

func checkBranch(name string) error {
	if !branchName.MatchString(name) || checkRef("refs/heads/"+name) != nil {
		return refuse("E_REF_NAME", "branch "+show(name), "", "letters, digits, . _ - and single slashes, beginning with a letter or digit")
	}
	return nil
}

// checkRef refuses a reference name that git itself would not make: what a sound server cannot send.
func checkRef(name string) error {
	bad := len(name) > 1024 || !strings.HasPrefix(name, "refs/") && name != "HEAD" || strings.HasSuffix(name, "/") ||
		strings.Contains(name, "..") || strings.Contains(name, "@{") || strings.ContainsAny(name, " ~^:?*[\\\x7f") ||
		strings.ContainsFunc(name, func(r rune) bool { return r < ' ' })
	for part := range strings.SplitSeq(name, "/") {
		bad = bad || part == "" || part[0] == '.' || part[0] == '-' || strings.HasSuffix(part, ".") || strings.HasSuffix(part, ".lock")
	}
	if bad {
		return refuse("E_REF_NAME", "a reference of the remote", show(name), "names that git would make")
	}
	return nil
}

// repositoryDir is where a local remote keeps its references and objects.
func (r remote) repositoryDir() string {
	if stat, err := os.Stat(filepath.Join(r.path, ".git")); err == nil && stat.IsDir() {
		return filepath.Join(r.path, ".git")
	}
	return r.path
}

// lookLocal reads a branch of a local remote: its file, then packed-refs, then its file again for the case that it was packed between.
func lookLocal(dir, branch string, l Limits) (plumbing.Hash, error) {
	return lookRef(dir, "refs/heads/"+branch, l)
}

// noRef says that a remote has no such reference.
type noRef string

func (n noRef) Error() string { return "looking at the branch: the remote has no " + string(n) }

func lookRef(dir, name string, l Limits) (plumbing.Hash, error) {
	for range 5 { // symbolic references
		h, next, err := readRef(dir, name, l)
		if err != nil || next == "" {
			return h, err
		}
		name = next
	}
	return plumbing.ZeroHash, errors.New("looking at the branch: too many symbolic references")
}

func readRef(dir, name string, l Limits) (h plumbing.Hash, next string, err error) {
	for range 2 {
		text, err := readRegular(filepath.Join(dir, filepath.FromSlash(name)), 1024)
		if err == nil {
			return parseRef(strings.TrimSpace(string(text)))
		}
		if !errors.Is(err, os.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR) {
			return h, "", fmt.Errorf("looking at the branch: %v", err)
		}
		packed, err := readRegular(filepath.Join(dir, "packed-refs"), int64(l.Refs)*1100+4096)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return h, "", err
		}
		n := 0
		for line := range strings.Lines(string(packed)) {
			if n++; n > 2*l.Refs+16 {
				return h, "", tooLarge("packed-refs of the remote", int64(n), int64(l.Refs), "references")
			}
			if id, ref, ok := strings.Cut(strings.TrimRight(line, "\r\n"), " "); ok && ref == name {
				return parseRef(id)
			}
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "reftable")); err == nil {
		return h, "", errors.New("looking at the branch: the remote keeps references in a reftable; want the files format, or ssh")
	}
	return h, "", noRef(name)
}

// parseRef never repeats what it read: the file may be anything.
func parseRef(text string) (plumbing.Hash, string, error) {
	if next, ok := strings.CutPrefix(text, "ref: "); ok {
		return plumbing.ZeroHash, next, checkRef(next)
	}
	h := plumbing.NewHash(text)
	if h.IsZero() || h.String() != text {
		return h, "", refuse("E_REF_NAME", "the branch at the remote", "a reference that is no commit id", "40 hex digits")
	}
	return h, "", nil
}

// receive asks a server for the branch and writes its pack, bounded in bytes.
func (r *Repository) receive(ctx context.Context, idle context.CancelCauseFunc, f *os.File, whole bool) (plumbing.Hash, error) {
	silent := time.AfterFunc(r.Limits.Idle, func() { idle(fmt.Errorf("the remote has sent nothing for %v", r.Limits.Idle)) })
	defer silent.Stop()
	t, err := r.dial(ctx, "git-upload-pack")
	if err != nil {
		return plumbing.ZeroHash, err
	}
	defer t.close()
	if err := r.fetchStatement(ctx, t.refs.References[trust.HeadRef]); err != nil {
		return plumbing.ZeroHash, err
	}
	tip, ok := t.refs.References["refs/heads/"+r.Branch]
	if !ok || tip.IsZero() {
		return tip, fmt.Errorf("looking at the branch: the remote has no refs/heads/%s", r.Branch)
	}
	if !whole && r.own.has(tip) {
		out, err := newPacker(f, r.Limits.Bytes)
		if err != nil {
			return tip, err
		}
		return tip, out.finish()
	}
	for _, c := range []capability.Capability{capability.MultiACK, capability.MultiACKDetailed, capability.ThinPack} {
		t.refs.Capabilities.Delete(c)
	}
	request := packp.NewUploadPackRequestFromCapabilities(t.refs.Capabilities)
	request.Wants = []plumbing.Hash{tip}
	if !whole {
		request.Haves = r.recent(64)
	}
	var text bytes.Buffer
	if err := errors.Join(request.UploadRequest.Encode(&text), request.UploadHaves.Encode(&text, false)); err != nil {
		return tip, fmt.Errorf("asking for the branch: %v", err)
	}
	text.WriteString("0009done\n")
	answer, err := t.ask(text.Bytes())
	if err != nil {
		return tip, err
	}
	return tip, r.download(&lively{answer, silent, r.Limits.Idle}, request, f)
}

// download writes the pack of an answer. Before it a server has a line for each commit that was offered and every such line is held in
// memory; around it there may be what it says of its progress.
func (r *Repository) download(answer io.Reader, request *packp.UploadPackRequest, f *os.File) error {
	const before = 64 << 10
	bounded := &io.LimitedReader{R: answer, N: before}
	response := packp.NewUploadPackResponse(request)
	err := response.Decode(io.NopCloser(bounded))
	if bounded.N <= 0 {
		return tooLarge("the remote's answer before the pack", before+1, before, "bytes")
	}
	if err != nil {
		return fmt.Errorf("asking for the branch: %s", refusal.Clip(err.Error(), 300))
	}
	most := 2*r.Limits.Bytes + 1<<20
	bounded.N = most
	var in io.Reader = response
	if request.Capabilities.Supports(capability.Sideband64k) {
		in = sideband.NewDemuxer(sideband.Sideband64k, in)
	} else if request.Capabilities.Supports(capability.Sideband) {
		in = sideband.NewDemuxer(sideband.Sideband, in)
	}
	n, err := io.Copy(f, io.LimitReader(in, r.Limits.Bytes+1))
	if n > r.Limits.Bytes {
		return tooLarge("the pack", n, r.Limits.Bytes, "bytes")
	}
	if bounded.N <= 0 {
		return tooLarge("the remote's answer with the pack", most+1, most, "bytes")
	}
	if err != nil {
		return fmt.Errorf("receiving the pack: %s", refusal.Clip(err.Error(), 300))
	}
	return nil
}

// lively is a reader whose every byte puts off the alarm.
type lively struct {
	r     io.Reader
	alarm *time.Timer
	after time.Duration
}

func (l *lively) Read(p []byte) (int, error) {
	n, err := l.r.Read(p)
	if n > 0 {
		l.alarm.Reset(l.after)
	}
	return n, err
}

// recent lists commits of the copy that the remote may know, the newest first.
func (r *Repository) recent(n int) []plumbing.Hash {
	var all []plumbing.Hash
	seen := map[plumbing.Hash]bool{}
	for next := []plumbing.Hash{r.tip}; len(next) > 0 && len(all) < n; next = next[1:] {
		h := next[0]
		if seen[h] || h.IsZero() {
			continue
		}
		seen[h] = true
		raw, err := r.own.readAs(plumbing.CommitObject, h)
		if err != nil {
			continue
		}
		all = append(all, h)
		c, _ := parseCommit(raw)
		next = append(next, c.parents...)
	}
	return all
}

// Watch says "look again" on the channel it returns when the branch of a local remote moves, or its head statement; of any other it hears nothing. Notices
// that nobody took become one. It ends with ctx. Where it cannot watch, which the logger is told once, pushes are seen by looking.
func (r *Repository) Watch(ctx context.Context) <-chan struct{} {
	notices := make(chan struct{}, 1)
	if r.remote.scheme != "" {
		return notices
	}
	told := false
	tell := func(err error) {
		if err != nil && !told {
			told = true
			r.Logger.Warn("the branch cannot be watched: a push is not seen before the next look", "remote", r.remote.String(), "err", err)
		}
	}
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		tell(err)
		return notices
	}
	tell(r.watchBranch(watcher))
	go func() {
		defer func() { _ = watcher.Close() }()
		for {
			open := true
			select {
			case <-ctx.Done():
				return
			case _, open = <-watcher.Errors: // as good as a notice: something may have been missed
			case e, more := <-watcher.Events:
				if open = more; open && (strings.HasSuffix(e.Name, ".lock") || e.Op == fsnotify.Chmod || r.beside(e.Name)) {
					continue
				}
			}
			if !open {
				tell(errors.New("the watch has ended"))
				return
			}
			tell(r.watchBranch(watcher)) // folders come and go
			select {
			case notices <- struct{}{}:
			default:
			}
		}
	}()
	return notices
}

// beside says that an event is about something that neither is the branch nor holds it.
func (r *Repository) beside(name string) bool {
	return name != filepath.Join(r.remote.repositoryDir(), "packed-refs") && !slices.ContainsFunc(r.watched(), func(ref string) bool {
		return name == ref || strings.HasPrefix(ref, name+string(filepath.Separator))
	})
}

// watched are the files of the references of a local remote that Head looks at.
func (r *Repository) watched() []string {
	dir := r.remote.repositoryDir()
	return []string{filepath.Join(dir, "refs/heads", filepath.FromSlash(r.Branch)), filepath.Join(dir, filepath.FromSlash(trust.HeadRef))}
}

// watchBranch watches every folder there is from the one that holds the repository down to the one that holds the branch's file.
// Watching a folder twice is watching it once.
func (r *Repository) watchBranch(w *fsnotify.Watcher) error {
	dir := r.remote.repositoryDir()
	folders := []string{filepath.Dir(dir)}
	for _, ref := range r.watched() {
		for folder := filepath.Dir(ref); len(folder) >= len(dir); folder = filepath.Dir(folder) {
			folders = append(folders, folder)
		}
	}
	for _, folder := range folders {
		if err := w.Add(folder); err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR) {
			return fmt.Errorf("watching %s: %w", folder, err)
		}
	}
	return nil
}
