package microvm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/conformance"
	"github.com/kindos/kmo/backends/microvm/boot"
	"github.com/kindos/kmo/backends/microvm/channel"
	"github.com/kindos/kmo/backends/microvm/machine"
	"github.com/kindos/kmo/backends/process/stage"
	"github.com/kindos/kmo/registry/merkle"
)

// Benchmark is beside QEMU's bare command line, which boots the same and builds the same root.
func Benchmark(b *testing.B) {
	backend, _ := begin(b)
	image := backends.Image{Content: ground.image, ContentRoot: merkle.Digest{1}}
	conformance.Bench(b, conformance.Race{Backend: backend, Format: backends.OCI, Image: image, Many: 10, Rival: byHand(b, image)})
}

func byHand(b *testing.B, image backends.Image) *conformance.Rival {
	b.Helper()
	t, config := bareConfig(b, image)
	config.User = 0 // which puts itself beside the workloads
	dir, program := b.TempDir(), conformance.Beside(b, t.vmm)
	var all sync.Map
	return &conformance.Rival{
		Name: "qemu",
		Start: func(name string) error {
			m := &bare{vmm: &machine.QEMU{Program: program, KVM: t.kvm}}
			all.Store(name, m)
			config := config
			config.Dir = filepath.Join(dir, name)
			if err := errors.Join(os.MkdirAll(config.Dir, 0o700), m.start(config)); err != nil {
				return err
			}
			_, err := m.wait(channel.Output, 0, "waiting")
			return err
		},
		Stop: func(name string) error {
			found, _ := all.LoadAndDelete(name)
			m, ok := found.(*bare)
			if !ok {
				return nil
			}
			return m.stop()
		},
	}
}

// bareConfig is of a machine that boots an image as a workload's does, but for its Dir.
func bareConfig(tb testing.TB, image backends.Image) (tools, machine.Config) {
	tb.Helper()
	t := find(options(tb.TempDir()))
	guest, err := t.guest()
	if err != nil {
		tb.Fatal(err)
	}
	cache, err := boot.Open(ground.cache)
	if err != nil {
		tb.Fatal(err)
	}
	made, err := cache.Boot(tb.Context(), ground.kernel, guest, t.modules())
	if err != nil {
		tb.Fatal(err)
	}
	base, err := cache.Base(tb.Context(), image.Content, image.ContentRoot.Hex())
	if err != nil {
		tb.Fatal(err)
	}
	return t, machine.Config{
		Kernel: made.Kernel, Initrd: made.Initrd, Disk: base, CPUs: 1, Memory: (128<<20 + guestCost) >> 20, Command: kernelCommand, User: vmmUser(workload("bare")),
	}
}

// bare is a machine with no monitor.
type bare struct {
	*channel.Conn
	vmm *machine.QEMU
}

// start boots it and has a program wait in it, which may be changed.
func (m *bare) start(c machine.Config, changes ...func(*stage.Orders)) error {
	ctx := context.Background()
	if err := m.vmm.Create(ctx, c); err != nil {
		return err
	}
	if err := m.vmm.Start(ctx); err != nil {
		return err
	}
	stream, err := m.vmm.Connect(ctx)
	if err != nil {
		return err
	}
	m.Conn = channel.Open(stream, channel.MaxToHost)
	root := &stage.Root{Scratch: channel.Scratch, Hostname: "bare", Content: channel.Base, Owner: 65532}
	orders := stage.Orders{Argv: []string{"/app", "wait"}, Dir: "/", Root: root, Confine: stage.Confine{User: 65532, Execute: []string{"/"}}}
	for _, change := range changes {
		change(&orders)
	}
	setup := channel.Setup{Stage: orders, Disk: "/dev/vda", Address: machine.GuestAddress, Gateway: machine.Gateway}
	if _, err = m.wait(channel.Hello, 0, ""); err != nil {
		return err
	}
	if err := m.Say(channel.Build, 0, setup); err != nil {
		return err
	}
	if _, err = m.wait(channel.Built, 0, ""); err != nil {
		return err
	}
	return m.Send(channel.Run, 0, nil)
}

// wait is for a word about the program or a command with a text in it, and returns what that has written until then.
func (m *bare) wait(want channel.Kind, id uint32, text string) (output string, err error) {
	for {
		f, err := m.Receive()
		if err != nil || f.Kind == channel.Fault && want != f.Kind {
			return output, fmt.Errorf("waiting for %c: %s %v", want, f.Body, err)
		}
		if f.ID == id && f.Kind == channel.Output {
			output += string(f.Body)
		}
		if f.ID == id && f.Kind == want && bytes.Contains(f.Body, []byte(text)) {
			return output, nil
		}
	}
}

func (m *bare) stop() error {
	defer m.vmm.Stop()
	if m.Conn == nil {
		return nil
	}
	err := m.Send(channel.Signal, 0, []byte{15})
	if err == nil {
		_, err = m.wait(channel.Ended, 0, "")
	}
	return err
}
