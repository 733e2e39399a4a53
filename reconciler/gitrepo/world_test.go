package gitrepo

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/kindos/kmo/reconciler"
)

// world is a bare repository and somebody with a clone of it, both driven by the git command.
type world struct {
	t    testing.TB
	home string
	bare string
	work string
}

func newWorld(t testing.TB) *world {
	w := &world{t: t, home: t.TempDir()}
	w.bare, w.work = filepath.Join(w.home, "site.git"), filepath.Join(w.home, "work")
	w.run(w.home, "git", "init", "-q", "--bare", "-b", "main", w.bare)
	w.run(w.home, "git", "init", "-q", "-b", "main", w.work)
	w.run(w.work, "git", "remote", "add", "origin", w.bare)
	return w
}

func (w *world) env() []string {
	return []string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + w.home, "GIT_CONFIG_NOSYSTEM=1", "GIT_TERMINAL_PROMPT=0",
		"GIT_AUTHOR_NAME=Ada", "GIT_AUTHOR_EMAIL=ada@example.org", "GIT_AUTHOR_DATE=1700000000 +0000",
		"GIT_COMMITTER_NAME=Ada", "GIT_COMMITTER_EMAIL=ada@example.org", "GIT_COMMITTER_DATE=1700000000 +0000",
	}
}

// try runs a command in dir and returns what it said.
func (w *world) try(dir, stdin string, argv ...string) (string, error) {
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir, cmd.Env, cmd.Stdin = dir, w.env(), strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

func (w *world) run(dir string, argv ...string) string {
	w.t.Helper()
	out, err := w.try(dir, "", argv...)
	if err != nil {
		w.t.Fatalf("%s: %v\n%s", strings.Join(argv, " "), err, out)
	}
	return out
}

// pipe runs git in the bare repository with standard input.
func (w *world) pipe(stdin string, argv ...string) string {
	w.t.Helper()
	out, err := w.try(w.bare, stdin, append([]string{"git"}, argv...)...)
	if err != nil {
		w.t.Fatalf("git %s: %v\n%s", strings.Join(argv, " "), err, out)
	}
	return out
}

func (w *world) write(name, text string) {
	w.t.Helper()
	path := filepath.Join(w.work, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		w.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		w.t.Fatal(err)
	}
}

// commit writes name=text pairs and pushes them; it returns the commit's id.
func (w *world) commit(files ...string) string {
	w.t.Helper()
	for i := 0; i < len(files); i += 2 {
		w.write(files[i], files[i+1])
	}
	w.run(w.work, "git", "add", "-A")
	w.run(w.work, "git", "commit", "-q", "--allow-empty", "-m", "change")
	w.run(w.work, "git", "push", "-q", "origin", "HEAD:main")
	return w.run(w.work, "git", "rev-parse", "HEAD")
}

// open opens a copy of the remote in a new folder.
func (w *world) open(change ...func(*Repository)) *Repository {
	w.t.Helper()
	r := &Repository{Dir: filepath.Join(w.t.TempDir(), "copy"), Remote: w.bare, Branch: "main", Signer: testSigner(w.t, 1), Now: func() time.Time { return time.Unix(1700000100, 0) }}
	for _, f := range change {
		f(r)
	}
	if err := r.Open(); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { r.Close() })
	return r
}

func head(t testing.TB, r *Repository) string {
	t.Helper()
	c, err := r.Head(context.Background())
	if err != nil {
		t.Fatalf("Head: %v", err)
	}
	return c.ID
}

func testKey(seed byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{seed}, ed25519.SeedSize))
}

func testSigner(t testing.TB, seed byte) ssh.Signer {
	s, err := ssh.NewSignerFromKey(testKey(seed))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// contents is every file of a folder by path, for "byte for byte as before".
func contents(t testing.TB, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text, err := os.ReadFile(path)
		all[strings.TrimPrefix(path, dir)] = string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// serveHTTP is git http-backend on loopback, asking for a password.
func (w *world) serveHTTP(user, password string) *httptest.Server {
	w.run(w.bare, "git", "config", "http.receivepack", "true")
	path := w.run(w.home, "git", "--exec-path") + "/git-http-backend"
	backend := &cgi.Handler{Path: path, Env: []string{
		"GIT_PROJECT_ROOT=" + w.home, "GIT_HTTP_EXPORT_ALL=1", "HOME=" + w.home, "GIT_CONFIG_NOSYSTEM=1", "REMOTE_USER=" + user,
	}}
	s := httptest.NewServer(guard{user, password, backend})
	w.t.Cleanup(s.Close)
	return s
}

// serveSSH is a server that runs the two git services for one key. It returns its address and its host key.
func (w *world) serveSSH(client ssh.PublicKey) (address string, host ssh.PublicKey) {
	w.t.Helper()
	return w.servesSSH(client, w.service)
}

func (w *world) service(command string, channel ssh.Channel) error {
	cmd := exec.Command("sh", "-c", command)
	cmd.Dir, cmd.Env = w.home, w.env()
	cmd.Stdout, cmd.Stderr = channel, channel.Stderr()
	in, _ := cmd.StdinPipe()
	go func() { _, _ = io.Copy(in, channel); in.Close() }()
	return cmd.Run()
}

// servesSSH is serveSSH with something else in place of the services.
func (w *world) servesSSH(client ssh.PublicKey, run func(command string, channel ssh.Channel) error) (address string, host ssh.PublicKey) {
	w.t.Helper()
	signer := testSigner(w.t, 7)
	config := &ssh.ServerConfig{PublicKeyCallback: func(_ ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
		if !bytes.Equal(key.Marshal(), client.Marshal()) {
			return nil, fmt.Errorf("another key")
		}
		return nil, nil
	}}
	config.AddHostKey(signer)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	var all sync.WaitGroup
	w.t.Cleanup(func() { l.Close(); all.Wait() })
	all.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() { session(conn, config, run) })
		}
	})
	return l.Addr().String(), signer.PublicKey()
}

func session(conn net.Conn, config *ssh.ServerConfig, run func(command string, channel ssh.Channel) error) {
	defer conn.Close()
	_, channels, requests, err := ssh.NewServerConn(conn, config)
	if err != nil {
		return
	}
	go ssh.DiscardRequests(requests)
	for c := range channels {
		channel, requests, err := c.Accept()
		if err != nil {
			return
		}
		for q := range requests {
			if q.Type != "exec" {
				_ = q.Reply(false, nil)
				continue
			}
			_ = q.Reply(true, nil)
			var command struct{ Text string }
			_ = ssh.Unmarshal(q.Payload, &command)
			status := struct{ N uint32 }{}
			if err := run(command.Text, channel); err != nil {
				status.N = 1
			}
			_, _ = channel.SendRequest("exit-status", false, ssh.Marshal(status))
			channel.Close()
		}
	}
}

// keyFile writes a private key as OpenSSH does.
func keyFile(t testing.TB, seed byte) string {
	block, err := ssh.MarshalPrivateKey(testKey(seed), "canary-comment")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// guard asks for a password.
type guard struct {
	user, password string
	next           http.Handler
}

func (g guard) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	user, password, _ := q.BasicAuth()
	if g.password != "" && (user != g.user || password != g.password) {
		w.Header().Set("WWW-Authenticate", `Basic realm="site"`)
		http.Error(w, "who are you", http.StatusUnauthorized)
		return
	}
	g.next.ServeHTTP(w, q)
}

var _ reconciler.Source = (*Repository)(nil)
