// Package gate says whether what was just changed is good: it probes workloads until they have passed long enough, until one
// of them has failed for good, or until there is nothing left to hope for.
//
// A verdict is one of three. Pass promotes, Fail reverts, NoData does neither: a probe that cannot be made (the backend does
// not answer, the context ends) says nothing about the workload. A probe that is made and not answered is a failure.
//
//	finding := gate.Gate{Observe: observe}.Watch(ctx, []gate.Target{{
//		Workload: "relay-3f9a2c1d",
//		Probe:    gate.Probe{Kind: gate.HTTP, Port: "http", Path: "/healthz"},
//	}})
package gate

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/kindos/kmo/backends"
)

// Kind is how a workload is asked.
type Kind string

// The kinds of probe. Every kind also fails when the workload's program has ended.
const (
	Process Kind = "process" // its program runs
	HTTP    Kind = "http"    // GET Path on Port is answered with Status, or any 2xx or 3xx if Status is 0
	TCP     Kind = "tcp"     // Port accepts a connection
	Exec    Kind = "exec"    // Argv, run inside the workload, ends with 0
)

// Probe is one question, how often it is asked and how many answers count. Zero fields get the defaults in brackets.
type Probe struct {
	Kind     Kind          // [process]
	Port     string        // name of the port
	Path     string        // ["/"]
	Status   int           // wanted HTTP status; 0 is any 2xx or 3xx
	Argv     []string      // for exec
	Every    time.Duration // between the start of one probe and of the next [5s]
	Timeout  time.Duration // of one probe [Every, at least 1s and at most 5s]
	Start    time.Duration // from the first probe on, in which failures do not count [10s]
	After    int           // successes in a row that make a pass [1]
	Failures int           // failures in a row, after Start, that make a fail [3]
}

// String is how people name the probe: "http /healthz".
func (p Probe) String() string {
	switch p.Kind {
	case HTTP:
		return "http " + p.Path
	case TCP:
		return "tcp " + p.Port
	case Exec:
		return fmt.Sprintf("exec %q", p.Argv)
	}
	return "process"
}

// WithDefaults fills the zero fields.
func (p Probe) WithDefaults() Probe {
	set := func(d *time.Duration, to time.Duration) {
		if *d == 0 {
			*d = to
		}
	}
	if p.Kind == "" {
		p.Kind = Process
	}
	if p.Kind == HTTP && p.Path == "" {
		p.Path = "/"
	}
	set(&p.Every, 5*time.Second)
	set(&p.Timeout, min(max(p.Every, time.Second), 5*time.Second))
	set(&p.Start, 10*time.Second)
	p.After = max(p.After, 1)
	if p.Failures == 0 {
		p.Failures = 3
	}
	return p
}

// Target is one workload under watch.
type Target struct {
	Workload string
	Unit     string
	Backend  string // which runs it
	Probe    Probe
	Bake     time.Duration // how long it must go on passing once it has passed
	Deadline time.Duration // when the verdict must be there; 0 is long enough for the target to fail by itself
}

// Verdict is what a gate says.
type Verdict string

// The verdicts.
const (
	Pass   Verdict = "pass"
	Fail   Verdict = "fail"
	NoData Verdict = "no data"
)

// Undecided is no verdict: the watch goes on later.
const Undecided Verdict = "undecided"

// weight orders verdicts: of many, the heaviest is that of all.
func (v Verdict) weight() int {
	return slices.Index([]Verdict{Pass, Undecided, NoData, Fail}, v)
}

// Finding is a verdict with its evidence. For Fail and NoData it names the first workload that decided.
type Finding struct {
	Verdict  Verdict
	Workload string
	Unit     string
	Gate     string // the probe: "http /healthz"
	Evidence string // one line: "3 times in a row: 500 Internal Server Error"
}

// Gate watches workloads.
type Gate struct {
	// Observe returns the workloads of every backend by name, as they are now.
	Observe func(context.Context) (map[string]backends.Status, error)
	// Exec runs the target's command inside its workload.
	Exec func(context.Context, Target) (status int, output []byte, err error)
	// Patience is how long one call of Watch takes at most; 0 is until there is a verdict.
	Patience time.Duration
	// Memory lets a watch whose patience ended go on with the next call, as if there had been one. Nil remembers nothing.
	Memory Memory
}

// Memory is what is known of targets under watch.
type Memory map[string]*tally

// under is the name under which a target is remembered. Before and while it bakes are two watches.
func under(target Target) string { return fmt.Sprint(target.Workload, target.Bake > 0) }

// of returns the tally of a target, a new one if it is not under watch.
func (m Memory) of(target Target) *tally {
	count := m[under(target)]
	if count == nil {
		count = &tally{begun: time.Now()}
		if m != nil {
			m[under(target)] = count
		}
	}
	return count
}

// forget ends a watch: the next one of the same targets has its own time.
func (m Memory) forget(targets []Target) {
	for _, target := range targets {
		delete(m, under(target))
	}
}

var (
	errDeadline = errors.New("the gate's deadline has passed") // ends a watch that had its time
	errPatience = errors.New("the watch goes on later")
)

// Watch probes every target until all have passed and baked (Pass), until one has failed (Fail), or until the longest deadline has
// gone by with neither: then a target whose last answer was a failure has failed, any other has given no data. Where patience ends first
// there is no verdict yet (Undecided). A ctx that ended judges nothing.
func (g Gate) Watch(ctx context.Context, targets []Target) Finding {
	if len(targets) == 0 {
		return Finding{Verdict: Pass}
	}
	var deadline time.Time
	tallies := make([]*tally, len(targets))
	for i, target := range targets {
		tallies[i] = g.Memory.of(target)
		if end := tallies[i].begun.Add(target.longest()); end.After(deadline) {
			deadline = end
		}
	}
	watch, stop := context.WithDeadlineCause(ctx, deadline, errDeadline)
	defer stop()
	if g.Patience > 0 {
		var impatient context.CancelFunc
		watch, impatient = context.WithTimeoutCause(watch, g.Patience, errPatience)
		defer impatient()
	}
	results := make(chan Finding, len(targets))
	var looks sync.WaitGroup
	g.Observe = shared(watch, &looks, g.Observe)
	for i, target := range targets {
		target.Probe = target.Probe.WithDefaults()
		go func() { results <- g.watchOne(watch, target, tallies[i]) }()
	}
	worst := Finding{Verdict: Pass}
	for range targets {
		finding := <-results
		if finding.Verdict.weight() > worst.Verdict.weight() {
			worst = finding
		}
		if finding.Verdict == Fail {
			stop()
		}
	}
	stop()
	looks.Wait() // nothing looks at the host any more once this returns
	if ctx.Err() != nil {
		return Finding{Verdict: NoData, Evidence: context.Cause(ctx).Error()}
	}
	if worst.Verdict == Pass {
		g.Memory.forget(targets)
	}
	return worst
}

// Once probes every target one time, side by side, and returns the findings that are not a pass.
func (g Gate) Once(ctx context.Context, targets []Target) []Finding {
	results := make([]Finding, len(targets))
	parallel(len(targets), func(i int) {
		target := targets[i]
		target.Probe = target.Probe.WithDefaults()
		answer := g.ask(ctx, target)
		results[i] = target.finding(answer.verdict, answer.evidence)
	})
	var bad []Finding
	for _, finding := range results {
		if finding.Verdict != Pass {
			bad = append(bad, finding)
		}
	}
	return bad
}

// parallel calls f(0) … f(n-1), at most 16 at once, and waits for all.
func parallel(n int, f func(int)) {
	slots, done := make(chan struct{}, 16), make(chan struct{}, n)
	for i := range n {
		slots <- struct{}{}
		go func() {
			defer func() { <-slots; done <- struct{}{} }()
			f(i)
		}()
	}
	for range n {
		<-done
	}
}

// longest is when the target's verdict must be there.
func (t Target) longest() time.Duration {
	if t.Deadline != 0 {
		return t.Deadline
	}
	probe := t.Probe.WithDefaults()
	rounds := time.Duration(probe.Failures + probe.After)
	return time.Minute + 2*(probe.Start+t.Bake+rounds*(probe.Every+probe.Timeout))
}

func (t Target) finding(verdict Verdict, evidence string) Finding {
	return Finding{Verdict: verdict, Workload: t.Workload, Unit: t.Unit, Gate: t.Probe.String(), Evidence: evidence}
}
