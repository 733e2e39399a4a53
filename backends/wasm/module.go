package wasm

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/policy/refusal"
)

// wasi is the one module that a guest may import from.
const wasi = "wasi_snapshot_preview1"

// The limits of what is read of a module before it is compiled.
const (
	maxName    = 1 << 16 // bytes of a module, import or export name
	maxEntries = 1 << 16 // imports, exports
	maxModule  = 1 << 30 // bytes
)

// The first eight bytes: "\0asm", then a version and a layer, both little-endian.
const (
	coreHeader     = "\x00asm\x01\x00\x00\x00"
	componentLayer = "\x01\x00" // of the component model, at byte 6
	sectionImport  = 2
	sectionExport  = 7
	startFunction  = "_start"
)

// inspect reads the outside of a module: its header, what it imports, and that it can be started. It compiles nothing.
// The error is a *backends.FeatureError for what this backend does not have, a *moduleError for what is no module.
func inspect(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil {
		return err
	} else if st.Size() > maxModule {
		return &moduleError{fmt.Sprintf("it has %d bytes, want at most %d", st.Size(), maxModule)}
	}
	r := &moduleReader{r: bufio.NewReaderSize(f, 64<<10)}
	err = r.inspect()
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return &moduleError{fmt.Sprintf("it ends within a section, at byte %d", r.at)}
	}
	return err
}

// moduleError says that a file is no module that could be run.
type moduleError struct{ what string }

func (e *moduleError) Error() string { return "WebAssembly module: " + e.what }

// moduleReader reads a module in order; at is the offset of the next byte.
type moduleReader struct {
	r  *bufio.Reader
	at int64
}

func (m *moduleReader) inspect() error {
	header := make([]byte, len(coreHeader))
	if _, err := io.ReadFull(m, header); err != nil {
		return err
	}
	switch {
	case string(header) == coreHeader:
	case string(header[:4]) == coreHeader[:4] && string(header[6:]) == componentLayer:
		return &backends.FeatureError{Backend: Name, Feature: "component-model",
			Detail: fmt.Sprintf("the file is a component (version %d, layer 1); what runs is a core module (version 1, layer 0) for WASI preview 1, as GOOS=wasip1 or wasm32-wasip1 make it", header[4])}
	default:
		return &moduleError{fmt.Sprintf("it starts with the bytes %x, want %x", header, coreHeader)}
	}
	for {
		id, err := m.ReadByte()
		if errors.Is(err, io.EOF) {
			return &moduleError{"it has no exports, want a function " + startFunction}
		}
		if err != nil {
			return err
		}
		size, err := m.uint32()
		if err != nil {
			return err
		}
		end := m.at + int64(size)
		switch id {
		case sectionImport:
			err = m.imports()
		case sectionExport:
			return m.exports()
		}
		if err != nil {
			return err
		}
		if m.at > end {
			return &moduleError{fmt.Sprintf("section %d runs past its end at byte %d", id, end)}
		}
		if _, err := io.CopyN(io.Discard, m, end-m.at); err != nil {
			return err
		}
	}
}

func (m *moduleReader) imports() error {
	n, err := m.count("imports")
	if err != nil {
		return err
	}
	var foreign []string
	for range n {
		module, err := m.name()
		if err != nil {
			return err
		}
		name, err := m.name()
		if err != nil {
			return err
		}
		kind, err := m.external()
		if err != nil {
			return err
		}
		if module != wasi || kind != "function" {
			foreign = append(foreign, kind+" "+refusal.Clip(module, 60)+"."+refusal.Clip(name, 60))
		}
	}
	if len(foreign) == 0 {
		return nil
	}
	more := ""
	if len(foreign) > 5 {
		foreign, more = foreign[:5], fmt.Sprintf(" and %d more", len(foreign)-5)
	}
	return &backends.FeatureError{Backend: Name, Feature: "imports",
		Detail: "the module imports " + strings.Join(foreign, ", ") + more + "; want functions of " + wasi + " alone"}
}

// external reads the rest of an import and names its kind.
func (m *moduleReader) external() (string, error) {
	kind, err := m.ReadByte()
	if err != nil {
		return "", err
	}
	switch kind {
	case 0:
		_, err = m.uint32()
		return "function", err
	case 1:
		if _, err = m.ReadByte(); err == nil {
			err = m.limits()
		}
		return "table", err
	case 2:
		return "memory", m.limits()
	case 3:
		_, err = io.CopyN(io.Discard, m, 2)
		return "global", err
	}
	return "", &moduleError{fmt.Sprintf("import of kind %d at byte %d, want 0 to 3", kind, m.at-1)}
}

func (m *moduleReader) limits() error {
	flags, err := m.ReadByte()
	if err != nil {
		return err
	}
	if _, err = m.uint32(); err == nil && flags&1 != 0 {
		_, err = m.uint32()
	}
	return err
}

func (m *moduleReader) exports() error {
	n, err := m.count("exports")
	if err != nil {
		return err
	}
	for range n {
		name, err := m.name()
		if err != nil {
			return err
		}
		kind, err := m.ReadByte()
		if err != nil {
			return err
		}
		if _, err := m.uint32(); err != nil {
			return err
		}
		if name == startFunction && kind == 0 {
			return nil
		}
	}
	return &moduleError{"it exports no function " + startFunction + ", so it is a library; want a command"}
}

func (m *moduleReader) count(of string) (uint32, error) {
	n, err := m.uint32()
	if err == nil && n > maxEntries {
		err = &moduleError{fmt.Sprintf("it has %d %s, want at most %d", n, of, maxEntries)}
	}
	return n, err
}

func (m *moduleReader) name() (string, error) {
	n, err := m.uint32()
	if err != nil {
		return "", err
	}
	if n > maxName {
		return "", &moduleError{fmt.Sprintf("a name of %d bytes at byte %d, want at most %d", n, m.at, maxName)}
	}
	text := make([]byte, n)
	_, err = io.ReadFull(m, text)
	return string(text), err
}

// uint32 reads an unsigned LEB128 number of at most five bytes.
func (m *moduleReader) uint32() (uint32, error) {
	var n uint64
	for shift := 0; shift < 35; shift += 7 {
		b, err := m.ReadByte()
		if err != nil {
			return 0, err
		}
		n |= uint64(b&0x7f) << shift
		if b&0x80 == 0 && n < 1<<32 {
			return uint32(n), nil
		}
	}
	return 0, &moduleError{fmt.Sprintf("a number of more than 32 bits before byte %d", m.at)}
}

// Read counts what it reads.
func (m *moduleReader) Read(p []byte) (int, error) {
	n, err := m.r.Read(p)
	m.at += int64(n)
	return n, err
}

// ReadByte counts what it reads.
func (m *moduleReader) ReadByte() (byte, error) {
	b, err := m.r.ReadByte()
	if err == nil {
		m.at++
	}
	return b, err
}
