package wasm

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kindos/kmo/backends"
)

// module writes a module of the sections given, each an id and its bytes.
func module(sections ...[]byte) []byte {
	bytes := []byte(coreHeader)
	for _, s := range sections {
		bytes = append(bytes, s[0])
		bytes = binary.AppendUvarint(bytes, uint64(len(s)-1))
		bytes = append(bytes, s[1:]...)
	}
	return bytes
}

func word(s string) []byte { return append(binary.AppendUvarint(nil, uint64(len(s))), s...) }

func imported(module, name string, external ...byte) []byte {
	return append(append(word(module), word(name)...), external...)
}

func section(id byte, entries ...[]byte) []byte {
	bytes := binary.AppendUvarint([]byte{id}, uint64(len(entries)))
	for _, e := range entries {
		bytes = append(bytes, e...)
	}
	return bytes
}

func exported(name string, kind byte) []byte { return append(word(name), kind, 0) }

func TestInspect(t *testing.T) {
	start := section(sectionExport, exported("memory", 2), exported(startFunction, 0))
	clock := imported(wasi, "clock_time_get", 0, 0)
	for _, test := range []struct {
		name    string
		bytes   []byte
		feature backends.Feature // of the FeatureError wanted
		want    string           // within the error; "" is none
	}{
		{"a command", module(section(sectionImport, clock), start), "", ""},
		{"a command without imports", module([]byte{0, 1, 'x', 7}, start), "", ""},
		{"a component", []byte("\x00asm\x0d\x00\x01\x00\x00\x00"), "component-model", "a component (version 13, layer 1)"},
		{"a function of env", module(section(sectionImport, clock, imported("env", "system", 0, 1)), start), "imports", "imports function env.system; want functions of wasi_snapshot_preview1 alone"},
		{"a memory of env", module(section(sectionImport, imported("env", "memory", 2, 1, 1, 2), clock), start), "imports", "imports memory env.memory;"},
		{"a table and a global", module(section(sectionImport, imported("a", "t", 1, 0x70, 0, 1), imported("b", "g", 3, 0x7f, 0)), start), "imports", "table a.t, global b.g"},
		{"preview 2 by name", module(section(sectionImport, imported("wasi:io/poll@0.2.0", "poll", 0, 0)), start), "imports", "function wasi:io/poll@0.2.0.poll"},
		{"U-39 a name with control characters", module(section(sectionImport, imported("\x1b[2J", "x\n", 0, 0)), start), "imports", "function ?[2J.x?"},
		{"a library", module(section(sectionImport, clock), section(sectionExport, exported("add", 0))), "", "exports no function _start"},
		{"_start that is a global", module(section(sectionExport, exported(startFunction, 3))), "", "exports no function _start"},
		{"no exports", module(section(sectionImport, clock)), "", "it has no exports"},
		{"an ELF file", []byte("\x7fELF\x02\x01\x01\x00 and more"), "", "it starts with the bytes 7f454c4602010100"},
		{"nothing", nil, "", "it ends within a section"},
		{"imports that are not there", module(append(binary.AppendUvarint([]byte{sectionImport}, 3), clock...), start), "", "WebAssembly module"},
		{"a million imports", module(binary.AppendUvarint([]byte{sectionImport}, 1<<20)), "", "1048576 imports, want at most 65536"},
		{"a name of 4 GiB", module(append([]byte{sectionImport, 1}, 0xff, 0xff, 0xff, 0xff, 0x0f)), "", "a name of 4294967295 bytes"},
		{"a number without end", module([]byte{sectionImport, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1}), "", "more than 32 bits"},
		{"an import of a kind that is none", module(section(sectionImport, imported("a", "b", 9, 0))), "", "import of kind 9"},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "module.wasm")
			if err := os.WriteFile(path, test.bytes, 0o600); err != nil {
				t.Fatal(err)
			}
			err := inspect(path)
			if test.want == "" {
				if err != nil {
					t.Fatalf("error %v, want none", err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("error %v, want one with %q", err, test.want)
			}
			var lacks *backends.FeatureError
			var fault *moduleError
			if test.feature != "" && (!errors.As(err, &lacks) || lacks.Feature != test.feature) {
				t.Errorf("error %#v, want a FeatureError of %s", err, test.feature)
			}
			if test.feature == "" && !errors.As(err, &fault) {
				t.Errorf("error %#v, want a moduleError", err)
			}
		})
	}
}

// Every prefix of a good module is refused, and none of them makes inspect panic or run on.
func TestInspectTruncated(t *testing.T) {
	whole := module(section(sectionImport, imported(wasi, "fd_write", 0, 0)), section(sectionExport, exported(startFunction, 0)))
	path := filepath.Join(t.TempDir(), "module.wasm")
	for n := range len(whole) {
		if err := os.WriteFile(path, whole[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		if inspect(path) == nil {
			t.Errorf("the first %d of %d bytes pass", n, len(whole))
		}
	}
}

func FuzzInspect(f *testing.F) {
	f.Add(module(section(sectionImport, imported(wasi, "fd_write", 0, 0)), section(sectionExport, exported(startFunction, 0))))
	f.Add([]byte("\x00asm\x0d\x00\x01\x00"))
	f.Fuzz(func(t *testing.T, bytes []byte) {
		path := filepath.Join(t.TempDir(), "module.wasm")
		if err := os.WriteFile(path, bytes, 0o600); err != nil {
			t.Fatal(err)
		}
		_ = inspect(path) // must end, without a panic
	})
}
