package trust

import (
	"time"

	"github.com/kindos/kmo/registry/merkle"
)

// Facts is what was established about one change: who signed it, which units it touches, and which approvals count.
// Whether that is enough is for the rules to say.
type Facts struct {
	Commit string      `json:"commit"`
	Base   string      `json:"base"`   // the last accepted commit, whose root and policy judge this one; "" for the pinned root alone
	Signer string      `json:"signer"` // principal
	Key    string      `json:"key"`    // id of the key that signed
	Class  string      `json:"class"`  // human or robot
	Author string      `json:"author"` // principal the author's line belongs to; "" if none
	Revert bool        `json:"revert"` // it is a revert that needs no quorum
	Trust  bool        `json:"trust"`  // files under trust/ differ
	Policy bool        `json:"policy"` // files under policy/ differ
	Other  bool        `json:"other"`  // anything else that is judged differs: units, profiles, site.yaml
	Time   time.Time   `json:"time"`   // trusted time
	Units  []UnitFacts `json:"units"`  // sorted by name; trust and policy changes are the units "@trust" and "@policy"
}

// UnitFacts is what was established about one changed unit.
type UnitFacts struct {
	Unit       string        `json:"unit"`
	Action     string        `json:"action"`     // upgrade, downgrade, policy, root
	Tier       int           `json:"tier"`       // the most sensitive of root, template and what it needs, from the trusted base
	TierBefore int           `json:"tierBefore"` // as the base has it; -1 for a new unit
	From       merkle.Digest `json:"from"`       // content that runs; none for a new unit
	To         merkle.Digest `json:"to"`         // content that would run; none for a removed one
	Profiles   []string      `json:"profiles"`
	Need       int           `json:"need"`      // distinct principals
	Counted    []Approval    `json:"counted"`   // one a principal
	Uncounted  []Approval    `json:"uncounted"` // with the reason in Why
}

// Approval is one signed "from this content to that content", as it was judged.
type Approval struct {
	Principal string    `json:"principal"` // "" if no key of the root signed it
	Key       string    `json:"key"`
	File      string    `json:"file"`
	Expires   time.Time `json:"expires,omitzero"`
	Why       string    `json:"why,omitempty"`  // why it does not count
	Code      string    `json:"code,omitempty"` // the refusal's code for that
}
