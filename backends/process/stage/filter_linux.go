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

// code is a seccomp program in the making.
type code []unix.SockFilter

func (c *code) add(op uint16, jt, jf uint8, k uint32) {
	*c = append(*c, unix.SockFilter{Code: op, Jt: jt, Jf: jf, K: k})
}

func (c *code) load(at uint32) { c.add(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, 0, 0, at) }

func (c *code) answer(no unix.Errno) {
	c.add(unix.BPF_RET|unix.BPF_K, 0, 0, unix.SECCOMP_RET_ERRNO|uint32(no))
}

// is goes on with the next instruction if the comparison holds, and with the one after if not.
func (c *code) is(comparison uint16, k uint32) { c.add(unix.BPF_JMP|comparison|unix.BPF_K, 0, 1, k) }

// of does what body adds for one call only; the number is loaded before and after.
func (c *code) of(number uint32, body func(c *code)) {
	var inner code
	body(&inner)
	inner.load(atNumber)
	c.add(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, 0, uint8(len(inner)), number)
	*c = append(*c, inner...)
}

// refuse answers a call that has one of the values as an argument.
func (c *code) refuse(number, at uint32, comparison uint16, no unix.Errno, values ...uint32) {
	c.of(number, func(c *code) {
		c.load(at)
		for _, value := range values {
			c.is(comparison, value)
			c.answer(no)
		}
	})
}

// only refuses a call whose first argument is none of the families.
func (c *code) only(number uint32, families ...uint32) {
	c.of(number, func(c *code) {
		c.load(atFirst)
		for i, family := range families {
			c.add(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, uint8(len(families)-i), 0, family)
		}
		c.answer(unix.EAFNOSUPPORT)
	})
}

// filter is the seccomp program. Every way into the kernel that is not this architecture's own answers ENOSYS: under a list
// of denials, another table of numbers would be a way round it. With bounded, a file gets no room beyond its end, which
// no bound on its size would see.
func filter(bare, bounded bool) []unix.SockFilter {
	var c code
	c.load(atArch)
	c.add(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, 1, 0, auditArch())
	c.answer(unix.ENOSYS)
	c.load(atNumber)
	if runtime.GOARCH == "amd64" {
		c.is(unix.BPF_JGE, x32)
		c.answer(unix.ENOSYS)
	}
	numbers := denied()
	if bare {
		numbers = append(numbers, unix.SYS_SETSID, unix.SYS_SETPGID)
	}
	for _, number := range numbers {
		c.is(unix.BPF_JEQ, number)
		c.answer(unix.EPERM)
	}
	c.is(unix.BPF_JEQ, unix.SYS_CLONE3) // its flags lie in memory, where no filter sees them; clone's do not
	c.answer(unix.ENOSYS)
	c.refuse(unix.SYS_CLONE, atFirst, unix.BPF_JSET, unix.EPERM, newNamespaces)
	c.sockets(bare)
	c.refuse(unix.SYS_IOCTL, atSecond, unix.BPF_JEQ, unix.EPERM, unix.TIOCSTI, 0x541c) // typing into a terminal
	if bounded {
		const keep = unix.FALLOC_FL_KEEP_SIZE
		c.refuse(unix.SYS_FALLOCATE, atSecond, unix.BPF_JEQ, unix.EOPNOTSUPP, keep, keep|unix.FALLOC_FL_ZERO_RANGE, keep|unix.FALLOC_FL_UNSHARE_RANGE)
		c.refuse(unix.SYS_IOCTL, atSecond, unix.BPF_JEQ, unix.EOPNOTSUPP, 0x40305828, 0x4030582a, 0x40305839) // the same: FS_IOC_RESVSP and its kin
	}
	c.add(unix.BPF_RET|unix.BPF_K, 0, 0, unix.SECCOMP_RET_ALLOW)
	return c
}

const protocolSMC = 256 // IPPROTO_SMC of linux/in.h

func (c *code) sockets(bare bool) {
	// Landlock's rules for TCP pass these by, which make a TCP socket within the kernel.
	c.refuse(unix.SYS_SOCKET, atThird, unix.BPF_JEQ, unix.EPROTONOSUPPORT, unix.IPPROTO_MPTCP, protocolSMC)
	c.of(unix.SYS_SETSOCKOPT, func(c *code) {
		var ulp code // "smc" among them
		ulp.load(atThird)
		ulp.is(unix.BPF_JEQ, unix.TCP_ULP)
		ulp.answer(unix.ENOPROTOOPT)
		c.load(atSecond)
		c.add(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, 0, uint8(len(ulp)), unix.IPPROTO_TCP)
		*c = append(*c, ulp...)
	})
	c.only(unix.SYS_SOCKET, families(bare)...)
	c.only(unix.SYS_SOCKETPAIR, unix.AF_UNIX)
	if !bare {
		return
	}
	c.of(unix.SYS_SOCKETPAIR, func(c *code) { // half a pair of datagrams can be connected to a path, half a pair of streams cannot
		c.load(atSecond)
		c.add(unix.BPF_ALU|unix.BPF_AND|unix.BPF_K, 0, 0, 0xf) // the type without its flags
		for _, kind := range []uint32{unix.SOCK_DGRAM, unix.SOCK_RAW} {
			c.is(unix.BPF_JEQ, kind)
			c.answer(unix.EPERM)
		}
	})
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
