package main

import (
	"io"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends/microvm/channel"
)

// call calls the host by vsock.
func call() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Connect(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_HOST, Port: channel.Vsock}); err != nil {
		return nil, os.NewSyscallError("connect", closed(fd, err))
	}
	return os.NewFile(uintptr(fd), "channel"), nil
}

func closed(fd int, err error) error {
	_ = unix.Close(fd) // there is an error already
	return err
}

// publish carries connections of the host's to TCP ports of this machine's loopback.
func publish() error {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.Bind(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: channel.Publish}); err != nil {
		return closed(fd, err)
	}
	if err := unix.Listen(fd, 64); err != nil {
		return closed(fd, err)
	}
	go func() {
		for {
			conn, _, err := unix.Accept4(fd, unix.SOCK_CLOEXEC)
			if err == nil {
				go carry(conn)
			}
		}
	}()
	return nil
}

// carry reads the port's number, and carries both ways until both have ended.
func carry(fd int) {
	from := os.NewFile(uintptr(fd), "vsock")
	defer from.Close()
	line := make([]byte, 0, 8)
	for one := make([]byte, 1); len(line) < cap(line); line = append(line, one[0]) {
		if _, err := from.Read(one); err != nil {
			return
		} else if one[0] == '\n' {
			break
		}
	}
	number, err := strconv.ParseUint(string(line), 10, 16)
	if err != nil {
		return
	}
	inner, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return
	}
	to := os.NewFile(uintptr(inner), "program")
	defer to.Close()
	if unix.Connect(inner, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: int(number)}) != nil {
		return
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(to, from) // an end, however it comes
		_ = unix.Shutdown(inner, unix.SHUT_WR)
	}()
	_, _ = io.Copy(from, to)
	_ = unix.Shutdown(fd, unix.SHUT_WR)
	<-done
}
