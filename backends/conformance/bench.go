package conformance

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kindos/kmo/backends"
)

// Race is what Bench measures.
type Race struct {
	Backend backends.Backend
	Format  backends.Format
	Image   backends.Image // as Subject.Images has it
	Played  bool           // as Programs says
	Many    int            // workloads at once
	Rival   *Rival         // nil: none
}

// Rival is the runtime's own command line, doing with the same image what a backend does. Both are called for many names at once.
type Rival struct {
	Name  string                  // a part of the metrics' names
	Start func(name string) error // returns when the program waits
	Stop  func(name string) error // returns when nothing is left of it
}

// Bench measures a backend with the suite's program, in turn with a rival that does the same:
//
//	start    one workload, until its program waits; and its stop, until nothing is left of it
//	many     as many at once, until the last one's program waits
//	observe  one look at as many
//
// Times are medians, after a round in which images are loaded and caches made; a ratio is the backend's by the rival's. Of what is Played
// the backend says that it runs.
func Bench(b *testing.B, race Race) {
	able, err := race.Backend.Fingerprint(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	maker := bench{able: able, format: race.Format, subject: Subject{Images: map[backends.Format]backends.Image{race.Format: race.Image}}}
	ours := &lane{Race: race, unit: maker.unit("", "wait")}
	lanes := []*lane{ours}
	if race.Rival != nil {
		lanes = append(lanes, &lane{Race: race, rival: "-" + race.Rival.Name})
	}
	b.Cleanup(func() { // of what has failed
		list, _ := race.Backend.Observe(context.Background())
		for _, s := range list {
			_ = race.Backend.Remove(context.Background(), s.Name)
		}
	})
	b.Run("start", func(b *testing.B) {
		rounds(b, lanes, 1)
		report(b, lanes, "ms-start%s-p50", "start-ratio", time.Millisecond, func(l *lane) []time.Duration { return l.starts })
		report(b, lanes, "ms-stop%s-p50", "stop-ratio", time.Millisecond, func(l *lane) []time.Duration { return l.stops })
	})
	b.Run("many", func(b *testing.B) {
		rounds(b, lanes, race.Many)
		report(b, lanes, "s-all%s", "many-ratio", time.Second, func(l *lane) []time.Duration { return l.starts })
	})
	b.Run("observe", func(b *testing.B) {
		if err := ours.start(race.Many); err != nil {
			b.Fatal(err)
		}
		for b.Loop() {
			if list, err := race.Backend.Observe(b.Context()); err != nil || len(list) != race.Many {
				b.Fatalf("%d of %d workloads, %v", len(list), race.Many, err)
			}
		}
		if err := ours.stop(race.Many); err != nil {
			b.Fatal(err)
		}
	})
}

// lane is one side of a race.
type lane struct {
	Race
	unit          backends.Workload // the backend's, without a name
	rival         string            // "" for the backend
	starts, stops []time.Duration
}

func (l *lane) workload(i int) backends.Workload {
	w := l.unit
	w.Unit = fmt.Sprint("relay-", i)
	return seal(w)
}

// start returns when n programs wait.
func (l *lane) start(n int) error {
	if l.rival != "" {
		return atOnce(n, func(i int) error { return l.Rival.Start(fmt.Sprint("rival-", i)) })
	}
	if err := atOnce(n, func(i int) error { return l.Backend.Apply(context.Background(), l.workload(i)) }); err != nil {
		return err
	}
	if l.Played {
		return Await(func() (bool, error) {
			list, err := l.Backend.Observe(context.Background())
			return len(list) == n && !slices.ContainsFunc(list, func(s backends.Status) bool { return !running(s) }), err
		})
	}
	return atOnce(n, func(i int) error {
		return Await(func() (bool, error) {
			log, err := l.Backend.Logs(context.Background(), l.workload(i).Name, backends.LogOptions{})
			if err != nil {
				return false, err
			}
			defer log.Close()
			text, err := io.ReadAll(log)
			return strings.Contains(string(text), "waiting"), err
		})
	})
}

func (l *lane) stop(n int) error {
	return atOnce(n, func(i int) error {
		if l.rival != "" {
			return l.Rival.Stop(fmt.Sprint("rival-", i))
		}
		return l.Backend.Remove(context.Background(), l.workload(i).Name)
	})
}

// rounds start and stop n workloads on each side, after one round that does not count.
func rounds(b *testing.B, lanes []*lane, n int) {
	b.Helper()
	round := func(n int) {
		for _, l := range lanes {
			begun := time.Now()
			if err := l.start(n); err != nil {
				b.Fatal(errors.Join(err, l.stop(n)))
			}
			running := time.Now()
			if err := l.stop(n); err != nil {
				b.Fatal(err)
			}
			l.starts, l.stops = append(l.starts, running.Sub(begun)), append(l.stops, time.Since(running))
		}
	}
	round(1)
	for _, l := range lanes {
		l.starts, l.stops = nil, nil
	}
	for b.Loop() {
		round(n)
	}
	b.ReportMetric(0, "ns/op") // of both sides together: it is not told
}

func report(b *testing.B, lanes []*lane, metric, ratio string, unit time.Duration, times func(*lane) []time.Duration) {
	var p50 []float64
	for _, l := range lanes {
		list := slices.Sorted(slices.Values(times(l)))
		p50 = append(p50, float64(list[len(list)/2])/float64(unit))
		b.ReportMetric(p50[len(p50)-1], fmt.Sprintf(metric, l.rival))
	}
	if len(p50) == 2 {
		b.ReportMetric(p50[0]/p50[1], ratio)
	}
}

func atOnce(n int, do func(i int) error) error {
	errs := make([]error, n)
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() { errs[i] = do(i) })
	}
	all.Wait()
	return errors.Join(errs...)
}

// Await asks until it is answered true: the longer it takes, the more seldom, as asking has its cost.
func Await(ask func() (bool, error)) error {
	for begun := time.Now(); ; time.Sleep(max(time.Millisecond, time.Since(begun)/50)) {
		if ok, err := ask(); ok || err != nil {
			return err
		}
		if time.Since(begun) > 5*time.Minute {
			return errors.New("it does not run after 5 minutes")
		}
	}
}

// Beside makes a command that is the program, in a cgroup beside the workloads': on a machine with other work they have a share of the
// processor that the children of this process would not have.
func Beside(b *testing.B, program string) string {
	b.Helper()
	const script = "#!/bin/sh\nfor at in /sys/fs/cgroup/cpu/kmo /sys/fs/cgroup/kmo; do\n\t" + // version 1, version 2
		"[ ! -d $at ] || { mkdir -p $at/bench && echo $$ >$at/bench/cgroup.procs; } || exit 1\ndone\nexec %s \"$@\"\n"
	at := filepath.Join(b.TempDir(), "beside")
	if err := os.WriteFile(at, fmt.Appendf(nil, script, program), 0o755); err != nil { // to be executed
		b.Fatal(err)
	}
	b.Cleanup(func() { _, _ = os.Remove("/sys/fs/cgroup/cpu/kmo/bench"), os.Remove("/sys/fs/cgroup/kmo/bench") })
	return at
}

// Foreground is a rival whose command writes what the program writes, and ends with it.
func Foreground(name string, command func(name string) (*exec.Cmd, error), stop func(name string, started *exec.Cmd) error) *Rival {
	var all sync.Map // the commands that run, by name
	return &Rival{
		Name: name,
		Start: func(name string) error {
			cmd, err := command(name)
			if err != nil {
				return err
			}
			said, err := cmd.StdoutPipe()
			if err = errors.Join(err, cmd.Start()); err != nil {
				return err
			}
			all.Store(name, cmd)
			if line, err := bufio.NewReader(said).ReadString('\n'); strings.TrimSpace(line) != "waiting" {
				return fmt.Errorf("%s: %q, %v", cmd, line, err)
			}
			return nil
		},
		Stop: func(name string) error {
			found, _ := all.LoadAndDelete(name)
			cmd, ok := found.(*exec.Cmd)
			if !ok {
				return nil
			}
			err := stop(name, cmd)
			_ = cmd.Wait() // its status is the signal's, or the program's
			return err
		},
	}
}
