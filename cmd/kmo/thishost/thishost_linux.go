// Package thishost measures the machine it runs on.
package thishost

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends/process/secret"
	"github.com/kindos/kmo/reconciler/template"
)

// Supported says that hosts run on this system.
func Supported() error { return nil }

// Measure fills in the host's memory (bytes), processes, processor's features and disk (bytes, of the file system with the state folder dir). It makes
// nothing.
func Measure(facts *template.Host, dir string) error {
	var memory unix.Sysinfo_t
	if err := unix.Sysinfo(&memory); err != nil {
		return fmt.Errorf("measuring memory: %w", err)
	}
	facts.Memory = int64(memory.Totalram) * int64(memory.Unit)
	text, err := os.ReadFile("/proc/sys/kernel/pid_max")
	if err != nil {
		return fmt.Errorf("measuring processes: %w", err)
	}
	if facts.PIDs, err = strconv.ParseInt(string(bytes.TrimSpace(text)), 10, 64); err != nil {
		return fmt.Errorf("measuring processes: %w", err)
	}
	var disk unix.Statfs_t
	if err := unix.Statfs(dir, &disk); err != nil {
		return fmt.Errorf("measuring disk: %w", err)
	}
	if text, err = os.ReadFile("/proc/cpuinfo"); err != nil {
		return fmt.Errorf("measuring the processor: %w", err)
	}
	for line := range strings.Lines(string(text)) {
		if key, value, _ := strings.Cut(line, ":"); slices.Contains([]string{"flags", "Features"}, strings.TrimSpace(key)) {
			facts.CPUHas = strings.Fields(value)
			break // all cores are alike
		}
	}
	facts.Disk = int64(disk.Blocks) * disk.Bsize
	return nil
}

// Doors is the folder on storage that is memory below which the doors of the agent with the state folder dir are, or "" where this host has no such
// storage. It need not be there. What it lies in, /run/kmo or /dev/shm/kmo, is made so that nobody else makes it; release removes that if this call
// has made it and it is empty.
func Doors(dir string) (folder string, release func()) {
	store := secret.Open("", fmt.Sprintf("doors-%.4x", sha256.Sum256([]byte(dir))))
	return store.Dir(), store.Close
}
