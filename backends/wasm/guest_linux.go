package wasm

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	goruntime "runtime"
	"runtime/debug"
	"slices"
	"syscall"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/experimental"
	"github.com/tetratelabs/wazero/experimental/sock"
	"github.com/tetratelabs/wazero/experimental/sysfs"
	"github.com/tetratelabs/wazero/imports/wasi_snapshot_preview1"
	"github.com/tetratelabs/wazero/sys"
	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends/process"
	"github.com/kindos/kmo/backends/process/stage"
)

// Guest is the whole life of a process that was started with [GuestArg] as its first argument; args are those after it. It returns
// the exit status. It is to be called before anything else is done: it reads no configuration and needs nothing of the caller.
func Guest(args []string) int {
	var err error
	status := 0
	switch {
	case len(args) == 1 && args[0] == compileArg:
		err = fenced()
	case len(args) == 1 && args[0] == fencedArg:
		err = compileGuest()
	case len(args) >= 2 && (args[0] == runArg || args[0] == hookArg):
		status, err = runGuest(args[0] == runArg, args[1:])
	default:
		err = fmt.Errorf("arguments %q: this command is kmo's own", args)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "kmo: %v\n", err)
		return statusRunner
	}
	return status
}

// runGuest runs a module until it ends and returns its exit status.
func runGuest(listening bool, args []string) (int, error) {
	var p plan
	if err := json.Unmarshal([]byte(os.Getenv(planVariable)), &p); err != nil {
		return 0, fmt.Errorf("reading %s: %v", planVariable, err)
	}
	// What wazero makes while it reads the module is used once: collect it often, give it back, and leave little room afterwards.
	debug.SetGCPercent(25)
	memory := &linear{bound: p.Memory}
	ctx := experimental.WithMemoryAllocator(context.Background(), memory)
	if listening {
		ctx = listeners(ctx, p.Listen)
	}
	module, runtime, err := load(ctx, p)
	if err != nil {
		return 0, err
	}
	config := wazero.NewModuleConfig().WithName("").WithArgs(args...).
		WithStdout(os.Stdout).WithStderr(os.Stderr).
		WithSysWalltime().WithSysNanotime().WithSysNanosleep().WithRandSource(rand.Reader)
	for _, name := range slices.Sorted(maps.Keys(p.Env)) {
		config = config.WithEnv(name, p.Env[name])
	}
	if p.Root != "" {
		root, err := openTree(p.Root)
		if err != nil {
			return 0, err
		}
		files, ok := wazero.NewFSConfig().(sysfs.FSConfig)
		if !ok {
			return 0, errors.New("this wazero mounts no file system but its own")
		}
		config = config.WithFSConfig(files.WithSysFSMount(root, "/"))
	}
	debug.FreeOSMemory()
	return ended(begin(ctx, runtime, module, config, memory, listening && p.Announce), memory)
}

// begin runs a guest, announced just before its _start. wazero slices what it gets for the memory that a module begins with, also when it gets none.
func begin(ctx context.Context, runtime wazero.Runtime, module wazero.CompiledModule, config wazero.ModuleConfig, memory *linear, announce bool) (err error) {
	defer func() {
		if memory.refused == 0 {
			return
		}
		if fault := recover(); fault != nil {
			err = fmt.Errorf("no memory to start in: %v", fault)
		}
	}()
	guest, err := runtime.InstantiateModule(ctx, module, config.WithStartFunctions())
	if err != nil {
		return err
	}
	if announce {
		process.Announce()
	}
	_, err = guest.ExportedFunction(startFunction).Call(ctx)
	return err
}

// ended tells how the guest ended, in its log where its exit status says too little.
func ended(err error, memory *linear) (int, error) {
	var exit *sys.ExitError
	switch {
	case err == nil:
		return 0, nil
	case errors.As(err, &exit) && exit.ExitCode() == 0:
		return 0, nil
	}
	if memory.refused > 0 {
		fmt.Fprintf(os.Stderr, "kmo: the guest asked for %d bytes of memory, its bound is %d\n", memory.refused, memory.bound)
		return statusMemory, nil
	}
	if exit != nil {
		status := int(exit.ExitCode() & 0xff)
		if status == statusMemory {
			status--
		}
		return status, nil
	}
	var listening *net.OpError // a guest itself listens nowhere
	if errors.As(err, &listening) && errors.Is(err, syscall.EADDRINUSE) {
		if address, ok := listening.Addr.(*net.TCPAddr); ok {
			return 0, fmt.Errorf("port %d is taken by another program", address.Port)
		}
	}
	fmt.Fprintf(os.Stderr, "kmo: the guest trapped: %v\n", err)
	return statusTrap, nil
}

func listeners(ctx context.Context, addresses []listener) context.Context {
	config := sock.NewConfig()
	for _, a := range addresses {
		host := "127.0.0.1"
		if a.Public {
			host = ""
		}
		config = config.WithTCPListener(host, a.Port)
	}
	return sock.WithConfig(ctx, config)
}

// load reads the module and its machine code. Where there is none for this machine, or it is damaged, the module is compiled here.
func load(ctx context.Context, p plan) (wazero.CompiledModule, wazero.Runtime, error) {
	binary, err := os.ReadFile(p.Module)
	if err != nil {
		return nil, nil, err
	}
	sum, err := codeSum(p.Code)
	if err == nil && sum != p.Sum {
		err = fmt.Errorf("SHA-256 of %s is %s, want %s", p.Code, sum, p.Sum)
	}
	var cache wazero.CompilationCache
	if err == nil {
		cache, err = wazero.NewCompilationCacheWithDir(p.Code)
	}
	if err == nil {
		var runtime wazero.Runtime
		if runtime, err = newRuntime(ctx, cache); err != nil {
			return nil, nil, err
		}
		var module wazero.CompiledModule
		if module, err = runtime.CompileModule(ctx, binary); err == nil {
			return module, runtime, nil
		}
	}
	fmt.Fprintf(os.Stderr, "kmo: no machine code that fits, compiling: %v\n", err)
	runtime, err := newRuntime(ctx, wazero.NewCompilationCache())
	if err != nil {
		return nil, nil, err
	}
	module, err := runtime.CompileModule(ctx, binary)
	return module, runtime, err
}

func newRuntime(ctx context.Context, cache wazero.CompilationCache) (wazero.Runtime, error) {
	config := wazero.NewRuntimeConfigCompiler().WithCompilationCache(cache).WithDebugInfoEnabled(false)
	runtime := wazero.NewRuntimeWithConfig(ctx, config)
	host := runtime.NewHostModuleBuilder(wasi)
	wasi_snapshot_preview1.NewFunctionExporter().ExportFunctions(host)
	exportPoll(host)
	if _, err := host.Instantiate(ctx); err != nil {
		return nil, err
	}
	return runtime, nil
}

// fenced goes on as compileGuest, which may read this program and write to its folder, and nothing else.
func fenced() error {
	const self = "/proc/self/exe"
	return (&stage.Confine{Execute: []string{self}, Write: []string{"/proc/self/fd/3"}}).Exec(self, []string{self, GuestArg, fencedArg}, os.Environ())
}

// compileGuest compiles the module on stdin into the folder that is open as descriptor 3.
func compileGuest() error {
	if err := bound(); err != nil {
		return err
	}
	binary, err := io.ReadAll(io.LimitReader(os.Stdin, maxModule))
	if err != nil {
		return err
	}
	cache, err := wazero.NewCompilationCacheWithDir("/proc/self/fd/3")
	if err != nil {
		return err
	}
	ctx := experimental.WithCompilationWorkers(context.Background(), goruntime.GOMAXPROCS(0))
	runtime, err := newRuntime(ctx, cache)
	if err != nil {
		return err
	}
	_, err = runtime.CompileModule(ctx, binary)
	return err
}

// linear makes memories that grow in place: the whole bound is reserved, and a page costs memory once it is written.
type linear struct {
	bound   uint64 // bytes; 0 means what the module says
	refused uint64 // bytes that the guest asked for and did not get
	memory  []byte
}

// Allocate reserves a guest's memory; most is what the module says it may need.
func (l *linear) Allocate(_, most uint64) experimental.LinearMemory {
	if l.bound == 0 || l.bound > most {
		l.bound = most
	}
	memory, err := unix.Mmap(-1, 0, int(l.bound), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE|unix.MAP_NORESERVE) // at most 4 GiB
	if err != nil {
		panic(fmt.Errorf("reserving %d bytes: %w", l.bound, err)) // wazero lets an allocator say nothing else
	}
	l.memory = memory
	return l
}

// Reallocate grows the memory within its bound.
func (l *linear) Reallocate(size uint64) []byte {
	if size > uint64(len(l.memory)) {
		l.refused = size
		return nil
	}
	return l.memory[:size]
}

// Free does nothing: the process ends with its guest.
func (l *linear) Free() {}

// nobody compiles for workloads of root.
const nobody = 65534

// withoutRights makes the command another user's, who owns the folder, where this process can.
func withoutRights(command *exec.Cmd, folder string, user int) error {
	if os.Geteuid() != 0 {
		return nil
	}
	if user <= 0 {
		user = nobody
	}
	command.SysProcAttr = &syscall.SysProcAttr{
		Credential: &syscall.Credential{Uid: uint32(user), Gid: uint32(user)},
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC,
		Setsid:     true,
	}
	return os.Chown(folder, user, user)
}

// bound limits this process before it reads what it does not trust.
func bound() error {
	for resource, limit := range map[int]uint64{
		unix.RLIMIT_CPU: uint64(compileTime.Seconds()), unix.RLIMIT_DATA: compileMemory, unix.RLIMIT_CORE: 0,
	} {
		if err := unix.Setrlimit(resource, &unix.Rlimit{Cur: limit, Max: limit}); err != nil {
			return os.NewSyscallError("setrlimit", err)
		}
	}
	return os.NewSyscallError("prctl", unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
}
