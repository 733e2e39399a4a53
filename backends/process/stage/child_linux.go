package stage

import (
	"errors"
	"fmt"
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

// Stat is what the kernel says of a process.
type Stat struct {
	State   string // Z is one that has ended and was not waited for
	Session int
	Began   uint64 // in ticks since this host was started: it tells the process from a later one of its number
}

// ReadStat reads /proc/PID/stat.
func ReadStat(pid int) (s Stat, err error) {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return s, err
	}
	// The second field is the program's name in parentheses, and may hold anything.
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	if len(fields) < 20 {
		return s, fmt.Errorf("/proc/%d/stat has %d fields after the name; want at least 20", pid, len(fields))
	}
	session, err := strconv.Atoi(fields[3])
	began, beganErr := strconv.ParseUint(fields[19], 10, 64)
	return Stat{fields[0], session, began}, errors.Join(err, beganErr)
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
