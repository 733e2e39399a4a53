package gitrepo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"

	"github.com/kindos/kmo/reconciler"
)

func (w *world) hook(name, script string) {
	w.t.Helper()
	if err := os.WriteFile(filepath.Join(w.bare, "hooks", name), []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
		w.t.Fatal(err)
	}
}

func plea(good, bad string) reconciler.Revert {
	return reconciler.Revert{Good: good, Head: bad, Unit: "relay", Gate: "http /healthz", Evidence: "status 500", Host: "edge-1"}
}

func TestRevertByEveryRemote(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	good := w.commit("a", "1")
	w.commit("a", "2")
	bad := w.commit("a", "3", "b", "4")
	for name, r := range remotes(w) {
		t.Run(name, func(t *testing.T) {
			head(t, r)
			c, err := r.Revert(ctx, plea(good, bad))
			if err != nil {
				t.Fatal(err)
			}
			if at := w.run(w.bare, "git", "rev-parse", "main"); at != c.ID {
				t.Errorf("the branch is at %s, want %s", at, c.ID)
			}
			if got := head(t, r); got != c.ID {
				t.Errorf("head is %s, want the revert %s", got, c.ID)
			}
			if got, want := c.Tree.ObjectID("."), w.run(w.bare, "git", "rev-parse", good+"^{tree}"); got != want {
				t.Errorf("its tree is %s, want %s", got, want)
			}
			w.verify(c.ID, testSigner(t, 1).PublicKey())
			trailers := w.run(w.bare, "sh", "-c", "git log -1 --format=%B "+c.ID+" | git interpret-trailers --parse")
			want := fmt.Sprintf("Kmo-Reverts: %s..%s\nKmo-Unit: relay\nKmo-Gate: http /healthz\nKmo-Evidence: status 500\nKmo-Host: edge-1", good, bad)
			if trailers != want {
				t.Errorf("trailers:\n%s\nwant:\n%s", trailers, want)
			}
			subject := w.run(w.bare, "git", "log", "-1", "--format=%s", c.ID)
			if want := "Revert to " + good[:12] + ": relay http /healthz"; subject != want {
				t.Errorf("subject %q, want %q", subject, want)
			}
			w.run(w.bare, "git", "fsck", "--strict")
			w.run(w.bare, "git", "update-ref", "refs/heads/main", bad)
		})
	}
}

// verify asks git whether a commit's signature is good.
func (w *world) verify(id string, key ssh.PublicKey) {
	w.t.Helper()
	signers := filepath.Join(w.home, "signers")
	if err := os.WriteFile(signers, append([]byte("host "), ssh.MarshalAuthorizedKey(key)...), 0o600); err != nil {
		w.t.Fatal(err)
	}
	if out, err := w.try(w.bare, "", "git", "-c", "gpg.ssh.allowedSignersFile="+signers, "verify-commit", id); err != nil {
		w.t.Errorf("git verify-commit: %v\n%s", err, out)
	}
}

func TestRevertText(t *testing.T) {
	w := newWorld(t)
	good, bad := w.commit("a", "1"), w.commit("a", "2")
	r := w.open()
	evil := "x\nKmo-Host: evil\r\n\nKmo-Unit: evil\u2028\x1b[31m\x00\ngpgsig evil\xff"
	c, err := r.Revert(context.Background(), reconciler.Revert{Good: good, Head: bad, Unit: evil, Gate: evil, Evidence: strings.Repeat("long ", 1000), Host: ""})
	if err != nil {
		t.Fatal(err)
	}
	w.verify(c.ID, testSigner(t, 1).PublicKey())
	trailers := strings.Split(w.run(w.bare, "sh", "-c", "git log -1 --format=%B "+c.ID+" | git interpret-trailers --parse"), "\n")
	if len(trailers) != 5 || trailers[4] != "Kmo-Host: -" || len(trailers[3]) > 1020 {
		t.Errorf("U-39 trailers:\n%s", strings.Join(trailers, "\n"))
	}
	for _, b := range c.Raw {
		if b < ' ' && b != '\n' {
			t.Errorf("U-39 byte %#x in the commit", b)
		}
	}
}

func TestRevertRefused(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	good, bad := w.commit("a", "1"), w.commit("a", "2")
	other := w.open()
	moved := w.open()
	head(t, moved)
	for _, hook := range []string{"pre-receive", "update"} {
		w.hook(hook, "echo 'protected \033[31mbranch'; exit 1")
		for name, r := range remotes(w) {
			_, err := r.Revert(ctx, plea(good, bad))
			if !errors.Is(err, reconciler.ErrPushRefused) || !strings.Contains(err.Error(), "protected ?[31mbranch") {
				t.Errorf("%s, %s: %v; want ErrPushRefused with the hook's words, and those clean", name, hook, err)
			}
			if at, got := w.run(w.bare, "git", "rev-parse", "main"), head(t, r); at != bad || got != bad {
				t.Errorf("%s: the branch is at %s and the copy at %s, want %s", name, at, got, bad)
			}
		}
		os.Remove(filepath.Join(w.bare, "hooks", hook))
	}
	web := w.serveHTTP("host", "")
	w.run(w.bare, "git", "config", "http.receivepack", "false")
	r := w.open(func(r *Repository) { r.Remote = web.URL + "/site.git" })
	if _, err := r.Revert(ctx, plea(good, bad)); !errors.Is(err, reconciler.ErrPushRefused) {
		t.Errorf("a server that takes no pushes: %v, want ErrPushRefused", err)
	}
	newer := w.commit("a", "3")
	if _, err := moved.Revert(ctx, plea(good, bad)); !errors.Is(err, reconciler.ErrMoved) {
		t.Errorf("a branch that has moved: %v, want ErrMoved", err)
	}
	if at := w.run(w.bare, "git", "rev-parse", "main"); at != newer {
		t.Errorf("the branch is at %s, want %s", at, newer)
	}
	for _, v := range []reconciler.Revert{plea(newer, good), plea(newer, newer), plea(good, "main"), plea("", newer)} {
		if _, err := other.Revert(ctx, v); err == nil {
			t.Errorf("a range that is none, %s..%s: no error", v.Good, v.Head)
		}
	}
}

// Of a long answer the end is told.
func TestRevertRefusedAtLength(t *testing.T) {
	w := newWorld(t)
	good, bad := w.commit("a", "1"), w.commit("a", "2")
	w.hook("pre-receive", "for i in $(seq 200); do echo \"rule $i of the häuse\"; done; echo 'not on a Friday'; exit 1")
	_, err := w.open().Revert(context.Background(), plea(good, bad))
	text := fmt.Sprint(err)
	if !errors.Is(err, reconciler.ErrPushRefused) || !strings.Contains(text, "rule 200 of the häuse not on a Friday") || strings.Contains(text, "rule 9 ") || len(text) > 500 {
		t.Errorf("%d bytes: %v; want ErrPushRefused with the hook's last words", len(text), err)
	}
}

// An ssh server's reasons may come after the answer that shows its no.
func TestRevertDeniedInTheEnd(t *testing.T) {
	w := newWorld(t)
	good, bad := w.commit("a", "1"), w.commit("a", "2")
	var endless atomic.Bool
	address, host := w.servesSSH(testSigner(t, 2).PublicKey(), func(command string, channel ssh.Channel) error {
		if strings.HasPrefix(command, "git-upload-pack") {
			return w.service(command, channel)
		}
		_, _ = io.WriteString(channel, "no such service\n")
		_, _ = io.ReadFull(channel, make([]byte, 4)) // the client has given up
		for _, word := range []string{"you ", "may ", "not ", "push ", "here\n"} {
			_, _ = io.WriteString(channel.Stderr(), word)
		}
		for endless.Load() { // until it is hung up on
			if _, err := io.WriteString(channel.Stderr(), "you may not push here\n"); err != nil {
				break
			}
		}
		return errors.New("denied")
	})
	known := filepath.Join(w.home, "known_hosts")
	if err := os.WriteFile(known, []byte(knownhosts.Line([]string{address}, host)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := w.open(func(r *Repository) {
		r.Remote, r.Auth = "ssh://git@"+address+w.bare, Auth{KeyFile: keyFile(t, 2), KnownHosts: known}
	})
	for _, on := range []bool{false, true} {
		endless.Store(on)
		_, err := r.Revert(context.Background(), plea(good, bad))
		if !errors.Is(err, reconciler.ErrPushRefused) || !strings.Contains(err.Error(), "you may not push here") {
			t.Errorf("%v; want ErrPushRefused with the server's words", err)
		}
	}
}

func TestRevertThatTookEffect(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	good, bad := w.commit("a", "1"), w.commit("a", "2")
	web := w.serveHTTP("host", "")
	real, broken := web.Config.Handler, true
	web.Config.Handler = http.HandlerFunc(func(a http.ResponseWriter, q *http.Request) {
		if broken && q.Method == http.MethodPost && strings.HasSuffix(q.URL.Path, "receive-pack") {
			real.ServeHTTP(httptest.NewRecorder(), q) // it takes effect, the answer never comes
			panic(http.ErrAbortHandler)
		}
		real.ServeHTTP(a, q)
	})
	r := w.open(func(r *Repository) { r.Remote = web.URL + "/site.git" })
	if _, err := r.Revert(ctx, plea(good, bad)); err == nil {
		t.Fatal("no error from a push that was not answered")
	}
	at := w.run(w.bare, "git", "rev-parse", "main")
	if at == bad {
		t.Fatal("the push took no effect")
	}
	broken = false
	c, err := r.Revert(ctx, plea(good, bad))
	if err != nil || c.ID != at {
		t.Errorf("the revert again: %s, %v; want %s", c.ID, err, at)
	}
	w.run(w.work, "git", "pull", "-q", "--ff-only", "origin", "main")
	w.commit("b", "on top")
	if c, err = r.Revert(ctx, plea(good, bad)); err != nil || c.ID != at {
		t.Errorf("the revert below a newer commit: %s, %v; want %s", c.ID, err, at)
	}
	stranger := w.open(func(r *Repository) { r.Signer = testSigner(t, 9) })
	if _, err := stranger.Revert(ctx, plea(good, bad)); !errors.Is(err, reconciler.ErrMoved) {
		t.Errorf("another host's revert: %v, want ErrMoved", err)
	}
}

// TestRevertAmongPushes lets real pushes and reverts race. Whatever was pushed stays on the branch, and no revert lands on
// anything but the head that it names.
func TestRevertAmongPushes(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	good := w.commit("a", "1")
	w.commit("a", "2")
	r := w.open()
	var all sync.WaitGroup
	var mu sync.Mutex
	var pushed []string
	for n := range 3 {
		clone := filepath.Join(w.home, fmt.Sprint("clone", n))
		w.run(w.home, "git", "clone", "-q", w.bare, clone)
		all.Go(func() {
			for i, done := 0, 0; i < 100 && done < 8; i++ {
				_, _ = w.try(clone, "", "git", "fetch", "-q", "origin")
				_, _ = w.try(clone, "", "git", "reset", "-q", "--hard", "origin/main")
				_, _ = w.try(clone, "", "git", "commit", "-q", "--allow-empty", "-m", fmt.Sprintf("%d.%d", n, i))
				id, _ := w.try(clone, "", "git", "rev-parse", "HEAD")
				if _, err := w.try(clone, "", "git", "push", "-q", "origin", "HEAD:main"); err == nil {
					done++
					mu.Lock()
					pushed = append(pushed, id)
					mu.Unlock()
				}
			}
		})
	}
	reverts, moved, last := 0, 0, ""
	stop := make(chan struct{})
	go func() { all.Wait(); close(stop) }()
	for running := true; running; {
		select {
		case <-stop:
			running = false
		default:
		}
		at := head(t, r)
		if at == last {
			continue
		}
		c, err := r.Revert(ctx, plea(good, at))
		switch {
		case err == nil:
			reverts++
			last = c.ID
			mu.Lock()
			pushed = append(pushed, c.ID)
			mu.Unlock()
			if len(c.Parents) != 1 || c.Parents[0] != at {
				t.Errorf("a revert on %v, want %s", c.Parents, at)
			}
		case errors.Is(err, reconciler.ErrMoved):
			moved++
		case errors.Is(err, reconciler.ErrPushRefused):
			t.Errorf("a race taken for a refusal: %v", err)
		}
	}
	history := w.run(w.bare, "git", "rev-list", "main")
	for _, id := range pushed {
		if !strings.Contains(history, id) {
			t.Errorf("commit %s was pushed and is gone", id)
		}
	}
	if reverts == 0 {
		t.Error("no revert got through")
	}
	t.Logf("%d pushes, %d reverts, %d times moved", len(pushed)-reverts, reverts, moved)
}
