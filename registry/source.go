package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	inmemory "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/kindos/kmo/policy/refusal"
)

// errAbsent says that a source answered and does not have what was asked for.
var errAbsent = errors.New("not there")

// source is an untrusted place of bytes named by sha256.
type source interface {
	// open returns what the place has under the digest, and its size, -1 if it does not say. It must return errAbsent if it has
	// nothing.
	open(ctx context.Context, kind, hex string) (io.ReadCloser, int64, error)
	// referrers lists manifests that say they speak of the manifest or index hex, at most maxReferrers.
	referrers(ctx context.Context, hex string) ([]v1.Descriptor, error)
}

// The kinds of a registry's bytes.
const (
	kindManifest = "manifests"
	kindBlob     = "blobs"
)

// Only so many referrers are looked at: a flood of them must not keep a host busy.
const maxReferrers = 16

// layoutSource is an OCI image layout folder.
type layoutSource struct{ dir string }

func (l layoutSource) open(_ context.Context, _, hex string) (io.ReadCloser, int64, error) {
	file, err := openRegular(l.dir, "blobs/sha256/"+hex)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, fmt.Errorf("layout %s: sha256:%s: %w", l.dir, hex, errAbsent)
	}
	if err != nil {
		return nil, 0, err
	}
	stat, err := file.Stat()
	if err != nil {
		file.Close()
		return nil, 0, err
	}
	return file, stat.Size(), nil
}

// openRegular opens a file below dir without leaving it, and only if it is a regular file.
func openRegular(dir, path string) (*os.File, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	file, err := root.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe must not make us wait
	if err != nil {
		return nil, err
	}
	if stat, err := file.Stat(); err != nil || !stat.Mode().IsRegular() {
		file.Close()
		return nil, refuse("E_PATH", dir+"/"+path, "it is not a regular file", "a regular file")
	}
	return file, nil
}

func (l layoutSource) referrers(ctx context.Context, hex string) ([]v1.Descriptor, error) {
	file, err := openRegular(l.dir, "index.json")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer file.Close()
	var index v1.IndexManifest
	if err := json.NewDecoder(io.LimitReader(file, maxManifest)).Decode(&index); err != nil {
		return nil, fmt.Errorf("layout %s: index.json: %v", l.dir, err)
	}
	var found []v1.Descriptor
	for _, desc := range index.Manifests {
		if desc.ArtifactType != StatementArtifact || len(found) == maxReferrers {
			continue
		}
		blob, _, err := l.open(ctx, kindManifest, desc.Digest.Hex)
		if err != nil {
			continue
		}
		var m v1.Manifest
		err = json.NewDecoder(io.LimitReader(blob, maxManifest)).Decode(&m)
		blob.Close()
		if err == nil && m.Subject != nil && m.Subject.Digest.Hex == hex {
			found = append(found, desc)
		}
	}
	return found, nil
}

// remoteSource is a repository of a registry.
type remoteSource struct {
	repository name.Repository
	client     *http.Client
	border     *border // the one below client, for pushing
}

// newRemoteSource asks the registry how it wants to be talked to. Plain http is for loopback only.
func newRemoteSource(ctx context.Context, ref Reference, keychain authn.Keychain) (*remoteSource, error) {
	options := []name.Option{name.StrictValidation}
	loopback := isLoopback(ref.Host)
	if loopback {
		options = append(options, name.Insecure)
	}
	repository, err := name.NewRepository(ref.Host+"/"+ref.Repository, options...)
	if err != nil {
		return nil, err
	}
	auth := authn.Anonymous
	if keychain != nil {
		if auth, err = authn.Resolve(ctx, keychain, repository); err != nil {
			return nil, fmt.Errorf("credentials for %s: %v", ref.Host, err)
		}
	}
	border := newBorder(ref.Host, loopback)
	wrapped, err := transport.NewWithContext(ctx, repository.Registry, auth, border, []string{repository.Scope(transport.PullScope)})
	if err != nil {
		return nil, outside("registry "+ref.Host, err)
	}
	return &remoteSource{repository: repository, border: border, client: &http.Client{Transport: wrapped, CheckRedirect: border.redirect}}, nil
}

func (r *remoteSource) open(ctx context.Context, kind, hex string) (io.ReadCloser, int64, error) {
	return r.get(ctx, kind+"/sha256:"+hex)
}

func (r *remoteSource) get(ctx context.Context, path string) (io.ReadCloser, int64, error) {
	address := fmt.Sprintf("%s://%s/v2/%s/%s", r.repository.Scheme(), r.repository.RegistryStr(), r.repository.RepositoryStr(), path)
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, 0, err
	}
	if !strings.HasPrefix(path, kindBlob) {
		request.Header["Accept"] = []string{string(types.OCIImageIndex), string(types.OCIManifestSchema1), string(types.DockerManifestList), string(types.DockerManifestSchema2)}
	}
	response, err := r.client.Do(request)
	if err != nil {
		return nil, 0, outside("registry "+r.repository.RegistryStr(), err)
	}
	unknown := []int{http.StatusBadRequest, http.StatusMethodNotAllowed, http.StatusNotAcceptable, http.StatusNotImplemented} // for a path that a registry does not know
	if response.StatusCode == http.StatusNotFound || strings.HasPrefix(path, "referrers/") && slices.Contains(unknown, response.StatusCode) {
		response.Body.Close()
		return nil, 0, fmt.Errorf("%s: %s: %w", r.repository, path, errAbsent)
	}
	if err := transport.CheckError(response, http.StatusOK); err != nil {
		response.Body.Close()
		return nil, 0, outside("registry "+r.repository.RegistryStr(), err)
	}
	return response.Body, response.ContentLength, nil
}

// referrers asks the referrers endpoint, and the tag that stands in for it where a registry has none.
func (r *remoteSource) referrers(ctx context.Context, hex string) ([]v1.Descriptor, error) {
	body, _, err := r.get(ctx, "referrers/sha256:"+hex+"?artifactType="+url.QueryEscape(StatementArtifact))
	if errors.Is(err, errAbsent) {
		body, _, err = r.get(ctx, "manifests/sha256-"+hex)
	}
	if errors.Is(err, errAbsent) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer body.Close()
	var index v1.IndexManifest
	if err := json.NewDecoder(io.LimitReader(body, maxManifest)).Decode(&index); err != nil {
		return nil, fmt.Errorf("%s: referrers of sha256:%s: %s", r.repository, hex, refusal.Clip(err.Error(), 200))
	}
	var sure, vague []v1.Descriptor
	for _, desc := range index.Manifests {
		switch desc.ArtifactType {
		case StatementArtifact:
			sure = append(sure, desc)
		case "", emptyConfig: // older registries do not read artifactType
			vague = append(vague, desc)
		}
	}
	found := append(sure, vague...)
	return found[:min(len(found), maxReferrers)], nil
}

// outside makes an error of a registry fit to be shown: what the registry said is clipped, a refusal of ours stays one, and nil stays nil.
func outside(subject string, err error) error {
	if err == nil {
		return nil
	}
	if own := refusal.Of(err); own != nil {
		return own
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%s: %w", subject, err)
	}
	var said *transport.Error
	if errors.As(err, &said) {
		text := ""
		for _, d := range said.Errors {
			text += " " + string(d.Code) + " " + d.Message
		}
		return fmt.Errorf("%s: HTTP status %d:%s", subject, said.StatusCode, quote(text))
	}
	return fmt.Errorf("%s: %s", subject, refusal.Clip(err.Error(), 300))
}

// lazySource talks to a registry only once something is asked for.
type lazySource struct {
	store *Store
	ref   Reference
}

func (l *lazySource) remote(ctx context.Context) (*remoteSource, error) {
	key := l.ref.Host + "/" + l.ref.Repository
	l.store.mu.Lock()
	known := l.store.remotes[key]
	l.store.mu.Unlock()
	if known != nil {
		return known, nil
	}
	made, err := newRemoteSource(ctx, l.ref, l.store.Keychain)
	if err != nil {
		return nil, err
	}
	l.store.mu.Lock()
	defer l.store.mu.Unlock()
	l.store.remotes[key] = made
	return made, nil
}

func (l *lazySource) open(ctx context.Context, kind, hex string) (io.ReadCloser, int64, error) {
	r, err := l.remote(ctx)
	if err != nil {
		return nil, 0, err
	}
	return r.open(ctx, kind, hex)
}

func (l *lazySource) referrers(ctx context.Context, hex string) ([]v1.Descriptor, error) {
	r, err := l.remote(ctx)
	if err != nil {
		return nil, err
	}
	return r.referrers(ctx, hex)
}

// atOnce is how many images are described, and how many fetched, of one registry at a time; and how many are read again after a boot.
const atOnce = 4

// turn waits until one more image may be described or fetched. Each registry has turns of its own: no silent or slow one delays what others have.
func (s *Store) turn(ctx context.Context, what string, ref Reference) (done func(), err error) {
	s.mu.Lock()
	key := what + " " + ref.Host
	if s.turns[key] == nil {
		s.turns[key] = make(chan struct{}, atOnce)
	}
	turns := s.turns[key]
	s.mu.Unlock()
	select {
	case turns <- struct{}{}:
		return func() { <-turns }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// reach orders addresses by how far inside they are. A registry may send us on to what is as far inside as itself, never further.
type reach int32

const (
	reachNever reach = iota - 1 // link-local, metadata, multicast, unspecified
	reachPublic
	reachPrivate
	reachLoopback
)

func reachOf(ip netip.Addr) reach {
	ip = ip.Unmap()
	switch {
	case ip.IsLoopback():
		return reachLoopback
	case !ip.IsGlobalUnicast(), ip.IsLinkLocalUnicast(), netip.MustParsePrefix("64:ff9b::/96").Contains(ip), ip == netip.MustParseAddr("fd00:ec2::254"):
		return reachNever
	case ip.IsPrivate(), netip.MustParsePrefix("100.64.0.0/10").Contains(ip):
		return reachPrivate
	}
	return reachPublic
}

func isLoopback(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.Unmap().IsLoopback()
}

// border is every connection to a registry and to wherever it sends us: scheme and address are judged here, the address after
// names were resolved, each time anew.
type border struct {
	host     string // the registry's, with its port
	loopback bool
	own      atomic.Int32 // the reach of the registry itself, as last dialled
	inner    *http.Transport
}

func newBorder(host string, loopback bool) *border {
	b := &border{host: host, loopback: loopback}
	if loopback {
		b.own.Store(int32(reachLoopback))
	}
	if _, _, err := net.SplitHostPort(host); err != nil {
		b.host = net.JoinHostPort(host, "443")
	}
	b.inner = &http.Transport{DialContext: b.dial, TLSHandshakeTimeout: 10 * time.Second, ResponseHeaderTimeout: 30 * time.Second, IdleConnTimeout: 30 * time.Second,
		MaxResponseHeaderBytes: 64 << 10, DisableCompression: true, ForceAttemptHTTP2: true}
	return b
}

// RoundTrip refuses schemes before anything is sent.
func (b *border) RoundTrip(request *http.Request) (*http.Response, error) {
	host := request.URL.Hostname()
	plain := request.URL.Scheme == "http" && b.loopback && isLoopback(host)
	if request.URL.Scheme != "https" && !plain {
		return nil, refuse("E_REDIRECT", "registry "+b.host, quote(request.URL.Scheme+"://"+host), "https; plain http is for registries on loopback only")
	}
	return b.inner.RoundTrip(request)
}

// redirect bounds how often a registry may send us on.
func (b *border) redirect(request *http.Request, via []*http.Request) error {
	if len(via) >= 5 {
		return refuse("E_REDIRECT", "registry "+b.host, fmt.Sprintf("%d redirects, the last to %s", len(via), quote(request.URL.Hostname())), "at most 4")
	}
	return nil
}

func (b *border) dial(ctx context.Context, network, address string) (net.Conn, error) {
	dialer := net.Dialer{Timeout: 10 * time.Second, ControlContext: func(_ context.Context, _, resolved string, _ syscall.RawConn) error {
		return b.judge(address, resolved)
	}}
	return dialer.DialContext(ctx, network, address)
}

// judge says whether address, which was resolved, may be connected to.
func (b *border) judge(address, resolved string) error {
	at, err := netip.ParseAddrPort(resolved)
	if err != nil {
		return err
	}
	got := reachOf(at.Addr().WithZone(""))
	if address == b.host && got != reachNever {
		b.own.Store(int32(got))
		return nil
	}
	if got == reachNever || got > reach(b.own.Load()) {
		return refuse("E_REDIRECT", "registry "+b.host, fmt.Sprintf("it leads to %s, address %s", quote(address), resolved), "an address no further inside than the registry's own, and never a link-local one")
	}
	return nil
}

// UserKeychain is the credentials of whoever runs this process: docker's configuration and its helpers.
func UserKeychain() authn.Keychain { return authn.DefaultKeychain }

// Memory is a registry in memory, with referrers, for demos and tests. It asks nobody who they are: serve it on the loopback.
func Memory() http.Handler {
	return inmemory.New(inmemory.WithReferrersSupport(true), inmemory.Logger(slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)))
}
