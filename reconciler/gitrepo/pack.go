package gitrepo

import (
	"bytes"
	"compress/zlib"
	"context"
	"crypto/sha1"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/format/idxfile"
	"github.com/go-git/go-git/v5/plumbing/format/packfile"
	"github.com/go-git/go-git/v5/plumbing/object"
	gitbinary "github.com/go-git/go-git/v5/utils/binary"

	"github.com/kindos/kmo/policy/refusal"
)

// freeExpansion is how far a fetch may unpack before the ratio counts.
const freeExpansion = 256 << 20

// entry is one object of a pack as it stands in the file.
type entry struct {
	offset int64
	kind   plumbing.ObjectType // as packed
	crc    uint32
	id     plumbing.Hash // zero until known
	depth  int
	deltas []int // entries that are deltas against this one, by offset
}

// indexer reads a pack from the remote: the first pass streams through it and bounds what it declares, the second applies the
// deltas. Every object's id is computed here from its bytes; nothing the sender says of ids is used.
type indexer struct {
	limits   Limits
	scan     *packfile.Scanner
	size     int64 // of the file
	unpacked int64
	entries  []entry
	at       map[int64]int           // offset → entry
	waiting  map[plumbing.Hash][]int // deltas by the id of their base
	ids      map[plumbing.Hash]bool  // every object of the pack
	links    map[plumbing.Hash]bool  // what its commits and trees lead to; at most four times as many as objects are allowed
}

// index checks a pack file and returns its index. Every link of its commits and trees leads into the pack or is held already.
func index(ctx context.Context, f *os.File, limits Limits, held func(plumbing.Hash) bool) (*idxfile.MemoryIndex, error) {
	stat, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	x := &indexer{
		limits: limits, scan: packfile.NewScanner(f), size: stat.Size(), at: map[int64]int{},
		waiting: map[plumbing.Hash][]int{}, ids: map[plumbing.Hash]bool{}, links: map[plumbing.Hash]bool{},
	}
	sum, err := x.stream(ctx)
	if err == nil {
		err = x.resolve(ctx)
	}
	if err != nil {
		if errors.Is(err, packfile.ErrInflatedSizeMismatch) {
			err = refuse("E_LIMIT", "a packed object", "more bytes than it says", "as many as it says")
		}
		if refusal.Of(err) == nil && ctx.Err() == nil {
			err = refuse("E_PACK", "the pack", err.Error(), "a whole pack as git makes it")
		}
		return nil, err
	}
	for h := range x.links {
		if !x.ids[h] && !held(h) {
			return nil, refuse("E_PACK", "the pack", "no object "+h.String()+", to which one of its objects leads", "every object that the branch needs")
		}
	}
	var w idxfile.Writer
	_ = w.OnHeader(uint32(len(x.entries)))
	for _, e := range x.entries {
		w.Add(e.id, uint64(e.offset), e.crc)
	}
	if err := w.OnFooter(sum); err != nil {
		return nil, err
	}
	return w.Index()
}

// stream is the first pass: headers, sizes, checksum, and the ids of what is no delta.
func (x *indexer) stream(ctx context.Context) (plumbing.Hash, error) {
	_, count, err := x.scan.Header()
	if err != nil {
		return plumbing.ZeroHash, err
	}
	if int64(count) > int64(x.limits.Objects) {
		return plumbing.ZeroHash, tooLarge("the pack", int64(count), int64(x.limits.Objects), "objects")
	}
	for i := range int(count) {
		if i%256 == 0 && ctx.Err() != nil {
			return plumbing.ZeroHash, ctx.Err()
		}
		head, err := x.scan.NextObjectHeader()
		if err != nil {
			return plumbing.ZeroHash, err
		}
		if err := x.expand(head.Length); err != nil {
			return plumbing.ZeroHash, err
		}
		if err := x.take(i, head); err != nil {
			return plumbing.ZeroHash, err
		}
	}
	sum, err := x.scan.Checksum()
	if err != nil {
		return sum, err
	}
	end, err := x.scan.SeekFromStart(0)
	if err == nil && end != x.size {
		err = errors.New("bytes after its checksum")
	}
	return sum, err
}

// take reads the object whose header was just read.
func (x *indexer) take(i int, head *packfile.ObjectHeader) error {
	e := entry{offset: head.Offset, kind: head.Type}
	var content bytes.Buffer
	out := io.Discard
	var hasher plumbing.Hasher
	switch head.Type {
	case plumbing.OFSDeltaObject:
		base, ok := x.at[head.OffsetReference]
		if !ok {
			return errors.New("a delta against no object")
		}
		if e.depth = x.entries[base].depth + 1; e.depth > x.limits.Delta {
			return tooLarge("the pack", int64(e.depth), int64(x.limits.Delta), "deltas in a chain")
		}
		x.entries[base].deltas = append(x.entries[base].deltas, i)
	case plumbing.REFDeltaObject:
		x.waiting[head.Reference] = append(x.waiting[head.Reference], i)
	case plumbing.CommitObject, plumbing.TreeObject:
		hasher = plumbing.NewHasher(head.Type, head.Length)
		out = io.MultiWriter(hasher, &content)
	case plumbing.BlobObject, plumbing.TagObject:
		hasher = plumbing.NewHasher(head.Type, head.Length)
		out = hasher
	default:
		return fmt.Errorf("an object of type %d", head.Type)
	}
	n, crc, err := x.scan.NextObject(out)
	if err != nil {
		return err
	}
	if n != head.Length {
		return fmt.Errorf("an object of %d bytes that says %d", n, head.Length)
	}
	e.crc = crc
	x.at[e.offset] = i
	x.entries = append(x.entries, e)
	if head.Type.IsDelta() {
		return nil
	}
	return x.name(i, hasher.Sum(), head.Type, content.Bytes())
}

// name records the id of an entry and where its object leads. content is not needed for a blob.
func (x *indexer) name(i int, id plumbing.Hash, kind plumbing.ObjectType, content []byte) error {
	if x.ids[id] {
		return fmt.Errorf("object %s twice", id)
	}
	x.ids[id] = true
	x.entries[i].id = id
	switch kind {
	case plumbing.CommitObject:
		c, err := agreed(id, content)
		if err != nil {
			return err
		}
		return x.lead(append(c.parents, c.tree))
	case plumbing.TreeObject:
		entries, err := parseTree(content)
		if err != nil {
			return refuse("E_OBJ_MALFORMED", "tree "+id.String(), err.Error(), "a tree as git writes it")
		}
		var to []plumbing.Hash
		for _, e := range entries {
			if e.mode != modeModule {
				to = append(to, e.id)
			}
		}
		return x.lead(to)
	}
	return nil
}

// lead notes where an object leads.
func (x *indexer) lead(to []plumbing.Hash) error {
	for _, h := range to {
		x.links[h] = true
	}
	if n, most := int64(len(x.links)), 4*int64(x.limits.Objects); n > most {
		return tooLarge("the pack", n, most, "objects to which its own lead")
	}
	return nil
}

// agreed parses a commit twice, by our parser and by go-git's: a commit that can be read in two ways is refused.
func agreed(id plumbing.Hash, raw []byte) (commitHead, error) {
	ours, err := parseCommit(raw)
	if err != nil {
		return ours, refuse("E_OBJ_MALFORMED", "commit "+id.String(), err.Error(), "a commit as git writes it")
	}
	var o plumbing.MemoryObject
	o.SetType(plumbing.CommitObject)
	_, _ = o.Write(raw)
	var theirs object.Commit
	if err := theirs.Decode(&o); err != nil {
		return ours, refuse("E_OBJ_MALFORMED", "commit "+id.String(), err.Error(), "a commit as git writes it")
	}
	same := theirs.TreeHash == ours.tree && len(theirs.ParentHashes) == len(ours.parents)
	for i := 0; same && i < len(ours.parents); i++ {
		same = theirs.ParentHashes[i] == ours.parents[i]
	}
	if !same {
		return ours, refuse("E_OBJ_MALFORMED", "commit "+id.String(), "headers that can be read in two ways", "a commit as git writes it")
	}
	return ours, nil
}

func (x *indexer) expand(n int64) error {
	if n > x.limits.Object {
		return tooLarge("a packed object", n, x.limits.Object, "bytes")
	}
	if x.unpacked += n; x.unpacked > max(freeExpansion, x.size*x.limits.Ratio) {
		return tooLarge("the pack", x.unpacked, max(freeExpansion, x.size*x.limits.Ratio), "bytes unpacked")
	}
	return nil
}

// frame is a base on the way down the tree of deltas.
type frame struct {
	packed
	deltas []int // still to be applied to it
	depth  int
}

// resolve is the second pass. It holds the contents on one path only, and no more than four times the largest object.
func (x *indexer) resolve(ctx context.Context) error {
	for i := range x.entries {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		e := &x.entries[i]
		if e.kind.IsDelta() || len(e.deltas) == 0 && len(x.waiting[e.id]) == 0 {
			continue
		}
		_, content, err := inflate(x.scan, e.offset, x.limits)
		if err != nil {
			return err
		}
		if err := x.descend(ctx, frame{packed: packed{e.kind, content}, deltas: x.against(i)}); err != nil {
			return err
		}
	}
	for i := range x.entries {
		if x.entries[i].id.IsZero() {
			return errors.New("a delta against an object that is not in the pack")
		}
	}
	return nil
}

// against lists the deltas against entry i, however they name it.
func (x *indexer) against(i int) []int {
	e := &x.entries[i]
	return append(e.deltas[:len(e.deltas):len(e.deltas)], x.waiting[e.id]...)
}

func (x *indexer) descend(ctx context.Context, root frame) error {
	stack, holds := []frame{root}, int64(len(root.content))
	for len(stack) > 0 {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		top := &stack[len(stack)-1]
		base, depth := top.packed, top.depth+1
		i := top.deltas[0]
		if top.deltas = top.deltas[1:]; len(top.deltas) == 0 {
			stack = stack[:len(stack)-1]
			holds -= int64(len(base.content))
		}
		if depth > x.limits.Delta {
			return tooLarge("the pack", int64(depth), int64(x.limits.Delta), "deltas in a chain")
		}
		_, delta, err := inflate(x.scan, x.entries[i].offset, x.limits)
		if err != nil {
			return err
		}
		content, err := patch(base.content, delta, x.limits)
		if err != nil {
			return err
		}
		if err := x.expand(int64(len(content))); err != nil {
			return err
		}
		if err := x.name(i, plumbing.ComputeHash(base.kind, content), base.kind, content); err != nil {
			return err
		}
		deltas := x.against(i)
		if len(deltas) == 0 {
			continue
		}
		if holds += int64(len(content)); holds > 4*x.limits.Object {
			return tooLarge("the pack", holds, 4*x.limits.Object, "bytes held for a chain of deltas")
		}
		stack = append(stack, frame{packed: packed{base.kind, content}, deltas: deltas, depth: depth})
	}
	return nil
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

// packer writes a pack, making no deltas of its own. The number of objects is set when it is known.
type packer struct {
	out    *os.File
	z      *zlib.Writer
	count  uint32
	offset int64
	limit  int64
}

func newPacker(out *os.File, limit int64) (*packer, error) {
	w := &packer{out: out, limit: limit}
	w.z = zlib.NewWriter(w)
	_, err := w.Write([]byte("PACK\x00\x00\x00\x02\x00\x00\x00\x00"))
	return w, err
}

func (w *packer) Write(b []byte) (int, error) {
	if w.offset += int64(len(b)); w.offset > w.limit {
		return 0, tooLarge("the fetch", w.offset, w.limit, "bytes")
	}
	return w.out.Write(b)
}

// begin writes what every entry begins with: type and size, seven bits a byte after the first four.
func (w *packer) begin(t plumbing.ObjectType, size uint64) error {
	head := []byte{byte(t)<<4 | byte(size&15)}
	for size >>= 4; size > 0; size >>= 7 {
		head[len(head)-1] |= 0x80
		head = append(head, byte(size&127))
	}
	w.count++
	_, err := w.Write(head)
	return err
}

// add writes one object: its head, then zlib.
func (w *packer) add(t plumbing.ObjectType, content []byte) error {
	if err := w.begin(t, uint64(len(content))); err != nil {
		return err
	}
	w.z.Reset(w)
	if _, err := w.z.Write(content); err != nil {
		return err
	}
	return w.z.Close()
}

// sift copies the wanted entries of a pack as they stand there. A delta whose base is left out becomes whole: read has it.
func (w *packer) sift(ctx context.Context, p *pack, want map[plumbing.Hash]bool, read func(plumbing.Hash) (plumbing.ObjectType, []byte, error)) error {
	entries, err := p.entries()
	if err != nil {
		return err
	}
	moved := map[int64]int64{} // where an entry stood, and where it stands
	for i, e := range entries {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if !want[e.Hash] {
			continue
		}
		head, body, err := p.header(int64(e.Offset))
		if err != nil {
			return err
		}
		end := p.size - sha1.Size
		if i+1 < len(entries) {
			end = int64(entries[i+1].Offset)
		}
		to := w.offset
		base, near := moved[head.OffsetReference]
		switch {
		case head.Type == plumbing.OFSDeltaObject && near: // at another distance now
			err = errors.Join(w.begin(head.Type, uint64(head.Length)), gitbinary.WriteVariableWidthInt(w, to-base), w.raw(p, body, end))
		case head.Type == plumbing.OFSDeltaObject, head.Type == plumbing.REFDeltaObject && !want[head.Reference]:
			var kind plumbing.ObjectType
			var content []byte
			if kind, content, err = read(e.Hash); err == nil {
				err = w.add(kind, content)
			}
		default:
			w.count++
			err = w.raw(p, head.Offset, end)
		}
		if err != nil {
			return err
		}
		moved[head.Offset] = to
	}
	return nil
}

// raw copies bytes of a pack.
func (w *packer) raw(p *pack, from, end int64) error {
	_, err := io.Copy(w, io.NewSectionReader(p.file, from, end-from))
	return err
}

// finish writes the count and the checksum.
func (w *packer) finish() error {
	if _, err := w.out.WriteAt(binary.BigEndian.AppendUint32(nil, w.count), 8); err != nil {
		return err
	}
	if _, err := w.out.Seek(0, io.SeekStart); err != nil {
		return err
	}
	sum := sha1.New()
	if _, err := io.Copy(sum, w.out); err != nil {
		return err
	}
	_, err := w.out.Write(sum.Sum(nil))
	return err
}
