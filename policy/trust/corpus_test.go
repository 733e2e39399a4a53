package trust

import (
	"bytes"
	"compress/zlib"
	"crypto/sha1"
	"encoding/hex"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/hiddeco/sshsig"

	"github.com/kindos/kmo/policy/refusal"
)

// corpus makes commits: most are signed well, and half of them are then broken in one or two places.
type corpus struct {
	*world
	*rand.Rand
	known   []string // keys that are on the list of allowed signers
	unknown []string
	before  []byte // the commit made before, whose signature may be stolen
}

func newCorpus(t *testing.T, seed uint64) *corpus {
	c := &corpus{world: newWorld(t, nil), Rand: rand.New(rand.NewPCG(seed, 0))}
	c.commit("alice", "", "begin")
	for name, args := range map[string][]string{
		"p256": {"-t", "ecdsa", "-b", "256"}, "p384": {"-t", "ecdsa", "-b", "384"}, "p521": {"-t", "ecdsa", "-b", "521"},
		"rsa2048": {"-t", "rsa", "-b", "2048"}, "rsa3072": {"-t", "rsa", "-b", "3072"}, "stranger": {"-t", "ed25519"},
	} {
		c.keygen(name, args...)
	}
	c.keys["sk"], c.keys["sk-ecdsa"], c.keys["untouched"] = newSoftKey(t, 1), newSoftECDSA(t, 1), newSoftKey(t, 0)
	c.known = []string{"alice", "bob", "carol", "p256", "p384", "rsa3072", "sk", "sk-ecdsa", "p521", "rsa2048", "untouched"}
	c.unknown = []string{"stranger", "dave"}
	return c
}

func pick[T any](c *corpus, of ...T) T { return of[c.IntN(len(of))] }

// next is one more commit object.
func (c *corpus) next() []byte {
	unsigned := c.plain()
	if c.IntN(4) == 0 { // so that what is broken is signed well
		unsigned = c.damage(unsigned)
	}
	if c.IntN(40) == 0 {
		return unsigned
	}
	names := c.known
	if c.IntN(20) == 0 {
		names = c.unknown
	}
	namespace, hash := "git", pick(c, sshsig.HashSHA512, sshsig.HashSHA512, sshsig.HashSHA256)
	if c.IntN(30) == 0 {
		namespace = pick(c, "file", "Git", "git ", approvalPurpose.Namespace)
	}
	signed := signAs(unsigned, c.armoured(unsigned, c.keys[pick(c, names...)], namespace, hash))
	out := signed
	for range pick(c, 0, 0, 1, 1, 1, 2) {
		out = c.damage(out)
	}
	c.before = signed
	return out
}

// plain is an unsigned commit as Git writes it, or as it could.
func (c *corpus) plain() []byte {
	var b strings.Builder
	fmt.Fprintf(&b, "tree %s\n", c.hex())
	for range c.IntN(4) {
		fmt.Fprintf(&b, "parent %s\n", c.hex())
	}
	for _, header := range []string{"author", "committer"} {
		name := pick(c, "Ann Ö", "x", "", "A  B", "tree", "日本", "-----BEGIN SSH SIGNATURE-----", "gpgsig x")
		fmt.Fprintf(&b, "%s %s <%s> %d %s\n", header, name, pick(c, "ann@kos.dev", "", "a b", "x@y"), c.Int64N(1<<34), pick(c, "+0000", "-0000", "+0130", "-1200", "+9999"))
	}
	if c.IntN(30) == 0 {
		b.WriteString(pick(c, "encoding latin1\n", "also this\n", "mergetag object "+c.hex()+"\n type commit\n", "gpgsig-sha256 x\n", "HG:extra x\n"))
	}
	b.WriteString("\n")
	for range c.IntN(4) {
		b.WriteString(pick(c, "words\n", "\n", " gpgsig x\n", "gpgsig -----BEGIN SSH SIGNATURE-----\n", "Kmo-Reverts: a..b\n", "tree "+c.hex()+"\n", "ünï\n", "no end of line", "\t\n", "-----BEGIN PGP SIGNATURE-----\n"))
	}
	return []byte(b.String())
}

func (c *corpus) hex() string {
	return fmt.Sprintf("%016x%016x%08x", c.Uint64(), c.Uint64(), c.Uint32())
}

// damage changes an object in one place.
func (c *corpus) damage(raw []byte) []byte {
	at := c.IntN(len(raw) + 1)
	lines := strings.SplitAfter(string(raw), "\n")
	line := c.IntN(len(lines))
	switch c.IntN(16) {
	case 0:
		if at == len(raw) {
			return raw[:len(raw)-1]
		}
		raw = bytes.Clone(raw)
		raw[at] ^= 1 << c.IntN(8)
		return raw
	case 1:
		return slices.Concat(raw[:at], []byte{pick(c, byte('\n'), ' ', 0, '\r', 'A', '=', 0xff, '\t', '-')}, raw[at:])
	case 2:
		return slices.Delete(bytes.Clone(raw), min(at, len(raw)-1), min(at, len(raw)-1)+1)
	case 3:
		return raw[:at+min(1, len(raw)-at)]
	case 4: // a line twice
		return []byte(strings.Join(slices.Insert(lines, line, lines[line]), ""))
	case 5: // a line gone
		return []byte(strings.Join(slices.Delete(lines, line, line+1), ""))
	case 6: // two lines swapped
		other := c.IntN(len(lines))
		lines[line], lines[other] = lines[other], lines[line]
		return []byte(strings.Join(lines, ""))
	case 7: // CR at the end of a line, or of each
		if c.IntN(2) == 0 {
			return bytes.ReplaceAll(raw, []byte("\n"), []byte("\r\n"))
		}
		lines[line] = strings.Replace(lines[line], "\n", "\r\n", 1)
		return []byte(strings.Join(lines, ""))
	case 8: // the signature of another commit
		return c.graft(raw, c.before)
	case 9: // another signature besides
		return bytes.Replace(raw, []byte("\ngpgsig "), slices.Concat([]byte("\n"), header(c.before), []byte("gpgsig ")), 1)
	case 10: // the signature in another place
		sig := header(raw)
		rest := bytes.Replace(raw, sig, nil, 1)
		places := strings.SplitAfter(string(rest), "\n")
		return []byte(strings.Join(slices.Insert(places, c.IntN(len(places)), string(sig)), ""))
	case 11: // base64 in lines of another length
		return c.rewrap(raw)
	case 12: // blanks at the end of a line
		lines[line] = strings.Replace(lines[line], "\n", pick(c, " \n", "\t\n", "\n \n"), 1)
		return []byte(strings.Join(lines, ""))
	case 13:
		return bytes.Replace(raw, []byte("gpgsig "), []byte(pick(c, "gpgsig  ", "GPGSIG ", "gpgsig-sha256 ", "gpgsig\t", "xgpgsig ")), 1)
	case 14:
		return bytes.Replace(raw, []byte("SSH SIGNATURE"), []byte(pick(c, "PGP SIGNATURE", "SIGNED MESSAGE", "ssh signature", "SSH  SIGNATURE")), pick(c, 1, 2))
	default: // more at the end of the message
		return append(bytes.Clone(raw), pick(c, "\n", " ", "more\n", "\x00", "\x00tree x\n")...)
	}
}

// header is the gpgsig header of an object, with its lines.
func header(raw []byte) []byte {
	var lines []byte
	for line := range bytes.Lines(raw) {
		if bytes.HasPrefix(line, []byte("gpgsig ")) || len(lines) > 0 && line[0] == ' ' {
			lines = append(lines, line...)
		} else if len(lines) > 0 {
			break
		}
	}
	return lines
}

func (c *corpus) graft(raw, from []byte) []byte {
	sig := header(raw)
	if len(sig) == 0 || len(from) == 0 {
		return raw
	}
	return bytes.Replace(raw, sig, header(from), 1)
}

func (c *corpus) rewrap(raw []byte) []byte {
	sig := header(raw)
	begin, end := bytes.IndexByte(sig, '\n'), bytes.LastIndex(sig, []byte("\n -----END"))
	if begin < 0 || end <= begin {
		return raw
	}
	text := strings.ReplaceAll(string(sig[begin:end]), "\n ", "")
	var b strings.Builder
	for width := pick(c, 1, 7, 64, 76, 4096); len(text) > 0; {
		n := min(width, len(text))
		b.WriteString("\n " + text[:n])
		text = text[n:]
	}
	return bytes.Replace(raw, sig, slices.Concat(sig[:begin], []byte(b.String()), sig[end:]), 1)
}

// stricter is why this package refuses what Git takes; "" if there is no reason to.
func stricter(err error) string {
	r := refusal.Of(err)
	if r == nil {
		return ""
	}
	switch {
	case r.Code == "E_OBJ_MALFORMED":
		return "one spelling of a commit"
	case r.Code == "E_ALG_FORBIDDEN" && strings.Contains(r.Got, "signature that starts with"):
		return "the block begins on the header's line"
	case r.Code == "E_ALG_FORBIDDEN":
		return "keys and hashes on the list"
	case r.Code == "E_SIG_BAD" && (strings.Contains(r.Got, "armour") || strings.Contains(r.Got, "spelling") || strings.Contains(r.Got, "no SSHSIG")):
		return "one spelling of a signature"
	case r.Code == "E_SIG_BAD" && strings.Contains(r.Got, "presence"):
		return "a touched security key"
	}
	return ""
}

// object stores a commit as it is, loose, and returns its id.
func (c *corpus) object(raw []byte) string {
	full := append(fmt.Appendf(nil, "commit %d\x00", len(raw)), raw...)
	sum := sha1.Sum(full)
	id := hex.EncodeToString(sum[:])
	var packed bytes.Buffer
	z := zlib.NewWriter(&packed)
	z.Write(full) // into memory
	z.Close()
	folder := filepath.Join(c.dir, ".git", "objects", id[:2])
	if err := os.MkdirAll(folder, 0o755); err != nil {
		c.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(folder, id[2:]), packed.Bytes(), 0o644); err != nil {
		c.t.Fatal(err)
	}
	return id
}

// TestU19DifferentialCorpus compares this package with git verify-commit over generated commits, KMO_TEST_COMMITS of them: it accepts nothing that
// Git refuses, and refuses what Git accepts for a named reason alone.
func TestU19DifferentialCorpus(t *testing.T) {
	n, seed := 400, uint64(1)
	if testing.Short() {
		n = 50
	}
	if text := os.Getenv("KMO_TEST_COMMITS"); text != "" {
		var err error
		if n, err = strconv.Atoi(text); err != nil {
			t.Fatal(err)
		}
		seed = rand.Uint64()
		t.Log("seed", seed)
	}
	c := newCorpus(t, seed)
	signers := c.signers(c.known...)
	known := map[string]bool{}
	for _, name := range c.known {
		known[string(c.keys[name].PublicKey().Marshal())] = true
	}
	work := make(chan []byte)
	var mu sync.Mutex
	counts := map[string]int{}
	var wait sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wait.Go(func() {
			for raw := range work {
				got := c.compare(t, raw, known, signers)
				mu.Lock()
				counts[got]++
				mu.Unlock()
			}
		})
	}
	for range n {
		work <- c.next()
	}
	close(work)
	wait.Wait()
	for _, what := range slices.Sorted(maps.Keys(counts)) {
		t.Logf("%6d %s", counts[what], what)
	}
	if counts["both accept"] < n/10 || counts["both refuse"] < n/10 {
		t.Error("a corpus in which hardly anything is good, or bad")
	}
}

// compare says how the two agree on an object.
func (c *corpus) compare(t *testing.T, raw []byte, known map[string]bool, signers string) string {
	id := c.object(raw)
	_, signed, err := openCommit(raw, "commit")
	if err == nil {
		err = signed.Verify()
	}
	ours := err == nil && known[string(signed.Key().Marshal())]
	_, gitErr := c.tryGit(nil, "-c", "gpg.ssh.allowedSignersFile="+signers, "verify-commit", id)
	switch theirs := gitErr == nil; {
	case ours && !theirs:
		t.Errorf("accepted, and git refuses it:\n%q", raw)
	case !ours && theirs && stricter(err) == "":
		t.Errorf("git accepts it, and here it is %v:\n%q", err, raw)
	case !ours && theirs:
		return "git accepts, refused for: " + stricter(err)
	case ours:
		return "both accept"
	}
	return "both refuse"
}
