package reconciler

import (
	"context"
	"crypto"
	"crypto/sha1"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/fake"
	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/policy/trust"
	"github.com/kindos/kmo/registry/merkle"
)

// fault makes one outside call fail: before its effect or after it.
type fault struct {
	call  string // "source.Head", "backend.Apply", …
	after bool
	times int // which call of that name; 0 is the first
}

var errFault = errors.New("the network went away")

// faults counts calls and fails the one that is armed. Probes call from goroutines of their own.
type faults struct {
	mu     sync.Mutex
	armed  *fault
	seen   []string
	cancel context.CancelFunc // if set, the fault also ends the context, as a kill would
}

func (f *faults) around(call string, effect func() error) error {
	armed := f.next(call)
	if armed == nil {
		return effect()
	}
	if f.cancel != nil {
		f.cancel()
	}
	if armed.after {
		if err := effect(); err != nil {
			return err
		}
	}
	return errFault
}

// next counts a call and returns the fault that it is to have, nil for none.
func (f *faults) next(call string) *fault {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.seen = append(f.seen, call)
	armed := f.armed
	if armed == nil || armed.call != call {
		return nil
	}
	if armed.times > 1 {
		armed.times--
		return nil
	}
	f.armed = nil
	return armed
}

// memTree is a commit's tree in memory.
type memTree struct{ fstest.MapFS }

func (t memTree) ObjectID(path string) string {
	hash := sha1.New()
	found := false
	for _, name := range slices.Sorted(maps.Keys(t.MapFS)) {
		if name == path || strings.HasPrefix(name, path+"/") || path == "." {
			found = true
			_, _ = fmt.Fprintf(hash, "%s %d\n%s", strings.TrimPrefix(name, path), len(t.MapFS[name].Data), t.MapFS[name].Data)
		}
	}
	if !found {
		return ""
	}
	return hex.EncodeToString(hash.Sum(nil))
}

var _ trust.Tree = memTree{}

// memSource is a branch in memory, with commits signed as git signs them.
type memSource struct {
	t       *testing.T
	faults  *faults
	host    ssh.Signer
	commits map[string]Commit
	head    string
	clock   time.Time
	refuse  bool             // the remote takes no push
	moved   func(*memSource) // called once before a push, to move the branch
	pushes  int
}

// commit adds a signed commit to the branch and returns its id.
func (s *memSource) commit(signer ssh.Signer, email, message string, files map[string]string) string {
	s.t.Helper()
	tree := memTree{fstest.MapFS{}}
	for name, text := range files {
		tree.MapFS[name] = &fstest.MapFile{Data: []byte(text), Mode: 0o644}
	}
	return s.add(signer, email, message, tree, s.head)
}

func (s *memSource) add(signer ssh.Signer, email, message string, tree memTree, parent string) string {
	s.t.Helper()
	s.clock = s.clock.Add(time.Second)
	var raw strings.Builder
	fmt.Fprintf(&raw, "tree %s\n", tree.ObjectID("."))
	var parents []string
	if parent != "" {
		fmt.Fprintf(&raw, "parent %s\n", parent)
		parents = []string{parent}
	}
	who := fmt.Sprintf("A Person <%s> %d +0000", email, s.clock.Unix())
	fmt.Fprintf(&raw, "author %s\ncommitter %s\n\n%s\n", who, who, message)
	signed := []byte(raw.String())
	if signer != nil {
		var err error
		if signed, err = trust.SignCommit(signed, signer); err != nil {
			s.t.Fatal(err)
		}
	}
	sum := sha1.Sum(append(fmt.Appendf(nil, "commit %d\x00", len(signed)), signed...))
	id := hex.EncodeToString(sum[:])
	s.commits[id] = Commit{ID: id, Parents: parents, When: s.clock, Raw: signed, Tree: tree}
	s.head = id
	return id
}

func (s *memSource) Head(context.Context) (commit Commit, err error) {
	err = s.faults.around("source.Head", func() error {
		commit = s.commits[s.head]
		return nil
	})
	return commit, err
}

func (s *memSource) At(_ context.Context, id string) (commit Commit, err error) {
	err = s.faults.around("source.At", func() error {
		found, ok := s.commits[id]
		if !ok {
			return fmt.Errorf("no commit %s", id)
		}
		commit = found
		return nil
	})
	return commit, err
}

func (s *memSource) Ancestor(_ context.Context, old, new string) (bool, error) {
	for id := new; id != ""; {
		if id == old {
			return true, nil
		}
		parents := s.commits[id].Parents
		if len(parents) == 0 {
			return false, nil
		}
		id = parents[0]
	}
	return false, nil
}

func (s *memSource) Between(_ context.Context, old, new string) (list []Commit, err error) {
	err = s.faults.around("source.Between", func() error {
		for id := new; id != "" && id != old; {
			commit := s.commits[id]
			list = append(list, commit)
			if len(commit.Parents) == 0 {
				break
			}
			id = commit.Parents[0]
		}
		return nil
	})
	return list, err
}

func (s *memSource) Revert(_ context.Context, r Revert) (commit Commit, err error) {
	err = s.faults.around("source.Revert", func() error {
		if s.moved != nil {
			move := s.moved
			s.moved = nil
			move(s)
		}
		if s.refuse {
			return fmt.Errorf("%w: protected branch", ErrPushRefused)
		}
		if s.head != r.Head {
			if head := s.commits[s.head]; len(head.Parents) == 1 && head.Parents[0] == r.Head && strings.Contains(string(head.Raw), "Kmo-Reverts: "+r.Good) {
				commit = head // an earlier push of the same revert took effect
				return nil
			}
			return ErrMoved
		}
		tree, ok := s.commits[r.Good].Tree.(memTree)
		if !ok {
			return errors.New("no such tree")
		}
		message := fmt.Sprintf("Revert to %.8s\n\nKmo-Reverts: %s..%s\nKmo-Unit: %s\nKmo-Gate: %s\nKmo-Evidence: %s\nKmo-Host: %s", r.Good, r.Good, r.Head, r.Unit, r.Gate, r.Evidence, r.Host)
		s.pushes++
		commit = s.commits[s.add(s.host, "host@example.org", message, tree, r.Head)]
		return nil
	})
	return commit, err
}

// memImages has every image, but those whose reference is in broken.
type memImages struct {
	faults *faults
	broken map[string]error
	copies map[string]int  // how often the content was put in another place, by digest
	drift  map[string]bool // places whose content has changed
	checks int
	sealed bool     // there is a statement of each image, which the first sealer has signed
	silent bool     // no registry answers
	kept   []string // references, when images were cleared last
	inUse  []string // contents, likewise
}

// wait is how the agent waits for a registry.
func (m *memImages) wait(ctx context.Context) error {
	if !m.silent {
		return nil
	}
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(10 * time.Second):
		return errFault
	}
}

func (m *memImages) Describe(ctx context.Context, image backends.Image, _ backends.Format, sealers []crypto.PublicKey) (described any, err error) {
	if err := m.wait(ctx); err != nil {
		return nil, err
	}
	known := map[string]any{"ref": image.Ref, "root": image.Root}
	if len(sealers) > 0 && m.sealed {
		known["signer"] = "spki-sha256:00"
	}
	return known, m.faults.around("images.Describe", func() error { return m.broken[image.Ref] })
}

func (m *memImages) Fetch(ctx context.Context, image backends.Image, _ backends.Format) (backends.Image, error) {
	if err := m.wait(ctx); err != nil {
		return image, err
	}
	image.Content, image.ContentRoot = fmt.Sprintf("copy %d of %s", m.copies[image.SHA256], image.SHA256), merkle.BlobRoot([]byte(image.Ref))
	return image, m.faults.around("images.Fetch", func() error { return m.broken[image.Ref] })
}

func (m *memImages) Check(_ context.Context, image backends.Image) error {
	m.checks++
	if m.drift[image.Content] {
		return &refusal.Error{Code: "E_DRIFT", Subject: image.Content + "/bin/relay", Got: "another byte"}
	}
	return nil
}

func (m *memImages) Repair(ctx context.Context, image backends.Image, format backends.Format) (backends.Image, error) {
	present, err := m.Fetch(ctx, image, format)
	if err != nil || !m.drift[present.Content] {
		return present, err
	}
	m.copies[image.SHA256]++
	return m.Fetch(ctx, image, format)
}

func (m *memImages) Clear(_ context.Context, keep []backends.Workload, inUse []string) (removed []string, err error) {
	return nil, m.faults.around("images.Clear", func() error {
		m.kept, m.inUse = nil, inUse
		for _, workload := range keep {
			m.kept = append(m.kept, workload.Image.Ref)
		}
		return nil
	})
}

// memJournal keeps the record in memory, as a file would.
type memJournal struct {
	faults *faults
	rec    Record
}

func (j *memJournal) Load() (Record, error) {
	rec := j.rec
	rec.Bad = slices.Clone(rec.Bad)
	return rec, nil
}

func (j *memJournal) Save(rec Record) error {
	call := "journal.Save " + string(rec.Outcome)
	if rec.Trying != "" {
		call = "journal.Save trying"
	}
	return j.faults.around(call, func() error {
		j.rec = rec
		j.rec.Bad = slices.Clone(rec.Bad)
		return nil
	})
}

// faulty puts faults around a backend.
type faulty struct {
	*fake.Backend
	faults *faults
}

func (b faulty) Fingerprint(ctx context.Context) (print backends.Fingerprint, err error) {
	err = b.faults.around("backend.Fingerprint", func() error {
		print, err = b.Backend.Fingerprint(ctx)
		return err
	})
	return print, err
}

func (b faulty) Exec(ctx context.Context, name string, argv []string) (status int, output []byte, err error) {
	err = b.faults.around("backend.Exec", func() error {
		status, output, err = b.Backend.Exec(ctx, name, argv)
		return err
	})
	return status, output, err
}

func (b faulty) Observe(ctx context.Context) (list []backends.Status, err error) {
	err = b.faults.around("backend.Observe", func() error {
		list, err = b.Backend.Observe(ctx)
		return err
	})
	return list, err
}

func (b faulty) Apply(ctx context.Context, w backends.Workload) error {
	return b.faults.around("backend.Apply", func() error { return b.Backend.Apply(ctx, w) })
}

func (b faulty) Remove(ctx context.Context, name string) error {
	return b.faults.around("backend.Remove", func() error { return b.Backend.Remove(ctx, name) })
}

// sub is a folder of files as they are in a commit.
var _ fs.FS = memTree{}
