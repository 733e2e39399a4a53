//go:build wasip1

// Web is a guest that serves HTTP on the listener it was given: "/" answers what it is, "/big" 32 MiB.
package main

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"strconv"
	"syscall"
)

func main() {
	if err := serve(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func serve() error {
	fd, err := strconv.Atoi(os.Getenv("KMO_FD_HTTP"))
	if err != nil {
		return err
	}
	// A blocking Accept would stop every other goroutine too.
	if err := syscall.SetNonblock(fd, true); err != nil {
		return err
	}
	listener, err := net.FileListener(os.NewFile(uintptr(fd), "http"))
	if err != nil {
		return err
	}
	http.HandleFunc("/big", func(w http.ResponseWriter, _ *http.Request) {
		piece := make([]byte, 1<<20)
		for range 32 {
			if _, err := w.Write(piece); err != nil {
				fmt.Println("big:", err)
				return
			}
		}
	})
	http.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, "%s %q told port %s\n", os.Args[0], os.Args[1:], os.Getenv("KMO_PORT_HTTP"))
	})
	fmt.Println("serving on descriptor", fd)
	return http.Serve(listener, nil)
}
