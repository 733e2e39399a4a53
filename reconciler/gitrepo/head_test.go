package gitrepo

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"golang.org/x/crypto/ssh/knownhosts"

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
	for _, c := range []struct {
		old, new string
		want     bool
	}{{root, top, true}, {side, top, true}, {top, top, true}, {top, root, false}, {side, left, false}} {
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
	var last string
	for i := range mergeAt + 6 {
		last = w.commit("units/a/unit.yaml", fmt.Sprintf("n: %d\n", i))
		if got := head(t, r); got != last {
			t.Fatalf("head is %s, want %s", got, last)
		}
	}
	packs, _ := filepath.Glob(r.Dir + "/objects/pack/*.pack")
	if len(packs) > 10 {
		t.Errorf("%d packs, want few", len(packs))
	}
	w.run(r.Dir, "git", "fsck", "--strict", "--full")
	if list, err := r.Between(context.Background(), "", last); err != nil || len(list) != mergeAt+6 {
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
			r := w.open(func(r *Repository) { r.Branch, r.Poll = branch, time.Hour })
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
	t.Run("poll", func(t *testing.T) {
		r := w.open(func(r *Repository) { r.Poll = time.Millisecond })
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		for range 3 {
			select {
			case <-r.Watch(ctx):
			case <-time.After(5 * time.Second):
				t.Fatal("no poll")
			}
		}
	})
}
