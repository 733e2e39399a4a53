package gitrepo

import (
	"bytes"
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
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/kindos/kmo/policy/refusal"
)

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
	w := &web{remote: r.remote, user: cmpOr(r.Auth.User, "git")}
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
	answer, err := w.do(ctx, client, http.MethodGet, at.String(), service, nil)
	if err != nil {
		client.CloseIdleConnections()
		return nil, err
	}
	refs, err := r.greet(answer.Body)
	answer.Body.Close()
	if err != nil {
		client.CloseIdleConnections()
		return nil, err
	}
	end := *answer.Request.URL
	end.Path = strings.TrimSuffix(end.Path, "/info/refs") + "/" + service
	end.RawQuery = ""
	body := io.NopCloser(strings.NewReader(""))
	ask := func(request []byte) (io.Reader, error) {
		answer, err := w.do(ctx, client, http.MethodPost, end.String(), service, request)
		if err != nil {
			return nil, err
		}
		body = answer.Body
		return body, nil
	}
	return &talk{refs, ask, func() { body.Close(); client.CloseIdleConnections() }}, nil
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
	port := cmpOr(u.Port(), map[string]string{"http": "80", "https": "443"}[u.Scheme])
	return w.password != "" && u.Scheme == w.remote.scheme && strings.EqualFold(u.Hostname(), w.remote.host) && port == w.remote.port
}

func (w *web) do(ctx context.Context, client *http.Client, method, at, service string, body []byte) (*http.Response, error) {
	request, err := http.NewRequestWithContext(ctx, method, at, bytes.NewReader(body))
	if err != nil {
		return nil, err
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
			return nil, refused
		}
		return nil, fmt.Errorf("asking %s: %s", w.remote, refusal.Clip(reason(err), 300))
	}
	if answer.StatusCode == http.StatusOK && answer.Header.Get("Content-Type") == "application/x-"+service+"-"+kind {
		return answer, nil
	}
	answer.Body.Close()
	switch answer.StatusCode {
	case http.StatusUnauthorized, http.StatusForbidden:
		return nil, &deniedError{fmt.Sprintf("%d, the credentials are not enough", answer.StatusCode)}
	case http.StatusOK:
		return nil, fmt.Errorf("asking %s: %q is no Git service", w.remote, refusal.Clip(answer.Header.Get("Content-Type"), 60))
	}
	return nil, fmt.Errorf("asking %s: status %d", w.remote, answer.StatusCode)
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
	for _, p := range [...]string{"0.0.0.0/8", "100.64.0.0/10", "192.0.0.0/24", "198.18.0.0/15", "240.0.0.0/4", "64:ff9b::/96", "2002::/16", "fec0::/10"} {
		if netip.MustParsePrefix(p).Contains(a) {
			return false
		}
	}
	return true
}
