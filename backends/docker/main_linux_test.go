package docker

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends/docker/engine"
)

// inNetwork marks the process that runs the tests, in a network of its own: the engines change firewall rules.
const inNetwork = "KMO_TEST_NETWORK"

// besideEngines marks the processes that a test starts: the engines are there.
const besideEngines = "KMO_TEST_BESIDE_ENGINES"

func TestMain(m *testing.M) {
	if os.Getenv(childState) != "" {
		child()
	}
	if os.Getenv(inNetwork) == "" {
		os.Exit(elsewhere())
	}
	dir := os.Getenv(inNetwork)
	engines = map[string]*daemon{Docker: dockerd(filepath.Join(dir, "d")), Podman: podman(filepath.Join(dir, "p"))}
	if os.Getenv(besideEngines) != "" { // a test of these has started this process, to kill it
		for _, d := range engines {
			d.made, d.programs = true, nil
		}
		os.Exit(m.Run())
	}
	// Small enough to be filled, and gone with the namespace.
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=1g"); err != nil {
		fmt.Fprintln(os.Stderr, "mounting the engines' disk:", err)
		os.Exit(1)
	}
	if err := os.Setenv(besideEngines, "1"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	for _, d := range engines {
		if err := d.end(); err != nil {
			fmt.Fprintln(os.Stderr, "ending an engine:", err)
			code = 1
		}
	}
	os.Exit(code)
}

// elsewhere runs these tests in namespaces of their own, with which all that they start and mount goes, however they end.
func elsewhere() int {
	dir, err := os.MkdirTemp("", "kmo-engines-") // short: sockets lie in it
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	// Forwarding before any engine: one that switches it on itself changes what the firewall does with the rest.
	const prepare = `mount --make-rprivate / && mount -t proc proc /proc && mkdir -p /run/netns && mount -t tmpfs none /run/netns && ip link set lo up && echo 1 >/proc/sys/net/ipv4/ip_forward && "$@"`
	self := exec.Command("/bin/sh", append([]string{"-c", prepare, "sh", os.Args[0]}, os.Args[1:]...)...)
	self.Stdin, self.Stdout, self.Stderr = os.Stdin, os.Stdout, os.Stderr
	self.Env = append(os.Environ(), inNetwork+"="+dir)
	runtime.LockOSThread() // the child dies with the thread that started it
	self.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID, Pdeathsig: unix.SIGKILL}
	err = self.Run()
	for _, group := range []string{"kmo-engines", "libpod_parent/conmon", "libpod_parent"} {
		found, _ := filepath.Glob("/sys/fs/cgroup/*/" + group)
		for _, at := range found {
			_ = os.Remove(at) // others may be in it
		}
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "running the tests in namespaces of their own (needs root, and iproute2):", err)
		return 1
	}
	return 0
}

// engines are set once, before any test.
var engines map[string]*daemon //nolint:gochecknoglobals // of TestMain

// daemon is an engine that the tests start, in a folder of its own.
type daemon struct {
	name, dir, socket string
	packages          string
	programs          [][]string // in the order in which they are started
	waits             []string   // the socket of each
	env               []string
	setup             func() error
	running           []*exec.Cmd
	made              bool
}

func (d *daemon) start() error {
	if !d.made {
		if err := errors.Join(os.MkdirAll(d.dir, 0o700), d.setup()); err != nil {
			return err
		}
		d.made = true
	}
	for i := len(d.running); i < len(d.programs); i++ {
		argv := d.programs[i]
		path, err := exec.LookPath(argv[0])
		if err != nil {
			return fmt.Errorf("%v; as root: apt-get install --no-install-recommends %s", err, d.packages)
		}
		log, err := os.OpenFile(filepath.Join(d.dir, filepath.Base(path)+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		p := exec.Command(path, argv[1:]...)
		p.Stdout, p.Stderr, p.Dir, p.Env = log, log, d.dir, append(os.Environ(), d.env...)
		p.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		_ = os.Remove(d.waits[i])
		if err := errors.Join(p.Start(), log.Close()); err != nil {
			return err
		}
		d.running = append(d.running, p)
		for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			conn, err := net.Dial("unix", d.waits[i])
			if err == nil {
				_ = conn.Close()
				break
			}
			if time.Now().After(deadline) {
				text, _ := os.ReadFile(log.Name())
				return fmt.Errorf("%s: %v; its log ends %q", argv[0], err, text[max(len(text)-2000, 0):])
			}
		}
	}
	return nil
}

// kill ends the last of the engine's processes, the one that answers.
func (d *daemon) kill(signal os.Signal) error {
	last := d.running[len(d.running)-1]
	d.running = d.running[:len(d.running)-1]
	err := last.Process.Signal(signal)
	_ = last.Wait() // however it ends
	return err
}

// end ends the engine and what it has mounted.
func (d *daemon) end() error {
	for len(d.running) > 0 {
		if err := d.kill(unix.SIGTERM); err != nil {
			return err
		}
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return err
	}
	lines := strings.Split(string(mounts), "\n")
	for i := len(lines) - 1; i >= 0; i-- {
		if fields := strings.Fields(lines[i]); len(fields) > 1 && strings.HasPrefix(fields[1], d.dir+"/") {
			err = errors.Join(err, unix.Unmount(fields[1], 0))
		}
	}
	return err
}

func dockerd(dir string) *daemon {
	at := func(name string) string { return filepath.Join(dir, name) }
	return &daemon{
		name: Docker, dir: dir, socket: at("docker.sock"), packages: "docker.io containerd runc iptables iproute2",
		programs: [][]string{
			{"containerd", "-c", at("containerd.toml")},
			{"dockerd", "--containerd", at("containerd.sock"), "--data-root", at("data"), "--exec-root", at("exec"), "--pidfile", at("docker.pid"), "--live-restore", "--cgroup-parent", "/kmo-engines", "-H", "unix://" + at("docker.sock")},
		},
		waits: []string{at("containerd.sock"), at("docker.sock")},
		setup: func() error {
			return os.WriteFile(at("containerd.toml"), []byte(fmt.Sprintf("version = 2\nroot = %q\nstate = %q\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\n  address = %q\n",
				at("containerd"), at("containerd-run"), at("containerd.sock"))), 0o600)
		},
	}
}

func podman(dir string) *daemon {
	at := func(name string) string { return filepath.Join(dir, name) }
	return &daemon{
		name: Podman, dir: dir, socket: at("podman.sock"), packages: "podman runc conmon netavark iptables iproute2",
		programs: [][]string{{"podman", "system", "service", "--time=0", "unix://" + at("podman.sock")}},
		waits:    []string{at("podman.sock")},
		env:      []string{"CONTAINERS_CONF=" + at("containers.conf"), "CONTAINERS_STORAGE_CONF=" + at("storage.conf"), "CONTAINERS_REGISTRIES_CONF=" + at("registries.conf")},
		setup: func() error {
			var files, processes unix.Rlimit
			text, err := os.ReadFile("/proc/sys/kernel/pid_max")
			pids, atoiErr := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
			err = errors.Join(err, atoiErr, unix.Getrlimit(unix.RLIMIT_NOFILE, &files), unix.Getrlimit(unix.RLIMIT_NPROC, &processes))
			if err != nil {
				return err
			}
			// The bounds that Podman sets by itself may be above what this machine lets anybody set.
			conf := fmt.Sprintf(`[containers]
default_ulimits = ["nofile=%[1]d:%[1]d", "nproc=%[2]d:%[2]d"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
tmp_dir = %[3]q
static_dir = %[4]q
volume_path = %[5]q
[network]
network_backend = "netavark"
network_config_dir = %[6]q
`, files.Max, min(processes.Max, pids), at("tmp"), at("static"), at("volumes"), at("networks"))
			return errors.Join(
				os.WriteFile(at("containers.conf"), []byte(conf), 0o600),
				os.WriteFile(at("storage.conf"), []byte(fmt.Sprintf("[storage]\ndriver = \"overlay\"\ngraphroot = %q\nrunroot = %q\n", at("root"), at("runroot"))), 0o600),
				os.WriteFile(at("registries.conf"), []byte("unqualified-search-registries = []\n"), 0o600),
			)
		},
	}
}

// up is the engine of that name, which answers.
func up(t testing.TB, name string) *daemon {
	t.Helper()
	d := engines[name]
	if err := d.start(); err != nil {
		t.Fatal(err)
	}
	if _, err := (engine.Endpoint{Name: name, Socket: d.socket}).Client(nil); err != nil {
		t.Fatal(err)
	}
	return d
}
