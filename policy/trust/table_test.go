package trust

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/hiddeco/sshsig"
	"golang.org/x/crypto/ssh"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/policy/trust/signature"
	"github.com/kindos/kmo/registry/merkle"
)

const signaturesPage = "../../docs/signatures.md"

// form is one object in one accepted form.
type form struct {
	object, where, form, counts string
	try                         func(w *world, r *Root, key ssh.Signer) error // whether it counts, signed by the only key of r; nil where no SSH key makes it, or as another does
}

func forms() []form {
	return []form{
		{"commit", "the head of the branch", "SSHSIG over the raw object, namespace `git`", "attribution, and alone enough for a change of tier 3 only", tryCommit(RoleCommit)},
		{"commit", "the head of the branch", "OpenPGP over the raw object, by a primary key that the root holds, or a signing subkey that is bound to it and back; off in a root without one", "as above", nil},
		{"revert commit", "the head of the branch, with `Kmo-Reverts`", "SSHSIG over the raw object, namespace `git`", "taking back the newest change as a whole, a bounded number of times a day", tryCommit(RoleRevert)},
		{"trust root", "`trust/N.root.json`", "DSSE `" + rootPurpose.Type + "`, SSHSIG namespace `" + rootPurpose.Namespace + "`", "one of the threshold of the role `root`", tryRoot},
		{"approval", "`approvals/<unit>/<to>/<key>.dsse.json`", "DSSE `" + approvalPurpose.Type + "`, SSHSIG namespace `" + approvalPurpose.Namespace + "`", "one principal of the quorum of the unit's tier", tryApproval},
		{"waiver", "beside the approvals, `<key>.waiver.dsse.json`", "as an approval, with the action `waiver`", "letting this very content pass the rules it names, with the quorum of tier 0, 14 days at most", nil},
		{"head statement", "`refs/kmo/head`", "DSSE `" + headPurpose.Type + "`, SSHSIG namespace `" + headPurpose.Namespace + "`", "that a commit is the newest, where the root sets `freshness`", tryHead},
		{"image statement", "beside the image, as a referrer", "DSSE `application/vnd.in-toto+json`: Ed25519, ECDSA or RSA-PSS over the PAE", "what the image is, where the tier asks for a statement", tryStatement},
	}
}

// TestSignaturesPage keeps docs/signatures.md: each cell of it is what happens to a real signature.
func TestSignaturesPage(t *testing.T) {
	w := newWorld(t, nil)
	w.commit("alice", "", "begin")
	for _, bits := range []string{"256", "384", "521"} {
		w.keygen("p"+bits, "-t", "ecdsa", "-b", bits)
	}
	w.keygen("rsa3072", "-t", "rsa", "-b", "3072")
	w.keygen("rsa2048", "-t", "rsa", "-b", "2048")
	keys := []struct {
		name string
		key  ssh.Signer
	}{
		{"ed25519", w.keys["alice"]},
		{"sk-ed25519, touched", newSoftKey(t, 1)},
		{"sk-ed25519, untouched", newSoftKey(t, 0)},
		{"ecdsa p256", w.keys["p256"]},
		{"ecdsa p384", w.keys["p384"]},
		{"ecdsa p521", w.keys["p521"]},
		{"sk-ecdsa, touched", newSoftECDSA(t, 1)},
		{"sk-ecdsa, untouched", newSoftECDSA(t, 0)},
		{"rsa 3072 and more, SHA-2", w.keys["rsa3072"]},
		{"rsa 2048", w.keys["rsa2048"]},
	}
	var page strings.Builder
	page.WriteString("# Signatures\n\nWhat is signed, in which form, and what a good signature counts for. Made by `go test ./policy/trust -run SignaturesPage -update`, which\n" +
		"signs each object with each kind of key (of image statements it asks whose count); a code in a cell is that of the refusal.\n\n| object | where | accepted form | counts for |\n| --- | --- | --- | --- |\n")
	var head, rule, rows strings.Builder
	for _, f := range forms() {
		fmt.Fprintf(&page, "| %s | %s | %s | %s |\n", f.object, f.where, f.form, f.counts)
		if f.try == nil { // OpenPGP: TestU24OpenPGP; waivers are read as approvals are
			continue
		}
		fmt.Fprintf(&head, " %s |", f.object)
		rule.WriteString(" --- |")
	}
	good := map[string]int{}
	for _, k := range keys {
		fmt.Fprintf(&rows, "| %s |", k.name)
		for _, f := range forms() {
			if f.try == nil {
				continue
			}
			cell := "counts"
			if err := f.try(w, rootOf(w, k.key), k.key); err == nil {
				good[f.object]++
			} else if cell = codeOf(err); cell == "" {
				t.Errorf("%s with %s: %v", f.object, k.name, err)
			}
			fmt.Fprintf(&rows, " %s |", cell)
		}
		rows.WriteString("\n")
	}
	for _, f := range forms() {
		if want := map[bool]int{true: 4, false: 6}[f.object == "image statement"]; f.try != nil && good[f.object] != want {
			t.Errorf("%s: %d kinds of keys count, want %d", f.object, good[f.object], want)
		}
	}
	fmt.Fprintf(&page, "\n| key |%s\n| --- |%s\n%s", head.String(), rule.String(), rows.String())
	page.WriteString("\nAn unknown payload type or namespace is refused, never skipped. A key's id is computed from the key: the one that is written beside a signature is\nat most a hint. " +
		"SHA-1, MD5 and DSA are refused everywhere, and so are SSH certificates. The same judgement over thousands of commits, beside\n`git verify-commit`'s, is a test: policy/trust/corpus_test.go.\n\n" +
		"An OpenPGP key is RSA of at least 3072 bits, ECDSA p256 or p384, or ed25519; its signature, its self-signatures and its subkey's bindings are over SHA-256,\nSHA-384 or SHA-512. " +
		"It must be good when it signed and now: not expired, and never revoked ([024](decisions/024-openpgp.md)).\n")
	if *update {
		if err := os.WriteFile(signaturesPage, []byte(page.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if is, err := os.ReadFile(signaturesPage); err != nil || string(is) != page.String() {
		t.Errorf("docs/signatures.md is not what happens (%v); go test ./policy/trust -run SignaturesPage -update", err)
	}
}

// rootOf is a root in which one key may do everything. It is not decoded: that would refuse some keys before they are tried.
func rootOf(w *world, key ssh.Signer) *Root {
	r := &Root{Version: 1, Site: "north-sea", Tiers: []Tier{{Tier: 0, Need: 1}, {Tier: 1, Need: 1}, {Tier: 2, Need: 1}, {Tier: 3}}}
	uses := []string{RoleRoot, RoleCommit, RoleApprove, RoleRevert, RoleImage, RoleHead}
	r.Principals = []Principal{{Name: "only", Class: "human", Keys: []Key{{Public: publicLine(key.PublicKey()), Uses: uses}}}}
	for _, use := range uses {
		r.Roles = append(r.Roles, Role{Name: use, Threshold: 1, Members: []string{"only"}})
	}
	return r
}

func tryCommit(role string) func(*world, *Root, ssh.Signer) error {
	return func(w *world, r *Root, key ssh.Signer) error {
		unsigned := w.unsigned("a message\n")
		_, signed, err := openCommit(signAs(unsigned, w.armoured(unsigned, key, "git", sshsig.HashSHA512)), "commit")
		if err != nil {
			return err
		}
		if _, err := r.allowed(signed.Key(), role, w.now, "commit"); err != nil {
			return err
		}
		return signed.Verify()
	}
}

// seal is signature.Seal, by any key.
func (w *world) seal(payload []byte, purpose signature.Purpose, key ssh.Signer) []byte {
	pae := fmt.Appendf(nil, "DSSEv1 %d %s %d %s", len(purpose.Type), purpose.Type, len(payload), payload)
	s, err := sshsig.Sign(bytes.NewReader(pae), key, sshsig.HashSHA512, purpose.Namespace)
	if err != nil {
		w.t.Fatal(err)
	}
	file, err := json.Marshal(signature.Envelope{
		Payload: base64.StdEncoding.EncodeToString(payload), PayloadType: purpose.Type,
		Signatures: []signature.EnvelopeSignature{{Sig: base64.StdEncoding.EncodeToString(s.Marshal())}},
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return file
}

func tryRoot(w *world, r *Root, key ssh.Signer) error {
	payload, err := json.Marshal(r)
	if err != nil {
		return err
	}
	_, err = ParseRoot(w.seal(payload, rootPurpose, key))
	return err
}

func tryApproval(w *world, r *Root, key ssh.Signer) error {
	u := UnitFacts{Unit: "relay", Action: "upgrade", Tier: 2, Need: 1, To: merkle.BlobRoot([]byte("new"))}
	tree := gitTree{ids: map[string]string{}}
	head := ObjectID([]byte("head"))
	payload, err := json.Marshal(NewApproval("north-sea", "main", head, u, w.now.Add(time.Hour), Intent{}))
	if err != nil {
		return err
	}
	q := &quorum{
		root: r, site: "north-sea", branch: "main", now: w.now, running: Commit{Tree: tree}, head: Commit{ID: head, Tree: tree},
		history: everywhere{}, since: map[string][]Commit{}, recent: map[string]Commit{}, verdicts: map[string]baseAnswer{},
	}
	if err := q.file(context.Background(), &u, "approval", w.seal(payload, approvalPurpose, key)); err != nil || len(u.Counted) == 1 {
		return err
	}
	return &refusal.Error{Code: refusal.Code(u.Uncounted[0].Code), Subject: "approval", Got: u.Uncounted[0].Why}
}

func tryHead(w *world, r *Root, key ssh.Signer) error {
	head := ObjectID([]byte("head"))
	payload, err := json.Marshal(HeadStatement{Site: "north-sea", Branch: "main", Commit: head, Issued: w.now, Expires: w.now.Add(time.Hour)})
	if err != nil {
		return err
	}
	_, _, err = headJudgement(r, head, w.seal(payload, headPurpose, key), w.now).statement(context.Background())
	return err
}

// headJudgement is that of a head with a statement, on a host that has seen none.
func headJudgement(r *Root, head string, stated []byte, now time.Time) *judgement {
	fresh := *r
	fresh.Freshness = "1h"
	v := &Verifier{Site: "north-sea", Branch: "main", Clock: func() time.Time { return now }}
	return &judgement{v: v, root: &fresh, head: Commit{ID: head, Stated: stated}, history: everywhere{}, facts: Facts{Time: now}}
}

// tryStatement asks whose statements are believed: how they are verified is registry's.
func tryStatement(w *world, r *Root, key ssh.Signer) error {
	if len(r.sealers(w.now)) == 1 {
		return nil
	}
	if err := signature.AllowedKey(key.PublicKey()); err != nil {
		return err
	}
	return &refusal.Error{Code: "E_ALG_FORBIDDEN", Subject: "image statement", Got: key.PublicKey().Type(), Want: "a key that signs without SSH"}
}
