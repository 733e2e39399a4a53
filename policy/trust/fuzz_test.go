package trust

import (
	"bytes"
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/policy/trust/signature"
	"github.com/kindos/kmo/registry/merkle"
)

// FuzzU44Root reads the signed part of a trust root: what is taken is taken again when it is written anew, and says the same.
func FuzzU44Root(f *testing.F) {
	w := newWorld(f, nil)
	payload, err := json.Marshal(w.root)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(payload)
	f.Add([]byte(`{"version":1,"site":"x","principals":[{"name":"a","class":"human","keys":[{"public":"ssh-ed25519 AAAA"}]}],"roles":[],"tiers":[]}`))
	f.Fuzz(func(t *testing.T, payload []byte) {
		root, err := decodeRoot(payload)
		if err != nil {
			if refusal.Of(err) == nil {
				t.Fatal("no refusal:", err)
			}
			return
		}
		again, err := json.Marshal(root)
		if err != nil {
			t.Fatal(err)
		}
		same, err := decodeRoot(again)
		if err != nil {
			t.Fatalf("%q is taken, and not %q: %v", payload, again, err)
		}
		if diff := cmp.Diff(root, same); diff != "" {
			t.Error(diff)
		}
	})
}

// everywhere is a history in which each commit comes after each other.
type everywhere struct{}

func (everywhere) At(context.Context, string) (Commit, error)                { return Commit{}, nil }
func (everywhere) Ancestor(context.Context, string, string) (bool, error)    { return true, nil }
func (everywhere) Between(context.Context, string, string) ([]Commit, error) { return nil, nil }

// FuzzU44Approval has a trusted approver sign any bytes: they count only if they name this very change and have not expired.
func FuzzU44Approval(f *testing.F) {
	w := newWorld(f, nil)
	tree := gitTree{ids: map[string]string{}}
	unit := UnitFacts{Unit: "relay", Action: "upgrade", Tier: 2, Need: 1, From: merkle.BlobRoot([]byte("old")), To: merkle.BlobRoot([]byte("new"))}
	good := NewApproval("north-sea", "main", ObjectID([]byte("base")), unit, w.now.Add(time.Hour), Intent{Kind: "fix"})
	payload, err := json.Marshal(good)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(payload)
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, payload []byte) {
		file, err := signature.Seal(payload, approvalPurpose, w.keys["carol"])
		if err != nil {
			t.Fatal(err)
		}
		q := &quorum{
			root: &w.root, site: "north-sea", branch: "main", now: w.now, running: Commit{Tree: tree}, head: Commit{ID: ObjectID([]byte("head")), Tree: tree},
			history: everywhere{}, since: map[string][]Commit{}, recent: map[string]Commit{}, verdicts: map[string]baseAnswer{},
		}
		u := unit
		q.waived = map[string]*waiving{}
		if err := q.file(context.Background(), &u, "approvals/x.dsse.json", file); err != nil {
			t.Fatal(err)
		}
		for range u.Counted {
			var p Predicate
			if err := json.Unmarshal(payload, &p); err != nil {
				t.Fatal("counted, and no JSON:", err)
			}
			expires := p.Expires
			p.Base, p.Expires, p.Nonce, p.Intent = good.Base, good.Expires, good.Nonce, good.Intent
			if diff := cmp.Diff(good, p); diff != "" || !w.now.Before(expires) {
				t.Errorf("counted, and for another change: %s, until %v", diff, expires)
			}
		}
	})
}

// FuzzU44Head has who may say which commit is the newest sign any bytes: they count only if they name this very head and have not expired.
func FuzzU44Head(f *testing.F) {
	w := newWorld(f, nil)
	r := rootOf(w, w.keys["alice"])
	good := HeadStatement{Site: "north-sea", Branch: "main", Commit: ObjectID([]byte("head")), Issued: w.now, Expires: w.now.Add(time.Hour)}
	payload, err := json.Marshal(good)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(payload)
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, payload []byte) {
		file, err := signature.Seal(payload, headPurpose, w.keys["alice"])
		if err != nil {
			t.Fatal(err)
		}
		stated, until, err := headJudgement(r, good.Commit, file, w.now).statement(context.Background())
		if err != nil {
			if refusal.Of(err) == nil {
				t.Fatal("no refusal:", err)
			}
			return
		}
		if stated.Site != good.Site || stated.Branch != good.Branch || stated.Commit != good.Commit || !w.now.Before(until) || until.After(stated.Expires) {
			t.Errorf("taken until %v: %+v", until, stated)
		}
	})
}

// FuzzU24OpenPGP reads OpenPGP blocks for a pinned key: only the very signature that was made verifies, in any spelling that is read.
func FuzzU24OpenPGP(f *testing.F) {
	w := &pgpWorld{world: newWorld(f, nil), now: day0}
	e := w.entity(time.Hour, nil)
	w.subkey(e, nil, nil)
	message := []byte("message")
	certificate, err := signature.ReadCertificate(export(f, e))
	if err != nil {
		f.Fatal(err)
	}
	made := w.pgpSign(message, e.PrivateKey, nil)
	f.Add(made)
	f.Add([]byte{0x88, 0x01, 0x04})
	f.Fuzz(func(t *testing.T, blob []byte) {
		s, err := signature.ParseOpenPGP(message, pgpArmour(t, blob, nil), []*signature.Certificate{certificate}, day0, "fuzz")
		if err == nil {
			err = s.Verify()
		}
		if err != nil && refusal.Of(err) == nil {
			t.Fatal("no refusal:", err)
		}
		if err == nil && !bytes.Contains(blob, made[len(made)-64:]) {
			t.Fatalf("%x is taken", blob)
		}
	})
}

// FuzzU24Certificate reads OpenPGP keys: what is taken is one key with an id.
func FuzzU24Certificate(f *testing.F) {
	w := &pgpWorld{world: newWorld(f, nil), now: day0}
	e := w.entity(time.Hour, nil)
	w.subkey(e, nil, nil)
	f.Add(export(f, e))
	f.Fuzz(func(t *testing.T, raw []byte) {
		c, err := signature.ReadCertificate(raw)
		if err != nil {
			return
		}
		again, err := signature.ParseKey(publicLine(c))
		if err != nil || signature.KeyID(again) != signature.KeyID(c) || !strings.HasPrefix(signature.KeyID(c), "openpgp:") {
			t.Errorf("%x comes back as %v, %v", raw, again, err)
		}
	})
}
