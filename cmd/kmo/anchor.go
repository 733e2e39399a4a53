package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kindos/kmo/cmd/kmo/cli"
	"github.com/kindos/kmo/policy/audit"
	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/policy/trust"
	"github.com/kindos/kmo/reconciler"
)

// AnchorEntry is what the audit log keeps of an operator's word on what a host that has lost its memory goes on from.
type AnchorEntry struct {
	reconciler.About
	Root int    `json:"root"` // version of the trust root
	Lost string `json:"lost"` // what was the matter
	Good string `json:"good"` // what is kept running from then on
}

func stateCommand() *cobra.Command {
	flags := &hostFlags{command: true, makes: true}
	var root int
	var yes bool
	cmd := &cobra.Command{
		Use:   "anchor COMMIT",
		Short: "Name the commit that a host goes on from whose memory is lost",
		Long: `Name the commit that this host goes on from, where journal.json or trust.json is lost, damaged or older than it was (E_STATE). Without that word
it accepts nothing, for a remote could show it an old branch as a new one. Take the commit from where it is known: another host's 'kmo
status', or the people who push.

The commit must be of the branch as the remote has it now, signed, with that version of the trust root, and not behind anything that
this host still knows. It says what is lost and what will be, asks, and writes it to the audit log first. Stop the agent before.
A lost audit log is put back, or moved away together with journal.json: then it begins anew.

Exit statuses: 0 anchored, 1 error or not confirmed, 2 usage, 3 refused.`,
		Example: "  kmo state anchor 3f9a2c1d0b7e4f5a6c8d9e0f1a2b3c4d5e6f7a8b --root 2",
		Args:    cli.OneArg("the commit"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if root < 1 {
				return cli.Usagef("--root %d: want the version of the commit's trust root", root)
			}
			h, err := openLost(flags, cmd)
			if err == nil {
				err = h.anchor(cmd, args[0], root, yes)
			}
			return errors.Join(err, h.close())
		},
	}
	flags.add(cmd)
	cmd.Flags().IntVar(&root, "root", 0, "the version of the trust root that the commit has")
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cli.Group("state", "What this host remembers", cmd)
}

// openLost opens a host without its backends, whatever became of its journal.
func openLost(flags *hostFlags, cmd *cobra.Command) (h *host, err error) {
	h = &host{flags: flags, logger: slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: slog.LevelWarn}))}
	if h.config, err = loadConfig(flags.config); err != nil {
		return h, err
	}
	if h.dir, err = filepath.Abs(flags.state); err != nil {
		return h, err
	}
	if err := h.lockState(); err != nil {
		return h, err
	}
	if err := sweep(h.dir); err != nil {
		return h, err
	}
	rec, err := h.journal.Load()
	if err != nil {
		rec = reconciler.Record{} // which is what the anchor is for
	}
	if err := h.openAudit(rec.Audit); err != nil {
		return h, err
	}
	return h, h.openSource(cmd.Context())
}

// lost is what is the matter with this host's memory, the journal as far as it is good, and the commits that it still knows.
func (h *host) lost() (lost error, rec reconciler.Record, v *trust.Verifier, known []string, err error) {
	said, good, err := said(h.audit)
	if err != nil {
		return nil, rec, nil, nil, err
	}
	rec, bad := h.journal.Load()
	switch {
	case bad == nil && rec.Seq == 0:
		bad = noJournal(h.journal.Path)
	case bad == nil && rec.Seq < said:
		bad = &refusal.Error{Code: "E_STATE", Subject: "the journal", Got: fmt.Sprintf("record %d", rec.Seq), Want: fmt.Sprintf("record %d or a later one", said)}
	}
	known = []string{good, rec.Good} // an older one's too
	if bad != nil {                  // the number is above that of every journal that can come back
		rec = reconciler.Record{Seq: max(said, rec.Seq, uint64(time.Now().Unix())), Host: string(h.config.Host), Trust: rec.Trust}
	}
	if v, err = h.verifier(rec); err != nil {
		return nil, rec, nil, nil, err
	}
	state := v.Alarm()
	if state != nil && refusal.Of(state) == nil {
		return nil, rec, nil, nil, state
	}
	return errors.Join(bad, state), rec, v, slices.DeleteFunc(known, func(id string) bool { return id == "" }), nil
}

// said is what the audit log says of the journal: the number of its record, and the newest good commit of an outcome.
func said(log *audit.Log) (journal uint64, good string, err error) {
	err = log.Records(func(record audit.Record) error {
		var entry struct {
			Journal uint64 `json:"journal"`
			Good    string `json:"good"`
		}
		if record.Kind != "decision" && json.Unmarshal(record.Body, &entry) == nil {
			journal, good = max(journal, entry.Journal), cmp.Or(entry.Good, good)
		}
		return nil
	})
	return journal, good, err
}

func (h *host) anchor(cmd *cobra.Command, commit string, root int, yes bool) error {
	ctx := cmd.Context()
	lost, rec, verifier, known, err := h.lost()
	if err != nil {
		return err
	}
	if lost == nil {
		return &refusal.Error{Code: "E_STATE", Subject: h.dir, Got: "a memory with which nothing is the matter", Want: "no anchor: the branch alone says what comes next"}
	}
	head, err := h.source.Head(ctx)
	if err != nil {
		return err
	}
	id, err := h.commit(ctx, commit)
	if err != nil {
		return err
	}
	at, err := h.source.At(ctx, id)
	if err != nil {
		return err
	}
	if err := confirm(cmd, lost, at.ID, head.ID, root, yes); err != nil {
		return err
	}
	if err := verifier.MayAnchor(ctx, at, root, head.ID, known, h.source); err != nil {
		return err
	}
	if rec.Good == "" {
		rec.Good = at.ID
	}
	if rec.Trying != at.ID {
		rec.Trying, rec.Trial = "", nil
	}
	entry := AnchorEntry{About: reconciler.About{Commit: at.ID, Host: string(h.config.Host), Journal: rec.Seq}, Root: root, Lost: refusal.Clip(strings.ReplaceAll(lost.Error(), "\n", "; "), 1000), Good: rec.Good}
	if _, err := h.audit.Append("anchor", &entry); err != nil {
		return fmt.Errorf("audit log: %w", err)
	}
	if err := h.anchored(ctx, verifier, at, root, head.ID, known, rec); err != nil {
		return err
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "anchored at %s with trust root %d: what runs is %s, and the branch goes on from there\n", at.ID, root, rec.Good)
	return err
}

// anchored writes the state, and last the journal, which knows it and the audit log.
func (h *host) anchored(ctx context.Context, v *trust.Verifier, at reconciler.Commit, root int, head string, known []string, rec reconciler.Record) (err error) {
	if rec.Trust, err = v.Anchor(ctx, at, root, head, known, h.source); err != nil {
		return err
	}
	if rec.Audit, err = h.audit.Tree(); err != nil {
		return fmt.Errorf("audit log: %w", err)
	}
	rec.Seq++
	return h.journal.Save(rec)
}

// confirm says what is lost and what will be, and asks.
func confirm(cmd *cobra.Command, lost error, commit, head string, root int, yes bool) error {
	out := cmd.ErrOrStderr()
	for _, one := range refusal.All(lost) {
		_, _ = fmt.Fprintf(out, "lost: %v\n", one)
	}
	_, _ = fmt.Fprintf(out, "this host goes on from %s, with trust root %d; the branch is at %s\n", commit, root, head)
	if yes {
		return nil
	}
	_, _ = fmt.Fprintf(out, "Type the first eight digits of the commit to go on from it: ")
	answer, _ := bufio.NewReader(cmd.InOrStdin()).ReadString('\n') // no answer is no
	if strings.TrimSpace(answer) != commit[:8] {
		return errors.New("not anchored")
	}
	return nil
}
