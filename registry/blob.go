package registry

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/registry/merkle"
)

// The slowest transfer that is waited for. Below it the world does not answer.
const (
	stall   = time.Minute // in which so many bytes must come, or the end
	least   = 128 << 10
	slowest = 16 << 10       // bytes a second from beginning to end, beside two minutes
	look    = 5 * stall      // for what is small of an image together: documents and config
	longest = 24 * time.Hour // for a blob, and for an image; the blobs that have come whole by then are kept
)

var errStalled = fmt.Errorf("fewer than %d bytes came in %v", least, stall)

// verifier hands out what it reads and judges it at the end: size and sha256 must be the descriptor's before io.EOF is
// given; kmo1 is computed beside them.
type verifier struct {
	subject string
	want    v1.Descriptor
	reader  io.Reader
	sha     hash.Hash
	blob    *merkle.Blob // nil if the root is known
	size    int64
}

func newVerifier(subject string, want v1.Descriptor, r io.Reader, root bool) *verifier {
	v := &verifier{subject: subject, want: want, reader: io.LimitReader(r, want.Size+1), sha: sha256.New()}
	if root {
		v.blob = merkle.NewBlob()
	}
	return v
}

func (v *verifier) Read(p []byte) (int, error) {
	n, err := v.reader.Read(p)
	v.size += int64(n)
	if v.size > v.want.Size {
		return 0, refuse("E_IMG_DIGEST", v.subject, fmt.Sprintf("more than %d bytes", v.want.Size), fmt.Sprintf("size %d", v.want.Size))
	}
	v.sha.Write(p[:n])
	if v.blob != nil {
		if _, err := v.blob.Write(p[:n]); err != nil {
			return 0, err
		}
	}
	if err != io.EOF {
		return n, err
	}
	if v.size != v.want.Size {
		return n, refuse("E_IMG_DIGEST", v.subject, fmt.Sprintf("%d bytes", v.size), fmt.Sprintf("size %d", v.want.Size))
	}
	if got := hex.EncodeToString(v.sha.Sum(nil)); got != v.want.Digest.Hex {
		return n, refuse("E_IMG_DIGEST", v.subject, "sha256:"+got, "sha256:"+v.want.Digest.Hex)
	}
	return n, io.EOF
}

// read is one blob or manifest from the first place that has it right. take gets the verified stream; it is called again, from the start, for the
// next place if one lies. want.Size is -1 for a manifest whose size nothing says yet.
func (s *Store) read(ctx context.Context, at []source, kind, subject string, want v1.Descriptor, take func(io.Reader) error) error {
	var silent, refused, absent error
	for _, place := range at {
		err := s.readFrom(ctx, place, kind, subject, want, take)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, errAbsent):
			absent = err
		case refusal.Of(err) != nil:
			refused = err
		default:
			silent = err
		}
	}
	return cmp.Or(silent, refused, absent) // while one place may yet answer, nothing is refused
}

func (s *Store) readFrom(ctx context.Context, place source, kind, subject string, want v1.Descriptor, take func(io.Reader) error) error {
	ctx, cancel := context.WithTimeout(ctx, min(2*stall+time.Duration(max(0, want.Size)/slowest)*time.Second, longest))
	defer cancel()
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	timer := time.AfterFunc(stall, func() { end(errStalled) })
	defer timer.Stop()
	body, size, err := place.open(ctx, kind, want.Digest.Hex)
	if err == nil {
		defer body.Close()
		if want.Size >= 0 && size >= 0 && size != want.Size {
			return refuse("E_IMG_DIGEST", subject, fmt.Sprintf("%d bytes", size), fmt.Sprintf("size %d", want.Size))
		}
		err = outside(subject, take(&paced{Reader: body, timer: timer}))
	}
	if err != nil && errors.Is(context.Cause(ctx), errStalled) {
		return fmt.Errorf("%s: %w", subject, errStalled)
	}
	return err
}

// paced gives a transfer more time whenever some bytes have come.
type paced struct {
	io.Reader
	timer *time.Timer
	came  int // since the timer was set
}

func (p *paced) Read(b []byte) (int, error) {
	n, err := p.Reader.Read(b)
	if p.came += n; p.came >= least {
		p.came = 0
		p.timer.Reset(stall)
	}
	return n, err
}

// document gets an index or a manifest, at most maxManifest bytes, and parses it.
func (s *Store) document(ctx context.Context, at []source, subject string, desc v1.Descriptor) (*document, error) {
	subject += ": manifest sha256:" + desc.Digest.Hex
	d := &document{desc: desc}
	var err error
	if d.raw, err = s.small(ctx, at, kindManifest, subject, desc); err != nil {
		return nil, err
	}
	return d, d.parse(subject)
}

// small gets at most maxManifest bytes, kept on disk like any blob.
func (s *Store) small(ctx context.Context, at []source, kind, subject string, desc v1.Descriptor) ([]byte, error) {
	if kept := s.keptSmall(desc); kept != nil {
		return kept, nil
	}
	raw, err := s.bytes(ctx, at, kind, subject, desc, maxManifest)
	if err != nil {
		return nil, err
	}
	return raw, s.promote(s.blobPath(desc.Digest.Hex), func(w io.Writer) error {
		_, err := w.Write(raw)
		return err
	})
}

// bytes gets at most limit bytes, and keeps nothing.
func (s *Store) bytes(ctx context.Context, at []source, kind, subject string, desc v1.Descriptor, limit int64) (raw []byte, err error) {
	if desc.Size > limit {
		return nil, refuse("E_LIMIT", subject, fmt.Sprintf("%d bytes", desc.Size), fmt.Sprintf("at most %d", limit))
	}
	err = s.read(ctx, at, kind, subject, desc, func(r io.Reader) error {
		if raw, err = io.ReadAll(io.LimitReader(r, limit+1)); err != nil {
			return err
		}
		if int64(len(raw)) > limit {
			return refuse("E_LIMIT", subject, fmt.Sprintf("more than %d bytes", limit), fmt.Sprintf("at most %d", limit))
		}
		if desc.Size >= 0 && int64(len(raw)) != desc.Size {
			return refuse("E_IMG_DIGEST", subject, fmt.Sprintf("%d bytes", len(raw)), fmt.Sprintf("size %d", desc.Size))
		}
		if got := sha256Hex(raw); got != desc.Digest.Hex {
			return refuse("E_IMG_DIGEST", subject, "sha256:"+got, "sha256:"+desc.Digest.Hex)
		}
		return nil
	})
	return raw, err
}

// keptSmall is what is kept under a digest, nil unless it has the size that is asked for and its bytes are still right. The size is looked at
// first: what is named here may be another image's largest layer.
func (s *Store) keptSmall(desc v1.Descriptor) []byte {
	file, err := os.Open(s.blobPath(desc.Digest.Hex))
	if err != nil {
		return nil
	}
	defer file.Close()
	stat, err := file.Stat()
	if err != nil || stat.Size() > maxManifest || desc.Size >= 0 && stat.Size() != desc.Size {
		return nil
	}
	kept, err := io.ReadAll(io.LimitReader(file, maxManifest))
	if err != nil || sha256Hex(kept) != desc.Digest.Hex {
		return nil
	}
	return kept
}

// blob makes sure that a blob's root is known, and with keep that its bytes are on disk. One caller at a time works on a blob.
func (s *Store) blob(ctx context.Context, at []source, subject string, desc v1.Descriptor, keep bool) (merkle.Digest, error) {
	subject += ": blob sha256:" + desc.Digest.Hex
	unlock, err := s.locks.lock(ctx, desc.Digest.Hex)
	if err != nil {
		return merkle.Digest{}, err
	}
	defer unlock()
	path := s.blobPath(desc.Digest.Hex)
	stat, missing := os.Stat(path)
	if missing == nil && stat.Size() != desc.Size {
		missing = os.ErrNotExist
	}
	if root, ok := readRoot(path+".root", desc.Size); ok && (!keep || missing == nil) {
		return root, nil
	}
	var root merkle.Digest
	fill := func(w io.Writer) error {
		return s.read(ctx, at, kindBlob, subject, desc, func(r io.Reader) error {
			if file, ok := w.(*os.File); ok { // from the start, if another place lied before
				if err := rewind(file); err != nil {
					return err
				}
			}
			v := newVerifier(subject, desc, r, true)
			if _, err := io.CopyBuffer(struct{ io.Writer }{w}, v, make([]byte, 256<<10)); err != nil {
				return err
			}
			root = v.blob.Root()
			return nil
		})
	}
	if keep {
		if err := s.room(desc.Size); err != nil { // others fetch as well, and write
			return merkle.Digest{}, fmt.Errorf("%s: %w", subject, err)
		}
		err = s.promote(path, fill)
	} else {
		err = fill(io.Discard)
	}
	if err != nil {
		return merkle.Digest{}, err
	}
	return root, s.promote(path+".root", func(w io.Writer) error {
		_, err := fmt.Fprintf(w, "%v %d\n", root, desc.Size)
		return err
	})
}

func rewind(file *os.File) error {
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	return file.Truncate(0)
}

func readRoot(path string, size int64) (merkle.Digest, bool) {
	text, err := os.ReadFile(path)
	if err != nil {
		return merkle.Digest{}, false
	}
	digest, length, _ := strings.Cut(strings.TrimSuffix(string(text), "\n"), " ")
	root, err := merkle.Parse(digest)
	return root, err == nil && length == strconv.FormatInt(size, 10)
}

// openBlob opens a kept blob for reading once more; what the disk made of it is checked again while it is read.
func (s *Store) openBlob(subject string, desc v1.Descriptor) (io.ReadCloser, error) {
	file, err := os.Open(s.blobPath(desc.Digest.Hex))
	if err != nil {
		return nil, err
	}
	return struct {
		io.Reader
		io.Closer
	}{newVerifier(subject+": kept blob sha256:"+desc.Digest.Hex, desc, file, false), file}, nil
}

func (s *Store) blobPath(hex string) string { return filepath.Join(s.Dir, "blobs", "sha256", hex) }

// headroom is how much of the disk stays free of images, if that is not more than a twentieth of it: the journal and the audit log are there too.
const headroom = 1 << 30

var errNoRoom = errors.New("the disk has no room")

// room returns errNoRoom unless need bytes more leave the headroom free. It is the state of the world, which may get better, and no refusal.
func (s *Store) room(need int64) error {
	free, size, err := s.disk(s.Dir)
	if err != nil {
		return err
	}
	if keep := min(headroom, size/20); need > free-keep {
		return fmt.Errorf("%w for images: %d bytes are free, want %d and %d that stay free", errNoRoom, free, need, keep)
	}
	return nil
}

func statfs(path string) (free, size int64, err error) {
	var found unix.Statfs_t
	err = unix.Statfs(path, &found)
	block := uint64(found.Bsize) // of another type on another system
	return int64(found.Bavail * block), int64(found.Blocks * block), err
}

// missing is how many bytes of blobs are not kept.
func (s *Store) missing(blobs []v1.Descriptor) int64 {
	var sum int64
	for _, blob := range blobs {
		if stat, err := os.Stat(s.blobPath(blob.Digest.Hex)); err != nil || stat.Size() != blob.Size {
			sum += blob.Size
		}
	}
	return sum
}

// promote writes a read-only file beside the others and gives it its name once it is whole and durable: after a crash it is there whole, or not there.
func (s *Store) promote(path string, fill func(io.Writer) error) error {
	temp, err := os.CreateTemp(filepath.Join(s.Dir, "tmp"), "file-*")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(temp.Name()) }() // in vain once it is renamed
	defer temp.Close()
	if err := fill(temp); err != nil {
		return err
	}
	if err := errors.Join(temp.Chmod(0o444), temp.Sync(), temp.Close()); err != nil {
		return fmt.Errorf("keeping %s: %w", filepath.Base(path), err)
	}
	return os.Rename(temp.Name(), path)
}

// errFilling says that nothing can be removed now.
var errFilling = errors.New("an image is being fetched")

// Clear removes what is needed neither for an image of keep nor by whatever stands on the contents of in use: blobs and records that are older than
// a day, and every copy that no record names, such as a crash leaves. It returns the paths of what it removed, within Dir.
func (s *Store) Clear(ctx context.Context, keep []Pin, inUse []string) (removed []string, err error) {
	if err := s.open(); err != nil {
		return nil, err
	}
	if !s.locks.filling.TryLock() {
		return nil, errFilling
	}
	defer s.locks.filling.Unlock()
	needed := make(map[string]bool) // by path in Dir, blobs without .root
	for _, pin := range keep {
		needed[filepath.Join("images", s.key(pin.Ref, pin.Root, pin.Format)+".json")] = true
		s.need(needed, pin.Ref.SHA256)
	}
	for _, content := range inUse {
		key, n := filepath.Split(filepath.Dir(content)) // whatever Dir was called when it was started
		key = filepath.Base(key)
		needed[filepath.Join("images", key+".json")], needed[filepath.Join("content", key, n)] = true, true
	}
	for _, pattern := range []string{"images/*.json", "content/*/*", "blobs/sha256/*"} { // a record before its copy
		found, err := fs.Glob(os.DirFS(s.Dir), pattern)
		if err != nil {
			return removed, err
		}
		for _, path := range found {
			if needed[strings.TrimSuffix(path, ".root")] {
				continue
			}
			if ctx.Err() != nil {
				return removed, context.Cause(ctx)
			}
			if gone, err := s.clear(path); err != nil {
				return removed, err
			} else if gone {
				removed = append(removed, path)
			}
		}
	}
	return removed, nil
}

// need marks a document's blob, and the blobs that it leads to as far as they are here.
func (s *Store) need(needed map[string]bool, hex string) {
	path := filepath.Join("blobs", "sha256", hex)
	if needed[path] {
		return
	}
	needed[path] = true
	d := &document{raw: s.keptSmall(v1.Descriptor{Size: -1, Digest: v1.Hash{Algorithm: "sha256", Hex: hex}})}
	if d.raw == nil || d.parse(hex) != nil {
		return
	}
	for _, member := range d.members {
		s.need(needed, member.desc.Digest.Hex)
	}
	if d.manifest != nil {
		for _, blob := range d.blobs() {
			needed[filepath.Join("blobs", "sha256", blob.Digest.Hex)] = true
		}
	}
}

// clear removes what is not needed, unless it is a record or a blob that is young, or the copy of a record.
func (s *Store) clear(path string) (gone bool, err error) {
	full := filepath.Join(s.Dir, path)
	if dir := filepath.Dir(full); strings.HasPrefix(path, "content/") {
		r, err := s.recorded(filepath.Base(dir))
		if err != nil || filepath.Dir(r.Content.Path) == full {
			return false, err
		}
		err = os.RemoveAll(full)
		_ = os.Remove(dir) // if it was the last
		return true, err
	}
	stat, err := os.Lstat(full)
	if err != nil || time.Since(stat.ModTime()) <= grace {
		return false, err
	}
	s.mu.Lock()
	delete(s.known, strings.TrimSuffix(filepath.Base(path), ".json"))
	s.mu.Unlock()
	return true, os.Remove(full)
}

func sha256Hex(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// locks gives one caller at a time a name.
type locks struct {
	mu   sync.Mutex
	held map[string]chan struct{} // closed when given back

	filling sync.RWMutex // held for reading while an image is fetched, and for writing while what is not needed is removed
}

func (l *locks) lock(ctx context.Context, name string) (unlock func(), err error) {
	for {
		l.mu.Lock()
		if l.held == nil {
			l.held = make(map[string]chan struct{})
		}
		other, taken := l.held[name]
		if !taken {
			mine := make(chan struct{})
			l.held[name] = mine
			l.mu.Unlock()
			return func() {
				l.mu.Lock()
				delete(l.held, name)
				l.mu.Unlock()
				close(mine)
			}, nil
		}
		l.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
