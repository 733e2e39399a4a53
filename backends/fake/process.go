package fake

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/kindos/kmo/backends"
)

// Process is one run of an imaginary program: the workload's, a hook's, or an Exec's.
type Process struct {
	Workload  backends.Workload
	Argv      []string
	Env       []string // NAME=value
	Addresses []backends.Address
	Out       bytes.Buffer // what it writes; goes to the log

	backend *Backend
	x       *workload
}

// defaultPause is the pause from the end of a program to its first restart.
const defaultPause = 10 * time.Millisecond

var (
	errReadOnly = errors.New("read-only file system")
	errFull     = errors.New("no space left on device")
)

// Read reads a file: one it wrote, one that is kept, or one that the unit brings.
func (p *Process) Read(path string) ([]byte, error) {
	for _, store := range []map[string][]byte{p.x.Written, p.backend.kept[p.Workload.Unit]} {
		if content, ok := store[path]; ok {
			return content, nil
		}
	}
	if i := slices.IndexFunc(p.Workload.Files, func(f backends.File) bool { return f.To == path }); i >= 0 {
		return p.Workload.Files[i].Content, nil
	}
	return nil, fs.ErrNotExist
}

// Write writes a file, where the workload may.
func (p *Process) Write(path string, content []byte) error {
	for _, keep := range p.Workload.Overlay.Keep {
		if path == keep || strings.HasPrefix(path, keep+"/") {
			unit := p.Workload.Unit
			if p.backend.kept[unit] == nil {
				p.backend.kept[unit] = map[string][]byte{}
			}
			p.backend.kept[unit][path] = content
			return nil
		}
	}
	if p.Workload.Overlay.Size == 0 {
		return errReadOnly
	}
	total := int64(len(content))
	for other, there := range p.x.Written {
		if other != path {
			total += int64(len(there))
		}
	}
	if total > p.Workload.Overlay.Size {
		return errFull
	}
	p.x.Written[path] = content
	return nil
}

// launch is a start with its hooks. It says whether the program was started; the error is the hook's that ended badly.
func (b *Backend) launch(x *workload) (started bool, err error) {
	if err := b.hooks(x, "preInit", x.Workload.Hooks.PreInit); err != nil {
		return false, err
	}
	x.Pending = len(x.Workload.Hooks.PostInit) > 0
	b.start(x)
	return true, b.postInit(x)
}

// postInit runs the hooks that follow a start, if they have not all ended well.
func (b *Backend) postInit(x *workload) error {
	if !x.Pending {
		return nil
	}
	err := b.hooks(x, "postInit", x.Workload.Hooks.PostInit)
	switch {
	case err == nil:
		x.Pending = false
		if x.Status.State == backends.Damaged {
			x.Status.State, x.Status.Detail = backends.Running, ""
		}
	case x.Status.State == backends.Running:
		x.Status.State, x.Status.Detail = backends.Damaged, err.Error()
	}
	return err
}

// start runs the workload's program.
func (b *Backend) start(x *workload) {
	x.Status.State, x.Status.Detail, x.Status.Started, x.Again = backends.Running, "", b.now(), time.Time{}
	p := b.process(x, slices.Concat(x.Workload.Image.Config.Entrypoint, args(x.Workload)))
	code, ended := 0, false
	if b.Program != nil {
		code, ended = b.Program(p)
	}
	b.say(x, p.Out.Bytes())
	if ended {
		b.ended(x, code)
	}
}

func args(w backends.Workload) []string {
	if w.Run.Args != nil {
		return w.Run.Args
	}
	return w.Image.Config.Cmd
}

// stop tells the program to end: it is run once more, with no argv, for what it does then.
func (b *Backend) stop(x *workload) {
	if b.Program != nil && x.lives() {
		p := b.process(x, nil)
		b.Program(p)
		b.say(x, p.Out.Bytes())
	}
}

// ended is the end of the program.
func (b *Backend) ended(x *workload, code int) {
	x.Status.ExitCode = code
	b.again(x)
}

// again has the program started when a pause is over.
func (b *Backend) again(x *workload) {
	pause := b.Pause
	if pause == 0 {
		pause = defaultPause
	}
	x.Status.State = backends.Backoff
	x.Again = b.now().Add(min(pause<<min(x.Status.Restarts, 10), max(pause, 5*time.Minute)))
}

// pass does what time has brought: programs that ended are started again.
func (b *Backend) pass() error {
	for name, x := range b.workloads {
		if x.Status.State == backends.Backoff && !b.now().Before(x.Again) {
			x.Status.Restarts++
			if started, err := b.launch(x); !started {
				x.Status.Detail = err.Error()
				b.again(x)
			}
			if err := b.changed(name); err != nil {
				return err
			}
		}
	}
	return nil
}

// hooks runs the hooks of one moment, and stops at the first that ends badly. One that does not end is out of its time at once.
func (b *Backend) hooks(x *workload, moment string, hooks [][]string) error {
	for _, argv := range hooks {
		code, output, ended := b.run(x, argv)
		cause := fmt.Sprint("exit status ", code)
		if !ended {
			cause = "has not ended in its time"
		}
		if code != 0 || !ended {
			return &backends.StartError{Workload: x.Workload.Name, Stage: fmt.Sprint(moment, " ", argv), Output: string(output), Cause: cause}
		}
	}
	return nil
}

func (b *Backend) run(x *workload, argv []string) (code int, output []byte, ended bool) {
	if b.Program == nil {
		return 0, nil, true
	}
	p := b.process(x, argv)
	code, ended = b.Program(p)
	return code, p.Out.Bytes(), ended
}

func (b *Backend) process(x *workload, argv []string) *Process {
	p := &Process{Workload: x.Workload, Argv: argv, Addresses: x.Status.Addresses, backend: b, x: x}
	p.Env = slices.Clone(x.Workload.Image.Config.Env)
	for _, name := range slices.Sorted(maps.Keys(x.Workload.Run.Env)) {
		p.Env = append(p.Env, name+"="+x.Workload.Run.Env[name])
	}
	for i, port := range x.Workload.Run.Ports {
		_, number, _ := strings.Cut(x.Status.Addresses[i].Address, ":")
		p.Env = append(p.Env, port.Variable()+"="+number)
	}
	return p
}

// addresses gives every port a number of the loopback: the host's or its own, or one that follows from the workload's name.
func (b *Backend) addresses(w backends.Workload) []backends.Address {
	var all []backends.Address
	for _, port := range w.Run.Ports {
		number := cmp.Or(port.Host, port.Port)
		if number == 0 {
			h := fnv.New32a()
			io.WriteString(h, w.Name+"/"+port.Name) //nolint:errcheck // a hash takes everything
			number = 20000 + int(h.Sum32()%12000)
		}
		all = append(all, backends.Address{Port: port.Name, Address: fmt.Sprint("127.0.0.1:", number)})
	}
	return all
}

func (b *Backend) now() time.Time {
	if b.Now != nil {
		return b.Now()
	}
	return time.Now()
}

func (b *Backend) say(x *workload, text []byte) {
	if len(text) == 0 {
		return
	}
	x.Log = append(x.Log, text...)
	x.Log = x.Log[max(0, len(x.Log)-1<<20):]
	if b.more != nil {
		close(b.more)
		b.more = nil
	}
}

// follower is a log that goes on.
type follower struct {
	backend *Backend
	ctx     context.Context // it is the reader's, and ends with Close
	cancel  context.CancelFunc
	x       *workload
	rest    []byte
	at      int // bytes of the log that were taken
}

// Read waits for more until the context ends, or the workload.
func (f *follower) Read(p []byte) (int, error) {
	for len(f.rest) == 0 {
		f.backend.mu.Lock()
		if err := f.backend.pass(); err != nil {
			f.backend.mu.Unlock()
			return 0, err
		}
		if f.at < len(f.x.Log) {
			f.rest, f.at = bytes.Clone(f.x.Log[f.at:]), len(f.x.Log)
		}
		removed := f.backend.workloads[f.x.Workload.Name] != f.x
		if f.backend.more == nil {
			f.backend.more = make(chan struct{})
		}
		more := f.backend.more
		f.backend.mu.Unlock()
		if len(f.rest) > 0 {
			break
		}
		if removed {
			return 0, io.EOF
		}
		select {
		case <-more:
		case <-time.After(defaultPause): // a program may be due to start again
		case <-f.ctx.Done():
			return 0, f.ctx.Err()
		}
	}
	n := copy(p, f.rest)
	f.rest = f.rest[n:]
	return n, nil
}

// Close wakes a Read that waits.
func (f *follower) Close() error {
	f.cancel()
	return nil
}
