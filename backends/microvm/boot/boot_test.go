package boot

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pierrec/lz4/v4"
)

func TestFindTakesTheNewestWithModules(t *testing.T) {
	dir := t.TempDir()
	for _, version := range []string{"6.1.0-9-cloud-amd64", "6.1.0-56-cloud-amd64", "6.12.0-1-amd64"} {
		if err := os.WriteFile(filepath.Join(dir, "vmlinuz-"+version), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Find(dir, dir); err == nil || !strings.Contains(err.Error(), "linux-image") {
		t.Errorf("without modules: %v, want what to install", err)
	}
	for _, version := range []string{"6.1.0-9-cloud-amd64", "6.1.0-56-cloud-amd64"} {
		if err := os.Mkdir(filepath.Join(dir, version), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	k, err := Find(dir, dir)
	if err != nil || filepath.Base(k.Modules) != "6.1.0-56-cloud-amd64" {
		t.Errorf("found %v, %v", k, err)
	}
}

// image is a bzImage with a payload.
func image(payload []byte) []byte {
	text := make([]byte, 512*2, 512*2+len(payload))
	text[0x1f1] = 1
	copy(text[0x202:], "HdrS")
	binary.LittleEndian.PutUint32(text[0x248:], 0)
	binary.LittleEndian.PutUint32(text[0x24c:], uint32(len(payload)))
	return append(text, payload...)
}

func TestUnpack(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	want := []byte("\x7fELF")
	for len(want) < 9<<20 { // more than one block, with much that repeats, near and far
		piece := bytes.Repeat([]byte{byte(random.Uint32())}, random.IntN(400))
		if random.IntN(2) == 0 {
			piece = want[random.IntN(len(want)):]
			piece = piece[:min(len(piece), 1+random.IntN(5000))]
		}
		want = append(want, piece...)
	}
	var packed bytes.Buffer
	w := gzip.NewWriter(&packed)
	_, err := w.Write(want)
	if err = errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	if got, ok := unpack(image(packed.Bytes())); !ok || !bytes.Equal(got, want) {
		t.Errorf("gzip: %t, %d bytes, want %d", ok, len(got), len(want))
	}
	framed := legacy(t, want)
	if got, ok := unpack(image(framed)); !ok || !bytes.Equal(got, want) {
		t.Errorf("lz4: %t, %d bytes, want %d", ok, len(got), len(want))
	}
	for _, broken := range [][]byte{nil, []byte("MZ"), want[:4096], image(nil), image([]byte("(\xb5/\xfd"))} {
		if _, ok := unpack(broken); ok {
			t.Errorf("%.20q was unpacked", broken)
		}
	}
	for range 200 { // what is broken is no kernel, or another, and nobody panics
		broken := slices.Clone(framed[:min(len(framed), 4096)])
		broken[4+random.IntN(len(broken)-4)] ^= byte(1 + random.IntN(255))
		_, _ = unpack(image(broken[:random.IntN(len(broken))]))
	}
}

// legacy packs text as the kernel's build does: LZ4's legacy frame, and behind it the size.
func legacy(t *testing.T, text []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := lz4.NewWriter(&out)
	err := w.Apply(lz4.LegacyOption(true))
	if err == nil {
		_, err = w.Write(text)
	}
	if err = errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return binary.LittleEndian.AppendUint32(out.Bytes(), uint32(len(text)))
}

func TestModulesComeAfterWhatTheyNeed(t *testing.T) {
	dir := t.TempDir()
	module := func(name, depends string) {
		t.Helper()
		at := filepath.Join(dir, "kernel", name+".ko")
		source := filepath.Join(dir, filepath.Base(name)+".s")
		text := fmt.Sprintf(".section .modinfo,\"a\"\n.asciz \"depends=%s\"\n", depends)
		err := errors.Join(os.MkdirAll(filepath.Dir(at), 0o700), os.WriteFile(source, []byte(text), 0o600))
		if err != nil {
			t.Fatal(err)
		}
		if said, err := exec.Command("gcc", "-c", "-o", at, source).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, said)
		}
	}
	module("drivers/net/virtio_net", "net-failover,virtio")
	module("net_failover", "failover")
	module("failover", "")
	module("virtio", "")
	if err := os.WriteFile(filepath.Join(dir, "modules.builtin"), []byte("kernel/fs/ext4/ext4.ko\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	list, err := collect(dir, []string{"virtio", "virtio_net", "ext4"})
	var names []string
	for _, m := range list {
		names = append(names, m.name)
	}
	if want := []string{"virtio", "failover", "net_failover", "virtio_net"}; err != nil || !slices.Equal(names, want) {
		t.Errorf("%q, %v; want %q", names, err, want)
	}
	if _, err := collect(dir, []string{"floppy"}); err == nil || !strings.Contains(err.Error(), "no module floppy") {
		t.Errorf("a module that is not there: %v", err)
	}
}

// The disk is read back by e2fsprogs' own reader.
func TestDisk(t *testing.T) {
	folder, to := t.TempDir(), filepath.Join(t.TempDir(), "disk")
	err := errors.Join(os.WriteFile(filepath.Join(folder, "app"), bytes.Repeat([]byte("x"), 3<<20), 0o755), os.Symlink("app", filepath.Join(folder, "link")),
		os.Mkdir(filepath.Join(folder, "etc"), 0o750), os.Lchown(filepath.Join(folder, "etc"), 7, 8))
	if err != nil {
		t.Fatal(err)
	}
	for i := range 500 {
		if err := os.WriteFile(filepath.Join(folder, "etc", fmt.Sprint("a-file-with-a-name-of-some-length-", i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := Disk(t.Context(), folder, to); err != nil {
		t.Fatal(err)
	}
	said, err := exec.Command("debugfs", "-R", "ls -l /", to).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, said)
	}
	for _, want := range []string{"100755", "3145728", "120777", "40750", "     7      8 "} {
		if !strings.Contains(string(said), want) {
			t.Errorf("the disk has no %s: %s", want, said)
		}
	}
	if err := Disk(t.Context(), filepath.Join(folder, "none"), to); err == nil {
		t.Error("a disk of nothing")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Disk(ctx, folder, to); err == nil {
		t.Error("a disk although nobody waits")
	}
}

func TestCacheMakesOnceAndForgets(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, unfinished+"half"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	made := 0
	how := func(to string) error {
		made++
		return os.WriteFile(to, nil, 0o600)
	}
	for i := range 5 {
		at := filepath.Join(dir, fmt.Sprint("kind-", i))
		for range 2 {
			if err := c.make(t.Context(), at, "kind-", 3, how); err != nil {
				t.Fatal(err)
			}
		}
		old := time.Now().Add(time.Duration(i-10) * time.Hour)
		if err := os.Chtimes(at, old, old); err != nil {
			t.Fatal(err)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*")); made != 5 || len(left) != 3 || filepath.Base(left[0]) != "kind-2" {
		t.Errorf("made %d times, left %q", made, left)
	}
	failing := errors.New("no room")
	err = c.make(t.Context(), filepath.Join(dir, "kind-9"), "kind-", 3, func(to string) error { return errors.Join(how(to), failing) })
	if left, _ := filepath.Glob(filepath.Join(dir, ".new-*")); !errors.Is(err, failing) || len(left) > 0 {
		t.Errorf("%v; left %q", err, left)
	}
}
