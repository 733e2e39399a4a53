package trust

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"reflect"
	"strings"
	"unicode/utf8"

	"github.com/hiddeco/sshsig"
	"golang.org/x/crypto/ssh"

	"github.com/kindos/kmo/policy/refusal"
)

// The DSSE payload types, one a purpose; any other is refused.
const (
	typeRoot     = "application/vnd.kmo.root.v1+json"
	typeApproval = "application/vnd.kmo.approval.v1+json"
)

const (
	maxEnvelope   = 1 << 20 // bytes
	maxSignatures = 32      // of one envelope
	maxDepth      = 16      // of nested JSON
)

// envelope is a DSSE envelope.
type envelope struct {
	Payload     string              `json:"payload"` // standard base64
	PayloadType string              `json:"payloadType"`
	Signatures  []envelopeSignature `json:"signatures"`
}

type envelopeSignature struct {
	KeyID string `json:"keyid"` // a hint, never believed: the key that signed is in the signature
	Sig   string `json:"sig"`   // standard base64 of an SSHSIG blob
}

// sealed is an envelope of the right type, read but not yet verified. Its signatures may each be good or bad.
type sealed struct {
	payload   []byte // the bytes that are verified are the bytes that are used
	message   []byte // the PAE: what each signature covers
	namespace string
	hints     []string
	blobs     [][]byte
}

// openEnvelope reads an envelope of one payload type.
func openEnvelope(file []byte, payloadType, namespace, subject string) (sealed, error) {
	var e envelope
	if err := strictJSON(file, &e, subject); err != nil {
		return sealed{}, err
	}
	if e.PayloadType != payloadType {
		return sealed{}, &refusal.Error{Code: "E_PAYLOAD_TYPE", Subject: subject, Got: fmt.Sprintf("%q", refusal.Clip(e.PayloadType, 80)), Want: payloadType}
	}
	if n := len(e.Signatures); n == 0 || n > maxSignatures {
		return sealed{}, &refusal.Error{Code: "E_LIMIT", Subject: subject, Got: fmt.Sprintf("%d signatures", n), Want: fmt.Sprintf("1 to %d", maxSignatures)}
	}
	payload, err := base64.StdEncoding.Strict().DecodeString(e.Payload)
	if err != nil {
		return sealed{}, undecoded(subject, "payload: "+err.Error(), "standard base64")
	}
	s := sealed{payload: payload, message: pae(payloadType, payload), namespace: namespace}
	for _, one := range e.Signatures {
		blob, err := base64.StdEncoding.Strict().DecodeString(one.Sig)
		if err != nil {
			return sealed{}, undecoded(subject, "sig: "+err.Error(), "standard base64")
		}
		s.hints = append(s.hints, one.KeyID)
		s.blobs = append(s.blobs, blob)
	}
	return s, nil
}

// signature reads the i'th signature; it is verified by verifySignature against the message.
func (s sealed) signature(i int, subject string) (*sshsig.Signature, error) {
	signature, err := parseSignature(s.blobs[i], s.namespace, subject)
	if err != nil {
		return nil, err
	}
	if id := KeyID(signature.PublicKey); s.hints[i] != "" && s.hints[i] != id {
		return nil, badSignature(subject, fmt.Sprintf("key id %q on a signature of %s", refusal.Clip(s.hints[i], 60), id))
	}
	return signature, nil
}

// seal signs a payload and returns the envelope's file.
func seal(payload []byte, payloadType, namespace string, signers ...ssh.Signer) ([]byte, error) {
	e := envelope{Payload: base64.StdEncoding.EncodeToString(payload), PayloadType: payloadType}
	for _, signer := range signers {
		blob, err := sign(pae(payloadType, payload), signer, namespace)
		if err != nil {
			return nil, fmt.Errorf("signing with %s: %w", KeyID(signer.PublicKey()), err)
		}
		e.Signatures = append(e.Signatures, envelopeSignature{KeyID: KeyID(signer.PublicKey()), Sig: base64.StdEncoding.EncodeToString(blob)})
	}
	file, err := json.MarshalIndent(e, "", "  ")
	return append(file, '\n'), err
}

// pae is DSSE's pre-authentication encoding.
func pae(payloadType string, payload []byte) []byte {
	return append(fmt.Appendf(nil, "DSSEv1 %d %s %d ", len(payloadType), payloadType, len(payload)), payload...)
}

// strictJSON decodes one JSON value into a struct without maps: UTF-8, no duplicate, unknown or differently cased key, no null, integers only, at
// most 1 MiB and 16 levels, nothing after it.
func strictJSON(file []byte, into any, subject string) error {
	if len(file) > maxEnvelope {
		return &refusal.Error{Code: "E_LIMIT", Subject: subject, Got: fmt.Sprintf("%d bytes", len(file)), Want: fmt.Sprintf("at most %d", maxEnvelope)}
	}
	return decodeStrict(file, into, subject)
}

func decodeStrict(file []byte, into any, subject string) error {
	if !utf8.Valid(file) {
		return undecoded(subject, "bytes that are not UTF-8", "UTF-8 JSON")
	}
	w := walker{decoder: json.NewDecoder(bytes.NewReader(file)), known: map[string]bool{}}
	w.learn(reflect.TypeOf(into).Elem())
	w.decoder.UseNumber()
	if err := w.value(0); err != nil {
		return undecoded(subject, err.Error(), "strict JSON")
	}
	if _, err := w.decoder.Token(); err != io.EOF {
		return undecoded(subject, "bytes after the JSON value", "one value")
	}
	decoder := json.NewDecoder(bytes.NewReader(file))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(into); err != nil {
		return undecoded(subject, err.Error(), "the fields of this version")
	}
	return nil
}

func undecoded(subject, got, want string) error {
	return &refusal.Error{Code: "E_DECODE", Subject: subject, Got: refusal.Clip(got, 200), Want: want}
}

// walker looks at every token, because encoding/json takes duplicate keys, other case, null and floats in silence.
type walker struct {
	decoder *json.Decoder
	known   map[string]bool // every field name of the wanted type
}

// learn collects the field names below t. Types without fields of ours, such as time.Time, have none to learn.
func (w *walker) learn(t reflect.Type) {
	switch t.Kind() {
	case reflect.Pointer, reflect.Slice:
		w.learn(t.Elem())
	case reflect.Struct:
		for i := range t.NumField() {
			if name, _, _ := strings.Cut(t.Field(i).Tag.Get("json"), ","); name != "" {
				w.known[name] = true
				w.learn(t.Field(i).Type)
			}
		}
	}
}

func (w *walker) value(depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("more than %d levels", maxDepth)
	}
	token, err := w.decoder.Token()
	if err != nil {
		return err
	}
	switch t := token.(type) {
	case nil:
		return fmt.Errorf("null at offset %d", w.decoder.InputOffset())
	case json.Number:
		if strings.ContainsAny(t.String(), ".eE") {
			return fmt.Errorf("number %s is no integer", refusal.Clip(t.String(), 30))
		}
	case string:
		if strings.ContainsRune(t, utf8.RuneError) {
			return fmt.Errorf("a broken character at offset %d", w.decoder.InputOffset())
		}
	case json.Delim:
		return w.inside(t, depth)
	}
	return nil
}

func (w *walker) inside(open json.Delim, depth int) error {
	seen := map[string]bool{}
	for w.decoder.More() {
		if open == '{' {
			token, err := w.decoder.Token()
			if err != nil {
				return err
			}
			key, _ := token.(string) // the decoder lets nothing else stand here
			if !w.known[key] {
				return fmt.Errorf("unknown key %q", refusal.Clip(key, 60))
			}
			if seen[key] {
				return fmt.Errorf("key %q twice", key)
			}
			seen[key] = true
		}
		if err := w.value(depth + 1); err != nil {
			return err
		}
	}
	_, err := w.decoder.Token()
	return err
}
