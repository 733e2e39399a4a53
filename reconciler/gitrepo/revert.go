package gitrepo

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp/capability"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp/sideband"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/policy/trust"
	"github.com/kindos/kmo/reconciler"
)

// Revert makes a signed commit whose parent is v.Head and whose tree is that of v.Good, and pushes it if the branch is still at
// v.Head: the server compares and swaps under its own lock. A revert of ours that is on the branch already, because an earlier
// push took effect without saying so, is returned instead of being made twice.
func (r *Repository) Revert(ctx context.Context, v reconciler.Revert) (reconciler.Commit, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.Signer == nil {
		return reconciler.Commit{}, errors.New("reverting: no key to sign with")
	}
	now, err := r.head(ctx)
	if err != nil {
		return reconciler.Commit{}, fmt.Errorf("reverting: %w", err)
	}
	good, head, err := r.pair(ctx, v)
	if err != nil {
		return reconciler.Commit{}, fmt.Errorf("reverting: %w", err)
	}
	if now.ID != v.Head {
		return r.already(ctx, v, good, now)
	}
	raw, err := r.revertCommit(v, good)
	if err != nil {
		return reconciler.Commit{}, fmt.Errorf("reverting: %v", err)
	}
	id := plumbing.ComputeHash(plumbing.CommitObject, raw)
	f, done, err := r.quarantine()
	if err != nil {
		return reconciler.Commit{}, err
	}
	defer done()
	out, err := newPacker(f, r.Limits.Bytes)
	if err == nil {
		err = errors.Join(out.add(plumbing.CommitObject, raw), out.finish())
	}
	if err != nil {
		return reconciler.Commit{}, err
	}
	bounded, cancel := context.WithTimeoutCause(ctx, r.Limits.Idle, errors.New("the remote did not answer the push in "+r.Limits.Idle.String()))
	defer cancel()
	if err := r.push(bounded, f, head, id); err != nil {
		if ctx.Err() == nil && bounded.Err() != nil {
			err = context.Cause(bounded)
		}
		return reconciler.Commit{}, fmt.Errorf("pushing the revert: %w", err)
	}
	return r.admit(ctx, f, id, false)
}

// pair finds both ends of the range and makes sure that it is one.
func (r *Repository) pair(ctx context.Context, v reconciler.Revert) (good commitHead, head plumbing.Hash, err error) {
	if head, err = parseID(v.Head); err != nil {
		return good, head, err
	}
	h, err := parseID(v.Good)
	if err != nil {
		return good, head, err
	}
	raw, err := r.own.readAs(plumbing.CommitObject, h)
	if err != nil {
		return good, head, err
	}
	if good, err = parseCommit(raw); err != nil {
		return good, head, err
	}
	ok, err := r.Ancestor(ctx, v.Good, v.Head)
	if err == nil && (!ok || v.Good == v.Head) {
		err = fmt.Errorf("%s is not below %s", short(v.Good), short(v.Head))
	}
	return good, head, err
}

// already looks for our own revert of the same range among the commits that came since.
func (r *Repository) already(ctx context.Context, v reconciler.Revert, good commitHead, now reconciler.Commit) (reconciler.Commit, error) {
	moved := fmt.Errorf("reverting: the branch is at %s, not at %s: %w", short(now.ID), short(v.Head), reconciler.ErrMoved)
	since, err := r.Between(ctx, v.Head, now.ID)
	if err != nil {
		return reconciler.Commit{}, moved
	}
	for _, c := range since {
		head, err := parseCommit(c.Raw)
		if err == nil && head.tree == good.tree && len(c.Parents) == 1 && c.Parents[0] == v.Head && trust.SignedBy(c.Raw, r.Signer.PublicKey()) {
			return c, nil
		}
	}
	return reconciler.Commit{}, moved
}

// revertCommit is the commit object, signed. Whatever comes from outside is on one line of its own.
func (r *Repository) revertCommit(v reconciler.Revert, good commitHead) ([]byte, error) {
	line := func(text string, n int) string {
		text = strings.TrimSpace(refusal.Clip(strings.ToValidUTF8(text, "?"), n))
		return cmp.Or(text, "-")
	}
	var b bytes.Buffer
	who := fmt.Sprintf("%s <%s> %d +0000", r.Name, r.Email, r.Now().Unix())
	fmt.Fprintf(&b, "tree %s\nparent %s\nauthor %s\ncommitter %s\n\n", good.tree, v.Head, who, who)
	fmt.Fprintf(&b, "Revert to %s: %s %s\n\n", short(v.Good), line(v.Unit, 60), line(v.Gate, 60))
	fmt.Fprintf(&b, "The unit did not pass its gate, so this brings back the content of the last\ncommit that did: %s.\n\n", v.Good)
	fmt.Fprintf(&b, "%s: %s..%s\nKmo-Unit: %s\n%s: %s\n%s: %s\n%s: %s\n", trust.TrailerReverts, v.Good, v.Head, line(v.Unit, 200),
		trust.TrailerGate, line(v.Gate, 200), trust.TrailerEvidence, line(v.Evidence, 1000), trust.TrailerHost, line(v.Host, 200))
	return trust.SignCommit(b.Bytes(), r.Signer)
}

// push offers one commit in place of another. The server's own compare-and-swap is the lease.
func (r *Repository) push(ctx context.Context, pack *os.File, old, id plumbing.Hash) error {
	t, err := r.dial(ctx, "git-receive-pack")
	if denied := (*deniedError)(nil); errors.As(err, &denied) {
		return fmt.Errorf("%w: %s", reconciler.ErrPushRefused, denied.text)
	}
	if err != nil {
		return err
	}
	defer t.close()
	name := plumbing.ReferenceName("refs/heads/" + r.Branch)
	if at := t.refs.References[name.String()]; at != old {
		return fmt.Errorf("it is at %s, not at %s: %w", short(at.String()), short(old.String()), reconciler.ErrMoved)
	}
	if _, err := pack.Seek(0, io.SeekStart); err != nil {
		return err
	}
	request := packp.NewReferenceUpdateRequestFromCapabilities(t.refs.Capabilities)
	if !request.Capabilities.Supports(capability.ReportStatus) {
		return errors.New("the remote does not report what became of a push")
	}
	band := t.refs.Capabilities.Supports(capability.Sideband64k)
	if band {
		_ = request.Capabilities.Set(capability.Sideband64k)
	}
	request.Commands = []*packp.Command{{Name: name, Old: old, New: id}}
	request.Packfile = io.NopCloser(pack)
	var text bytes.Buffer
	if err := request.Encode(&text); err != nil {
		return err
	}
	answer, err := t.ask(text.Bytes())
	if err != nil {
		return err
	}
	said := &tail{}
	answer = io.LimitReader(answer, 1<<20)
	if band {
		d := sideband.NewDemuxer(sideband.Sideband64k, answer)
		d.Progress = said
		answer = d
	}
	report := packp.NewReportStatus()
	if err := report.Decode(answer); err != nil {
		return fmt.Errorf("reading the answer: %s", refusal.Clip(err.Error(), 300))
	}
	return r.outcome(ctx, report, said.String(), old)
}

// outcome tells a branch that has moved from a remote that will not have the commit, and both from a lock that another push
// holds just now.
func (r *Repository) outcome(ctx context.Context, report *packp.ReportStatus, said string, old plumbing.Hash) error {
	err := report.Error()
	if err == nil {
		return nil
	}
	text := refusal.Clip(err.Error(), 300)
	if said != "" {
		text += " (" + said + ")"
	}
	if at, err := r.look(ctx); err == nil && at != old {
		return fmt.Errorf("%w: it is at %s, not at %s", reconciler.ErrMoved, short(at.String()), short(old.String()))
	}
	for _, passing := range []string{"failed to update ref", "failed to lock", "cannot lock ref", "fetch first", "stale info"} {
		if strings.Contains(text, passing) {
			return fmt.Errorf("another push was under way: %s", text)
		}
	}
	return fmt.Errorf("%w: %s", reconciler.ErrPushRefused, text)
}

// look asks the remote where the branch is, and nothing else.
func (r *Repository) look(ctx context.Context) (plumbing.Hash, error) {
	if r.remote.scheme == "" {
		return lookLocal(r.remote.repositoryDir(), r.Branch, r.Limits)
	}
	t, err := r.dial(ctx, "git-upload-pack")
	if err != nil {
		return plumbing.ZeroHash, err
	}
	defer t.close()
	return t.refs.References["refs/heads/"+r.Branch], nil
}

// statement is a head statement as the remote has it, not yet trusted. It is held in memory alone: a new process asks again.
type statement struct {
	blob plumbing.Hash // zero where the remote has none
	text []byte
}

// withStatement is a commit with the head statement that was read last.
func (r *Repository) withStatement(commit reconciler.Commit, err error) (reconciler.Commit, error) {
	if err == nil {
		commit.Stated = r.stated.Load().text
	}
	return commit, err
}

// readStatement reads a local remote's head statement if it is another than the one that was read last.
func (r *Repository) readStatement() error {
	dir := r.remote.repositoryDir()
	blob, err := lookRef(dir, trust.HeadRef, r.Limits)
	if none := noRef(""); errors.As(err, &none) {
		blob, err = plumbing.ZeroHash, nil
	}
	if err != nil || blob == r.stated.Load().blob {
		return err
	}
	if blob.IsZero() {
		r.stated.Store(&statement{})
		return nil
	}
	if err := r.openSource(); err != nil {
		return err
	}
	return r.keepStatement(blob, r.source)
}

// fetchStatement fetches a server's head statement, in a conversation of its own, if it is another than the one that was fetched last.
func (r *Repository) fetchStatement(ctx context.Context, blob plumbing.Hash) error {
	if blob == r.stated.Load().blob {
		return nil
	}
	if blob.IsZero() {
		r.stated.Store(&statement{})
		return nil
	}
	f, done, err := r.quarantine()
	if err != nil {
		return err
	}
	defer done()
	small := *r
	small.Limits.Bytes, small.Limits.Object, small.Limits.Objects = 2<<20, maxStatement, 1
	if err := small.receiveObject(ctx, blob, f); err != nil {
		return fmt.Errorf("%s: %w", trust.HeadRef, err)
	}
	idx, err := index(ctx, f, small.Limits, func(plumbing.Hash) bool { return false })
	if err != nil {
		return fmt.Errorf("%s: %w", trust.HeadRef, err)
	}
	p, err := newPack(strings.TrimSuffix(f.Name(), ".pack"), idx, small.Limits)
	if err != nil {
		return err
	}
	defer p.close()
	return r.keepStatement(blob, p)
}

// maxStatement bounds a head statement in bytes.
const maxStatement = 1 << 20

// keepStatement reads a statement's blob and remembers it.
func (r *Repository) keepStatement(blob plumbing.Hash, from interface {
	read(plumbing.Hash) (plumbing.ObjectType, []byte, error)
}) error {
	kind, text, err := from.read(blob)
	if len(text) > maxStatement {
		return tooLarge(trust.HeadRef, int64(len(text)), maxStatement, "bytes")
	}
	if errors.Is(err, errAbsent) || err == nil && kind != plumbing.BlobObject {
		return refuse("E_CHAIN", trust.HeadRef, fmt.Sprintf("%s %s, %d bytes", kind, blob, len(text)), "a blob with a head statement")
	}
	if err != nil {
		return fmt.Errorf("%s: %w", trust.HeadRef, err)
	}
	r.stated.Store(&statement{blob, text})
	return nil
}

// receiveObject asks a server for one object that a reference of it names.
func (r *Repository) receiveObject(ctx context.Context, id plumbing.Hash, f *os.File) error {
	t, err := r.dial(ctx, "git-upload-pack")
	if err != nil {
		return err
	}
	defer t.close()
	for _, c := range []capability.Capability{capability.MultiACK, capability.MultiACKDetailed, capability.ThinPack} {
		t.refs.Capabilities.Delete(c)
	}
	request := packp.NewUploadPackRequestFromCapabilities(t.refs.Capabilities)
	request.Wants = []plumbing.Hash{id}
	var text bytes.Buffer
	if err := errors.Join(request.UploadRequest.Encode(&text), request.UploadHaves.Encode(&text, false)); err != nil {
		return fmt.Errorf("asking for it: %v", err)
	}
	text.WriteString("0009done\n")
	answer, err := t.ask(text.Bytes())
	if err != nil {
		return err
	}
	return r.download(answer, request, f)
}

// tail keeps the last kilobyte of what a service says: its reason stands at the end.
type tail struct {
	mu   sync.Mutex // a service that is hung up on may still be speaking
	last []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.last = append(t.last, p...)
	t.last = t.last[max(0, len(t.last)-1024):]
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	text := strings.Join(strings.Fields(string(t.last)), " ")
	if cut := len(text) - 300; cut > 0 {
		text = "…" + strings.ToValidUTF8(text[cut:], "")
	}
	return refusal.Clip(text, 310)
}
