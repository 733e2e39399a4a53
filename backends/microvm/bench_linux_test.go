package microvm

import (
	"context"
	"testing"
	"time"

	"github.com/kindos/kmo/backends/microvm/boot"
	"github.com/kindos/kmo/backends/microvm/channel"
	"github.com/kindos/kmo/backends/microvm/machine"
	"github.com/kindos/kmo/backends/process/stage"
)

// BenchmarkStart is start to running, and stop, as a workload and as the bare command line that boots the same and builds the same root.
func BenchmarkStart(b *testing.B) {
	b.Run("kmo", func(b *testing.B) {
		backend, _ := begin(b)
		w := workload("relay", "wait")
		var started, stopped time.Duration
		for b.Loop() {
			begun := time.Now()
			if err := backend.Apply(b.Context(), w); err != nil {
				b.Fatal(err)
			}
			started += time.Since(begun)
			begun = time.Now()
			if err := backend.Remove(b.Context(), w.Name); err != nil {
				b.Fatal(err)
			}
			stopped += time.Since(begun)
		}
		b.ReportMetric(started.Seconds()/float64(b.N), "start-s/op")
		b.ReportMetric(stopped.Seconds()/float64(b.N), "stop-s/op")
	})
	b.Run("qemu", func(b *testing.B) {
		var started, stopped time.Duration
		for b.Loop() {
			begun := time.Now()
			machine := bare(b)
			started += time.Since(begun)
			begun = time.Now()
			machine.end(b)
			stopped += time.Since(begun)
		}
		b.ReportMetric(started.Seconds()/float64(b.N), "start-s/op")
		b.ReportMetric(stopped.Seconds()/float64(b.N), "stop-s/op")
	})
}

// machineAlone is a machine without a monitor.
type machineAlone struct {
	*channel.Conn
	qemu *machine.QEMU
}

// bare boots by QEMU's command line alone, in which a program waits that was changed so.
func bare(t testing.TB, changes ...func(*stage.Orders)) machineAlone {
	t.Helper()
	with := find(options(t.TempDir()))
	cache, err := boot.Open(ground.cache)
	if err != nil {
		t.Fatal(err)
	}
	guest, err := with.guest()
	if err != nil {
		t.Fatal(err)
	}
	made, err := cache.Boot(t.Context(), ground.kernel, guest, with.modules())
	if err != nil {
		t.Fatal(err)
	}
	base, err := cache.Base(t.Context(), ground.image, workload("relay").Image.ContentRoot.Hex())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	t.Chdir(dir)
	q := &machine.QEMU{Program: with.vmm, KVM: with.kvm}
	t.Cleanup(func() { q.Stop() })
	c := machine.Config{Dir: dir, Kernel: made.Kernel, Initrd: made.Initrd, Disk: base, CPUs: 1, Memory: (64<<20 + guestCost) >> 20, Command: kernelCommand, User: vmmUser(workload("bare"))}
	ctx := context.Background()
	if err := q.Create(ctx, c); err != nil {
		t.Fatal(err)
	}
	if err := q.Start(ctx); err != nil {
		t.Fatal(err)
	}
	stream, err := q.Connect(ctx)
	if err != nil {
		t.Fatal(err)
	}
	m := machineAlone{channel.Open(stream, channel.MaxToHost), q}
	m.wait(t, channel.Hello, 0)
	root := &stage.Root{Scratch: channel.Scratch, Hostname: "bare", Content: channel.Base, Owner: 65532}
	orders := stage.Orders{Argv: []string{"/app", "wait"}, Dir: "/", Root: root, Confine: stage.Confine{User: 65532, Execute: []string{"/"}}}
	for _, change := range changes {
		change(&orders)
	}
	if err := m.Say(channel.Build, 0, channel.Setup{Stage: orders, Disk: "/dev/vda", Address: machine.GuestAddress, Gateway: machine.Gateway}); err != nil {
		t.Fatal(err)
	}
	m.wait(t, channel.Built, 0)
	if err := m.Send(channel.Run, 0, nil); err != nil {
		t.Fatal(err)
	}
	m.wait(t, channel.Started, 0)
	return m
}

// wait waits for a word about the program or a command, and returns what that has written until then.
func (m machineAlone) wait(t testing.TB, want channel.Kind, id uint32) (output string) {
	t.Helper()
	for {
		f, err := m.Receive()
		if err != nil || f.Kind == channel.Fault && want != f.Kind {
			t.Fatalf("%c: %s %v", f.Kind, f.Body, err)
		}
		if f.ID == id && f.Kind == channel.Output {
			output += string(f.Body)
		}
		if f.ID == id && f.Kind == want {
			return output
		}
	}
}

func (m machineAlone) end(t testing.TB) {
	t.Helper()
	if err := m.Send(channel.Signal, 0, []byte{15}); err != nil {
		t.Fatal(err)
	}
	m.wait(t, channel.Ended, 0)
	m.qemu.Stop()
}
