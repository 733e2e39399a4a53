package trust

import (
	"bytes"
	"context"
	"crypto"
	_ "crypto/sha1"
	"encoding/base64"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
	openpgp "github.com/ProtonMail/go-crypto/openpgp/v2"

	"github.com/kindos/kmo/policy/trust/signature"
)

// unsalted leaves out a notation that is made for the good hashes only.
var unsalted = &packet.Config{NonDeterministicSignaturesViaNotation: packet.BoolPointer(false)}

// pgpWorld is a world with OpenPGP keys; gpg, where it is there, is asked too.
type pgpWorld struct {
	*world
	now  time.Time
	home string // of gpg, "" without it
}

func newPGPWorld(t *testing.T) *pgpWorld {
	w := &pgpWorld{world: newWorld(t, nil), now: time.Now().Truncate(time.Second)}
	w.commit("alice", "", "begin")
	if _, err := exec.LookPath("gpg"); err == nil {
		w.home = filepath.Join(w.dir, "gnupg")
		if err := os.Mkdir(w.home, 0o700); err != nil {
			t.Fatal(err)
		}
		t.Setenv("GNUPGHOME", w.home)
	}
	return w
}

// entity makes a key that began that long ago.
func (w *pgpWorld) entity(ago time.Duration, alter func(*packet.Config)) *openpgp.Entity {
	w.t.Helper()
	config := &packet.Config{Algorithm: packet.PubKeyAlgoEdDSA, Time: func() time.Time { return w.now.Add(-ago) }}
	if alter != nil {
		alter(config)
	}
	e, err := openpgp.NewEntity("Ann", "", "ann@kos.dev", config)
	if err != nil {
		w.t.Fatal(err)
	}
	return e
}

// subkey adds a signing subkey and returns its private key.
func (w *pgpWorld) subkey(e *openpgp.Entity, alter func(*packet.Config), bind func(*openpgp.Subkey)) *packet.PrivateKey {
	w.t.Helper()
	config := &packet.Config{Algorithm: packet.PubKeyAlgoEdDSA, Time: func() time.Time { return e.PrimaryKey.CreationTime }}
	if alter != nil {
		alter(config)
	}
	if err := e.AddSigningSubkey(config); err != nil {
		w.t.Fatal(err)
	}
	sub := &e.Subkeys[len(e.Subkeys)-1]
	if bind != nil {
		bind(sub)
		if err := sub.Bindings[0].Packet.SignKey(sub.PublicKey, e.PrivateKey, nil); err != nil {
			w.t.Fatal(err)
		}
	}
	return sub.PrivateKey
}

func export(t testing.TB, e *openpgp.Entity) []byte {
	t.Helper()
	var raw bytes.Buffer
	if err := e.Serialize(&raw); err != nil {
		t.Fatal(err)
	}
	return raw.Bytes()
}

func pgpArmour(t testing.TB, blob []byte, headers map[string]string) string {
	t.Helper()
	var text strings.Builder
	a, err := armor.EncodeWithChecksumOption(&text, "PGP SIGNATURE", headers, true)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Write(blob); err != nil {
		t.Fatal(err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	return text.String() + "\n"
}

// sign makes the packet of a signature, ten minutes ago if alter does not say otherwise.
func (w *pgpWorld) pgpSign(payload []byte, key *packet.PrivateKey, alter func(*packet.Signature)) []byte {
	w.t.Helper()
	s := &packet.Signature{Version: 4, SigType: packet.SigTypeBinary, PubKeyAlgo: key.PubKeyAlgo, Hash: crypto.SHA256, CreationTime: w.now.Add(-10 * time.Minute), IssuerKeyId: &key.KeyId}
	if alter != nil {
		alter(s)
	}
	h := s.Hash.New()
	h.Write(payload)
	if err := s.Sign(h, key, unsalted); err != nil {
		w.t.Fatal(err)
	}
	var blob bytes.Buffer
	if err := s.Serialize(&blob); err != nil {
		w.t.Fatal(err)
	}
	return blob.Bytes()
}

// pgpRoot is a root in which ann's commits are signed with that key.
func (w *pgpWorld) pgpRoot(raw []byte) *Root {
	r := w.root
	r.Principals = append(r.Principals[:len(r.Principals):len(r.Principals)], Principal{
		Name: "ann", Class: "human", Emails: []string{"ann@kos.dev"}, Keys: []Key{{Public: "openpgp " + base64.StdEncoding.EncodeToString(raw), Uses: []string{RoleCommit}}},
	})
	r.Roles = append([]Role{}, r.Roles...)
	for i, role := range r.Roles {
		if role.Name == RoleCommit {
			r.Roles[i].Members = append(role.Members[:len(role.Members):len(role.Members)], "ann")
		}
	}
	return &r
}

// judge is what signer does with a head.
func (w *pgpWorld) judge(r *Root, raw []byte) error {
	_, signed, err := r.openCommit(raw, "commit", w.now)
	if err != nil {
		return err
	}
	if _, err := r.allowed(signed.Key(), RoleCommit, w.now, "commit"); err != nil {
		return err
	}
	return signed.Verify()
}

// gpgTakes says whether git and gpg take a commit, with the key imported.
func (w *pgpWorld) gpgTakes(raw, key []byte) bool {
	w.t.Helper()
	cmd := exec.Command("gpg", "--batch", "--quiet", "--import")
	cmd.Stdin = bytes.NewReader(key)
	if out, err := cmd.CombinedOutput(); err != nil {
		w.t.Logf("gpg --import: %v, %s", err, out)
	}
	id, err := w.tryGit(raw, "hash-object", "-t", "commit", "-w", "--stdin", "--literally")
	if err != nil {
		w.t.Fatal(err, id)
	}
	out, err := w.tryGit(nil, "verify-commit", strings.TrimSpace(id))
	if err == nil {
		return true
	}
	w.t.Logf("%s", out)
	return false
}

// pgpCase is one key with one signature of it.
type pgpCase struct {
	name string
	make func(w *pgpWorld, payload []byte) (key []byte, armoured string)
	code string // "" if it is good
	text string // of the refusal
	only bool   // gpg may take it
}

// plain is a key whose primary key signs.
func plain(alter func(*packet.Config), sign func(*packet.Signature)) func(*pgpWorld, []byte) ([]byte, string) {
	return func(w *pgpWorld, payload []byte) ([]byte, string) {
		e := w.entity(time.Hour, alter)
		return export(w.t, e), pgpArmour(w.t, w.pgpSign(payload, e.PrivateKey, sign), nil)
	}
}

// withSubkey is a key whose subkey signs.
func withSubkey(alter func(*packet.Config), bind func(*openpgp.Subkey), after func(*openpgp.Entity)) func(*pgpWorld, []byte) ([]byte, string) {
	return func(w *pgpWorld, payload []byte) ([]byte, string) {
		e := w.entity(time.Hour, nil)
		key := w.subkey(e, alter, bind)
		if after != nil {
			after(e)
		}
		return export(w.t, e), pgpArmour(w.t, w.pgpSign(payload, key, nil), nil)
	}
}

func blob(change func(t testing.TB, blob []byte) string) func(*pgpWorld, []byte) ([]byte, string) {
	return func(w *pgpWorld, payload []byte) ([]byte, string) {
		e := w.entity(time.Hour, nil)
		return export(w.t, e), change(w.t, w.pgpSign(payload, e.PrivateKey, nil))
	}
}

func rsaBits(bits int) func(*packet.Config) {
	return func(c *packet.Config) { c.Algorithm, c.RSABits = packet.PubKeyAlgoRSA, bits }
}

func curve(name packet.Curve) func(*packet.Config) {
	return func(c *packet.Config) { c.Algorithm, c.Curve = packet.PubKeyAlgoECDSA, name }
}

func revoke(reason packet.ReasonForRevocation, sub bool) func(*openpgp.Entity) {
	return func(e *openpgp.Entity) {
		err := error(nil)
		if sub {
			err = e.Subkeys[len(e.Subkeys)-1].Revoke(reason, "", nil)
		} else {
			err = e.Revoke(reason, "", nil)
		}
		if err != nil {
			panic(err)
		}
	}
}

func pgpCases() []pgpCase {
	seconds := func(n uint32) *uint32 { return &n }
	return []pgpCase{
		{name: "ed25519", make: plain(nil, nil)},
		{name: "rsa 3072", make: plain(rsaBits(3072), nil)},
		{name: "ecdsa p256", make: plain(curve(packet.CurveNistP256), nil)},
		{name: "ecdsa p384 with SHA-512", make: plain(curve(packet.CurveNistP384), func(s *packet.Signature) { s.Hash = crypto.SHA512 })},
		{name: "a signing subkey", make: withSubkey(nil, nil, nil)},
		{name: "T07 rsa 2048", make: plain(rsaBits(2048), nil), code: "E_ALG_FORBIDDEN", only: true},
		{name: "ecdsa p521", make: plain(curve(packet.CurveNistP521), func(s *packet.Signature) { s.Hash = crypto.SHA512 }), code: "E_ALG_FORBIDDEN", only: true},
		{name: "T07 SHA-1", make: plain(nil, func(s *packet.Signature) { s.Hash = crypto.SHA1 }), code: "E_ALG_FORBIDDEN", text: "SHA-1", only: true},
		{name: "T07 subkey rsa 2048", make: withSubkey(rsaBits(2048), nil, nil), code: "E_SIG_BAD", text: "2048", only: true},
		{name: "T07 U-24 self-signature with SHA-1", make: weakSelf, code: "E_SIG_BAD", text: "primary key", only: true},
		{name: "U-24 text signature", make: plain(nil, func(s *packet.Signature) { s.SigType = packet.SigTypeText }), code: "E_SIG_BAD", only: true},
		{name: "U-24 signature that has expired", make: plain(nil, func(s *packet.Signature) { s.SigLifetimeSecs = seconds(60) }), code: "E_SIG_BAD", text: "expired"},
		{name: "signature from the future", make: plain(nil, func(s *packet.Signature) { s.CreationTime = time.Now().Add(24 * time.Hour) }), code: "E_SIG_BAD", text: "future", only: true},
		{name: "signature from before the key", make: plain(nil, func(s *packet.Signature) { s.CreationTime = time.Now().Add(-24 * time.Hour) }), code: "E_SIG_BAD", text: "primary key"},
		{name: "U-24 key that has expired since", make: plain(func(c *packet.Config) { c.KeyLifetimeSecs = 55 * 60 }, nil), code: "E_SIG_BAD", text: "key expired"},
		{name: "U-24 subkey that has expired since", make: withSubkey(func(c *packet.Config) { c.KeyLifetimeSecs = 55 * 60 }, nil, nil), code: "E_SIG_BAD", text: "key expired"},
		{name: "key revoked as compromised", make: withSubkey(nil, nil, revoke(packet.KeyCompromised, false)), code: "E_SIG_BAD", text: "revoked"},
		{name: "key revoked as retired", make: withSubkey(nil, nil, revoke(packet.KeyRetired, false)), code: "E_SIG_BAD", text: "revoked"},
		{name: "subkey revoked as compromised", make: withSubkey(nil, nil, revoke(packet.KeyCompromised, true)), code: "E_SIG_BAD", text: "revoked"},
		{name: "subkey revoked as superseded", make: withSubkey(nil, nil, revoke(packet.KeySuperseded, true)), code: "E_SIG_BAD", text: "revoked"},
		{name: "U-24 subkey that is not bound back", make: withSubkey(nil, func(s *openpgp.Subkey) { s.Bindings[0].Packet.EmbeddedSignature = nil }, nil), code: "E_SIG_BAD", text: "binding"},
		{name: "subkey whose flags are not for signing", make: withSubkey(nil, func(s *openpgp.Subkey) { s.Bindings[0].Packet.FlagSign = false }, nil), code: "E_SIG_BAD", text: "no key for signing", only: true},
		{name: "U-24 subkey of another key", make: adopted, code: "E_SIG_BAD", text: "binding"},
		{name: "T02 unknown key", make: stranger, code: "E_SIG_UNKNOWN_KEY"},
		{name: "another message", make: func(w *pgpWorld, payload []byte) ([]byte, string) {
			return plain(nil, nil)(w, append([]byte("x"), payload...))
		}, code: "E_SIG_BAD"},
		{name: "critical notation", make: plain(nil, func(s *packet.Signature) {
			s.Notations = []*packet.Notation{{Name: "a@kos.dev", Value: []byte("x"), IsCritical: true, IsHumanReadable: true}}
		}), code: "E_SIG_BAD", text: "notation"},
		{name: "T06 U-24 two signatures", make: blob(func(t testing.TB, b []byte) string { return pgpArmour(t, append(bytes.Clone(b), b...), nil) }), code: "E_SIG_BAD", text: "more or less than one", only: true},
		{name: "U-24 packet after the signature", make: blob(func(t testing.TB, b []byte) string {
			return pgpArmour(t, append(bytes.Clone(b), 0xca, 3, 'P', 'G', 'P'), nil)
		}), code: "E_SIG_BAD", only: true},
		{name: "wrong checksum", make: blob(func(t testing.TB, b []byte) string {
			text := pgpArmour(t, b, nil)
			at := strings.LastIndex(text, "\n=") + 2
			return text[:at] + "AAAA" + text[at+4:]
		}), code: "E_SIG_BAD", text: "armour"},
		{name: "armour with a header", make: blob(func(t testing.TB, b []byte) string { return pgpArmour(t, b, map[string]string{"Comment": "x"}) }), code: "E_ALG_FORBIDDEN", only: true},
		{name: "text after the block", make: blob(func(t testing.TB, b []byte) string { return pgpArmour(t, b, nil) + "x\n" }), code: "E_SIG_BAD", text: "armour", only: true},
	}
}

// weakSelf is a key whose binding of its name is over SHA-1.
func weakSelf(w *pgpWorld, payload []byte) ([]byte, string) {
	e := w.entity(time.Hour, nil)
	for _, identity := range e.Identities {
		s := identity.SelfCertifications[0].Packet
		s.Hash = crypto.SHA1
		if err := s.SignUserId(identity.UserId.Id, e.PrimaryKey, e.PrivateKey, unsalted); err != nil {
			w.t.Fatal(err)
		}
	}
	return export(w.t, e), pgpArmour(w.t, w.pgpSign(payload, e.PrivateKey, nil), nil)
}

// adopted is a key that claims a stranger's subkey as its own, whose binding back is to the stranger.
func adopted(w *pgpWorld, payload []byte) ([]byte, string) {
	e, other := w.entity(time.Hour, nil), w.entity(time.Hour, nil)
	key := w.subkey(other, nil, nil)
	sub := other.Subkeys[len(other.Subkeys)-1]
	if err := sub.Bindings[0].Packet.SignKey(sub.PublicKey, e.PrivateKey, nil); err != nil {
		w.t.Fatal(err)
	}
	sub.Primary = e
	e.Subkeys = append(e.Subkeys, sub)
	return export(w.t, e), pgpArmour(w.t, w.pgpSign(payload, key, nil), nil)
}

func stranger(w *pgpWorld, payload []byte) ([]byte, string) {
	_, text := plain(nil, nil)(w, payload)
	return export(w.t, w.entity(time.Hour, nil)), text
}

// TestU24OpenPGP holds OpenPGP signatures of commits against a root that pins their key, and, where there is gpg, against git verify-commit.
func TestU24OpenPGP(t *testing.T) {
	w := newPGPWorld(t)
	for _, c := range pgpCases() {
		t.Run(c.name, func(t *testing.T) {
			defer func(outer testing.TB) { w.t = outer }(w.t)
			w.t = t
			unsigned := w.unsigned("a message\n")
			key, armoured := c.make(w, unsigned)
			raw := signAs(unsigned, armoured)
			_, err := signature.ReadCertificate(key)
			if err == nil {
				err = w.judge(w.pgpRoot(key), raw)
			}
			if got := codeOf(err); got != c.code || err != nil && got == "" || c.text != "" && !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %v, want %q with %q", err, c.code, c.text)
			}
			if w.home == "" {
				return
			}
			if takes := w.gpgTakes(raw, key); c.code == "" && !takes || c.code != "" && takes && !c.only {
				t.Errorf("git and gpg say %v, here %v", takes, err)
			}
		})
	}
}

// TestOpenPGPIsOff: a root without such a key takes none, and one with a key for more than commits is no root.
func TestOpenPGPIsOff(t *testing.T) {
	w := newPGPWorld(t)
	unsigned := w.unsigned("a message\n")
	key, armoured := plain(nil, nil)(w, unsigned)
	if err := w.judge(&w.root, signAs(unsigned, armoured)); codeOf(err) != "E_ALG_FORBIDDEN" {
		t.Error("without a key:", err)
	}
	r := w.pgpRoot(key)
	r.Principals[len(r.Principals)-1].Keys[0].Revoked = &Revoked{Reason: "lost", Rebad: true}
	if err := w.judge(r, signAs(unsigned, armoured)); codeOf(err) != "E_KEY_REVOKED" {
		t.Error("with a revoked key:", err)
	}
	if why := r.burns(Commit{Raw: signAs(unsigned, armoured)}); !strings.Contains(why, "lost") {
		t.Errorf("what a key signed that is revoked with all that it signed: %q", why)
	}
	r = w.pgpRoot(key)
	r.Principals[len(r.Principals)-1].Keys[0].Uses = []string{RoleCommit, RoleApprove}
	if _, err := SignRoot(*r, w.keys["alice"]); codeOf(err) != "E_ROOT_INVALID" || !strings.Contains(err.Error(), "commit alone") {
		t.Error("with an approver's key:", err)
	}
	for name, bad := range map[string][]byte{"two keys": append(bytes.Clone(key), key...), "bytes after it": append(bytes.Clone(key), 0xff), "nothing": nil} {
		if _, err := signature.ReadCertificate(bad); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
}

// TestOpenPGPHead has a whole host take a head that ann signed with OpenPGP, and refuse one with a byte of it changed.
func TestOpenPGPHead(t *testing.T) {
	var e *openpgp.Entity
	w := &pgpWorld{now: day0}
	w.world = newWorld(t, func(inner *world, r *Root) {
		w.world = inner
		e = w.entity(time.Hour, nil)
		*r = *w.pgpRoot(export(t, e))
	})
	base := w.commit("alice", "", "begin")
	w.accept(Commit{}, base)
	unsigned := w.unsigned("by ann\n")
	raw := signAs(unsigned, pgpArmour(t, w.pgpSign(unsigned, e.PrivateKey, nil), nil))
	facts, err := w.v.Verify(context.Background(), base, w.write(raw), w)
	if err != nil || facts.Signer != "ann" || !strings.HasPrefix(facts.Key, "openpgp:") || len(facts.Key) != len("openpgp:")+40 {
		t.Errorf("got %+v, %v", facts, err)
	}
	w.refused(base, w.write(bytes.Replace(raw, []byte("by ann"), []byte("by ban"), 1)), "E_SIG_BAD")
}
