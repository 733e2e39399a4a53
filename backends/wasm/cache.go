package wasm

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/kindos/kmo/policy/refusal"
)

// The bounds of compiling one module, and of how many are kept.
const (
	compileTime   = 2 * time.Minute // CPU, which is the module's fault, and wall, which is not
	compileMemory = 3 << 30         // bytes
	keptModules   = 32
	unfinished    = "new-"
)

// cache is a folder of machine code, one folder a module. It is written by this process alone: what runs guests only reads.
type cache struct {
	dir     string
	program string        // compiles
	wall    time.Duration // how long it may take for one module
	turn    chan struct{} // holds one token: whoever has it may compile, as that takes all processors and some hundred MiB

	mu   sync.Mutex
	sums map[string]string // guarded by mu: of a path's state, the hex SHA-256 of what it held then
	seen map[string]string // guarded by mu: by folder, the sum that its machine code was seen to have
}

// code is one module's machine code.
type code struct {
	dir  string
	sum  string // hex SHA-256 of all of it: wazero's own checksum leaves out the tables, and a wrong one is a wild jump
	cost int64  // bytes that a process needs to hold it: the code, and the module as it is read
}

// sumFile is beside the machine code.
const sumFile = "sum"

func openCache(dir, program string) (*cache, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	halves, err := filepath.Glob(filepath.Join(dir, unfinished+"*"))
	if err != nil {
		return nil, err
	}
	for _, half := range halves {
		if err := os.RemoveAll(half); err != nil {
			return nil, err
		}
	}
	c := &cache{dir: dir, program: program, wall: compileTime, turn: make(chan struct{}, 1), sums: map[string]string{}, seen: map[string]string{}}
	c.turn <- struct{}{}
	return c, nil
}

// ready compiles a module if that was not done before by this version of wazero, or if its machine code is damaged when it is first asked for. A
// module that cannot be compiled is a *moduleError.
func (c *cache) ready(ctx context.Context, module string, user int) (code, error) {
	f, err := os.Open(module)
	if err != nil {
		return code{}, err
	}
	defer f.Close()
	sum, size, err := c.sum(f)
	if err != nil {
		return code{}, err
	}
	dir := filepath.Join(c.dir, sum+"-"+wazeroVersion())
	whole, err := c.kept(dir)
	if errors.Is(err, os.ErrNotExist) {
		whole, err = c.fill(ctx, f, dir, user)
	}
	if err != nil {
		return code{}, err
	}
	now := time.Now()
	if err := os.Chtimes(dir, now, now); err != nil {
		return code{}, err
	}
	machine, err := weigh(dir)
	if err != nil {
		return code{}, err
	}
	return code{dir, whole, machine + 2*size}, nil
}

// fill has a module compiled when its turn has come, unless whoever had it before did that.
func (c *cache) fill(ctx context.Context, module *os.File, dir string, user int) (sum string, err error) {
	select {
	case <-c.turn:
		defer func() { c.turn <- struct{}{} }()
	case <-ctx.Done():
		return "", ctx.Err()
	}
	if sum, err := c.kept(dir); !errors.Is(err, os.ErrNotExist) {
		return sum, err
	}
	if err := os.RemoveAll(dir); err != nil { // damaged
		return "", err
	}
	if err := c.compile(ctx, module, dir, user); err != nil {
		return "", err
	}
	if err := c.prune(dir); err != nil {
		return "", err
	}
	return c.kept(dir)
}

// kept is the sum of the machine code in a folder, which it has. Machine code that is not whole is as good as none.
func (c *cache) kept(dir string) (string, error) {
	sum, err := readSum(dir)
	if err != nil {
		return "", err
	}
	c.mu.Lock()
	known := c.seen[dir] == sum
	c.mu.Unlock()
	if known {
		return sum, nil
	}
	got, err := codeSum(dir)
	if err == nil && got != sum {
		err = fmt.Errorf("%s: its sum is %s, want %s: %w", dir, got, sum, os.ErrNotExist)
	}
	if err != nil {
		return "", err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seen[dir] = sum
	return sum, nil
}

// readSum is the sum beside the machine code in a folder. One that is not whole is as good as none.
func readSum(dir string) (string, error) {
	sum, err := os.ReadFile(filepath.Join(dir, sumFile))
	if err == nil && len(sum) != hex.EncodedLen(sha256.Size) {
		err = fmt.Errorf("%s: %d bytes: %w", filepath.Join(dir, sumFile), len(sum), os.ErrNotExist)
	}
	return string(sum), err
}

// codeSum hashes the machine code in a folder.
func codeSum(dir string) (string, error) {
	files, err := filepath.Glob(filepath.Join(dir, "wazero-*", "*"))
	if err != nil {
		return "", err
	}
	hash := sha256.New()
	for _, file := range files {
		f, err := os.Open(file)
		if err != nil {
			return "", err
		}
		_, err = io.Copy(hash, f)
		if err := errors.Join(err, f.Close()); err != nil {
			return "", err
		}
	}
	return hex.EncodeToString(hash.Sum(nil)), nil
}

// sum hashes a module, once for each state it is found in.
func (c *cache) sum(f *os.File) (sum string, size int64, err error) {
	found, err := f.Stat()
	if err != nil {
		return "", 0, err
	}
	state := fmt.Sprint(f.Name(), " ", found.Size(), " ", found.ModTime().UnixNano())
	c.mu.Lock()
	sum, known := c.sums[state]
	c.mu.Unlock()
	if known {
		return sum, found.Size(), nil
	}
	hash := sha256.New()
	if _, err := io.Copy(hash, f); err != nil {
		return "", 0, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return "", 0, err
	}
	sum = hex.EncodeToString(hash.Sum(nil))
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.sums) >= 256 {
		clear(c.sums) // those in use are soon back
	}
	c.sums[state] = sum
	return sum, found.Size(), nil
}

// compile fills a new folder by a process without rights, and renames it to dir.
func (c *cache) compile(ctx context.Context, module *os.File, dir string, user int) error {
	half, err := os.MkdirTemp(c.dir, unfinished)
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(half) }() // not there any more when all went well
	folder, err := os.Open(half)
	if err != nil {
		return err
	}
	defer folder.Close()
	program, err := os.Open(c.program) // by its descriptor: whoever compiles may have no way to its folder
	if err != nil {
		return err
	}
	defer program.Close()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	limited, cancel := context.WithTimeout(ctx, c.wall)
	defer cancel()
	said := &bytes.Buffer{}
	command := exec.CommandContext(limited, fmt.Sprintf("/proc/self/fd/%d", program.Fd()), GuestArg, compileArg)
	command.Stdin, command.Stdout, command.Stderr = module, said, said
	command.Env = []string{"GOTRACEBACK=none"}
	command.ExtraFiles = []*os.File{folder}
	command.WaitDelay = time.Second
	if err := withoutRights(command, half, user); err != nil {
		return err
	}
	if err := command.Run(); err != nil {
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case limited.Err() != nil:
			return fmt.Errorf("compiling: not done within %v, of which the processor worked %v; want a host that is less busy", c.wall, worked(command))
		case command.ProcessState != nil && (command.ProcessState.Exited() || worked(command) >= compileTime-time.Second): // or ended by its bound
			return &moduleError{fmt.Sprintf("compiling: %v: %s", err, refusal.Clip(strings.TrimSpace(said.String()), 1000))}
		}
		return fmt.Errorf("compiling: %v", err)
	}
	whole, err := codeSum(half)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(half, sumFile), []byte(whole), 0o600); err != nil {
		return err
	}
	if err := publish(half); err != nil {
		return err
	}
	if err := os.Rename(half, dir); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return nil // or a process that was about to end was quicker, with the same result
}

// worked is how long the processors have worked for a command that has ended.
func worked(command *exec.Cmd) time.Duration {
	if command.ProcessState == nil {
		return 0
	}
	return command.ProcessState.UserTime() + command.ProcessState.SystemTime()
}

// publish takes the folder from the user who filled it, lets everybody read it, and has it on the disk before it gets its name.
func publish(dir string) error {
	return filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		mode := os.FileMode(0o444)
		switch {
		case entry.IsDir():
			mode = 0o755
		case !entry.Type().IsRegular():
			return fmt.Errorf("%s: %v among machine code", path, entry.Type())
		}
		if err := os.Lchown(path, os.Getuid(), os.Getgid()); err != nil {
			return err
		}
		if err := os.Chmod(path, mode); err != nil {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		return errors.Join(f.Sync(), f.Close())
	})
}

// weigh adds up the files below a folder.
func weigh(dir string) (int64, error) {
	var bytes int64
	err := filepath.WalkDir(dir, func(_ string, entry os.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		found, err := entry.Info()
		if err == nil {
			bytes += found.Size()
		}
		return err
	})
	return bytes, err
}

// prune removes all but the newest. A runner that holds one keeps it; one that is started again compiles it again.
func (c *cache) prune(newest string) error {
	entries, err := os.ReadDir(c.dir)
	if err != nil {
		return err
	}
	type aged struct {
		path string
		used time.Time
	}
	var all []aged
	for _, entry := range entries {
		found, err := entry.Info()
		path := filepath.Join(c.dir, entry.Name())
		if err == nil && path != newest && !strings.HasPrefix(entry.Name(), unfinished) {
			all = append(all, aged{path, found.ModTime()})
		}
	}
	slices.SortFunc(all, func(a, b aged) int { return cmp.Or(b.used.Compare(a.used), strings.Compare(a.path, b.path)) })
	for _, old := range all[min(len(all), keptModules-1):] {
		if err := os.RemoveAll(old.path); err != nil {
			return err
		}
	}
	return nil
}

// wazeroVersion is the version in this binary, with the architecture its machine code is for.
func wazeroVersion() string {
	version := "dev"
	if build, ok := debug.ReadBuildInfo(); ok {
		for _, module := range build.Deps {
			if module.Path == "github.com/tetratelabs/wazero" {
				version = module.Version
			}
		}
	}
	return version + "-" + runtime.GOARCH
}

// static says no to a binary that needs a dynamic linker: there is none in a guest's root.
func static(program string) error {
	file, err := elf.Open(program)
	if err != nil {
		var format *elf.FormatError
		if errors.As(err, &format) {
			return nil // not Linux, which is said elsewhere
		}
		return err
	}
	defer func() { _ = file.Close() }() // only read
	for _, part := range file.Progs {
		if part.Type == elf.PT_INTERP {
			return fmt.Errorf("%s is linked dynamically; want a static binary, as CGO_ENABLED=0 builds it", program)
		}
	}
	return nil
}
