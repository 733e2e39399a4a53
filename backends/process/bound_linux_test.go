package process

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kindos/kmo/backends"
	"golang.org/x/sys/unix"
)

func TestLogIsBoundedWithoutItsKeeper(t *testing.T) {
	state := t.TempDir()
	other(t, state, "", "loud", "stamp", "burst", "grow", "tick")() // dead: nobody trims
	name := workload("loud").Name
	var log unix.Stat_t
	until(t, "a log that is full", func() (string, bool) {
		err := unix.Stat(filepath.Join(state, "work", name, logFile), &log)
		return "", err == nil && log.Size >= logTimes*testLog
	})
	k := start(t, state)
	defer sweep(t, k)
	if log.Size != logTimes*testLog || log.Blocks*512 > 2*logTimes*testLog {
		t.Errorf("the log has %d bytes in %d blocks, want %d", log.Size, log.Blocks, logTimes*testLog)
	}
	// The program was not ended by it, and writes on once there is room again.
	until(t, "the program's next line", func() (string, bool) { return "", strings.Contains(logOf(k, name), "\ntick ") })
	if s := status(t, k, name); s.State != backends.Running || s.Restarts != 0 || logUnbounded(s) {
		t.Errorf("it is %+v, want running, never started again, its log bounded", s)
	}
}

// A hook that writes more than the log may have, sooner than anybody trims that, has written: no file's bound ends it.
func TestLoudHook(t *testing.T) {
	k := fresh(t)
	w := workload("calling", "wait")
	loud := []string{"/app", "pour " + strings.Repeat("m", 3*logTimes)}
	w.Hooks = backends.Hooks{PreInit: [][]string{loud}, PostInit: [][]string{loud}}
	apply(t, k, w)
	found, err := os.Stat(filepath.Join(k.options.State, "work", w.Name, logFile))
	if err != nil || found.Size() > logTimes*testLog {
		t.Errorf("the log has %d bytes, %v; want %d at most", found.Size(), err, logTimes*testLog)
	}
}

func TestFilesAreBounded(t *testing.T) {
	k := fresh(t)
	w := workload("greedy", "grow", "room", "large /x", "wait")
	w.Format, w.Image.Content = backends.OCI, oci(t)
	w.Overlay.Size = 20 << 20 // more than the log may have
	w.Resources.Devices = []backends.Device{{Name: "terminal", Nodes: []string{"/dev/tty"}}}
	apply(t, k, w)
	if s := status(t, k, w.Name); logUnbounded(s) {
		t.Errorf("unapplied is %q, want nothing of the log, for a device is no file that grows", s.Unapplied)
	}
	for step, want := range map[string]string{
		"grow": "error: file too large", "room": "error: operation not supported", "large /x": "error: truncate /x: file too large",
	} {
		if got := said(t, k, w.Name, step); got != want {
			t.Errorf("%s: %s, want %s", step, got, want)
		}
	}
}

// What is kept may be of any size, so the log is not bounded by the kernel: that is told, and holes cost nothing.
func TestKeptFilesAreNotBounded(t *testing.T) {
	k := fresh(t)
	w := workload("keeping", "large /keep/x", "grow", "tick")
	w.Overlay.Keep = []string{"/keep"}
	apply(t, k, w)
	if s := status(t, k, w.Name); !logUnbounded(s) {
		t.Errorf("unapplied is %q, want the log's bound in it", s.Unapplied)
	}
	older := filepath.Join(k.options.State, "work", w.Name, olderFile)
	until(t, "an older part", func() (string, bool) {
		found, err := os.Stat(older)
		return "", err == nil && found.Size() > 0
	})
	text, err := os.ReadFile(older)
	if err != nil || len(text) > testLog || !strings.HasPrefix(string(text), "large /keep/x: ok\n") {
		t.Errorf("the older part has %d bytes and begins with %.100q, %v", len(text), text, err)
	}
	until(t, "the program's next line", func() (string, bool) {
		now, err := os.ReadFile(filepath.Join(k.options.State, "work", w.Name, logFile))
		return "", err == nil && strings.HasPrefix(string(now), "tick ")
	})
}

func logUnbounded(s backends.Status) bool {
	for _, words := range s.Unapplied {
		if strings.HasPrefix(words, "log bound") {
			return true
		}
	}
	return false
}
