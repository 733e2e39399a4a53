package stage

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Main reads the orders and becomes the program. It never returns.
//
// Rights belong to threads, and execve keeps those of the thread that calls it: everything here happens on the one locked
// thread, and the other threads of this process end with execve.
func Main() {
	runtime.LockOSThread()
	if raise("/proc/self/oom_score_adj") != nil {
		os.Exit(127)
	}
	// While this binary is process 1 of the namespace, a program that a hook left behind must not reach it through /proc.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		os.Exit(127)
	}
	var o Orders
	orders := os.NewFile(OrdersFD, "orders")
	if err := json.NewDecoder(orders).Decode(&o); err != nil {
		os.Exit(127) // whoever started us is gone, and there is no record of us
	}
	fault := o.run()
	runtime.KeepAlive(orders) // run reads from its descriptor, which the collector would close
	if text, err := json.Marshal(fault); err == nil {
		_, _ = unix.Write(ReportFD, text) // nobody may be there to read it
	}
	os.Exit(127)
}

// raise takes away what protects the agent from being killed for want of memory: no program inherits it. What makes it likelier stays.
func raise(file string) error {
	text, err := os.ReadFile(file)
	if err != nil || !bytes.HasPrefix(text, []byte("-")) {
		return err
	}
	return os.WriteFile(file, []byte("0"), 0)
}

// run returns only when there will be no program.
func (o *Orders) run() Failure {
	// Everything but the standard three is closed by execve, whoever left it open.
	if err := unix.CloseRange(OrdersFD, ^uint(0)>>1, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		closeEach()
	}
	unix.Umask(0o022)
	if o.Join {
		if err := join(firstFD + o.Cgroups); err != nil {
			return Failure{Step: "entering the workload", Cause: err.Error()}
		}
	}
	if o.Root != nil {
		if err := o.Root.build(); err != nil {
			var blame blame
			return Failure{Step: "building the root", Cause: err.Error(), Blames: errors.As(err, &blame)}
		}
	}
	if o.Monitor {
		return o.monitor()
	}
	if o.Pause && !o.pause() {
		os.Exit(127)
	}
	return o.exec()
}

// monitor executes this binary again, with all our rights.
func (o *Orders) monitor() Failure {
	if !o.Join {
		if err := errors.Join(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""), unix.Mount("proc", "/proc", "proc", safe|unix.MS_NOEXEC, "")); err != nil {
			return Failure{Step: "mounting proc", Cause: err.Error()}
		}
	}
	if err := o.count(); err != nil {
		return Failure{Step: "joining the cgroup", Cause: err.Error()}
	}
	if o.Join {
		if _, err := unix.Write(ReportFD, []byte{Ready}); err != nil && !errors.Is(err, unix.EPIPE) {
			return Failure{Step: "reporting", Cause: err.Error()}
		}
	} else {
		for _, fd := range []uintptr{OrdersFD, ReportFD} {
			_, _ = unix.FcntlInt(fd, unix.F_SETFD, 0) // they are open
		}
	}
	return Failure{Step: "exec", Cause: errno(syscall.Exec("/proc/self/exe", o.Argv, o.Env))}
}

// count makes this process the workload's, as late as can be: neither the memory nor the threads of the stage are the workload's.
func (o *Orders) count() error {
	for fd := firstFD; fd < firstFD+o.Cgroups; fd++ {
		if _, err := unix.Write(fd, []byte("0")); err != nil {
			return err
		}
	}
	return nil
}

func (o *Orders) exec() Failure {
	if err := o.count(); err != nil {
		return Failure{Step: "joining the cgroup", Cause: err.Error()}
	}
	if o.Root != nil {
		_ = unix.Unshare(unix.CLONE_NEWCGROUP) // hides names only; old kernels have none
	}
	limits, err := o.Confine.fence()
	if err != nil {
		return Failure{Step: "building the landlock rules", Cause: err.Error()}
	}
	if err := o.Confine.bound(); err != nil {
		return Failure{Step: "bounding what it writes", Cause: err.Error()}
	}
	if err := o.Confine.drop(); err != nil {
		return Failure{Step: "giving up rights", Cause: err.Error()}
	}
	if err := os.Chdir(o.Dir); err != nil {
		return Failure{Step: "entering " + o.Dir, Cause: errno(err), Blames: true}
	}
	program, err := find(o.Argv[0], o.Env)
	if err != nil {
		return Failure{Step: "exec " + o.Argv[0], Cause: errno(err), Blames: true}
	}
	if err := o.Confine.close(limits); err != nil {
		return Failure{Step: "closing the filters", Cause: err.Error()}
	}
	if _, err := unix.Write(ReportFD, []byte{Ready}); err != nil && !errors.Is(err, unix.EPIPE) {
		return Failure{Step: "reporting", Cause: err.Error()}
	}
	if o.Announce {
		_, _ = unix.FcntlInt(AnnounceFD, unix.F_SETFD, 0) // it is open: nothing is left to fail
	}
	err = syscall.Exec(program, o.Argv, o.Env)
	return Failure{Step: "exec " + program, Cause: errno(err), Blames: true}
}

// pause lets the keeper run commands in what has been built, and leaves nothing of them running. It is false when the keeper
// is gone, or will not have us go on.
func (o *Orders) pause() bool {
	if _, err := unix.Write(ReportFD, []byte{Built}); err != nil {
		return false
	}
	if n, err := unix.Read(OrdersFD, make([]byte, 1)); err != nil || n != 1 {
		return false
	}
	if o.Root == nil {
		return true
	}
	_ = unix.Kill(-1, unix.SIGKILL) // everyone else in this pid namespace
	for {
		if _, err := unix.Wait4(-1, nil, 0, nil); err != nil && !errors.Is(err, unix.EINTR) {
			return true
		}
	}
}

// join enters the namespaces of the process that pidfd holds. Process ids are its keeper's part: they count from a clone on.
func join(pidfd int) error {
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return err
	}
	return unix.Setns(pidfd, unix.CLONE_NEWNS|unix.CLONE_NEWIPC|unix.CLONE_NEWUTS)
}

// find looks a program up in the PATH of env, here and now.
func find(name string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	for _, pair := range env {
		dirs, ok := strings.CutPrefix(pair, "PATH=")
		if !ok {
			continue
		}
		for dir := range strings.SplitSeq(dirs, ":") {
			candidate := path.Join("/", dir, name)
			if unix.Access(candidate, unix.X_OK) == nil {
				return candidate, nil
			}
		}
	}
	return "", unix.ENOENT
}

// errno is the bare reason of a path error, because the step names the path already.
func errno(err error) string {
	var no syscall.Errno
	if errors.As(err, &no) {
		return no.Error()
	}
	return err.Error()
}

func closeEach() {
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) != nil || limit.Cur > 1<<20 {
		limit.Cur = 1 << 20
	}
	for fd := OrdersFD; fd < int(limit.Cur); fd++ {
		unix.CloseOnExec(fd)
	}
}
