package stage

import (
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// denied answers EPERM: what changes the host's shape, looks into others, or loads code into the kernel. The rest of the
// calls that need a capability fail without one by themselves.
func denied() []uint32 {
	return []uint32{
		unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_PIVOT_ROOT, unix.SYS_CHROOT, unix.SYS_MOVE_MOUNT, unix.SYS_OPEN_TREE,
		unix.SYS_FSOPEN, unix.SYS_FSCONFIG, unix.SYS_FSMOUNT, unix.SYS_FSPICK, unix.SYS_MOUNT_SETATTR,
		unix.SYS_UNSHARE, unix.SYS_SETNS, unix.SYS_SETHOSTNAME, unix.SYS_SETDOMAINNAME,
		unix.SYS_PTRACE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV, unix.SYS_KCMP, unix.SYS_PIDFD_GETFD,
		unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE, unix.SYS_KEXEC_LOAD, unix.SYS_REBOOT,
		unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN, unix.SYS_USERFAULTFD,
		unix.SYS_IO_URING_SETUP, unix.SYS_IO_URING_ENTER, unix.SYS_IO_URING_REGISTER, // they pass filters by
		unix.SYS_KEYCTL, unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY, // keys are not namespaced
		unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_NAME_TO_HANDLE_AT, // inodes outside the root
		unix.SYS_SWAPON, unix.SYS_SWAPOFF, unix.SYS_ACCT, unix.SYS_QUOTACTL, unix.SYS_SYSLOG, unix.SYS_VHANGUP,
		unix.SYS_SETTIMEOFDAY, unix.SYS_CLOCK_SETTIME, unix.SYS_ADJTIMEX, unix.SYS_CLOCK_ADJTIME, unix.SYS_LOOKUP_DCOOKIE,
	}
}

// families are the kinds of socket that a program may make. All others, Bluetooth or CAN among them, are doors of the host that its
// root, its user and landlock do not close, and new ones come with new kernels. Landlock does not hold sockets that are paths: a bare
// program would reach all that its user reaches, a container engine or the keys of an ssh agent.
func families(bare bool) []uint32 {
	list := []uint32{unix.AF_INET, unix.AF_INET6, unix.AF_NETLINK}
	if !bare {
		list = append(list, unix.AF_UNIX)
	}
	return list
}

const (
	newNamespaces = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWUSER |
		unix.CLONE_NEWPID | unix.CLONE_NEWNET
	atNumber, atArch, atFirst, atSecond, atThird = 0, 4, 16, 24, 32 // in struct seccomp_data, low words
	x32                                          = 0x40000000
)

// filter is the seccomp program. Every way into the kernel that is not this architecture's own answers ENOSYS: under a list
// of denials, another table of numbers would be a way round it. With bounded, a file gets no room beyond its end, which
// no bound on its size would see.
func filter(bare, bounded bool) []unix.SockFilter {
	var f []unix.SockFilter
	add := func(code uint16, jt, jf uint8, k uint32) {
		f = append(f, unix.SockFilter{Code: code, Jt: jt, Jf: jf, K: k})
	}
	load := func(at uint32) { add(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, 0, 0, at) }
	answer := func(no unix.Errno) { add(unix.BPF_RET|unix.BPF_K, 0, 0, unix.SECCOMP_RET_ERRNO|uint32(no)) }
	// The comparison's true branch is the next instruction, its false branch the one after.
	is := func(comparison uint16, k uint32) { add(unix.BPF_JMP|comparison|unix.BPF_K, 0, 1, k) }

	load(atArch)
	add(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, 1, 0, auditArch())
	answer(unix.ENOSYS)
	load(atNumber)
	if runtime.GOARCH == "amd64" {
		is(unix.BPF_JGE, x32)
		answer(unix.ENOSYS)
	}
	numbers := denied()
	if bare {
		numbers = append(numbers, unix.SYS_SETSID, unix.SYS_SETPGID)
	}
	for _, number := range numbers {
		is(unix.BPF_JEQ, number)
		answer(unix.EPERM)
	}
	is(unix.BPF_JEQ, unix.SYS_CLONE3) // its flags lie in memory, where no filter sees them; clone's do not
	answer(unix.ENOSYS)
	argument := func(number, at uint32, comparison uint16, values []uint32, no unix.Errno) {
		// skipped as a whole for any other call
		add(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, 0, uint8(2*len(values)+2), number)
		load(at)
		for _, value := range values {
			is(comparison, value)
			answer(no)
		}
		load(atNumber)
	}
	argument(unix.SYS_CLONE, atFirst, unix.BPF_JSET, []uint32{newNamespaces}, unix.EPERM)
	only := func(number uint32, families []uint32) {
		add(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, 0, uint8(len(families)+3), number)
		load(atFirst)
		for i, family := range families {
			add(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, uint8(len(families)-i), 0, family)
		}
		answer(unix.EAFNOSUPPORT)
		load(atNumber)
	}
	argument(unix.SYS_SOCKET, atThird, unix.BPF_JEQ, []uint32{unix.IPPROTO_MPTCP}, unix.EPROTONOSUPPORT) // landlock's rules for tcp pass it by
	only(unix.SYS_SOCKET, families(bare))
	only(unix.SYS_SOCKETPAIR, []uint32{unix.AF_UNIX})
	if bare { // half a pair of datagrams can be connected to a path, half a pair of streams cannot
		add(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, 0, 7, unix.SYS_SOCKETPAIR)
		load(atSecond)
		add(unix.BPF_ALU|unix.BPF_AND|unix.BPF_K, 0, 0, 0xf) // the type without its flags
		for _, kind := range []uint32{unix.SOCK_DGRAM, unix.SOCK_RAW} {
			is(unix.BPF_JEQ, kind)
			answer(unix.EPERM)
		}
		load(atNumber)
	}
	argument(unix.SYS_IOCTL, atSecond, unix.BPF_JEQ, []uint32{unix.TIOCSTI, 0x541c}, unix.EPERM) // typing into a terminal
	if bounded {
		const keep = unix.FALLOC_FL_KEEP_SIZE
		argument(unix.SYS_FALLOCATE, atSecond, unix.BPF_JEQ,
			[]uint32{keep, keep | unix.FALLOC_FL_ZERO_RANGE, keep | unix.FALLOC_FL_UNSHARE_RANGE}, unix.EOPNOTSUPP)
		argument(unix.SYS_IOCTL, atSecond, unix.BPF_JEQ, []uint32{0x40305828, 0x4030582a, 0x40305839}, unix.EOPNOTSUPP) // the same: FS_IOC_RESVSP and its kin
	}
	add(unix.BPF_RET|unix.BPF_K, 0, 0, unix.SECCOMP_RET_ALLOW)
	return f
}

func auditArch() uint32 {
	if runtime.GOARCH == "arm64" {
		return unix.AUDIT_ARCH_AARCH64
	}
	return unix.AUDIT_ARCH_X86_64
}

// filters says whether the kernel takes seccomp filters that answer an errno.
func filters() bool {
	action := uint32(unix.SECCOMP_RET_ERRNO)
	_, _, no := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_GET_ACTION_AVAIL, 0, uintptr(unsafe.Pointer(&action)))
	return no == 0 && (runtime.GOARCH == "amd64" || runtime.GOARCH == "arm64")
}
