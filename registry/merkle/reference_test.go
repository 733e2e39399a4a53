package merkle

import (
	"bytes"
	"encoding/binary"
	"sort"

	"golang.org/x/crypto/sha3"
)

// The slow reference: the package comment's text, line by line, on whole slices. Unlike the package it knows n = 64, SHA3-512, as well.

func refHash(n, level, typ byte, parts ...[]byte) []byte {
	x := append([]byte{0x6b, 0x4d, 0x4f, 0x6d, 0x31, n, level, typ}, bytes.Join(parts, nil)...)
	if n == 64 {
		sum := sha3.Sum512(x)
		return sum[:]
	}
	sum := sha3.Sum256(x)
	return sum[:]
}

func refMTH(n, level byte, h [][]byte) []byte {
	if len(h) == 1 {
		return h[0]
	}
	k := 1
	for k*2 < len(h) {
		k *= 2
	}
	return refHash(n, level, 1, refMTH(n, level, h[:k]), refMTH(n, level, h[k:]))
}

func refUint(n uint64, size int) []byte { return binary.BigEndian.AppendUint64(nil, n)[8-size:] }

func ref16(s string) []byte { return append(refUint(uint64(len(s)), 2), s...) }

func refBlob(n byte, data []byte) []byte {
	var leaves [][]byte
	for at := 0; at == 0 || at < len(data); at += 65536 {
		leaves = append(leaves, refHash(n, 0, 0, data[at:min(at+65536, len(data))]))
	}
	return refHash(n, 0, 2, refUint(uint64(len(data)), 8), refUint(65536, 4), refMTH(n, 0, leaves))
}

func refTop(level byte, xs [][]byte) []byte {
	var leaves [][]byte
	for _, x := range xs {
		leaves = append(leaves, refHash(32, level, 0, x))
	}
	var root []byte
	if len(leaves) > 0 {
		root = refMTH(32, level, leaves)
	}
	return refHash(32, level, 2, refUint(uint64(len(xs)), 8), root)
}

func refManifest(blobs []Descriptor) []byte {
	var xs [][]byte
	for i, d := range blobs {
		content := ""
		if !d.Content.IsZero() {
			content = string(d.Content[:])
		}
		role := []byte{3}
		if i < 2 {
			role[0] = byte(i + 1)
		}
		xs = append(xs, bytes.Join([][]byte{role, refUint(d.Size, 8), ref16(d.MediaType), ref16(d.Digest), d.Root[:], ref16(content)}, nil))
	}
	return refTop(1, xs)
}

func refIndex(members []Descriptor) []byte {
	var xs [][]byte
	for i, d := range members {
		role := []byte{4}
		if i == 0 {
			role[0] = 0
		} else if d.Nested {
			role[0] = 5
		}
		xs = append(xs, bytes.Join([][]byte{role, refUint(d.Size, 8), ref16(d.MediaType), ref16(d.Digest), ref16(d.Platform), d.Root[:]}, nil))
	}
	return refTop(2, xs)
}

func refContent(entries []Entry) []byte {
	entries = append([]Entry(nil), entries...)
	sort.Slice(entries, func(i, j int) bool { return entries[i].Path < entries[j].Path })
	var xs [][]byte
	for _, e := range entries {
		parts := [][]byte{{e.Type}, ref16(e.Path), refUint(uint64(e.Mode), 4), refUint(uint64(e.UID), 4), refUint(uint64(e.GID), 4), refUint(e.Size, 8),
			ref16(e.Link), refUint(uint64(e.Major), 4), refUint(uint64(e.Minor), 4), refUint(uint64(len(e.Xattrs)), 2)}
		attrs := append([]Xattr(nil), e.Xattrs...)
		sort.Slice(attrs, func(i, j int) bool { return attrs[i].Name < attrs[j].Name })
		for _, a := range attrs {
			parts = append(parts, ref16(a.Name), ref16(a.Value))
		}
		if e.Type == 'f' {
			parts = append(parts, e.Blob[:])
		}
		xs = append(xs, bytes.Join(parts, nil))
	}
	return refTop(3, xs)
}
