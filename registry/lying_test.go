package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/registry/merkle"
)

// TestLyingRegistry breaks each answer in turn. Nothing may be promoted, and once the registry is honest again the same store must succeed.
func TestLyingRegistry(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	image := simple(t, "linux/amd64", reg("bin/app", strings.Repeat("some bytes ", 100)))
	ref := w.push("app", image)
	root := rootOf(t, ref)
	m, err := image.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	flip := func(b []byte) []byte { b[len(b)/2] ^= 1; return b }
	short := func(b []byte) []byte { return b[:len(b)-1] }
	long := func(b []byte) []byte { return append(b, 0) }
	for what, suffix := range map[string]string{"manifest": ref.SHA256, "config": m.Config.Digest.Hex, "layer": m.Layers[0].Digest.Hex} {
		for how, change := range map[string]func([]byte) []byte{"a bit flipped": flip, "a byte short": short, "a byte long": long, "empty": func([]byte) []byte { return nil }} {
			t.Run("T46 "+what+" "+how, func(t *testing.T) {
				w.lieAbout(suffix, change)
				s := newStore(t)
				_, err := s.Fetch(ctx, ref, root, OCI)
				wantRefusal(t, s, err, "E_IMG_DIGEST", suffix)
				w.lies(nil)
				if _, err := s.Fetch(ctx, ref, root, OCI); err != nil {
					t.Errorf("honest again: %v", err)
				}
			})
		}
		t.Run("U-10 endless "+what, func(t *testing.T) {
			var sent atomic.Int64
			w.lies(func(rw http.ResponseWriter, r *http.Request, honest http.Handler) {
				if !strings.HasSuffix(r.URL.Path, suffix) {
					honest.ServeHTTP(rw, r)
					return
				}
				block := bytes.Repeat([]byte(" "), 1<<20)
				for r.Context().Err() == nil && sent.Load() < 1<<30 {
					n, err := rw.Write(block)
					if sent.Add(int64(n)); err != nil {
						return
					}
				}
			})
			defer w.lies(nil)
			s := newStore(t)
			_, err := s.Fetch(ctx, ref, root, OCI)
			if r := refusal.Of(err); r == nil || (r.Code != "E_LIMIT" && r.Code != "E_IMG_DIGEST") {
				t.Errorf("got %v, want a refusal", err)
			}
			wantClean(t, s, true)
			if n := sent.Load(); n > 64<<20 {
				t.Errorf("%d bytes were taken before it was refused", n)
			}
		})
		for _, status := range []int{401, 403, 404, 429, 500, 503} {
			t.Run(fmt.Sprintf("status %d for the %s is no refusal", status, what), func(t *testing.T) {
				const canary = "canary\x1b[31m\u202e"
				w.lies(func(rw http.ResponseWriter, r *http.Request, honest http.Handler) {
					if !strings.HasSuffix(r.URL.Path, suffix) {
						honest.ServeHTTP(rw, r)
						return
					}
					rw.WriteHeader(status)
					fmt.Fprintf(rw, `{"errors":[{"code":"X","message":%q}]}`, canary+strings.Repeat("long ", 1000))
				})
				defer w.lies(nil)
				s := newStore(t)
				_, err := s.Fetch(ctx, ref, root, OCI)
				if err == nil || refusal.Of(err) != nil {
					t.Fatalf("got %v, want an error that is no refusal", err)
				}
				if text := err.Error(); strings.Contains(text, "\x1b") || len(text) > 1000 {
					t.Errorf("U-39: %d bytes, %q", len(text), text)
				}
				wantClean(t, s, true)
			})
		}
	}
	t.Run("connection cut in the middle is no refusal", func(t *testing.T) {
		w.lies(func(rw http.ResponseWriter, r *http.Request, honest http.Handler) {
			if !strings.HasSuffix(r.URL.Path, m.Layers[0].Digest.Hex) {
				honest.ServeHTTP(rw, r)
				return
			}
			rw.Header().Set("Content-Length", fmt.Sprint(m.Layers[0].Size))
			rw.Write([]byte("half"))
			panic(http.ErrAbortHandler)
		})
		defer w.lies(nil)
		s := newStore(t)
		_, err := s.Fetch(ctx, ref, root, OCI)
		if err == nil || refusal.Of(err) != nil {
			t.Fatalf("got %v, want an error that is no refusal", err)
		}
		wantClean(t, s, true)
	})
	t.Run("nobody listens", func(t *testing.T) {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		gone := ref
		gone.Host = listener.Addr().String()
		listener.Close()
		s := newStore(t)
		if _, err := s.Fetch(ctx, gone, root, OCI); err == nil || refusal.Of(err) != nil {
			t.Fatalf("got %v, want an error that is no refusal", err)
		}
		wantClean(t, s, true)
	})
	t.Run("a cancelled context is no refusal", func(t *testing.T) {
		ended, cancel := context.WithCancel(ctx)
		cancel()
		s := newStore(t)
		if _, err := s.Fetch(ended, ref, root, OCI); !errors.Is(err, context.Canceled) || refusal.Of(err) != nil {
			t.Fatalf("got %v, want context.Canceled", err)
		}
		wantClean(t, s, true)
	})
}

// TestVerifier is about a stream that says no length: the right bytes under a wrong size.
func TestVerifier(t *testing.T) {
	body := []byte("some bytes")
	for _, size := range []int64{0, 9, 10, 11, 1 << 40} {
		v := newVerifier("blob", v1.Descriptor{Size: size, Digest: v1.Hash{Algorithm: "sha256", Hex: sha256Hex(body)}}, iotest.OneByteReader(bytes.NewReader(body)), true)
		got, err := io.ReadAll(v)
		if size == 10 {
			if err != nil || !bytes.Equal(got, body) || v.blob.Root() != merkle.BlobRoot(body) {
				t.Errorf("the right size: got %q, %v", got, err)
			}
			continue
		}
		t.Run(fmt.Sprintf("U-10 layer of 10 bytes declared as %d", size), func(t *testing.T) {
			if r := refusal.Of(err); r == nil || r.Code != "E_IMG_DIGEST" || r.Want != fmt.Sprintf("size %d", size) {
				t.Errorf("got %v, want E_IMG_DIGEST for the size", err)
			}
		})
	}
}

func TestDocuments(t *testing.T) {
	ctx := context.Background()
	digest := "sha256:" + strings.Repeat("0", 64)
	descriptor := func(size string) string {
		return `{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"` + digest + `","size":` + size + `}`
	}
	many := func(n int) string { return strings.TrimSuffix(strings.Repeat(descriptor("1")+",", n), ",") }
	for name, c := range map[string]struct {
		raw  string
		code refusal.Code
	}{
		"U-10 manifest over 4 MiB":       {`{"config":` + descriptor("1") + `,"layers":[]` + strings.Repeat(" ", 4<<20) + `}`, "E_LIMIT"},
		"U-10 129 layers":                {`{"config":` + descriptor("1") + `,"layers":[` + many(129) + `]}`, "E_LIMIT"},
		"U-10 65 members":                {`{"manifests":[` + many(65) + `]}`, "E_LIMIT"},
		"U-10 config over 4 MiB":         {`{"config":` + descriptor("4194305") + `,"layers":[]}`, "E_LIMIT"},
		"negative size":                  {`{"config":` + descriptor("-1") + `,"layers":[]}`, "E_LIMIT"},
		"manifest and index at once":     {`{"config":` + descriptor("1") + `,"layers":[],"manifests":[]}`, "E_DECODE"},
		"index that says it is an image": {`{"mediaType":"application/vnd.oci.image.manifest.v1+json","manifests":[` + many(1) + `]}`, "E_DECODE"},
		"schema 1":                       {`{"mediaType":"application/vnd.docker.distribution.manifest.v1+json","layers":[]}`, "E_DECODE"},
		"sha512":                         {`{"config":{"digest":"sha512:` + strings.Repeat("0", 128) + `","size":1},"layers":[]}`, "E_DECODE"},
		"not JSON":                       {`<html>`, "E_DECODE"},
		"U-10 deep nesting":              {strings.Repeat(`[`, 100_000), "E_DECODE"},
	} {
		t.Run(name, func(t *testing.T) {
			ref := layoutOf(t, map[string]string{"": c.raw})
			s := newStore(t)
			_, err := s.Fetch(ctx, ref, merkle.BlobRoot(nil), OCI)
			wantRefusal(t, s, err, c.code)
		})
	}
	t.Run("U-10 index nested 1000 deep", func(t *testing.T) {
		inner := `{"config":` + descriptor("1") + `,"layers":[]}`
		media := types.OCIManifestSchema1
		blobs := map[string]string{}
		for range 1000 {
			blobs[sha256Hex([]byte(inner))] = inner
			inner = fmt.Sprintf(`{"mediaType":%q,"manifests":[{"mediaType":%q,"digest":"sha256:%s","size":%d}]}`, types.OCIImageIndex, media, sha256Hex([]byte(inner)), len(inner))
			media = types.OCIImageIndex
		}
		blobs[""] = inner
		ref := layoutOf(t, blobs)
		s := newStore(t)
		_, err := s.Fetch(ctx, ref, merkle.BlobRoot(nil), OCI)
		wantRefusal(t, s, err, "E_LIMIT", "deeper than 3")
		_, err = s.Root(ctx, ref)
		wantRefusal(t, s, err, "E_LIMIT", "deeper than 3")
	})
}

func TestSlowRegistry(t *testing.T) {
	const never, mib = 1000 * time.Hour, 1 << 20
	for name, c := range map[string]struct {
		place   slow
		size    int64
		stalled bool
		ends    time.Duration // at most; 0 for a transfer that is waited for
	}{
		"no answer":                             {slow{answers: never}, mib, true, stall},
		"no byte":                               {slow{every: never, bytes: 1}, mib, true, stall},
		"a byte a second":                       {slow{every: time.Second, bytes: 1}, maxUnpacked, true, stall},
		"nothing more after a while":            {slow{every: 70 * time.Second, bytes: 300 << 10}, maxUnpacked, true, stall},
		"4 KiB a second of 10 MiB":              {slow{every: time.Second, bytes: 4 << 10}, 10 * mib, false, 2*stall + 640*time.Second},
		"4 KiB a second of 16 GiB":              {slow{every: time.Second, bytes: 4 << 10}, maxUnpacked, false, longest},
		"near miss: 16 KiB a second of 10 MiB":  {slow{every: time.Second, bytes: 16 << 10, end: 10 * mib}, 10 * mib, false, 0},
		"near miss: all of it after 50 seconds": {slow{answers: 25 * time.Second, every: 25 * time.Second, bytes: 100, end: 100}, 100, false, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				begun := time.Now()
				err := (&Store{}).readFrom(t.Context(), &c.place, kindBlob, "blob", v1.Descriptor{Size: c.size}, func(r io.Reader) error {
					_, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, r, make([]byte, 64<<10))
					return err
				})
				took := time.Since(begun)
				if c.ends == 0 {
					if err != nil {
						t.Errorf("got %v after %v", err, took)
					}
					return
				}
				if err == nil || refusal.Of(err) != nil || errors.Is(err, errStalled) != c.stalled || took > c.ends {
					t.Errorf("got %v after %v, want an error that is no refusal within %v, of a stall: %v", err, took, c.ends, c.stalled)
				}
			})
		})
	}
	t.Run("statements that do not come", func(t *testing.T) {
		index, _, _ := twoPlatforms(t)
		ref := toLayout(t, index)
		root := rootOf(t, ref)
		synctest.Test(t, func(t *testing.T) {
			s := newStore(t)
			if err := s.open(); err != nil {
				t.Fatal(err)
			}
			img, err := s.resolve(t.Context(), ref, OCI)
			if err != nil {
				t.Fatal(err)
			}
			img.at = []source{&slow{answers: never}}
			begun := time.Now()
			_, _, proved, err := s.proveByStatement(t.Context(), img, root)
			if took := time.Since(begun); proved || err == nil || refusal.Of(err) != nil || took > stall {
				t.Errorf("got proved %v, %v after %v, want an error that is no refusal within %v", proved, err, took, stall)
			}
		})
	})
}

// TestU10AnotherImagesLayer has an image name a large blob, kept for another image, as something small.
func TestU10AnotherImagesLayer(t *testing.T) {
	const size = 256 << 20
	hex := strings.Repeat("ab", 32)
	asConfig := layoutOf(t, map[string]string{"": fmt.Sprintf(`{"config":{"mediaType":%q,"digest":"sha256:%s","size":100},"layers":[]}`, types.OCIConfigJSON, hex)})
	for name, ref := range map[string]Reference{"as its config": asConfig, "as itself": {Layout: asConfig.Layout, SHA256: hex}} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			if err := s.open(); err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(os.WriteFile(s.blobPath(hex), nil, 0o600), os.Truncate(s.blobPath(hex), size)); err != nil {
				t.Fatal(err)
			}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			_, err := s.Fetch(context.Background(), ref, merkle.BlobRoot(nil), OCI)
			runtime.ReadMemStats(&after)
			if err == nil {
				t.Error("it was fetched")
			}
			if n := after.TotalAlloc - before.TotalAlloc; n > size/4 {
				t.Errorf("%d bytes were read of a kept blob that is too large", n)
			}
		})
	}
}

func TestBorder(t *testing.T) {
	ctx := context.Background()
	t.Run("U-38 addresses", func(t *testing.T) {
		for address, want := range map[string]reach{
			"127.0.0.1": reachLoopback, "127.9.9.9": reachLoopback, "::1": reachLoopback, "::ffff:127.0.0.1": reachLoopback,
			"10.1.2.3": reachPrivate, "172.16.0.1": reachPrivate, "192.168.1.1": reachPrivate, "::ffff:10.0.0.1": reachPrivate, "fd12::1": reachPrivate, "100.64.0.1": reachPrivate,
			"169.254.169.254": reachNever, "::ffff:169.254.169.254": reachNever, "fe80::1": reachNever, "fd00:ec2::254": reachNever, "64:ff9b::a9fe:a9fe": reachNever,
			"0.0.0.0": reachNever, "::": reachNever, "224.0.0.1": reachNever, "255.255.255.255": reachNever,
			"93.184.216.34": reachPublic, "2606:4700::1111": reachPublic,
		} {
			if got := reachOf(netip.MustParseAddr(address)); got != want {
				t.Errorf("%s: got %d, want %d", address, got, want)
			}
		}
	})
	t.Run("U-38 a registry leads no further inside than itself", func(t *testing.T) {
		for _, c := range []struct {
			own, to string
			ok      bool
		}{
			{"93.184.216.34", "2.2.2.2", true}, {"93.184.216.34", "10.0.0.1", false}, {"93.184.216.34", "127.0.0.1", false}, {"93.184.216.34", "169.254.169.254", false},
			{"10.0.0.5", "10.0.0.6", true}, {"10.0.0.5", "127.0.0.1", false}, {"10.0.0.5", "169.254.169.254", false}, {"127.0.0.1", "127.0.0.1", true}, {"127.0.0.1", "169.254.169.254", false},
		} {
			b := newBorder("reg.example", false)
			if err := b.judge("reg.example:443", c.own+":443"); err != nil {
				t.Fatal(err)
			}
			err := b.judge("elsewhere.example:443", c.to+":443")
			if (err == nil) != c.ok || !c.ok && refusal.Of(err).Code != "E_REDIRECT" {
				t.Errorf("from %s to %s: got %v, want ok %v", c.own, c.to, err, c.ok)
			}
		}
	})
	t.Run("U-38 a name that resolves to loopback is judged when it is dialled", func(t *testing.T) {
		reached := false
		inside := httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { reached = true }))
		defer inside.Close()
		_, port, _ := net.SplitHostPort(inside.Listener.Addr().String())
		client := http.Client{Transport: newBorder("reg.example", false)}
		_, err := client.Get("https://localhost:" + port)
		if r := refusal.Of(err); r == nil || r.Code != "E_REDIRECT" || reached {
			t.Errorf("got %v, reached %v, want E_REDIRECT", err, reached)
		}
	})
	t.Run("plain http is for loopback", func(t *testing.T) {
		client := http.Client{Transport: newBorder("reg.example", false)}
		if _, err := client.Get("http://reg.example/v2/"); refusal.Of(err) == nil {
			t.Errorf("got %v, want a refusal", err)
		}
	})

	w := newWorld(t)
	image := simple(t, "linux/amd64", reg("a", "1"))
	ref := w.push("app", image)
	root := rootOf(t, ref)
	m, err := image.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	for _, to := range []string{"http://169.254.169.254/latest", "file:///etc/shadow", "http://[::ffff:169.254.169.254]/", "gopher://127.0.0.1/", "http://10.0.0.1/"} {
		t.Run("U-38 redirect to "+to, func(t *testing.T) {
			w.lies(func(rw http.ResponseWriter, r *http.Request, honest http.Handler) {
				if strings.HasSuffix(r.URL.Path, m.Layers[0].Digest.Hex) {
					http.Redirect(rw, r, to, http.StatusTemporaryRedirect)
					return
				}
				honest.ServeHTTP(rw, r)
			})
			defer w.lies(nil)
			s := newStore(t)
			_, err := s.Fetch(ctx, ref, root, OCI)
			wantRefusal(t, s, err, "E_REDIRECT")
		})
	}
	t.Run("U-10 U-38 redirect without end", func(t *testing.T) {
		w.lies(func(rw http.ResponseWriter, r *http.Request, honest http.Handler) {
			if strings.Contains(r.URL.Path, "/blobs/") {
				http.Redirect(rw, r, r.URL.Path, http.StatusTemporaryRedirect)
				return
			}
			honest.ServeHTTP(rw, r)
		})
		defer w.lies(nil)
		w.asked()
		s := newStore(t)
		_, err := s.Fetch(ctx, ref, root, OCI)
		wantRefusal(t, s, err, "E_REDIRECT", "redirects")
		if n := len(w.asked()); n > 10 {
			t.Errorf("%d requests", n)
		}
	})
	t.Run("U-36 U-38 credentials stay with the registry", func(t *testing.T) {
		const secret = "canary-password"
		store := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Authorization") != "" {
				t.Errorf("another host was sent %q", r.Header.Get("Authorization"))
			}
			w.honest.ServeHTTP(rw, r)
		}))
		defer store.Close()
		asked := false
		w.lies(func(rw http.ResponseWriter, r *http.Request, honest http.Handler) {
			if _, password, ok := r.BasicAuth(); !ok || password != secret {
				rw.Header().Set("WWW-Authenticate", `Basic realm="x"`)
				rw.WriteHeader(http.StatusUnauthorized)
				return
			}
			asked = true
			if strings.Contains(r.URL.Path, "/blobs/") {
				http.Redirect(rw, r, store.URL+r.URL.Path, http.StatusTemporaryRedirect)
				return
			}
			honest.ServeHTTP(rw, r)
		})
		defer w.lies(nil)
		s := newStore(t)
		s.Keychain = keychain{&authn.Basic{Username: "ann", Password: secret}}
		if _, err := s.Fetch(ctx, ref, root, OCI); err != nil || !asked {
			t.Fatalf("got %v, asked with credentials: %v", err, asked)
		}
		wrong := newStore(t)
		wrong.Keychain = keychain{&authn.Basic{Username: "ann", Password: "canary-other"}}
		_, err := wrong.Fetch(ctx, ref, root, OCI)
		if err == nil || refusal.Of(err) != nil || strings.Contains(err.Error(), "canary") {
			t.Errorf("wrong password: got %v, want an error that is no refusal and says no secret", err)
		}
	})
	t.Run("a caller that waits for another's download ends with its context", func(t *testing.T) {
		s := newStore(t)
		unlock, err := s.locks.lock(ctx, "x")
		if err != nil {
			t.Fatal(err)
		}
		brief, cancel := context.WithTimeout(ctx, time.Millisecond)
		defer cancel()
		if _, err := s.locks.lock(brief, "x"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want the context's end", err)
		}
		unlock()
	})
}

type keychain struct{ authn.Authenticator }

func (k keychain) Resolve(authn.Resource) (authn.Authenticator, error) { return k.Authenticator, nil }

// layoutOf writes raw blobs by digest into a layout folder; the one named "" is what the reference names.
func layoutOf(t *testing.T, blobs map[string]string) Reference {
	t.Helper()
	ref := toLayout(t, simple(t, "linux/amd64"))
	for _, raw := range blobs {
		writeBlob(t, ref.Layout, []byte(raw))
	}
	ref.SHA256 = sha256Hex([]byte(blobs[""]))
	return ref
}
