package signature

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/kindos/kmo/policy/refusal"
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

// FuzzU44Open reads envelopes: one that is taken has signatures of which each is good or refused, and the same payload once it is signed again.
func FuzzU44Open(f *testing.F) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(private)
	if err != nil {
		f.Fatal(err)
	}
	purpose := Purpose{Type: "application/vnd.kmo.test+json", Namespace: "kmo.test"}
	file, err := Seal([]byte(`{"a":1}`), purpose, signer)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(file)
	f.Add([]byte(`{"payload":"e30=","payloadType":"application/vnd.kmo.test+json","signatures":[{"keyid":"","sig":"AAAA"},{"keyid":"x","sig":""}]}`))
	f.Fuzz(func(t *testing.T, file []byte) {
		s, err := Open(file, purpose, "fuzz")
		if err != nil {
			if refusal.Of(err) == nil {
				t.Fatal("no refusal:", err)
			}
			return
		}
		for i := range s.Len() {
			if one, err := s.Signature(i); err != nil && refusal.Of(err) == nil {
				t.Fatal("no refusal:", err)
			} else if err == nil {
				_ = one.Verify()
			}
		}
		if s.Len() == maxSignatures {
			return
		}
		more, err := Cosign(file, purpose, "fuzz", signer)
		if err != nil {
			t.Fatal(err)
		}
		again, err := Open(more, purpose, "fuzz")
		if err != nil || !bytes.Equal(again.Payload, s.Payload) || again.Len() != s.Len()+1 {
			t.Fatalf("signed again: %v, %q; want %q", err, again.Payload, s.Payload)
		}
		if one, err := again.Signature(s.Len()); err != nil || one.Verify() != nil {
			t.Fatal("its new signature:", err)
		}
	})
}
