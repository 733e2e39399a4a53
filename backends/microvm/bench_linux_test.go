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
	t := find(options(b.TempDir()))
	guest, err := t.guest()
	if err != nil {
		b.Fatal(err)
	}
	cache, err := boot.Open(ground.cache)
	if err != nil {
		b.Fatal(err)
	}
	made, err := cache.Boot(b.Context(), ground.kernel, guest, t.modules())
	if err != nil {
		b.Fatal(err)
	}
	base, err := cache.Base(b.Context(), image.Content, image.ContentRoot.Hex())
	if err != nil {
		b.Fatal(err)
	}
	config := machine.Config{Kernel: made.Kernel, Initrd: made.Initrd, Disk: base, CPUs: 1, Memory: (128<<20 + guestCost) >> 20, Command: kernelCommand}
	dir, program := b.TempDir(), conformance.Beside(b, t.vmm)
	var all sync.Map
	return &conformance.Rival{
		Name: "qemu",
		Start: func(name string) error {
			m := &bare{vmm: &machine.QEMU{Program: program, KVM: t.kvm}}
			all.Store(name, m)
			config := config
			config.Dir = filepath.Join(dir, name)
			return errors.Join(os.MkdirAll(config.Dir, 0o700), m.start(config))
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

// bare is a machine with no monitor.
type bare struct {
	vmm  *machine.QEMU
	conn *channel.Conn
}

func (m *bare) start(c machine.Config) error {
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
	m.conn = channel.Open(stream, channel.MaxToHost)
	root := &stage.Root{Scratch: channel.Scratch, Hostname: "bare", Content: channel.Base, Owner: 65532}
	orders := stage.Orders{Argv: []string{"/app", "wait"}, Dir: "/", Root: root, Confine: stage.Confine{User: 65532, Execute: []string{"/"}}}
	setup := channel.Setup{Stage: orders, Disk: "/dev/vda", Address: machine.GuestAddress, Gateway: machine.Gateway}
	for _, step := range []func() error{
		func() error { return m.wait(channel.Hello, "") },
		func() error { return m.conn.Say(channel.Build, 0, setup) },
		func() error { return m.wait(channel.Built, "") },
		func() error { return m.conn.Send(channel.Run, 0, nil) },
		func() error { return m.wait(channel.Output, "waiting") },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// wait is for a frame with a text in it.
func (m *bare) wait(want channel.Kind, text string) error {
	for {
		f, err := m.conn.Receive()
		if err != nil || f.Kind == channel.Fault {
			return fmt.Errorf("waiting for %c: %s %v", want, f.Body, err)
		}
		if f.Kind == want && bytes.Contains(f.Body, []byte(text)) {
			return nil
		}
	}
}

func (m *bare) stop() error {
	defer m.vmm.Stop()
	if m.conn == nil {
		return nil
	}
	return errors.Join(m.conn.Send(channel.Signal, 0, []byte{15}), m.wait(channel.Ended, ""))
}
