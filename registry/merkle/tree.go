package merkle

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/crypto/sha3"
)

// The levels and types of a prefix.
const (
	levelBlob     = 0
	levelManifest = 1
	levelIndex    = 2
	levelContent  = 3

	typeLeaf = 0
	typeNode = 1
	typeHead = 2
)

func prefixOf(level, typ byte) [8]byte {
	return [8]byte{'k', 'M', 'O', 'm', '1', byte(len(Digest{})), level, typ}
}

// tree takes leaves one by one and keeps one digest for each set bit of count: at most 64.
type tree struct {
	level byte
	count uint64
	stack []Digest // roots of complete subtrees, the largest first
}

// leaf adds leaf(level, x).
func (t *tree) leaf(x []byte) {
	p := prefixOf(t.level, typeLeaf)
	t.add(sha3.Sum256(append(p[:], x...)))
}

// add adds a leaf that is already hashed.
func (t *tree) add(leaf Digest) {
	for n := t.count; n&1 == 1; n >>= 1 {
		last := len(t.stack) - 1
		leaf = node(t.level, t.stack[last], leaf)
		t.stack = t.stack[:last]
	}
	t.stack = append(t.stack, leaf)
	t.count++
}

// root is MTH of the leaves so far, of which there is at least one.
func (t *tree) root() Digest {
	root := t.stack[len(t.stack)-1]
	for i := len(t.stack) - 2; i >= 0; i-- {
		root = node(t.level, t.stack[i], root)
	}
	return root
}

// head is the head over count and root, for every level but 0.
func (t *tree) head() Digest {
	p := prefixOf(t.level, typeHead)
	x := binary.BigEndian.AppendUint64(p[:], t.count)
	if t.count > 0 {
		root := t.root()
		x = append(x, root[:]...)
	}
	return sha3.Sum256(x)
}

func node(level byte, a, b Digest) Digest {
	var x [8 + 2*len(a)]byte
	p := prefixOf(level, typeNode)
	copy(x[:], p[:])
	copy(x[8:], a[:])
	copy(x[8+len(a):], b[:])
	return sha3.Sum256(x[:])
}

// appendString appends s16(s).
func appendString(x []byte, what, s string) ([]byte, error) {
	if len(s) > 0xffff {
		return nil, fmt.Errorf("%s %q: %d bytes, at most 65535", what, clip(s), len(s))
	}
	x = binary.BigEndian.AppendUint16(x, uint16(len(s)))
	return append(x, s...), nil
}
