package backends

import (
	"strings"
	"testing"
	"unicode/utf8"
)

func TestKeptName(t *testing.T) {
	const want = "234ab65a58296e69-var-lib-relay"
	if got := KeptName("/var/lib/relay"); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	names := map[string]string{}
	for _, to := range []string{
		"/a/b", "/a-b", "/a", "/" + strings.Repeat("a", 100), "/" + strings.Repeat("a", 101), "/" + strings.Repeat("a", 4000) + "/x", "/" + strings.Repeat("a", 4000) + "/y",
		"/" + strings.Repeat("é", 100) + "/x", "/" + strings.Repeat("é", 100) + "/y", "/a" + strings.Repeat("é", 100), "/" + strings.Repeat("日", 300), "/" + strings.Repeat("\x80", 200),
	} {
		name := KeptName(to)
		if other := names[name]; other != "" {
			t.Errorf("%q and %q are both %s", other, to, name)
		}
		names[name] = to
		if len(name) > 117 || strings.Contains(name, "/") || utf8.ValidString(to) && !utf8.ValidString(name) {
			t.Errorf("%q is %q, of %d bytes", to, name, len(name))
		}
	}
}
