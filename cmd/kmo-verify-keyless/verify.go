package main

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/sigstore/sigstore-go/pkg/bundle"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/verify"
)

// Request is one bundle and who must have signed what. Bytes are base64.
type Request struct {
	Bundle      []byte `json:"bundle"`      // a sigstore bundle v0.3, with a DSSE envelope
	TrustedRoot []byte `json:"trustedRoot"` // a sigstore trusted root v0.1
	Pin         string `json:"pin"`         // its sha256, 64 hex digits, as the site's trust root has it
	PayloadType string `json:"payloadType"` // of the envelope: application/vnd.in-toto+json, which is all that the library reads
	Issuer      string `json:"issuer"`      // of the certificate's identity, exactly
	Subject     string `json:"subject"`     // the identity, exactly
}

// Answer is what was established about a bundle.
type Answer struct {
	Payload []byte    `json:"payload,omitempty"` // the bytes that were verified
	Issuer  string    `json:"issuer,omitempty"`
	Subject string    `json:"subject,omitempty"`
	Time    time.Time `json:"time,omitzero"`     // of the signature, as a log or a timestamp authority of the trusted root says
	Refused string    `json:"refused,omitempty"` // why nothing was
}

// Verify verifies a bundle. It asks nobody: who may vouch for what stands in the trusted root.
func Verify(r Request) (a Answer, err error) {
	defer func() { // a fault in what reads hostile bytes is a refusal
		if fault := recover(); fault != nil {
			a, err = Answer{}, fmt.Errorf("the bundle cannot be read: %v", fault)
		}
	}()
	if r.Issuer == "" || r.Subject == "" || r.PayloadType == "" {
		return a, errors.New("no issuer, subject or payload type to compare with")
	}
	if sum := sha256.Sum256(r.TrustedRoot); hex.EncodeToString(sum[:]) != r.Pin {
		return a, fmt.Errorf("trusted root with sha256 %x; want %s", sum, r.Pin)
	}
	trusted, err := root.NewTrustedRootFromJSON(r.TrustedRoot)
	if err != nil {
		return a, fmt.Errorf("trusted root: %w", err)
	}
	b, payload, err := open(r)
	if err != nil {
		return a, err
	}
	// The signature must be in a log, with this certificate and payload, and its time must be vouched for, for the certificate lives minutes.
	options := []verify.VerifierOption{verify.WithTransparencyLog(1), verify.WithObserverTimestamps(1)}
	if len(trusted.CTLogs()) > 0 {
		options = append(options, verify.WithSignedCertificateTimestamps(1))
	}
	verifier, err := verify.NewVerifier(trusted, options...)
	if err != nil {
		return a, err
	}
	identity, err := verify.NewShortCertificateIdentity(r.Issuer, "", r.Subject, "")
	if err != nil {
		return a, err
	}
	// The artifact is the payload itself, whose type was compared: it is no statement about another.
	result, err := verifier.Verify(b, verify.NewPolicy(verify.WithoutArtifactUnsafe(), verify.WithCertificateIdentity(identity)))
	if err != nil {
		return a, err
	}
	if len(result.VerifiedTimestamps) == 0 {
		return a, errors.New("nobody vouches for the time of the signature")
	}
	return Answer{Payload: payload, Issuer: r.Issuer, Subject: r.Subject, Time: result.VerifiedTimestamps[0].Timestamp.UTC()}, nil
}

// open reads a bundle that has one signature and one log entry, and what is signed.
func open(r Request) (*bundle.Bundle, []byte, error) {
	b := &bundle.Bundle{}
	if err := b.UnmarshalJSON(r.Bundle); err != nil {
		return nil, nil, fmt.Errorf("bundle: %w", err)
	}
	if !b.MinVersion("v0.3") {
		return nil, nil, errors.New("a bundle of an older version; want v0.3, whose log entry has a proof of inclusion")
	}
	envelope, err := b.Envelope()
	if err != nil {
		return nil, nil, fmt.Errorf("bundle: %w; want one with a DSSE envelope", err)
	}
	if n := len(envelope.Signatures); n != 1 {
		return nil, nil, fmt.Errorf("%d signatures; want one", n)
	}
	if envelope.PayloadType != r.PayloadType {
		return nil, nil, fmt.Errorf("payload type %q; want %q", envelope.PayloadType, r.PayloadType)
	}
	entries, err := b.TlogEntries()
	if err != nil {
		return nil, nil, fmt.Errorf("log entry: %w", err)
	}
	if len(entries) != 1 {
		return nil, nil, fmt.Errorf("%d log entries; want one", len(entries))
	}
	payload, err := envelope.DecodeB64Payload()
	if err != nil {
		return nil, nil, fmt.Errorf("payload: %w", err)
	}
	return b, payload, nil
}
