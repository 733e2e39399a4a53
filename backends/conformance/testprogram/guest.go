//go:build !wasip1

package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
)

func listen(port string) (net.Listener, error) { return net.Listen("tcp", ":"+port) }

// share writes through a mapping that others share.
func share(path, text string) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o666)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(4096); err != nil {
		return err
	}
	page, err := syscall.Mmap(int(f.Fd()), 0, 4096, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
	if err != nil {
		return err
	}
	copy(page, text)
	return syscall.Munmap(page)
}

func fork(n int) {
	self, err := os.Executable()
	for i := range n {
		if err == nil {
			err = exec.Command(self, "wait").Start()
		}
		if err != nil {
			fmt.Printf("fork: %d of %d: %v\n", i, n, err)
			return
		}
	}
	fmt.Println("forked", n)
}

// wait returns never: when the program is told to stop, it says so and ends.
func wait() {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	fmt.Println("waiting") // not before it would hear the signal
	<-stop
	fmt.Println("stopped")
	os.Exit(0)
}
