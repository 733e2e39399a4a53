package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"strings"
	"testing"
	"time"

	protobundle "github.com/sigstore/protobuf-specs/gen/pb-go/bundle/v1"
	protocommon "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	protodsse "github.com/sigstore/protobuf-specs/gen/pb-go/dsse"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/testing/ca"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

const (
	issuer  = "https://issuer.example"
	subject = "https://git.example/site/.ci/approve.yml@refs/heads/main"
	payload = `{"_type":"https://in-toto.io/Statement/v1","subject":[{"name":"x","digest":{"sha256":"aa"}}],"predicateType":"x","predicate":{}}`
	kind    = "application/vnd.in-toto+json" // what the virtual authority signs
)

// authority is a sigstore of this process: certificates, timestamps and log of its own.
type authority struct {
	*ca.VirtualSigstore
	t *testing.T
}

func newAuthority(t *testing.T) authority {
	t.Helper()
	a, err := ca.NewVirtualSigstore()
	if err != nil {
		t.Fatal(err)
	}
	return authority{a, t}
}

// trusted is the authority's trusted root.
func (a authority) trusted() []byte {
	a.t.Helper()
	logs := a.RekorLogs()
	for id, log := range logs { // it has the hex digits there, and a trusted root the bytes
		raw, err := hex.DecodeString(id)
		if err != nil {
			a.t.Fatal(err)
		}
		log.ID = raw
	}
	r, err := root.NewTrustedRoot(root.TrustedRootMediaType01, a.FulcioCertificateAuthorities(), nil, a.TimestampingAuthorities(), logs)
	if err != nil {
		a.t.Fatal(err)
	}
	text, err := r.MarshalJSON()
	if err != nil {
		a.t.Fatal(err)
	}
	return text
}

// attest signs the payload as somebody.
func (a authority) attest(who, by, text string) *protobundle.Bundle {
	a.t.Helper()
	e, err := a.AttestAtTimeHashedRekordV2(who, by, []byte(text), time.Now())
	if err != nil {
		a.t.Fatal(err)
	}
	content, err := e.VerificationContent()
	if err != nil {
		a.t.Fatal(err)
	}
	signed, err := e.SignatureContent()
	if err != nil {
		a.t.Fatal(err)
	}
	envelope := signed.EnvelopeContent().RawEnvelope()
	signature := envelope.Signatures[0].Sig
	raw := decode(a.t, signature)
	b := &protobundle.Bundle{
		MediaType: "application/vnd.dev.sigstore.bundle.v0.3+json",
		Content: &protobundle.Bundle_DsseEnvelope{DsseEnvelope: &protodsse.Envelope{
			Payload: decode(a.t, envelope.Payload), PayloadType: envelope.PayloadType, Signatures: []*protodsse.Signature{{Sig: raw}},
		}},
		VerificationMaterial: &protobundle.VerificationMaterial{
			Content: &protobundle.VerificationMaterial_Certificate{Certificate: &protocommon.X509Certificate{RawBytes: content.Certificate().Raw}},
		},
	}
	entries, err := e.TlogEntries()
	if err != nil {
		a.t.Fatal(err)
	}
	for _, entry := range entries {
		b.VerificationMaterial.TlogEntries = append(b.VerificationMaterial.TlogEntries, entry.TransparencyLogEntry())
	}
	stamps, err := e.Timestamps()
	if err != nil {
		a.t.Fatal(err)
	}
	b.VerificationMaterial.TimestampVerificationData = &protobundle.TimestampVerificationData{}
	for _, stamp := range stamps {
		b.VerificationMaterial.TimestampVerificationData.Rfc3161Timestamps = append(b.VerificationMaterial.TimestampVerificationData.Rfc3161Timestamps, &protocommon.RFC3161SignedTimestamp{SignedTimestamp: stamp})
	}
	return b
}

func decode(t *testing.T, text string) []byte {
	t.Helper()
	var raw []byte
	if err := json.Unmarshal([]byte(`"`+text+`"`), &raw); err != nil {
		t.Fatal(err)
	}
	return raw
}

// ask puts a bundle to the program.
func (a authority) ask(b *protobundle.Bundle, change func(*Request)) (Answer, int) {
	a.t.Helper()
	text, err := protojson.Marshal(b)
	if err != nil {
		a.t.Fatal(err)
	}
	trusted := a.trusted()
	sum := sha256.Sum256(trusted)
	r := Request{Bundle: text, TrustedRoot: trusted, Pin: hex.EncodeToString(sum[:]), PayloadType: kind, Issuer: issuer, Subject: subject}
	if change != nil {
		change(&r)
	}
	request, err := json.Marshal(r)
	if err != nil {
		a.t.Fatal(err)
	}
	var out, said bytes.Buffer
	status := run(bytes.NewReader(request), &out, &said)
	var answer Answer
	if err := json.Unmarshal(out.Bytes(), &answer); err != nil {
		a.t.Fatalf("%v: %s %s", err, out.String(), said.String())
	}
	return answer, status
}

func TestKeyless(t *testing.T) {
	a := newAuthority(t)
	good := a.attest(subject, issuer, payload)
	answer, status := a.ask(good, nil)
	if status != 0 || string(answer.Payload) != payload || answer.Issuer != issuer || answer.Subject != subject || time.Since(answer.Time).Abs() > time.Hour {
		t.Fatalf("a good bundle: %d %+v", status, answer)
	}
	other := a.attest(subject, issuer, strings.Replace(payload, "aa", "bb", 1))
	stranger := newAuthority(t).attest(subject, issuer, payload)
	for _, tt := range []struct {
		name   string
		bundle func(b *protobundle.Bundle)
		ask    func(r *Request)
	}{
		{"T21 no signature", func(b *protobundle.Bundle) { b.GetDsseEnvelope().Signatures = nil }, nil},
		{"T21 two signatures", func(b *protobundle.Bundle) {
			b.GetDsseEnvelope().Signatures = append(b.GetDsseEnvelope().Signatures, b.GetDsseEnvelope().Signatures...)
		}, nil},
		{"T21 another's signature", func(b *protobundle.Bundle) { b.GetDsseEnvelope().Signatures = other.GetDsseEnvelope().Signatures }, nil},
		{"T21 another payload", func(b *protobundle.Bundle) { b.GetDsseEnvelope().Payload = other.GetDsseEnvelope().Payload }, nil},
		{"T22 a log entry of something else", func(b *protobundle.Bundle) {
			b.VerificationMaterial.TlogEntries = other.VerificationMaterial.TlogEntries
		}, nil},
		{"T22 no log entry", func(b *protobundle.Bundle) { b.VerificationMaterial.TlogEntries = nil }, nil},
		{"T22 two log entries", func(b *protobundle.Bundle) {
			b.VerificationMaterial.TlogEntries = append(b.VerificationMaterial.TlogEntries, other.VerificationMaterial.TlogEntries...)
		}, nil},
		{"T22 an entry of another log", func(b *protobundle.Bundle) {
			b.VerificationMaterial.TlogEntries = stranger.VerificationMaterial.TlogEntries
		}, nil},
		{"T23 a certificate of another authority", func(b *protobundle.Bundle) { proto.Reset(b); proto.Merge(b, stranger) }, nil},
		{"T23 another's certificate", func(b *protobundle.Bundle) {
			b.VerificationMaterial.Content = other.VerificationMaterial.Content
		}, nil},
		{"T23 another issuer", nil, func(r *Request) { r.Issuer += ".evil" }},
		{"T23 another subject", nil, func(r *Request) { r.Subject = strings.TrimSuffix(r.Subject, "main") }},
		{"a subject that is a pattern", nil, func(r *Request) { r.Subject = ".*" }},
		{"no subject", nil, func(r *Request) { r.Subject = "" }},
		{"another payload type", nil, func(r *Request) { r.PayloadType = "application/vnd.kmo.approval.v1+json" }},
		{"another trusted root than the pinned one", nil, func(r *Request) { r.TrustedRoot = append(r.TrustedRoot, ' ') }},
		{"a bundle that is none", nil, func(r *Request) { r.Bundle = []byte(`{}`) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := proto.CloneOf(good)
			if tt.bundle != nil {
				tt.bundle(b)
			}
			if answer, status := a.ask(b, tt.ask); status != 3 || answer.Refused == "" || answer.Payload != nil {
				t.Errorf("status %d, %+v", status, answer)
			} else {
				t.Log(answer.Refused)
			}
		})
	}
	t.Run("T23 without proof of time", func(t *testing.T) {
		b := proto.CloneOf(good)
		b.VerificationMaterial.TimestampVerificationData = nil
		if answer, status := a.ask(b, nil); status != 3 {
			t.Errorf("status %d, %+v", status, answer)
		}
	})
	t.Run("each byte of the signature and the payload", func(t *testing.T) {
		for i := range good.GetDsseEnvelope().Signatures[0].Sig {
			b := proto.CloneOf(good)
			b.GetDsseEnvelope().Signatures[0].Sig[i] ^= 1
			if _, status := a.ask(b, nil); status != 3 {
				t.Errorf("signature byte %d: status %d", i, status)
			}
		}
		for i := range good.GetDsseEnvelope().Payload {
			b := proto.CloneOf(good)
			b.GetDsseEnvelope().Payload[i] ^= 1
			if _, status := a.ask(b, nil); status != 3 {
				t.Errorf("payload byte %d: status %d", i, status)
			}
		}
	})
}

func TestRequest(t *testing.T) {
	for _, text := range []string{"", "null x", `{"unknown":1}`, `{} {}`, strings.Repeat(" ", maxRequest+1)} {
		var out, said bytes.Buffer
		if status := run(strings.NewReader(text), &out, &said); status != 1 || said.Len() == 0 {
			t.Errorf("%.20q: status %d, %s", text, status, said.String())
		}
	}
}
