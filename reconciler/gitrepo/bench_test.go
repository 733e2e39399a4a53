package gitrepo

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// BenchmarkPushToHead is from the return of git push to the new commit, promoted and synced, in a local repository.
func BenchmarkPushToHead(b *testing.B) {
	w := newWorld(b)
	w.commit("a", "0")
	r := w.open()
	head(b, r)
	b.ResetTimer()
	for i := range b.N {
		b.StopTimer()
		want := w.commit("units/relay/unit.yaml", fmt.Sprint(i))
		b.StartTimer()
		if got := head(b, r); got != want {
			b.Fatalf("head is %s, want %s", got, want)
		}
	}
}

// BenchmarkPushToNotice is from the return of git push to the notice of Watch; less than nothing if the notice was first.
func BenchmarkPushToNotice(b *testing.B) {
	w := newWorld(b)
	w.commit("a", "0")
	r := w.open()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	notices := r.Watch(ctx)
	var total time.Duration
	for i := range b.N {
		for len(notices) > 0 {
			<-notices
		}
		at := make(chan time.Time, 1)
		go func() { <-notices; at <- time.Now() }()
		w.write("a", fmt.Sprint("n", i))
		w.run(w.work, "git", "commit", "-qam", "change")
		w.run(w.work, "git", "push", "-q", "origin", "HEAD:main")
		pushed := time.Now()
		total += (<-at).Sub(pushed)
	}
	b.ReportMetric(float64(total.Microseconds())/float64(b.N), "µs/notice")
}

func BenchmarkHeadUnchanged(b *testing.B) {
	w := newWorld(b)
	w.commit("a", "0")
	r := w.open()
	head(b, r)
	b.ReportAllocs()
	b.ResetTimer()
	for range b.N {
		head(b, r)
	}
}

// large is a repository of 20,000 files in 200 folders.
func large(b *testing.B) *world {
	w := newWorld(b)
	for i := range 20_000 {
		dir := filepath.Join(w.work, "units", fmt.Sprintf("u%03d", i%200))
		if i < 200 {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				b.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("f%05d.yaml", i)), fmt.Appendf(nil, "unit: u%d\nvalue: %d\n", i, i*7919), 0o644); err != nil {
			b.Fatal(err)
		}
	}
	w.commit()
	return w
}

func BenchmarkLarge(b *testing.B) {
	w := large(b)
	b.Run("clone-loose", func(b *testing.B) {
		for range b.N {
			head(b, w.open())
		}
	})
	w.run(w.bare, "git", "gc", "-q")
	b.Run("clone-packed", func(b *testing.B) {
		for range b.N {
			head(b, w.open())
		}
	})
	web := w.serveHTTP("", "")
	b.Run("clone-http", func(b *testing.B) {
		for range b.N {
			head(b, w.open(func(r *Repository) { r.Remote = web.URL + "/site.git" }))
		}
	})
	for name, r := range map[string]*Repository{"incremental-path": w.open(), "incremental-http": w.open(func(r *Repository) { r.Remote = web.URL + "/site.git" })} {
		head(b, r)
		b.Run(name, func(b *testing.B) {
			for i := range b.N {
				b.StopTimer()
				w.commit("units/u007/f00007.yaml", fmt.Sprint(name, i, time.Now()))
				b.StartTimer()
				head(b, r)
			}
		})
		b.Run(name+"/read-1000", func(b *testing.B) {
			for range b.N {
				c, err := r.Head(context.Background())
				if err != nil {
					b.Fatal(err)
				}
				for i := range 1000 {
					if _, err := fs.ReadFile(c.Tree, fmt.Sprintf("units/u%03d/f%05d.yaml", i%200, i)); err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}
