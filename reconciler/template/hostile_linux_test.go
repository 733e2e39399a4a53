package template

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"
	"time"

	"github.com/kindos/kmo/policy/refusal"
)

// hostile are unit files that mean to cost more than they weigh. The parts are repeated without end where a file is endless.
func hostile() map[string]string {
	laughs := "a0: &a0 [lol]\n"
	for i := 1; i < 30; i++ {
		laughs += fmt.Sprintf("a%d: &a%d [%s*a%d]\n", i, i, strings.Repeat(fmt.Sprintf("*a%d, ", i-1), 9), i-1)
	}
	return map[string]string{
		"U-07 billion laughs":                    laughs,
		"U-07 alias to itself":                   "a: &a {b: *a}\n",
		"U-07 100k nested maps":                  strings.Repeat("{a: ", 100_000),
		"U-07 nested maps of one line":           strings.Repeat("{a: ", 17_000/2),
		"U-07 100k nested lists":                 strings.Repeat("[", 100_000),
		"U-07 nested lists in blocks":            "a:\n  " + strings.Repeat("- ", 15_000) + "x",
		"U-07 nested maps in blocks":             blocks(1000),
		"U-07 tiny documents":                    strings.Repeat("a\n---\n", 6000),
		"U-07 scalar of a mebibyte":              "a: " + strings.Repeat("x", maxFile-3),
		"U-07 quoted scalar of a mebibyte":       `a: "` + strings.Repeat(`\u0041`, (maxFile-5)/6) + `"`,
		"U-07 key of a mebibyte":                 strings.Repeat("x", maxFile-3) + ": a",
		"U-07 comment of a mebibyte":             "#" + strings.Repeat("x", maxFile-1),
		"U-07 many comments":                     strings.Repeat("#"+strings.Repeat("x", 50)+"\n", 19_000),
		"U-07 many comments in a list":           "needs:\n" + strings.Repeat("# "+strings.Repeat("x", 80)+"\n- a\n", 6000),
		"U-07 many unknown keys":                 unknown(19_000 / 2),
		"U-07 many keys of the environment":      "run: {env: {" + strings.Repeat("A: b, ", 6000) + "}}",
		"U-07 many words":                        "run: {args: [" + strings.Repeat("a,", 19_000) + "]}",
		"U-07 many spaces":                       "a:" + strings.Repeat(" ", maxFile-10) + "x",
		"U-07 block scalar of many lines":        "a: |\n" + strings.Repeat(" x\n", 19_000),
		"U-07 open quote":                        "a: '" + strings.Repeat("b ", maxFile/4),
		"U-07 anchors without end":               strings.Repeat("? &a a\n", 9000),
		"U-07 question marks":                    strings.Repeat("? ", 19_000),
		"U-07 50 MB scalar, endless":             "a: x",
		"U-07 1M tiny documents, endless":        "---\na: 1\n",
		"U-07 nested maps, endless":              "{a: ",
		"U-07 10 GB of nothing, endless":         " ",
		"U-07 a billion laughs in one, endless":  "a: &a [*a]\n",
		"U-07 characters of four bytes, endless": "\U0001F4A3",
	}
}

func blocks(deep int) string {
	var b strings.Builder
	for i := range deep {
		b.WriteString(strings.Repeat(" ", i) + "a:\n")
	}
	return b.String()
}

func unknown(keys int) string {
	var b strings.Builder
	for i := range keys {
		fmt.Fprintf(&b, "resourcesresourcesresourcesresourcesresources%d: 1\n", i)
	}
	return b.String()
}

// endless serves a file that never ends beside a site.
type endless struct {
	fstest.MapFS
	name string
	part []byte
}

func (e endless) Open(name string) (fs.File, error) {
	f, err := e.MapFS.Open(name)
	if err == nil && name == e.name {
		f = &endlessFile{File: f, part: e.part}
	}
	return f, err
}

type endlessFile struct {
	fs.File
	part []byte
	at   int
}

func (f *endlessFile) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = f.part[f.at]
		f.at = (f.at + 1) % len(f.part)
	}
	return len(p), nil
}

// TestMain loads the hostile files in a process of their own when it is asked to, so that what they cost can be measured.
func TestMain(m *testing.M) {
	if os.Getenv("KMO_TEST_HOSTILE") == "" {
		os.Exit(m.Run())
	}
	all := hostile()
	for _, name := range slices.Sorted(maps.Keys(all)) {
		tree := fs.FS(files("site.yaml", siteFile, "units/u/unit.yaml", all[name]))
		if strings.HasSuffix(name, "endless") {
			tree = endless{tree.(fstest.MapFS), "units/u/unit.yaml", []byte(all[name])}
		}
		begun := time.Now()
		_, err := Load(tree)
		codes := map[refusal.Code]bool{}
		for _, one := range refusal.All(err) {
			codes[one.Code] = true
		}
		fmt.Printf("%s\t%v\t%d\t%v\t%.60q\n", name, slices.Sorted(maps.Keys(codes)), len(fmt.Sprint(err)), time.Since(begun).Milliseconds(), fmt.Sprint(err))
	}
	os.Exit(0)
}

func TestU07HostileYAMLIsCheap(t *testing.T) {
	const (
		budget   = 96 << 10 * overhead // KiB of memory for all of it, Go's own and the test's texts included
		patience = 10                  // seconds for any one of them, on a slow and busy machine
	)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "KMO_TEST_HOSTILE=1", "GOMEMLIMIT=64MiB")
	var out, fault bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, io.MultiWriter(&fault, os.Stderr)
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s", err, fault.String())
	}
	if peak := cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss; peak > budget {
		t.Errorf("%d KiB at its peak, want %d at most", peak, budget)
	} else {
		t.Logf("%d KiB at its peak", peak)
	}
	seen := make(map[string]bool)
	for line := range strings.Lines(out.String()) {
		cells := strings.Split(strings.TrimSpace(line), "\t")
		if len(cells) != 5 {
			t.Fatalf("line %q", line)
		}
		seen[cells[0]] = true
		t.Run(cells[0], func(t *testing.T) {
			var size, took int
			fmt.Sscan(cells[2], &size)
			fmt.Sscan(cells[3], &took)
			if cells[1] != "[E_DECODE]" || size > 50*1000 || took > patience*1000 {
				t.Errorf("refused with %s in %d bytes after %d ms: %s", cells[1], size, took, cells[4])
			}
			t.Logf("%d ms: %s", took, cells[4])
		})
	}
	if len(seen) != len(hostile()) {
		t.Errorf("%d files tried, want %d", len(seen), len(hostile()))
	}
}
