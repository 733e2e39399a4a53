package trust

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/policy/trust/signature"
)

var day0 = time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)

// world is a site in a real repository, with real keys and one host.
type world struct {
	t     testing.TB
	dir   string
	root  Root
	keys  map[string]ssh.Signer
	raw   map[string]ed25519.PrivateKey
	files map[string]string // the work tree
	now   time.Time
	v     *Verifier
}

// people of the default world: name, class, organisation, uses.
var people = [][4]string{
	{"alice", "human", "kos", "root,commit,approve"},
	{"bob", "human", "kos", "commit,approve"},
	{"carol", "human", "kos", "approve"},
	{"dave", "human", "field", "approve"},
	{"erin", "human", "field", "approve"},
	{"robot", "robot", "kos", "commit,approve"},
	{"host", "robot", "kos", "revert"},
}

// newWorld makes a site with one root; change may alter the root before it is signed.
func newWorld(t testing.TB, change func(w *world, r *Root)) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir(), keys: map[string]ssh.Signer{}, raw: map[string]ed25519.PrivateKey{}, now: day0}
	w.root = Root{Version: 1, Site: "north-sea", Tiers: DefaultTiers(), Units: []Pattern{{Path: "units/kernel-*", Tier: 0}, {Path: "profiles/core*.yaml", Tier: 0}}}
	members := map[string][]string{}
	for _, p := range people {
		uses := strings.Split(p[3], ",")
		w.root.Principals = append(w.root.Principals, Principal{Name: p[0], Class: p[1], Org: p[2], Emails: []string{p[0] + "@kos.dev"}, Keys: []Key{w.key(p[0], uses...)}})
		for _, use := range uses {
			members[use] = append(members[use], p[0])
		}
	}
	for _, role := range slices.Sorted(maps.Keys(members)) {
		w.root.Roles = append(w.root.Roles, Role{Name: role, Threshold: 1, Members: members[role]})
	}
	if change != nil {
		change(w, &w.root)
	}
	file, err := SignRoot(w.root, w.keys["alice"])
	if err != nil {
		t.Fatal(err)
	}
	w.files = map[string]string{
		"trust/1.root.json":     string(file),
		"site.yaml":             "site: north-sea\n",
		"units/relay/unit.yaml": "unit: relay\ntier: 3\n",
	}
	w.git("init", "-q", "-b", "main")
	w.v = w.verifier()
	return w
}

func (w *world) verifier() *Verifier {
	return &Verifier{
		Site: "north-sea", Branch: "main", Pin: PinOf([]byte(w.files["trust/1.root.json"])), State: StateFile{filepath.Join(w.dir, "state.json")},
		Clock: func() time.Time { return w.now }, Describe: describe,
	}
}

// key makes a key, remembers its signer and returns its line of the root.
func (w *world) key(name string, uses ...string) Key {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		w.t.Fatal(err)
	}
	w.raw[name] = private
	block, err := ssh.MarshalPrivateKey(private, "")
	if err != nil {
		w.t.Fatal(err)
	}
	if err := os.WriteFile(w.keyFile(name), pem.EncodeToMemory(block), 0o600); err != nil {
		w.t.Fatal(err)
	}
	if w.keys[name], err = signature.LoadKey(w.keyFile(name), nil); err != nil {
		w.t.Fatal(err)
	}
	return Key{Public: publicLine(w.keys[name].PublicKey()), Uses: uses}
}

func publicLine(key ssh.PublicKey) string {
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key)))
}

func (w *world) keyFile(name string) string { return filepath.Join(w.dir, "key-"+name) }

// describe reads the few lines that these sites have.
func describe(tree fs.FS, unit string) (Declared, error) {
	d := Declared{Tier: -1}
	read := func(name string) error {
		file, err := fs.ReadFile(tree, name)
		for line := range strings.Lines(string(file)) {
			key, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
			switch key {
			case "tier":
				tier, _ := strconv.Atoi(value)
				d.Tier = stronger(d.Tier, tier)
			case "profile":
				d.Profile = value
			case "needs":
				d.Needs = strings.Fields(strings.Trim(value, "[]"))
			case "images":
				d.Images = strings.Fields(value)
			case "intent":
				d.Rollback = value == "rollback"
			case "panic":
				panic("a template that breaks the reader")
			}
		}
		return err
	}
	if err := read("units/" + unit + "/unit.yaml"); err != nil {
		return d, err
	}
	if d.Profile != "" {
		return d, read("profiles/" + d.Profile + ".yaml")
	}
	return d, nil
}

// git runs the real git in the repository, without this machine's configuration.
func (w *world) git(args ...string) string {
	w.t.Helper()
	out, err := w.tryGit(nil, args...)
	if err != nil {
		w.t.Fatalf("git %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSuffix(out, "\n")
}

func (w *world) tryGit(stdin []byte, args ...string) (string, error) {
	cmd := exec.Command("git", append([]string{"-c", "gpg.format=ssh", "-c", "user.name=x", "-c", "user.email=x@kos.dev"}, args...)...)
	cmd.Dir = w.dir
	cmd.Stdin = bytes.NewReader(stdin)
	stamp := fmt.Sprintf("%d +0000", w.now.Unix())
	cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_SYSTEM=/dev/null", "GIT_AUTHOR_DATE="+stamp, "GIT_COMMITTER_DATE="+stamp, "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// commit records the work tree on the checked-out branch, signed by name ("" for nobody), written by author ("" for the signer).
func (w *world) commit(name, author, message string) Commit {
	w.t.Helper()
	for _, folder := range []string{"trust", "units", "profiles", "policy", "approvals", "site.yaml", "README"} {
		if err := os.RemoveAll(filepath.Join(w.dir, folder)); err != nil {
			w.t.Fatal(err)
		}
	}
	for file, text := range w.files {
		target := filepath.Join(w.dir, file)
		if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
			w.t.Fatal(err)
		}
		if err := os.WriteFile(target, []byte(text), 0o644); err != nil {
			w.t.Fatal(err)
		}
	}
	w.git("add", "-A", "--", ":!key-*", ":!state.json*", ":!*.signers")
	if author == "" {
		author = name
	}
	args := []string{"-c", "user.name=" + author, "-c", "user.email=" + author + "@kos.dev"}
	if name != "" {
		args = append(args, "-c", "user.signingkey="+w.keyFile(name))
	}
	args = append(args, "commit", "-q", "--allow-empty", "-m", message)
	if name != "" {
		args = append(args, "-S")
	}
	w.git(args...)
	return w.at(w.git("rev-parse", "HEAD"))
}

// at reads a commit with its whole tree.
func (w *world) at(id string) Commit {
	w.t.Helper()
	raw, err := w.tryGit(nil, "cat-file", "commit", id)
	if err != nil {
		w.t.Fatal(err, raw)
	}
	c := Commit{ID: id, Raw: []byte(raw), Tree: gitTree{fstest.MapFS{}, map[string]string{}}}
	c.Parents = strings.Fields(strings.TrimPrefix(w.git("rev-list", "--parents", "-n1", id), id))
	tree := c.Tree.(gitTree)
	tree.ids["."] = w.git("rev-parse", id+"^{tree}")
	for line := range strings.Lines(w.git("ls-tree", "-r", "-t", id)) {
		meta, name, _ := strings.Cut(strings.TrimSpace(line), "\t")
		fields := strings.Fields(meta)
		tree.ids[name] = fields[2]
		if fields[1] == "blob" {
			text, err := w.tryGit(nil, "cat-file", "blob", fields[2])
			if err != nil {
				w.t.Fatal(err)
			}
			tree.MapFS[name] = &fstest.MapFile{Data: []byte(text), Mode: 0o644}
		}
	}
	return c
}

type gitTree struct {
	fstest.MapFS
	ids map[string]string
}

func (t gitTree) ObjectID(path string) string { return t.ids[path] }

func (w *world) At(_ context.Context, id string) (Commit, error) { return w.at(id), nil }

func (w *world) Ancestor(_ context.Context, old, new string) (bool, error) {
	if _, err := w.tryGit(nil, "cat-file", "-e", old+"^{commit}"); err != nil {
		return false, nil
	}
	_, err := w.tryGit(nil, "merge-base", "--is-ancestor", old, new)
	return err == nil, nil
}

func (w *world) Between(_ context.Context, old, new string) (commits []Commit, err error) {
	args := []string{"rev-list", new}
	if old != "" {
		args = append(args, "^"+old)
	}
	for _, id := range strings.Fields(w.git(args...)) {
		commits = append(commits, w.at(id))
	}
	return commits, nil
}

// accept verifies, accepts and passes a head, as a healthy host does.
func (w *world) accept(running, head Commit) Facts {
	w.t.Helper()
	facts := w.begin(running, head)
	if err := w.v.Passed(context.Background(), head.ID); err != nil {
		w.t.Fatal(err)
	}
	return facts
}

// begin verifies and accepts a head whose gate has not passed.
func (w *world) begin(running, head Commit) Facts {
	w.t.Helper()
	facts, err := w.v.Verify(context.Background(), running, head, w)
	if err != nil {
		w.t.Fatalf("verifying %s: %v", head.ID, err)
	}
	if err := w.v.Accept(context.Background(), head, facts); err != nil {
		w.t.Fatal(err)
	}
	return facts
}

// refused verifies a head that must be refused with a code, and returns the text.
func (w *world) refused(running, head Commit, code string) string {
	w.t.Helper()
	facts, err := w.v.Verify(context.Background(), running, head, w)
	r := refusal.Of(err)
	if r == nil || string(r.Code) != code {
		w.t.Fatalf("verifying %s: got %v, want %s", head.ID, err, code)
	}
	if r.Subject == "" || len(facts.Units) > 0 || facts.Commit != "" {
		w.t.Fatalf("a refusal with subject %q and facts %+v", r.Subject, facts)
	}
	return err.Error()
}

// verify establishes the facts of one unit.
func (w *world) verify(running, head Commit, unit string) UnitFacts {
	w.t.Helper()
	facts, err := w.v.Verify(context.Background(), running, head, w)
	if err != nil {
		w.t.Fatalf("verifying %s: %v", head.ID, err)
	}
	return factsOf(w.t, facts, unit)
}

func factsOf(t testing.TB, facts Facts, unit string) UnitFacts {
	t.Helper()
	for _, u := range facts.Units {
		if u.Unit == unit {
			return u
		}
	}
	t.Fatalf("no unit %s among %+v", unit, facts.Units)
	return UnitFacts{}
}

// approve puts names' approvals of the change of one unit, as it stands in the last two commits given, into the work tree; alter may change what is signed.
func (w *world) approve(running, head Commit, unit string, alter func(*Predicate), names ...string) {
	w.t.Helper()
	units, _, err := w.v.Compare(context.Background(), running, head, w)
	if err != nil {
		w.t.Fatal(err)
	}
	base := running.ID
	if base == "" {
		base = head.ID
	}
	p := NewApproval("north-sea", "main", base, factsOf(w.t, Facts{Units: units}, unit), w.now.Add(24*time.Hour), Intent{Kind: "feature"})
	if alter != nil {
		alter(&p)
	}
	for _, name := range names {
		file, data, err := SignApproval(p, w.keys[name])
		if err != nil {
			w.t.Fatal(err)
		}
		w.files[file] = string(data)
	}
}

// codes are the codes of the approvals that do not count.
func codes(u UnitFacts) (codes []string) {
	for _, a := range u.Uncounted {
		codes = append(codes, a.Code)
	}
	return codes
}
