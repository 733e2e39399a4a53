package signature

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"testing"

	"golang.org/x/crypto/ssh"
)

func TestDialAgentWithoutSocket(t *testing.T) {
	t.Setenv("SSH_AUTH_SOCK", "")
	if _, err := DialAgent(""); err == nil || err.Error() != "ssh-agent: SSH_AUTH_SOCK is not set" {
		t.Error(err)
	}
}

func FuzzU44Signature(f *testing.F) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(private)
	if err != nil {
		f.Fatal(err)
	}
	blob, err := Sign([]byte("message"), signer, "git")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(Armour(blob))
	f.Fuzz(func(t *testing.T, text string) {
		blob, err := Unarmour(text, "fuzz")
		if err != nil {
			return
		}
		s, err := Parse([]byte("message"), blob, "git", "fuzz")
		if err == nil && !bytes.Equal(s.inner.Marshal(), blob) {
			t.Fatal("two spellings:", base64.StdEncoding.EncodeToString(blob))
		}
	})
}
