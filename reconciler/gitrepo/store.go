package gitrepo

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/zlib"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/format/idxfile"
	"github.com/go-git/go-git/v5/plumbing/format/packfile"

	"github.com/kindos/kmo/policy/refusal"
)

// errAbsent says that a store has no such object.
var errAbsent = errors.New("no such object")

// maxAlternates bounds the stores that a store may borrow from.
const maxAlternates = 8

// store reads Git objects: packs, loose objects, alternates. It writes nothing. Every object is hashed when it is read, so a
// store never returns bytes that are not those of the id. It is safe for use at the same time.
type store struct {
	dir     string // the objects folder; "" for a store of given packs
	limits  Limits
	base    *store      // asked first: an object already held is never replaced
	damaged atomic.Bool // something in it is not what its name says

	mu     sync.Mutex
	packs  []*pack // oldest first
	borrow []*store
}

func openStore(dir string, limits Limits) (*store, error) {
	s := &store{dir: dir, limits: limits}
	if err := s.refresh(); err != nil {
		return nil, err
	}
	text, err := readRegular(filepath.Join(dir, "info/alternates"), 64<<10)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		s.close()
		return nil, fmt.Errorf("reading alternates: %v", err)
	}
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") || len(s.borrow) == maxAlternates {
			continue
		}
		if !filepath.IsAbs(line) {
			line = filepath.Join(dir, line)
		}
		other := &store{dir: line, limits: limits}
		if err := other.refresh(); err != nil {
			continue // what it would have held is then absent, and said to be
		}
		s.borrow = append(s.borrow, other)
	}
	return s, nil
}

// refresh finds packs that came and forgets those that went.
func (s *store) refresh() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dir == "" {
		return nil
	}
	entries, err := os.ReadDir(filepath.Join(s.dir, "pack"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("listing packs: %v", err)
	}
	there := map[string]bool{}
	var found []*pack
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".idx")
		if !ok || !strings.HasPrefix(name, "pack-") {
			continue
		}
		there[name] = true
		if slices.ContainsFunc(s.packs, func(p *pack) bool { return p.name == name }) {
			continue
		}
		p, err := openPack(filepath.Join(s.dir, "pack", name), s.limits)
		if err != nil {
			s.damaged.Store(true) // its objects are absent
			continue
		}
		found = append(found, p)
	}
	slices.SortFunc(found, func(a, b *pack) int { return cmp.Or(a.made.Compare(b.made), strings.Compare(a.name, b.name)) })
	s.packs = slices.DeleteFunc(s.packs, func(p *pack) bool {
		if !there[p.name] {
			p.close()
		}
		return !there[p.name]
	})
	s.packs = append(s.packs, found...)
	return nil
}

func (s *store) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.packs {
		p.close()
	}
	for _, b := range s.borrow {
		b.close()
	}
	s.packs, s.borrow = nil, nil
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

func (s *store) present() []*pack {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.packs)
}

// has says whether an object is there, without reading it.
func (s *store) has(h plumbing.Hash) bool {
	if s.base != nil && s.base.has(h) {
		return true
	}
	for _, p := range s.present() {
		if ok, _ := p.idx.Contains(h); ok {
			return true
		}
	}
	return false
}

// read returns an object, or errAbsent. Anything above the limits is refused before it is unpacked.
func (s *store) read(h plumbing.Hash) (plumbing.ObjectType, []byte, error) {
	if s.base != nil {
		if t, content, err := s.base.read(h); !errors.Is(err, errAbsent) {
			return t, content, err
		}
	}
	t, content, err := s.find(h)
	if errors.Is(err, errAbsent) || errors.Is(err, os.ErrClosed) { // it may have been repacked under us
		if s.refresh() == nil {
			t, content, err = s.find(h)
		}
	}
	for _, b := range s.borrow {
		if !errors.Is(err, errAbsent) {
			break
		}
		t, content, err = b.read(h)
	}
	if err != nil {
		if errors.Is(err, errAbsent) {
			return 0, nil, fmt.Errorf("object %s: %w", h, errAbsent)
		}
		s.damaged.Store(true)
		return 0, nil, err
	}
	if got := plumbing.ComputeHash(t, content); got != h {
		s.damaged.Store(true)
		return 0, nil, refuse("E_PACK", "object "+h.String(), "bytes with the id "+got.String(), "the bytes of its id")
	}
	return t, content, nil
}

// readAs is read for one type.
func (s *store) readAs(want plumbing.ObjectType, h plumbing.Hash) ([]byte, error) {
	t, content, err := s.read(h)
	if err == nil && t != want {
		err = refuse("E_OBJ_MALFORMED", "object "+h.String(), "a "+t.String(), "a "+want.String())
	}
	return content, err
}

func (s *store) find(h plumbing.Hash) (plumbing.ObjectType, []byte, error) {
	for _, p := range s.present() {
		if t, content, err := p.read(h); !errors.Is(err, errAbsent) {
			return t, content, err
		}
	}
	if s.dir == "" {
		return 0, nil, errAbsent
	}
	return s.loose(h)
}

// loose reads objects/xx/yyyy: zlib of "type size\0" and the content.
func (s *store) loose(h plumbing.Hash) (plumbing.ObjectType, []byte, error) {
	name := h.String()
	f, err := openRegular(filepath.Join(s.dir, name[:2], name[2:]))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil, errAbsent
	}
	if err != nil {
		return 0, nil, fmt.Errorf("object %s: %v", h, err)
	}
	defer f.Close()
	bad := func(what string) (plumbing.ObjectType, []byte, error) {
		return 0, nil, refuse("E_PACK", "object "+name, what, "a loose object as git writes it")
	}
	z, err := zlib.NewReader(bufio.NewReader(f))
	if err != nil {
		return bad("no zlib stream")
	}
	defer z.Close()
	in := bufio.NewReader(io.LimitReader(z, s.limits.Object+64))
	head, err := in.ReadString(0)
	if err != nil || len(head) > 32 {
		return bad("no header")
	}
	var word string
	var size int64
	if n, err := fmt.Sscanf(head, "%s %d\x00", &word, &size); n != 2 || err != nil || size < 0 {
		return bad("no header")
	}
	t, err := plumbing.ParseObjectType(word)
	if err != nil {
		return bad("an unknown type")
	}
	if size > s.limits.Object {
		return 0, nil, tooLarge("object "+name, size, s.limits.Object, "bytes")
	}
	content, err := io.ReadAll(io.LimitReader(in, size+1))
	if err != nil || int64(len(content)) != size {
		return bad(fmt.Sprintf("other than the %d bytes its header says", size))
	}
	return t, content, nil
}

// pack is one pack with its index, read within limits.
type pack struct {
	name   string // without folder and suffix
	idx    *idxfile.MemoryIndex
	limits Limits
	made   time.Time
	size   int64 // bytes of the file

	mu    sync.Mutex // held while the file is read
	file  *os.File
	scan  *packfile.Scanner
	bases map[int64]packed // bases of deltas lately read
	kept  int              // bytes in bases
}

type packed struct {
	kind    plumbing.ObjectType
	content []byte
}

func openPack(path string, limits Limits) (*pack, error) {
	index, err := openRegular(path + ".idx")
	if err != nil {
		return nil, err
	}
	defer index.Close()
	idx := idxfile.NewMemoryIndex()
	if err := idxfile.NewDecoder(index).Decode(idx); err != nil {
		return nil, fmt.Errorf("reading %s.idx: %v", filepath.Base(path), err)
	}
	return newPack(path, idx, limits)
}

// newPack opens path.pack with an index that is known already.
func newPack(path string, idx *idxfile.MemoryIndex, limits Limits) (*pack, error) {
	file, err := openRegular(path + ".pack")
	if err != nil {
		return nil, err
	}
	stat, err := file.Stat()
	if err != nil {
		file.Close()
		return nil, err
	}
	return &pack{
		name: filepath.Base(path), idx: idx, limits: limits, made: stat.ModTime(), size: stat.Size(),
		file: file, scan: packfile.NewScanner(file), bases: map[int64]packed{},
	}, nil
}

func (p *pack) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.file.Close()
}

func (p *pack) read(h plumbing.Hash) (plumbing.ObjectType, []byte, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	offset, err := p.idx.FindOffset(h)
	if err != nil {
		return 0, nil, errAbsent
	}
	o, err := p.at(offset)
	if err != nil {
		if refusal.Of(err) == nil && !errors.Is(err, os.ErrClosed) {
			err = refuse("E_PACK", "object "+h.String()+" in "+p.name, err.Error(), "an undamaged pack")
		}
		return 0, nil, err
	}
	return o.kind, o.content, nil
}

// entries lists a pack's objects as they stand in the file.
func (p *pack) entries() ([]*idxfile.Entry, error) {
	entries, err := p.idx.EntriesByOffset()
	var all []*idxfile.Entry
	for err == nil {
		var e *idxfile.Entry
		if e, err = entries.Next(); err == nil {
			all = append(all, e)
		}
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return all, err
}

// header reads what an entry begins with, and says where its bytes begin.
func (p *pack) header(offset int64) (head *packfile.ObjectHeader, body int64, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if head, err = p.scan.SeekObjectHeader(offset); err == nil {
		body, err = p.scan.SeekFromStart(0)
	}
	return head, body, err
}

// at follows a chain of deltas down to its base and applies them upwards.
func (p *pack) at(offset int64) (packed, error) {
	var deltas [][]byte
	var offsets []int64
	var o packed
	for {
		if kept, ok := p.bases[offset]; ok {
			o = kept
			break
		}
		head, content, err := inflate(p.scan, offset, p.limits)
		if err != nil {
			return o, err
		}
		offsets = append(offsets, offset)
		if !head.Type.IsDelta() {
			o = packed{head.Type, content}
			break
		}
		deltas = append(deltas, content)
		if len(deltas) > p.limits.Delta {
			return o, tooLarge("pack "+p.name, int64(len(deltas)), int64(p.limits.Delta), "deltas in a chain")
		}
		if offset = head.OffsetReference; head.Type == plumbing.REFDeltaObject {
			if offset, err = p.idx.FindOffset(head.Reference); err != nil {
				return o, errors.New("a delta against an object that is not in the pack")
			}
		}
	}
	for i, delta := range slices.Backward(deltas) {
		content, err := patch(o.content, delta, p.limits)
		if err != nil {
			return o, err
		}
		p.keep(offset, o)
		o.content = content
		offset = offsets[i]
	}
	return o, nil
}

// keep remembers a delta's base, up to 16 MiB.
func (p *pack) keep(offset int64, o packed) {
	if _, ok := p.bases[offset]; ok || len(o.content) > 1<<20 {
		return
	}
	if p.kept += len(o.content); p.kept > 16<<20 {
		p.bases, p.kept = map[int64]packed{}, len(o.content)
	}
	p.bases[offset] = o
}

// inflate reads the object at offset, its declared size checked first and held to.
func inflate(scan *packfile.Scanner, offset int64, limits Limits) (*packfile.ObjectHeader, []byte, error) {
	head, err := scan.SeekObjectHeader(offset)
	if err != nil {
		return nil, nil, err
	}
	if head.Length > limits.Object {
		return nil, nil, tooLarge("a packed object", head.Length, limits.Object, "bytes")
	}
	var b bytes.Buffer
	b.Grow(int(min(head.Length, 1<<20)))
	n, _, err := scan.NextObject(&b)
	if err == nil && n != head.Length {
		err = fmt.Errorf("an object of %d bytes that says %d", n, head.Length)
	}
	return head, b.Bytes(), err
}

// patch applies a delta whose declared sizes are within the limits.
func patch(base, delta []byte, limits Limits) ([]byte, error) {
	from, n := binary.Uvarint(delta)
	if n <= 0 || from != uint64(len(base)) {
		return nil, errors.New("a delta for a base of another size")
	}
	size, m := binary.Uvarint(delta[n:])
	if m <= 0 {
		return nil, errors.New("a delta without a size")
	}
	if size > uint64(limits.Object) {
		return nil, tooLarge("a packed object", int64(min(size, 1<<62)), limits.Object, "bytes")
	}
	return packfile.PatchDelta(base, delta)
}

// openRegular opens a regular file, and nothing that would block or lead elsewhere.
func openRegular(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	if stat, err := f.Stat(); err != nil || !stat.Mode().IsRegular() {
		f.Close()
		return nil, fmt.Errorf("%s: not a regular file", filepath.Base(path))
	}
	return f, nil
}

// readRegular reads a small regular file.
func readRegular(path string, limit int64) ([]byte, error) {
	f, err := openRegular(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(text)) > limit {
		err = tooLarge(filepath.Base(path), int64(len(text)), limit, "bytes")
	}
	return text, err
}

func refuse(code refusal.Code, subject, got, want string) *refusal.Error {
	return &refusal.Error{Code: code, Subject: refusal.Clip(subject, 300), Got: refusal.Clip(got, 300), Want: want}
}

func tooLarge(subject string, got, limit int64, unit string) *refusal.Error {
	return refuse("E_LIMIT", subject, fmt.Sprintf("%d %s", got, unit), fmt.Sprintf("at most %d", limit))
}

// openSource opens the objects of a local remote.
func (r *Repository) openSource() (err error) {
	if r.source == nil {
		if r.source, err = openStore(filepath.Join(r.remote.repositoryDir(), "objects"), r.Limits); err != nil {
			return fmt.Errorf("opening the remote: %v", err)
		}
	}
	return nil
}

func (r *Repository) closeSource() {
	if r.source != nil {
		r.source.close()
		r.source = nil
	}
}
