// Runner is what cmd/kmo is to the wasm backend: it runs guests and stages, and as "apply STATE WORKLOAD.json" it is a
// plugin that applies one workload, tells its process, and stays.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/process"
	"github.com/kindos/kmo/backends/wasm"
)

func main() {
	if len(os.Args) < 2 {
		os.Exit(64)
	}
	switch os.Args[1] {
	case wasm.GuestArg:
		os.Exit(wasm.Guest(os.Args[2:]))
	case process.StageArg:
		process.Stage()
	case "apply":
		if err := apply(os.Args[2], os.Args[3]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
}

func apply(state, path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var w backends.Workload
	if err := json.Unmarshal(text, &w); err != nil {
		return err
	}
	b, err := wasm.Open(wasm.Options{State: state})
	if err != nil {
		return err
	}
	if err := b.Apply(context.Background(), w); err != nil {
		return err
	}
	list, err := b.Observe(context.Background())
	if err != nil {
		return err
	}
	fmt.Println("applied", list[0].PID)
	select {}
}
