package merkle

import (
	"encoding/hex"
	"fmt"
	"strings"
)

// prefix starts the one text form of a digest.
const prefix = "kmo1:sha3-256:"

// Digest is a kmo1 root: 32 bytes of SHA3-256. The zero value stands for "none" and is never the root of anything.
type Digest [32]byte

// Parse reads the text form, "kmo1:sha3-256:" and 64 lower-case hex digits. There is no other spelling.
func Parse(text string) (Digest, error) {
	var d Digest
	digits, ok := strings.CutPrefix(text, prefix)
	if !ok {
		return d, fmt.Errorf("kmo1 digest %q: it does not start with %s", clip(text), prefix)
	}
	if len(digits) != 2*len(d) || strings.ToLower(digits) != digits {
		return d, fmt.Errorf("kmo1 digest %q: want %d lower-case hex digits after %s", clip(text), 2*len(d), prefix)
	}
	if _, err := hex.Decode(d[:], []byte(digits)); err != nil {
		return Digest{}, fmt.Errorf("kmo1 digest %q: %v", clip(text), err)
	}
	if d.IsZero() {
		return d, fmt.Errorf("kmo1 digest %q: all zero is no root", clip(text))
	}
	return d, nil
}

// IsZero says whether d stands for "none".
func (d Digest) IsZero() bool { return d == Digest{} }

// Short is the first eight hex digits, for names and tables, never for comparing.
func (d Digest) Short() string { return hex.EncodeToString(d[:4]) }

// Hex is the 64 hex digits alone, for file names.
func (d Digest) Hex() string { return hex.EncodeToString(d[:]) }

// String is the text form that Parse reads, and "" for none.
func (d Digest) String() string {
	if d.IsZero() {
		return ""
	}
	return prefix + hex.EncodeToString(d[:])
}

// MarshalText is String.
func (d Digest) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText is Parse, with "" for none.
func (d *Digest) UnmarshalText(text []byte) error {
	if len(text) == 0 {
		*d = Digest{}
		return nil
	}
	parsed, err := Parse(string(text))
	if err == nil {
		*d = parsed
	}
	return err
}

// MismatchError says that bytes are not what their name says.
type MismatchError struct {
	Name      string // what was hashed: a blob, a manifest, a folder
	Got, Want Digest
}

// Error says what was hashed, what came out, and what should have.
func (e *MismatchError) Error() string {
	return fmt.Sprintf("%s: root is %v, want %v", e.Name, e.Got, e.Want)
}

func clip(s string) string {
	if len(s) > 100 {
		return s[:100] + "…"
	}
	return s
}
