package trust

import (
	"context"
	"crypto/ed25519"
	"crypto/sha1"
	"encoding/hex"
	"fmt"
	"path"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"golang.org/x/crypto/ssh"
)

// line is a history in memory: each commit's only parent is the one before it.
type line []Commit

func (l line) index(id string) int {
	for i, c := range l {
		if c.ID == id {
			return i
		}
	}
	return -1
}

func (l line) At(_ context.Context, id string) (Commit, error) { return l[l.index(id)], nil }

func (l line) Ancestor(_ context.Context, old, new string) (bool, error) {
	return l.index(old) >= 0 && l.index(old) <= l.index(new), nil
}

func (l line) Between(_ context.Context, old, new string) (commits []Commit, err error) {
	for i := l.index(new); i > l.index(old); i-- {
		commits = append(commits, l[i])
	}
	return commits, nil
}

// idTree gives every file and folder an id from its content.
func idTree(files map[string]string) gitTree {
	t := gitTree{fstest.MapFS{}, map[string]string{}}
	folders := map[string]*strings.Builder{}
	for name, text := range files {
		t.MapFS[name] = &fstest.MapFile{Data: []byte(text), Mode: 0o644}
		sum := sha1.Sum([]byte(text))
		t.ids[name] = hex.EncodeToString(sum[:])
	}
	for name := range files {
		for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
			if folders[dir] == nil {
				folders[dir] = &strings.Builder{}
			}
		}
	}
	for dir := range folders {
		sum := sha1.New()
		if err := walk(t, dir, func(name string) { fmt.Fprintln(sum, name, t.ids[name]) }); err != nil {
			panic(err)
		}
		t.ids[dir] = hex.EncodeToString(sum.Sum(nil))
	}
	return t
}

func walk(t gitTree, dir string, f func(string)) error {
	entries, err := t.ReadDir(dir)
	for _, e := range entries {
		name := path.Join(dir, e.Name())
		if !e.IsDir() {
			f(name)
		} else if err := walk(t, name, f); err != nil {
			return err
		}
	}
	return err
}

// BenchmarkVerify1000 judges and accepts one changed unit of a thousand and its approval, on an agent that has run for a while and on one that has just begun.
func BenchmarkVerify1000(b *testing.B) {
	_, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		b.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(private)
	if err != nil {
		b.Fatal(err)
	}
	root := Root{Version: 1, Site: "s", Tiers: []Tier{{Tier: 0, Need: 1}, {Tier: 1, Need: 1}, {Tier: 2, Need: 1}, {Tier: 3}},
		Principals: []Principal{{Name: "a", Class: "human", Keys: []Key{{Public: publicLine(signer.PublicKey()), Uses: []string{"root", "commit", "approve"}}}}}}
	for _, role := range []string{"root", "commit", "approve"} {
		root.Roles = append(root.Roles, Role{Name: role, Threshold: 1, Members: []string{"a"}})
	}
	file, err := SignRoot(root, signer)
	if err != nil {
		b.Fatal(err)
	}
	files := map[string]string{"trust/1.root.json": string(file)}
	for i := range 1000 {
		files[fmt.Sprintf("units/u%04d/unit.yaml", i)] = "tier: 3\n"
	}
	var history line
	commit := func() {
		parent := ""
		if len(history) > 0 {
			parent = "parent " + history[len(history)-1].ID + "\n"
		}
		raw, err := SignCommit([]byte("tree "+strings.Repeat("0", 40)+"\n"+parent+"author x <x@y> 1 +0000\ncommitter x <x@y> 1 +0000\n\nm\n"), signer)
		if err != nil {
			b.Fatal(err)
		}
		history = append(history, Commit{ID: ObjectID(raw), Raw: raw, Tree: idTree(files)})
	}
	commit()
	v := func() *Verifier {
		return &Verifier{Site: "s", Branch: "main", Pin: PinOf(file), State: StateFile{filepath.Join(b.TempDir(), "state")}, Describe: describe}
	}
	ctx := context.Background()
	files["units/u0000/unit.yaml"] = "tier: 2\n"
	units, _, err := v().Compare(ctx, history[0], Commit{ID: history[0].ID, Raw: history[0].Raw, Tree: idTree(files)}, history)
	if err != nil {
		b.Fatal(err)
	}
	name, approval, err := SignApproval(NewApproval("s", "main", history[0].ID, units[0], time.Now().Add(time.Hour), Intent{}), signer)
	if err != nil {
		b.Fatal(err)
	}
	files[name] = string(approval)
	commit()
	began := func() *Verifier {
		v := v()
		facts, err := v.Verify(ctx, Commit{}, history[0], history)
		if err == nil {
			err = v.Accept(ctx, history[0], facts)
		}
		if err != nil {
			b.Fatal(err)
		}
		return v
	}
	b.Run("first", func(b *testing.B) {
		for b.Loop() {
			began()
		}
	})
	warm := began()
	b.Run("verify", func(b *testing.B) {
		for b.Loop() {
			if facts, err := warm.Verify(ctx, history[0], history[1], history); err != nil || len(facts.Units) != 1 || facts.Units[0].Need != 1 || facts.Units[0].Missing() != 0 {
				b.Fatal(facts, err)
			}
		}
	})
	b.Run("verify after a start", func(b *testing.B) {
		for b.Loop() {
			fresh := v()
			fresh.State = warm.State
			if _, err := fresh.Verify(ctx, history[0], history[1], history); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("accept", func(b *testing.B) {
		for b.Loop() {
			b.StopTimer()
			v := began()
			facts, err := v.Verify(ctx, history[0], history[1], history)
			if err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
			if err := v.Accept(ctx, history[1], facts); err != nil {
				b.Fatal(err)
			}
		}
	})
}
