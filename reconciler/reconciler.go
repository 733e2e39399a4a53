// Package reconciler makes one host run what a site's branch says, and takes it back when it is not healthy.
//
// [Reconciler.Reconcile] is one straight line of calls, and docs/architecture.md has its picture:
//
//	what was good → the branch's head → who signed it → the plan for this host → what the rules say → its bytes
//	→ ══ commit point: Journal.Save{Trying} ══ → the host → the gate's verdict → good, or back
//
// Before the commit point nothing on the host changes. After it there are three ways on: the gate passes and the commit is the good one;
// it fails, which is remembered first, and then the host is converged to the good commit by the same function and the commit is taken back
// in Git; or there is no data, and the same try goes on at the next look. A crash anywhere is repaired by the code that runs every
// day: what is compared is what the host has, never what was done last.
//
//	r := &reconciler.Reconciler{Source: repository, Trust: verifier, …}
//	rec, err := r.Reconcile(ctx) // rec.Outcome: converged, refused, waiting, reverted or stuck
package reconciler

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"

	"github.com/kindos/kmo/policy/audit"
	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/policy/trust"
)

// Commit is a commit as Git has it, not yet trusted.
type Commit = trust.Commit

// ErrMoved says that the branch is no longer where the caller believes it is: nothing was pushed.
var ErrMoved = errors.New("the branch has moved")

// ErrPushRefused says that the remote received the revert and will not have it: no permission, a protected branch.
var ErrPushRefused = errors.New("the remote refuses the push")

// Source is where commits come from and where reverts go: an untrusted carrier.
type Source interface {
	// Head returns the newest commit of the branch, fetched into quarantine, checked against limits and promoted. When nothing
	// is new it costs one look at the reference. A *refusal.Error says that what the remote sent must not be had; any other
	// error, that the remote did not answer. Beside an error the commit has its ID, if that is known, and nothing else.
	Head(context.Context) (Commit, error)
	// At returns a promoted commit by id, without the network.
	At(ctx context.Context, id string) (Commit, error)
	// Revert makes a signed commit (parent: r.Head, tree: that of r.Good) and pushes it with a lease on r.Head.
	// It must return ErrMoved if the branch is elsewhere, ErrPushRefused if the remote will not take it.
	Revert(ctx context.Context, r Revert) (Commit, error)
	trust.History
}

// Revert is what to take back and why. The range is every commit reachable from Head but not from Good.
type Revert struct {
	Good     string `json:"good"`     // the commit whose tree comes back
	Head     string `json:"head"`     // the commit on which the revert stands
	Unit     string `json:"unit"`     // the unit whose gate failed
	Gate     string `json:"gate"`     // what failed: "http /healthz"
	Evidence string `json:"evidence"` // what was seen, one line
	Host     string `json:"host"`     // who judged
}

// Outcome is how a reconcile ended.
type Outcome string

// The outcomes.
const (
	Converged Outcome = "converged" // the host runs what the head says, and it is healthy
	Refused   Outcome = "refused"   // the head must not run; what ran goes on running; a person must act
	Waiting   Outcome = "waiting"   // the world did not answer; tried again by itself
	Reverted  Outcome = "reverted"  // the head ran, was not healthy, and was taken back
	Stuck     Outcome = "stuck"     // the good commit itself does not pass, or repairs do not help; a person must act
)

// Record is what a host knows of itself: what was good, what was being tried, how the last reconcile ended.
type Record struct {
	Seq    uint64     `json:"seq"` // grows by one with each save
	Host   string     `json:"host"`
	Trust  uint64     `json:"trust,omitempty"`  // number of the trust state that was there; an older one is an alarm
	Audit  audit.Tree `json:"audit,omitzero"`   // the audit log that was there; one that does not go on from it is an alarm
	Good   string     `json:"good,omitempty"`   // the last commit that passed its gate
	Before string     `json:"before,omitempty"` // the last good one that ran something else here
	Trying string     `json:"trying,omitempty"` // set at the commit point, cleared by a verdict
	Bad    []Bad      `json:"bad,omitempty"`    // commits that failed here, newest first; never tried again by themselves
	// Allowed are Good's workloads that the rules have let run on this host, by name; Trial are Trying's. What a change of the host places
	// besides is judged before it is started.
	Allowed map[string]Placement `json:"allowed,omitempty"`
	Trial   map[string]Placement `json:"trial,omitempty"`
	Ending
}

// Ending is how a reconcile ended.
type Ending struct {
	Head    string    `json:"head,omitempty"` // the commit the outcome speaks of
	Outcome Outcome   `json:"outcome,omitempty"`
	Stage   string    `json:"stage,omitempty"`  // where it ended: "trust", "policy", "gate"
	Reason  string    `json:"reason,omitempty"` // one line a person can act on
	When    time.Time `json:"when,omitzero"`
	Clock   string    `json:"clock,omitempty"` // an alarm of this host's clock, that holds nothing up by itself: "E_TIME: …"
}

// Placement is how a workload may run: on which backend, and with what asked of it.
type Placement struct {
	Backend string `json:"backend"`
	Asked   string `json:"asked"` // digest of its health and gate
}

// Bad is a commit that ran on this host and was not healthy.
type Bad struct {
	Commit   string `json:"commit"`
	Unit     string `json:"unit"`
	Workload string `json:"workload"` // with its placement: never placed again by itself
	Placement
	Gate     string    `json:"gate"`
	Evidence string    `json:"evidence"`
	Revert   string    `json:"revert,omitempty"` // the commit that took it back; empty while it is not pushed
	Why      string    `json:"why,omitempty"`    // why there is no revert commit yet, or needs to be none
	When     time.Time `json:"when"`
}

// Journal keeps the host's record over a crash. It is trusted storage.
type Journal interface {
	// Load returns the record last saved, and the zero Record if none ever was.
	Load() (Record, error)
	// Save makes the record durable before it returns; after a crash Load returns the old one or the new one whole.
	Save(Record) error
}

// FileJournal is a Journal in one JSON file, replaced as a whole: after a crash it is the old one or the new one.
type FileJournal struct{ Path string }

// Load returns the record last saved. A file that is there but cannot be read as a record is E_STATE: it is never taken for an empty one.
func (j FileJournal) Load() (Record, error) {
	var rec Record
	text, err := os.ReadFile(j.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return rec, nil
	}
	if err != nil {
		return rec, fmt.Errorf("reading the journal: %w", err)
	}
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&rec); err != nil || rec.Seq == 0 {
		return Record{}, &refusal.Error{Code: "E_STATE", Subject: "the journal " + j.Path, Got: fmt.Sprintf("it does not hold a record (%v)", err),
			Want: "the file as kMO left it, from before it was damaged"}
	}
	return rec, nil
}

// Save replaces the file and returns once it would survive a power cut.
func (j FileJournal) Save(rec Record) error {
	text, err := json.MarshalIndent(rec, "", "  ")
	if err != nil {
		return fmt.Errorf("encoding the journal: %w", err)
	}
	beside := filepath.Dir(j.Path) // not wherever $TMPDIR is
	if err := renameio.WriteFile(j.Path, append(text, '\n'), 0o600, renameio.WithTempDir(beside)); err != nil {
		return fmt.Errorf("saving the journal: %w", err)
	}
	folder, err := os.Open(beside)
	if err != nil {
		return fmt.Errorf("saving the journal: %w", err)
	}
	return errors.Join(folder.Sync(), folder.Close())
}
