package gitrepo

import (
	"bytes"
	"compress/zlib"
	"context"
	"crypto/sha1"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/object"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"

	"github.com/kindos/kmo/policy/refusal"
)

func code(err error) refusal.Code {
	if r := refusal.Of(err); r != nil {
		return r.Code
	}
	return ""
}

// object writes an object into the bare repository as it is, whatever git thinks of it.
func (w *world) object(kind, content string) string {
	w.t.Helper()
	return w.pipe(content, "hash-object", "-t", kind, "--literally", "-w", "--stdin")
}

// treeOf is a tree object of mode, name, id triples, in that order.
func (w *world) treeOf(triples ...string) string {
	var b strings.Builder
	for i := 0; i < len(triples); i += 3 {
		id, err := hex.DecodeString(triples[i+2])
		if err != nil {
			w.t.Fatal(err)
		}
		fmt.Fprintf(&b, "%s %s\x00%s", triples[i], triples[i+1], id)
	}
	return w.object("tree", b.String())
}

func (w *world) commitOf(tree string) string {
	return w.object("commit", "tree "+tree+"\nauthor A <a@b> 1 +0000\ncommitter A <a@b> 1 +0000\n\nhostile\n")
}

// refused moves the branch to a hostile commit and sees it refused, over two carriers, with the copy byte for byte as before.
func (w *world) refused(t *testing.T, want refusal.Code, id string, copies ...*Repository) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(w.bare, "refs/heads/main"), []byte(id+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, r := range copies {
		before := contents(t, r.Dir)
		_, err := r.Head(context.Background())
		if code(err) != want {
			t.Errorf("%s: %v; want %s", r.remote, err, want)
		}
		if diff := cmp.Diff(before, contents(t, r.Dir)); diff != "" {
			t.Errorf("%s: the copy changed:\n%s", r.remote, diff)
		}
	}
}

func TestHostileTrees(t *testing.T) {
	w := newWorld(t)
	good := w.commit("a", "1")
	web := w.serveHTTP("host", "")
	byPath := w.open()
	byHTTP := w.open(func(r *Repository) { r.Remote = web.URL + "/site.git" })
	head(t, byPath)
	head(t, byHTTP)
	file := w.object("blob", "text")
	empty := w.treeOf()
	names := map[string]string{
		"T42 U-03 dot git": ".git", "T42 U-03 dot GIT": ".GIT", "T42 U-03 short name": "git~1", "T42 U-03 short name upper": "GIT~12",
		"T42 U-03 zero width": ".g\u200cit", "T42 U-03 full width": "\uff0egit", "T42 U-03 stream": ".git::$INDEX_ALLOCATION",
		"T42 U-01 dot dot": "..", "T42 U-03 dot": ".", "T42 U-03 empty": "", "T42 U-03 trailing dot": "a.", "T42 U-03 trailing space": "a ",
		"T42 U-03 backslash": `a\b`, "T42 U-01 slash": "a/b", "T42 U-01 absolute": "/etc", "T42 U-01 steps": "../../etc/passwd",
		"T42 U-03 control": "a\x1b[31m", "T42 U-03 newline": "a\nb", "T42 U-03 not UTF-8": "a\xff", "T42 U-03 bidi": "a\u202eb",
		"T42 U-03 4 KB": strings.Repeat("n", 4097), "T42 64 KiB path": strings.Repeat("n", 65536),
	}
	for name, bad := range names {
		t.Run(name, func(t *testing.T) {
			copies := []*Repository{byPath, byHTTP}
			if bad == "" {
				copies = copies[:1] // git itself does not serve it
			}
			w.refused(t, "E_PATH", w.commitOf(w.treeOf("100644", bad, file)), copies...)
			w.refused(t, "E_PATH", w.commitOf(w.treeOf("40000", "deep", w.treeOf("40000", bad, empty))), byPath)
		})
	}
	t.Run("T42 path of many names", func(t *testing.T) {
		tree := empty
		for range 20 {
			tree = w.treeOf("40000", strings.Repeat("n", 250), tree)
		}
		w.refused(t, "E_PATH", w.commitOf(tree), byPath)
	})
	for name, tree := range map[string]string{
		"T42 U-01 symlink":              w.treeOf("120000", "x", w.object("blob", "/etc/shadow")),
		"T42 U-01 symlink in a folder":  w.treeOf("40000", "units", w.treeOf("120000", "x", w.object("blob", "../../x"))),
		"T42 U-06 gitlink":              w.treeOf("160000", "module", good),
		"T42 U-03 duplicate":            w.treeOf("100644", "a", file, "100644", "a", file),
		"T42 U-03 file and folder":      w.treeOf("100644", "a", file, "40000", "a", empty),
		"T42 case collision":            w.treeOf("100644", "Unit.yaml", file, "100644", "unit.yaml", file),
		"T42 normal form collision":     w.treeOf("100644", "e\u0301", file, "100644", "\u00e9", file),
		"T42 group writable":            w.treeOf("100664", "a", file),
		"T42 a mode with leading zeros": w.treeOf("040000", "a", empty),
	} {
		t.Run(name, func(t *testing.T) { w.refused(t, "E_PATH", w.commitOf(tree), byPath, byHTTP) })
	}
	t.Run("T42 U-08 depth", func(t *testing.T) {
		tree := empty
		for range 33 {
			tree = w.treeOf("40000", "d", tree)
		}
		w.refused(t, "E_LIMIT", w.commitOf(tree), byPath, byHTTP)
	})
	t.Run("T43 few trees, countless files", func(t *testing.T) {
		tree := w.treeOf("100644", "f", file)
		for range 8 {
			var triples []string
			for i := range 10 {
				triples = append(triples, "40000", fmt.Sprint(i), tree)
			}
			tree = w.treeOf(triples...)
		}
		w.refused(t, "E_LIMIT", w.commitOf(tree), byPath, byHTTP)
	})
	t.Run("T44 missing blob", func(t *testing.T) {
		w.refused(t, "E_PACK", w.commitOf(w.treeOf("100644", "a", strings.Repeat("1", 40))), byPath)
	})
	t.Run("T44 a bit of a loose object flipped", func(t *testing.T) {
		blob := w.object("blob", strings.Repeat("loose ", 50))
		path := filepath.Join(w.bare, "objects", blob[:2], blob[2:])
		w.run(w.bare, "chmod", "u+w", path)
		var z bytes.Buffer
		zw := zlib.NewWriter(&z)
		zw.Write([]byte("blob 5\x00other"))
		zw.Close()
		if err := os.WriteFile(path, z.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
		w.refused(t, "E_PACK", w.commitOf(w.treeOf("100644", "a", blob)), byPath)
	})
	for name, text := range map[string]string{
		"T43 U-08 a loose object that says 8 GB":       "blob 8589934592\x00",
		"T43 U-08 a loose object longer than it says":  "blob 4\x00" + strings.Repeat("\x00", 1<<20),
		"T43 U-08 a loose object shorter than it says": "blob 40\x00x",
	} {
		t.Run(name, func(t *testing.T) {
			id := strings.Repeat("2", 40)
			path := filepath.Join(w.bare, "objects/22", id[2:])
			os.MkdirAll(filepath.Dir(path), 0o700)
			f, err := os.Create(path)
			if err != nil {
				t.Fatal(err)
			}
			zw := zlib.NewWriter(f)
			io.WriteString(zw, text)
			zw.Close()
			f.Close()
			want := refusal.Code("E_PACK")
			if strings.Contains(text, "8589934592") {
				want = "E_LIMIT"
			}
			w.refused(t, want, w.commitOf(w.treeOf("100644", "a", id)), byPath)
		})
	}
	for name, raw := range map[string]string{
		"T05 two trees":         "tree " + empty + "\ntree " + empty + "\nauthor A <a@b> 1 +0000\ncommitter A <a@b> 1 +0000\n\nx\n",
		"T05 two authors":       "tree " + empty + "\nauthor A <a@b> 1 +0000\nauthor A <a@b> 1 +0000\ncommitter A <a@b> 1 +0000\n\nx\n",
		"T05 a later tree":      "tree " + empty + "\nauthor A <a@b> 1 +0000\ncommitter A <a@b> 1 +0000\ntree " + empty + "\n\nx\n",
		"T05 a later parent":    "tree " + empty + "\nauthor A <a@b> 1 +0000\ncommitter A <a@b> 1 +0000\nparent " + good + "\n\nx\n",
		"T05 no tree":           "author A <a@b> 1 +0000\ncommitter A <a@b> 1 +0000\n\nx\n",
		"T05 an upper-case id":  "tree " + strings.ToUpper(empty) + "\nauthor A <a@b> 1 +0000\ncommitter A <a@b> 1 +0000\n\nx\n",
		"T05 nothing":           "",
		"T05 parent after text": "tree " + empty + "\nauthor A <a@b> 1 +0000\nparent " + good + "\ncommitter A <a@b> 1 +0000\n\nx\n",
	} {
		t.Run(name, func(t *testing.T) { w.refused(t, "E_OBJ_MALFORMED", w.object("commit", raw), byPath) })
	}
	t.Run("T05 a branch at a blob", func(t *testing.T) { w.refused(t, "E_OBJ_MALFORMED", file, byPath) })
	t.Run("T05 a broken tree", func(t *testing.T) {
		w.refused(t, "E_OBJ_MALFORMED", w.commitOf(w.object("tree", "100644 a")), byPath)
	})
	t.Run("T41 a reference file with anything in it", func(t *testing.T) {
		w.refused(t, "E_REF_NAME", "root:canary:0:0", byPath)
		w.refused(t, "E_REF_NAME", "ref: refs/heads/../../config", byPath)
	})
	for _, r := range []*Repository{byPath, byHTTP} {
		if c, err := r.At(context.Background(), good); err != nil || c.ID != good {
			t.Errorf("the good commit after all that: %v", err)
		}
	}
	t.Run("T42 in history only", func(t *testing.T) { // a site may have had a link once; its old tree cannot be read, its new one can
		old := w.commitOf(w.treeOf("120000", "x", file))
		now := w.object("commit", "tree "+w.treeOf("100644", "x", file)+"\nparent "+old+"\nauthor A <a@b> 1 +0000\ncommitter A <a@b> 1 +0000\n\nx\n")
		os.WriteFile(filepath.Join(w.bare, "refs/heads/main"), []byte(now+"\n"), 0o600)
		if got := head(t, byPath); got != now {
			t.Fatalf("head is %s, want %s", got, now)
		}
		c, err := byPath.At(context.Background(), old)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Tree.Open("x"); code(err) != "E_PATH" {
			t.Errorf("opening the link: %v, want E_PATH", err)
		}
	})
}

// packed is a hand-made pack.
type madePack struct {
	bytes.Buffer
	n       uint32
	offsets []int
}

func (p *madePack) add(kind plumbing.ObjectType, says int, extra []byte, content []byte) *madePack {
	p.offsets = append(p.offsets, p.Len()+12)
	size := uint64(says)
	head := []byte{byte(kind)<<4 | byte(size&15)}
	for size >>= 4; size > 0; size >>= 7 {
		head[len(head)-1] |= 0x80
		head = append(head, byte(size&127))
	}
	p.Write(append(head, extra...))
	z := zlib.NewWriter(&p.Buffer)
	z.Write(content)
	z.Close()
	p.n++
	return p
}

func (p *madePack) object(kind plumbing.ObjectType, content []byte) *madePack {
	return p.add(kind, len(content), nil, content)
}

// onto adds a delta against the last object.
func (p *madePack) onto(delta []byte) *madePack {
	back := uint64(p.Len() + 12 - p.offsets[len(p.offsets)-1])
	extra := []byte{byte(back & 127)}
	for back >>= 7; back > 0; back >>= 7 {
		back--
		extra = append([]byte{byte(back&127) | 0x80}, extra...)
	}
	return p.add(plumbing.OFSDeltaObject, len(delta), extra, delta)
}

func (p *madePack) count(n uint32) []byte {
	all := append([]byte("PACK\x00\x00\x00\x02"), binary.BigEndian.AppendUint32(nil, n)...)
	all = append(all, p.Bytes()...)
	sum := sha1.Sum(all)
	return append(all, sum[:]...)
}

func (p *madePack) done() []byte { return p.count(p.n) }

// delta appends text to a base of some size, claiming a size of the result.
func delta(base, result int, text string) []byte {
	d := binary.AppendUvarint(nil, uint64(base))
	d = binary.AppendUvarint(d, uint64(result))
	if base > 0 {
		d = append(d, 0x80|0x10, byte(base)) // copy base bytes from 0; base < 256
	}
	return append(append(d, byte(len(text))), text...)
}

// lines are pkt-lines, "" a flush.
func lines(all ...string) string {
	var b strings.Builder
	for _, l := range all {
		if l == "" {
			b.WriteString("0000")
			continue
		}
		fmt.Fprintf(&b, "%04x%s", len(l)+4, l)
	}
	return b.String()
}

// liar is a server that lists references and then says whatever it likes.
func liar(t *testing.T, refs string, answer func(http.ResponseWriter)) *httptest.Server {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if q.Method == http.MethodGet {
			w.Header().Set("Content-Type", "application/x-"+q.URL.Query().Get("service")+"-advertisement")
			io.WriteString(w, lines("# service=git-upload-pack\n", "")+refs)
			return
		}
		w.Header().Set("Content-Type", "application/x-git-upload-pack-result")
		answer(w)
	}))
	t.Cleanup(s.Close)
	return s
}

func advert(id string) string {
	return lines(id+" refs/heads/main\x00ofs-delta agent=liar\n", "")
}

// site is a commit with one file, as objects.
func site(text string) (blob, tree, commit []byte, id string) {
	blob = []byte(text)
	h := plumbing.ComputeHash(plumbing.BlobObject, blob)
	tree = append([]byte("100644 a\x00"), h[:]...)
	commit = fmt.Appendf(nil, "tree %s\nauthor A <a@b> 1 +0000\ncommitter A <a@b> 1 +0000\n\nx\n", plumbing.ComputeHash(plumbing.TreeObject, tree))
	return blob, tree, commit, plumbing.ComputeHash(plumbing.CommitObject, commit).String()
}

func goodPack() (*madePack, string) {
	blob, tree, commit, id := site("text of a file that is long enough to be a base")
	p := &madePack{}
	return p.object(plumbing.CommitObject, commit).object(plumbing.TreeObject, tree).object(plumbing.BlobObject, blob), id
}

func TestHostilePacks(t *testing.T) {
	w := newWorld(t)
	fresh := func() *madePack { p, _ := goodPack(); return p }
	_, id := goodPack()
	base := len("text of a file that is long enough to be a base")
	chain := fresh()
	for i := range 51 {
		chain.onto(delta(base+i, base+i+1, "x"))
	}
	byID := &madePack{}
	last := []byte("base")
	for i := range 51 {
		h := plumbing.ComputeHash(plumbing.BlobObject, last)
		d := delta(len(last), len(last)+1, "x")
		byID.add(plumbing.REFDeltaObject, len(d), h[:], d)
		last = append(last, 'x')
		_ = i
	}
	byID.object(plumbing.BlobObject, []byte("base"))
	bomb := fresh()
	zeros := make([]byte, 60<<20)
	for i := range 5 {
		zeros[0] = byte(i)
		bomb.object(plumbing.BlobObject, zeros)
	}
	absent := bytes.Repeat([]byte{9}, 20)
	thin := delta(10, 11, "x")
	for name, c := range map[string]struct {
		pack []byte
		want refusal.Code
	}{
		"good, so that the others mean something": {fresh().done(), ""},
		"T43 U-08 2^31 objects":                   {fresh().count(1 << 31), "E_LIMIT"},
		"T43 ten million objects":                 {fresh().count(10_000_000), "E_LIMIT"},
		"T43 U-08 declared 8 GB":                  {fresh().add(plumbing.BlobObject, 8<<30, nil, []byte("x")).done(), "E_LIMIT"},
		"T43 U-08 declared 1 KB, is 8 MB":         {fresh().add(plumbing.BlobObject, 1024, nil, make([]byte, 8<<20)).done(), "E_LIMIT"},
		"T43 U-08 declared 1 KB, is 1 B":          {fresh().add(plumbing.BlobObject, 1024, nil, []byte("x")).done(), "E_PACK"},
		"T43 U-08 delta chain by offset":          {chain.done(), "E_LIMIT"},
		"T43 U-08 delta chain by id":              {byID.done(), "E_LIMIT"},
		"T43 delta that says 1 TB":                {fresh().onto(delta(base, 1<<40, "x")).done(), "E_LIMIT"},
		"T43 U-08 inflate ratio":                  {bomb.done(), "E_LIMIT"},
		"T44 delta for another base":              {fresh().onto(delta(base-1, base, "x")).done(), "E_PACK"},
		"T44 delta of another size":               {fresh().onto(delta(base, base+9, "x")).done(), "E_PACK"},
		"T44 thin":                                {fresh().add(plumbing.REFDeltaObject, len(thin), absent, thin).done(), "E_PACK"},
		"T44 delta against nothing":               {fresh().add(plumbing.OFSDeltaObject, len(thin), []byte{1}, thin).done(), "E_PACK"},
		"T44 type 5":                              {fresh().add(5, 1, nil, []byte("x")).done(), "E_PACK"},
		"T44 one object twice":                    {fresh().object(plumbing.BlobObject, []byte("y")).object(plumbing.BlobObject, []byte("y")).done(), "E_PACK"},
		"T44 more objects than counted":           {fresh().count(2), "E_PACK"},
		"T44 fewer objects than counted":          {fresh().count(4), "E_PACK"},
		"T44 bytes after the end":                 {append(fresh().done(), "more"...), "E_PACK"},
		"T44 no bytes":                            {nil, "E_PACK"},
		"T44 empty pack":                          {(&madePack{}).done(), "E_PACK"},
		"T44 another commit":                      {(&madePack{}).object(plumbing.BlobObject, []byte("y")).done(), "E_PACK"},
		"T44 version 3":                           {append([]byte("PACK\x00\x00\x00\x03"), fresh().done()[8:]...), "E_PACK"},
	} {
		t.Run(name, func(t *testing.T) {
			s := liar(t, advert(id), func(a http.ResponseWriter) { io.WriteString(a, lines("NAK\n")); a.Write(c.pack) })
			r := w.open(func(r *Repository) { r.Remote = s.URL + "/site.git" })
			before := contents(t, r.Dir)
			_, err := r.Head(context.Background())
			if code(err) != c.want || c.want == "" && err != nil {
				t.Fatalf("%v; want %q", err, c.want)
			}
			if diff := cmp.Diff(before, contents(t, r.Dir)); diff != "" && c.want != "" {
				t.Errorf("the copy changed:\n%s", diff)
			}
		})
	}
}

// What a server sends is bounded also where it is no pack, and what a pack leads to also where it has little itself.
func TestHostileAnswers(t *testing.T) {
	w := newWorld(t)
	pack, id := goodPack()
	ack := lines("ACK " + id + "\n")
	progress := lines("\x02" + strings.Repeat("counting ", 1000))
	var wide []byte
	for i := range 41 {
		wide = fmt.Appendf(wide, "100644 %02d\x00%s", i, sha1.New().Sum([]byte{byte(i)})[:20])
	}
	leading, _ := goodPack()
	for name, c := range map[string]struct {
		caps   string
		answer string
		limit  func(*Limits)
		want   string
	}{
		"T43 lines before the pack":   {"ofs-delta", strings.Repeat(ack, 100_000) + lines("NAK\n") + string(pack.done()), func(*Limits) {}, "at most 65536"},
		"as many lines as commits":    {"ofs-delta", strings.Repeat(ack, 64) + lines("NAK\n") + string(pack.done()), func(*Limits) {}, ""},
		"T43 progress without a pack": {"side-band-64k", lines("NAK\n") + strings.Repeat(progress, 1000), func(l *Limits) { l.Bytes = 1000 }, "the remote's answer with the pack"},
		"T43 links to nothing": {"ofs-delta", lines("NAK\n") + string(leading.object(plumbing.TreeObject, wide).done()),
			func(l *Limits) { l.Objects = 10 }, "objects to which its own lead"},
	} {
		t.Run(name, func(t *testing.T) {
			s := liar(t, lines(id+" refs/heads/main\x00"+c.caps+"\n", ""), func(a http.ResponseWriter) { io.WriteString(a, c.answer) })
			r := w.open(func(r *Repository) { r.Remote = s.URL + "/site.git"; c.limit(&r.Limits) })
			before := contents(t, r.Dir)
			_, err := r.Head(context.Background())
			if c.want == "" && err != nil || c.want != "" && (code(err) != "E_LIMIT" || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("%v; want E_LIMIT and %q", err, c.want)
			}
			if diff := cmp.Diff(before, contents(t, r.Dir)); diff != "" && c.want != "" {
				t.Errorf("the copy changed:\n%s", diff)
			}
		})
	}
}

// A local git that has more to send than is taken is not waited for.
func TestLocalPackTooLarge(t *testing.T) {
	w := newWorld(t)
	w.rewrite(1, 4<<20)
	r := w.open(func(r *Repository) { r.Limits.Bytes, r.Limits.Duration = 1000, time.Minute })
	if _, err := r.Head(context.Background()); code(err) != "E_LIMIT" || !strings.Contains(err.Error(), "the pack") {
		t.Errorf("T43 %v; want the pack refused", err)
	}
}

// An ssh server that sends what cannot be read, and then more of it, is given up on in time.
func TestHostileSSH(t *testing.T) {
	w := newWorld(t)
	stop := make(chan struct{})
	address, host := w.servesSSH(testSigner(t, 2).PublicKey(), func(_ string, channel ssh.Channel) error {
		for range 40 {
			_, _ = channel.SendRequest("exit-status", false, nil)
		}
		<-stop
		return nil
	})
	defer close(stop)
	known := filepath.Join(w.home, "known_hosts")
	if err := os.WriteFile(known, []byte(knownhosts.Line([]string{address}, host)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := w.open(func(r *Repository) {
		r.Remote, r.Auth = "ssh://git@"+address+w.bare, Auth{KeyFile: keyFile(t, 2), KnownHosts: known}
		r.Limits.Duration = time.Second
	})
	given := make(chan error, 1)
	go func() {
		_, err := r.Head(context.Background())
		given <- err
	}()
	select {
	case err := <-given:
		if code(err) != "E_LIMIT" {
			t.Errorf("T43 %v; want E_LIMIT", err)
		}
	case <-time.After(time.Minute):
		t.Fatal("T43 still waiting a minute after the fetch's one second")
	}
}

func TestEveryBitAndPrefix(t *testing.T) {
	p, _ := goodPack()
	whole := p.onto(delta(len("text of a file that is long enough to be a base"), 48, "x")).done()
	judge := func(pack []byte) error {
		f, err := os.CreateTemp(t.TempDir(), "")
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		defer os.Remove(f.Name())
		f.Write(pack)
		_, err = index(context.Background(), f, defaultLimits(), func(plumbing.Hash) bool { return false })
		return err
	}
	if err := judge(whole); err != nil {
		t.Fatalf("the whole pack: %v", err)
	}
	for n := range len(whole) {
		if err := judge(whole[:n]); code(err) != "E_PACK" {
			t.Errorf("T44 %d of %d bytes: %v, want E_PACK", n, len(whole), err)
		}
		flipped := bytes.Clone(whole)
		flipped[n] ^= 1 << (n % 8)
		if err := judge(flipped); code(err) != "E_PACK" && code(err) != "E_LIMIT" {
			t.Errorf("T44 byte %d flipped: %v, want E_PACK", n, err)
		}
	}
}

func TestHostileServers(t *testing.T) {
	w := newWorld(t)
	pack, id := goodPack()
	many := []string{id + " refs/heads/main\x00ofs-delta\n"}
	for i := range 10_001 {
		many = append(many, fmt.Sprintf("%s refs/tags/%d\n", id, i))
	}
	for name, c := range map[string]struct {
		refs string
		want refusal.Code
	}{
		"T41 huge list":              {lines(append(many, "")...), "E_LIMIT"},
		"T41 U-04 steps":             {lines(id+" refs/heads/../../config\x00ofs-delta\n", id+" refs/heads/main\n", ""), "E_REF_NAME"},
		"T41 U-04 a dash":            {lines(id+" refs/heads/main\x00ofs-delta\n", id+" refs/heads/-x\n", ""), "E_REF_NAME"},
		"T41 U-04 64 KB":             {lines(id+" refs/heads/main\x00ofs-delta\n", id+" refs/heads/"+strings.Repeat("x", 60000)+"\n", ""), "E_REF_NAME"},
		"T41 U-04 newline":           {lines(id+" refs/heads/main\x00ofs-delta\n", id+" refs/heads/x\ny\n", ""), "E_REF_NAME"},
		"T41 U-04 a lock":            {lines(id+" refs/heads/main.lock\x00ofs-delta\n", id+" refs/heads/main\n", ""), "E_REF_NAME"},
		"T41 U-04 outside refs":      {lines(id+" config\x00ofs-delta\n", id+" refs/heads/main\n", ""), "E_REF_NAME"},
		"T41 a list that never ends": {lines(id+" refs/heads/main\x00ofs-delta\n") + strings.Repeat(lines(id+" refs/heads/x\n"), 300_000), "E_LIMIT"},
		"no branch":                  {lines(id+" refs/heads/other\x00ofs-delta\n", ""), ""},
		"U-39 an error with escapes": {lines("ERR \x1b[31mbad\n"), ""},
		"not a list":                 {"<html>sign in</html>", ""},
	} {
		t.Run(name, func(t *testing.T) {
			s := liar(t, c.refs, func(a http.ResponseWriter) { io.WriteString(a, lines("NAK\n")); a.Write(pack.done()) })
			r := w.open(func(r *Repository) { r.Remote = s.URL + "/site.git" })
			_, err := r.Head(context.Background())
			if err == nil || code(err) != c.want {
				t.Errorf("%v; want code %q", err, c.want)
			}
			if strings.ContainsAny(fmt.Sprint(err), "\x1b\n") {
				t.Errorf("U-39 control characters in %q", err)
			}
		})
	}
	drip := func(a http.ResponseWriter, every time.Duration, stop <-chan struct{}) {
		io.WriteString(a, lines("NAK\n"))
		for _, b := range append(pack.done(), make([]byte, 1<<20)...) {
			a.Write([]byte{b})
			a.(http.Flusher).Flush()
			select {
			case <-stop:
				return
			case <-time.After(every):
			}
		}
	}
	for name, c := range map[string]struct {
		every time.Duration
		limit func(*Limits)
		want  refusal.Code
		text  string
	}{
		"T43 U-08 endless, a byte at a time": {time.Millisecond, func(l *Limits) { l.Duration = 100 * time.Millisecond }, "E_LIMIT", "not done after 100ms"},
		"T43 U-08 endless, bytes":            {0, func(l *Limits) { l.Bytes = 2000 }, "E_LIMIT", "at most 2000"},
		"silent":                             {time.Hour, func(l *Limits) { l.Idle = 100 * time.Millisecond }, "", "sent nothing for 100ms"},
	} {
		t.Run(name, func(t *testing.T) {
			stop := make(chan struct{})
			s := liar(t, advert(id), func(a http.ResponseWriter) { drip(a, c.every, stop) })
			defer close(stop)
			r := w.open(func(r *Repository) { r.Remote = s.URL + "/site.git"; c.limit(&r.Limits) })
			before := contents(t, r.Dir)
			_, err := r.Head(context.Background())
			if code(err) != c.want || err == nil || !strings.Contains(err.Error(), c.text) {
				t.Errorf("%v; want code %q and %q", err, c.want, c.text)
			}
			if diff := cmp.Diff(before, contents(t, r.Dir)); diff != "" {
				t.Errorf("the copy changed:\n%s", diff)
			}
		})
	}
	t.Run("a cancelled context is not the remote's fault", func(t *testing.T) {
		stop := make(chan struct{})
		ctx, cancel := context.WithCancel(context.Background())
		s := liar(t, advert(id), func(a http.ResponseWriter) { cancel(); drip(a, time.Hour, stop) })
		defer close(stop)
		r := w.open(func(r *Repository) { r.Remote = s.URL + "/site.git" })
		if _, err := r.Head(ctx); err == nil || code(err) != "" {
			t.Errorf("%v; want an error that is no refusal", err)
		}
	})
}

func TestCanary(t *testing.T) {
	w := newWorld(t)
	good, bad := w.commit("a", "1"), w.commit("a", "2")
	secret := filepath.Join(w.home, "secret")
	os.WriteFile(secret, []byte("canary-file\n"), 0o600)
	t.Setenv("KMO_TEST_CANARY", "canary-variable")
	web := w.serveHTTP("host", "canary-other")
	var errs []error
	for _, url := range []string{
		"https://user:canary-url@host.example/site.git", "https://canary-url@host.example/site.git", "ssh://git:canary-url@host.example/x",
		"http://user:canary-url@127.0.0.1/%zz", "https://user:canary-url@[::1/x", "ftp://user:canary-url@x/y", "user:canary-url@host/x?q=1",
		"https://host.example/x?token=canary-url", "https://host.example/x#canary-url", "http://host.example/canary-url",
	} {
		r := &Repository{Dir: t.TempDir(), Remote: url, Branch: "main"}
		err := r.Open()
		if err == nil {
			t.Errorf("U-36 %s was taken", url)
		}
		errs = append(errs, err)
	}
	for _, auth := range []Auth{{PasswordFile: secret}, {PasswordEnv: "KMO_TEST_CANARY"}, {PasswordFile: secret + "x"}, {PasswordEnv: "KMO_NONE"}, {PasswordFile: secret, CAFile: secret}} {
		r := w.open(func(r *Repository) { r.Remote, r.Auth = web.URL+"/site.git", auth })
		_, err := r.Head(context.Background())
		_, again := r.Revert(context.Background(), plea(good, bad))
		errs = append(errs, err, again)
	}
	address, _ := w.serveSSH(testSigner(t, 3).PublicKey())
	for _, auth := range []Auth{
		{KnownHosts: secret, KeyFile: keyFile(t, 2)}, {KnownHosts: secret + "x", KeyFile: keyFile(t, 2)}, {KnownHosts: os.DevNull, KeyFile: secret},
		{KnownHosts: os.DevNull, KeyFile: keyFile(t, 2)},
	} {
		r := w.open(func(r *Repository) { r.Remote, r.Auth = "ssh://git@"+address+w.bare, auth })
		_, err := r.Head(context.Background())
		errs = append(errs, err)
	}
	for i, err := range errs {
		if err == nil {
			t.Errorf("case %d: no error", i)
		} else if strings.Contains(err.Error(), "canary") {
			t.Errorf("U-36 case %d: a secret in %q", i, err)
		}
	}
	r := &Repository{Dir: t.TempDir(), Remote: "ssh://git@host.example/x", Branch: "main"}
	if err := r.Open(); err == nil || !strings.Contains(err.Error(), "known_hosts") {
		t.Errorf("ssh without known_hosts: %v", err)
	}
}

func TestRedirects(t *testing.T) {
	w := newWorld(t)
	want := w.commit("a", "1")
	inner := w.serveHTTP("", "")
	leaked := ""
	other := httptest.NewServer(http.HandlerFunc(func(a http.ResponseWriter, q *http.Request) {
		leaked += q.Header.Get("Authorization")
		inner.Config.Handler.ServeHTTP(a, q)
	}))
	defer other.Close()
	to := ""
	first := httptest.NewServer(http.HandlerFunc(func(a http.ResponseWriter, q *http.Request) {
		if _, password, _ := q.BasicAuth(); password != "canary" {
			t.Error("the remote itself got no credentials")
		}
		http.Redirect(a, q, to, http.StatusFound)
	}))
	defer first.Close()
	t.Setenv("KMO_TEST_PASSWORD", "canary")
	open := func() *Repository {
		return w.open(func(r *Repository) {
			r.Remote, r.Auth = first.URL+"/site.git", Auth{PasswordEnv: "KMO_TEST_PASSWORD"}
		})
	}
	to = other.URL + "/site.git/info/refs?service=git-upload-pack"
	if got := head(t, open()); got != want {
		t.Errorf("head is %s, want %s", got, want)
	}
	if leaked != "" {
		t.Error("U-38 the credentials went to another origin")
	}
	for _, to = range []string{"file:///etc/passwd/info/refs", "ftp://127.0.0.1/info/refs", other.URL + "/elsewhere", "http://u:p@127.0.0.1/info/refs", first.URL + "/site.git/info/refs"} {
		if _, err := open().Head(context.Background()); code(err) != "E_REDIRECT" {
			t.Errorf("U-38 a redirect to %s: %v, want E_REDIRECT", to, err)
		}
	}
	remote, err := parseRemote("https://forge.example/site.git")
	if err != nil {
		t.Fatal(err)
	}
	public := &web{remote: remote}
	for _, host := range []string{"127.0.0.1:80", "[::1]:443", "localhost:443", "169.254.169.254:80", "10.0.0.1:443", "192.168.1.1:443", "172.16.0.1:1", "[::ffff:10.0.0.1]:443", "[fd00::1]:443", "[fe80::1%25lo]:443", "0.0.0.0:80", "100.64.0.1:80", "[64:ff9b::a00:1]:443"} {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		conn, err := public.dial(ctx, "tcp", host)
		cancel()
		if err == nil {
			conn.Close()
		}
		if code(err) != "E_REDIRECT" && !strings.Contains(fmt.Sprint(err), "no such host") {
			t.Errorf("U-38 from a public remote to %s: %v, want E_REDIRECT", host, err)
		}
	}
}

func TestPublic(t *testing.T) {
	for address, want := range map[string]bool{"1.1.1.1": true, "2606:4700::1111": true, "127.0.0.1": false, "::ffff:127.0.0.1": false, "10.1.2.3": false, "224.0.0.1": false, "::": false} {
		if got := public(netip.MustParseAddr(address)); got != want {
			t.Errorf("public(%s) is %v, want %v", address, got, want)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	for _, branch := range []string{"", "-x", "../../config", "a..b", "a//b", "a/", "main.lock", "a/.b", "a b", "a\nb", "@{x", strings.Repeat("x", 300)} {
		r := &Repository{Dir: t.TempDir(), Remote: "/x", Branch: branch}
		if err := r.Open(); code(err) != "E_REF_NAME" {
			t.Errorf("T41 U-04 branch %q: %v, want E_REF_NAME", branch, err)
		}
	}
	r := &Repository{Remote: "gopher://x", Name: "a<b"}
	err := r.Open()
	for _, want := range []string{"dir:", "branch", "scheme", "author"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Open: %v; want %q in it, all faults at once", err, want)
		}
	}
}

func TestRemoteSpellings(t *testing.T) {
	for text, want := range map[string]string{
		"/srv/site.git": "/srv/site.git", "file:///srv/site.git": "/srv/site.git", "file://localhost/srv/x": "/srv/x",
		"git@host:site.git": "ssh://host:22site.git", "git@host:/srv/site.git": "ssh://host:22/srv/site.git",
		"ssh://host:2222/srv/site.git": "ssh://host:2222/srv/site.git", "ssh://host/~ada/x": "ssh://host:22~ada/x",
		"https://host/x.git": "https://host:443/x.git", "http://127.0.0.1:8080/x": "http://127.0.0.1:8080/x", "http://[::1]/x": "http://[::1]:80/x",
	} {
		got, err := parseRemote(text)
		if err != nil || got.String() != want {
			t.Errorf("parseRemote(%q) is %q, %v; want %q", text, got, err, want)
		}
	}
}

// Our reading of commits must be go-git's.
func FuzzCommit(f *testing.F) {
	_, _, commit, _ := site("x")
	f.Add(commit)
	f.Add([]byte("tree 4b825dc642cb6eb9a060e54bf8d69288fbee4904\nparent 4b825dc642cb6eb9a060e54bf8d69288fbee4904\nauthor a <b> 1 +0000\ncommitter a <b> 1 +0000\ngpgsig x\n y\n\nz"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		ours, err := agreed(plumbing.ZeroHash, raw)
		if err != nil {
			return
		}
		var o plumbing.MemoryObject
		o.SetType(plumbing.CommitObject)
		o.Write(raw)
		var theirs object.Commit
		if err := theirs.Decode(&o); err != nil || theirs.TreeHash != ours.tree || len(theirs.ParentHashes) != len(ours.parents) {
			t.Errorf("go-git reads it as %v, %v", theirs.TreeHash, err)
		}
	})
}

func FuzzPack(f *testing.F) {
	p, _ := goodPack()
	f.Add(p.done())
	limits := defaultLimits()
	limits.Object, limits.Objects = 1<<16, 100
	f.Fuzz(func(t *testing.T, pack []byte) {
		file, err := os.CreateTemp(t.TempDir(), "")
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		sum := sha1.Sum(pack)
		file.Write(append(pack, sum[:]...))
		if _, err := index(context.Background(), file, limits, func(plumbing.Hash) bool { return false }); err != nil && code(err) == "" {
			t.Errorf("an error that is no refusal: %v", err)
		}
	})
}
