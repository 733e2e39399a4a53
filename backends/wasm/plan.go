package wasm

import (
	"cmp"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	"github.com/kindos/kmo/backends"
)

// What a runner is told by its arguments and its environment.
const (
	runArg, hookArg, compileArg, fencedArg = "run", "hook", "compile", "compile-fenced"

	planVariable   = "KMO_PLAN"   // of the runner: a plan as JSON
	memoryVariable = "KMO_MEMORY" // of the record: bytes of linear memory
)

// What a runner's exit status says that a guest's does not.
const (
	statusRunner = 70  // the runner could not run it
	statusTrap   = 134 // as a program that aborts
	statusMemory = 247 // it ended after it was refused memory
)

// maxPlan is below what the kernel takes as one string of an environment, 128 KiB.
const maxPlan = 120 << 10

// plan is what a runner does. It travels in the runner's environment, which only its own user and root can read.
type plan struct {
	Module, Code string            // the module, and the folder of its machine code
	Sum          string            // of the machine code
	Root         string            // the folder that is "/" to the guest; "" is none
	Memory       uint64            // bytes; 0 is not bounded
	Env          map[string]string // the guest's
	Listen       []listener
	Announce     bool // to the keeper, that the guest begins
}

// listener is a socket to be opened for the guest.
type listener struct {
	Public bool // on every address; otherwise on the loopback
	Port   int
}

// fill reads the rest of a plan from what Backend.inner made of a workload.
func (p *plan) fill(w backends.Workload) error {
	for i, port := range w.Run.Ports {
		variable := port.Variable()
		inside, public := w.Run.Env[variable]
		if public {
			p.Env[variable] = inside
		}
		p.Env[fdVariable(port)] = strconv.Itoa(p.firstSocket() + i)
		p.Listen = append(p.Listen, listener{public, port.Port})
	}
	if text, ok := w.Run.Env[memoryVariable]; ok {
		var err error
		if p.Memory, err = strconv.ParseUint(text, 10, 64); err != nil {
			return fmt.Errorf("reading the record's %s: %v", memoryVariable, err)
		}
		delete(p.Env, memoryVariable)
	}
	// WASI has no current folder; this is where Go and Rust look for one.
	p.Env["PWD"] = cmp.Or(w.Run.Dir, w.Image.Config.Dir, "/")
	return nil
}

// firstSocket is the first port's descriptor: the tree, if there is one, is 3.
func (p *plan) firstSocket() int {
	if p.Root == "" {
		return 3
	}
	return 4
}

func (p plan) encode() (string, error) {
	text, err := json.Marshal(p)
	if err == nil && len(text) > maxPlan {
		err = &moduleError{fmt.Sprintf("its environment has %d bytes, want at most %d", len(text), maxPlan)}
	}
	return string(text), err
}

// fdVariable tells a guest the descriptor of a port's listener.
func fdVariable(port backends.Port) string {
	return "KMO_FD_" + strings.TrimPrefix(port.Variable(), "KMO_PORT_")
}
