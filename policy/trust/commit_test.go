package trust

import (
	"bytes"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hiddeco/sshsig"
	"golang.org/x/crypto/ssh"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/policy/trust/signature"
)

// judgeRaw is what Verify does with a head's bytes, with any key known.
func judgeRaw(raw []byte) (Parsed, error) {
	p, signed, err := openCommit(raw, "commit")
	if err == nil {
		err = signed.Verify()
	}
	return p, err
}

// keygen makes a key with the real ssh-keygen.
func (w *world) keygen(name string, args ...string) {
	w.t.Helper()
	out, err := exec.Command("ssh-keygen", append([]string{"-q", "-N", "", "-C", "", "-f", w.keyFile(name)}, args...)...).CombinedOutput()
	if err != nil {
		w.t.Fatalf("ssh-keygen %v: %v\n%s", args, err, out)
	}
	file, err := os.ReadFile(w.keyFile(name))
	if err != nil {
		w.t.Fatal(err)
	}
	signer, err := ssh.ParsePrivateKey(file)
	if err == nil {
		w.keys[name] = signer
	} else if name != "dsa" { // which Go's library does not even read
		w.t.Fatal(err)
	}
}

// shape is one commit object with what must become of it.
type shape struct {
	name string
	raw  []byte
	code string // "" if it is good
	more bool   // git takes it, and we are stricter
}

// signAs puts a signature made in any way into an unsigned commit.
func signAs(unsigned []byte, armoured string) []byte {
	end := bytes.Index(unsigned, []byte("\n\n")) + 1
	header := "gpgsig " + strings.ReplaceAll(strings.TrimSuffix(armoured, "\n"), "\n", "\n ") + "\n"
	return []byte(string(unsigned[:end]) + header + string(unsigned[end:]))
}

func (w *world) armoured(payload []byte, signer ssh.Signer, namespace string, hash sshsig.HashAlgorithm) string {
	w.t.Helper()
	s, err := sshsig.Sign(bytes.NewReader(payload), signer, hash, namespace)
	if err != nil {
		w.t.Fatal(err)
	}
	return string(sshsig.Armor(s))
}

// shapes makes good and bad commits from real ones.
func (w *world) shapes() []shape {
	var all []shape
	for _, k := range []struct {
		name string
		args []string
		code string
	}{
		{"ed25519", []string{"-t", "ed25519"}, ""},
		{"ecdsa256", []string{"-t", "ecdsa", "-b", "256"}, ""},
		{"ecdsa384", []string{"-t", "ecdsa", "-b", "384"}, ""},
		{"ecdsa521", []string{"-t", "ecdsa", "-b", "521"}, "E_ALG_FORBIDDEN"},
		{"rsa3072", []string{"-t", "rsa", "-b", "3072"}, ""},
		{"rsa2048", []string{"-t", "rsa", "-b", "2048"}, "E_ALG_FORBIDDEN"},
		{"rsa1024", []string{"-t", "rsa", "-b", "1024"}, "E_ALG_FORBIDDEN"},
		{"dsa", []string{"-t", "dsa"}, "E_ALG_FORBIDDEN"},
	} {
		w.keygen(k.name, k.args...)
		c := w.commit(k.name, "", "signed by "+k.name)
		all = append(all, shape{"T07 U-23 git commit -S with " + k.name, c.Raw, k.code, k.code != ""})
	}
	signer := w.keys["ed25519"]
	for _, key := range []softKey{newSoftKey(w.t, 0), newSoftKey(w.t, 1), newSoftECDSA(w.t, 0), newSoftECDSA(w.t, 1)} {
		name := fmt.Sprintf("%s with touch flag %d", key.public.Type(), key.flags)
		w.keys[strings.ReplaceAll(name, " ", "-")] = key
		unsigned := w.unsigned("sk\n")
		code := ""
		if key.flags == 0 {
			code = "E_SIG_BAD"
		}
		all = append(all, shape{"T08 U-23 " + name, signAs(unsigned, w.armoured(unsigned, key, "git", sshsig.HashSHA512)), code, key.flags == 0})
	}

	u := w.unsigned("a message\n")
	good := signAs(u, w.armoured(u, signer, "git", sshsig.HashSHA512))
	add := func(name, code string, more bool, raw []byte) { all = append(all, shape{name, raw, code, more}) }
	add("good", "", false, good)
	add("sha256", "", false, signAs(u, w.armoured(u, signer, "git", sshsig.HashSHA256)))
	add("T04 U-23 namespace file", "E_SIG_NAMESPACE", false, signAs(u, w.armoured(u, signer, "file", sshsig.HashSHA512)))
	add("namespace of an approval", "E_SIG_NAMESPACE", false, signAs(u, w.armoured(u, signer, approvalPurpose.Namespace, sshsig.HashSHA512)))
	add("T01 unsigned", "E_SIG_MISSING", false, u)
	resigned := func(text string) []byte {
		return signAs([]byte(text), w.armoured([]byte(text), signer, "git", sshsig.HashSHA512))
	}
	line := func(prefix string) string {
		for l := range strings.Lines(string(u)) {
			if strings.HasPrefix(l, prefix) {
				return l
			}
		}
		w.t.Fatal("no line", prefix)
		return ""
	}
	tree, author, committer := line("tree "), line("author "), line("committer ")
	body := "\na message\n"
	add("T05 U-19 two tree headers", "E_OBJ_MALFORMED", true, resigned(tree+tree+author+committer+body))
	add("T05 U-19 two author headers", "E_OBJ_MALFORMED", true, resigned(tree+author+author+committer+body))
	add("U-19 two committer headers", "E_OBJ_MALFORMED", true, resigned(tree+author+committer+committer+body))
	add("U-19 headers out of order", "E_OBJ_MALFORMED", true, resigned(tree+committer+author+body))
	add("a parent after the author", "E_OBJ_MALFORMED", true, resigned(tree+author+"parent "+strings.Repeat("a", 40)+"\n"+committer+body))
	add("U-19 unknown header", "E_OBJ_MALFORMED", true, resigned(tree+author+committer+"also this\n"+body))
	add("U-19 encoding header", "E_OBJ_MALFORMED", true, resigned(tree+author+committer+"encoding latin1\n"+body))
	add("mergetag", "E_OBJ_MALFORMED", true, resigned(tree+author+committer+"mergetag object "+strings.Repeat("a", 40)+"\n type commit\n"+body))
	add("T05 U-19 NUL in a header", "E_OBJ_MALFORMED", true, resigned(tree+strings.Replace(author, "author ", "author \x00", 1)+committer+body))
	add("NUL in the message", "E_OBJ_MALFORMED", true, resigned(tree+author+committer+"\nx\x00y\n"))
	add("U-19 CR", "E_OBJ_MALFORMED", true, resigned(tree+author+committer+"\nx\r\n"))
	add("U-19 not UTF-8", "E_OBJ_MALFORMED", true, resigned(tree+author+committer+"\n\xff\n"))
	add("upper-case tree id", "E_OBJ_MALFORMED", true, resigned(strings.ToUpper(tree[:20])[:5]+tree[5:]+author+committer+body))
	add("an author without a time", "E_OBJ_MALFORMED", true, resigned(tree+"author x <x@kos.dev>\n"+committer+body))
	add("an author with two e-mails", "E_OBJ_MALFORMED", true, resigned(tree+strings.Replace(author, "<", "<a@b> <", 1)+committer+body))
	add("a negative time", "E_OBJ_MALFORMED", true, resigned(tree+"author x <x@kos.dev> -5 +0000\n"+committer+body))
	add("no empty line", "E_OBJ_MALFORMED", false, []byte(tree+author+committer))
	add("U-19 extra empty line", "", false, resigned(tree+author+committer+"\n\nmore\n"))
	add("empty message", "", false, resigned(tree+author+committer+"\n"))
	add("an empty name", "", false, resigned(tree+"author  <x@kos.dev> 5 +0000\n"+committer+body))

	sig := w.armoured(u, signer, "git", sshsig.HashSHA512)
	add("T06 U-19 two gpgsig headers", "E_OBJ_MALFORMED", true, signAs(good, sig))
	add("T06 two blocks in one header", "E_OBJ_MALFORMED", true, signAs(u, sig+sig))
	add("T06 normalised bytes signed", "E_SIG_BAD", false, signAs([]byte(tree+author+committer+"\na message\n\n\n"), sig))
	add("T03 another message", "E_SIG_BAD", false, bytes.Replace(good, []byte("a message"), []byte("b message"), 1))
	add("signature before the author", "E_OBJ_MALFORMED", true, []byte(tree+strings.Split(string(signAs([]byte(tree+author+committer+body), sig)), committer)[1][:0]+"gpgsig "+strings.ReplaceAll(strings.TrimSuffix(sig, "\n"), "\n", "\n ")+"\n"+author+committer+body))
	add("text before the block", "E_ALG_FORBIDDEN", false, signAs(u, "hello\n"+sig))
	add("text after the block", "E_SIG_BAD", true, signAs(u, sig+"hello\n"))
	add("a PEM header in the block", "E_SIG_BAD", false, signAs(u, strings.Replace(sig, "SIGNATURE-----\n", "SIGNATURE-----\nA: b\n", 1)))
	add("an OpenPGP block", "E_ALG_FORBIDDEN", false, signAs(u, "-----BEGIN PGP SIGNATURE-----\n\nAAAA\n-----END PGP SIGNATURE-----\n"))
	block, _ := pem.Decode([]byte(sig))
	grown := append(bytes.Clone(block.Bytes), 0)
	add("bytes after the blob", "E_SIG_BAD", false, signAs(u, signature.Armour(grown)))
	add("U-23 a reserved field", "E_SIG_BAD", true, signAs(u, signature.Armour(w.reserved(u, signer))))
	add("U-23 bytes after the signature", "E_SIG_BAD", false, signAs(u, signature.Armour(w.trailing(u, signer))))
	add("U-23 hash md5", "E_ALG_FORBIDDEN", false, signAs(u, signature.Armour(bytes.Replace(block.Bytes, []byte("\x00\x00\x00\x06sha512"), []byte("\x00\x00\x00\x03md5"), 1))))
	add("U-23 rsa with SHA-1", "E_ALG_FORBIDDEN", false, signAs(u, signature.Armour(w.sign(w.keys["rsa3072"].(ssh.AlgorithmSigner), ssh.KeyAlgoRSA, "sha512", string(u)))))
	add("U-23 a certificate", "E_ALG_FORBIDDEN", true, signAs(u, w.certificate(u, signer)))
	return all
}

// unsigned is a commit object without a signature, over the present tree.
func (w *world) unsigned(message string) []byte {
	tree := w.git("rev-parse", "HEAD^{tree}")
	return fmt.Appendf(nil, "tree %s\nparent %s\nauthor Ann Ö <ann@kos.dev> 1700000000 +0130\ncommitter x <x@kos.dev> 1700000001 -0000\n\n%s", tree, w.git("rev-parse", "HEAD"), message)
}

type wireBlob struct {
	Magic                                      [6]byte
	Version                                    uint32
	Key, Namespace, Reserved, Hash, Signatured string
}

func (w *world) reserved(payload []byte, signer ssh.Signer) []byte {
	s, err := sshsig.Sign(bytes.NewReader(payload), signer, sshsig.HashSHA512, "git")
	if err != nil {
		w.t.Fatal(err)
	}
	return ssh.Marshal(wireBlob{[6]byte([]byte("SSHSIG")), 1, string(s.PublicKey.Marshal()), "git", "x", "sha512", string(ssh.Marshal(s.Signature))})
}

func (w *world) trailing(payload []byte, signer ssh.Signer) []byte {
	s, err := sshsig.Sign(bytes.NewReader(payload), signer, sshsig.HashSHA512, "git")
	if err != nil {
		w.t.Fatal(err)
	}
	s.Signature.Rest = []byte("x")
	return s.Marshal()
}

func (w *world) certificate(payload []byte, signer ssh.Signer) string {
	cert := &ssh.Certificate{Key: signer.PublicKey(), CertType: ssh.UserCert, ValidBefore: ssh.CertTimeInfinity, ValidPrincipals: []string{"x@kos.dev"}}
	if err := cert.SignCert(rand.Reader, signer); err != nil {
		w.t.Fatal(err)
	}
	certified, err := ssh.NewCertSigner(cert, signer)
	if err != nil {
		w.t.Fatal(err)
	}
	return w.armoured(payload, certified, "git", sshsig.HashSHA512)
}

// TestDifferential compares this package with git verify-commit on the same objects: what is good here is good there, and what is bad here is bad
// there but where the table says that this package is stricter.
func TestDifferential(t *testing.T) {
	w := newWorld(t, nil)
	w.commit("alice", "", "begin")
	shapes := w.shapes()
	var names []string
	for name := range w.keys {
		names = append(names, name)
	}
	signers := w.signers(names...)
	for _, s := range shapes {
		t.Run(s.name, func(t *testing.T) {
			p, err := judgeRaw(s.raw)
			if code := codeOf(err); code != s.code {
				t.Errorf("got %v, want %q", err, s.code)
			}
			out, err := w.tryGit(s.raw, "hash-object", "-t", "commit", "-w", "--stdin", "--literally")
			if err != nil {
				t.Fatal(err, out)
			}
			id := strings.TrimSpace(out)
			if got := ObjectID(s.raw); got != id {
				t.Errorf("object id %s, git says %s", got, id)
			}
			out, err = w.tryGit(nil, "-c", "gpg.ssh.allowedSignersFile="+signers, "verify-commit", id)
			if git := err == nil; git != (s.code == "") && !(git && s.more) {
				t.Errorf("git verify-commit says %v, %s; here %q", git, out, s.code)
			}
			if s.code == "" {
				w.sameView(t, id, p)
			}
		})
	}
	t.Run("T06 no signature is added to a signed commit", func(t *testing.T) {
		if _, err := SignCommit(shapes[0].raw, w.keys["ed25519"]); err == nil || err.Error() != "signing a commit: it is signed already" {
			t.Error(err)
		}
	})
}

func codeOf(err error) string {
	if r := refusal.Of(err); r != nil {
		return string(r.Code)
	}
	return ""
}

// sameView compares what was parsed with what git shows.
func (w *world) sameView(t *testing.T, id string, p Parsed) {
	t.Helper()
	got := strings.Join([]string{p.Tree, strings.Join(p.Parents, " "), p.Author.Name, p.Author.Email, fmt.Sprint(p.Author.When.Unix()), p.Committer.Name, p.Committer.Email, fmt.Sprint(p.Committer.When.Unix())}, "\n")
	if diff := cmp.Diff(w.git("show", "-s", "--format=%T%n%P%n%an%n%ae%n%at%n%cn%n%ce%n%ct", id), got); diff != "" {
		t.Error(diff)
	}
	raw := w.git("cat-file", "commit", id)
	_, message, _ := strings.Cut(raw, "\n\n")
	if strings.TrimRight(message, "\n") != strings.TrimRight(p.Message, "\n") {
		t.Errorf("message %q, git has %q", p.Message, message)
	}
}

// TestT03EveryByte breaks every byte of a signed commit, and every prefix of it.
func TestT03EveryByte(t *testing.T) {
	w := newWorld(t, nil)
	raw := w.commit("alice", "", "whole").Raw
	if _, err := judgeRaw(raw); err != nil {
		t.Fatal(err)
	}
	for i := range raw {
		broken := bytes.Clone(raw)
		broken[i] ^= 0x01
		if _, err := judgeRaw(broken); refusal.Of(err) == nil {
			t.Errorf("byte %d changed from %q to %q: %v", i, raw[i], broken[i], err)
		}
		if _, err := judgeRaw(raw[:i]); refusal.Of(err) == nil {
			t.Errorf("the first %d bytes alone: %v", i, err)
		}
	}
}

func TestSignCommit(t *testing.T) {
	w := newWorld(t, nil)
	w.commit("alice", "", "begin")
	w.keygen("rsa", "-t", "rsa", "-b", "3072")
	for _, name := range []string{"alice", "rsa"} {
		signed, err := SignCommit(w.unsigned("by hand\n"), w.keys[name])
		if err != nil {
			t.Fatal(err)
		}
		if _, err := judgeRaw(signed); err != nil {
			t.Error(err)
		}
		id := w.write(signed).ID
		if out, err := w.tryGit(nil, "-c", "gpg.ssh.allowedSignersFile="+w.signers(name), "verify-commit", id); err != nil {
			t.Errorf("git refuses what %s signed: %s", name, out)
		}
	}
	w.keygen("small", "-t", "rsa", "-b", "2048")
	if _, err := SignCommit(w.unsigned("x\n"), w.keys["small"]); codeOf(err) != "E_ALG_FORBIDDEN" {
		t.Error("signing with a key that is not allowed:", err)
	}
}

func TestLoadKey(t *testing.T) {
	w := newWorld(t, nil)
	out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", w.keyFile("locked")).CombinedOutput()
	if err != nil {
		t.Fatal(err, string(out))
	}
	if _, err := signature.LoadKey(w.keyFile("locked"), nil); err == nil {
		t.Error("an encrypted key opens without a passphrase")
	}
	if _, err := signature.LoadKey(w.keyFile("locked"), func() ([]byte, error) { return []byte("wrong"), nil }); err == nil {
		t.Error("an encrypted key opens with a wrong passphrase")
	}
	if _, err := signature.LoadKey(w.keyFile("locked"), func() ([]byte, error) { return []byte("secret"), nil }); err != nil {
		t.Error(err)
	}
	if _, err := signature.LoadKey(filepath.Join(t.TempDir(), "none"), nil); !errors.Is(err, fs.ErrNotExist) {
		t.Error("a key file that is not there:", err)
	}
	w.keygen("weak", "-t", "ecdsa", "-b", "521")
	if _, err := signature.LoadPrivateKey(w.keyFile("weak"), nil); codeOf(err) != "E_ALG_FORBIDDEN" {
		t.Error("a key that is not allowed:", err)
	}
}

func TestU39OutsideText(t *testing.T) {
	for _, raw := range []string{
		"tree \x1b[2J\n",
		"tree " + strings.Repeat("a", 40) + "\nauthor \x1b]0;title\a <x@y> 1 +0000" + strings.Repeat("x", 5000) + "\n",
		"\u009b31m" + strings.Repeat("x", 5000),
	} {
		_, err := ParseCommit([]byte(raw))
		if err == nil || len(err.Error()) > 500 || strings.ContainsAny(err.Error(), "\x1b\a\u009b\n") {
			t.Errorf("%q", err)
		}
	}
}

func TestTrailers(t *testing.T) {
	for message, want := range map[string][]string{
		"Title\n\nBody\n\nKmo-Reverts: a..b\nKmo-Host: x\n":      {"a..b"},
		"Title\n\nKmo-Reverts: a..b\nKmo-Reverts: c..d\n":        {"a..b", "c..d"},
		"Kmo-Reverts: a..b\n":                                    nil,
		"Title\n\nKmo-Reverts: a..b\n\nnot the last paragraph\n": nil,
		"Title\n\nKmo-Reverts: a..b\nnot a trailer\n":            nil,
		"Title\n\nKmo-Reverts:a..b\n":                            nil,
		"":                                                       nil,
		"Title\n\nkmo-reverts: a..b\n":                           nil,
	} {
		if diff := cmp.Diff(want, Parsed{Message: message}.Trailers(TrailerReverts)); diff != "" {
			t.Errorf("%q: %s", message, diff)
		}
	}
}

func FuzzU44ParseCommit(f *testing.F) {
	f.Add([]byte("tree 4b825dc642cb6eb9a060e54bf8d69288fbee4904\nauthor x <x@y> 1 +0000\ncommitter x <x@y> 1 +0000\n\nm\n"))
	f.Add([]byte("tree 4b825dc642cb6eb9a060e54bf8d69288fbee4904\nauthor x <x@y> 1 +0000\ncommitter x <x@y> 1 +0000\ngpgsig -----BEGIN SSH SIGNATURE-----\n AAAA\n -----END SSH SIGNATURE-----\n\nm\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		p, err := ParseCommit(raw)
		if err != nil {
			if refusal.Of(err) == nil {
				t.Fatal("no refusal:", err)
			}
			return
		}
		// One object has one spelling: what was parsed gives the same bytes back.
		again := p.Payload
		if p.Signature != "" {
			again = signAs(p.Payload, p.Signature)
		}
		if !bytes.Equal(again, raw) {
			t.Fatalf("%q comes back as %q", raw, again)
		}
	})
}

func FuzzU44Envelope(f *testing.F) {
	f.Add([]byte(`{"payload":"e30=","payloadType":"application/vnd.kmo.root.v1+json","signatures":[{"keyid":"","sig":"AAAA"}]}`))
	f.Fuzz(func(t *testing.T, file []byte) {
		if _, err := ParseRoot(file); refusal.Of(err) == nil {
			t.Fatal("an unsigned root is taken:", err)
		}
	})
}
