// Command kmo-verify-keyless verifies one sigstore bundle, offline. It is a program and a module of its own, so that what it takes to read
// certificates, timestamps and log entries is not in the agent.
//
// It reads a Request as JSON from its standard input and writes an Answer as JSON to its standard output. Exit statuses: 0 the bundle is
// good, 1 the request cannot be read, 3 the bundle is refused, and the answer says why.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
)

const maxRequest = 8 << 20 // bytes

func main() {
	if len(os.Args) > 1 {
		fmt.Fprintln(os.Stderr, "kmo-verify-keyless: takes no arguments: a request as JSON on its standard input")
		os.Exit(2)
	}
	os.Exit(run(os.Stdin, os.Stdout, os.Stderr))
}

func run(in io.Reader, out, complaints io.Writer) int {
	request, err := read(in)
	if err != nil {
		_, _ = fmt.Fprintln(complaints, "kmo-verify-keyless:", err)
		return 1
	}
	answer, err := Verify(request)
	status := 0
	if err != nil {
		answer, status = Answer{Refused: err.Error()}, 3
	}
	if err := json.NewEncoder(out).Encode(answer); err != nil {
		_, _ = fmt.Fprintln(complaints, "kmo-verify-keyless:", err)
		return 1
	}
	return status
}

// read decodes one request, with nothing unknown in it and nothing after it.
func read(in io.Reader) (Request, error) {
	var r Request
	text, err := io.ReadAll(io.LimitReader(in, maxRequest+1))
	if err != nil {
		return r, err
	}
	if len(text) > maxRequest {
		return r, fmt.Errorf("the request has more than %d bytes", maxRequest)
	}
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&r); err != nil {
		return r, fmt.Errorf("the request: %w", err)
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return r, errors.New("there is something after the request")
	}
	return r, nil
}
