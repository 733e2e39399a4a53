package gitrepo

import (
	"bytes"
	"context"
	"encoding/pem"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/fstest"
	"time"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/format/idxfile"
	"golang.org/x/crypto/ssh/agent"
	"golang.org/x/crypto/ssh/knownhosts"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/policy/trust"

	"github.com/google/go-cmp/cmp"
)

// remotes opens one copy for each way to reach the same repository.
func remotes(w *world) map[string]*Repository {
	web := w.serveHTTP("host", "canary-password")
	secret := filepath.Join(w.home, "secret")
	if err := os.WriteFile(secret, []byte("canary-password\n"), 0o600); err != nil {
		w.t.Fatal(err)
	}
	address, hostKey := w.serveSSH(testSigner(w.t, 2).PublicKey())
	known := filepath.Join(w.home, "known_hosts")
	if err := os.WriteFile(known, []byte(knownhosts.Line([]string{address}, hostKey)+"\n"), 0o600); err != nil {
		w.t.Fatal(err)
	}
	sshAuth := Auth{KeyFile: keyFile(w.t, 2), KnownHosts: known}
	return map[string]*Repository{
		"path": w.open(),
		"file": w.open(func(r *Repository) { r.Remote = "file://" + w.bare }),
		"http": w.open(func(r *Repository) {
			r.Remote, r.Auth = web.URL+"/site.git", Auth{User: "host", PasswordFile: secret}
		}),
		"ssh": w.open(func(r *Repository) { r.Remote, r.Auth = "ssh://git@"+address+w.bare, sshAuth }),
	}
}

func TestHeadByEveryRemote(t *testing.T) {
	w := newWorld(t)
	first := w.commit("site.yaml", "site: north-sea\n", "units/relay/unit.yaml", "unit: relay\n")
	all := remotes(w)
	check := func(want, text string) {
		t.Helper()
		for name, r := range all {
			c, err := r.Head(context.Background())
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if c.ID != want {
				t.Errorf("%s: head is %s, want %s", name, c.ID, want)
			}
			got, err := fs.ReadFile(c.Tree, "units/relay/unit.yaml")
			if err != nil || string(got) != text {
				t.Errorf("%s: unit.yaml is %q, %v; want %q", name, got, err, text)
			}
			if raw := w.run(w.work, "git", "cat-file", "commit", want); raw != strings.TrimSpace(string(c.Raw)) {
				t.Errorf("%s: raw commit differs:\n%s", name, cmp.Diff(raw, string(c.Raw)))
			}
			if out, err := w.try(r.Dir, "", "git", "fsck", "--strict", "--full"); err != nil {
				t.Errorf("%s: git fsck of the copy: %v\n%s", name, err, out)
			}
		}
	}
	check(first, "unit: relay\n")
	check(first, "unit: relay\n")
	second := w.commit("units/relay/unit.yaml", "unit: relay\ntier: 2\n")
	check(second, "unit: relay\ntier: 2\n")
	w.run(w.bare, "git", "gc", "-q", "--prune=now")
	check(second, "unit: relay\ntier: 2\n")
	third := w.commit("units/relay/unit.yaml", "unit: relay\ntier: 3\n", "units/other/unit.yaml", "unit: other\n")
	check(third, "unit: relay\ntier: 3\n")
	w.run(w.work, "git", "reset", "-q", "--hard", first)
	w.run(w.work, "git", "push", "-q", "-f", "origin", "HEAD:main")
	check(first, "unit: relay\n")
	for name, r := range all {
		if c, err := r.At(context.Background(), third); err != nil || c.ID != third {
			t.Errorf("%s: At(the commit that was pushed away): %v", name, err)
		}
	}
}

func TestTree(t *testing.T) {
	w := newWorld(t)
	w.write("run.sh", "#!/bin/sh\n")
	if err := os.Chmod(filepath.Join(w.work, "run.sh"), 0o755); err != nil {
		t.Fatal(err)
	}
	w.commit("a/b/c.txt", "c", "a.txt", "a", "a/x", "x", "z", "lfs: version https://git-lfs.github.com/spec/v1\n")
	r := w.open()
	c, err := r.Head(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if err := fstest.TestFS(c.Tree, "a/b/c.txt", "a.txt", "a/x", "z", "run.sh"); err != nil {
		t.Error(err)
	}
	for _, path := range []string{".", "a", "a/b/c.txt", "run.sh"} {
		want := w.run(w.work, "git", "rev-parse", "HEAD:"+strings.TrimPrefix(path, "."))
		if got := c.Tree.ObjectID(path); got != want {
			t.Errorf("ObjectID(%q) is %s, want %s", path, got, want)
		}
	}
	for _, path := range []string{"nothing", "a.txt/below", "../x", "/a.txt", ""} {
		if got := c.Tree.ObjectID(path); got != "" {
			t.Errorf("ObjectID(%q) is %s, want none", path, got)
		}
	}
	if s, err := fs.Stat(c.Tree, "run.sh"); err != nil || s.Mode() != 0o555 {
		t.Errorf("run.sh: %v, %v; want an executable", s.Mode(), err)
	}
	if when := c.When.Unix(); when != 1700000000 {
		t.Errorf("When is %d, want 1700000000", when)
	}
}

func TestHistory(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	root := w.commit("a", "1")
	left := w.commit("a", "2")
	w.run(w.work, "git", "checkout", "-q", "-b", "side", root)
	w.write("b", "1")
	w.run(w.work, "git", "add", "-A")
	w.run(w.work, "git", "commit", "-q", "-m", "side")
	side := w.run(w.work, "git", "rev-parse", "HEAD")
	w.run(w.work, "git", "checkout", "-q", "main")
	w.run(w.work, "git", "merge", "-q", "--no-ff", "-m", "merge", "side")
	top := w.commit("a", "3")
	r := w.open()
	head(t, r)
	nobodys := strings.Repeat("5", 40)
	for _, c := range []struct {
		old, new string
		want     bool
	}{{root, top, true}, {side, top, true}, {top, top, true}, {top, root, false}, {side, left, false}, {nobodys, top, false}} {
		if got, err := r.Ancestor(ctx, c.old, c.new); err != nil || got != c.want {
			t.Errorf("Ancestor(%s, %s) is %v, %v; want %v", short(c.old), short(c.new), got, err, c.want)
		}
	}
	for _, c := range [][2]string{{root, top}, {left, top}, {side, top}, {top, top}, {"", top}, {top, root}, {side, left}} {
		args := []string{"git", "rev-list", "--topo-order", c[1]}
		if c[0] != "" {
			args = append(args, "^"+c[0])
		}
		want := map[string]bool{}
		for _, id := range strings.Fields(w.run(w.work, args...)) {
			want[id] = true
		}
		list, err := r.Between(ctx, c[0], c[1])
		if err != nil {
			t.Fatal(err)
		}
		got, seen := map[string]bool{}, map[string]bool{}
		for _, commit := range list {
			got[commit.ID] = true
			for _, p := range commit.Parents {
				if seen[p] {
					t.Errorf("Between: parent %s comes before %s", p, commit.ID)
				}
			}
			seen[commit.ID] = true
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("Between(%q, %q) differs from git rev-list:\n%s", c[0], c[1], diff)
		}
	}
	if ok, err := r.Ancestor(ctx, top, nobodys); ok || err == nil {
		t.Errorf("Ancestor(top, a commit that nobody has) is %v, without an error", ok)
	}
	if _, err := r.At(ctx, strings.Repeat("0", 39)+"1"); err == nil {
		t.Error("At(a commit that nobody has): no error")
	}
	small := w.open(func(r *Repository) { r.Limits.Commits = 2 })
	head(t, small)
	if _, err := small.Between(ctx, "", top); code(err) != "E_LIMIT" {
		t.Errorf("Between above the limit: %v, want E_LIMIT", err)
	}
}

// P-22 is PEERS.md's ask 22: recover from force pushes, corrupt clones, missing commits.
func TestDamagedCopy(t *testing.T) {
	ctx := context.Background()
	for name, harm := range map[string]func(t *testing.T, dir, pack string){
		"ask 22 a flipped bit in a pack": func(t *testing.T, _, pack string) {
			b, err := os.ReadFile(pack)
			if err != nil {
				t.Fatal(err)
			}
			for i := 12; i < len(b)-20; i += 7 {
				b[i] ^= 1
			}
			os.Chmod(pack, 0o600)
			if err := os.WriteFile(pack, b, 0o600); err != nil {
				t.Fatal(err)
			}
		},
		"ask 22 an index cut short": func(t *testing.T, _, pack string) {
			path := strings.TrimSuffix(pack, ".pack") + ".idx"
			os.Chmod(path, 0o600)
			if err := os.Truncate(path, 100); err != nil {
				t.Fatal(err)
			}
		},
		"ask 22 a lost pack":     func(t *testing.T, _, pack string) { os.Remove(pack) },
		"ask 22 a lost index":    func(t *testing.T, _, pack string) { os.Remove(strings.TrimSuffix(pack, ".pack") + ".idx") },
		"ask 22 a broken branch": func(t *testing.T, dir, _ string) { os.WriteFile(dir+"/refs/heads/main", []byte("x"), 0o600) },
		"ask 22 an empty branch": func(t *testing.T, dir, _ string) { os.WriteFile(dir+"/refs/heads/main", nil, 0o600) },
		"ask 22 a killed fetch": func(t *testing.T, dir, _ string) {
			os.MkdirAll(dir+"/quarantine-1", 0o700)
			os.WriteFile(dir+"/quarantine-1/new.pack", []byte("PACK"), 0o600)
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			want := w.commit("a", strings.Repeat("text ", 100), "b/c", "2")
			r := w.open()
			head(t, r)
			r.Close()
			packs, _ := filepath.Glob(r.Dir + "/objects/pack/*.pack")
			if len(packs) != 1 {
				t.Fatalf("%d packs, want 1", len(packs))
			}
			harm(t, r.Dir, packs[0])
			again := &Repository{Dir: r.Dir, Remote: w.bare, Branch: "main"}
			if err := again.Open(); err != nil {
				t.Fatalf("Open: %v", err)
			}
			defer again.Close()
			c, err := again.Head(ctx)
			if err != nil {
				c, err = again.Head(ctx) // the damage may be found by this very look
			}
			if err != nil || c.ID != want {
				t.Fatalf("Head: %s, %v; want %s", c.ID, err, want)
			}
			if _, err := fs.ReadFile(c.Tree, "b/c"); err != nil {
				if c, err = again.Head(ctx); err != nil {
					t.Fatal(err)
				}
				if _, err = fs.ReadFile(c.Tree, "b/c"); err != nil {
					t.Fatal(err)
				}
			}
			if out, err := w.try(r.Dir, "", "git", "fsck", "--strict", "--full"); err != nil {
				t.Errorf("git fsck: %v\n%s", err, out)
			}
			if left, _ := filepath.Glob(r.Dir + "/quarantine-*"); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

func TestMerge(t *testing.T) {
	w := newWorld(t)
	r := w.open()
	var stream strings.Builder
	for i := range mergeAt + 6 {
		fmt.Fprintf(&stream, "commit refs/heads/later\ncommitter A <a@b> %d +0000\ndata 2\nx\nM 100644 inline units/a/unit.yaml\ndata 4\n%04d\n", 1700000000+i, i)
	}
	w.pipe(stream.String(), "fast-import", "--quiet")
	ids := strings.Fields(w.pipe("", "rev-list", "--reverse", "later"))
	for _, id := range ids {
		if err := os.WriteFile(filepath.Join(w.bare, "refs/heads/main"), []byte(id+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := head(t, r); got != id {
			t.Fatalf("head is %s, want %s", got, id)
		}
	}
	packs, _ := filepath.Glob(r.Dir + "/objects/pack/*.pack")
	if len(packs) > 10 {
		t.Errorf("%d packs, want few", len(packs))
	}
	w.run(r.Dir, "git", "fsck", "--strict", "--full")
	if list, err := r.Between(context.Background(), "", ids[len(ids)-1]); err != nil || len(list) != mergeAt+6 {
		t.Errorf("%d commits, %v; want %d", len(list), err, mergeAt+6)
	}
}

func TestWatch(t *testing.T) {
	w := newWorld(t)
	w.commit("a", "1")
	next := func(t *testing.T, notices <-chan struct{}, r *Repository, want string) time.Duration {
		t.Helper()
		start := time.Now()
		deadline := time.After(5 * time.Second)
		for {
			if head(t, r) == want {
				return time.Since(start)
			}
			select {
			case <-notices:
			case <-deadline:
				t.Fatalf("no notice of %s", want)
			}
		}
	}
	for _, branch := range []string{"main", "deploy/north/sea"} {
		t.Run(branch, func(t *testing.T) {
			push := func(text string) string {
				id := w.commit("a", text)
				w.run(w.work, "git", "push", "-q", "origin", "HEAD:"+branch)
				return id
			}
			push("0" + branch)
			r := w.open(func(r *Repository) { r.Branch = branch })
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			notices := r.Watch(ctx)
			head(t, r)
			next(t, notices, r, push("1"+branch))
			w.run(w.bare, "git", "pack-refs", "--all", "--prune") // the branch's folders go, and come again
			next(t, notices, r, push("2"+branch))
			next(t, notices, r, push("3"+branch))
		})
	}
}

// A host that cannot be told of pushes says so, once.
func TestWatchCannot(t *testing.T) {
	w := newWorld(t)
	w.commit("a", "1")
	var said bytes.Buffer
	r := w.open(func(r *Repository) { r.Logger = slog.New(slog.NewTextHandler(&said, nil)) })
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		t.Fatal(err)
	}
	none := files
	none.Cur = 3 // standard input, output and error
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &none); err != nil {
		t.Fatal(err)
	}
	notices := r.Watch(t.Context())
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		t.Fatal(err)
	}
	if got := said.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "cannot be watched") || !strings.Contains(got, "too many open files") {
		t.Errorf("said %q; want one line with the reason", got)
	}
	if len(notices) > 0 {
		t.Error("a notice of nothing")
	}
}

// What a carrier may do to history is for trust to refuse; the carrier's part is to say it as it is and to lose nothing.
func TestRewrittenHistory(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	root := w.commit("a", "1")
	accepted := w.commit("a", "2")
	for name, r := range remotes(w) {
		head(t, r)
		w.run(w.bare, "git", "update-ref", "refs/heads/main", root)
		t.Run("T29 U-26 an older commit/"+name, func(t *testing.T) {
			if got := head(t, r); got != root {
				t.Errorf("head is %s, want %s", got, root)
			}
			if ok, err := r.Ancestor(ctx, accepted, root); ok || err != nil {
				t.Errorf("Ancestor(accepted, older) is %v, %v; want false", ok, err)
			}
		})
		fork := w.commitOf(w.treeOf("100644", "a", w.object("blob", name)))
		w.run(w.bare, "git", "update-ref", "refs/heads/main", fork)
		t.Run("T30 T34 another history/"+name, func(t *testing.T) {
			if got := head(t, r); got != fork {
				t.Errorf("head is %s, want %s", got, fork)
			}
			if ok, err := r.Ancestor(ctx, accepted, fork); ok || err != nil {
				t.Errorf("Ancestor(accepted, fork) is %v, %v; want false", ok, err)
			}
			c, err := r.At(ctx, accepted)
			if err != nil {
				t.Fatal(err)
			}
			if text, err := fs.ReadFile(c.Tree, "a"); err != nil || string(text) != "2" {
				t.Errorf("the accepted commit's file is %q, %v", text, err)
			}
		})
		w.run(w.bare, "git", "update-ref", "refs/heads/main", accepted)
	}
}

// A store whose index says that some bytes are another object does not hand them out.
func TestForeignBytes(t *testing.T) {
	p, _ := goodPack()
	dir := t.TempDir()
	if err := os.MkdirAll(dir+"/pack", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/pack/pack-1.pack", p.done(), 0o600); err != nil {
		t.Fatal(err)
	}
	want := plumbing.ComputeHash(plumbing.BlobObject, []byte("what was promised"))
	var w idxfile.Writer
	w.OnHeader(1)
	w.Add(want, uint64(p.offsets[2]), 0)
	w.OnFooter(plumbing.ZeroHash)
	idx, err := w.Index()
	if err != nil {
		t.Fatal(err)
	}
	lying, err := newPack(dir+"/pack/pack-1", idx, defaultLimits())
	if err != nil {
		t.Fatal(err)
	}
	s := &store{limits: defaultLimits(), packs: []*pack{lying}}
	defer s.close()
	if _, content, err := s.read(want); code(err) != "E_PACK" || content != nil {
		t.Errorf("T40 %q, %v; want E_PACK", content, err)
	}
	above := &store{limits: defaultLimits(), base: s}
	if !above.has(want) {
		t.Error("T40 what is held below is not asked first")
	}
}

func TestHTTPSAndAgent(t *testing.T) {
	w := newWorld(t)
	want := w.commit("a", "1")
	plain := w.serveHTTP("host", "token")
	safe := httptest.NewTLSServer(plain.Config.Handler)
	defer safe.Close()
	authority := filepath.Join(w.home, "ca.pem")
	if err := os.WriteFile(authority, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: safe.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("KMO_TEST_TOKEN", "token")
	auth := Auth{User: "host", PasswordEnv: "KMO_TEST_TOKEN"}
	if _, err := w.open(func(r *Repository) { r.Remote, r.Auth = safe.URL+"/site.git", auth }).Head(context.Background()); err == nil {
		t.Error("a certificate of nobody we know: no error")
	}
	auth.CAFile = authority
	if got := head(t, w.open(func(r *Repository) { r.Remote, r.Auth = safe.URL+"/site.git", auth })); got != want {
		t.Errorf("by https: head is %s, want %s", got, want)
	}
	keys := agent.NewKeyring()
	if err := keys.Add(agent.AddedKey{PrivateKey: testKey(4)}); err != nil {
		t.Fatal(err)
	}
	socket, err := net.Listen("unix", filepath.Join(t.TempDir(), "agent"))
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	go func() {
		for {
			conn, err := socket.Accept()
			if err != nil {
				return
			}
			go func() { _ = agent.ServeAgent(keys, conn); conn.Close() }()
		}
	}()
	t.Setenv("SSH_AUTH_SOCK", socket.Addr().String())
	address, hostKey := w.serveSSH(testSigner(t, 4).PublicKey())
	known := filepath.Join(w.home, "known")
	if err := os.WriteFile(known, []byte(knownhosts.Line([]string{address}, hostKey)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := w.open(func(r *Repository) { r.Remote, r.Auth = "ssh://git@"+address+w.bare, Auth{KnownHosts: known} })
	if got := head(t, r); got != want {
		t.Errorf("by the agent: head is %s, want %s", got, want)
	}
	if err := os.WriteFile(known, []byte(knownhosts.Line([]string{address}, testSigner(t, 9).PublicKey())+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Head(context.Background()); err == nil || !strings.Contains(err.Error(), "knownhosts") {
		t.Errorf("a server with another key: %v, want it named", err)
	}
}

// Readers go on while the copy fetches and merges.
func TestReadersAmongFetches(t *testing.T) {
	w := newWorld(t)
	first := w.commit("a/b", "0")
	r := w.open()
	head(t, r)
	stop := make(chan struct{})
	var all sync.WaitGroup
	for range 3 {
		all.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				c, err := r.At(context.Background(), first)
				if err == nil {
					_, err = fs.ReadFile(c.Tree, "a/b")
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for i := range 10 {
		want := w.commit("a/b", fmt.Sprint(i))
		if got := head(t, r); got != want {
			t.Errorf("head is %s, want %s", got, want)
		}
	}
	if err := r.locked(func() error { return r.merge(context.Background()) }); err != nil {
		t.Error(err)
	}
	close(stop)
	all.Wait()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if n := cap(r.Watch(ctx)); n != 1 {
		t.Errorf("T77 %d notices are kept, want 1", n)
	}
}

// Every kind of remote brings the head statement as it is now, and no other object in its place.
func TestStatementByEveryRemote(t *testing.T) {
	w := newWorld(t)
	w.commit("a", "1")
	keep := func(text string) {
		blob := w.pipe(text, "hash-object", "-w", "--stdin")
		w.run(w.bare, "git", "update-ref", trust.HeadRef, blob)
	}
	for name, r := range remotes(w) {
		t.Run(name, func(t *testing.T) {
			want := func(text, code string) {
				t.Helper()
				c, err := r.Head(t.Context())
				got := ""
				if one := refusal.Of(err); one != nil {
					got = string(one.Code)
				} else if err != nil {
					t.Fatal(err)
				}
				if string(c.Stated) != text || got != code {
					t.Errorf("got %.40q, %v; want %q, %q", c.Stated, err, text, code)
				}
			}
			want("", "")
			keep("one")
			want("one", "")
			keep("two")
			want("two", "")
			if c, err := r.At(t.Context(), head(t, r)); err != nil || string(c.Stated) != "two" {
				t.Errorf("At: %q, %v", c.Stated, err)
			}
			keep(strings.Repeat("x", maxStatement+1))
			want("", "E_LIMIT")
			w.run(w.bare, "git", "update-ref", trust.HeadRef, w.pipe("", "hash-object", "-w", "-t", "tree", "--stdin"))
			want("", "E_CHAIN")
			w.run(w.bare, "git", "update-ref", "-d", trust.HeadRef)
			want("", "")
		})
	}
}
