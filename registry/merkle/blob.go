package merkle

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"

	"golang.org/x/crypto/sha3"
)

// ChunkSize is how many bytes a leaf of a blob covers.
const ChunkSize = 65536

// Blob computes the root of what is written to it. It keeps one hash state and at most 64 digests, however long the blob.
// It is not for concurrent use.
type Blob struct {
	// Leaf, if set before the first Write, gets the leaf of each chunk, in order; the last one only when Root is called.
	Leaf func(Digest)

	size  int64
	chunk int // bytes of the chunk that is being hashed; 0 means that none is begun
	state hash.Hash
	tree  tree
	ended bool
}

// NewBlob returns a Blob to which nothing was written.
func NewBlob() *Blob {
	return &Blob{state: sha3.New256(), tree: tree{level: levelBlob}}
}

// Write takes more of the blob. It returns an error only after Root.
func (b *Blob) Write(data []byte) (int, error) {
	if b.ended {
		return 0, errors.New("writing to a blob after its root")
	}
	n := len(data)
	for len(data) > 0 {
		if b.chunk == 0 {
			b.begin()
		}
		part := data[:min(len(data), ChunkSize-b.chunk)]
		b.state.Write(part)
		b.chunk += len(part)
		b.size += int64(len(part))
		data = data[len(part):]
		if b.chunk == ChunkSize {
			b.end()
		}
	}
	return n, nil
}

// Size is how many bytes were written.
func (b *Blob) Size() int64 { return b.size }

// Root is the root of all that was written. It ends the blob; calling it again returns the same.
func (b *Blob) Root() Digest {
	if !b.ended {
		b.ended = true
		if b.size == 0 {
			b.begin()
		}
		if b.chunk > 0 || b.size == 0 {
			b.end()
		}
	}
	return blobHead(uint64(b.size), b.tree.root())
}

func (b *Blob) begin() {
	p := prefixOf(levelBlob, typeLeaf)
	b.state.Reset()
	b.state.Write(p[:])
}

func (b *Blob) end() {
	var leaf Digest
	b.state.Sum(leaf[:0])
	b.tree.add(leaf)
	b.chunk = 0
	if b.Leaf != nil {
		b.Leaf(leaf)
	}
}

func blobHead(size uint64, root Digest) Digest {
	p := prefixOf(levelBlob, typeHead)
	x := binary.BigEndian.AppendUint64(p[:], size)
	x = binary.BigEndian.AppendUint32(x, ChunkSize)
	return sha3.Sum256(append(x, root[:]...))
}

// BlobRoot is the root of data.
func BlobRoot(data []byte) Digest {
	b := NewBlob()
	_, _ = b.Write(data) // before Root it takes everything
	return b.Root()
}

// ReaderRoot is the root of what r gives, and how many bytes that was.
func ReaderRoot(r io.Reader) (Digest, int64, error) {
	b := NewBlob()
	if _, err := io.Copy(b, r); err != nil {
		return Digest{}, b.size, err
	}
	return b.Root(), b.size, nil
}

// Leaves are the leaves of a blob whose head was checked: each of its chunks can be verified by itself.
type Leaves struct {
	size   uint64
	leaves []Digest
}

// OpenLeaves reads a leaf list, 32 bytes for each chunk, and checks it against the size and root of its blob.
// A list of another length is an error; one with another root, a *MismatchError.
func OpenLeaves(root Digest, size uint64, list []byte) (*Leaves, error) {
	chunks := max(1, size/ChunkSize+min(1, size%ChunkSize))
	if uint64(len(list)) != chunks*uint64(len(root)) {
		return nil, fmt.Errorf("leaf list: %d bytes, want %d for a blob of %d bytes", len(list), chunks*uint64(len(root)), size)
	}
	l := &Leaves{size: size, leaves: make([]Digest, chunks)}
	t := tree{level: levelBlob}
	for i := range l.leaves {
		copy(l.leaves[i][:], list[i*len(root):])
		t.add(l.leaves[i])
	}
	if got := blobHead(size, t.root()); got != root {
		return nil, &MismatchError{Name: "leaf list", Got: got, Want: root}
	}
	return l, nil
}

// Len is how many chunks there are.
func (l *Leaves) Len() int { return len(l.leaves) }

// VerifyChunk checks that data is chunk i, 0 ≤ i < Len: its length, then its leaf. A wrong leaf is a *MismatchError.
func (l *Leaves) VerifyChunk(i int, data []byte) error {
	if i < 0 || i >= len(l.leaves) {
		return fmt.Errorf("chunk %d: there are %d", i, len(l.leaves))
	}
	want := min(ChunkSize, l.size-uint64(i)*ChunkSize)
	if uint64(len(data)) != want {
		return fmt.Errorf("chunk %d: %d bytes, want %d", i, len(data), want)
	}
	if got := leafOf(data); got != l.leaves[i] {
		return &MismatchError{Name: fmt.Sprintf("chunk %d", i), Got: got, Want: l.leaves[i]}
	}
	return nil
}

func leafOf(chunk []byte) Digest {
	var leaf Digest
	p := prefixOf(levelBlob, typeLeaf)
	state := sha3.New256()
	state.Write(p[:])
	state.Write(chunk)
	state.Sum(leaf[:0])
	return leaf
}
