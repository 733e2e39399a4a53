package trust

import (
	"bytes"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/hiddeco/sshsig"
	"golang.org/x/crypto/ssh"

	"github.com/kindos/kmo/policy/trust/signature"
)

var update = flag.Bool("update", false, "make the vectors and docs/signatures.md anew")

// vector is one SSHSIG with what must become of it.
type vector struct {
	Name      string `json:"name"`
	Made      string `json:"made"` // by what
	Key       string `json:"key"`  // whose signature it says it is
	Message   string `json:"message"`
	Namespace string `json:"namespace"` // that is asked for
	Signature string `json:"signature"`
	Code      string `json:"code,omitempty"`     // "" where it is good
	Stricter  string `json:"stricter,omitempty"` // why it is refused though OpenSSH may take it
}

const sshVectors = "testdata/sshsig.json"

// TestU23Vectors holds signatures of every kind of key against this package and against ssh-keygen -Y verify: what is good here is good there, and
// what is bad here is bad there but where the vector says why this package is stricter.
func TestU23Vectors(t *testing.T) {
	if *update {
		writeVectors(t)
	}
	file, err := os.ReadFile(sshVectors)
	if err != nil {
		t.Fatal(err)
	}
	var all []vector
	if err := json.Unmarshal(file, &all); err != nil {
		t.Fatal(err)
	}
	good := map[string]bool{}
	for _, v := range all {
		t.Run(v.Name, func(t *testing.T) {
			key, err := judgeVector(v)
			if got := codeOf(err); got != v.Code || err != nil && got == "" {
				t.Errorf("got %v, want %q", err, v.Code)
			}
			if err == nil {
				good[key.Type()] = true
				everyByte(t, v)
			}
			out, err := sshVerify(t, v)
			if v.Code == "" && err != nil || v.Code != "" && v.Stricter == "" && err == nil {
				t.Errorf("ssh-keygen -Y verify: %v, %s; here %q", err, out, v.Code)
			}
		})
	}
	for _, algorithm := range []string{ssh.KeyAlgoED25519, ssh.KeyAlgoSKED25519, ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoSKECDSA256, ssh.KeyAlgoRSA} {
		if !good[algorithm] {
			t.Errorf("no good vector of %s", algorithm)
		}
	}
}

func judgeVector(v vector) (ssh.PublicKey, error) {
	blob, err := signature.Unarmour(v.Signature, "vector")
	if err != nil {
		return nil, err
	}
	s, err := signature.Parse([]byte(v.Message), blob, v.Namespace, "vector")
	if err != nil {
		return nil, err
	}
	return s.Key(), s.Verify()
}

// everyByte breaks each byte of a good signature.
func everyByte(t *testing.T, v vector) {
	blob, err := signature.Unarmour(v.Signature, "vector")
	if err != nil {
		t.Fatal(err)
	}
	for i := range blob {
		broken := bytes.Clone(blob)
		broken[i] ^= 0x01
		if s, err := signature.Parse([]byte(v.Message), broken, v.Namespace, "vector"); err == nil && s.Verify() == nil {
			t.Errorf("byte %d changed from %#02x to %#02x is taken", i, blob[i], broken[i])
		}
	}
}

func sshVerify(t *testing.T, v vector) (string, error) {
	dir := t.TempDir()
	for name, text := range map[string]string{"signers": "who " + v.Key + "\n", "sig": v.Signature} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("ssh-keygen", "-Y", "verify", "-f", filepath.Join(dir, "signers"), "-I", "who", "-n", v.Namespace, "-s", filepath.Join(dir, "sig"))
	cmd.Stdin = bytes.NewReader([]byte(v.Message))
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// writeVectors makes all of them with new keys.
func writeVectors(t *testing.T) {
	w := newWorld(t, nil)
	const message = "a message\n"
	var all []vector
	for _, k := range []struct{ name, kind, bits, code, stricter string }{
		{"ed25519", "ed25519", "256", "", ""},
		{"ecdsa p256", "ecdsa", "256", "", ""},
		{"ecdsa p384", "ecdsa", "384", "", ""},
		{"ecdsa p521", "ecdsa", "521", "E_ALG_FORBIDDEN", "p521 is not on the list"},
		{"rsa 3072", "rsa", "3072", "", ""},
		{"rsa 4096", "rsa", "4096", "", ""},
		{"T07 rsa 2048", "rsa", "2048", "E_ALG_FORBIDDEN", "RSA has at least 3072 bits"},
		{"T07 dsa", "dsa", "1024", "E_ALG_FORBIDDEN", "no DSA"},
	} {
		name := "vector-" + k.kind + k.bits
		if k.kind == "dsa" {
			name = "dsa"
		}
		w.keygen(name, "-t", k.kind, "-b", k.bits)
		v := vector{Name: k.name, Made: "ssh-keygen -Y sign", Message: message, Namespace: "git", Code: k.code, Stricter: k.stricter}
		v.Key, v.Signature = w.sshSign(name, message, "git")
		all = append(all, v)
		if k.kind == "ed25519" {
			v.Name, v.Code = "T03 another message", "E_SIG_BAD"
			v.Message = "b message\n"
			all = append(all, v)
			v.Name, v.Code, v.Message = "T04 another namespace", "E_SIG_NAMESPACE", message
			_, v.Signature = w.sshSign(name, message, "file")
			all = append(all, v)
		}
	}
	all = append(all, w.touched(message)...)
	all = append(all, w.unusual(message)...)
	file, err := json.MarshalIndent(all, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(sshVectors, append(file, '\n'), 0o644); err != nil {
		t.Fatal(err)
	}
}

// sshSign signs with the real ssh-keygen.
func (w *world) sshSign(name, message, namespace string) (key, armoured string) {
	w.t.Helper()
	cmd := exec.Command("ssh-keygen", "-q", "-Y", "sign", "-f", w.keyFile(name), "-n", namespace)
	cmd.Stdin = bytes.NewReader([]byte(message))
	out, err := cmd.Output()
	if err != nil {
		w.t.Fatal(err)
	}
	public, err := os.ReadFile(w.keyFile(name) + ".pub")
	if err != nil {
		w.t.Fatal(err)
	}
	return string(bytes.TrimSpace(public)), string(out)
}

// touched are signatures as security keys make them, with and without a touch, verified by PIN or finger, and with bytes that do not belong there.
func (w *world) touched(message string) (all []vector) {
	for _, kind := range []string{ssh.KeyAlgoSKED25519, ssh.KeyAlgoSKECDSA256} {
		for _, one := range []struct {
			name     string
			flags    byte
			more     []byte
			code     string
			stricter string
		}{
			{"touched", 1, nil, "", ""},
			{"touched and verified", 5, nil, "", ""},
			{"T08 touched by nobody", 0, nil, "E_SIG_BAD", "somebody must have touched the key"},
			{"T08 verified and touched by nobody", 4, nil, "E_SIG_BAD", "somebody must have touched the key"},
			{"bytes after the counter", 1, []byte{0}, "E_SIG_BAD", ""},
		} {
			key := newSoftKey(w.t, one.flags)
			if kind == ssh.KeyAlgoSKECDSA256 {
				key = newSoftECDSA(w.t, one.flags)
			}
			s, err := sshsig.Sign(bytes.NewReader([]byte(message)), key, sshsig.HashSHA512, "git")
			if err != nil {
				w.t.Fatal(err)
			}
			s.Signature.Rest = slices.Concat(s.Signature.Rest, one.more)
			all = append(all, vector{
				fmt.Sprintf("%s %s", kind, one.name), "a security key in software", publicLine(key.public), message, "git", signature.Armour(s.Marshal()), one.code, one.stricter,
			})
		}
	}
	return all
}

// unusual are signatures with other algorithms inside than ssh-keygen chooses.
func (w *world) unusual(message string) (all []vector) {
	key := w.keys["vector-rsa3072"].(ssh.AlgorithmSigner)
	for _, one := range []struct {
		name, algorithm, hash, code string
	}{
		{"rsa-sha2-256", ssh.KeyAlgoRSASHA256, "sha256", ""},
		{"rsa-sha2-512 over sha256", ssh.KeyAlgoRSASHA512, "sha256", ""},
		{"T07 rsa with SHA-1", ssh.KeyAlgoRSA, "sha512", "E_ALG_FORBIDDEN"},
		{"T07 hash sha1", ssh.KeyAlgoRSASHA512, "sha1", "E_ALG_FORBIDDEN"},
	} {
		blob := w.sign(key, one.algorithm, one.hash, message)
		all = append(all, vector{one.name, "golang.org/x/crypto/ssh", publicLine(key.PublicKey()), message, "git", signature.Armour(blob), one.code, ""})
	}
	return all
}

// sign makes an SSHSIG with any algorithm and hash.
func (w *world) sign(key ssh.AlgorithmSigner, algorithm, hash, message string) []byte {
	w.t.Helper()
	sums := map[string]func([]byte) []byte{
		"sha1":   func(b []byte) []byte { s := sha1.Sum(b); return s[:] },
		"sha256": func(b []byte) []byte { s := sha256.Sum256(b); return s[:] },
		"sha512": func(b []byte) []byte { s := sha512.Sum512(b); return s[:] },
	}
	preamble := struct {
		Magic                           [6]byte
		Namespace, Reserved, Hash, Data string
	}{[6]byte([]byte("SSHSIG")), "git", "", hash, string(sums[hash]([]byte(message)))}
	s, err := key.SignWithAlgorithm(rand.Reader, ssh.Marshal(preamble), algorithm)
	if err != nil {
		w.t.Fatal(err)
	}
	return ssh.Marshal(wireBlob{preamble.Magic, 1, string(key.PublicKey().Marshal()), "git", "", hash, string(ssh.Marshal(s))})
}
