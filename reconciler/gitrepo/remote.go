package gitrepo

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

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
		r.port = cmp.Or(r.port, "22")
	case "https":
		r.port = cmp.Or(r.port, "443")
	case "http":
		if ip, err := netip.ParseAddr(r.host); r.host != "localhost" && (err != nil || !ip.IsLoopback()) {
			return remote{}, errors.New("remote: http to another machine; want https")
		}
		r.port = cmp.Or(r.port, "80")
	default:
		return remote{}, fmt.Errorf("remote: scheme %q; want ssh, https, file, or a path", refusal.Clip(u.Scheme, 20))
	}
	if r.host == "" || r.path == "" {
		return remote{}, errors.New("remote: no host or no path")
	}
	r.base = &url.URL{Scheme: u.Scheme, Host: u.Host, Path: strings.TrimSuffix(u.Path, "/")}
	return r, nil
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
	cmd.WaitDelay = lastWords
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
	stop := context.AfterFunc(ctx, func() { in.Close(); out.Close() }) // what has left the group may hold the other ends for ever
	closeAll := func() {
		defer stop()
		_, _ = in.Write([]byte("0000"))
		in.Close()
		_, _ = io.Copy(io.Discard, io.LimitReader(out, 1<<20)) // a hook may still speak, until ctx ends; one that goes on is hung up on
		out.Close()
		_ = cmd.Wait()
	}
	return r.converse(in, out, said, closeAll)
}

// lastWords is how long a service that has been told to end may take before it is hung up on.
const lastWords = 2 * time.Second

// converse is a conversation over two pipes. When closeAll returns said has what was said in time.
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
	closeAll := func() { stop(); _ = client.Close() }
	channel, requests, err := client.OpenChannel("session", nil)
	if err != nil {
		closeAll()
		return nil, fmt.Errorf("opening a session: %s", refusal.Clip(err.Error(), 300))
	}
	// Not an ssh.Session: after a request that it cannot read it takes no more of them, and the connection then hangs, even when closed.
	go ssh.DiscardRequests(requests)
	said, ended := &tail{}, make(chan struct{})
	go func() { _, _ = io.Copy(said, channel.Stderr()); close(ended) }()
	quoted := "'" + strings.NewReplacer("'", `'\''`, "!", `'\!'`).Replace(r.remote.path) + "'"
	began, err := channel.SendRequest("exec", true, ssh.Marshal(struct{ Command string }{service + " " + quoted}))
	if err == nil && !began {
		err = errors.New("the server will not")
	}
	if err != nil {
		closeAll()
		return nil, fmt.Errorf("starting %s: %s", service, refusal.Clip(err.Error(), 300))
	}
	in := half{channel}
	return r.converse(in, channel, said, func() {
		// A server may not even take a goodbye. Its last words come before its end.
		go func() { _, _ = in.Write([]byte("0000")); _ = in.Close() }()
		select {
		case <-ended:
		case <-time.After(lastWords):
		}
		closeAll()
	})
}

// half is a channel of which Close ends what is sent, and not what is received.
type half struct{ ssh.Channel }

func (h half) Close() error { return h.CloseWrite() }

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

// web is one conversation's HTTP client. It knows its remote's origin: credentials go there and nowhere else, and what is
// reached by a redirect must be a public address unless the origin itself is not.
type web struct {
	remote   remote
	user     string
	password string
	private  atomic.Bool // the origin was found at an address that is not public
}

// dialHTTP asks for the list of references, following redirects there only, and talks to where that ended.
func (r *Repository) dialHTTP(ctx context.Context, service string) (*talk, error) {
	w := &web{remote: r.remote, user: cmp.Or(r.Auth.User, "git")}
	var err error
	if w.password, err = r.password(); err != nil {
		return nil, err
	}
	client, err := w.client(r.Auth.CAFile)
	if err != nil {
		return nil, err
	}
	at := *r.remote.base
	at.Path += "/info/refs"
	at.RawQuery = "service=" + service
	body, moved, err := w.do(ctx, client, http.MethodGet, at.String(), service, nil)
	if err != nil {
		client.CloseIdleConnections()
		return nil, err
	}
	refs, err := r.greet(body)
	body.Close()
	if err != nil {
		client.CloseIdleConnections()
		return nil, err
	}
	end := *moved
	end.Path = strings.TrimSuffix(end.Path, "/info/refs") + "/" + service
	end.RawQuery = ""
	answer := io.NopCloser(strings.NewReader(""))
	ask := func(request []byte) (io.Reader, error) {
		body, _, err := w.do(ctx, client, http.MethodPost, end.String(), service, request)
		if err != nil {
			return nil, err
		}
		answer = body
		return body, nil
	}
	return &talk{refs, ask, func() { answer.Close(); client.CloseIdleConnections() }}, nil
}

// password reads the credential: a file, else a variable, else none.
func (r *Repository) password() (string, error) {
	text := ""
	if r.Auth.PasswordFile != "" {
		b, err := os.ReadFile(r.Auth.PasswordFile)
		if err != nil {
			return "", fmt.Errorf("reading the password: %v", err)
		}
		text = strings.TrimRight(string(b), "\r\n")
	} else if r.Auth.PasswordEnv != "" {
		text = os.Getenv(r.Auth.PasswordEnv)
	} else {
		return "", nil
	}
	if text == "" {
		return "", errors.New("reading the password: it is empty")
	}
	return text, nil
}

func (w *web) client(caFile string) (*http.Client, error) {
	settings := &tls.Config{MinVersion: tls.VersionTLS12}
	if caFile != "" {
		pem, err := os.ReadFile(caFile)
		if err != nil {
			return nil, fmt.Errorf("reading the CA file: %v", err)
		}
		settings.RootCAs = x509.NewCertPool()
		if !settings.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("CA file %s: no certificate in it", caFile)
		}
	}
	return &http.Client{
		Transport: &http.Transport{
			DialContext: w.dial, TLSClientConfig: settings, TLSHandshakeTimeout: 15 * time.Second,
			ResponseHeaderTimeout: 60 * time.Second, MaxResponseHeaderBytes: 64 << 10, ForceAttemptHTTP2: true,
		},
		CheckRedirect: w.redirect,
	}, nil
}

// dial judges addresses after the name was resolved, at each connection: a name that changes its mind is judged again.
func (w *web) dial(ctx context.Context, network, address string) (net.Conn, error) {
	own := address == net.JoinHostPort(w.remote.host, w.remote.port)
	d := net.Dialer{Timeout: 15 * time.Second, Control: func(_, resolved string, _ syscall.RawConn) error {
		at, err := netip.ParseAddrPort(resolved)
		if err != nil {
			return err
		}
		if own && w.remote.scheme == "http" && !at.Addr().Unmap().IsLoopback() {
			return refuse("E_REDIRECT", "remote "+w.remote.String(), at.Addr().String(), "a loopback address for http")
		}
		if own && !public(at.Addr()) {
			w.private.Store(true)
		}
		if !own && !w.private.Load() && !public(at.Addr()) {
			return refuse("E_REDIRECT", "remote "+w.remote.String(), "a redirect to "+at.Addr().String(), "a public address")
		}
		return nil
	}}
	return d.DialContext(ctx, network, address)
}

// redirect allows the first request alone to move, to https or to where http already was.
func (w *web) redirect(request *http.Request, via []*http.Request) error {
	to := request.URL
	allowed := to.Scheme == "https" || to.Scheme == "http" && w.remote.scheme == "http"
	if via[0].Method != http.MethodGet || len(via) > 4 || !allowed || to.User != nil || !strings.HasSuffix(to.Path, "/info/refs") {
		return refuse("E_REDIRECT", "remote "+w.remote.String(), "a redirect to "+to.Scheme+"://"+to.Host,
			"at most four, of the first request, to https, with the same last part of the path")
	}
	if w.origin(to) {
		request.SetBasicAuth(w.user, w.password)
	} else {
		request.Header.Del("Authorization")
	}
	return nil
}

// origin says whether a URL is the remote's own: the same scheme, host and port.
func (w *web) origin(u *url.URL) bool {
	port := cmp.Or(u.Port(), map[string]string{"http": "80", "https": "443"}[u.Scheme])
	return w.password != "" && u.Scheme == w.remote.scheme && strings.EqualFold(u.Hostname(), w.remote.host) && port == w.remote.port
}

// do sends one request and returns the answer's body, which the caller closes, and where it came from in the end.
func (w *web) do(ctx context.Context, client *http.Client, method, at, service string, text []byte) (body io.ReadCloser, end *url.URL, err error) {
	request, err := http.NewRequestWithContext(ctx, method, at, bytes.NewReader(text))
	if err != nil {
		return nil, nil, err
	}
	kind := "advertisement"
	if method == http.MethodPost {
		kind = "result"
		request.Header.Set("Content-Type", "application/x-"+service+"-request")
	}
	request.Header.Set("User-Agent", "git/2 (kmo)")
	if w.origin(request.URL) {
		request.SetBasicAuth(w.user, w.password)
	}
	answer, err := client.Do(request)
	if err != nil {
		if answer != nil && answer.Body != nil {
			answer.Body.Close()
		}
		if refused := refusal.Of(err); refused != nil {
			return nil, nil, refused
		}
		return nil, nil, fmt.Errorf("asking %s: %s", w.remote, refusal.Clip(reason(err), 300))
	}
	if answer.StatusCode == http.StatusOK && answer.Header.Get("Content-Type") == "application/x-"+service+"-"+kind {
		return answer.Body, answer.Request.URL, nil
	}
	answer.Body.Close()
	switch answer.StatusCode {
	case http.StatusUnauthorized, http.StatusForbidden:
		return nil, nil, &deniedError{fmt.Sprintf("%d, the credentials are not enough", answer.StatusCode)}
	case http.StatusOK:
		return nil, nil, fmt.Errorf("asking %s: %q is no Git service", w.remote, refusal.Clip(answer.Header.Get("Content-Type"), 60))
	}
	return nil, nil, fmt.Errorf("asking %s: status %d", w.remote, answer.StatusCode)
}

// reason is what lies under a *url.Error, whose own text would repeat the address a server redirected to.
func reason(err error) string {
	if e := (*url.Error)(nil); errors.As(err, &e) {
		return e.Err.Error()
	}
	return err.Error()
}

// public says whether an address is one of the open Internet's.
func public(a netip.Addr) bool {
	a = a.Unmap()
	if !a.IsGlobalUnicast() || a.IsPrivate() {
		return false
	}
	reserved := []string{"0.0.0.0/8", "100.64.0.0/10", "192.0.0.0/24", "198.18.0.0/15", "240.0.0.0/4", "64:ff9b::/96", "2002::/16", "fec0::/10"}
	return !slices.ContainsFunc(reserved, func(p string) bool { return netip.MustParsePrefix(p).Contains(a) })
}
