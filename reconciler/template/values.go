package template

import (
	"fmt"
	"net/netip"
	"path"
	"reflect"
	"strconv"
	"strings"
	"time"

	"github.com/kindos/kmo/registry/merkle"
)

// CPU is thousandths of a core: "1" is a core, "100m" a tenth of one. A whole number of cores is never spelled in thousandths.
type CPU int64

// UnmarshalText reads the one spelling of a CPU.
func (c *CPU) UnmarshalText(text []byte) error {
	digits, milli := strings.CutSuffix(string(text), "m")
	size := int64(1000)
	if milli {
		size = 1
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n <= 0 || n > 1_000_000/size {
		return fmt.Errorf("want cores up to 1000, or thousandths of one as 100m")
	}
	n *= size
	*c = CPU(n)
	return oneSpelling(string(text), c.String())
}

// String is the one spelling.
func (c CPU) String() string {
	if c%1000 == 0 {
		return strconv.FormatInt(int64(c)/1000, 10)
	}
	return strconv.FormatInt(int64(c), 10) + "m"
}

// MarshalText is String.
func (c CPU) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// Bytes is a number of bytes: "32Mi", "1Gi", "512". The unit is the largest that gives a whole number: 1024Mi is spelled 1Gi.
type Bytes int64

// byteUnits are the units from the largest down.
func byteUnits() [4]struct {
	name string
	size int64
} {
	return [4]struct {
		name string
		size int64
	}{{"Ti", 1 << 40}, {"Gi", 1 << 30}, {"Mi", 1 << 20}, {"Ki", 1 << 10}}
}

// UnmarshalText reads the one spelling of a number of bytes.
func (b *Bytes) UnmarshalText(text []byte) error {
	digits, size := string(text), int64(1)
	for _, unit := range byteUnits() {
		if rest, ok := strings.CutSuffix(digits, unit.name); ok {
			digits, size = rest, unit.size
			break
		}
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n <= 0 || n > (1<<50)/size {
		return fmt.Errorf("want bytes up to 1024Ti, as 512, 64Ki, 32Mi, 1Gi or 2Ti")
	}
	*b = Bytes(n * size)
	return oneSpelling(string(text), b.String())
}

// String is the one spelling.
func (b Bytes) String() string {
	for _, unit := range byteUnits() {
		if b != 0 && int64(b)%unit.size == 0 {
			return strconv.FormatInt(int64(b)/unit.size, 10) + unit.name
		}
	}
	return strconv.FormatInt(int64(b), 10)
}

// MarshalText is String.
func (b Bytes) MarshalText() ([]byte, error) { return []byte(b.String()), nil }

// Duration is a whole number of one unit: "500ms", "5s", "60s", "5m", "2h". It is printed with the largest unit that gives a whole number.
type Duration time.Duration

// durationUnits are the units from the largest down.
func durationUnits() [4]struct {
	name string
	size time.Duration
} {
	return [4]struct {
		name string
		size time.Duration
	}{{"h", time.Hour}, {"m", time.Minute}, {"ms", time.Millisecond}, {"s", time.Second}}
}

// UnmarshalText reads a duration of 1ms to 8760h.
func (d *Duration) UnmarshalText(text []byte) error {
	var size time.Duration
	digits := string(text)
	for _, unit := range durationUnits() {
		if rest, ok := strings.CutSuffix(digits, unit.name); ok && rest != "" && rest[len(rest)-1] <= '9' {
			digits, size = rest, unit.size
			break
		}
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || size == 0 || n <= 0 || n > int64(8760*time.Hour/size) || digits[0] == '0' || digits[0] == '+' {
		return fmt.Errorf("want a whole number with one unit, 1ms to 8760h, as 500ms, 5s, 5m or 2h")
	}
	*d = Duration(n) * Duration(size)
	return nil
}

// String prints the duration with the largest unit that gives a whole number.
func (d Duration) String() string {
	switch t := time.Duration(d); {
	case t == 0:
		return ""
	case t%time.Hour == 0:
		return strconv.FormatInt(int64(t/time.Hour), 10) + "h"
	case t%time.Minute == 0:
		return strconv.FormatInt(int64(t/time.Minute), 10) + "m"
	case t%time.Second == 0:
		return strconv.FormatInt(int64(t/time.Second), 10) + "s"
	default:
		return strconv.FormatInt(int64(t/time.Millisecond), 10) + "ms"
	}
}

// MarshalText is String.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// oneSpelling refuses a text that means the right thing in another way.
func oneSpelling(got, want string) error {
	if got != want {
		return fmt.Errorf("want it spelled %s", want)
	}
	return nil
}

// Mode is a file's permissions, four octal digits in quotes: "0644". Without quotes YAML would read a number.
type Mode string

// bits is the mode as a number.
func (m Mode) bits() uint32 {
	n, _ := strconv.ParseUint(string(m), 8, 16) // the decoder has checked the digits
	return uint32(n)
}

// Texts whose whole rule is a pattern.
type (
	// Name is the name of a site, unit, profile, zone, backend or device.
	Name string
	// PortName is the name of a port; the program finds the port's number as KMO_PORT_<NAME>.
	PortName string
	// EnvName is the name of an environment variable.
	EnvName string
	// Label is a key or a value of a host's label.
	Label string
	// Branch is a Git branch.
	Branch string
	// Registry is a registry's host, or a host with a repository prefix.
	Registry string
	// Burned is a digest of an image or of a unit's content: sha256:… or kmo1:sha3-256:….
	Burned string
	// Moment is a second in UTC: 2026-12-20T00:00:00Z. YAML wants it in quotes.
	Moment string
	// Network is a range of addresses, 10.9.0.0/16, in its one spelling.
	Network string
	// Ref names an image, host/repository@sha256:…; the rules refuse one that is not pinned or that has a tag besides.
	Ref string
	// Path is a clean absolute path inside the workload.
	Path string
	// HostPath is an absolute path of the host as it was written; the workload gets it clean, and the rules judge both.
	HostPath string
	// LocalPath is a clean path relative to the unit's folder.
	LocalPath string
	// URLPath is the path and query of a request.
	URLPath string
	// Capability is a Linux capability, CAP_….
	Capability string
	// Percent is a whole percentage, "10%".
	Percent string
	// Share is a whole number, or a percentage.
	Share string
	// Count is how many copies run: "all", one on each host that fits, or a number.
	Count string
)

// UnmarshalText reads a moment that there is.
func (m *Moment) UnmarshalText(text []byte) error {
	if _, err := time.Parse(time.RFC3339, string(text)); err != nil {
		return fmt.Errorf("want a day and a time that there are")
	}
	*m = Moment(text)
	return nil
}

// UnmarshalText reads the one spelling of a network.
func (n *Network) UnmarshalText(text []byte) error {
	prefix, err := netip.ParsePrefix(string(text))
	if err != nil {
		return fmt.Errorf("want an address and how many of its bits count, as 10.9.0.0/16 or fd12::/48")
	}
	*n = Network(prefix.Masked().String())
	return oneSpelling(string(text), string(*n))
}

// clean is the path without "." and "..".
func (p HostPath) clean() string { return path.Clean(string(p)) }

// textRule is what a scalar of a text type must look like: decoder and JSON Schema read the same rule.
type textRule struct {
	pattern string // matched in full
	max     int    // in characters
	number  int64  // a plain whole number up to this is one of its spellings; 0: none is
	want    string // for people
}

const (
	namePattern = `[a-z][a-z0-9]*(-[a-z0-9]+)*`
	hostPattern = `([a-z0-9]([a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:]+\])(:[1-9][0-9]{0,4})?`
	repoPattern = `(/[a-z0-9]+([._-]+[a-z0-9]+)*)`
	controls    = `\x00-\x1f\x7f-\x9f\x{200b}\x{200e}\x{200f}\x{2028}-\x{202e}\x{2060}\x{2066}-\x{2069}\x{feff}` // what parse.go calls hidden, and the ends of lines
	segment     = `([^./` + controls + `][^/` + controls + `]*|\.[^./` + controls + `][^/` + controls + `]*|\.\.[^/` + controls + `]+)`
	branchPart  = `[A-Za-z0-9_][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*`
)

// textRules are the rules of all text types. A unit's name leaves room for the eight digits of a workload's name in a DNS label.
func textRules() map[reflect.Type]textRule {
	return map[reflect.Type]textRule{
		reflect.TypeFor[CPU]():           {`[1-9][0-9]{0,2}|1000|[1-9][0-9]{0,6}m`, 8, 1000, "cores or thousandths of one: 1 or 100m"},
		reflect.TypeFor[Bytes]():         {`[1-9][0-9]{0,15}(Ki|Mi|Gi|Ti)?`, 20, 1 << 50, "bytes: 512, 64Ki, 32Mi, 1Gi or 2Ti"},
		reflect.TypeFor[Duration]():      {`[1-9][0-9]{0,10}(ms|s|m|h)`, 14, 0, "a whole number with one unit: 500ms, 5s, 5m or 2h"},
		reflect.TypeFor[Mode]():          {`[0-7]{4}`, 4, 0, `four octal digits in quotes: "0644"`},
		reflect.TypeFor[merkle.Digest](): {`kmo1:sha3-256:[0-9a-f]{64}`, 78, 0, "kmo1:sha3-256: and 64 lower-case hex digits"},
		reflect.TypeFor[Name]():          {namePattern, 54, 0, "a name: lower-case letters, digits and single dashes, a letter first, 54 at most"},
		reflect.TypeFor[PortName]():      {namePattern, 15, 0, "a port's name: lower-case letters, digits and single dashes, a letter first, 15 at most"},
		reflect.TypeFor[EnvName]():       {`[A-Za-z_][A-Za-z0-9_]*`, 255, 0, "a variable's name: letters, digits and underscores, no digit first"},
		reflect.TypeFor[Label]():         {`[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?`, 127, 0, "a label: letters, digits, dots, dashes, underscores and slashes"},
		reflect.TypeFor[Branch]():        {branchPart + `(/` + branchPart + `)*`, 200, 0, "a branch's name: main, release/2026"},
		reflect.TypeFor[Registry]():      {hostPattern + repoPattern + `*`, 255, 0, "a registry: reg.example, localhost:5000, reg.example/team"},
		reflect.TypeFor[Burned]():        {`(sha256|kmo1:sha3-256):[0-9a-f]{64}`, 78, 0, "sha256: or kmo1:sha3-256: and 64 lower-case hex digits"},
		reflect.TypeFor[Moment]():        {`[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z`, 20, 0, `a moment in UTC, in quotes: "2026-12-20T00:00:00Z"`},
		reflect.TypeFor[Network]():       {`[0-9a-f.:]+/(0|[1-9][0-9]{0,2})`, 43, 0, "a network: 10.9.0.0/16"},
		reflect.TypeFor[Ref](): {hostPattern + repoPattern + `+(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64})?`, 512, 0,
			"an image: host/repository@sha256: and 64 lower-case hex digits"},
		reflect.TypeFor[Path]():       {`(/` + segment + `)+`, 4096, 0, "a clean absolute path: /etc/relay.toml"},
		reflect.TypeFor[HostPath]():   {`/[^` + controls + `]*`, 4096, 0, "an absolute path of the host"},
		reflect.TypeFor[LocalPath]():  {segment + `(/` + segment + `)*`, 1024, 0, "a clean path inside the unit's folder: relay.toml"},
		reflect.TypeFor[URLPath]():    {`/[!-~]*`, 1024, 0, "a path and query: /healthz"},
		reflect.TypeFor[Capability](): {`CAP_[A-Z][A-Z_]*`, 64, 0, "a capability: CAP_NET_BIND_SERVICE"},
		reflect.TypeFor[Percent]():    {`([0-9]|[1-9][0-9]|100)%`, 4, 0, "a percentage: 10%"},
		reflect.TypeFor[Share]():      {`[1-9][0-9]{0,4}|([0-9]|[1-9][0-9]|100)%`, 5, 99_999, "a whole number or a percentage: 2 or 10%"},
		reflect.TypeFor[Count]():      {`all|[1-9][0-9]{0,4}`, 5, 99_999, "all, or a whole number"},
	}
}
