package gate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/policy/refusal"
)

// firstPause is the pause after the first probe that did not pass while a workload starts; it doubles up to Every, so that
// a program that is up at once is known to be up at once.
const firstPause = 5 * time.Millisecond

// answer is one probe's result.
type answer struct {
	verdict  Verdict
	evidence string
	restarts int
	starting bool // the program has not begun
}

// observer looks at the workloads of every backend.
type observer = func(context.Context) (map[string]backends.Status, error)

// tally counts answers in a row; it is the whole of a target's memory.
type tally struct {
	begun     time.Time // of the first probe
	passed    time.Time // when After successes in a row were first reached; zero before
	successes int
	failures  int
	restarts  int // of the program, at the first answer
	last      answer
}

// add counts one answer and says what it makes of the target: Pass, Fail, or "" to go on.
func (t *tally) add(target Target, a answer, now time.Time) (Verdict, string) {
	probe := target.Probe
	starting := now.Sub(t.begun) < probe.Start && t.passed.IsZero()
	t.last = a
	switch a.verdict {
	case NoData:
		t.successes = 0
		return "", ""
	case Fail:
		t.successes = 0
		if starting || a.starting && t.passed.IsZero() { // one that never begins has until the deadline
			return "", ""
		}
		t.failures++
		if t.failures >= probe.Failures {
			return Fail, fmt.Sprintf("%d times in a row: %s", t.failures, a.evidence)
		}
		return "", ""
	}
	if !t.passed.IsZero() && a.restarts > t.restarts {
		return Fail, fmt.Sprintf("it passed, then its program ended and was started again (%d times)", a.restarts-t.restarts)
	}
	t.failures = 0
	t.successes++
	if t.successes >= probe.After && t.passed.IsZero() {
		t.passed, t.restarts = now, a.restarts
	}
	if !t.passed.IsZero() && now.Sub(t.passed) >= target.Bake && t.successes >= probe.After {
		return Pass, ""
	}
	return "", ""
}

// shared makes one look at the host serve every target that asks while the look before it is under way: a thousand targets then cost as
// many looks as one. Nobody is given a look that began before it asked. What a look returns is read only. Looks end with watch, and
// are counted in looks.
func shared(watch context.Context, looks *sync.WaitGroup, observe observer) observer {
	type look struct {
		all  map[string]backends.Status
		err  error
		done chan struct{}
	}
	var mu sync.Mutex // guards next and busy
	var next *look    // the one that has not begun
	busy := false     // somebody runs the looks
	run := func() {
		for {
			mu.Lock()
			now := next
			next, busy = nil, now != nil
			mu.Unlock()
			if now == nil {
				return
			}
			now.all, now.err = observe(watch)
			close(now.done)
		}
	}
	return func(ctx context.Context) (map[string]backends.Status, error) {
		mu.Lock()
		if next == nil {
			next = &look{done: make(chan struct{})}
		}
		mine := next
		if !busy {
			busy = true
			looks.Go(run)
		}
		mu.Unlock()
		select {
		case <-mine.done:
			return mine.all, mine.err
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// watchOne asks one target until it has passed, failed, or ctx ends.
func (g Gate) watchOne(ctx context.Context, target Target, count *tally) Finding {
	pause := firstPause
	for {
		asked := time.Now()
		a := g.ask(ctx, target)
		if ctx.Err() != nil {
			return target.late(context.Cause(ctx), count)
		}
		verdict, evidence := count.add(target, a, time.Now())
		if verdict != "" {
			return target.finding(verdict, evidence)
		}
		wait := target.Probe.Every
		if count.passed.IsZero() && a.verdict != Pass {
			wait, pause = min(pause, wait), pause*2
		} else if left := target.Bake - time.Since(count.passed); a.verdict == Pass && left > 0 { // so that the bake ends when it is over
			wait = min(wait, left)
		}
		rest := time.Until(asked.Add(max(wait, time.Millisecond)))
		if rest <= 0 { // the probe took that long; a timer that is due at once also makes the race detector's runtime fall over in a bubble
			continue
		}
		select {
		case <-ctx.Done():
		case <-time.After(rest):
		}
	}
}

// late is the finding of a watch that ended without a verdict.
func (t Target) late(cause error, count *tally) Finding {
	switch {
	case errors.Is(cause, errPatience) && count.passed.IsZero():
		return t.finding(Undecided, "not passed yet")
	case errors.Is(cause, errPatience):
		return t.finding(Undecided, "passed, and baking for "+t.Bake.String())
	case errors.Is(cause, errDeadline) && count.last.verdict == Fail:
		return t.finding(Fail, "no verdict in time; last seen: "+count.last.String())
	case errors.Is(cause, errDeadline) && count.last.verdict == Pass && !count.passed.IsZero():
		return t.finding(NoData, "no verdict in time; last seen: pass, and baking for "+t.Bake.String())
	}
	return t.finding(NoData, "no verdict in time; last seen: "+count.last.String())
}

func (a answer) String() string {
	if a.verdict == "" {
		return "nothing"
	}
	return strings.TrimSuffix(string(a.verdict)+": "+a.evidence, ": ")
}

// ask makes one probe. If ctx has ended meanwhile it says nothing about the workload.
func (g Gate) ask(ctx context.Context, target Target) answer {
	bounded, cancel := context.WithTimeout(ctx, target.Probe.Timeout)
	defer cancel()
	a := g.probe(bounded, target)
	if ctx.Err() != nil {
		return answer{verdict: NoData, evidence: context.Cause(ctx).Error()}
	}
	return a
}

func (g Gate) probe(ctx context.Context, target Target) answer {
	all, err := g.Observe(ctx)
	if err != nil {
		return answer{verdict: NoData, evidence: refusal.Clip(err.Error(), 200)}
	}
	status, ok := all[target.Workload]
	if !ok {
		return answer{verdict: Fail, evidence: "the workload is not there"}
	}
	a := answer{verdict: Pass, restarts: status.Restarts, starting: status.State == backends.Starting}
	if status.State != backends.Running {
		a.verdict, a.evidence = Fail, ended(status)
		return a
	}
	switch target.Probe.Kind {
	case HTTP:
		a.verdict, a.evidence = askHTTP(ctx, target.Probe, status)
	case TCP:
		a.verdict, a.evidence = askTCP(ctx, target.Probe, status)
	case Exec:
		a.verdict, a.evidence = g.askExec(ctx, target)
	}
	return a
}

// ended says in one line why a workload that should run does not.
func ended(s backends.Status) string {
	text := "its program is " + string(s.State)
	if s.State == backends.Backoff || s.State == backends.Exited {
		text += fmt.Sprintf(": it ended with status %d", s.ExitCode)
		if s.OOM {
			text += ", for want of memory"
		}
	}
	if s.Detail != "" && !strings.HasSuffix(text, s.Detail) {
		text += ": " + refusal.Clip(s.Detail, 200)
	}
	return text
}

func address(s backends.Status, port string) string {
	for _, a := range s.Addresses {
		if a.Port == port {
			return a.Address
		}
	}
	return ""
}

// client follows no redirect: what is asked is what is judged. It keeps no connection, so that a probe proves a new one.
func client() *http.Client {
	return &http.Client{
		Transport:     &http.Transport{DisableKeepAlives: true, MaxResponseHeaderBytes: 64 << 10},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

func askHTTP(ctx context.Context, probe Probe, status backends.Status) (Verdict, string) {
	at := address(status, probe.Port)
	if at == "" {
		return Fail, "it has no port " + probe.Port
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+at+probe.Path, nil)
	if err != nil {
		return Fail, refusal.Clip(err.Error(), 200)
	}
	request.Header.Set("User-Agent", "kmo")
	response, err := client().Do(request)
	if err != nil {
		return Fail, refusal.Clip(err.Error(), 200)
	}
	defer func() { _ = response.Body.Close() }()
	body, _ := io.ReadAll(io.LimitReader(response.Body, 120)) // evidence only: what of it arrives is enough
	good := response.StatusCode >= 200 && response.StatusCode < 400
	if probe.Status != 0 {
		good = response.StatusCode == probe.Status
	}
	if good {
		return Pass, ""
	}
	text := response.Status
	if line := strings.TrimSpace(string(body)); line != "" {
		text += ": " + refusal.Clip(line, 120)
	}
	return Fail, text
}

func askTCP(ctx context.Context, probe Probe, status backends.Status) (Verdict, string) {
	at := address(status, probe.Port)
	if at == "" {
		return Fail, "it has no port " + probe.Port
	}
	connection, err := (&net.Dialer{}).DialContext(ctx, "tcp", at)
	if err != nil {
		return Fail, refusal.Clip(err.Error(), 200)
	}
	_ = connection.Close()
	return Pass, ""
}

func (g Gate) askExec(ctx context.Context, target Target) (Verdict, string) {
	if g.Exec == nil {
		return NoData, "the backend runs no commands inside workloads"
	}
	code, output, err := g.Exec(ctx, target)
	switch {
	case ctx.Err() != nil:
		return Fail, "no end within " + target.Probe.Timeout.String()
	case err != nil:
		return NoData, refusal.Clip(err.Error(), 200)
	case code != 0:
		return Fail, fmt.Sprintf("ended with status %d: %s", code, refusal.Clip(strings.TrimSpace(string(output)), 160))
	}
	return Pass, ""
}
