package stage

import (
	"errors"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Catches says whether a process catches a signal, true where that cannot be told: one that a process 1 does not catch does nothing to it.
func Catches(pid int, s unix.Signal) bool {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return true
	}
	_, rest, _ := strings.Cut(string(text), "\nSigCgt:")
	mask, _, _ := strings.Cut(rest, "\n")
	bits, err := strconv.ParseUint(strings.TrimSpace(mask), 16, 64)
	return err != nil || bits&(1<<(uint(s)-1)) != 0
}

// Code is the exit status of what has ended, 128 and the number of the signal that ended it.
func Code(status unix.WaitStatus) int {
	if status.Signaled() {
		return 128 + int(status.Signal())
	}
	return status.ExitStatus()
}

// Wait waits for a child, which has nobody else to wait for it, and returns its Code.
func Wait(pid int) int {
	var status unix.WaitStatus
	for {
		if _, err := unix.Wait4(pid, &status, 0, nil); !errors.Is(err, unix.EINTR) {
			return Code(status)
		}
	}
}
