package gitrepo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp"
	"github.com/skeema/knownhosts"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/kindos/kmo/policy/refusal"
)

// remote is a parsed Remote. It never holds a credential, so it may be shown.
type remote struct {
	scheme string // "" for a folder, else ssh, http or https
	user   string // ssh
	host   string // without port
	port   string
	path   string // of a folder: absolute
	base   *url.URL
}

func (r remote) String() string {
	if r.scheme == "" {
		return r.path
	}
	return r.scheme + "://" + net.JoinHostPort(r.host, r.port) + r.path
}

// parseRemote reads the spellings of the package comment. No error of it repeats the text: it may hold a password.
func parseRemote(text string) (remote, error) {
	if text == "" {
		return remote{}, errors.New("remote: none; want a path or a URL")
	}
	if refusal.Clip(text, 4096) != text {
		return remote{}, errors.New("remote: control characters, or too long; want a path or a URL")
	}
	if !strings.Contains(text, "://") {
		if host, path, ok := strings.Cut(text, ":"); ok && !strings.Contains(host, "/") && host != "" {
			text = "ssh://" + host + "/" + strings.TrimPrefix(path, "/")
			if strings.HasPrefix(path, "/") || strings.HasPrefix(path, "~") {
				return parseURL(text, "")
			}
			return parseURL(text, path) // relative to the login's home
		}
		path, err := filepath.Abs(text)
		return remote{path: path}, err
	}
	return parseURL(text, "")
}

// parseURL reads a URL; path replaces its path if it is set.
func parseURL(text, path string) (remote, error) {
	u, err := url.Parse(text)
	if err != nil {
		return remote{}, errors.New("remote: not a URL; want ssh://, https:// or a path")
	}
	r := remote{scheme: u.Scheme, host: u.Hostname(), port: u.Port(), path: u.Path}
	if _, password := u.User.Password(); password || u.User != nil && u.Scheme != "ssh" {
		return remote{}, errors.New("remote: credentials in the URL; want them in a file or a variable")
	}
	if u.RawQuery != "" || u.Fragment != "" {
		return remote{}, errors.New("remote: a query or a fragment; want the repository's address alone")
	}
	switch u.Scheme {
	case "file":
		if (r.host != "" && r.host != "localhost") || !filepath.IsAbs(u.Path) {
			return remote{}, errors.New("remote: want file:///an/absolute/path")
		}
		return remote{path: filepath.Clean(u.Path)}, nil
	case "ssh":
		if r.user = u.User.Username(); r.user == "" {
			r.user = "git"
		}
		if strings.HasPrefix(r.path, "/~") {
			r.path = r.path[1:]
		}
		if path != "" {
			r.path = path
		}
		if strings.HasPrefix(r.path, "-") {
			return remote{}, errors.New("remote: its path begins with a dash")
		}
		r.port = cmpOr(r.port, "22")
	case "https":
		r.port = cmpOr(r.port, "443")
	case "http":
		if ip, err := netip.ParseAddr(r.host); r.host != "localhost" && (err != nil || !ip.IsLoopback()) {
			return remote{}, errors.New("remote: http to another machine; want https")
		}
		r.port = cmpOr(r.port, "80")
	default:
		return remote{}, fmt.Errorf("remote: scheme %q; want ssh, https, file, or a path", refusal.Clip(u.Scheme, 20))
	}
	if r.host == "" || r.path == "" {
		return remote{}, errors.New("remote: no host or no path")
	}
	r.base = &url.URL{Scheme: u.Scheme, Host: u.Host, Path: strings.TrimSuffix(u.Path, "/")}
	return r, nil
}

func cmpOr(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// branchName is the allow-list for a branch; checkBranch adds what a pattern cannot say.
var branchName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._/-]{0,199}$`)

func checkBranch(name string) error {
	if !branchName.MatchString(name) || checkRef("refs/heads/"+name) != nil {
		return refuse("E_REF_NAME", "branch "+show(name), "", "letters, digits, . _ - and single slashes, beginning with a letter or digit")
	}
	return nil
}

// checkRef refuses a reference name that git itself would not make: what a sound server cannot send.
func checkRef(name string) error {
	bad := len(name) > 1024 || !strings.HasPrefix(name, "refs/") && name != "HEAD" || strings.HasSuffix(name, "/") ||
		strings.Contains(name, "..") || strings.Contains(name, "@{") || strings.ContainsAny(name, " ~^:?*[\\\x7f") ||
		strings.ContainsFunc(name, func(r rune) bool { return r < ' ' })
	for part := range strings.SplitSeq(name, "/") {
		bad = bad || part == "" || part[0] == '.' || part[0] == '-' || strings.HasSuffix(part, ".") || strings.HasSuffix(part, ".lock")
	}
	if bad {
		return refuse("E_REF_NAME", "a reference of the remote", show(name), "names that git would make")
	}
	return nil
}

// repositoryDir is where a local remote keeps its references and objects.
func (r remote) repositoryDir() string {
	if stat, err := os.Stat(filepath.Join(r.path, ".git")); err == nil && stat.IsDir() {
		return filepath.Join(r.path, ".git")
	}
	return r.path
}

// lookLocal reads a branch of a local remote: its file, then packed-refs, then its file again for the case that it was packed between.
func lookLocal(dir, branch string, l Limits) (plumbing.Hash, error) {
	name := "refs/heads/" + branch
	for range 5 { // symbolic references
		h, next, err := readRef(dir, name, l)
		if err != nil || next == "" {
			return h, err
		}
		name = next
	}
	return plumbing.ZeroHash, errors.New("looking at the branch: too many symbolic references")
}

func readRef(dir, name string, l Limits) (h plumbing.Hash, next string, err error) {
	for range 2 {
		text, err := readRegular(filepath.Join(dir, filepath.FromSlash(name)), 1024)
		if err == nil {
			return parseRef(strings.TrimSpace(string(text)))
		}
		if !errors.Is(err, os.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR) {
			return h, "", fmt.Errorf("looking at the branch: %v", err)
		}
		packed, err := readRegular(filepath.Join(dir, "packed-refs"), int64(l.Refs)*1100+4096)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return h, "", err
		}
		n := 0
		for line := range strings.Lines(string(packed)) {
			if n++; n > 2*l.Refs+16 {
				return h, "", tooLarge("packed-refs of the remote", int64(n), int64(l.Refs), "references")
			}
			if id, ref, ok := strings.Cut(strings.TrimRight(line, "\r\n"), " "); ok && ref == name {
				return parseRef(id)
			}
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "reftable")); err == nil {
		return h, "", errors.New("looking at the branch: the remote keeps references in a reftable; want the files format, or ssh")
	}
	return h, "", fmt.Errorf("looking at the branch: the remote has no %s", name)
}

// parseRef never repeats what it read: the file may be anything.
func parseRef(text string) (plumbing.Hash, string, error) {
	if next, ok := strings.CutPrefix(text, "ref: "); ok {
		return plumbing.ZeroHash, next, checkRef(next)
	}
	h := plumbing.NewHash(text)
	if h.IsZero() || h.String() != text {
		return h, "", refuse("E_REF_NAME", "the branch at the remote", "a reference that is no commit id", "40 hex digits")
	}
	return h, "", nil
}

// talk is one conversation with a git service.
type talk struct {
	refs  *packp.AdvRefs
	ask   func(request []byte) (io.Reader, error) // once
	close func()
}

// dial begins a conversation and reads the list of references, bounded.
func (r *Repository) dial(ctx context.Context, service string) (*talk, error) {
	switch r.remote.scheme {
	case "ssh":
		return r.dialSSH(ctx, service)
	case "http", "https":
		return r.dialHTTP(ctx, service)
	}
	return r.dialProcess(ctx, service)
}

// greet reads and judges the list of references.
func (r *Repository) greet(in io.Reader) (*packp.AdvRefs, error) {
	refs := packp.NewAdvRefs()
	limit := int64(r.Limits.Refs)*1100 + 64<<10
	bounded := &io.LimitedReader{R: in, N: limit}
	err := refs.Decode(bounded)
	if bounded.N <= 0 || len(refs.References) > r.Limits.Refs {
		return nil, refuse("E_LIMIT", "the remote's list of references", fmt.Sprintf("more than %d", r.Limits.Refs), fmt.Sprintf("at most %d", r.Limits.Refs))
	}
	if err != nil && !errors.Is(err, packp.ErrEmptyAdvRefs) {
		return nil, fmt.Errorf("reading the list of references: %s", refusal.Clip(err.Error(), 300))
	}
	for name := range refs.References {
		if err := checkRef(name); err != nil {
			return nil, err
		}
	}
	return refs, nil
}

// dialProcess runs git on a local remote, as git push does, so that its hooks and settings hold.
func (r *Repository) dialProcess(ctx context.Context, service string) (*talk, error) {
	cmd := exec.CommandContext(ctx, "git", strings.TrimPrefix(service, "git-"), r.remote.path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 2 * time.Second
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "GIT_") {
			cmd.Env = append(cmd.Env, v)
		}
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	said := &tail{}
	cmd.Stderr = said
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("running git, which a push to a local repository needs: %v", err)
	}
	closeAll := func() { _, _ = in.Write([]byte("0000")); in.Close(); _ = cmd.Wait() }
	return r.converse(in, out, said, closeAll)
}

// converse is a conversation over two pipes.
func (r *Repository) converse(in io.WriteCloser, out io.Reader, said *tail, closeAll func()) (*talk, error) {
	refs, err := r.greet(out)
	if err != nil {
		closeAll()
		if text := said.String(); text != "" && refusal.Of(err) == nil {
			err = &deniedError{text}
		}
		return nil, err
	}
	ask := func(request []byte) (io.Reader, error) {
		if _, err := in.Write(request); err != nil {
			return nil, fmt.Errorf("sending: %v", err)
		}
		return out, in.Close()
	}
	return &talk{refs, ask, closeAll}, nil
}

// deniedError says that the service itself said no before it began.
type deniedError struct{ text string }

func (e *deniedError) Error() string { return "the remote says: " + e.text }

// dialSSH connects with a known host key and a key file or the agent, and runs the service.
func (r *Repository) dialSSH(ctx context.Context, service string) (*talk, error) {
	config, done, err := r.sshConfig()
	if err != nil {
		return nil, err
	}
	defer done()
	address := net.JoinHostPort(r.remote.host, r.remote.port)
	dialer := net.Dialer{Timeout: 15 * time.Second}
	conn, err := dialer.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("connecting: %v", err)
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	sconn, channels, requests, err := ssh.NewClientConn(conn, address, config)
	if err != nil {
		stop()
		conn.Close()
		return nil, fmt.Errorf("greeting %s: %s", address, refusal.Clip(err.Error(), 300))
	}
	_ = conn.SetDeadline(time.Time{})
	client := ssh.NewClient(sconn, channels, requests)
	closeAll := func() { stop(); client.Close() }
	session, err := client.NewSession()
	if err != nil {
		closeAll()
		return nil, fmt.Errorf("opening a session: %s", refusal.Clip(err.Error(), 300))
	}
	in, err1 := session.StdinPipe()
	out, err2 := session.StdoutPipe()
	said := &tail{}
	session.Stderr = said
	quoted := "'" + strings.NewReplacer("'", `'\''`, "!", `'\!'`).Replace(r.remote.path) + "'"
	if err := errors.Join(err1, err2, session.Start(service+" "+quoted)); err != nil {
		closeAll()
		return nil, fmt.Errorf("starting %s: %s", service, refusal.Clip(err.Error(), 300))
	}
	return r.converse(in, out, said, func() { _, _ = in.Write([]byte("0000")); closeAll() })
}

func (r *Repository) sshConfig() (*ssh.ClientConfig, func(), error) {
	hosts, err := knownhosts.NewDB(r.Auth.KnownHosts)
	if err != nil {
		return nil, nil, fmt.Errorf("reading known_hosts: %v", err)
	}
	config := &ssh.ClientConfig{
		User: r.remote.user, HostKeyCallback: hosts.HostKeyCallback(),
		HostKeyAlgorithms: hosts.HostKeyAlgorithms(net.JoinHostPort(r.remote.host, r.remote.port)),
	}
	if r.Auth.KeyFile != "" {
		text, err := os.ReadFile(r.Auth.KeyFile)
		if err != nil {
			return nil, nil, fmt.Errorf("reading the ssh key: %v", err)
		}
		signer, err := ssh.ParsePrivateKey(text)
		if err != nil {
			return nil, nil, fmt.Errorf("ssh key %s: not a private key without a passphrase", r.Auth.KeyFile)
		}
		config.Auth = []ssh.AuthMethod{ssh.PublicKeys(signer)}
		return config, func() {}, nil
	}
	socket, err := net.DialTimeout("unix", os.Getenv("SSH_AUTH_SOCK"), 5*time.Second)
	if err != nil {
		return nil, nil, fmt.Errorf("asking the ssh agent, as there is no key file: %v", err)
	}
	config.Auth = []ssh.AuthMethod{ssh.PublicKeysCallback(agent.NewClient(socket).Signers)}
	return config, func() { socket.Close() }, nil
}

// tail keeps the first kilobyte that a process says to its standard error.
type tail struct{ b bytes.Buffer }

func (t *tail) Write(p []byte) (int, error) {
	t.b.Write(p[:min(len(p), 1024-min(1024, t.b.Len()))])
	return len(p), nil
}

func (t *tail) String() string {
	return refusal.Clip(strings.Join(strings.Fields(t.b.String()), " "), 300)
}
