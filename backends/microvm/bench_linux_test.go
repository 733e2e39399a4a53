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
			end := bare(b)
			started += time.Since(begun)
			begun = time.Now()
			end()
			stopped += time.Since(begun)
		}
		b.ReportMetric(started.Seconds()/float64(b.N), "start-s/op")
		b.ReportMetric(stopped.Seconds()/float64(b.N), "stop-s/op")
	})
}

// bare boots by QEMU's command line alone, and returns what ends it.
func bare(b *testing.B) (end func()) {
	b.Helper()
	t := find(options(b.TempDir()))
	cache, err := boot.Open(ground.cache)
	if err != nil {
		b.Fatal(err)
	}
	guest, err := t.guest()
	if err != nil {
		b.Fatal(err)
	}
	made, err := cache.Boot(b.Context(), ground.kernel, guest, t.modules())
	if err != nil {
		b.Fatal(err)
	}
	base, err := cache.Base(b.Context(), ground.image, workload("relay").Image.ContentRoot.Hex())
	if err != nil {
		b.Fatal(err)
	}
	dir := b.TempDir()
	b.Chdir(dir)
	q := &machine.QEMU{Program: t.vmm, KVM: t.kvm}
	c := machine.Config{Dir: dir, Kernel: made.Kernel, Initrd: made.Initrd, Disk: base, CPUs: 1, Memory: (64<<20 + guestCost) >> 20, Command: kernelCommand}
	ctx := context.Background()
	if err := q.Create(ctx, c); err != nil {
		b.Fatal(err)
	}
	if err := q.Start(ctx); err != nil {
		b.Fatal(err)
	}
	stream, err := q.Connect(ctx)
	if err != nil {
		b.Fatal(err)
	}
	conn := channel.Open(stream, channel.MaxToHost)
	wait := func(want channel.Kind) {
		b.Helper()
		for {
			f, err := conn.Receive()
			if err != nil || f.Kind == channel.Fault {
				b.Fatalf("%c: %s %v", f.Kind, f.Body, err)
			}
			if f.Kind == want {
				return
			}
		}
	}
	wait(channel.Hello)
	root := &stage.Root{Scratch: channel.Scratch, Hostname: "bare", Content: channel.Base, Owner: 65532}
	orders := stage.Orders{Argv: []string{"/app", "wait"}, Dir: "/", Root: root, Confine: stage.Confine{User: 65532, Execute: []string{"/"}}}
	if err := conn.Say(channel.Build, 0, channel.Setup{Stage: orders, Disk: "/dev/vda", Address: machine.GuestAddress, Gateway: machine.Gateway}); err != nil {
		b.Fatal(err)
	}
	wait(channel.Built)
	if err := conn.Send(channel.Run, 0, nil); err != nil {
		b.Fatal(err)
	}
	wait(channel.Started)
	return func() {
		if err := conn.Send(channel.Signal, 0, []byte{15}); err != nil {
			b.Fatal(err)
		}
		wait(channel.Ended)
		q.Stop()
	}
}
