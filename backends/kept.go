package backends

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"
	"unicode/utf8"
)

// KeptName is the name of the folder that a path of Overlay.Keep is on a host, within one of its unit: sixteen hex digits of the path's
// SHA-256, a dash, and as much of the path, with dashes for slashes, as 100 bytes hold.
func KeptName(to string) string {
	sum := sha256.Sum256([]byte(to))
	readable := strings.ReplaceAll(strings.Trim(to, "/"), "/", "-")
	if len(readable) > 100 {
		end := 100
		for end > 0 && !utf8.RuneStart(readable[end]) {
			end--
		}
		readable = readable[:end]
	}
	return hex.EncodeToString(sum[:8]) + "-" + readable
}
