package stage

import (
	"encoding/binary"
	"testing"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// seccompData is struct seccomp_data as the interpreter of package bpf reads it: words in network order, low word of an
// argument where the kernel has it on a little-endian machine.
func seccompData(number, arch uint32, args ...uint32) []byte {
	data := make([]byte, 64)
	binary.BigEndian.PutUint32(data[atNumber:], number)
	binary.BigEndian.PutUint32(data[atArch:], arch)
	for i, arg := range args {
		binary.BigEndian.PutUint32(data[atFirst+8*i:], arg)
	}
	return data
}

func TestFilter(t *testing.T) {
	answer := func(no unix.Errno) int { return unix.SECCOMP_RET_ERRNO | int(no) }
	const i386 = unix.AUDIT_ARCH_I386
	own := auditArch()
	for _, test := range []struct {
		name string
		bare bool // and not bounded
		data []byte
		want int
	}{
		{"reading", false, seccompData(unix.SYS_READ, own), unix.SECCOMP_RET_ALLOW},
		{"mounting", false, seccompData(unix.SYS_MOUNT, own), answer(unix.EPERM)},
		{"the last of the list", false, seccompData(unix.SYS_LOOKUP_DCOOKIE, own), answer(unix.EPERM)},
		{"reading by another table of calls", false, seccompData(unix.SYS_READ, i386), answer(unix.ENOSYS)},
		{"mounting by another table of calls", false, seccompData(21, i386), answer(unix.ENOSYS)},
		{"clone3", false, seccompData(unix.SYS_CLONE3, own), answer(unix.ENOSYS)},
		{"a thread", false, seccompData(unix.SYS_CLONE, own, unix.CLONE_VM|unix.CLONE_THREAD), unix.SECCOMP_RET_ALLOW},
		{"a process", false, seccompData(unix.SYS_CLONE, own, uint32(unix.SIGCHLD)), unix.SECCOMP_RET_ALLOW},
		{"a user namespace", false, seccompData(unix.SYS_CLONE, own, unix.CLONE_NEWUSER|uint32(unix.SIGCHLD)), answer(unix.EPERM)},
		{"tcp", false, seccompData(unix.SYS_SOCKET, own, unix.AF_INET), unix.SECCOMP_RET_ALLOW},
		{"tcp over shared memory", false, seccompData(unix.SYS_SOCKET, own, unix.AF_INET, unix.SOCK_STREAM, protocolSMC), answer(unix.EPROTONOSUPPORT)},
		{"tcp that becomes another", false, seccompData(unix.SYS_SETSOCKOPT, own, 3, unix.IPPROTO_TCP, unix.TCP_ULP), answer(unix.ENOPROTOOPT)},
		{"tcp without delay", false, seccompData(unix.SYS_SETSOCKOPT, own, 3, unix.IPPROTO_TCP, unix.TCP_NODELAY), unix.SECCOMP_RET_ALLOW},
		{"an option of the same number elsewhere", false, seccompData(unix.SYS_SETSOCKOPT, own, 3, unix.SOL_SOCKET, unix.TCP_ULP), unix.SECCOMP_RET_ALLOW},
		{"tcp over several paths", false, seccompData(unix.SYS_SOCKET, own, unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_MPTCP), answer(unix.EPROTONOSUPPORT)},
		{"tcp by name", false, seccompData(unix.SYS_SOCKET, own, unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_TCP), unix.SECCOMP_RET_ALLOW},
		{"packets", false, seccompData(unix.SYS_SOCKET, own, unix.AF_PACKET), answer(unix.EAFNOSUPPORT)},
		{"kernel crypto", false, seccompData(unix.SYS_SOCKET, own, unix.AF_ALG), answer(unix.EAFNOSUPPORT)},
		{"tcp of version 6", false, seccompData(unix.SYS_SOCKET, own, unix.AF_INET6), unix.SECCOMP_RET_ALLOW},
		{"a local socket", false, seccompData(unix.SYS_SOCKET, own, unix.AF_UNIX), unix.SECCOMP_RET_ALLOW},
		{"addresses of the host", false, seccompData(unix.SYS_SOCKET, own, unix.AF_NETLINK), unix.SECCOMP_RET_ALLOW},
		{"a local pair", false, seccompData(unix.SYS_SOCKETPAIR, own, unix.AF_UNIX), unix.SECCOMP_RET_ALLOW},
		{"a pair between hosts", false, seccompData(unix.SYS_SOCKETPAIR, own, unix.AF_TIPC), answer(unix.EAFNOSUPPORT)},
		{"a bus of a car", false, seccompData(unix.SYS_SOCKET, own, unix.AF_CAN), answer(unix.EAFNOSUPPORT)},
		{"radio", false, seccompData(unix.SYS_SOCKET, own, unix.AF_BLUETOOTH), answer(unix.EAFNOSUPPORT)},
		{"the network card's own memory", false, seccompData(unix.SYS_SOCKET, own, unix.AF_XDP), answer(unix.EAFNOSUPPORT)},
		{"a family of a kernel to come", false, seccompData(unix.SYS_SOCKET, own, 99), answer(unix.EAFNOSUPPORT)},
		{"a bare program's local socket", true, seccompData(unix.SYS_SOCKET, own, unix.AF_UNIX), answer(unix.EAFNOSUPPORT)},
		{"its tcp", true, seccompData(unix.SYS_SOCKET, own, unix.AF_INET), unix.SECCOMP_RET_ALLOW},
		{"its pair of streams", true, seccompData(unix.SYS_SOCKETPAIR, own, unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC), unix.SECCOMP_RET_ALLOW},
		{"its pair of datagrams", true, seccompData(unix.SYS_SOCKETPAIR, own, unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK), answer(unix.EPERM)},
		{"its pair of the same by another name", true, seccompData(unix.SYS_SOCKETPAIR, own, unix.AF_UNIX, unix.SOCK_RAW), answer(unix.EPERM)},
		{"its reading", true, seccompData(unix.SYS_READ, own), unix.SECCOMP_RET_ALLOW},
		{"a pair of datagrams", false, seccompData(unix.SYS_SOCKETPAIR, own, unix.AF_UNIX, unix.SOCK_DGRAM), unix.SECCOMP_RET_ALLOW},
		{"terminal size", false, seccompData(unix.SYS_IOCTL, own, 0, unix.TIOCGWINSZ), unix.SECCOMP_RET_ALLOW},
		{"terminal input", false, seccompData(unix.SYS_IOCTL, own, 0, unix.TIOCSTI), answer(unix.EPERM)},
		{"a file", false, seccompData(unix.SYS_FALLOCATE, own, 1, 0), unix.SECCOMP_RET_ALLOW},
		{"a hole", false, seccompData(unix.SYS_FALLOCATE, own, 1, unix.FALLOC_FL_KEEP_SIZE|unix.FALLOC_FL_PUNCH_HOLE), unix.SECCOMP_RET_ALLOW},
		{"room beyond the end", false, seccompData(unix.SYS_FALLOCATE, own, 1, unix.FALLOC_FL_KEEP_SIZE), answer(unix.EOPNOTSUPP)},
		{"room beyond the end by ioctl", false, seccompData(unix.SYS_IOCTL, own, 1, 0x4030582a), answer(unix.EOPNOTSUPP)},
		{"room beyond the end of kept files", true, seccompData(unix.SYS_FALLOCATE, own, 1, unix.FALLOC_FL_KEEP_SIZE), unix.SECCOMP_RET_ALLOW},
		{"a session", false, seccompData(unix.SYS_SETSID, own), unix.SECCOMP_RET_ALLOW},
		{"a session of a bare program", true, seccompData(unix.SYS_SETSID, own), answer(unix.EPERM)},
	} {
		var raw []bpf.RawInstruction
		for _, one := range filter(test.bare, !test.bare) {
			raw = append(raw, bpf.RawInstruction{Op: one.Code, Jt: one.Jt, Jf: one.Jf, K: one.K})
		}
		instructions, ok := bpf.Disassemble(raw)
		if !ok {
			t.Fatalf("the filter has an instruction that is none: %v", instructions)
		}
		vm, err := bpf.NewVM(instructions)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := vm.Run(test.data); err != nil || got != test.want {
			t.Errorf("%s: %#x, %v; want %#x", test.name, got, err, test.want)
		}
	}
}

func TestReport(t *testing.T) {
	for said, want := range map[string]struct {
		ok    bool
		cause string
	}{
		"R":                            {true, ""},
		"":                             {false, "ended without a word"},
		"RR":                           {false, "ended without a word"},
		`{"step":"s","cause":"c"}`:     {false, "c"},
		`R{"step":"exec","cause":"e"`:  {false, "ended without a word"},
		`R{"step":"exec","cause":"e"}`: {false, "e"},
	} {
		f, ok := Report([]byte(said))
		if ok != want.ok || f.Cause != want.cause {
			t.Errorf("%q: %t, %q; want %t, %q", said, ok, f.Cause, want.ok, want.cause)
		}
	}
}
