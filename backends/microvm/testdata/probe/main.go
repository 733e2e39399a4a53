// Probe looks at a machine from within. Its arguments are one step:
//
//	count FOLDER       how many names are in it
//	get ADDRESS        "got" and what was answered there, or the error
//	resolve NAME       "resolved" and its addresses, or the error
package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"time"
)

func main() {
	said, err := run(os.Args[1], os.Args[2])
	if err != nil {
		said = "error: " + err.Error()
	}
	fmt.Println(said)
}

func run(step, what string) (string, error) {
	switch step {
	case "count":
		list, err := os.ReadDir(what)
		return fmt.Sprint(len(list)), err
	case "get":
		conn, err := net.DialTimeout("tcp", what, 3*time.Second)
		if err != nil {
			return "", err
		}
		if err := conn.SetDeadline(time.Now().Add(3 * time.Second)); err != nil {
			return "", err
		}
		text, err := io.ReadAll(conn)
		return "got " + string(text), err
	case "resolve":
		addresses, err := net.LookupHost(what)
		return fmt.Sprint("resolved ", addresses), err
	}
	return "", fmt.Errorf("unknown step %q", step)
}
