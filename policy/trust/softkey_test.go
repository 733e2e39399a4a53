package trust

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"io"
	"math/big"
	"testing"

	"golang.org/x/crypto/ssh"
)

const application = "ssh:" // whom a security key signs for

// softKey signs as a security key does, in the wire format of OpenSSH's PROTOCOL.u2f; flags say whether it was touched.
type softKey struct {
	public ssh.PublicKey
	sign   func(data []byte) []byte
	flags  byte
}

func newSoftKey(t testing.TB, flags byte) softKey {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ssh.ParsePublicKey(ssh.Marshal(struct {
		Type        string
		Key         []byte
		Application string
	}{ssh.KeyAlgoSKED25519, public, application}))
	if err != nil {
		t.Fatal(err)
	}
	return softKey{key, func(data []byte) []byte { return ed25519.Sign(private, data) }, flags}
}

func newSoftECDSA(t testing.TB, flags byte) softKey {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	point, err := private.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	key, err := ssh.ParsePublicKey(ssh.Marshal(struct {
		Type, Curve string
		Point       []byte
		Application string
	}{ssh.KeyAlgoSKECDSA256, "nistp256", point, application}))
	if err != nil {
		t.Fatal(err)
	}
	return softKey{key, func(data []byte) []byte {
		sum := sha256.Sum256(data)
		r, s, err := ecdsa.Sign(rand.Reader, private, sum[:])
		if err != nil {
			t.Fatal(err)
		}
		return ssh.Marshal(struct{ R, S *big.Int }{r, s})
	}, flags}
}

func (k softKey) PublicKey() ssh.PublicKey { return k.public }

func (k softKey) Sign(_ io.Reader, data []byte) (*ssh.Signature, error) {
	relying, message := sha256.Sum256([]byte(application)), sha256.Sum256(data)
	tail := []byte{k.flags, 0, 0, 0, 7} // and how often it has signed
	signed := append(append(append([]byte{}, relying[:]...), tail...), message[:]...)
	return &ssh.Signature{Format: k.public.Type(), Blob: k.sign(signed), Rest: tail}, nil
}
