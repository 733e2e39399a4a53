package registry

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/secure-systems-lab/go-securesystemslib/dsse"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/registry/merkle"
)

var (
	pinSHA  = strings.Repeat("ab", 32)
	pinRoot = merkle.BlobRoot([]byte("image"))
)

func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func TestVerifyStatementKeys(t *testing.T) {
	ed, _ := signingKey("a")
	for name, signer := range map[string]crypto.Signer{
		"Ed25519": ed, "P-256": must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t), "P-384": must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))(t), "RSA": must(rsa.GenerateKey(rand.Reader, 3072))(t),
	} {
		t.Run(name, func(t *testing.T) {
			raw := must(SignStatement(sampleStatement(pinSHA, pinRoot), signer))(t)
			_, stranger := signingKey("stranger")
			got, id, err := VerifyStatement(raw, []crypto.PublicKey{stranger, signer.Public()}, pinSHA, pinRoot)
			if want, _ := KeyID(signer.Public()); err != nil || id != want || !strings.HasPrefix(id, "spki-sha256:") {
				t.Fatalf("got key %s, %v, want %s", id, err, want)
			}
			if diff := cmp.Diff(sampleStatement(pinSHA, pinRoot).Subject, got.Subject); diff != "" {
				t.Error(diff)
			}
		})
	}
	weak := must(rsa.GenerateKey(rand.Reader, 2048))(t)
	if _, err := SignStatement(sampleStatement(pinSHA, pinRoot), weak); refusal.Of(err) == nil || refusal.Of(err).Code != "E_ALG_FORBIDDEN" {
		t.Errorf("signing with RSA-2048: got %v, want E_ALG_FORBIDDEN", err)
	}
	raw := must(SignStatement(sampleStatement(pinSHA, pinRoot), ed))(t)
	if _, _, err := VerifyStatement(raw, []crypto.PublicKey{weak.Public()}, pinSHA, pinRoot); refusal.Of(err) == nil || refusal.Of(err).Code != "E_ALG_FORBIDDEN" {
		t.Errorf("a weak key to verify with: got %v, want E_ALG_FORBIDDEN", err)
	}
}

func TestVerifyStatementRefusals(t *testing.T) {
	key, public := signingKey("release")
	other, otherPublic := signingKey("other")
	id, _ := KeyID(public)
	stated := func(change func(*Statement)) []byte {
		s := sampleStatement(pinSHA, pinRoot)
		change(s)
		return must(SignStatement(s, key))(t)
	}
	payload := string(must(json.Marshal(sampleStatement(pinSHA, pinRoot)))(t))
	// wrapped signs any payload under any type, with any words about the key.
	wrapped := func(media, payload, hint string, signer crypto.Signer) []byte {
		sig := must(signer.Sign(rand.Reader, dsse.PAE(media, []byte(payload)), crypto.Hash(0)))(t)
		return must(json.Marshal(dsse.Envelope{PayloadType: media, Payload: base64.StdEncoding.EncodeToString([]byte(payload)), Signatures: []dsse.Signature{{KeyID: hint, Sig: base64.StdEncoding.EncodeToString(sig)}}}))(t)
	}
	signed := func(payload string) []byte { return wrapped(payloadType, payload, id, key) }
	many := func(n int) []byte {
		var e dsse.Envelope
		if err := json.Unmarshal(signed(payload), &e); err != nil {
			t.Fatal(err)
		}
		for len(e.Signatures) < n {
			e.Signatures = append(e.Signatures, e.Signatures[0])
		}
		e.Signatures = e.Signatures[:n]
		return must(json.Marshal(e))(t)
	}
	for name, c := range map[string]struct {
		raw  []byte
		code refusal.Code
	}{
		"T53 kmo1 of another image":           {stated(func(s *Statement) { s.Subject[0].Digest["kmo1"] = merkle.BlobRoot(nil).Hex() }), "E_DIGEST_SET"},
		"T53 sha256 of another image":         {stated(func(s *Statement) { s.Subject[0].Digest["sha256"] = strings.Repeat("0", 64) }), "E_DIGEST_SET"},
		"T53 a third digest nobody checks":    {stated(func(s *Statement) { s.Subject[0].Digest["sha512"] = strings.Repeat("0", 128) }), "E_DIGEST_SET"},
		"T53 sha256 alone":                    {stated(func(s *Statement) { delete(s.Subject[0].Digest, "kmo1") }), "E_DIGEST_SET"},
		"T53 an empty digest in kmo1's place": {stated(func(s *Statement) { delete(s.Subject[0].Digest, "kmo1"); s.Subject[0].Digest["x"] = "" }), "E_DIGEST_SET"},
		"T53 second subject":                  {stated(func(s *Statement) { s.Subject = append(s.Subject, s.Subject[0]) }), "E_DIGEST_SET"},
		"T53 no subject":                      {stated(func(s *Statement) { s.Subject = nil }), "E_DIGEST_SET"},
		"U-28 T19 foreign payload type":       {wrapped("application/json", payload, id, key), "E_PAYLOAD_TYPE"},
		"other predicate":                     {stated(func(s *Statement) { s.PredicateType = "https://slsa.dev/provenance/v1" }), "E_PAYLOAD_TYPE"},
		"other chunk":                         {stated(func(s *Statement) { s.Predicate.Parameters.Chunk = 4096 }), "E_PAYLOAD_TYPE"},
		"T20 a trusted key's id, other key":   {wrapped(payloadType, payload, id, other), "E_SIG_BAD"},
		"T52 signed by a stranger":            {wrapped(payloadType, payload, "stranger", other), "E_SIG_UNKNOWN_KEY"},
		"T52 unsigned":                        {many(0), "E_SIG_MISSING"},
		"U-10 10 000 signatures":              {many(10_000), "E_LIMIT"},
		"envelope over 1 MiB":                 {append(signed(payload), bytes.Repeat([]byte(" "), 1<<20)...), "E_LIMIT"},
		"unknown field in the payload":        {signed(strings.Replace(payload, `"subject"`, `"extra":1,"subject"`, 1)), "E_DECODE"},
		"key twice in the payload":            {signed(strings.Replace(payload, `"subject"`, `"predicate":{},"subject"`, 1)), "E_DECODE"},
		"key twice in another case":           {signed(strings.Replace(payload, `"subject"`, `"Predicate":{},"subject"`, 1)), "E_DECODE"},
		"second value":                        {signed(payload + payload), "E_DECODE"},
		"nested deeper than 16":               {signed(strings.Replace(payload, `"subject"`, `"extra":`+strings.Repeat("[", 17)+strings.Repeat("]", 17)+`,"subject"`, 1)), "E_DECODE"},
		"fractional size":                     {signed(strings.Replace(payload, `"blobs":null`, `"blobs":[{"size":1.5}]`, 1)), "E_DECODE"},
		"root in another spelling":            {signed(strings.Replace(payload, `"blobs":null`, `"blobs":[{"blobRoot":"`+strings.ToUpper(pinRoot.String())+`"}]`, 1)), "E_DECODE"},
		"unknown field in the envelope":       {bytes.Replace(signed(payload), []byte(`"payload"`), []byte(`"x":1,"payload"`), 1), "E_DECODE"},
		"payload twice":                       {bytes.Replace(signed(payload), []byte(`"payload"`), []byte(`"payload":"e30=","payload"`), 1), "E_DECODE"},
		"not an envelope":                     {[]byte("[]"), "E_DECODE"},
		"empty":                               {nil, "E_DECODE"},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := VerifyStatement(c.raw, []crypto.PublicKey{public}, pinSHA, pinRoot)
			if r := refusal.Of(err); r == nil || r.Code != c.code {
				t.Errorf("got %v, want %s", err, c.code)
			}
		})
	}
	if _, _, err := VerifyStatement(many(2), []crypto.PublicKey{otherPublic, public}, pinSHA, pinRoot); err != nil {
		t.Errorf("near miss: two signatures by the right key: %v", err)
	}
	if _, _, err := VerifyStatement(wrapped(payloadType, payload, "a wrong hint", key), []crypto.PublicKey{public}, pinSHA, pinRoot); err != nil {
		t.Errorf("near miss: a wrong hint on a right signature: %v", err)
	}
	t.Run("every byte of the envelope broken", func(t *testing.T) {
		good := wrapped(payloadType, payload, "", key)
		for i := range good {
			bad := bytes.Clone(good)
			bad[i] ^= 1
			if _, _, err := VerifyStatement(bad, []crypto.PublicKey{public}, pinSHA, pinRoot); refusal.Of(err) == nil {
				t.Errorf("byte %d (%q): got %v, want a refusal", i, good[i], err)
			}
		}
	})
}

func TestT52DeletedAndFlooded(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	index, _, _ := twoPlatforms(t)
	ref := w.push("two", index)
	root := rootOf(t, ref)
	key, public := signingKey("release")
	t.Run("U-10 a flood of referrers is bounded", func(t *testing.T) {
		img := must(newStore(t).whole(ctx, ref, newRoots()))(t)
		subject := img.top.desc
		pusher := newStore(t)
		for i := range 3 * maxReferrers {
			junk := memory(envelopeMedia, fmt.Appendf(nil, "junk %d", i))
			if _, err := pusher.push(ctx, ref, v1.Manifest{ArtifactType: StatementArtifact, Subject: &subject}, memory(emptyConfig, []byte("{}")), junk); err != nil {
				t.Fatal(err)
			}
		}
		w.asked()
		s := newStore(t)
		if _, err := s.Fetch(ctx, ref, root, OCI); err != nil {
			t.Fatal(err)
		}
		if n := len(w.asked()); n > 3*maxReferrers {
			t.Errorf("%d requests", n)
		}
		kept := must(filepath.Glob(filepath.Join(s.Dir, "blobs/sha256", strings.Repeat("?", 64))))(t)
		if own := 1 + 2 + 2 + 2; len(kept) > own { // index, manifests, configs, layers
			t.Errorf("%d blobs are kept, %d more than the image has", len(kept), len(kept)-own)
		}
	})
	t.Run("Seal covers nested indexes", func(t *testing.T) {
		nested := w.push("nested", nestedIndex(t, index))
		sealed, err := newStore(t).Seal(ctx, nested, key, Sealing{})
		if err != nil || sealed != rootOf(t, nested) {
			t.Fatalf("got %v, %v", sealed, err)
		}
		s := newStore(t)
		s.Keys = []crypto.PublicKey{public}
		d, err := s.Describe(ctx, nested, sealed, OCI)
		if err != nil || !d.Proved || d.Signer == "" || d.Platform != "linux/amd64" {
			t.Errorf("got %+v, %v", d, err)
		}
		if _, err := s.Fetch(ctx, nested, sealed, OCI); err != nil {
			t.Error(err)
		}
	})
}

// TestT52AStrangerProvesNothing has strangers state the roots of documents that are here, whose bytes say otherwise.
func TestT52AStrangerProvesNothing(t *testing.T) {
	ctx := context.Background()
	liar, _ := signingKey("liar")
	bogus := merkle.BlobRoot([]byte("bogus"))
	index, amd, _ := twoPlatforms(t)
	// pinned is the root of an index if its first member had the bogus one.
	pinned := func(t *testing.T, ref Reference) merkle.Digest {
		img := wholeOf(t, ref)
		var members []merkle.Descriptor
		for i, m := range img.top.members {
			root := must(m.root(img.known))(t)
			if i == 0 {
				root = bogus
			}
			member := described(m.desc, root)
			member.Platform, member.Nested = platformText(m.desc.Platform), m.desc.MediaType.IsIndex()
			members = append(members, member)
		}
		return must(merkle.IndexRoot(described(img.top.desc, merkle.BlobRoot(img.top.raw)), members))(t)
	}
	for name, c := range map[string]struct {
		what   remote.Taggable
		member remote.Taggable // the first, of which the stranger gives a bogus root; nil for the image itself
	}{
		"a manifest that is the image itself": {amd, nil},
		"an index that is the image itself":   {index, nil},
		"an index of an index":                {nestedIndex(t, index), nil},
		"the nested index":                    {nestedIndex(t, index), index},
		"this platform's manifest":            {index, amd},
	} {
		t.Run(name, func(t *testing.T) {
			ref := newWorld(t).push("image", c.what)
			wrong, about := bogus, ref.SHA256
			if c.member != nil {
				wrong, about = pinned(t, ref), digestOf(t, c.member)
			}
			statement := sampleStatement(ref.SHA256, wrong)
			statement.Predicate.Platforms = []PlatformRoot{{SHA256: about, ManifestRoot: bogus}}
			if img := wholeOf(t, ref); c.member != nil { // what else is needed it gives as it is
				for _, m := range img.top.members[1:] {
					statement.Predicate.Platforms = append(statement.Predicate.Platforms, PlatformRoot{SHA256: m.desc.Digest.Hex, ManifestRoot: must(m.root(img.known))(t)})
				}
			}
			pushStatement(t, newStore(t), ref, statement, liar)
			s := newStore(t)
			if d, err := s.Describe(ctx, ref, wrong, OCI); err != nil || d.Proved {
				t.Errorf("Describe: got proved %v, %v, want a root that nothing proves", d.Proved, err)
			}
			_, err := s.Fetch(ctx, ref, wrong, OCI)
			wantRefusal(t, s, err, "E_MERKLE_ROOT", wrong.String())
		})
	}
}

// TestT52AStrangerChangesNothing lets a stranger say whatever a statement can say, in one that leads to the pinned root, and say it first.
func TestT52AStrangerChangesNothing(t *testing.T) {
	ctx := context.Background()
	liar, _ := signingKey("liar")
	key, public := signingKey("release")
	index, amd, arm := twoPlatforms(t)
	ref := toLayout(t, index) // which lists what speaks of an image in the order in which it came
	root := rootOf(t, ref)
	img := wholeOf(t, ref)
	lie := sampleStatement(ref.SHA256, root)
	lie.Predicate.Custody = chainOf(t, CustodyStep{Step: "approve", Principal: "nobody"})
	if err := img.top.state(&lie.Predicate, img.known, map[string]bool{}); err != nil {
		t.Fatal(err)
	}
	for i := range lie.Predicate.Platforms { // each platform's root under the other's name
		lie.Predicate.Platforms[i].Platform = []string{"linux/arm64/v8", "linux/amd64"}[i]
	}
	for i := range lie.Predicate.Blobs {
		b := &lie.Predicate.Blobs[i]
		b.Size, b.Leaves, b.UncompressedSize, b.ContentRoot = -1, -1, 1, merkle.BlobRoot(nil)
	}
	lie.Predicate.IndexRoot = merkle.BlobRoot(nil)
	pushStatement(t, newStore(t), ref, lie, liar)

	s := newStore(t)
	s.Keys = []crypto.PublicKey{public}
	d, err := s.Describe(ctx, ref, root, OCI)
	if err != nil || !d.Proved || d.Signer != "" || d.Custody != nil || d.Manifest != digestOf(t, amd) || d.Platform != "linux/amd64" {
		t.Errorf("Describe: got %+v, %v, want this platform's manifest, proved by a stranger's material", d, err)
	}
	content, err := s.Fetch(ctx, ref, root, OCI)
	if err != nil {
		t.Fatalf("Fetch: %v, although nobody's word lowers a limit", err)
	}
	if body, _ := os.ReadFile(filepath.Join(content.Path, "bin/app")); string(body) != "for amd64" {
		t.Errorf("got %q, want this platform's", body)
	}
	if _, err := newStore(t).Seal(ctx, ref, key, Sealing{Custody: releasedBy(t, "ann", ref)}); err != nil {
		t.Fatal(err)
	}
	if d, err := s.Describe(ctx, ref, root, OCI); err != nil || d.Signer == "" || len(d.Custody) != 1 || d.Custody[0].Principal != "ann" {
		t.Errorf("a signed statement behind a stranger's: got %+v, %v, want the signed one", d, err)
	}

	t.Run("a limit behind a stranger's statement", func(t *testing.T) {
		limited := sampleStatement(ref.SHA256, root)
		limited.Predicate = lie.Predicate
		ref := toLayout(t, index)
		pushStatement(t, newStore(t), ref, lie, liar)
		pushStatement(t, newStore(t), ref, limited, key)
		s := newStore(t)
		s.Keys = []crypto.PublicKey{public}
		_, err := s.Fetch(ctx, ref, root, OCI)
		wantRefusal(t, s, err, "E_LIMIT", "more than 1 bytes")
	})
	t.Run("a stranger's root for a layer that is here", func(t *testing.T) {
		wrong := sampleStatement(ref.SHA256, root)
		wrong.Predicate = lie.Predicate
		wrong.Predicate.Blobs = slices.Clone(lie.Predicate.Blobs)
		layers := must(amd.Manifest())(t).Layers
		for i := range wrong.Predicate.Blobs {
			if b := &wrong.Predicate.Blobs[i]; b.SHA256 == layers[0].Digest.Hex {
				b.BlobRoot = merkle.BlobRoot([]byte("lie"))
			}
		}
		ref := toLayout(t, index)
		pushStatement(t, newStore(t), ref, wrong, liar)
		if d, err := newStore(t).Describe(ctx, ref, root, OCI); err != nil || d.Proved {
			t.Errorf("Describe: got proved %v, %v, want nothing proved by a false root", d.Proved, err)
		}
		s := newStore(t)
		if err := os.Remove(filepath.Join(ref.Layout, "blobs/sha256", must(arm.Manifest())(t).Layers[0].Digest.Hex)); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Fetch(ctx, ref, root, OCI); err != nil {
			t.Errorf("Fetch: %v, although the bytes say it right", err)
		}
	})
}

func TestSealSaysWhatLayersUnpackTo(t *testing.T) {
	ctx := context.Background()
	key, public := signingKey("release")
	want := map[string]int64{}
	var layers []blobOf
	for i, media := range []types.MediaType{types.OCILayer, types.OCILayerZStd, types.OCIUncompressedLayer} {
		tarball := archive(t, reg(fmt.Sprint(i), strings.Repeat("some bytes ", 1000+i)))
		data := map[types.MediaType][]byte{types.OCILayer: gz(t, tarball), types.OCILayerZStd: zst(t, tarball), types.OCIUncompressedLayer: tarball}[media]
		layers, want[sha256Hex(data)] = append(layers, blobOf{media, data}), int64(len(tarball))
	}
	w := newWorld(t)
	ref := w.push("app", imageOf(t, "linux/amd64", nil, layers...))
	s := newStore(t)
	s.Keys = []crypto.PublicKey{public}
	root, err := s.Seal(ctx, ref, key, Sealing{})
	if err != nil || root != rootOf(t, ref) {
		t.Fatalf("got %v, %v", root, err)
	}
	d, err := s.Describe(ctx, ref, root, OCI)
	if err != nil || d.Statement == nil {
		t.Fatalf("got %+v, %v", d, err)
	}
	for _, b := range d.Statement.Predicate.Blobs {
		if b.UncompressedSize != want[b.SHA256] {
			t.Errorf("blob %s: got %d, want %d", b.SHA256, b.UncompressedSize, want[b.SHA256])
		}
	}
	if _, err := s.Fetch(ctx, ref, root, OCI); err != nil {
		t.Errorf("by the limits that were sealed: %v", err)
	}
	t.Run("a layer that does not unpack", func(t *testing.T) {
		bad := w.push("bad", imageOf(t, "linux/amd64", nil, blobOf{types.OCILayer, []byte("not gzip")}))
		if _, err := newStore(t).Seal(ctx, bad, key, Sealing{}); refusal.Of(err) == nil || refusal.Of(err).Code != "E_LAYER" {
			t.Errorf("got %v, want E_LAYER", err)
		}
	})
	t.Run("a registry that gives other bytes", func(t *testing.T) {
		w.lieAbout(sha256Hex(layers[0].data), func(b []byte) []byte { b[5] ^= 1; return b })
		defer w.lies(nil)
		if _, err := newStore(t).Seal(ctx, ref, key, Sealing{}); refusal.Of(err) == nil || refusal.Of(err).Code != "E_IMG_DIGEST" {
			t.Errorf("got %v, want E_IMG_DIGEST", err)
		}
	})
	t.Run("a file", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "program")
		if err := os.WriteFile(path, []byte("program"), 0o600); err != nil {
			t.Fatal(err)
		}
		ref, root, err := newStore(t).PushFile(ctx, path, w.place("program"), Native)
		if err != nil {
			t.Fatal(err)
		}
		if sealed, err := newStore(t).Seal(ctx, ref, key, Sealing{}); err != nil || sealed != root {
			t.Errorf("got %v, %v, want %v", sealed, err, root)
		}
	})
}

func FuzzOpenStatement(f *testing.F) {
	key, _ := signingKey("release")
	raw, err := SignStatement(sampleStatement(pinSHA, pinRoot), key)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Add([]byte(`{"payloadType":"application/vnd.in-toto+json","payload":"e30=","signatures":[]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if s, _, _, err := openStatement(raw); (s == nil) != (err != nil) || err != nil && refusal.Of(err) == nil {
			t.Errorf("got %v, %v: a statement or a refusal", s, err)
		}
	})
}

func FuzzParseReference(f *testing.F) {
	for _, text := range []string{"reg.example/a@sha256:" + pinSHA, "oci-layout:/a@sha256:" + pinSHA, "localhost:5000/a/b:v1@sha256:" + pinSHA} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if ref, err := ParseReference(text); err == nil && ref.String() != text {
			t.Errorf("%q prints as %q", text, ref)
		}
	})
}

// chainOf is a chain of links that hold, each signed by a key of its principal's name.
func chainOf(t *testing.T, steps ...CustodyStep) (c Custody) {
	t.Helper()
	for _, step := range steps {
		key, _ := signingKey(step.Principal)
		var err error
		if c, err = c.With(step, key); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

func releasedBy(t *testing.T, who string, ref Reference) Custody {
	t.Helper()
	return chainOf(t, CustodyStep{Step: "release", Principal: who, Out: []string{"sha256:" + ref.SHA256}})
}

// TestT76Custody: a chain in which a link is left out, changed, moved, signed by another key or starts from what nobody has made does not hold.
func TestT76Custody(t *testing.T) {
	source, built := "git:"+strings.Repeat("a", 40), "sha256:"+strings.Repeat("b", 64)
	steps := []CustodyStep{
		{Step: "author", Principal: "ann", Out: []string{source}},
		{Step: "build", Principal: "ci", In: []string{source}, Out: []string{built}},
		{Step: "release", Principal: "rob", In: []string{built}, Out: []string{built}},
	}
	good := func() Custody { return chainOf(t, steps...) }
	change := func(c Custody, i int, change func(*CustodyStep), signer string) Custody {
		step, _, _, err := c[i].link()
		if err != nil {
			t.Fatal(err)
		}
		change(&step)
		key, _ := signingKey(signer)
		raw, err := seal(custodyType, step, key)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(raw, &c[i]); err != nil {
			t.Fatal(err)
		}
		return c
	}
	for _, tt := range []struct {
		name  string
		chain Custody
		want  string // of the refusal, "" for none
	}{
		{"all of it", good(), ""},
		{"none", nil, ""},
		{"a link left out", Custody{good()[0], good()[2]}, "link 1, \"release\" by \"rob\": it follows another link"},
		{"the first left out", good()[1:], "link 0, \"build\" by \"ci\": it follows another link"},
		{"two that changed places", Custody{good()[1], good()[0], good()[2]}, "link 0"},
		{"a link changed, and signed by another key than it names", change(good(), 1, func(s *CustodyStep) { s.Out = nil }, "eve"), "1 signatures, none by a key that counts"},
		{"a link signed again", change(good(), 1, func(s *CustodyStep) { s.Out = append(s.Out, source) }, "ci"), "link 2, \"release\" by \"rob\": it follows another link"},
		{"from what nobody has made", change(good(), 2, func(s *CustodyStep) { s.In = []string{"sha256:" + strings.Repeat("c", 64)} }, "rob"), "cccc, which no link before has made"},
		{"an unknown step", change(good(), 2, func(s *CustodyStep) { s.Step = "bless" }, "rob"), "a step \"bless\""},
		{"a step out of order", change(good(), 2, func(s *CustodyStep) { s.Step = "author" }, "rob"), "author comes after build"},
		{"nobody's", change(good(), 2, func(s *CustodyStep) { s.Principal = "" }, "rob"), "by \"\""},
		{"a thing named otherwise", change(good(), 2, func(s *CustodyStep) { s.Out = []string{"relay:latest"} }, "rob"), "named sha256:"},
		{"another type", Custody{{PayloadType: payloadType, Payload: good()[0].Payload, Signatures: good()[0].Signatures}}, "E_CUSTODY: custody: link 0"},
		{"no signature", Custody{{PayloadType: custodyType, Payload: good()[0].Payload}}, "with 0 signatures"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := tt.chain.holds()
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want) || refusal.Of(err).Code != "E_CUSTODY") {
				t.Errorf("got %v, want %q", err, tt.want)
			}
			file, err := json.Marshal(tt.chain)
			if err != nil {
				t.Fatal(err)
			}
			if again, err := ParseCustody(file); err != nil || !cmp.Equal(again.Verify(), tt.chain.Verify()) {
				t.Errorf("read again: %v, %v", again.Verify(), err)
			}
		})
	}
	ref := toLayout(t, empty.Image)
	key, _ := signingKey("release")
	_, err := newStore(t).Seal(context.Background(), ref, key, Sealing{Custody: good()})
	if got := refusal.Of(err); got == nil || got.Code != "E_CUSTODY" || !strings.Contains(got.Got, built) {
		t.Errorf("Seal: got %v, want it refused: the chain ends in something else", err)
	}
}
