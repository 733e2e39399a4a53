// Testprogram is the guest of the conformance suite. Each argument is one step, "verb argument …", and each step says on
// its own line what came of it, so that a test learns from the log what the workload saw:
//
//	say TEXT              TEXT, on stdout
//	warn TEXT             TEXT, on stderr
//	env                   "env NAME=value" for each variable, sorted, then "env end"
//	args                  "args" and the quoted arguments
//	dir                   "dir" and the working directory
//	id                    "id UID GID"
//	cat PATH              "cat PATH: " and the quoted content, or the error
//	mode PATH             "mode PATH: " and the permission bits in octal, or the error
//	write PATH TEXT       "write PATH: ok", or the error; folders are made
//	append PATH TEXT      "append PATH: ok", or the error
//	fill PATH BYTES       "fill PATH: ok", or the error
//	open PATH             "open PATH: ok" when it was opened to read and write, or the error
//	map PATH TEXT         "map PATH: ok", or the error: a file of one page is made and TEXT written to its shared mapping
//	listen PATH           "listening PATH", and answers "welcome" on that unix socket; goes on to the next step
//	dial PATH             "dial PATH: " and the quoted answer of that unix socket, or the error
//	eat BYTES             "ate BYTES", with every page touched
//	fork N                "forked N", or "fork: M of N: " and the error; the children wait
//	burn                  uses all the CPU there is, for ever
//	tick [PATH]           "tick N", for ever, every hundredth of a second; with PATH it is appended to that, and said by nobody
//	exit CODE             ends
//	serve NAME            "serving NAME", and answers HTTP on the port KMO_PORT_NAME until it ends; goes on to the next step
//	wait                  "waiting", until it is told to stop: then "stopped" and status 0
//
// It uses no net/http, which would make the WebAssembly build three times as large.
package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

func main() {
	for _, step := range os.Args[1:] {
		verb, rest, _ := strings.Cut(step, " ")
		run(verb, rest)
	}
}

func run(verb, rest string) {
	first, second, _ := strings.Cut(rest, " ")
	switch verb {
	case "say":
		fmt.Println(rest)
	case "warn":
		fmt.Fprintln(os.Stderr, rest)
	case "env":
		for _, pair := range slices.Sorted(slices.Values(os.Environ())) {
			fmt.Println("env", pair)
		}
		fmt.Println("env end")
	case "args":
		fmt.Printf("args %q\n", os.Args[1:])
	case "dir":
		dir, err := os.Getwd()
		if err != nil {
			dir = "error: " + err.Error()
		}
		fmt.Println("dir", dir)
	case "id":
		fmt.Println("id", os.Getuid(), os.Getgid())
	case "tick":
		tick(first)
	case "exit":
		os.Exit(number(first))
	case "eat":
		eat(number(first))
		fmt.Println("ate", first)
	case "fork":
		fork(number(first))
	case "burn":
		for {
			burn()
		}
	case "serve":
		serve(first)
	case "listen":
		welcome(first)
	case "wait":
		wait()
	default:
		file(verb, first, second)
	}
}

func file(verb, path, text string) {
	var err error
	said := "ok"
	switch verb {
	case "cat":
		var content []byte
		content, err = os.ReadFile(path)
		said = strconv.Quote(string(content))
	case "mode":
		var found os.FileInfo
		if found, err = os.Stat(path); err == nil {
			said = fmt.Sprintf("%#o", found.Mode().Perm())
		}
	case "open":
		var f *os.File
		if f, err = os.OpenFile(path, os.O_RDWR, 0); err == nil {
			err = f.Close()
		}
	case "map":
		err = share(path, text)
	case "dial":
		var answer []byte
		answer, err = dial(path)
		said = strconv.Quote(string(answer))
	case "write":
		if err = os.MkdirAll(filepath.Dir(path), 0o755); err == nil {
			err = os.WriteFile(path, []byte(text), 0o644)
		}
	case "append":
		err = add(path, []byte(text), 1)
	case "fill":
		err = add(path, make([]byte, 64<<10), number(text)/(64<<10))
	default:
		fmt.Fprintln(os.Stderr, "unknown step", verb)
		os.Exit(64)
	}
	if err != nil {
		said = "error: " + err.Error()
	}
	fmt.Printf("%s %s: %s\n", verb, path, said)
}

func tick(path string) {
	for i := 1; ; i++ {
		line := fmt.Sprintln("tick", i)
		if path == "" {
			fmt.Print(line)
		} else if err := add(path, []byte(line), 1); err != nil {
			fmt.Println("tick", path, "error:", err)
			os.Exit(66)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func add(path string, text []byte, times int) error {
	f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	for range times {
		if _, err := f.Write(text); err != nil {
			return err
		}
	}
	return f.Close()
}

func eat(bytes int) {
	const chunk = 1 << 20
	var eaten [][]byte
	for range bytes / chunk {
		piece := make([]byte, chunk)
		for i := 0; i < chunk; i += 4096 {
			piece[i] = 1
		}
		eaten = append(eaten, piece)
	}
	if len(eaten) > 0 {
		eaten[0][0] = 2 // keeps the pieces in use up to here
	}
}

func burn() {
	x := uint64(1)
	for range 1 << 20 {
		x = x*6364136223846793005 + 1442695040888963407
	}
	if x == 0 {
		fmt.Println("never")
	}
}

// welcome answers everybody on a unix socket.
func welcome(path string) {
	listener, err := net.Listen("unix", path)
	if err == nil {
		err = os.Chmod(path, 0o777) // whoever sees the door may use it
	}
	if err != nil {
		fmt.Println("listening", path, "error:", err)
		return
	}
	fmt.Println("listening", path)
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Write([]byte("welcome"))
			_ = conn.Close()
		}
	}()
}

func dial(path string) ([]byte, error) {
	conn, err := net.Dial("unix", path)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	return io.ReadAll(conn)
}

// serve answers every request with its own path and the first argument.
func serve(name string) {
	listener, err := listen(os.Getenv("KMO_PORT_" + strings.ToUpper(name)))
	if err != nil {
		fmt.Println("serving", name, "error:", err)
		os.Exit(65)
	}
	fmt.Println("serving", name)
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				fmt.Println("serving", name, "ended:", err)
				return
			}
			go answer(conn)
		}
	}()
}

func answer(conn net.Conn) {
	defer conn.Close()
	request, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		return
	}
	body := strings.TrimSpace(request) + "\n" + os.Args[1] + "\n"
	_, _ = fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", len(body), body)
	time.Sleep(10 * time.Millisecond) // a close with unread input would reset the connection before the answer is read
}

func number(text string) int {
	n, err := strconv.Atoi(text)
	if err != nil {
		fmt.Fprintln(os.Stderr, "not a number:", text)
		os.Exit(64)
	}
	return n
}
