// Package vsa says a decision of the audit log as others in the supply chain read it: a SLSA Verification Summary Attestation
// (https://slsa.dev/verification_summary/v1), which is an in-toto statement.
//
// Its subjects are the commit that was judged and the images of the units in it that change here. PASSED means that every shipped rule looked and
// that neither one of those nor one of the site's denied the change; it is no SLSA level, so the level is "KMO_ALLOWED". The verifier is the host.
package vsa

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/policy"
	"github.com/kindos/kmo/policy/audit"
	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/reconciler"
	"github.com/kindos/kmo/registry"
)

// Statement is the whole of it, for registry.SignStatement.
type Statement struct {
	Type          string             `json:"_type"`
	Subject       []registry.Subject `json:"subject"`
	PredicateType string             `json:"predicateType"`
	Predicate     Summary            `json:"predicate"`
}

// Summary is the predicate.
type Summary struct {
	Verifier           Verifier  `json:"verifier"`
	TimeVerified       time.Time `json:"timeVerified"`
	ResourceURI        string    `json:"resourceUri"`
	Policy             Policy    `json:"policy"`
	VerificationResult string    `json:"verificationResult"` // PASSED or FAILED
	VerifiedLevels     []string  `json:"verifiedLevels"`
	SLSAVersion        string    `json:"slsaVersion"`
	Record             Record    `json:"https://kos.dev/audit-record/v1"`
}

// Verifier is the host that decided.
type Verifier struct {
	ID string `json:"id"`
}

// Policy is the rules that judged, by their digest.
type Policy struct {
	URI    string            `json:"uri"`
	Digest map[string]string `json:"digest"` // "kmo1"
}

// Record is where the decision stands, so that a proof of it can be asked for.
type Record struct {
	Log   string `json:"log"`
	Index int64  `json:"index"`
}

// Of is the summary of a decision that a log of that name has recorded.
func Of(record audit.Record, log string) (Statement, error) {
	var entry reconciler.DecisionEntry
	var judged policy.Input
	subject := fmt.Sprintf("audit record %d", record.Index)
	if record.Kind != "decision" {
		return Statement{}, &refusal.Error{Code: "E_UNSUPPORTED", Subject: subject, Got: record.Kind, Want: "a decision: nothing else verifies anything"}
	}
	err := json.Unmarshal(record.Body, &entry)
	if err == nil && entry.Decision.Input != nil {
		err = json.Unmarshal(entry.Decision.Input, &judged)
	}
	if err != nil {
		return Statement{}, fmt.Errorf("%s: %w", subject, err)
	}
	if judged.Commit == "" {
		return Statement{}, &refusal.Error{Code: "E_UNSUPPORTED", Subject: subject, Got: "a decision without its input, which was too large to be judged", Want: "one that says of what it is"}
	}
	site := "urn:kmo:site:" + judged.Site.Name + ":" + judged.Site.Branch
	images, err := images(judged)
	if err != nil {
		return Statement{}, fmt.Errorf("%s: %w", subject, err)
	}
	result, level := "PASSED", "KMO_ALLOWED"
	if entry.Decision.Refusal() != nil {
		result, level = "FAILED", "FAILED"
	}
	return Statement{
		Type: "https://in-toto.io/Statement/v1", PredicateType: "https://slsa.dev/verification_summary/v1",
		Subject: append([]registry.Subject{{Name: site, Digest: map[string]string{"gitCommit": judged.Commit}}}, images...),
		Predicate: Summary{
			Verifier: Verifier{"urn:kmo:host:" + judged.Site.Name + ":" + judged.Host.Name}, TimeVerified: record.Time, ResourceURI: site,
			Policy:             Policy{"urn:kmo:policy:" + judged.Site.Name, map[string]string{"kmo1": entry.Decision.Policy.Hex()}},
			VerificationResult: result, VerifiedLevels: []string{level}, SLSAVersion: "1.0", Record: Record{log, record.Index},
		},
	}, nil
}

// images are the images of the judged units' workloads, each once.
func images(judged policy.Input) (all []registry.Subject, err error) {
	for _, unit := range judged.Units {
		text, err := json.Marshal(unit.Workloads)
		if err != nil {
			return nil, err
		}
		var workloads []backends.Workload
		if err := json.Unmarshal(text, &workloads); err != nil {
			return nil, fmt.Errorf("unit %s: %w", unit.Name, err)
		}
		for _, w := range workloads {
			name, _, _ := strings.Cut(w.Image.Ref, "@")
			known := slices.ContainsFunc(all, func(s registry.Subject) bool { return s.Name == name && s.Digest["sha256"] == w.Image.SHA256 })
			if w.Image.SHA256 != "" && !known {
				all = append(all, registry.Subject{Name: name, Digest: map[string]string{"sha256": w.Image.SHA256, "kmo1": w.Image.Root.Hex()}})
			}
		}
	}
	return all, nil
}
