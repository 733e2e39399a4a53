package vsa

import (
	"context"
	"crypto"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/secure-systems-lab/go-securesystemslib/dsse"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/policy"
	"github.com/kindos/kmo/policy/audit"
	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/reconciler"
	"github.com/kindos/kmo/registry"
	"github.com/kindos/kmo/registry/merkle"
	"github.com/kindos/kmo/rego"
)

const commit = "4829526f57c2aa11bb22cc33dd44ee55ff667788"

func must[T any](value T, err error) func(t testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return value
	}
}

// decided is the record of a decision about a unit with two copies of one image and one of another.
func decided(t *testing.T, change func(*policy.Decision)) audit.Record {
	t.Helper()
	image := func(name, hex string) any {
		return backends.Workload{Unit: "relay", Image: backends.Image{Ref: "reg.example/" + name + "@sha256:" + hex, SHA256: hex, Root: merkle.BlobRoot([]byte(name))}}
	}
	input := policy.Input{Version: 1, Commit: commit, Site: policy.Site{Name: "north-sea", Branch: "main"}, Host: policy.Host{Name: "edge-1"},
		Units: []policy.Unit{{Name: "relay", Workloads: []any{image("relay", "aa"), image("relay", "aa"), image("bus", "bb")}}, {Name: "gone"}}}
	decision := policy.Decision{Evaluated: rego.IDs(), Policy: merkle.BlobRoot([]byte("rules")), Input: must(json.Marshal(input))(t)}
	change(&decision)
	body := must(json.Marshal(reconciler.DecisionEntry{About: reconciler.About{Commit: commit}, Decision: decision}))(t)
	return audit.Record{Index: 7, Time: time.Date(2026, 11, 22, 22, 46, 0, 0, time.UTC), Kind: "decision", Commit: commit, Body: body}
}

// TestOf is what is stated of a change that was allowed, and of one that was denied.
func TestOf(t *testing.T) {
	got := must(Of(decided(t, func(*policy.Decision) {}), "edge-1.north-sea/kmo-audit"))(t)
	text := must(json.MarshalIndent(got, "", "  "))(t)
	want := `{
  "_type": "https://in-toto.io/Statement/v1",
  "subject": [
    {
      "name": "urn:kmo:site:north-sea:main",
      "digest": {
        "gitCommit": "` + commit + `"
      }
    },
    {
      "name": "reg.example/relay",
      "digest": {
        "kmo1": "` + merkle.BlobRoot([]byte("relay")).Hex() + `",
        "sha256": "aa"
      }
    },
    {
      "name": "reg.example/bus",
      "digest": {
        "kmo1": "` + merkle.BlobRoot([]byte("bus")).Hex() + `",
        "sha256": "bb"
      }
    }
  ],
  "predicateType": "https://slsa.dev/verification_summary/v1",
  "predicate": {
    "verifier": {
      "id": "urn:kmo:host:north-sea:edge-1"
    },
    "timeVerified": "2026-11-22T22:46:00Z",
    "resourceUri": "urn:kmo:site:north-sea:main",
    "policy": {
      "uri": "urn:kmo:policy:north-sea",
      "digest": {
        "kmo1": "` + merkle.BlobRoot([]byte("rules")).Hex() + `"
      }
    },
    "verificationResult": "PASSED",
    "verifiedLevels": [
      "KMO_ALLOWED"
    ],
    "slsaVersion": "1.0",
    "https://kos.dev/audit-record/v1": {
      "log": "edge-1.north-sea/kmo-audit",
      "index": 7
    }
  }
}`
	if diff := cmp.Diff(want, string(text)); diff != "" {
		t.Error(diff)
	}
	for name, change := range map[string]func(*policy.Decision){
		"denied":                   func(d *policy.Decision) { d.Denied = []policy.Denial{{ID: "KT001", Msg: "privileged"}} },
		"a rule that did not look": func(d *policy.Decision) { d.Evaluated = d.Evaluated[1:] },
	} {
		p := must(Of(decided(t, change), "log"))(t).Predicate
		if p.VerificationResult != "FAILED" || len(p.VerifiedLevels) != 1 || p.VerifiedLevels[0] != "FAILED" {
			t.Errorf("%s: %+v", name, p)
		}
	}
}

// TestNotOf: what verifies nothing is not said to.
func TestNotOf(t *testing.T) {
	gate := decided(t, func(*policy.Decision) {})
	gate.Kind = "gate"
	for name, record := range map[string]audit.Record{"a gate": gate, "no input": decided(t, func(d *policy.Decision) { d.Input = nil })} {
		if _, err := Of(record, "log"); refusal.Of(err) == nil || !strings.HasPrefix(err.Error(), "E_UNSUPPORTED: audit record 7: ") {
			t.Errorf("%s: %v", name, err)
		}
	}
	broken := decided(t, func(*policy.Decision) {})
	for _, body := range []string{`[]`, `{"decision":{"input":[]}}`, `{"decision":{"input":{"commit":"c","units":[{"workloads":[[]]}]}}}`} {
		broken.Body = json.RawMessage(body)
		if _, err := Of(broken, "log"); err == nil || !strings.HasPrefix(err.Error(), "audit record 7: ") {
			t.Errorf("%s: %v", body, err)
		}
	}
}

// verifier is DSSE's own way to be given a key.
type verifier ed25519.PublicKey

func (v verifier) KeyID() (string, error)   { return registry.KeyID(v.Public()) }
func (v verifier) Public() crypto.PublicKey { return ed25519.PublicKey(v) }
func (v verifier) Verify(_ context.Context, data, sig []byte) error {
	if !ed25519.Verify(ed25519.PublicKey(v), data, sig) {
		return errors.New("no signature of that key")
	}
	return nil
}

// TestSigned: the code of DSSE's authors reads what SignStatement makes of it, and refuses it with a byte changed.
func TestSigned(t *testing.T) {
	key := ed25519.NewKeyFromSeed(make([]byte, 32))
	statement := must(Of(decided(t, func(*policy.Decision) {}), "log"))(t)
	raw := must(registry.SignStatement(statement, key))(t)
	var e dsse.Envelope
	if err := json.Unmarshal(raw, &e); err != nil || e.PayloadType != "application/vnd.in-toto+json" {
		t.Fatal(e.PayloadType, err)
	}
	verify := must(dsse.NewEnvelopeVerifier(verifier(key.Public().(ed25519.PublicKey))))(t)
	if accepted, err := verify.Verify(t.Context(), &e); err != nil || len(accepted) != 1 {
		t.Errorf("%v, %v", accepted, err)
	}
	payload := must(e.DecodeB64Payload())(t)
	if want := must(json.Marshal(statement))(t); string(payload) != string(want) {
		t.Errorf("%s, want %s", payload, want)
	}
	if _, _, err := registry.VerifyStatement(raw, []crypto.PublicKey{key.Public()}, "aa", merkle.BlobRoot([]byte("relay"))); refusal.Of(err) == nil {
		t.Error("a host's summary passes for the statement of an image:", err)
	}
	e.Payload = strings.Replace(e.Payload, "e", "f", 1)
	if _, err := verify.Verify(t.Context(), &e); err == nil {
		t.Error("a changed payload is accepted")
	}
}
