// Probe tries what a confined program may not do, one argument at a time, and writes a line on each: "NAME: ok …" or "NAME: error".
package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"github.com/kindos/kmo/backends/process"
	"golang.org/x/sys/unix"
)

func main() {
	runtime.LockOSThread()
	for _, step := range os.Args[1:] {
		verb, rest, _ := strings.Cut(step, " ")
		said, err := try(verb, rest)
		if err != nil {
			said = "error: " + err.Error()
		}
		fmt.Printf("%s: %s\n", step, said)
	}
}

func try(verb, rest string) (string, error) {
	switch verb {
	case "mount":
		return "ok", unix.Mount("none", "/tmp", "tmpfs", 0, "")
	case "remount":
		return "ok", unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_BIND, "")
	case "unshare":
		return "ok", unix.Unshare(unix.CLONE_NEWUSER)
	case "clone":
		err := exec.Command("/app").Run()
		if err != nil {
			return "", fmt.Errorf("plain: %w", err)
		}
		cmd := exec.Command("/app")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER}
		return "ok", cmd.Run()
	case "clone3":
		_, _, no := unix.RawSyscall(unix.SYS_CLONE3, 0, 0, 0)
		return "answered " + unix.ErrnoName(no), nil
	case "ptrace":
		return "ok", unix.PtraceSeize(1)
	case "bpf":
		_, _, no := unix.Syscall(unix.SYS_BPF, 0, 0, 0)
		return "answered " + unix.ErrnoName(no), nil
	case "keyctl":
		_, err := unix.KeyctlInt(unix.KEYCTL_GET_KEYRING_ID, unix.KEY_SPEC_SESSION_KEYRING, 0, 0, 0)
		return "ok", err
	case "x32":
		_, _, no := unix.RawSyscall(0x40000000+39, 0, 0, 0)
		return "answered " + unix.ErrnoName(no), nil
	case "vsock":
		_, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0)
		return "ok", err
	case "socket":
		family, err := strconv.Atoi(rest)
		if err != nil {
			return "", err
		}
		fd, err := unix.Socket(family, unix.SOCK_STREAM, 0)
		if err == nil {
			err = unix.Close(fd)
		}
		return "ok", err
	case "pair":
		_, err := unix.Socketpair(unix.AF_UNIX, map[string]int{"stream": unix.SOCK_STREAM, "datagram": unix.SOCK_DGRAM}[rest], 0)
		return "ok", err
	case "tiocsti":
		var b byte
		_, _, no := unix.Syscall(unix.SYS_IOCTL, 0, unix.TIOCSTI, uintptr(unsafe.Pointer(&b)))
		return "answered " + unix.ErrnoName(no), nil
	case "setsid":
		_, err := unix.Setsid()
		return "ok", err
	case "abstract":
		_, err := net.Dial("unix", "@"+rest)
		return "ok", err
	case "listen":
		l, err := net.Listen("tcp", rest)
		if err == nil {
			err = l.Close()
		}
		return "ok", err
	case "read":
		text, err := os.ReadFile(rest)
		return fmt.Sprintf("ok %q", text), err
	case "write":
		return "ok", os.WriteFile(rest, []byte("x"), 0o644)
	case "rename":
		from, to, _ := strings.Cut(rest, " ")
		return "ok", os.Rename(from, to)
	case "chmod":
		return "ok", os.Chmod(rest, 0o777)
	case "mknod":
		return "ok", unix.Mknod(rest, unix.S_IFCHR|0o666, 1<<8|3)
	case "list":
		found, err := filepath.Glob(rest)
		return strings.Join(found, " "), err
	case "env":
		env := os.Environ()
		sort.Strings(env)
		return strings.Join(env, "|"), nil
	case "status":
		text, err := os.ReadFile("/proc/thread-self/status")
		for line := range strings.SplitSeq(string(text), "\n") {
			if name, value, _ := strings.Cut(line, ":"); name == rest {
				return strings.Join(strings.Fields(value), " "), nil
			}
		}
		return "no such line", err
	case "fds":
		found, err := os.ReadDir("/proc/self/fd")
		var list []string
		for _, one := range found {
			if to, err := os.Readlink("/proc/self/fd/" + one.Name()); err == nil && !strings.Contains(to, "anon_inode") {
				list = append(list, one.Name()+"="+filepath.Base(to))
			}
		}
		return strings.Join(list, " "), err
	case "suid":
		output, err := exec.Command("/suid", "id").CombinedOutput()
		return strings.TrimSpace(string(output)), err
	case "id":
		return fmt.Sprint(os.Geteuid(), os.Getegid(), os.Getpid()), nil
	case "umask":
		return fmt.Sprintf("%#o", unix.Umask(0)), nil
	case "core":
		var limit unix.Rlimit
		err := unix.Getrlimit(unix.RLIMIT_CORE, &limit)
		return fmt.Sprint(limit.Cur, " ", limit.Max), err
	case "host":
		return os.Hostname()
	case "stamp":
		return fmt.Sprint(time.Now().UnixNano()), nil
	case "eat":
		var eaten [][]byte
		for range 200 {
			piece := make([]byte, 1<<20)
			for i := 0; i < len(piece); i += 4096 {
				piece[i] = 1
			}
			eaten = append(eaten, piece)
		}
		return fmt.Sprint("ok ", len(eaten)), nil
	case "feed":
		return fmt.Sprint(exec.Command(os.Args[0], "eat").Run()), nil
	case "bomb":
		for range 1000 {
			if err := exec.Command("/app", "wait").Start(); err != nil {
				return "ok stopped", nil // it is what should be
			}
		}
		return "1000 processes", nil
	case "child":
		cmd := exec.Command(os.Args[0], "wait "+rest)
		cmd.Stdout = os.Stdout
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: rest == "setsid"}
		return "ok", cmd.Start()
	case "tick":
		for {
			fmt.Println("tick", time.Now().UnixNano())
			time.Sleep(5 * time.Millisecond)
		}
	case "flood":
		for {
			fmt.Println(strings.Repeat("x", 1000))
		}
	case "pour": // as many MiB, every write of which must succeed
		for range strings.Count(rest, "m") * 1024 {
			if _, err := fmt.Println(strings.Repeat("x", 1023)); err != nil {
				os.Exit(1)
			}
		}
		return "ok", nil
	case "burst":
		for {
			if _, err := fmt.Println(strings.Repeat("x", 1000)); err != nil {
				return "ok", nil
			}
		}
	case "grow": // standard output, to a hole of 4 TiB
		return "ok", unix.Ftruncate(1, 1<<42)
	case "room": // beyond its end
		return "ok", unix.Fallocate(1, unix.FALLOC_FL_KEEP_SIZE, 0, 64<<20)
	case "large":
		f, err := os.Create(rest)
		if err != nil {
			return "", err
		}
		return "ok", f.Truncate(1 << 30)
	case "hang": // unless the file is there
		name, _, _ := strings.Cut(rest, " ")
		if _, err := os.Stat(name); err != nil {
			time.Sleep(time.Hour)
		}
		return "ok", nil
	case "until": // the file is there
		for {
			if _, err := os.Stat(rest); err == nil {
				return "ok", nil
			}
			time.Sleep(time.Millisecond)
		}
	case "announce":
		process.Announce()
	case "deaf":
		signal.Ignore(syscall.SIGTERM)
		return "ok", nil
	case "exit":
		os.Exit(len(rest))
	case "wait":
		time.Sleep(time.Hour)
	}
	return "ok", nil
}
