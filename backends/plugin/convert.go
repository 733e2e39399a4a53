package plugin

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/plugin/wire"
	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/registry/merkle"
)

// readWorkload reads the JSON document of a workload. A field this program does not know is refused: it may ask for something.
func readWorkload(text []byte) (backends.Workload, error) {
	var w backends.Workload
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&w); err != nil {
		return w, fmt.Errorf("workload document: %v", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return w, errors.New("workload document: more than one value")
	}
	return w, nil
}

func names[From, To ~string](list []From) []To {
	var to []To
	for _, one := range list {
		to = append(to, To(one))
	}
	return to
}

// line makes a text of several lines one that fits to be shown.
func line(text string) string {
	return refusal.Clip(strings.ReplaceAll(strings.TrimSpace(text), "\n", " | "), maxText)
}

// page makes each line of a text fit to be shown.
func page(text string) string {
	var lines []string
	for one := range strings.SplitSeq(text[:min(len(text), maxText)], "\n") {
		lines = append(lines, refusal.Clip(one, maxText))
	}
	return strings.Join(lines, "\n")
}

func clipAll(list []string) []string {
	var to []string
	for _, one := range list {
		to = append(to, line(one))
	}
	return to
}

func fromFingerprint(p backends.Fingerprint) *wire.FingerprintAnswer {
	return &wire.FingerprintAnswer{
		Backend: p.Backend, Version: p.Version, Formats: names[backends.Format, string](p.Formats), Platforms: p.Platforms,
		Isolation: int32(p.Isolation), Features: names[backends.Feature, string](p.Features), Missing: p.Missing, // five values
	}
}

func toFingerprint(p *wire.FingerprintAnswer) backends.Fingerprint {
	return backends.Fingerprint{
		Backend: p.Backend, Version: line(p.Version), Formats: names[string, backends.Format](p.Formats), Platforms: p.Platforms,
		Isolation: backends.Isolation(p.Isolation), Features: names[string, backends.Feature](p.Features), Missing: clipAll(p.Missing),
	}
}

func fromStatus(s *backends.Status) *wire.Status {
	w := &wire.Status{
		Name: s.Name, Spec: s.Spec[:], State: string(s.State), Content: s.Content, Pid: int64(s.PID),
		Restarts: int64(s.Restarts), ExitCode: int64(s.ExitCode), Oom: s.OOM,
		Memory: s.Usage.Memory, Cpu: int64(s.Usage.CPU), Pids: s.Usage.PIDs, Unapplied: s.Unapplied, Detail: s.Detail,
	}
	if !s.Started.IsZero() {
		w.Started = s.Started.UnixNano()
	}
	for _, a := range s.Addresses {
		w.Addresses = append(w.Addresses, &wire.Address{Port: a.Port, Address: a.Address})
	}
	return w
}

// toStatus reads one workload's status. It returns an error for what no backend may say.
func toStatus(w *wire.Status) (backends.Status, error) {
	s := backends.Status{
		Name: w.Name, State: backends.State(w.State), Content: w.Content, PID: int(w.Pid),
		Restarts: int(w.Restarts), ExitCode: int(w.ExitCode), OOM: w.Oom,
		Usage:     backends.Usage{Memory: w.Memory, CPU: time.Duration(w.Cpu), PIDs: w.Pids},
		Unapplied: clipAll(w.Unapplied), Detail: line(w.Detail),
	}
	if len(w.Spec) != len(s.Spec) {
		return s, fmt.Errorf("workload %q with a spec of %d bytes", refusal.Clip(w.Name, 100), len(w.Spec))
	}
	s.Spec = merkle.Digest(w.Spec)
	switch s.State {
	case backends.Starting, backends.Running, backends.Backoff, backends.Exited, backends.Damaged:
	default:
		return s, fmt.Errorf("workload %q in state %q", refusal.Clip(w.Name, 100), refusal.Clip(w.State, 100))
	}
	if w.Started != 0 {
		s.Started = time.Unix(0, w.Started).UTC()
	}
	for _, a := range w.Addresses {
		s.Addresses = append(s.Addresses, backends.Address{Port: a.Port, Address: a.Address})
	}
	return s, nil
}

// toStatuses reads the answer to Observe: names sorted and different.
func toStatuses(list []*wire.Status) ([]backends.Status, error) {
	all := make([]backends.Status, 0, len(list))
	for i, w := range list {
		s, err := toStatus(w)
		if err != nil {
			return nil, err
		}
		if i > 0 && all[i-1].Name >= s.Name {
			return nil, fmt.Errorf("workload %q after %q, not sorted", refusal.Clip(s.Name, 100), refusal.Clip(all[i-1].Name, 100))
		}
		all = append(all, s)
	}
	return all, nil
}

// fromError says what an error is, nil if no caller could tell it apart.
func fromError(err error) *wire.Fault {
	var feature *backends.FeatureError
	var start *backends.StartError
	all := refusal.All(err)
	switch {
	case len(all) > 0:
		refusals := &wire.Refusals{}
		for _, r := range all {
			refusals.All = append(refusals.All, &wire.Refusal{Code: string(r.Code), Subject: r.Subject, Got: r.Got, Want: r.Want})
		}
		return &wire.Fault{Kind: &wire.Fault_Refusals{Refusals: refusals}}
	case errors.As(err, &feature):
		return &wire.Fault{Kind: &wire.Fault_Feature{Feature: &wire.FeatureFault{
			Backend: feature.Backend, Feature: string(feature.Feature), Detail: feature.Detail,
		}}}
	case errors.As(err, &start):
		return &wire.Fault{Kind: &wire.Fault_Start{Start: &wire.StartFault{
			Workload: start.Workload, Stage: start.Stage, Output: page(start.Output), Cause: start.Cause,
		}}}
	case errors.Is(err, backends.ErrNotFound):
		return &wire.Fault{Kind: &wire.Fault_NotFound{NotFound: &wire.NotFound{}}}
	}
	return nil
}

// toError is what a fault stands for, nil if it stands for nothing known.
func toError(f *wire.Fault) error {
	switch kind := f.GetKind().(type) {
	case *wire.Fault_NotFound:
		return backends.ErrNotFound
	case *wire.Fault_Feature:
		e := kind.Feature
		return &backends.FeatureError{Backend: line(e.GetBackend()), Feature: backends.Feature(line(e.GetFeature())), Detail: line(e.GetDetail())}
	case *wire.Fault_Start:
		e := kind.Start
		return &backends.StartError{Workload: line(e.GetWorkload()), Stage: line(e.GetStage()), Output: page(e.GetOutput()), Cause: line(e.GetCause())}
	case *wire.Fault_Refusals:
		var all []error
		for _, e := range kind.Refusals.GetAll() {
			all = append(all, &refusal.Error{Code: refusal.Code(line(e.GetCode())), Subject: line(e.GetSubject()), Got: line(e.GetGot()), Want: line(e.GetWant())})
		}
		if len(all) == 1 {
			return all[0]
		}
		return errors.Join(all...)
	}
	return nil
}
