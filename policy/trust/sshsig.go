package trust

import (
	"bytes"
	"crypto"
	"crypto/rsa"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"

	"github.com/hiddeco/sshsig"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/kindos/kmo/policy/refusal"
)

// The SSHSIG namespaces, one a purpose.
const (
	namespaceCommit   = "git"
	namespaceRoot     = "kmo.root.v1"
	namespaceApproval = "kmo.approval.v1"
)

const (
	armourBegin  = "-----BEGIN SSH SIGNATURE-----\n"
	armourEnd    = "\n-----END SSH SIGNATURE-----\n"
	maxSignature = 16 << 10 // bytes of one SSHSIG blob
	minRSA       = 3072
	maxRSA       = 16384
)

// KeyID is a key's OpenSSH fingerprint, "SHA256:…".
func KeyID(key ssh.PublicKey) string { return ssh.FingerprintSHA256(key) }

// LoadKey reads an SSH private key file as LoadPrivateKey does, for SSH signatures.
func LoadKey(path string, ask func() ([]byte, error)) (ssh.Signer, error) {
	key, err := LoadPrivateKey(path, ask)
	if err != nil {
		return nil, err
	}
	return ssh.NewSignerFromSigner(key)
}

// readPrivate reads a file that only its owner may read.
func readPrivate(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	stat, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if mode := stat.Mode().Perm(); mode&0o077 != 0 {
		return nil, fmt.Errorf("%s: mode %#o lets others have it; want 0600", path, mode)
	}
	return io.ReadAll(file)
}

// LoadPrivateKey reads an SSH private key file, of an allowed type and size. ask is called for the passphrase of an encrypted one; nil means
// that there is nobody to ask.
func LoadPrivateKey(path string, ask func() ([]byte, error)) (crypto.Signer, error) {
	file, err := readPrivate(path)
	if err != nil {
		return nil, fmt.Errorf("signing key: %w", err)
	}
	raw, err := ssh.ParseRawPrivateKey(file)
	var locked *ssh.PassphraseMissingError
	if errors.As(err, &locked) && ask != nil {
		passphrase, askErr := ask()
		if askErr != nil {
			return nil, fmt.Errorf("signing key %s: passphrase: %v", path, askErr)
		}
		raw, err = ssh.ParseRawPrivateKeyWithPassphrase(file, passphrase)
	}
	if err != nil {
		return nil, fmt.Errorf("signing key %s: %v", path, err)
	}
	key, ok := raw.(crypto.Signer)
	if !ok {
		return nil, forbidden("signing key "+path, fmt.Sprintf("a %T", raw))
	}
	public, err := ssh.NewPublicKey(key.Public())
	if err != nil {
		return nil, fmt.Errorf("signing key %s: %v", path, err)
	}
	if err := AllowedKey(public); err != nil {
		return nil, err
	}
	return key, nil
}

// Agent is a connection to an ssh-agent. Its signers work until it is closed.
type Agent struct {
	conn   net.Conn
	client agent.ExtendedAgent
}

// DialAgent connects to the agent at a unix socket, "" for the one that SSH_AUTH_SOCK names.
func DialAgent(socket string) (*Agent, error) {
	if socket == "" {
		socket = os.Getenv("SSH_AUTH_SOCK")
	}
	if socket == "" {
		return nil, errors.New("ssh-agent: SSH_AUTH_SOCK is not set")
	}
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return nil, fmt.Errorf("ssh-agent: %w", err)
	}
	return &Agent{conn: conn, client: agent.NewClient(conn)}, nil
}

// Signer returns the agent's key of that id. With the id "" it returns the only allowed key, and an error if there are several.
func (a *Agent) Signer(id string) (ssh.Signer, error) {
	signers, err := a.client.Signers()
	if err != nil {
		return nil, fmt.Errorf("ssh-agent keys: %v", err)
	}
	var found []ssh.Signer
	var ids []string
	for _, signer := range signers {
		if AllowedKey(signer.PublicKey()) != nil {
			continue
		}
		ids = append(ids, KeyID(signer.PublicKey()))
		if id == "" || id == KeyID(signer.PublicKey()) {
			found = append(found, signer)
		}
	}
	if len(found) != 1 {
		return nil, fmt.Errorf("ssh-agent holds %d keys that match %q; it has %s", len(found), id, strings.Join(ids, ", "))
	}
	return found[0], nil
}

// Close ends the connection.
func (a *Agent) Close() error { return a.conn.Close() }

// SignCommit signs an unsigned commit object, so that `git verify-commit` and Verify accept the result.
func SignCommit(unsigned []byte, signer ssh.Signer) (signed []byte, err error) {
	p, err := ParseCommit(unsigned)
	if err != nil {
		return nil, fmt.Errorf("signing a commit: %w", err)
	}
	if p.Signature != "" {
		return nil, errors.New("signing a commit: it is signed already")
	}
	blob, err := sign(unsigned, signer, namespaceCommit)
	if err != nil {
		return nil, fmt.Errorf("signing a commit: %w", err)
	}
	header := "gpgsig " + strings.ReplaceAll(strings.TrimSuffix(armour(blob), "\n"), "\n", "\n ") + "\n"
	end := bytes.Index(unsigned, []byte("\n\n")) + 1
	return slices.Concat(unsigned[:end], []byte(header), unsigned[end:]), nil
}

// SignedBy says whether a commit carries a good signature of that very key, whoever's it is.
func SignedBy(raw []byte, key ssh.PublicKey) bool {
	parsed, err := ParseCommit(raw)
	if err != nil {
		return false
	}
	blob, err := unarmour(parsed.Signature, "commit")
	if err != nil {
		return false
	}
	signature, err := parseSignature(blob, namespaceCommit, "commit")
	return err == nil && bytes.Equal(signature.PublicKey.Marshal(), key.Marshal()) && verifySignature(parsed.Payload, signature, "commit") == nil
}

// sign makes the SSHSIG blob of a message.
func sign(message []byte, signer ssh.Signer, namespace string) ([]byte, error) {
	if err := AllowedKey(signer.PublicKey()); err != nil {
		return nil, err
	}
	signature, err := sshsig.Sign(bytes.NewReader(message), signer, sshsig.HashSHA512, namespace)
	if err != nil {
		return nil, err
	}
	return signature.Marshal(), nil
}

func armour(blob []byte) string {
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

// unarmour reads exactly one block and nothing before, after or beside its base64 lines.
func unarmour(text, subject string) ([]byte, error) {
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

// parseSignature reads an SSHSIG blob that has one spelling and only allowed algorithms.
func parseSignature(blob []byte, namespace, subject string) (*sshsig.Signature, error) {
	var wire struct {
		Magic                                           [6]byte
		Version                                         uint32
		Key, Namespace, Reserved, Hash, SignatureOfHash string
	}
	var inner ssh.Signature
	if ssh.Unmarshal(blob, &wire) != nil || ssh.Unmarshal([]byte(wire.SignatureOfHash), &inner) != nil {
		return nil, badSignature(subject, "bytes that are no SSHSIG")
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
	signature, err := sshsig.ParseSignature(blob)
	if err != nil || !bytes.Equal(signature.Marshal(), blob) {
		return nil, badSignature(subject, "an SSHSIG that is not in its one spelling")
	}
	if len(inner.Rest) > 0 && !strings.HasPrefix(key.Type(), "sk-") {
		return nil, badSignature(subject, "bytes after the signature")
	}
	return signature, nil
}

// verifySignature checks message against a signature that parseSignature returned.
func verifySignature(message []byte, s *sshsig.Signature, subject string) error {
	if err := sshsig.Verify(bytes.NewReader(message), s, s.PublicKey, s.HashAlgorithm, s.Namespace); err != nil {
		return badSignature(subject, "a signature of "+KeyID(s.PublicKey)+" that does not verify: "+refusal.Clip(err.Error(), 80))
	}
	return nil
}

// AllowedKey refuses every key type and size that is not in the package comment, certificates among them.
func AllowedKey(key ssh.PublicKey) error {
	got := key.Type()
	switch got {
	case ssh.KeyAlgoED25519, ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoSKED25519, ssh.KeyAlgoSKECDSA256:
		return nil
	case ssh.KeyAlgoRSA:
		if inner, ok := key.(ssh.CryptoPublicKey); ok {
			if public, ok := inner.CryptoPublicKey().(*rsa.PublicKey); ok {
				if bits := public.N.BitLen(); bits >= minRSA && bits <= maxRSA {
					return nil
				}
				got = fmt.Sprintf("rsa with %d bits", public.N.BitLen())
			}
		}
	}
	return forbidden("key "+KeyID(key), got)
}

func forbidden(subject, got string) error {
	return &refusal.Error{Code: "E_ALG_FORBIDDEN", Subject: subject, Got: got, Want: "ed25519, ecdsa p256 or p384, an sk- key, or rsa of at least 3072 bits with SHA-2"}
}

func badSignature(subject, got string) error {
	return &refusal.Error{Code: "E_SIG_BAD", Subject: subject, Got: got, Want: "a signature over exactly these bytes"}
}
