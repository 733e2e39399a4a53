package registry

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/secure-systems-lab/go-securesystemslib/dsse"
	"github.com/sigstore/sigstore/pkg/signature"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/registry/merkle"
)

// The names that tell a statement from anything else.
const (
	StatementArtifact = "application/vnd.kmo.image-merkle.v1+json"
	payloadType       = "application/vnd.in-toto+json"
	statementType     = "https://in-toto.io/Statement/v1"
	predicateType     = "https://kos.dev/image/v1"
	custodyType       = "application/vnd.kmo.custody.v1+json"
)

// Bounds of an envelope.
const (
	maxEnvelope   = 1 << 20
	maxSignatures = 32
	maxJSONDepth  = 16
	maxLinks      = 64 // of a custody chain, and digests of each side of a link
)

// Statement is an in-toto statement about one image.
type Statement struct {
	Type          string    `json:"_type"`
	Subject       []Subject `json:"subject"` // the image, by every digest it has: one entry
	PredicateType string    `json:"predicateType"`
	Predicate     Predicate `json:"predicate"`
}

// Subject names an image. Digest has "sha256" and "kmo1", both 64 lower-case hex digits.
type Subject struct {
	Name   string            `json:"name"`
	Digest map[string]string `json:"digest"`
}

// Predicate is what is stated: the kmo1 roots of an image and of what it is made of, and how it came to be.
type Predicate struct {
	Parameters Parameters     `json:"parameters"`
	IndexRoot  merkle.Digest  `json:"indexRoot,omitzero"` // none for a single manifest
	Platforms  []PlatformRoot `json:"platforms"`
	Blobs      []BlobRoot     `json:"blobs"`
	Custody    Custody        `json:"custody,omitempty"`
	Intent     *Intent        `json:"intent,omitempty"`
}

// Intent says in words why there is this image. Nothing is decided by it.
type Intent struct {
	Kind    string `json:"kind"` // feature, fix, security, rollback or config
	Summary string `json:"summary,omitempty"`
	From    string `json:"from,omitempty"` // the image before, by digest
	To      string `json:"to,omitempty"`   // this one
}

// Parameters are those of kmo1.
type Parameters struct {
	Hash  string `json:"hash"`  // "sha3-256"
	Chunk int    `json:"chunk"` // 65536
}

// PlatformRoot is one manifest, or one nested index.
type PlatformRoot struct {
	Platform     string        `json:"platform,omitempty"`
	SHA256       string        `json:"sha256"`
	ManifestRoot merkle.Digest `json:"manifestRoot"`
}

// BlobRoot is one config or layer.
type BlobRoot struct {
	SHA256           string        `json:"sha256"`
	Size             int64         `json:"size"`
	BlobRoot         merkle.Digest `json:"blobRoot"`
	Leaves           int64         `json:"leaves"`               // chunks
	ContentRoot      merkle.Digest `json:"contentRoot,omitzero"` // for others to fill in: kMO reads an image's content, not a layer's
	UncompressedSize int64         `json:"uncompressedSize,omitempty"`
}

// Custody is how an image came to be: links in their order, each a DSSE envelope of one [CustodyStep], signed by who took the step.
type Custody []envelope

// CustodyStep is what one link says.
type CustodyStep struct {
	Step      string   `json:"step"`      // one of CustodySteps
	Principal string   `json:"principal"` // who took it, as the trust root has them
	In        []string `json:"in,omitempty"`
	Out       []string `json:"out,omitempty"`
	Previous  string   `json:"previous,omitempty"` // sha256 of the payload of the link before, in hex; "" for the first
	Key       string   `json:"key"`                // that signs this link: standard base64 of its PKIX form
}

// CustodySteps are the steps in the order in which they are taken.
func CustodySteps() []string {
	return []string{"author", "review", "build", "test", "approve", "release"}
}

// CustodyFact is one link as it was verified. Whose the key is, and whether the chain is enough, is for others to say.
type CustodyFact struct {
	Step      string   `json:"step"`
	Principal string   `json:"principal"`
	Key       string   `json:"key"` // id of the key that signed; "" if none did
	In        []string `json:"in"`
	Out       []string `json:"out"`
	Uncovered []string `json:"uncovered"` // of In what no link before has in Out
	Why       string   `json:"why"`       // why the link does not hold; "" if it does
}

type envelope struct {
	PayloadType string `json:"payloadType"`
	Payload     string `json:"payload"`
	Signatures  []struct {
		KeyID string `json:"keyid"` // a hint at most; never believed
		Sig   string `json:"sig"`
	} `json:"signatures"`
}

// unpacked is how many bytes a layer may unpack to. A nil statement says nothing.
func (s *Statement) unpacked(hex string) int64 {
	if s != nil {
		for _, b := range s.Predicate.Blobs {
			if b.SHA256 == hex && b.UncompressedSize > 0 {
				return min(b.UncompressedSize, maxUnpacked)
			}
		}
	}
	return maxUnpacked
}

// VerifyStatement returns what an envelope states about the image that is pinned by sha256 (hex) and root, and the id of the key that signed
// it. It refuses another payload type, a subject of which any listed digest is another one, and a signature by none of keys.
func VerifyStatement(raw []byte, keys []crypto.PublicKey, sha256 string, root merkle.Digest) (*Statement, string, error) {
	s, payload, e, err := openStatement(raw)
	if err != nil {
		return nil, "", err
	}
	signer, err := signerOf(e, payload, keys)
	if err != nil {
		return nil, "", err
	}
	return s, signer, s.covers(sha256, root)
}

// covers says whether the one subject is the pinned image, by all of its digests.
func (s *Statement) covers(sha256 string, root merkle.Digest) error {
	if len(s.Subject) != 1 {
		return refuse("E_DIGEST_SET", "image statement", fmt.Sprintf("%d subjects", len(s.Subject)), "one")
	}
	want := map[string]string{"sha256": sha256, "kmo1": root.Hex()}
	for name, got := range s.Subject[0].Digest {
		if want[name] == "" || want[name] != got {
			return refuse("E_DIGEST_SET", "image statement: subject digest "+quote(name), quote(got), "every listed digest is that of the image: "+want[name])
		}
	}
	if len(s.Subject[0].Digest) != len(want) {
		return refuse("E_DIGEST_SET", "image statement", fmt.Sprintf("%d digests", len(s.Subject[0].Digest)), "sha256 and kmo1")
	}
	return nil
}

// openStatement decodes an envelope and its statement, strictly. Nothing in it is trusted yet.
func openStatement(raw []byte) (*Statement, []byte, *envelope, error) {
	const subject = "image statement"
	if len(raw) > maxEnvelope {
		return nil, nil, nil, refuse("E_LIMIT", subject, fmt.Sprintf("%d bytes", len(raw)), fmt.Sprintf("at most %d", maxEnvelope))
	}
	e := &envelope{}
	if err := decodeStrict(raw, e); err != nil {
		return nil, nil, nil, refuse("E_DECODE", subject, refusal.Clip(err.Error(), 200), "a DSSE envelope")
	}
	if e.PayloadType != payloadType {
		return nil, nil, nil, refuse("E_PAYLOAD_TYPE", subject, quote(e.PayloadType), payloadType)
	}
	if n := len(e.Signatures); n > maxSignatures {
		return nil, nil, nil, refuse("E_LIMIT", subject, fmt.Sprintf("%d signatures", n), fmt.Sprintf("at most %d", maxSignatures))
	}
	payload, err := base64.StdEncoding.Strict().DecodeString(e.Payload)
	if err != nil {
		return nil, nil, nil, refuse("E_DECODE", subject, refusal.Clip(err.Error(), 200), "a payload in standard base64")
	}
	s := &Statement{}
	if err := decodeStrict(payload, s); err != nil {
		return nil, nil, nil, refuse("E_DECODE", subject, refusal.Clip(err.Error(), 200), "an image statement")
	}
	if s.Type != statementType || s.PredicateType != predicateType || s.Predicate.Parameters != (Parameters{"sha3-256", merkle.ChunkSize}) {
		return nil, nil, nil, refuse("E_PAYLOAD_TYPE", subject, quote(s.Type+" "+s.PredicateType), statementType+" "+predicateType+" with SHA3-256 and chunks of 65536 bytes")
	}
	return s, payload, e, nil
}

// signerOf returns the id of the first key that signed. Whatever id an envelope names, every key is tried.
func signerOf(e *envelope, payload []byte, keys []crypto.PublicKey) (string, error) {
	if len(e.Signatures) == 0 {
		return "", refuse("E_SIG_MISSING", "image statement", "no signature", "one by a key that may sign image statements")
	}
	pae := dsse.PAE(e.PayloadType, payload)
	code, names := refusal.Code("E_SIG_UNKNOWN_KEY"), []string{}
	for _, key := range keys {
		id, err := KeyID(key)
		if err != nil {
			return "", err
		}
		verifier, err := verifierFor(key)
		if err != nil {
			return "", err
		}
		names = append(names, id)
		for _, s := range e.Signatures {
			sig, err := base64.StdEncoding.Strict().DecodeString(s.Sig)
			if err == nil && verifier.VerifySignature(bytes.NewReader(sig), bytes.NewReader(pae)) == nil {
				return id, nil
			}
			if s.KeyID == id {
				code = "E_SIG_BAD"
			}
		}
	}
	return "", refuse(code, "image statement", fmt.Sprintf("%d signatures, none by a key that counts", len(e.Signatures)), "one by "+strings.Join(names, ", "))
}

// KeyID is how kMO names a key: by its bytes.
func KeyID(key crypto.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return "", fmt.Errorf("public key: %v", err)
	}
	return "spki-sha256:" + sha256Hex(der), nil
}

// hashFor is the hash that goes with a key, 0 for Ed25519. Weak keys are refused.
func hashFor(key crypto.PublicKey) (crypto.Hash, error) {
	switch k := key.(type) {
	case ed25519.PublicKey:
		return 0, nil
	case *ecdsa.PublicKey:
		switch k.Curve.Params().BitSize {
		case 256:
			return crypto.SHA256, nil
		case 384:
			return crypto.SHA384, nil
		}
	case *rsa.PublicKey:
		if k.N.BitLen() >= 3072 {
			return crypto.SHA256, nil
		}
	}
	return 0, refuse("E_ALG_FORBIDDEN", "in-toto statement", fmt.Sprintf("a key of type %T", key), "Ed25519, ECDSA P-256 or P-384, RSA of at least 3072 bits")
}

func verifierFor(key crypto.PublicKey) (signature.Verifier, error) {
	hash, err := hashFor(key)
	if err != nil {
		return nil, err
	}
	if k, ok := key.(*rsa.PublicKey); ok {
		return signature.LoadRSAPSSVerifier(k, hash, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: hash})
	}
	return signature.LoadVerifier(key, hash)
}

// SignStatement makes the DSSE envelope of an in-toto statement, whatever its predicate, with one signature: Ed25519, ECDSA in ASN.1, RSA-PSS.
func SignStatement(statement any, signer crypto.Signer) ([]byte, error) {
	return seal(payloadType, statement, signer)
}

// seal signs a value as JSON.
func seal(payloadType string, value any, signer crypto.Signer) ([]byte, error) {
	payload, err := json.Marshal(value)
	if err != nil {
		return nil, err
	}
	hash, err := hashFor(signer.Public())
	if err != nil {
		return nil, err
	}
	message, options := dsse.PAE(payloadType, payload), crypto.SignerOpts(hash)
	if hash != 0 {
		h := hash.New()
		h.Write(message)
		message = h.Sum(nil)
	}
	if _, ok := signer.Public().(*rsa.PublicKey); ok {
		options = &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: hash}
	}
	sig, err := signer.Sign(rand.Reader, message, options)
	if err != nil {
		return nil, fmt.Errorf("signing the statement: %v", err)
	}
	id, err := KeyID(signer.Public())
	if err != nil {
		return nil, err
	}
	return json.Marshal(dsse.Envelope{PayloadType: payloadType, Payload: base64.StdEncoding.EncodeToString(payload),
		Signatures: []dsse.Signature{{KeyID: id, Sig: base64.StdEncoding.EncodeToString(sig)}}})
}

// decodeStrict is JSON with one value, known fields, each key once in whatever case, bounded depth.
func decodeStrict(raw []byte, into any) error {
	if err := eachKeyOnce(json.NewDecoder(bytes.NewReader(raw)), 0); err != nil {
		return err
	}
	decoder := json.NewDecoder(bytes.NewReader(raw))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(into); err != nil {
		return err
	}
	if _, err := decoder.Token(); err != io.EOF {
		return errors.New("more than one value")
	}
	return nil
}

func eachKeyOnce(d *json.Decoder, depth int) error {
	if depth > maxJSONDepth {
		return fmt.Errorf("nested deeper than %d", maxJSONDepth)
	}
	token, err := d.Token()
	if err != nil {
		return err
	}
	open, ok := token.(json.Delim)
	if !ok {
		return nil
	}
	var seen []string
	for d.More() {
		if open == '{' {
			key, err := d.Token()
			if err != nil {
				return err
			}
			name, _ := key.(string)
			if slices.Contains(seen, strings.ToLower(name)) {
				return fmt.Errorf("key %s is there twice", quote(name))
			}
			seen = append(seen, strings.ToLower(name))
			if len(seen) > 256 {
				return errors.New("more than 256 keys in an object")
			}
		}
		if err := eachKeyOnce(d, depth+1); err != nil {
			return err
		}
	}
	_, err = d.Token()
	return err
}

// proveByStatement compares the pinned root with what is known: from blobs alone if they suffice, else with the help of the statements beside the
// image. A statement that does not lead to the pinned root is ignored, whoever signed it; one by a key that counts goes before a stranger's, who
// could hide it otherwise. The error is E_MERKLE_ROOT if the bytes here contradict the pin.
func (s *Store) proveByStatement(ctx context.Context, img *image, root merkle.Digest) (*Statement, string, bool, error) {
	got, err := img.top.root(img.known)
	if err != nil {
		return nil, "", false, refuse("E_DECODE", img.subject, refusal.Clip(err.Error(), 200), "descriptors that kmo1 can name")
	}
	if !got.IsZero() {
		if err := mismatch(img.subject, got, root); err != nil || len(img.keys) == 0 {
			return nil, "", err == nil, err
		}
	}
	var unanswered error
	var stranger *Statement
	for _, place := range img.at {
		statement, signer, err := s.found(ctx, place, img, root)
		if statement != nil && (signer != "" || len(img.keys) == 0) {
			return statement, signer, true, nil
		}
		stranger = cmp.Or(stranger, statement) // material all the same, if nobody who counts says more
		unanswered = cmp.Or(err, unanswered)
	}
	if stranger != nil || !got.IsZero() { // of what is proved by its bytes, only a limit might have been had
		return stranger, "", true, nil
	}
	if refusal.Of(unanswered) != nil {
		unanswered = nil // what a place must not say about statements, it may as well not have said
	}
	return nil, "", false, unanswered
}

// found looks through the statements at one place, for no longer than a stall, and returns the first that leads to root, a signed one if there
// is one. The error says that the place did not answer.
func (s *Store) found(ctx context.Context, place source, img *image, root merkle.Digest) (stranger *Statement, signer string, err error) {
	ctx, cancel := context.WithTimeout(ctx, stall)
	defer cancel()
	list, err := place.referrers(ctx, img.ref.SHA256)
	for _, desc := range list {
		statement, signer := s.leads(ctx, place, img, desc, root)
		if statement != nil && (signer != "" || len(img.keys) == 0) {
			return statement, signer, nil
		}
		stranger = cmp.Or(stranger, statement)
	}
	return stranger, "", cmp.Or(err, outside(img.subject+": its statements", ctx.Err()))
}

// leads returns the statement that desc names and which of the keys that count signed it, "" for a stranger's; nil if it does not lead to root.
func (s *Store) leads(ctx context.Context, place source, img *image, desc v1.Descriptor, root merkle.Digest) (*Statement, string) {
	raw, err := s.envelope(ctx, place, img.subject, desc)
	if err != nil {
		return nil, ""
	}
	statement, payload, e, err := openStatement(raw)
	if err != nil || statement.covers(img.ref.SHA256, root) != nil {
		return nil, ""
	}
	if got, err := img.top.root(img.known.with(statement)); err != nil || got != root {
		return nil, ""
	}
	signer, _ := signerOf(e, payload, img.keys)
	return statement, signer
}

// with adds what a statement says to what is known from bytes, which it never replaces.
func (r roots) with(s *Statement) roots {
	sum := newRoots()
	for _, b := range s.Predicate.Blobs {
		sum.blobs[b.SHA256] = b.BlobRoot
	}
	for _, p := range s.Predicate.Platforms {
		sum.manifests[p.SHA256] = p.ManifestRoot
	}
	for hex, root := range r.blobs {
		sum.blobs[hex] = root
	}
	return sum
}
