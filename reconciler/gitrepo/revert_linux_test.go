package gitrepo

import (
	"context"
	"testing"
	"time"
)

// What a hook starts may leave its process group and hold the service's output: it outlives the service, and the push does not wait for it.
func TestRevertByASilentHook(t *testing.T) {
	for hook, took := range map[string]bool{"pre-receive": false, "post-receive": true} {
		t.Run(hook, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			good, bad := w.commit("a", "1"), w.commit("a", "2")
			w.hook(hook, "setsid sleep 60 >/proc/$PPID/fd/1 2>/dev/null </dev/null & echo $! >pid; exec sleep 60")
			r := w.open(func(r *Repository) { r.Limits.Idle = 3 * time.Second })
			begun := time.Now()
			c, err := r.Revert(context.Background(), plea(good, bad))
			if long := time.Since(begun); long > 30*time.Second {
				t.Errorf("the push took %v, want about %v", long, r.Limits.Idle)
			}
			if at := w.run(w.bare, "git", "rev-parse", "main"); (err == nil) != took || took != (at == c.ID) {
				t.Errorf("%s, %v, and the branch is at %s; want that it took effect: %v", c.ID, err, at, took)
			}
			w.run(w.bare, "sh", "-c", "kill $(cat pid)")
		})
	}
}
