package stage

import (
	"errors"
	"fmt"
	"math"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Measure finds out what this kernel lets this user do, by doing it; scratch is an empty folder.
func Measure(scratch string) Support {
	s := Support{Landlock: abi(), Seccomp: filters()}
	if own, err := unix.PidfdOpen(os.Getpid(), 0); err == nil {
		s.Groups = unix.PidfdSendSignal(own, 0, nil, unix.PIDFD_SIGNAL_PROCESS_GROUP) == nil
		_ = unix.Close(own)
	}
	OnThread(func() {
		if unix.Unshare(unix.CLONE_FS|unix.CLONE_NEWNS) != nil || unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "") != nil {
			return
		}
		if unix.Mount("tmpfs", scratch, "tmpfs", safe, "mode=0700") != nil {
			return
		}
		s.Mounts = true
		r := Root{Scratch: scratch, Size: 1 << 20}
		layer, merged := filepath.Join(scratch, "layer"), filepath.Join(scratch, "merged")
		if errors.Join(os.Mkdir(layer, 0o700), os.Mkdir(merged, 0o700)) == nil {
			s.Overlay = r.merge(layer, merged) == nil
		}
	})
	return s
}

// OnThread runs f on a thread that nothing else ever uses, and that ends with f: it may change what belongs to threads. It is
// never the first thread, which would not end, and is what others take for the whole process.
func OnThread(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			OnThread(f) // elsewhere, while we keep this one busy
			runtime.UnlockOSThread()
			return
		}
		f()
	}()
	<-done
}

// Landlock's rights, by the ABI that brought them (linux/landlock.h).
const (
	llExecute, llWriteFile, llReadFile, llReadDir = 1 << 0, 1 << 1, 1 << 2, 1 << 3
	llMakeChar, llMakeBlock                       = 1 << 6, 1 << 11
	llFirst                                       = 1<<13 - 1
	llRefer, llTruncate, llIoctl                  = 1 << 13, 1 << 14, 1 << 15
	llOfFiles                                     = llExecute | llWriteFile | llReadFile | llTruncate | llIoctl
	llScopeAbstract, llScopeSignal                = 1 << 0, 1 << 1
	llBindTCP, llRulePort                         = 1 << 0, 2
)

func abi() int {
	version, _, no := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, 1)
	if no != 0 {
		return 0
	}
	return int(version)
}

func handled(abi int) uint64 {
	rights := uint64(llFirst)
	for _, later := range []struct {
		abi   int
		right uint64
	}{{2, llRefer}, {3, llTruncate}, {5, llIoctl}} {
		if abi >= later.abi {
			rights |= later.right
		}
	}
	return rights
}

// Exec becomes a program that may touch no files but those of Write and Execute, as far as this kernel has it: landlock and the filter alone,
// for whoever is nobody already. It returns only an error.
func (c *Confine) Exec(program string, argv, env []string) error {
	runtime.LockOSThread()
	rules, err := c.fence()
	if err != nil {
		return fmt.Errorf("landlock: %v", err)
	}
	if err := c.close(rules); err != nil {
		return err
	}
	return unix.Exec(program, argv, env)
}

// fence makes the landlock rules while we may still open every path. It returns -1 where the kernel has no landlock.
func (c *Confine) fence() (int, error) {
	version := abi()
	if version == 0 {
		return -1, nil
	}
	all := handled(version)
	attr := unix.LandlockRulesetAttr{Handled_access_fs: all}
	size := uintptr(8)
	if version >= 4 {
		size, attr.Handled_access_net = 16, llBindTCP
	}
	if version >= 6 {
		size, attr.Scoped = 24, llScopeAbstract
		if c.Bare { // elsewhere the pid namespace keeps signals in, and hooks may signal the program
			attr.Scoped |= llScopeSignal
		}
	}
	fd, _, no := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), size, 0)
	if no != 0 {
		return -1, no
	}
	for _, rule := range []struct {
		paths  []string
		rights uint64
	}{{c.Execute, llReadFile | llReadDir | llExecute}, {c.Write, all &^ (llExecute | llMakeChar | llMakeBlock)}} {
		for _, path := range rule.paths {
			if err := allow(int(fd), path, rule.rights&all); err != nil {
				return -1, fmt.Errorf("%s: %v", path, err)
			}
		}
	}
	if version < 4 {
		return int(fd), nil
	}
	for _, port := range append([]int{0}, c.Ports...) { // 0: one of the kernel's range, which it gives a listener that binds none too
		rule := struct{ access, port uint64 }{llBindTCP, uint64(port)}
		if _, _, no := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, fd, llRulePort, uintptr(unsafe.Pointer(&rule)), 0, 0, 0); no != 0 {
			return -1, fmt.Errorf("port %d: %v", port, no)
		}
	}
	return int(fd), nil
}

func allow(ruleset int, path string, rights uint64) error {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var found unix.Stat_t
	if err := unix.Fstat(fd, &found); err != nil {
		return err
	}
	if found.Mode&unix.S_IFMT != unix.S_IFDIR {
		rights &= llOfFiles
	}
	attr := unix.LandlockPathBeneathAttr{Allowed_access: rights, Parent_fd: int32(fd)}
	_, _, no := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, uintptr(ruleset), unix.LANDLOCK_RULE_PATH_BENEATH,
		uintptr(unsafe.Pointer(&attr)), 0, 0, 0)
	if no != 0 {
		return no
	}
	return nil
}

// bound keeps files from growing without end, and leaves no cores, for us and for everything we start. Whoever writes beyond gets EFBIG: the signal
// that would end it is ignored, and stays so until the program says otherwise.
func (c *Confine) bound() error {
	signal.Ignore(unix.SIGXFSZ)
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return err
	}
	if c.FileSize <= 0 {
		return nil
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &limit); err != nil {
		return err
	}
	limit.Max = min(limit.Max, uint64(c.FileSize))
	limit.Cur = limit.Max
	return unix.Setrlimit(unix.RLIMIT_FSIZE, &limit)
}

// drop gives up every capability, for good, and becomes the user.
func (c *Confine) drop() error {
	if c.Bare {
		return nil
	}
	if c.User < 0 || c.User > math.MaxInt32 { // -1 would leave the user as it is: root
		return fmt.Errorf("user %d is none", c.User)
	}
	for capability := uintptr(0); ; capability++ {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, capability, 0, 0, 0); errors.Is(err, unix.EINVAL) {
			break // past the last one the kernel knows
		} else if err != nil {
			return fmt.Errorf("dropping capability %d: %v", capability, err)
		}
	}
	id := uintptr(c.User)
	for _, call := range []struct {
		name   string
		number uintptr
		args   [3]uintptr
	}{
		{"setgroups", unix.SYS_SETGROUPS, [3]uintptr{}},
		{"setresgid", unix.SYS_SETRESGID, [3]uintptr{id, id, id}},
		{"setresuid", unix.SYS_SETRESUID, [3]uintptr{id, id, id}},
	} {
		// The raw calls: this thread alone is to change, and this thread alone lives on.
		if _, _, no := unix.RawSyscall(call.number, call.args[0], call.args[1], call.args[2]); no != 0 {
			return fmt.Errorf("%s %d: %v", call.name, c.User, no)
		}
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if err := unix.Capset(&header, &none[0]); err != nil {
		return fmt.Errorf("capset: %v", err)
	}
	return nil
}

// close makes all of it irrevocable, for us and for everything we start.
func (c *Confine) close(ruleset int) error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %v", err)
	}
	if ruleset >= 0 {
		if _, _, no := unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, uintptr(ruleset), 0, 0); no != 0 {
			return fmt.Errorf("landlock: %v", no)
		}
	}
	if !filters() {
		return nil
	}
	code := filter(c.Bare, c.FileSize > 0)
	program := unix.SockFprog{Len: uint16(len(code)), Filter: &code[0]}
	if _, _, no := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&program))); no != 0 {
		return fmt.Errorf("seccomp: %v", no)
	}
	return nil
}
