package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/cmd/kmo/review"
	"github.com/kindos/kmo/policy"
	"github.com/kindos/kmo/policy/audit"
	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/policy/trust"
	"github.com/kindos/kmo/reconciler"
)

// status says what this host runs. It never waits for a reconcile.
func (h *host) status(ctx context.Context) (Status, error) {
	s := Status{Site: string(h.config.Site), Branch: string(h.config.Branch), Zone: string(h.config.Zone), Version: version, Agent: h.agent, Workloads: []reconciler.Have{}}
	var err error
	if s.Record, err = h.record(); err != nil {
		return s, err
	}
	if s.Workloads, err = h.observe(ctx); err != nil {
		s.Trouble = err.Error()
	}
	s.Error = h.failure()
	return s, nil
}

// record is the journal's; where there was one before, none is an alarm.
func (h *host) record() (reconciler.Record, error) {
	rec, err := h.journal.Load()
	if err == nil && rec.Seq == 0 {
		err = noJournal(h.journal.Path)
	}
	return rec, err
}

func noJournal(path string) error {
	return &refusal.Error{Code: "E_STATE", Subject: path, Got: "no journal, although this host has accepted commits", Want: "the journal as kMO left it; " + trust.WayOut}
}

// observe lists the workloads of every backend that answers, sorted by name.
func (h *host) observe(ctx context.Context) ([]reconciler.Have, error) {
	all := []reconciler.Have{}
	var errs []error
	for name, backend := range h.backends {
		list, err := backend.Observe(ctx)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
		for _, status := range list {
			all = append(all, reconciler.Have{Backend: name, Status: status})
		}
	}
	slices.SortFunc(all, func(a, b reconciler.Have) int { return cmp.Compare(a.Name, b.Name) })
	return all, errors.Join(errs...)
}

// openLogs opens the logs of a workload, or of a unit's newest one.
func (h *host) openLogs(ctx context.Context, name string, options backends.LogOptions) (io.ReadCloser, error) {
	all, err := h.observe(ctx)
	var found *reconciler.Have
	for i, have := range all {
		if have.Name == name || have.Unit() == name && (found == nil || have.Started.After(found.Started)) {
			found = &all[i]
		}
	}
	if found == nil {
		var names []string
		for _, have := range all {
			names = append(names, have.Unit())
		}
		return nil, errors.Join(fmt.Errorf("%q: %w; there are %s", refusal.Clip(name, 100), backends.ErrNotFound, strings.Join(slices.Compact(names), ", ")), err)
	}
	return h.backends[found.Backend].Logs(ctx, found.Name, options)
}

// reconcile looks, and goes on until what is tried has a verdict.
func (h *host) reconcile(ctx context.Context) (reconciler.Record, error) {
	for {
		rec, err := h.reconcileNow(ctx)
		if err != nil || rec.Trying == "" || rec.Stage != reconciler.StageWatch {
			return rec, err
		}
	}
}

// plan says what a revision would do: the head if none is named, else a commit of the branch by the beginning of its id.
func (h *host) plan(ctx context.Context, revision string) (reconciler.Preview, error) {
	h.preview.Lock()
	defer h.preview.Unlock()
	id, err := h.commit(ctx, revision)
	if err != nil {
		return reconciler.Preview{}, err
	}
	return h.preview.Preview(ctx, id)
}

// commit is the id of a revision.
func (h *host) commit(ctx context.Context, revision string) (string, error) {
	if len(revision) == 40 {
		return revision, nil
	}
	head, err := h.source.Head(ctx)
	if revision == "" {
		return head.ID, err
	}
	if err != nil { // the head cannot be had: what this host knows can still be asked about
		rec, lost := h.record()
		if head.ID = cmp.Or(rec.Trying, rec.Good); head.ID == "" {
			return "", errors.Join(err, lost)
		}
	}
	if !abbreviated(revision) {
		return "", fmt.Errorf("revision %q: want at least four hex digits of a commit's id; a branch or a tag can move, so none is taken", refusal.Clip(revision, 60))
	}
	all, err := h.source.Between(ctx, "", head.ID)
	if err != nil {
		return "", err
	}
	var found []string
	for _, commit := range all {
		if strings.HasPrefix(commit.ID, revision) {
			found = append(found, commit.ID)
		}
	}
	if len(found) != 1 {
		return "", fmt.Errorf("revision %s: %d commits of the branch begin so; want one", revision, len(found))
	}
	return found[0], nil
}

// Explanation is what the audit log says of a commit.
type Explanation struct {
	Commit   string           `json:"commit"`
	Records  []audit.Record   `json:"records"`
	Replayed map[int64]string `json:"replayed,omitempty"` // by a decision's index, what deciding again came to
	Within   string           `json:"within,omitempty"`   // the good commit, if this one has no record and came in with it
}

// explain collects the audit log's records of a commit: also of one that was not let in, or that the branch has no more.
func (h *host) explain(ctx context.Context, revision string) (e Explanation, err error) {
	if lower := strings.ToLower(revision); abbreviated(lower) {
		revision = lower
	}
	id, err := h.judged(revision)
	if err == nil && id == "" {
		id, err = h.commit(ctx, revision)
	}
	if id == "" && revision == "" { // the remote does not answer: of what this host saw last it can tell all the same
		rec, lost := h.record()
		if id = rec.Head; lost != nil {
			return e, lost
		}
	}
	if id == "" {
		return e, err
	}
	e.Commit = id
	if e.Records, err = h.audit.ByCommit(id); err != nil {
		return e, err
	}
	if len(e.Records) == 0 {
		if _, err := h.source.At(ctx, id); err != nil {
			return e, fmt.Errorf("commit %s: this host has never seen it: %w", id, err)
		}
		e.Within, err = h.within(ctx, id)
	}
	for _, record := range e.Records {
		if record.Kind == "decision" {
			if e.Replayed == nil {
				e.Replayed = map[int64]string{}
			}
			e.Replayed[record.Index] = h.replay(ctx, record)
		}
	}
	return e, err
}

// within is the good commit if that commit is an ancestor of it.
func (h *host) within(ctx context.Context, id string) (string, error) {
	rec, err := h.journal.Load()
	if err != nil || rec.Good == "" {
		return "", err
	}
	in, err := h.source.Ancestor(ctx, id, rec.Good)
	if !in {
		return "", err
	}
	return rec.Good, err
}

// replay decides again what a record holds the decision of, from the bytes that were judged and the rules that judged, and says what came of it.
func (h *host) replay(ctx context.Context, record audit.Record) string {
	var entry reconciler.DecisionEntry
	var judged policy.Input
	err := json.Unmarshal(record.Body, &entry)
	if err == nil {
		err = json.Unmarshal(entry.Decision.Input, &judged)
	}
	if err != nil {
		return "not replayed: " + err.Error()
	}
	then := entry.Decision
	set, err := h.rulesOf(ctx, judged)
	switch {
	case err != nil:
		return "not replayed: " + err.Error()
	case set.Digest() != then.Policy || !slices.Equal(set.Rules(), judged.Rules):
		return fmt.Sprintf("not replayed: it was made by policy %s %v, and this kmo with the site's rules of then is policy %s %v", then.Policy.Short(), judged.Rules, set.Digest().Short(), set.Rules())
	}
	now, err := set.Replay(ctx, then.Input)
	if err != nil && refusal.Of(err) == nil {
		return "not replayed: " + err.Error()
	}
	return again(record.Body, now)
}

// differs begins what is said of a decision that comes out otherwise when it is made again.
const differs = "REPLAY DIFFERS: "

// again compares a recorded decision with itself made again: its bytes, but for how long it took.
func again(body []byte, now policy.Decision) string {
	var recorded struct{ Decision json.RawMessage }
	var then policy.Decision
	err := json.Unmarshal(body, &recorded)
	if err == nil {
		err = json.Unmarshal(recorded.Decision, &then)
	}
	if err != nil {
		return "not replayed: " + err.Error()
	}
	now.Took = then.Took
	made, err := json.Marshal(now)
	switch {
	case err != nil:
		return "not replayed: " + err.Error()
	case !slices.Equal(now.Denied, then.Denied) || !slices.Equal(now.Waived, then.Waived) || !slices.Equal(now.Warned, then.Warned) || !slices.Equal(now.Evaluated, then.Evaluated):
		return differs + fmt.Sprintf("%d rules look, denied: %v", len(now.Evaluated), now.Denied)
	case !bytes.Equal(made, recorded.Decision):
		return differs + fmt.Sprintf("the same findings, in %d bytes that are not the %d recorded", len(made), len(recorded.Decision))
	}
	return "replayed: the same answer, byte for byte"
}

// rulesOf are the rules that judge a change: the base's, and the head's own where it brings them beside other things.
func (h *host) rulesOf(ctx context.Context, judged policy.Input) (*policy.Set, error) {
	set, err := h.rulesAt(ctx, cmp.Or(judged.Change.Base, judged.Commit))
	if err != nil || judged.Change.Base == "" || !judged.Change.Apart {
		return set, err
	}
	own, err := h.rulesAt(ctx, judged.Commit)
	if err != nil {
		return nil, err
	}
	return set.And(own), nil
}

// Evaluation is a decision, and what each rule said to it.
type Evaluation struct {
	Decision policy.Decision `json:"decision"`
	Said     []policy.Said   `json:"said,omitempty"`
}

// evaluate judges a revision as a reconcile would, which leaves no record.
func (h *host) evaluate(ctx context.Context, revision string, trace bool) (Evaluation, error) {
	preview, err := h.plan(ctx, revision)
	e := Evaluation{Decision: preview.Decision}
	if len(e.Decision.Input) == 0 {
		for _, one := range preview.Refusals {
			err = errors.Join(err, one)
		}
		return e, cmp.Or(err, fmt.Errorf("commit %s: refused at %s, before any rule is asked", short(preview.Commit), preview.Stage))
	}
	if !trace { // what came after the decision is for 'kmo plan'
		return e, nil
	}
	var judged policy.Input
	if err := json.Unmarshal(e.Decision.Input, &judged); err != nil {
		return e, err
	}
	set, err := h.rulesOf(ctx, judged)
	if err != nil {
		return e, err
	}
	e.Decision, e.Said, err = set.Trace(ctx, e.Decision.Input)
	return e, err
}

// rulesAt are the shipped rules with the site's own as a commit has them.
func (h *host) rulesAt(ctx context.Context, id string) (*policy.Set, error) {
	commit, err := h.source.At(ctx, id)
	if err != nil {
		return nil, err
	}
	if commit.Tree.ObjectID("policy") == "" {
		return rules(nil)
	}
	own, err := fs.Sub(commit.Tree, "policy")
	if err != nil {
		return nil, err
	}
	return rules(own)
}

// judged is the one commit of which the audit log speaks and whose id begins so, "" if there is none.
func (h *host) judged(revision string) (id string, err error) {
	if !abbreviated(revision) {
		return "", nil
	}
	return id, h.audit.Records(func(record audit.Record) error {
		if strings.HasPrefix(record.Commit, revision) && record.Commit != id {
			if id != "" {
				return fmt.Errorf("revision %s: %s and %s begin so; want one", revision, id, record.Commit)
			}
			id = record.Commit
		}
		return nil
	})
}

// abbreviated says whether text can be the beginning of a commit's id.
func abbreviated(text string) bool {
	return len(text) >= 4 && strings.Trim(text, "0123456789abcdef") == ""
}

// inWords is one record in words: a line, and below it what it stands on.
func inWords(record audit.Record) []string {
	switch record.Kind {
	case "decision":
		return decisionInWords(record)
	case "gate":
		var entry reconciler.GateEntry
		if json.Unmarshal(record.Body, &entry) == nil {
			f := entry.Finding
			if f.Verdict == "pass" {
				return []string{"gate: everything passed"}
			}
			return []string{fmt.Sprintf("gate: %s for %s (%s): %s", f.Verdict, f.Unit, f.Gate, f.Evidence)}
		}
	case "revert":
		var entry reconciler.RevertEntry
		if json.Unmarshal(record.Body, &entry) == nil {
			lines := []string{fmt.Sprintf("revert: %s is to be taken back in Git to the content of %s, because %s failed %s: %s", short(entry.Commit), short(entry.Revert.Good), entry.Revert.Unit, entry.Revert.Gate, entry.Revert.Evidence)}
			for _, id := range entry.Range {
				lines = append(lines, "together with "+short(id)+", which lies between: push again what is good of it")
			}
			return lines
		}
	case "repair":
		var entry reconciler.RepairEntry
		if json.Unmarshal(record.Body, &entry) == nil {
			lines := []string{"repair:"}
			for _, step := range entry.Steps {
				lines = append(lines, fmt.Sprintf("%s %s: %s", step.Op, step.Name, step.Reason))
			}
			return lines
		}
	case "drift":
		var entry reconciler.DriftEntry
		if json.Unmarshal(record.Body, &entry) == nil {
			return []string{fmt.Sprintf("drift: the base of %s is not what was fetched: %s", strings.Join(entry.Workloads, ", "), entry.Reason)}
		}
	case "anchor":
		var entry AnchorEntry
		if json.Unmarshal(record.Body, &entry) == nil {
			return []string{fmt.Sprintf("anchor: an operator has named it to go on from, with trust root %d, for this was lost: %s", entry.Root, entry.Lost)}
		}
	case "outcome":
		var entry reconciler.OutcomeEntry
		if json.Unmarshal(record.Body, &entry) == nil {
			text := "outcome: " + string(entry.Outcome)
			if entry.Reason != "" {
				text += " at " + entry.Stage + ": " + entry.Reason
			}
			return []string{text}
		}
	}
	return []string{record.Kind + ": " + refusal.Clip(string(record.Body), 300)}
}

func decisionInWords(record audit.Record) []string {
	var entry reconciler.DecisionEntry
	if err := json.Unmarshal(record.Body, &entry); err != nil {
		return []string{"decision: " + err.Error()}
	}
	lines := []string{fmt.Sprintf("decision: allowed by policy %s after %d rules", entry.Decision.Policy.Short(), len(entry.Decision.Evaluated))}
	if len(entry.Decision.Denied) > 0 {
		lines[0] = fmt.Sprintf("decision: denied by policy %s", entry.Decision.Policy.Short())
	}
	for _, denial := range entry.Decision.Denied {
		lines = append(lines, strings.TrimSpace(fmt.Sprintf("%s %s %s: %s", denial.ID, denial.Unit, denial.Path, denial.Msg)))
	}
	for _, denial := range entry.Decision.Waived {
		lines = append(lines, strings.TrimSpace(fmt.Sprintf("waived: %s %s %s: %s", denial.ID, denial.Unit, denial.Path, denial.Msg)))
	}
	var judged policy.Input
	if err := json.Unmarshal(entry.Decision.Input, &judged); err != nil {
		return append(lines, "its input cannot be read: "+err.Error())
	}
	lines = append(lines, fmt.Sprintf("signed by %s with %s", judged.Change.Signer, judged.Change.Key))
	for _, unit := range judged.Change.Units {
		lines = append(lines, review.Approvals(unit)...)
	}
	return lines
}

// Shown is one record, with what it stands on.
type Shown struct {
	Log      string       `json:"log"`
	Record   audit.Record `json:"record"`
	Input    string       `json:"input,omitempty"`    // of a decision: the digest of the bytes that were judged
	Policy   string       `json:"policy,omitempty"`   // the digest of the rules that judged
	Replayed string       `json:"replayed,omitempty"` // what deciding again came to
}

// shown is a record. A decision is made again if that is asked for, which takes more of the host than its log.
func (h *host) shown(ctx context.Context, index int64, replay bool) (Shown, error) {
	record, err := h.audit.Record(index)
	name, _, _ := strings.Cut(h.audit.Key(), "+")
	s := Shown{Log: name, Record: record}
	if err != nil || record.Kind != "decision" {
		return s, err
	}
	var entry reconciler.DecisionEntry
	if err := json.Unmarshal(record.Body, &entry); err != nil {
		return s, fmt.Errorf("audit record %d: %w", index, err)
	}
	s.Input, s.Policy = fmt.Sprintf("sha256:%x", sha256.Sum256(entry.Decision.Input)), entry.Decision.Policy.String()
	if replay {
		s.Replayed = h.replay(ctx, record)
	}
	return s, nil
}

// Verified is a log that was read again and found whole.
type Verified struct {
	Log        string     `json:"log"`
	Size       int64      `json:"size"`           // records
	Root       string     `json:"root"`           // of the tree over them
	Key        string     `json:"key"`            // what others check its checkpoints and proofs with
	Last       time.Time  `json:"last,omitzero"`  // time of the last record
	Checkpoint string     `json:"checkpoint"`     // the signed note, for another machine to keep
	Since      audit.Tree `json:"since,omitzero"` // what the log goes on from, as the kept checkpoint says
	Trouble    string     `json:"trouble,omitempty"`
}

// verified reads the audit log again, and holds it against what the journal and a kept checkpoint say of it.
func (h *host) verified(since string) (v Verified, err error) {
	rec, lost := h.record() // before the log is read, which is written first
	if err := h.audit.Verify(); err != nil {
		return v, err
	}
	if lost != nil {
		v.Trouble = lost.Error()
	} else if err := h.audit.Extends(rec.Audit, "the journal"); err != nil {
		return v, err
	}
	if since != "" {
		if v.Since, err = audit.OpenCheckpoint([]byte(since), h.audit.Key()); err != nil {
			return v, err
		}
		if err := h.audit.Extends(v.Since, "the kept checkpoint"); err != nil {
			return v, err
		}
	}
	checkpoint, tree, err := h.audit.Checkpoint()
	if err != nil {
		return v, err
	}
	v.Key = h.audit.Key()
	v.Log, _, _ = strings.Cut(v.Key, "+")
	v.Size, v.Root, v.Checkpoint = tree.N, tree.Hash.String(), string(checkpoint)
	if tree.N > 0 {
		last, err := h.audit.Record(tree.N - 1)
		if err != nil {
			return v, err
		}
		v.Last = last.Time
	}
	return v, nil
}
