package microvm

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends/microvm/channel"
	"github.com/kindos/kmo/backends/process/monitor"
	"github.com/kindos/kmo/backends/process/stage"
)

// kernelCommand leaves out of a boot what no workload needs: tests of ciphers, security modules but the one that is used, clearing memory
// that nobody has used before.
const kernelCommand = "cryptomgr.notests=1 lsm=landlock init_on_alloc=0 audit=0 8250.nr_uarts=1"

// processors is how many a machine needs for so many thousandths.
func processors(cpu int64) int {
	if cpu <= 0 {
		return 1
	}
	return int(min((cpu+999)/1000, int64(runtime.NumCPU())))
}

// stageOrders are what the guest's stage is told: the same that the keeper of package process tells one on the host.
func stageOrders(m *monitor.Monitor) stage.Orders {
	w := m.Workload
	o := stage.Orders{Argv: w.Argv(), Dir: cmp.Or(w.Run.Dir, w.Image.Config.Dir, "/"), Confine: stage.Confine{User: w.Run.User, Execute: []string{"/"}}}
	env := w.Env()
	for _, name := range slices.Sorted(maps.Keys(env)) {
		o.Env = append(o.Env, name+"="+env[name])
	}
	for _, p := range w.Run.Ports {
		o.Confine.Ports = append(o.Confine.Ports, p.Port)
	}
	for _, device := range stage.Devices() {
		o.Confine.Write = append(o.Confine.Write, "/dev/"+device)
	}
	o.Root = m.Root(m.Workload, channel.Scratch)
	o.Root.Content = channel.Base
	if o.Root.Size > 0 {
		o.Confine.Write = append(o.Confine.Write, "/")
	}
	for i := range o.Root.Binds {
		b := &o.Root.Binds[i]
		found, err := os.Stat(b.From)
		b.From, b.Strict = shared(i, err != nil || found.IsDir()), false
		if b.Writable {
			o.Confine.Write = append(o.Confine.Write, b.To)
		}
	}
	return o
}

// shared is where the guest sees a folder of the host's, or a file.
func shared(i int, folder bool) string {
	at := filepath.Join(channel.Shares, strconv.Itoa(i))
	if folder {
		return at
	}
	return filepath.Join(at, "file")
}

// share gathers what is bound into the workload's root in one folder, by mounts that nobody else sees, under the numbers that the stage's orders have.
func share(m *monitor.Monitor) (string, error) {
	binds := m.Root(m.Workload, channel.Scratch).Binds
	if len(binds) == 0 {
		return "", nil
	}
	top := filepath.Join(m.Dir, "shares")
	if err := os.Mkdir(top, 0o700); err != nil {
		return "", err
	}
	for i, b := range binds {
		if err := expose(b, filepath.Join(top, strconv.Itoa(i))); err != nil {
			return "", err
		}
	}
	return top, nil
}

func expose(b stage.Bind, at string) error {
	how, flags := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC}, uintptr(unix.MS_BIND|unix.MS_REMOUNT|unix.MS_NOSUID|unix.MS_NODEV)
	if b.Strict {
		how.Resolve = unix.RESOLVE_NO_SYMLINKS
	}
	if !b.Writable {
		flags |= unix.MS_RDONLY
	}
	fd, err := unix.Openat2(unix.AT_FDCWD, b.From, &how)
	if errors.Is(err, unix.ELOOP) {
		return monitor.Blame{Step: "mounting " + b.From, Cause: errors.New("it has a link in it; want a path without")}
	}
	if err != nil {
		return fmt.Errorf("mounting %s: %v", b.From, err)
	}
	defer unix.Close(fd)
	var found unix.Stat_t
	if err := errors.Join(unix.Fstat(fd, &found), os.Mkdir(at, 0o700)); err != nil {
		return err
	}
	if found.Mode&unix.S_IFMT != unix.S_IFDIR {
		at = filepath.Join(at, "file")
		if err := os.WriteFile(at, nil, 0o600); err != nil {
			return err
		}
	}
	if err := unix.Mount("/proc/self/fd/"+strconv.Itoa(fd), at, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mounting %s: %v", b.From, err)
	}
	if err := unix.Mount("", at, "", flags, ""); err != nil {
		return fmt.Errorf("mounting %s again: %v", b.From, err)
	}
	return nil
}
