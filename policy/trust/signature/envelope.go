package signature

import (
	"encoding/base64"
	"encoding/json"
	"fmt"

	"golang.org/x/crypto/ssh"

	"github.com/kindos/kmo/policy/refusal"
)

// MaxEnvelope is how many bytes an envelope or its payload may have.
const MaxEnvelope = 1 << 20

const maxSignatures = 32 // of one envelope

// Purpose is what an envelope is for: its DSSE payload type, and the SSHSIG namespace of its signatures. Any other is refused.
type Purpose struct{ Type, Namespace string }

// Envelope is a DSSE envelope.
type Envelope struct {
	Payload     string              `json:"payload"` // standard base64
	PayloadType string              `json:"payloadType"`
	Signatures  []EnvelopeSignature `json:"signatures"`
}

// EnvelopeSignature is one of an envelope's signatures.
type EnvelopeSignature struct {
	KeyID string `json:"keyid"` // a hint, never believed: the key that signed is in the signature
	Sig   string `json:"sig"`   // standard base64 of an SSHSIG blob
}

// Sealed is an envelope of the right type, read but not yet verified. Its signatures may each be good or bad.
type Sealed struct {
	Payload []byte // the bytes that are verified are the bytes that are used

	purpose Purpose
	subject string
	hints   []string
	blobs   [][]byte
}

// Open reads an envelope of one purpose, which somebody has signed.
func Open(file []byte, purpose Purpose, subject string) (Sealed, error) {
	s, err := OpenDraft(file, purpose, subject)
	if err == nil && s.Len() == 0 {
		return Sealed{}, &refusal.Error{Code: "E_LIMIT", Subject: subject, Got: "0 signatures", Want: fmt.Sprintf("1 to %d", maxSignatures)}
	}
	return s, err
}

// OpenDraft reads an envelope that may lack signatures: all of them.
func OpenDraft(file []byte, purpose Purpose, subject string) (Sealed, error) {
	var e Envelope
	if err := Decode(file, &e, MaxEnvelope, subject); err != nil {
		return Sealed{}, err
	}
	if e.PayloadType != purpose.Type {
		return Sealed{}, &refusal.Error{Code: "E_PAYLOAD_TYPE", Subject: subject, Got: fmt.Sprintf("%q", refusal.Clip(e.PayloadType, 80)), Want: purpose.Type}
	}
	if n := len(e.Signatures); n > maxSignatures {
		return Sealed{}, &refusal.Error{Code: "E_LIMIT", Subject: subject, Got: fmt.Sprintf("%d signatures", n), Want: fmt.Sprintf("at most %d", maxSignatures)}
	}
	payload, err := base64.StdEncoding.Strict().DecodeString(e.Payload)
	if err != nil {
		return Sealed{}, undecoded(subject, "payload: "+err.Error(), "standard base64")
	}
	s := Sealed{Payload: payload, purpose: purpose, subject: subject}
	for _, one := range e.Signatures {
		blob, err := base64.StdEncoding.Strict().DecodeString(one.Sig)
		if err != nil {
			return Sealed{}, undecoded(subject, "sig: "+err.Error(), "standard base64")
		}
		s.hints = append(s.hints, one.KeyID)
		s.blobs = append(s.blobs, blob)
	}
	return s, nil
}

// Len is how many signatures there are.
func (s Sealed) Len() int { return len(s.blobs) }

// Signature reads the i'th signature, which is over the envelope's PAE.
func (s Sealed) Signature(i int) (*Signature, error) {
	signature, err := Parse(pae(s.purpose.Type, s.Payload), s.blobs[i], s.purpose.Namespace, s.subject)
	if err != nil {
		return nil, err
	}
	if id := signature.KeyID(); s.hints[i] != "" && s.hints[i] != id {
		return nil, bad(s.subject, fmt.Sprintf("key id %q on a signature of %s", refusal.Clip(s.hints[i], 60), id))
	}
	return signature, nil
}

// Seal signs a payload and returns the envelope's file; without signers it is a draft.
func Seal(payload []byte, purpose Purpose, signers ...ssh.Signer) ([]byte, error) {
	e := Envelope{Payload: base64.StdEncoding.EncodeToString(payload), PayloadType: purpose.Type, Signatures: []EnvelopeSignature{}}
	return e.sign(payload, purpose, signers)
}

// Cosign adds a signature to an envelope's file, over the same payload bytes.
func Cosign(file []byte, purpose Purpose, subject string, signer ssh.Signer) ([]byte, error) {
	s, err := OpenDraft(file, purpose, subject)
	if err != nil {
		return nil, err
	}
	var e Envelope
	if err := json.Unmarshal(file, &e); err != nil {
		return nil, err
	}
	return e.sign(s.Payload, purpose, []ssh.Signer{signer})
}

func (e *Envelope) sign(payload []byte, purpose Purpose, signers []ssh.Signer) ([]byte, error) {
	for _, signer := range signers {
		id := KeyID(signer.PublicKey())
		blob, err := Sign(pae(purpose.Type, payload), signer, purpose.Namespace)
		if err != nil {
			return nil, fmt.Errorf("signing with %s: %w", id, err)
		}
		e.Signatures = append(e.Signatures, EnvelopeSignature{KeyID: id, Sig: base64.StdEncoding.EncodeToString(blob)})
	}
	file, err := json.MarshalIndent(e, "", "  ")
	return append(file, '\n'), err
}

// pae is DSSE's pre-authentication encoding.
func pae(payloadType string, payload []byte) []byte {
	return append(fmt.Appendf(nil, "DSSEv1 %d %s %d ", len(payloadType), payloadType, len(payload)), payload...)
}
