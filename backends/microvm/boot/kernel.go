package boot

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pierrec/lz4/v4"
)

// payloadEnd is where the fields of a bzImage's header end that say where its kernel is.
const payloadEnd = 0x250

// packed says whether this is the begin of an x86 bzImage.
func packed(image []byte) bool {
	return len(image) >= payloadEnd && string(image[0x202:0x206]) == "HdrS"
}

// unpack returns the vmlinux in an x86 bzImage. It is false for any other image, and for one packed otherwise.
func unpack(image []byte) ([]byte, bool) {
	// Documentation/arch/x86/boot.rst: setup_sects, the magic "HdrS", payload_offset and payload_length.
	if !packed(image) {
		return nil, false
	}
	start := (uint64(image[0x1f1]) + 1) * 512
	from := start + uint64(binary.LittleEndian.Uint32(image[0x248:]))
	to := from + uint64(binary.LittleEndian.Uint32(image[0x24c:]))
	if from >= to || to > uint64(len(image)) {
		return nil, false
	}
	payload := image[from:to]
	var unpacked []byte
	var err error
	switch {
	case bytes.HasPrefix(payload, []byte{0x02, 0x21, 0x4c, 0x18}):
		// What the kernel's build appends to the frame, the size of all, is no part of it.
		unpacked, err = io.ReadAll(io.LimitReader(lz4.NewReader(bytes.NewReader(payload[:len(payload)-4])), 1<<28))
	case bytes.HasPrefix(payload, []byte{0x1f, 0x8b}):
		var r *gzip.Reader
		if r, err = gzip.NewReader(bytes.NewReader(payload)); err == nil {
			r.Multistream(false)
			unpacked, err = io.ReadAll(io.LimitReader(r, 1<<28))
		}
	default:
		return nil, false
	}
	return unpacked, err == nil && bytes.HasPrefix(unpacked, []byte(elf.ELFMAG))
}

// module is a kernel module, unpacked.
type module struct {
	name  string
	bytes []byte
}

// collect returns modules and those that they need, each after those.
func collect(dir string, names []string) (list []module, err error) {
	if dir == "" {
		return nil, nil
	}
	files := map[string]string{}
	err = filepath.WalkDir(filepath.Join(dir, "kernel"), func(path string, d fs.DirEntry, err error) error {
		if name, _, ok := strings.Cut(filepath.Base(path), ".ko"); ok && err == nil && !d.IsDir() {
			files[canonical(name)] = path
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	inside, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	var builtin []string
	for line := range strings.Lines(string(inside)) {
		name, _, _ := strings.Cut(filepath.Base(strings.TrimSpace(line)), ".ko")
		builtin = append(builtin, canonical(name))
	}
	var add func(name string) error
	add = func(name string) error {
		name = canonical(name)
		if slices.Contains(builtin, name) || slices.ContainsFunc(list, func(m module) bool { return m.name == name }) {
			return nil
		}
		path := files[name]
		if path == "" {
			return fmt.Errorf("the kernel of %s has no module %s", dir, name)
		}
		text, err := read(path)
		if err != nil {
			return err
		}
		for _, needed := range needs(text) {
			if err := add(needed); err != nil {
				return err
			}
		}
		list = append(list, module{name, text})
		return nil
	}
	for _, name := range names {
		if err := add(name); err != nil {
			return nil, err
		}
	}
	return list, nil
}

func canonical(name string) string { return strings.ReplaceAll(name, "-", "_") }

// read reads a module, unpacked by the tool of its packing.
func read(path string) ([]byte, error) {
	tool := map[string]string{".xz": "xz", ".zst": "zstd"}[filepath.Ext(path)]
	if tool == "" {
		return os.ReadFile(path)
	}
	text, err := exec.Command(tool, "-dc", path).Output()
	if err != nil {
		return nil, fmt.Errorf("unpacking %s by %s: %v", path, tool, err)
	}
	return text, nil
}

// needs reads what a module depends on from its own words.
func needs(text []byte) []string {
	f, err := elf.NewFile(bytes.NewReader(text))
	if err != nil {
		return nil
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil
	}
	words, err := section.Data()
	if err != nil {
		return nil
	}
	for word := range strings.SplitSeq(string(words), "\x00") {
		if list, ok := strings.CutPrefix(word, "depends="); ok && list != "" {
			return strings.Split(list, ",")
		}
	}
	return nil
}

// first writes the first file system.
func first(to *bytes.Buffer, guest []byte, modules []module) {
	a := archive{to: to}
	a.entry("dev", 0o040755, 0, 0, nil)
	a.entry("dev/console", 0o020600, 5, 1, nil)
	a.entry("init", 0o100755, 0, 0, guest)
	a.entry("modules", 0o040700, 0, 0, nil)
	for i, m := range modules {
		a.entry(fmt.Sprintf("modules/%02d-%s.ko", i, m.name), 0o100600, 0, 0, m.bytes)
	}
	a.entry("TRAILER!!!", 0, 0, 0, nil)
}

// archive writes newc.
type archive struct {
	to    *bytes.Buffer
	inode int
}

func (a *archive) entry(name string, mode, major, minor int, content []byte) {
	a.inode++
	fmt.Fprintf(a.to, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X", a.inode, mode, 0, 0, 1, 0, len(content), 0, 0, major, minor, len(name)+1, 0)
	a.to.WriteString(name + "\x00")
	a.pad()
	a.to.Write(content)
	a.pad()
}

func (a *archive) pad() {
	for a.to.Len()%4 != 0 {
		a.to.WriteByte(0)
	}
}
