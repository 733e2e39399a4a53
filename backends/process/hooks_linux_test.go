package process

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/kindos/kmo/backends"
)

// A hook that does not end is the workload's own fault, whichever moment it is for.
func TestHookTime(t *testing.T) {
	for moment, hooks := range map[string]backends.Hooks{
		"preInit": {PreInit: [][]string{{"/app", "wait hook-mark"}}}, "postInit": {PostInit: [][]string{{"/app", "wait hook-mark"}}},
	} {
		t.Run(moment, func(t *testing.T) {
			k := fresh(t)
			k.hookTime = 300 * time.Millisecond
			w := workload("hooked", "wait")
			w.Hooks = hooks
			err := k.Apply(t.Context(), w)
			var fault *backends.StartError
			if !errors.As(err, &fault) || !strings.HasPrefix(fault.Stage, moment) || fault.Cause != "has not ended within 300ms" {
				t.Errorf("got %v, want a *StartError of the hook", err)
			}
			until(t, "the hook's end", func() (string, bool) { return "", len(processes("hook-mark")) == 0 })
		})
	}
}

// What a keeper ran beside a program when it was killed has ended, children and all, once the next one is there. The program goes on.
func TestCommandsOfTheDead(t *testing.T) {
	state := t.TempDir()
	kill := other(t, state, "", "asked", "wait program-mark")
	until(t, "the command and its child", func() (string, bool) { return "", len(processes("asked-mark")) == 2 })
	kill()
	k := start(t, state)
	defer sweep(t, k)
	until(t, "the end of both", func() (string, bool) { return fmt.Sprint(processes("asked-mark")), len(processes("asked-mark")) == 0 })
	if noted, _ := filepath.Glob(filepath.Join(state, "work", "*", commandFile+"*")); len(noted) > 0 {
		t.Errorf("still noted: %q", noted)
	}
	if pids := processes("program-mark"); len(pids) != 1 {
		t.Errorf("the program's processes are %v, want one", pids)
	}
	if _, _, err := k.Exec(t.Context(), workload("asked").Name, []string{"/app", "id"}); err != nil {
		t.Error(err)
	}
	if noted, _ := filepath.Glob(filepath.Join(state, "work", "*", commandFile+"*")); len(noted) > 0 {
		t.Errorf("noted of what has ended: %q", noted)
	}
}

// Remove does not wait for a hook that hangs while the keeper starts the program again.
func TestRemoveEndsARestart(t *testing.T) {
	k := fresh(t)
	k.hookTime = time.Hour
	gate := t.TempDir()
	if err := errors.Join(os.Chmod(gate, 0o777), os.WriteFile(filepath.Join(gate, "open"), nil, 0o666)); err != nil {
		t.Fatal(err)
	}
	w := workload("hanging", "wait")
	w.Mounts = []backends.Mount{{From: gate, To: "/gate", ReadOnly: true}}
	w.Hooks.PreInit = [][]string{{"/app", "hang /gate/open hang-mark"}} // while that is not there
	apply(t, k, w)
	if err := os.Remove(filepath.Join(gate, "open")); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(status(t, k, w.Name).PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	until(t, "the hook that hangs", func() (string, bool) { return "", len(processes("hang-mark")) > 0 })
	began := time.Now()
	if err := k.Remove(t.Context(), w.Name); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("removing took %v", took)
	}
}

// Apply and Remove of one workload at once end with the workload or without it, and with nothing half.
func TestApplyBesideRemove(t *testing.T) {
	k := fresh(t)
	w := workload("torn", "wait torn-mark")
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for range 3 {
				if err := k.Apply(t.Context(), w); err != nil {
					t.Errorf("apply: %v", err)
				}
			}
		})
		all.Go(func() {
			for range 3 {
				if err := k.Remove(t.Context(), w.Name); err != nil {
					t.Errorf("remove: %v", err)
				}
			}
		})
	}
	all.Wait()
	apply(t, k, w)
	if s := status(t, k, w.Name); s.State != backends.Running || s.Detail != "" || len(processes("torn-mark")) != 1 {
		t.Errorf("it is %+v, with processes %v", s, processes("torn-mark"))
	}
}
