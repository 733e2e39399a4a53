package registry

import (
	"archive/tar"
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/registry/merkle"
)

// Bounds of what an image may unpack to.
const (
	maxUnpacked = 16 << 30 // bytes of one layer, where no signed statement says less
	maxEntries  = 500_000  // entries of all layers together
	maxWindow   = 32 << 20 // bytes of zstd's window
	askEvery    = 16 << 20 // bytes that are unpacked without a look at the disk's room
)

// A whiteout's name starts with the first; the second alone makes its folder opaque.
const (
	whiteoutPrefix = ".wh."
	opaqueName     = ".wh..wh..opq"
)

const capability = "security.capability"

// node is a file, folder or link of the tree so far.
type node struct {
	entry    merkle.Entry
	children map[string]*node // of a folder
	layer    int              // that brought it
	held     int              // the last layer that brought it or anything below it
	cleared  int              // a layer that hid all that was below it: what is there now is that layer's, or a later one's
	implicit bool             // a folder that only paths of things below it have named so far
}

// unpacker puts layers on top of each other into a fresh folder. It is the only one that writes there, and it goes by its own
// tree, never by what the folder seems to hold: a link is never followed.
type unpacker struct {
	subject string
	root    *os.Root
	chown   bool // we may give files away: we are root
	tree    *node
	layer   int
	white   map[string]bool // the layer's whiteouts and opaque markers, by their paths
	way     []*node         // from the top to the folder that was looked for last
	entries int
	size    int64        // bytes that the layers unpacked to so far
	room    func() error // an error when the disk has no room for more; nil if nobody asks
	unasked int64        // bytes written since it was asked
	buffer  []byte
}

func newUnpacker(subject string, root *os.Root) *unpacker {
	top := &node{entry: merkle.Entry{Type: merkle.Folder, Mode: 0o755}, children: map[string]*node{}, layer: -1, held: -1}
	return &unpacker{subject: subject, root: root, chown: os.Geteuid() == 0, tree: top, buffer: make([]byte, 256<<10)}
}

// decompress returns the layer's tar stream by its media type; at its end the stream is checked against diff, unless that is
// empty, and it never gives more than limit bytes.
func decompress(subject string, desc v1.Descriptor, in io.Reader, diff string, limit int64) (*bounded, func(), error) {
	done := func() {}
	var out io.Reader
	switch desc.MediaType {
	case types.OCILayer, types.DockerLayer:
		z, err := gzip.NewReader(bufio.NewReaderSize(in, 256<<10))
		if err != nil {
			return nil, nil, layerError(subject, err)
		}
		out = z
	case types.OCILayerZStd:
		z, err := zstd.NewReader(in, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true))
		if err != nil {
			return nil, nil, err
		}
		out, done = z, z.Close
	case types.OCIUncompressedLayer, types.DockerUncompressedLayer:
		out = in
	default:
		return nil, nil, refuse("E_LAYER", subject, "media type "+quote(string(desc.MediaType)), "an OCI or Docker tar layer, plain, gzip or zstd")
	}
	return &bounded{subject: subject, in: out, diff: diff, limit: limit}, done, nil
}

// bounded is a decompressed layer.
type bounded struct {
	subject string
	in      io.Reader
	diff    string // sha256 hex; "" for not known
	limit   int64
	size    int64
	sum     hash.Hash
}

func (b *bounded) Read(p []byte) (int, error) {
	if b.sum == nil {
		b.sum = sha256.New()
	}
	n, err := b.in.Read(p)
	b.size += int64(n)
	if b.size > b.limit {
		return 0, refuse("E_LIMIT", b.subject, fmt.Sprintf("it unpacks to more than %d bytes", b.limit), fmt.Sprintf("at most %d bytes", b.limit))
	}
	b.sum.Write(p[:n])
	if err == io.EOF && b.diff != "" {
		if got := hex.EncodeToString(b.sum.Sum(nil)); got != b.diff {
			return n, refuse("E_IMG_DIGEST", b.subject, "it unpacks to sha256:"+got, "diff id sha256:"+b.diff+" of the config")
		}
	}
	if err == nil || err == io.EOF {
		return n, err
	}
	return n, layerError(b.subject, err)
}

// layerError makes what is wrong with verified bytes a refusal: they will not get better.
func layerError(subject string, err error) error {
	switch {
	case refusal.Of(err) != nil:
		return err
	case errors.Is(err, errNoRoom):
		return fmt.Errorf("%s: %w", subject, err)
	case errors.Is(err, zstd.ErrWindowSizeExceeded), errors.Is(err, zstd.ErrDecoderSizeExceeded):
		return refuse("E_LIMIT", subject, "its zstd window is too large", fmt.Sprintf("a window of at most %d bytes", maxWindow))
	case errors.Is(err, tar.ErrHeader), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF), errors.Is(err, gzip.ErrHeader), errors.Is(err, gzip.ErrChecksum):
		return refuse("E_LAYER", subject, refusal.Clip(err.Error(), 200), "a whole tar archive")
	}
	var pathError *fs.PathError
	if errors.As(err, &pathError) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%s: %w", subject, err)
	}
	return refuse("E_LAYER", subject, refusal.Clip(err.Error(), 200), "a whole tar archive")
}

// apply unpacks one layer. Reading, hashing and decompressing go on in a second goroutine while files are written; it has
// ended when apply returns.
func (u *unpacker) apply(ctx context.Context, layer io.Reader) error {
	reader, writer := io.Pipe()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, err := io.CopyBuffer(struct{ io.Writer }{writer}, struct{ io.Reader }{layer}, make([]byte, 256<<10))
		writer.CloseWithError(err)
	}()
	defer func() { <-ended }()
	defer reader.Close()
	ahead := bufio.NewReaderSize(reader, 512<<10)
	in := tar.NewReader(ahead)
	for ctx.Err() == nil {
		header, err := in.Next()
		if err == io.EOF {
			_, err := io.Copy(io.Discard, ahead) // what follows the archive is part of the layer, and bounded with it
			u.layer++
			u.white = nil
			return err
		}
		if err != nil {
			return layerError(u.subject, err)
		}
		if header.Typeflag == tar.TypeXGlobalHeader {
			continue // a comment of the archive, such as git's
		}
		if u.entries++; u.entries > maxEntries {
			return refuse("E_LIMIT", u.subject, fmt.Sprintf("more than %d entries", maxEntries), "fewer")
		}
		if err := u.writes(4 << 10); err != nil { // the least of entries needs a block
			return err
		}
		if err := u.entry(header, in); err != nil {
			return err
		}
	}
	return ctx.Err()
}

// writes counts bytes that go to the disk, and now and then asks whether there is room.
func (u *unpacker) writes(n int) error {
	if u.unasked += int64(n); u.unasked < askEvery || u.room == nil {
		return nil
	}
	u.unasked = 0
	return u.room()
}

// Write takes a file's bytes on their way to the disk.
func (u *unpacker) Write(p []byte) (int, error) { return len(p), u.writes(len(p)) }

// bad is a refusal of one entry.
func (u *unpacker) bad(name, got, want string) error {
	return refuse("E_LAYER", fmt.Sprintf("%s: entry %s", u.subject, quote(name)), got, want)
}

func (u *unpacker) entry(h *tar.Header, body io.Reader) error {
	name := strings.TrimPrefix(h.Name, "./")
	if h.Typeflag == tar.TypeDir {
		name = strings.TrimSuffix(name, "/")
	}
	if name == "" || name == "." {
		if h.Typeflag != tar.TypeDir {
			return u.bad(h.Name, "it has no name", "a clean relative path")
		}
		return nil // the root folder itself: 0755, ours
	}
	if err := merkle.CheckPath(name); err != nil {
		return u.bad(h.Name, refusal.Clip(err.Error(), 200), "a clean relative path")
	}
	dir, base := path.Split(name)
	hides := strings.HasPrefix(base, whiteoutPrefix)
	parent, err := u.parent(h.Name, dir, !hides)
	if err != nil {
		return err
	}
	if hides {
		return u.whiteout(parent, h.Name, dir, base)
	}
	e := merkle.Entry{Path: name, Mode: uint32(h.Mode) & 0o7777, UID: uint32(h.Uid), GID: uint32(h.Gid)}
	if int64(e.UID) != int64(h.Uid) || int64(e.GID) != int64(h.Gid) {
		return u.bad(h.Name, fmt.Sprintf("owner %d:%d", h.Uid, h.Gid), "32-bit numbers")
	}
	if err := u.xattrs(h, &e); err != nil {
		return err
	}
	old := parent.children[base]
	if old != nil && old.layer == u.layer && (h.Typeflag != tar.TypeDir || old.entry.Type != merkle.Folder || !old.implicit) {
		return u.bad(h.Name, "it is there twice in one layer", "each path once")
	}
	if old != nil && (h.Typeflag != tar.TypeDir || old.entry.Type != merkle.Folder) {
		if err := u.remove(parent, h.Name, base); err != nil {
			return err
		}
		old = nil
	}
	made, err := u.make(h, e, body, old)
	if err != nil {
		return err
	}
	parent.children[base] = made
	return nil
}

// parent finds the folder dir, "" or with a slash at its end, and makes folders that no layer has described. It notes that the layer adds
// something below.
func (u *unpacker) parent(name, dir string, adds bool) (*node, error) {
	at := u.tree
	u.way = append(u.way[:0], at)
	for begin, end := 0, 0; begin < len(dir); begin = end + 1 {
		end = begin + strings.IndexByte(dir[begin:], '/')
		part, done := dir[begin:end], dir[:end]
		next := at.children[part]
		if next == nil {
			if strings.HasPrefix(part, whiteoutPrefix) {
				return nil, u.bad(name, "it lies below a whiteout", "a path of its own")
			}
			if err := u.root.Mkdir(done, 0o755); err != nil {
				return nil, err
			}
			if err := u.root.Chmod(done, 0o755); err != nil {
				return nil, err
			}
			next = &node{entry: merkle.Entry{Type: merkle.Folder, Path: done, Mode: 0o755}, children: map[string]*node{}, layer: u.layer, implicit: true}
			at.children[part], adds = next, true
		}
		if next.entry.Type != merkle.Folder {
			return nil, u.bad(name, "it lies below "+quote(done)+", which is no folder", "the path without links")
		}
		at = next
		u.way = append(u.way, at)
	}
	for _, n := range u.way {
		if adds {
			n.held = u.layer
		}
	}
	return at, nil
}

// xattrs keeps file capabilities, refuses what overlayfs would obey, and leaves out the rest: labels belong to a host.
// It refuses sparse files as well, which say more bytes than the layer's bound has seen.
func (u *unpacker) xattrs(h *tar.Header, e *merkle.Entry) error {
	for key, value := range h.PAXRecords {
		name, ok := strings.CutPrefix(key, "SCHILY.xattr.")
		switch {
		case strings.HasPrefix(key, "GNU.sparse."):
			return u.bad(h.Name, "a sparse file", "a file with all its bytes")
		case !ok:
		case name == capability:
			e.Xattrs = []merkle.Xattr{{Name: name, Value: value}}
		case strings.HasPrefix(name, "trusted."), strings.HasPrefix(name, "user.overlay."):
			return u.bad(h.Name, "extended attribute "+quote(name), "none that a file system obeys")
		}
	}
	return nil
}

func (u *unpacker) make(h *tar.Header, e merkle.Entry, body io.Reader, old *node) (*node, error) {
	made := &node{layer: u.layer, held: u.layer}
	var err error
	switch h.Typeflag {
	case tar.TypeDir:
		e.Type = merkle.Folder
		made.children = map[string]*node{}
		if old != nil {
			made.children = old.children
		} else if err = u.root.Mkdir(e.Path, 0o755); err != nil {
			return nil, err
		}
		err = u.finish(&e)
	case tar.TypeReg:
		e.Type = merkle.File
		err = u.file(&e, body)
	case tar.TypeSymlink:
		e.Type, e.Link, e.Mode, e.Xattrs = merkle.Symlink, h.Linkname, 0o777, nil
		if h.Linkname == "" || len(h.Linkname) > merkle.MaxPath || strings.ContainsRune(h.Linkname, 0) {
			return nil, u.bad(h.Name, fmt.Sprintf("link to %d bytes", len(h.Linkname)), "1 to 4096 bytes")
		}
		if err = u.root.Symlink(h.Linkname, e.Path); err == nil && u.chown {
			err = u.root.Lchown(e.Path, int(e.UID), int(e.GID))
		}
	case tar.TypeLink:
		target := u.find(strings.TrimPrefix(h.Linkname, "./"))
		if target == nil || target.entry.Type != merkle.File {
			return nil, u.bad(h.Name, "hard link to "+quote(h.Linkname), "a file that this image has, by its clean relative path")
		}
		name := e.Path
		e = target.entry // for the tree, two names of one file are two equal files
		e.Path = name
		err = u.root.Link(target.entry.Path, name)
	default:
		return nil, u.bad(h.Name, fmt.Sprintf("type %q", h.Typeflag), "a file, a folder or a link")
	}
	made.entry = e
	return made, err
}

// file writes a regular file and hashes it on the way.
func (u *unpacker) file(e *merkle.Entry, body io.Reader) error {
	out, err := u.root.OpenFile(e.Path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	blob := merkle.NewBlob()
	if _, err := io.CopyBuffer(struct{ io.Writer }{io.MultiWriter(u, out, blob)}, struct{ io.Reader }{body}, u.buffer); err != nil {
		return layerError(u.subject, err)
	}
	e.Blob, e.Size = blob.Root(), uint64(blob.Size())
	return u.finishFile(out, e)
}

// finish gives a folder its owner, mode and attributes.
func (u *unpacker) finish(e *merkle.Entry) error {
	dir, err := u.root.Open(e.Path)
	if err != nil {
		return err
	}
	defer dir.Close()
	return u.finishFile(dir, e)
}

// finishFile goes owner, mode, attributes: a change of owner clears the set-uid bit and file capabilities.
func (u *unpacker) finishFile(file *os.File, e *merkle.Entry) error {
	if u.chown {
		if err := file.Chown(int(e.UID), int(e.GID)); err != nil {
			return err
		}
	}
	if err := file.Chmod(fileMode(diskMode(e, u.chown))); err != nil {
		return err
	}
	for _, x := range e.Xattrs {
		if !u.chown {
			continue
		}
		if err := unix.Fsetxattr(int(file.Fd()), x.Name, []byte(x.Value), 0); err != nil {
			return &fs.PathError{Op: "setting " + x.Name, Path: e.Path, Err: err}
		}
	}
	return nil
}

// diskMode is the mode that an entry has on disk: as root its own, otherwise one that lets us read and clear it.
func diskMode(e *merkle.Entry, root bool) uint32 {
	switch {
	case root:
		return e.Mode
	case e.Type == merkle.Folder:
		return e.Mode | 0o700
	}
	return e.Mode | 0o400
}

// fileMode turns the twelve bits of Unix into Go's.
func fileMode(mode uint32) fs.FileMode {
	m := fs.FileMode(mode & 0o777)
	if mode&0o4000 != 0 {
		m |= fs.ModeSetuid
	}
	if mode&0o2000 != 0 {
		m |= fs.ModeSetgid
	}
	if mode&0o1000 != 0 {
		m |= fs.ModeSticky
	}
	return m
}

// find returns what is at a clean relative path, without following links; nil if nothing.
func (u *unpacker) find(name string) *node {
	if merkle.CheckPath(name) != nil {
		return nil
	}
	at := u.tree
	for part := range strings.SplitSeq(name, "/") {
		if at = at.children[part]; at == nil {
			return nil
		}
	}
	return at
}

// whiteout takes away what lower layers brought.
func (u *unpacker) whiteout(parent *node, name, dir, base string) error {
	if u.white[dir+base] {
		return u.bad(name, "it is there twice in one layer", "each path once")
	}
	if u.white == nil {
		u.white = map[string]bool{}
	}
	u.white[dir+base] = true
	if base == opaqueName {
		return u.clearBelow(parent)
	}
	hidden := strings.TrimPrefix(base, whiteoutPrefix)
	if hidden == "" || hidden == "." || hidden == ".." || strings.HasPrefix(hidden, whiteoutPrefix) {
		return u.bad(name, "whiteout of "+quote(hidden), "the name of a file beside it")
	}
	if n := parent.children[hidden]; n != nil {
		return u.clear(parent, n, hidden)
	}
	return nil
}

// clear removes n, and everything below it, as far as lower layers brought it.
func (u *unpacker) clear(parent, n *node, base string) error {
	if n.held == u.layer {
		return u.clearBelow(n)
	}
	delete(parent.children, base)
	return u.root.RemoveAll(n.entry.Path)
}

// clearBelow clears what is below n, once for each layer: a layer may have a marker in every folder of a deep tree.
func (u *unpacker) clearBelow(n *node) error {
	if n.cleared == u.layer { // always so in layer 0, which has none below
		return nil
	}
	n.cleared = u.layer
	for base, below := range n.children {
		if err := u.clear(n, below, base); err != nil {
			return err
		}
	}
	return nil
}

// remove makes room at base for something of another type, or for a file's new bytes.
func (u *unpacker) remove(parent *node, name, base string) error {
	n := parent.children[base]
	if n.held == u.layer {
		return u.bad(name, "it replaces a folder that this layer fills", "each path once")
	}
	delete(parent.children, base)
	return u.root.RemoveAll(n.entry.Path)
}

// list returns all entries, parents before children, in no other order.
func (n *node) list(all []merkle.Entry) []merkle.Entry {
	for _, child := range n.children {
		all = child.list(append(all, child.entry))
	}
	return all
}
