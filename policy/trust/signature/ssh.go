// Package signature reads and makes signed bytes: SSH signatures, the DSSE envelopes that carry them, and the strict JSON inside. It says
// which key signed exactly which bytes; whose key that is and what it may sign, the trust root says.
package signature

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"strings"

	"github.com/hiddeco/sshsig"
	"golang.org/x/crypto/ssh"

	"github.com/kindos/kmo/policy/refusal"
)

const (
	armourBegin  = "-----BEGIN SSH SIGNATURE-----\n"
	armourEnd    = "\n-----END SSH SIGNATURE-----\n"
	maxSignature = 16 << 10 // bytes of one SSHSIG blob
)

// Signature is one signature over one message: it has one spelling and only allowed algorithms. Until Verify has returned nil it proves nothing.
type Signature struct {
	key     ssh.PublicKey
	inner   *sshsig.Signature // or
	pgp     *openpgpSignature
	message []byte
	subject string
}

// Parse reads an SSHSIG blob over a message. subject is what refusals speak of.
func Parse(message, blob []byte, namespace, subject string) (*Signature, error) {
	var wire struct {
		Magic                                           [6]byte
		Version                                         uint32
		Key, Namespace, Reserved, Hash, SignatureOfHash string
	}
	var inner ssh.Signature
	if ssh.Unmarshal(blob, &wire) != nil || ssh.Unmarshal([]byte(wire.SignatureOfHash), &inner) != nil {
		return nil, bad(subject, "bytes that are no SSHSIG")
	}
	key, err := ssh.ParsePublicKey([]byte(wire.Key))
	if err != nil {
		return nil, forbidden(subject, "a key that does not parse")
	}
	if err := AllowedKey(key); err != nil {
		return nil, forbidden(subject, refusal.Of(err).Got)
	}
	if wire.Hash != "sha256" && wire.Hash != "sha512" || inner.Format == ssh.KeyAlgoRSA {
		return nil, forbidden(subject, fmt.Sprintf("hash %q with %q", refusal.Clip(wire.Hash, 20), refusal.Clip(inner.Format, 40)))
	}
	if wire.Namespace != namespace {
		return nil, &refusal.Error{Code: "E_SIG_NAMESPACE", Subject: subject, Got: fmt.Sprintf("namespace %q", refusal.Clip(wire.Namespace, 40)), Want: namespace}
	}
	parsed, err := sshsig.ParseSignature(blob)
	if err != nil || !bytes.Equal(parsed.Marshal(), blob) {
		return nil, bad(subject, "an SSHSIG that is not in its one spelling")
	}
	if len(inner.Rest) > 0 && !strings.HasPrefix(key.Type(), "sk-") {
		return nil, bad(subject, "bytes after the signature")
	}
	return &Signature{key: parsed.PublicKey, inner: parsed, message: message, subject: subject}, nil
}

// Key is the key that the signature names; a *Certificate if it is an OpenPGP one.
func (s *Signature) Key() ssh.PublicKey { return s.key }

// KeyID is the id of Key.
func (s *Signature) KeyID() string { return KeyID(s.key) }

// Verify checks the signature over its message.
func (s *Signature) Verify() error {
	err := error(nil)
	if s.pgp != nil {
		err = s.pgp.verify(s.message)
	} else {
		err = sshsig.Verify(bytes.NewReader(s.message), s.inner, s.inner.PublicKey, s.inner.HashAlgorithm, s.inner.Namespace)
	}
	if err != nil {
		return bad(s.subject, "a signature of "+s.KeyID()+" that does not verify: "+refusal.Clip(err.Error(), 120))
	}
	return nil
}

// Sign makes the SSHSIG blob of a message.
func Sign(message []byte, signer ssh.Signer, namespace string) ([]byte, error) {
	if err := AllowedKey(signer.PublicKey()); err != nil {
		return nil, err
	}
	signature, err := sshsig.Sign(bytes.NewReader(message), signer, sshsig.HashSHA512, namespace)
	if err != nil {
		return nil, err
	}
	return signature.Marshal(), nil
}

// Armour is the text of a blob, as Git keeps it.
func Armour(blob []byte) string {
	text := base64.StdEncoding.EncodeToString(blob)
	var b strings.Builder
	b.WriteString(armourBegin[:len(armourBegin)-1])
	for len(text) > 0 {
		n := min(70, len(text))
		b.WriteString("\n" + text[:n])
		text = text[n:]
	}
	b.WriteString(armourEnd)
	return b.String()
}

// Unarmour reads exactly one block and nothing before, after or beside its base64 lines.
func Unarmour(text, subject string) ([]byte, error) {
	body, ok1 := strings.CutPrefix(text, armourBegin)
	if !ok1 {
		first, _, _ := strings.Cut(text, "\n")
		return nil, &refusal.Error{Code: "E_ALG_FORBIDDEN", Subject: subject, Got: fmt.Sprintf("a signature that starts with %q", refusal.Clip(first, 60)), Want: "an SSH signature"}
	}
	body, ok2 := strings.CutSuffix(body, armourEnd)
	blob, err := base64.StdEncoding.Strict().DecodeString(strings.ReplaceAll(body, "\n", ""))
	if !ok2 || err != nil || strings.Contains(body, "\n\n") || len(blob) > maxSignature {
		return nil, &refusal.Error{Code: "E_SIG_BAD", Subject: subject, Got: "a broken armour", Want: "one SSH SIGNATURE block and nothing else"}
	}
	return blob, nil
}

func forbidden(subject, got string) error {
	return &refusal.Error{Code: "E_ALG_FORBIDDEN", Subject: subject, Got: got, Want: "ed25519, ecdsa p256 or p384, an sk- key, or rsa of at least 3072 bits with SHA-2"}
}

func bad(subject, got string) error {
	return &refusal.Error{Code: "E_SIG_BAD", Subject: subject, Got: got, Want: "a signature over exactly these bytes"}
}
