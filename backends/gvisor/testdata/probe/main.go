// Probe looks at a sandbox from within. Its arguments are one step:
//
//	get ADDRESS        "got" and what was answered there, or the error
//	resolve NAME       "resolved" and its addresses, or the error
//	answer PATH TEXT   maps a file of one page that is there, waits until it begins with TEXT, and writes "heard" after it
//	threads N          "threads N", or where it ended: processes of one thread, as many as that
package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"time"
)

func main() {
	said, err := run(os.Args[1:])
	if err != nil {
		said = "error: " + err.Error()
	}
	fmt.Println(said)
	time.Sleep(time.Hour)
}

func run(step []string) (string, error) {
	switch step[0] {
	case "get":
		conn, err := net.DialTimeout("tcp", step[1], 10*time.Second)
		if err != nil {
			return "", err
		}
		text, err := io.ReadAll(conn)
		return "got " + string(text), err
	case "resolve":
		addresses, err := net.LookupHost(step[1])
		return fmt.Sprint("resolved ", addresses), err
	case "answer":
		return answer(step[1], step[2])
	case "threads":
		n, err := strconv.Atoi(step[1])
		for i := 0; i < n && err == nil; i++ {
			if err = exec.Command(os.Args[0], "get", "127.0.0.1:1").Start(); err != nil {
				return fmt.Sprint("threads ", i), nil
			}
		}
		return fmt.Sprint("threads ", n), err
	}
	return "", fmt.Errorf("unknown step %q", step[0])
}

func answer(path, text string) (string, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	page, err := syscall.Mmap(int(f.Fd()), 0, 4096, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
	if err != nil {
		return "", err
	}
	fmt.Println("mapped")
	for !bytes.HasPrefix(page, []byte(text)) {
		time.Sleep(time.Millisecond)
	}
	copy(page[len(text):], "heard")
	return "heard", nil
}
