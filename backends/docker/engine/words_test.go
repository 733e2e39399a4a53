package engine

import (
	"strings"
	"testing"
)

// What a workload has named wrongly is told from what the engine itself suffers from, by the runtimes' own words.
func TestUnmountable(t *testing.T) {
	for text, want := range map[string][2]string{
		`runc create failed: error mounting "/s/kept/x-app" to rootfs at "/app": mount /s/kept/x-app:/app (via /proc/self/fd/6), flags: 0x1000: not a directory: unknown: Are you trying to mount a directory onto a file (or vice-versa)?`: {"/app", "a file is there"},
		`error mounting "/s" to rootfs at "/app/x": open o_path procfd: open /var/lib/docker/overlay2/1/merged/app/x: not a directory: OCI runtime error`:                                                                                   {"/app/x", "a file is there"},
		`error mounting "/s" to rootfs at "/etc/mtab": "/merged/proc/1/mounts" cannot be mounted because it is inside /proc`:                                                                                                                {"/etc/mtab", "into /proc"},
		`error mounting "/s" to rootfs at "/loop": SecureJoin /merged//loop/: too many levels of symbolic links`:                                                                                                                            {"/loop", "in a circle"},
		"crun: mount `/s/kept/x-app` to `app`: Not a directory: OCI runtime error":                                                                                                                                                          {"/app", "a file is there"},
		`error mounting "/s" to rootfs at "/data": mkdir /merged/data: no space left on device`:                                                                                                                                             {},
		`error mounting "/s" to rootfs at "/data": mount /s:/data: input/output error`:                                                                                                                                                      {},
		`open /var/lib/docker/containers/1/config.v2.json: not a directory`:                                                                                                                                                                 {},
		`error mounting "proc" to rootfs at "/proc": mount proc:/proc, flags: 0xe: operation not permitted`:                                                                                                                                 {},
	} {
		place, why := Unmountable(text)
		if place != want[0] && why != "" || (why == "") != (want[1] == "") || !strings.Contains(why, want[1]) {
			t.Errorf("%s:\ngot %q, %q; want %q", text, place, why, want)
		}
	}
}
