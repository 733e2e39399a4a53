package lxc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends/process"
	"github.com/kindos/kmo/backends/process/monitor"
	"github.com/kindos/kmo/backends/process/netns"
	"github.com/kindos/kmo/backends/process/stage"
)

// Where things are in a monitor's mount namespace, and in a workload's own folder.
const (
	runDir  = "/run/lxc" // LXC keeps its locks here; ours are on a tmpfs of our own, and so is the root
	rootDir = runDir + "/root"

	configFile = "config"

	container = "app" // its name for LXC
)

// Guest is the whole life of a process that was started with [GuestArg] as its first argument; args are those after it. It returns
// the exit status.
func Guest(args []string) int {
	if len(args) < 3 {
		fmt.Fprintf(os.Stderr, "kmo: arguments %q: this command is kmo's own\n", args)
		return 2
	}
	// Before anything is built, so that whoever stops it at any time stops it.
	ctx, done := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer done()
	var status int
	var err error
	if args[0] == runArg {
		var first int
		if first, err = strconv.Atoi(args[1]); err == nil {
			return monitor.Run(args[2], func(m *monitor.Monitor) (monitor.End, error) { return keep(ctx, m, first) })
		}
	} else {
		status, err = command(ctx, args[1], args[2:])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "kmo:", err)
		return 127
	}
	return status
}

// keep is a monitor: it builds, starts and waits.
func keep(ctx context.Context, m *monitor.Monitor, first int) (monitor.End, error) {
	if err := hide(); err != nil {
		return monitor.End{}, err
	}
	c := config{workload: m.Workload, halt: "SIGTERM"}
	network, reached, err := connect(ctx, m, &c)
	if err == nil {
		err = build(m, first, &c, network != nil)
	}
	if err == nil {
		err = <-reached
	}
	if err != nil {
		return monitor.End{}, err
	}
	program := argv(m.Workload)
	if err := executable(c.root, folder(m.Workload), program[0], m.Workload.Env()["PATH"]); err != nil {
		return monitor.End{}, monitor.Blame{Step: "exec " + program[0], Cause: err}
	}
	if err := os.WriteFile(filepath.Join(m.Dir, configFile), []byte(c.text()), 0o600); err != nil {
		return monitor.End{}, err
	}
	if err := m.Built(); err != nil {
		return monitor.End{}, err
	}
	if err := publish(m, network); err != nil { // not before the hooks have ended well
		return monitor.End{}, err
	}
	run, err := start(m.Dir, container, program)
	if err != nil {
		return monitor.End{}, err
	}
	if err := run.begun(); err != nil {
		var missing fault
		if errors.As(err, &missing) {
			return monitor.End{}, monitor.Blame{Step: "exec " + program[0], Cause: missing}
		}
		return monitor.End{}, err
	}
	m.Started()
	defer context.AfterFunc(ctx, func() { run.halt(c.halt) })()
	ended := make(chan int, 1)
	go func() { ended <- run.wait() }()
	var gone <-chan error
	if network != nil {
		gone = network.Gone()
	}
	select {
	case code := <-ended:
		return monitor.End{Code: code}, nil
	case err := <-gone:
		run.halt("SIGKILL")
		return monitor.End{Code: <-ended}, err
	}
}

// hide keeps what is the host's from LXC: with no hierarchy to be seen it makes no cgroups, and its locks are this monitor's.
func hide() error {
	if err := os.MkdirAll(runDir, 0o755); err != nil { // as LXC itself does
		return err
	}
	for at, mode := range map[string]string{"/sys/fs/cgroup": "0555", runDir: "0755"} {
		if _, err := os.Stat(at); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err := unix.Mount("tmpfs", at, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode="+mode); err != nil {
			return fmt.Errorf("hiding %s: %v", at, err)
		}
	}
	return nil
}

// connect makes the network of a workload that has one of its own. Reached tells when it has its way out, or why not.
func connect(ctx context.Context, m *monitor.Monitor, c *config) (network *netns.Network, reached chan error, err error) {
	reached = make(chan error, 1)
	if slices.Contains(m.Workload.Security.Host, "network") {
		reached <- nil
		return nil, reached, nil
	}
	if network, err = netns.Open(); err != nil {
		return nil, nil, err
	}
	c.netns = network.Thread()
	go func() {
		err := network.Reach(ctx, netns.WayOut{})
		if errors.Is(err, netns.ErrNoWayOut) {
			err = nil
		}
		reached <- err
	}()
	return network, reached, nil
}

func publish(m *monitor.Monitor, network *netns.Network) error {
	if network == nil {
		return nil
	}
	for _, p := range m.Workload.Run.Ports {
		address := "127.0.0.1:"
		if slices.Contains(m.Public, p.Name) {
			address = ":"
		}
		if err := network.Publish(address+strconv.Itoa(p.Host), p.Port); err != nil {
			return fmt.Errorf("publishing port %s: %v", p.Name, err)
		}
	}
	return nil
}

// build mounts the root and says so in the configuration.
func build(m *monitor.Monitor, first int, c *config, connected bool) error {
	w := m.Workload
	root := m.Root(w, rootDir)
	if connected {
		root.Files = append(root.Files, monitor.Resolver(w, netns.Resolver)...)
	}
	if first != 0 {
		u, err := stage.NewUsers(first, w.Run.User)
		if err != nil {
			return err
		}
		defer func() { _ = u.Close() }() // it has been used
		root.Users, c.ids = u, u.Ranges()
	}
	if err := os.Mkdir(rootDir, 0o755); err != nil {
		return err
	}
	at, err := root.Mount()
	if err != nil && stage.Blames(err) {
		return monitor.Blame{Step: "building the root", Cause: err}
	} else if err != nil {
		return fmt.Errorf("building the root: %v", err)
	}
	c.root = at
	if _, err := os.Stat(seccompProfile); err == nil {
		c.seccomp = seccompProfile
	}
	if system(w) {
		target, err := stage.Resolve(w.Image.Content, initPath)
		if err != nil {
			return err
		}
		if strings.HasPrefix(filepath.Base(target), "systemd") {
			return monitor.Blame{Step: "exec " + initPath, Cause: errors.New("it is systemd, which needs cgroups of its own; a container has none here")}
		}
		c.halt = haltSignal(target)
	}
	return nil
}

// executable looks a program up as the kernel will, in the root, and says what is wrong with it.
func executable(root, dir, name, search string) error {
	candidates := []string{path.Join("/", dir, name)}
	if path.IsAbs(name) {
		candidates = []string{name}
	} else if !strings.Contains(name, "/") {
		candidates = nil
		for _, folder := range strings.Split(search, ":") {
			candidates = append(candidates, path.Join("/", folder, name))
		}
	}
	var last error = unix.ENOENT
	for _, candidate := range candidates {
		at, err := stage.Resolve(root, candidate)
		if err != nil {
			return err
		}
		found, err := os.Stat(at)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue
		case err != nil:
			last = err
		case found.IsDir() || found.Mode()&0o111 == 0:
			last = unix.EACCES
		default:
			return nil
		}
	}
	return last
}

// command runs a hook, or what Exec asks for: in the container if that runs, otherwise in one of its own.
func command(ctx context.Context, place string, argv []string) (int, error) {
	var at process.Place
	if err := json.Unmarshal([]byte(place), &at); err != nil {
		return 0, err
	}
	task, err := at.Read()
	if err != nil {
		return 0, err
	}
	if len(argv) == 0 {
		return 0, errors.New("no command")
	}
	if initOf(at.Dir) != 0 {
		return attach(ctx, at.Dir, task.Workload, argv)
	}
	if err := executable(rootDir+"/merged", folder(task.Workload), argv[0], task.Workload.Env()["PATH"]); err != nil {
		return 0, fmt.Errorf("exec %s: %v", argv[0], err)
	}
	run, err := start(at.Dir, "hook-"+strconv.Itoa(os.Getpid()), argv)
	if err != nil {
		return 0, err
	}
	defer context.AfterFunc(ctx, run.kill)()
	if err := run.begun(); err != nil {
		return 0, err
	}
	return run.wait(), nil
}
