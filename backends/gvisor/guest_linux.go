package gvisor

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strconv"
	"syscall"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends/process/monitor"
	"github.com/kindos/kmo/backends/process/netns"
	"github.com/kindos/kmo/backends/process/stage"
)

// specFile is what a sandbox of a workload is made of, left in its folder for the commands beside its monitor once the root is there.
const specFile = "spec.json"

// statusGuest is the status of what could not be run, as a shell has it.
const statusGuest = 127

// Guest is the main of a monitor, or of a command beside one. It returns the exit status.
func Guest(args []string) int {
	goruntime.LockOSThread() // what is started here is to end with this thread
	var r runtime
	if len(args) < 3 || json.Unmarshal([]byte(args[1]), &r) != nil {
		fmt.Fprintln(os.Stderr, "kmo: a guest of gVisor is started by its keeper only")
		return statusGuest
	}
	if args[0] == runArg {
		return monitor.Run(args[2], func(m *monitor.Monitor) (monitor.End, error) { return keep(m, r) })
	}
	status, err := beside(r, args[2], args[3:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "kmo:", err)
		return statusGuest
	}
	return status
}

// keep keeps one sandbox.
func keep(m *monitor.Monitor, r runtime) (end monitor.End, err error) {
	stop := make(chan os.Signal, 8)
	signal.Notify(stop, syscall.SIGTERM)
	spec, err := lay(m.Task)
	if err == nil {
		err = writeJSON(filepath.Join(m.Dir, specFile), spec)
	}
	if err != nil {
		return end, err
	}
	if err := m.Built(); err != nil {
		return end, err
	}
	pid, gone, err := begin(m, r, spec)
	if err != nil {
		return end, err
	}
	m.Started()
	ended := make(chan monitor.End, 1)
	go func() { ended <- monitor.End{Code: stage.Wait(pid)} }()
	for {
		select {
		case end := <-ended:
			return end, nil
		case <-stop:
			_ = unix.Kill(pid, unix.SIGTERM) // it hands it to the program
		case err := <-gone:
			_ = unix.Kill(pid, unix.SIGKILL)
			return <-ended, err
		}
	}
}

// begin starts the program in its sandbox, and returns that one's process and what tells that its network is gone.
func begin(m *monitor.Monitor, r runtime, spec specs.Spec) (pid int, gone <-chan error, err error) {
	s := sandboxOf(r, m.Task)
	space := ""
	var n *netns.Network
	if !onHost(m.Workload) {
		if n, err = openNetwork(r, m.Dir); err != nil {
			return 0, nil, err
		}
		space, gone = n.Path(), n.Gone()
	}
	dir, err := bundle(filepath.Join(m.Dir, "bundle"), spec, space)
	if err != nil {
		return 0, nil, err
	}
	if pid, err = s.create(dir); err != nil {
		return 0, nil, err
	}
	for _, p := range m.Workload.Run.Ports {
		if n == nil {
			break
		}
		if err := n.Forward(slices.Contains(m.Public, p.Name), p.Host, p.Port); err != nil {
			return 0, nil, err
		}
	}
	if err := s.start(spec.Process.Args); err != nil {
		return 0, nil, err
	}
	return pid, gone, nil
}

// beside runs a command in the workload's sandbox, or, while its program has not been started, in one of the command's own.
func beside(r runtime, place string, argv []string) (int, error) {
	stop := make(chan os.Signal, 8)
	signal.Notify(stop, syscall.SIGTERM)
	var where monitor.Place
	if err := json.Unmarshal([]byte(place), &where); err != nil {
		return 0, err
	}
	t, err := where.Read()
	if err != nil {
		return 0, err
	}
	dir, err := os.MkdirTemp(t.Dir, "command-")
	if err != nil {
		return 0, err
	}
	defer func() { _ = os.RemoveAll(dir) }() // otherwise it goes with the workload
	s := sandboxOf(r, t)
	s.log = filepath.Join(dir, "log")
	if !t.Half() {
		return within(s, t, dir, argv, stop)
	}
	return alone(s, t, dir, argv, stop)
}

// within runs a command in a sandbox that runs.
func within(s sandbox, t monitor.Task, dir string, argv []string, stop <-chan os.Signal) (int, error) {
	process, number := filepath.Join(dir, "process.json"), filepath.Join(dir, "pid")
	if err := writeJSON(process, run(t.Workload, argv, nil)); err != nil {
		return 0, err
	}
	return s.attached(stop, func() {
		text, err := os.ReadFile(number)
		if err == nil {
			_, err = strconv.Atoi(string(text))
		}
		if err == nil {
			_ = s.do("kill", "--pid", string(text), s.id, "KILL") // it may have ended
		}
	}, func() bool {
		_, err := os.Stat(number)
		return err == nil
	}, "exec", "--process", process, "--internal-pid-file", number, s.id)
}

// alone runs a command in a sandbox of its own.
func alone(s sandbox, t monitor.Task, dir string, argv []string, stop <-chan os.Signal) (int, error) {
	var spec specs.Spec
	if err := readJSON(filepath.Join(t.Dir, specFile), &spec); err != nil {
		return 0, err
	}
	spec.Process = run(t.Workload, argv, spec.Process.OOMScoreAdj)
	space := ""
	if !onHost(t.Workload) {
		n, err := openNetwork(s.runtime, dir)
		if err != nil {
			return 0, err
		}
		defer func() { _ = n.Close() }() // the command has ended
		space = n.Path()
	}
	if _, err := bundle(dir, spec, space); err != nil {
		return 0, err
	}
	s.id = identify(dir)
	number := filepath.Join(dir, "pid")
	return s.attached(stop, func() {}, func() bool {
		_, err := os.Stat(number)
		return err == nil
	}, "run", "--bundle", dir, "--pid-file", number, s.id)
}

// statusRunsc is runsc's own when it could not run something.
const statusRunsc = 128

// attached runs a command of runsc that has a program's output and status. When this process is told to stop, kill ends that program.
// Ran says whether there was one.
func (s sandbox) attached(stop <-chan os.Signal, kill func(), ran func() bool, words ...string) (int, error) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	cmd := s.command(ctx, words...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case <-stop:
		kill()
		cancel()
		if err := <-ended; err == nil {
			return cmd.ProcessState.ExitCode(), nil
		}
		return 128 + int(syscall.SIGTERM), nil
	case err := <-ended:
		status := cmd.ProcessState.ExitCode()
		if status == statusRunsc && !ran() {
			return 0, s.fault(err, nil)
		}
		return status, nil
	}
}
