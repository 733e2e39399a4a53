package machine

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// QEMU makes a q35 machine, with virtio devices on PCI, user networking, and a virtio-serial port for the guest's channel. It is told what
// to do by QMP. Programs are qemu-system-<arch> and virtiofsd.
type QEMU struct {
	Program string // qemu-system-x86_64
	Sharer  string // virtiofsd; needed for shares
	KVM     bool   // otherwise the processor is emulated

	words   words
	control *os.File // QMP
	said    *bufio.Reader
	channel *os.File
	mu      sync.Mutex // guards what follows
	started []running
	stopped bool
}

// running is a program of a machine's.
type running struct {
	process *os.Process
	ended   chan struct{} // closed when it has been waited for
}

// What QEMU gets, by the numbers of its descriptors.
const (
	channelFD = 3
	controlFD = 4
	kernelFD  = 5
	initrdFD  = 6
	diskFD    = 7
	sharesFD  = 8
)

// Where the guest lies in the network that QEMU makes for it, and the way out: not 10.0.2.0/24, which may be that of QEMU's own way out.
const (
	GuestAddress = "10.0.3.15/24"
	Gateway      = "10.0.3.2"
)

// Arguments are the command line for a machine.
func (q *QEMU) Arguments(c Config) []string {
	accel, machine, command := "tcg,tb-size=64", "q35,usb=off,smbus=off,sata=off,vmport=off,hpet=off,dump-guest-core=off", "console=ttyS0 quiet panic=-1 reboot=t "+c.Command
	model := "max"
	if q.KVM {
		accel, model = "kvm", "host"
	} else {
		command += " mitigations=off no_timer_check" // it foresees nothing, and a busy host may be late with the ticks that are looked for
	}
	net := "user,id=net,ipv6=off,net=10.0.3.0/24,host=" + Gateway
	for _, f := range c.Forwards {
		net += fmt.Sprintf(",hostfwd=tcp:%s:%d-:%d", f.Address, f.Host, f.Guest)
	}
	memory := fmt.Sprintf("memory-backend-ram,id=memory,size=%dM", c.Memory)
	if c.Shares != "" {
		memory = fmt.Sprintf("memory-backend-memfd,id=memory,size=%dM,share=on", c.Memory)
	}
	args := []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-S",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-accel", accel, "-cpu", model, "-smp", fmt.Sprint(c.CPUs), "-m", fmt.Sprint(c.Memory) + "M",
		"-object", memory, "-machine", machine + ",memory-backend=memory",
		"-kernel", byFD(kernelFD), "-initrd", byFD(initrdFD), "-append", command,
		"-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
		"-chardev", fmt.Sprint("socket,id=control,fd=", controlFD), "-mon", "chardev=control,mode=control",
		"-device", "virtio-serial-pci,max_ports=2", "-chardev", fmt.Sprint("socket,id=channel,fd=", channelFD), "-device", "virtserialport,chardev=channel,name=kmo",
		"-drive", "if=none,id=base,format=raw,readonly=on,file=" + byFD(diskFD), "-device", "virtio-blk-pci,drive=base",
		"-netdev", net, "-device", "virtio-net-pci,netdev=net,romfile=",
	}
	if c.Shares != "" {
		args = append(args, "-chardev", fmt.Sprint("socket,id=shares,fd=", sharesFD), "-device", "vhost-user-fs-pci,chardev=shares,tag=kmo")
	}
	return args
}

// Create starts QEMU, and virtiofsd before it.
func (q *QEMU) Create(ctx context.Context, c Config) error {
	theirs, err := q.given(c)
	if err == nil {
		err = q.launch(command("/", q.Program, q.Arguments(c), theirs, &q.words), func(cmd *exec.Cmd) error { return begin(cmd, c, q.KVM) })
	}
	if err = errors.Join(err, closed(theirs)); err != nil {
		return err
	}
	q.said = bufio.NewReader(q.control)
	if err := q.ask(ctx, "qmp_capabilities"); err != nil {
		return fmt.Errorf("%s: %v: %s", q.Program, err, q.Stop())
	}
	return nil
}

// given is what QEMU gets, in the order of its descriptors.
func (q *QEMU) given(c Config) (theirs []*os.File, err error) {
	for _, mine := range []**os.File{&q.channel, &q.control} {
		pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
		if err != nil {
			return theirs, err
		}
		syscall.CloseOnExec(pair[0])
		syscall.CloseOnExec(pair[1])
		_ = syscall.SetNonblock(pair[0], true) // in the runtime's poller, so that Close ends a read
		*mine = os.NewFile(uintptr(pair[0]), "machine")
		theirs = append(theirs, os.NewFile(uintptr(pair[1]), "machine"))
	}
	files, err := lent(c)
	theirs = append(theirs, files...)
	if err != nil || c.Shares == "" {
		return theirs, err
	}
	shares, err := q.share(c)
	if err != nil {
		return theirs, fmt.Errorf("starting %s: %v", q.Sharer, err)
	}
	return append(theirs, shares), nil
}

// share starts virtiofsd over the folder, and returns a connection to it for QEMU. It stays root: it makes files for every user of the guest's.
func (q *QEMU) share(c Config) (*os.File, error) {
	at := &net.UnixAddr{Name: "shares.sock", Net: "unix"}
	listener, err := net.ListenUnix("unix", at)
	if err != nil {
		return nil, err
	}
	defer func() { _ = listener.Close() }() // virtiofsd has its own
	conn, err := net.DialUnix("unix", nil, at)
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close() }() // QEMU has its own
	f, err := listener.File()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	args := []string{"--fd=3", "--rlimit-nofile=0", "-o", "source=" + c.Shares}
	if err := q.launch(command(c.Dir, q.Sharer, args, []*os.File{f}, &q.words), (*exec.Cmd).Start); err != nil {
		return nil, err
	}
	return conn.File()
}

// launch starts a program that Stop ends. The end of any is the machine's.
func (q *QEMU) launch(cmd *exec.Cmd, start func(*exec.Cmd) error) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.stopped {
		return errors.New("the machine is to be stopped")
	}
	if err := start(cmd); err != nil {
		return err
	}
	one := running{cmd.Process, make(chan struct{})}
	q.started = append(q.started, one)
	go func() {
		err := cmd.Wait()
		close(one.ended)
		q.fallen(cmd.Path, err)
	}()
	return nil
}

// fallen ends the machine of which a program has ended, and says which if it did not end well and was the first.
func (q *QEMU) fallen(program string, err error) {
	q.mu.Lock()
	first := !q.stopped
	q.mu.Unlock()
	if first && err != nil {
		_, _ = fmt.Fprintf(&q.words, "%s ended: %v\n", filepath.Base(program), err) // in memory
	}
	q.Stop()
}

// Start lets the processor run.
func (q *QEMU) Start(ctx context.Context) error {
	return q.ask(ctx, "cont")
}

// Connect returns the machine's end of the virtio-serial port. What is written before the guest has opened it waits there.
func (q *QEMU) Connect(context.Context) (io.ReadWriteCloser, error) { return q.channel, nil }

// Stop kills what Create has started.
func (q *QEMU) Stop() string {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.stopped = true
	for _, one := range q.started {
		_ = one.process.Kill() // it may have ended
		<-one.ended
	}
	q.started = nil
	return q.words.String()
}

// ask runs a command of QMP. Events on the way are of no interest.
func (q *QEMU) ask(ctx context.Context, command string) error {
	defer context.AfterFunc(ctx, func() { _ = q.control.SetDeadline(time.Now()) })()
	if _, err := fmt.Fprintf(q.control, `{"execute":%q}`+"\n", command); err != nil {
		return fmt.Errorf("%s: %v", command, err)
	}
	for {
		line, err := q.said.ReadBytes('\n')
		if err != nil {
			return errors.Join(ctx.Err(), fmt.Errorf("%s: %v", command, err))
		}
		var answer struct {
			Return json.RawMessage
			Error  *struct{ Desc string }
		}
		if err := json.Unmarshal(line, &answer); err != nil {
			return fmt.Errorf("%s: %v", command, err)
		}
		switch {
		case answer.Error != nil:
			return fmt.Errorf("%s: %s", command, answer.Error.Desc)
		case answer.Return != nil:
			return nil
		}
	}
}
