package signature

import (
	"bytes"
	"crypto"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
	openpgp "github.com/ProtonMail/go-crypto/openpgp/v2"
	"golang.org/x/crypto/ssh"

	"github.com/kindos/kmo/policy/refusal"
)

const (
	openpgpType    = "openpgp" // of a key's line: "openpgp <base64 of one transferable public key>"
	pgpBegin       = "-----BEGIN PGP SIGNATURE-----\n\n"
	pgpEnd         = "\n-----END PGP SIGNATURE-----\n"
	maxCertificate = 64 << 10
)

// Certificate is an OpenPGP key with its subkeys, as a trust root pins it: it is known by the fingerprint of its primary key. It stands where SSH
// keys stand, and verifies no SSH signature.
type Certificate struct {
	raw    []byte
	entity *openpgp.Entity // read anew for each verification, for it remembers what was good at another time
}

// Type is "openpgp".
func (c *Certificate) Type() string { return openpgpType }

// Marshal is all its bytes, so that ssh.MarshalAuthorizedKey writes the line that ParseKey reads.
func (c *Certificate) Marshal() []byte { return c.raw }

// Verify refuses: no SSH signature is by such a key.
func (c *Certificate) Verify([]byte, *ssh.Signature) error {
	return errors.New("an OpenPGP key makes no SSH signatures")
}

// id is "openpgp:" and the fingerprint of the primary key.
func (c *Certificate) id() string {
	return openpgpType + ":" + strings.ToUpper(hex.EncodeToString(c.entity.PrimaryKey.Fingerprint))
}

// ReadCertificate reads what `gpg --export` writes, armoured or not.
func ReadCertificate(file []byte) (*Certificate, error) {
	if bytes.HasPrefix(file, []byte("-----BEGIN PGP PUBLIC KEY BLOCK-----")) {
		block, err := armor.Decode(bytes.NewReader(file))
		if err != nil {
			return nil, fmt.Errorf("an OpenPGP key: %v", err)
		}
		if file, err = io.ReadAll(io.LimitReader(block.Body, maxCertificate+1)); err != nil {
			return nil, fmt.Errorf("an OpenPGP key: %v", err)
		}
	}
	return parseCertificate(base64.StdEncoding.EncodeToString(file))
}

// parseCertificate reads the base64 of exactly one public key whose primary key is of an allowed kind.
func parseCertificate(text string) (c *Certificate, err error) {
	defer caught(&err)
	raw, err := base64.StdEncoding.Strict().DecodeString(text)
	if err != nil || len(raw) > maxCertificate {
		return nil, fmt.Errorf("an OpenPGP key that is no base64 of at most %d bytes", maxCertificate)
	}
	packets := packet.NewReader(bytes.NewReader(raw))
	entity, err := openpgp.ReadEntity(packets)
	if err != nil {
		return nil, fmt.Errorf("an OpenPGP key that does not parse: %v", err)
	}
	if _, err := packets.Next(); err == nil || entity.PrivateKey != nil || entity.PrimaryKey.Version != 4 {
		return nil, errors.New("an OpenPGP key: want one public key of version 4 and nothing else")
	}
	c = &Certificate{raw, entity}
	return c, allowedOpenPGP(entity.PrimaryKey, c.id())
}

func allowedOpenPGP(key *packet.PublicKey, subject string) error {
	got := fmt.Sprintf("OpenPGP algorithm %d", key.PubKeyAlgo)
	switch key.PubKeyAlgo {
	case packet.PubKeyAlgoRSA, packet.PubKeyAlgoRSASignOnly:
		bits, err := key.BitLength()
		if err == nil && bits >= minRSA && bits <= maxRSA {
			return nil
		}
		got = fmt.Sprintf("rsa with %d bits", bits)
	case packet.PubKeyAlgoEd25519:
		return nil
	case packet.PubKeyAlgoECDSA, packet.PubKeyAlgoEdDSA:
		curve, err := key.Curve()
		if err == nil && (curve == packet.Curve25519 || curve == packet.CurveNistP256 || curve == packet.CurveNistP384) {
			return nil
		}
		got = fmt.Sprintf("curve %q", curve)
	}
	return forbidden(subject, got)
}

// openpgpSignature is a signature by a key of a certificate, to be judged at a time.
type openpgpSignature struct {
	*packet.Signature
	by  *Certificate
	now time.Time // zero: only whether that key made it, whatever has become of the key
}

// IsOpenPGP says whether an armoured signature claims to be an OpenPGP one.
func IsOpenPGP(armoured string) bool { return strings.HasPrefix(armoured, pgpBegin) }

// ParseOpenPGP reads an armoured OpenPGP signature over a message by one of the certificates: one block and one packet, version 4, over bytes as
// they are, naming its key by fingerprint. now is the trusted time at which Verify judges the key; the time in the signature is its maker's claim.
func ParseOpenPGP(message []byte, armoured string, by []*Certificate, now time.Time, subject string) (*Signature, error) {
	blob, err := unarmourOpenPGP(armoured, subject)
	if err != nil {
		return nil, err
	}
	sig, err := readSignature(blob)
	if err != nil || sig.Version != 4 || sig.SigType != packet.SigTypeBinary || len(sig.IssuerFingerprint) != 20 {
		return nil, bad(subject, "no OpenPGP signature of version 4 over bytes that names its key by fingerprint")
	}
	if !allowedHash(sig.Hash) {
		return nil, forbidden(subject, fmt.Sprintf("an OpenPGP signature with hash %v", sig.Hash))
	}
	for _, c := range by {
		if key, _ := c.key(sig.IssuerFingerprint); key != nil {
			return &Signature{key: c, message: message, subject: subject, pgp: &openpgpSignature{sig, c, now}}, nil
		}
	}
	return nil, &refusal.Error{Code: "E_SIG_UNKNOWN_KEY", Subject: subject, Got: fmt.Sprintf("OpenPGP key %X", sig.IssuerFingerprint), Want: "a key of the trust root, or a signing subkey of one"}
}

func readSignature(blob []byte) (sig *packet.Signature, err error) {
	defer caught(&err)
	p, err := packet.NewReader(bytes.NewReader(blob)).Next()
	sig, ok := p.(*packet.Signature)
	if err == nil && !ok {
		err = errors.New("another packet")
	}
	return sig, err
}

// caught makes an error of a panic: the library has had some over bytes from outside.
func caught(err *error) {
	if fault := recover(); fault != nil {
		*err = fmt.Errorf("OpenPGP: %v", fault)
	}
}

func allowedHash(hash crypto.Hash) bool {
	return hash == crypto.SHA256 || hash == crypto.SHA384 || hash == crypto.SHA512
}

// key finds a key of the certificate by its fingerprint; the subkey is nil where it is the primary one.
func (c *Certificate) key(fingerprint []byte) (*packet.PublicKey, *openpgp.Subkey) {
	if bytes.Equal(c.entity.PrimaryKey.Fingerprint, fingerprint) {
		return c.entity.PrimaryKey, nil
	}
	for i := range c.entity.Subkeys {
		if sub := &c.entity.Subkeys[i]; bytes.Equal(sub.PublicKey.Fingerprint, fingerprint) {
			return sub.PublicKey, sub
		}
	}
	return nil, nil
}

// verify checks that the key made the signature, and that the key was good when it says so and is good now.
func (s *openpgpSignature) verify(message []byte) (err error) {
	defer caught(&err)
	c, err := parseCertificate(base64.StdEncoding.EncodeToString(s.by.raw))
	if err != nil {
		return err
	}
	key, sub := c.key(s.IssuerFingerprint)
	if err := allowedOpenPGP(key, c.id()); err != nil {
		return err
	}
	h, err := s.PrepareVerify()
	if err != nil {
		return err
	}
	h.Write(message) // a hash takes everything
	if err := key.VerifySignature(h, s.Signature); err != nil || s.now.IsZero() {
		return err
	}
	for _, notation := range s.Notations {
		if notation.IsCritical {
			return fmt.Errorf("critical notation %q", refusal.Clip(notation.Name, 40))
		}
	}
	if s.SigExpired(s.now) {
		return errors.New("the signature has expired, or is from the future")
	}
	for _, at := range []time.Time{s.CreationTime, s.now} {
		if c, err = parseCertificate(base64.StdEncoding.EncodeToString(s.by.raw)); err != nil {
			return err
		}
		if sub != nil {
			_, sub = c.key(s.IssuerFingerprint)
		}
		if err := c.good(sub, at); err != nil {
			return fmt.Errorf("at %s: %v", at.UTC().Format(time.RFC3339), err)
		}
	}
	return nil
}

// good says whether the primary key, or the subkey where there is one, may sign at a time: not expired, never revoked, with flags that say so, and a
// subkey bound by the primary key and to it, by signatures that are not weak.
func (c *Certificate) good(sub *openpgp.Subkey, at time.Time) error {
	weak := map[crypto.Hash]bool{}
	for h := crypto.MD4; h <= crypto.BLAKE2b_512; h++ {
		weak[h] = !allowedHash(h)
	}
	if c.revoked(sub) {
		return errors.New("it is revoked")
	}
	config := &packet.Config{Time: func() time.Time { return at }, RejectHashAlgorithms: weak, RejectMessageHashAlgorithms: weak, MinRSABits: minRSA}
	self, err := c.entity.VerifyPrimaryKey(at, config)
	if err != nil {
		return fmt.Errorf("its primary key: %v", err)
	}
	if c.entity.PrimaryKey.CreationTime.After(at) {
		return errors.New("its primary key has not begun")
	}
	if sub != nil {
		if self, err = sub.Verify(at, config); err != nil {
			return fmt.Errorf("its subkey: %v", err)
		}
		if sub.PublicKey.CreationTime.After(at) {
			return errors.New("its subkey has not begun")
		}
		if self.EmbeddedSignature == nil || !allowedHash(self.EmbeddedSignature.Hash) {
			return errors.New("its subkey is not bound back to the primary key")
		}
	}
	if !self.FlagsValid || !self.FlagSign {
		return errors.New("it is no key for signing")
	}
	return nil
}

// revoked says whether the key has revoked itself or that subkey, for whatever reason, at whatever time.
func (c *Certificate) revoked(sub *openpgp.Subkey) bool {
	for _, r := range c.entity.Revocations {
		if c.entity.PrimaryKey.VerifyRevocationSignature(r.Packet) == nil {
			return true
		}
	}
	if sub == nil {
		return false
	}
	return slices.ContainsFunc(sub.Revocations, func(r *packet.VerifiableSignature) bool {
		return c.entity.PrimaryKey.VerifySubkeyRevocationSignature(r.Packet, sub.PublicKey) == nil
	})
}

// unarmourOpenPGP reads exactly one block without headers, whose checksum is right where it has one, and in it exactly one signature packet.
func unarmourOpenPGP(text, subject string) ([]byte, error) {
	body, ok1 := strings.CutPrefix(text, pgpBegin)
	body, ok2 := strings.CutSuffix(body, pgpEnd)
	body, check, summed := strings.Cut(body, "\n=")
	blob, err := base64.StdEncoding.Strict().DecodeString(strings.ReplaceAll(body, "\n", ""))
	if !ok1 || !ok2 || err != nil || strings.Contains(body, "\n\n") || len(blob) > maxSignature || summed && check != checksum(blob) {
		return nil, &refusal.Error{Code: "E_SIG_BAD", Subject: subject, Got: "a broken armour", Want: "one PGP SIGNATURE block without headers and nothing else"}
	}
	if !onePacket(blob) {
		return nil, bad(subject, "an OpenPGP block with more or less than one signature packet")
	}
	return blob, nil
}

// checksum is the CRC-24 of RFC 9580, section 6.1.1, in base64.
func checksum(blob []byte) string {
	crc := uint32(0xb704ce)
	for _, b := range blob {
		crc ^= uint32(b) << 16
		for range 8 {
			if crc <<= 1; crc&0x1000000 != 0 {
				crc ^= 0x1864cfb
			}
		}
	}
	return base64.StdEncoding.EncodeToString([]byte{byte(crc >> 16), byte(crc >> 8), byte(crc)})
}

// onePacket says whether all bytes are one signature packet, with a header of RFC 9580, section 4.2, that says how long it is.
func onePacket(b []byte) bool {
	if len(b) < 3 {
		return false
	}
	n, size := len(b), 0
	switch {
	case b[0] == 0xc2 && b[1] < 192: // the form of today
		size = 2 + int(b[1])
	case b[0] == 0xc2 && b[1] < 224:
		size = 3 + (int(b[1])-192)<<8 + int(b[2]) + 192
	case b[0] == 0x88: // the older one, which gpg writes
		size = 2 + int(b[1])
	case b[0] == 0x89:
		size = 3 + int(b[1])<<8 + int(b[2])
	}
	return size == n
}
