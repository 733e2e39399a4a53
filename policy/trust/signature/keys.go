package signature

import (
	"crypto"
	"crypto/rsa"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/kindos/kmo/policy/refusal"
)

const (
	minRSA = 3072
	maxRSA = 16384
)

// KeyID is a key's OpenSSH fingerprint, "SHA256:…"; of an OpenPGP one, "openpgp:" and the fingerprint of its primary key.
func KeyID(key ssh.PublicKey) string {
	if c, ok := key.(*Certificate); ok {
		return c.id()
	}
	return ssh.FingerprintSHA256(key)
}

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

// ParseKey reads a public key, "ssh-ed25519 AAAA…", as in an authorized_keys file, without a comment, or "openpgp " and the base64 of what
// `gpg --export` writes: a *Certificate. It refuses what AllowedKey does.
func ParseKey(line string) (ssh.PublicKey, error) {
	if text, ok := strings.CutPrefix(line, openpgpType+" "); ok {
		return parseCertificate(text)
	}
	key, comment, options, rest, err := ssh.ParseAuthorizedKey([]byte(line))
	if err != nil {
		return nil, fmt.Errorf("public key %q: %v", refusal.Clip(line, 60), err)
	}
	if comment != "" || len(options) > 0 || len(rest) > 0 {
		return nil, fmt.Errorf("public key %q: want a type and a key, nothing else", refusal.Clip(line, 60))
	}
	return key, AllowedKey(key)
}
