package process

import (
	"context"
	"errors"
	"sync"
	"syscall"
	"testing"

	"github.com/kindos/kmo/backends"
)

// A start asks for the plan once, hooks and all, with ports that are final; Exec asks for none.
func TestPlannedOnce(t *testing.T) {
	var mu sync.Mutex
	asked := 0
	o := options(t.TempDir())
	o.Plan = func(ctx context.Context, w backends.Workload, _ Place) (Program, error) {
		mu.Lock()
		defer mu.Unlock()
		asked++
		if w.Run.Ports[0].Port == 0 {
			t.Error("asked for a plan without ports")
		}
		return plan(ctx, w, Place{})
	}
	count := func() int {
		mu.Lock()
		defer mu.Unlock()
		return asked
	}
	k, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	defer sweep(t, k)
	w := workload("planned", "wait")
	w.Run.Ports = []backends.Port{{Name: "http"}}
	w.Hooks = backends.Hooks{PreInit: [][]string{{"/app", "id"}, {"/app", "id"}}, PostInit: [][]string{{"/app", "id"}}}
	apply(t, k, w)
	apply(t, k, w)
	if _, _, err := k.Exec(t.Context(), w.Name, []string{"/app", "id"}); err != nil {
		t.Error(err)
	}
	if n := count(); n != 1 {
		t.Errorf("asked %d times, want once", n)
	}
	if err := syscall.Kill(status(t, k, w.Name).PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	until(t, "a restart", func() (string, bool) {
		s := status(t, k, w.Name)
		return s.Detail, s.State == backends.Running && s.Restarts == 1
	})
	if n := count(); n != 2 {
		t.Errorf("asked %d times after a restart, want twice", n)
	}
}

// What cannot be planned changes nothing: what ran, runs, and what is new is not there.
func TestPlanRefuses(t *testing.T) {
	k := fresh(t)
	w := workload("kept", "wait")
	apply(t, k, w)
	before := status(t, k, w.Name)
	lacking := &backends.FeatureError{Backend: "probe", Feature: "floppy"}
	k.options.Plan = func(ctx context.Context, w backends.Workload, _ Place) (Program, error) {
		if err := ctx.Err(); err != nil {
			t.Errorf("the plan's context: %v", err)
		}
		return Program{}, lacking
	}
	again := w
	again.Image.Content = "/another"
	for _, bad := range []backends.Workload{again, workload("new", "wait")} {
		var got *backends.FeatureError
		if err := k.Apply(t.Context(), bad); !errors.As(err, &got) || got != lacking {
			t.Errorf("%s: got %v, want the plan's refusal", bad.Name, err)
		}
	}
	if list, err := k.Observe(t.Context()); err != nil || len(list) != 1 || list[0].PID != before.PID || list[0].State != backends.Running {
		t.Errorf("it is %+v, %v; was %+v", list, err, before)
	}
}
