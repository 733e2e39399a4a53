package trust

import (
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/kindos/kmo/policy/refusal"
)

// Custody is what is asked of how images came to be.
type Custody struct {
	Steps [][]string  `json:"steps"` // by tier, what a chain must have
	Keys  []Custodian `json:"keys"`  // that may sign links now
}

// Custodian is one key of the role custody.
type Custodian struct {
	Principal string `json:"principal"`
	Key       string `json:"key"` // spki-sha256: and the hex of its PKIX form
}

// custody is what the tiers ask of images' custody, nil if none asks for any.
func (r *Root) custody(now time.Time) *Custody {
	c := &Custody{Keys: []Custodian{}}
	asked := false
	for _, tier := range r.Tiers {
		c.Steps = append(c.Steps, append([]string{}, tier.Custody...))
		asked = asked || len(tier.Custody) > 0
	}
	if !asked {
		return nil
	}
	r.plain(RoleCustody, now, func(p *Principal, key crypto.PublicKey) {
		if der, err := x509.MarshalPKIXPublicKey(key); err == nil {
			sum := sha256.Sum256(der)
			c.Keys = append(c.Keys, Custodian{Principal: p.Name, Key: "spki-sha256:" + hex.EncodeToString(sum[:])})
		}
	})
	return c
}

// custodySteps are those that a tier may ask for.
func custodySteps() []string {
	return []string{"author", "review", "build", "test", "approve", "release"}
}

// custodyFault is what is wrong with the custody that a tier asks for; "" if nothing is.
func (r *Root) custodyFault(tier int) string {
	t := r.Tiers[tier]
	for i, step := range t.Custody {
		if !slices.Contains(custodySteps(), step) || slices.Index(t.Custody, step) != i {
			return fmt.Sprintf("tier %d asks for the custody step %q, want each once of %s", tier, refusal.Clip(step, 20), strings.Join(custodySteps(), ", "))
		}
	}
	if len(t.Custody) > 0 && (t.Statement == "" || !r.hasRole(RoleCustody)) {
		return fmt.Sprintf("tier %d asks for custody, want it to ask for a statement too, and a role custody with members", tier)
	}
	if tier < 3 {
		for _, step := range r.Tiers[tier+1].Custody {
			if !slices.Contains(t.Custody, step) {
				return fmt.Sprintf("tier %d asks for no custody step %s, and the less sensitive tier %d does", tier, step, tier+1)
			}
		}
	}
	return ""
}
