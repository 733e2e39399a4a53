package main

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/kindos/kmo/cmd/kmo/cli"
	"github.com/kindos/kmo/cmd/kmo/vsa"
	"github.com/kindos/kmo/policy/audit"
	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/registry"
)

func auditCommand() *cobra.Command {
	return cli.Group("audit", "The log of what this host decided: look at it, verify it, prove what is in it",
		auditListCommand(), auditShowCommand(), auditVerifyCommand(), auditProveCommand(), auditCheckCommand(), auditExportCommand())
}

// openLog opens nothing of this host but the audit log, which it leaves as it is: what else is wrong with the host's state keeps nobody from it.
func openLog(flags *hostFlags) (c *client, err error) {
	h := &host{flags: flags}
	defer func() {
		if err != nil {
			err = errors.Join(err, h.close())
		}
	}()
	if h.dir, err = filepath.Abs(flags.state); err != nil {
		return nil, err
	}
	if err := h.lockState(); err != nil {
		return nil, err
	}
	key, err := auditKey(h.dir, false)
	if err != nil {
		return nil, err
	}
	public, _ := key.Public().(ed25519.PublicKey)
	if h.audit, err = audit.Read(filepath.Join(h.dir, "audit"), public); err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	h.logAPI(mux)
	return &client{http: http.Client{Transport: &local{handler: mux}}, close: h.close}, nil
}

// logAPI is the part of the API that needs nothing but the audit log.
func (h *host) logAPI(mux *http.ServeMux) {
	mux.HandleFunc("GET /log", answer(func(r *http.Request) (any, error) { return h.verified(r.FormValue("since")) }))
	mux.HandleFunc("GET /log/records", h.records)
	mux.HandleFunc("GET /log/record", answer(func(r *http.Request) (any, error) {
		return h.shown(r.Context(), indexOf(r), r.FormValue("replay") == "true")
	}))
	mux.HandleFunc("GET /log/proof", answer(func(r *http.Request) (any, error) { return h.audit.Prove(indexOf(r)) }))
}

// indexOf is a request's index; the client checked it.
func indexOf(r *http.Request) int64 {
	index, _ := strconv.ParseInt(r.FormValue("index"), 10, 64)
	return index
}

// records streams the last records of one kind, of one commit, or of all, oldest first, one a line; the first line is how many there are.
func (h *host) records(w http.ResponseWriter, r *http.Request) {
	last, _ := strconv.Atoi(r.FormValue("last")) // the client checked it; 0 is all
	kind, commit := r.FormValue("kind"), r.FormValue("commit")
	id, err := h.judged(commit)
	if err != nil {
		reply(w, err)
		return
	}
	commit = cmp.Or(id, commit)
	var all []int64
	if err := h.audit.Records(func(record audit.Record) error {
		if (kind == "" || record.Kind == kind) && (commit == "" || record.SpeaksOf(commit)) {
			all = append(all, record.Index)
		}
		return nil
	}); err != nil {
		reply(w, err)
		return
	}
	if last > 0 {
		all = all[max(0, len(all)-last):]
	}
	w.Header().Set("Trailer", cutShort)
	encoder := json.NewEncoder(w)
	_ = encoder.Encode(len(all))
	for _, index := range all {
		record, err := h.audit.Record(index)
		if err != nil {
			w.Header().Set(cutShort, err.Error())
			return
		}
		_ = encoder.Encode(record) // who has stopped reading needs none
	}
}

// records asks for records, calls f with each, and returns how many there are.
func (c *client) records(ctx context.Context, query url.Values, f func(audit.Record) error) (n int, err error) {
	body, err := c.do(ctx, "GET", "/log/records", query)
	if err != nil {
		return 0, err
	}
	defer func() { _ = body.Close() }()
	decoder := json.NewDecoder(body)
	if err := decoder.Decode(&n); err != nil {
		return 0, fmt.Errorf("reading the records: %w", err)
	}
	for range n {
		var record audit.Record
		if err := decoder.Decode(&record); err != nil {
			return n, fmt.Errorf("reading the records: %w", err)
		}
		if err := f(record); err != nil {
			return n, err
		}
	}
	return n, nil
}

// listed is a record in one line.
type listed struct {
	Index  int64     `json:"index"`
	Time   time.Time `json:"time"`
	Kind   string    `json:"kind"`
	Commit string    `json:"commit,omitempty"`
	Text   string    `json:"text"`
}

// headline is what a record says, in one line.
func headline(record audit.Record) string {
	lines := inWords(record)
	text := strings.TrimSpace(strings.TrimPrefix(lines[0], record.Kind+":"))
	if text == "" && len(lines) > 1 {
		text = lines[1]
	}
	return refusal.Clip(text, 200)
}

func auditListCommand() *cobra.Command {
	out, flags := &cli.Output{}, &hostFlags{log: true}
	var last int
	var kind, commit string
	cmd := &cobra.Command{
		Use:   "list",
		Short: "The last records, oldest first, each in one line",
		Long: `The last records of this host's audit log, oldest first, each in one line: its index, when, of which kind, about which commit, and what it says.
The kinds are decision, gate, outcome, revert, repair and drift.

Exit statuses: 0 good, 1 error, 2 usage, 3 refused (the log is not as it was written).`,
		Example: "  kmo audit list -n 100 --kind decision\n  kmo audit list --commit 3f9a2c1d -o json | jq -r '.[].text'",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			commit = strings.ToLower(commit)
			if last < 0 {
				return cli.Usagef("-n %d: want 0 (all) or more records", last)
			}
			if commit != "" && !abbreviated(commit) {
				return cli.Usagef("--commit %q: want at least four hex digits of a commit's id", commit)
			}
			c, err := dial(cmd.Context(), flags)
			if err != nil {
				return err
			}
			defer func() { _ = c.close() }()
			all := []listed{}
			query := url.Values{"last": {strconv.Itoa(last)}, "kind": {kind}, "commit": {commit}}
			if _, err := c.records(cmd.Context(), query, func(r audit.Record) error {
				all = append(all, listed{r.Index, r.Time, r.Kind, r.Commit, headline(r)})
				return nil
			}); err != nil {
				return err
			}
			return out.Print(cmd.OutOrStdout(), all, func(w io.Writer) {
				table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
				_, _ = fmt.Fprintln(table, "INDEX\tTIME\tKIND\tCOMMIT\tWHAT")
				for _, one := range all {
					_, _ = fmt.Fprintf(table, "%d\t%s\t%s\t%s\t%s\n", one.Index, one.Time.Local().Format(time.DateTime), one.Kind, short(one.Commit), one.Text)
				}
				_ = table.Flush()
			})
		},
	}
	flags.add(cmd)
	out.Add(cmd)
	cmd.Flags().IntVarP(&last, "last", "n", 50, "how many of the last records; 0 is all")
	cmd.Flags().StringVar(&kind, "kind", "", "only records of this kind")
	cmd.Flags().StringVar(&commit, "commit", "", "only records that speak of this commit")
	return cmd
}

func auditShowCommand() *cobra.Command {
	return ask(&cobra.Command{
		Use:   "show INDEX",
		Short: "One record whole, and of a decision whether it comes out the same again",
		Long: `One record of this host's audit log, in words. Of a decision it says the digests of what was judged and of the rules that judged, and makes it
again from the two: the answer must be the same to the byte, but for the time that it took. With -o json it is the whole record, input and all.

Exit statuses: 0 good, 1 error (there is no such record), 2 usage, 3 refused (the log is not as it was written), or the replay differs.`,
		Example: "  kmo audit show 12\n  kmo audit show 12 -o json | jq .record.body.decision.input",
		Args:    indexArg,
	}, &hostFlags{}, "GET", "/log/record", func(args []string) url.Values { return url.Values{"index": args, "replay": {"true"}} }, printShown, func(s Shown) error {
		if strings.HasPrefix(s.Replayed, differs) {
			return cli.Status(cli.ExitRefused)
		}
		return nil
	})
}

// indexArg is the rule of commands that take a record's index.
func indexArg(cmd *cobra.Command, args []string) error {
	if err := cli.OneArg("the index of a record")(cmd, args); err != nil {
		return err
	}
	if n, err := strconv.ParseInt(args[0], 10, 64); err != nil || n < 0 {
		return cli.Usagef("record %q: want its index, as 'kmo audit list' shows it", refusal.Clip(args[0], 60))
	}
	return nil
}

func printShown(w io.Writer, s Shown) {
	_, _ = fmt.Fprintf(w, "record %d of %s\n", s.Record.Index, s.Log)
	printWhole(w, s.Record)
	for _, line := range []struct{ name, text string }{{"input", s.Input}, {"policy", s.Policy}} {
		if line.text != "" {
			_, _ = fmt.Fprintf(w, "  %-7s %s\n", line.name, line.text)
		}
	}
	if s.Replayed != "" {
		_, _ = fmt.Fprintf(w, "  %s\n", refusal.Clip(s.Replayed, 500))
	}
}

// printWhole prints what a record says, all of it in words.
func printWhole(w io.Writer, record audit.Record) {
	_, _ = fmt.Fprintf(w, "  time    %s\n", record.Time.Local().Format(time.DateTime))
	if record.Commit != "" {
		_, _ = fmt.Fprintf(w, "  commit  %s\n", record.Commit)
	}
	_, _ = fmt.Fprintf(w, "  %s\n", strings.Join(inWords(record), "\n    "))
}

// maxCheckpoint bounds a kept checkpoint: it has three lines and some signatures.
const maxCheckpoint = 16 << 10

func auditVerifyCommand() *cobra.Command {
	since := ""
	query := func([]string) url.Values { return url.Values{"since": {since}} }
	cmd := ask(&cobra.Command{
		Use:   "verify",
		Short: "Read the whole log again, and see that it is what was signed",
		Long: `Read the whole audit log of this host again from the disk, and see that it is what its checkpoint says, that the key has signed, and what the
journal has seen of it. It says how many records there are, the root of the tree over them, the key that others check with, and when the last one
was written. A running agent is asked; without one nothing is needed but the state folder, and nothing in it is changed.

Who can write this host's disk can put all of it back to an older state, or sign another log with its key. That is seen with --since, which takes
a checkpoint that another machine has kept: the log must go on from it.

Exit statuses: 0 good, 1 error, or the journal cannot be read, 2 usage, 3 refused (the log is not as it was written).`,
		Example: "  kmo audit verify\n  kmo audit verify --since edge-1.checkpoint\n  kmo audit verify -o json | jq -r .checkpoint >edge-1.checkpoint",
		Args:    cobra.NoArgs,
	}, &hostFlags{log: true}, "GET", "/log", query, printVerified, func(v Verified) error {
		if v.Trouble != "" {
			return cli.Status(cli.ExitError)
		}
		return nil
	})
	file := ""
	cmd.Flags().StringVar(&file, "since", "", "a file with a checkpoint of this log that was kept elsewhere")
	verify := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if file != "" {
			text, err := os.ReadFile(file)
			if err != nil {
				return fmt.Errorf("--since: %w", err)
			}
			if len(text) == 0 || len(text) > maxCheckpoint {
				return &refusal.Error{Code: "E_LIMIT", Subject: "--since " + file, Got: fmt.Sprintf("%d bytes", len(text)), Want: fmt.Sprintf("a checkpoint, of at most %d", maxCheckpoint)}
			}
			since = string(text)
		}
		return verify(cmd, args)
	}
	return cmd
}

func printVerified(w io.Writer, v Verified) {
	_, _ = fmt.Fprintf(w, "%s: %d records, as they were written\n  root  %s\n  key   %s\n", v.Log, v.Size, v.Root, v.Key)
	if !v.Last.IsZero() {
		_, _ = fmt.Fprintf(w, "  last  %s\n", v.Last.Local().Format(time.DateTime))
	}
	if v.Since.N > 0 {
		_, _ = fmt.Fprintf(w, "  it goes on from the %d records of the kept checkpoint\n", v.Since.N)
	}
	if v.Trouble != "" {
		_, _ = fmt.Fprintf(w, "  whether it is the newest of them is not known: %s\n", v.Trouble)
	}
}

func auditProveCommand() *cobra.Command {
	flags := &hostFlags{log: true}
	out := ""
	cmd := &cobra.Command{
		Use:   "prove INDEX",
		Short: "Make a proof that a record is in the log, for another machine to check",
		Long: `Make a proof that a record is in this host's audit log: the record, the hashes from it up to the root, and the signed checkpoint. It is a C2SP
tlog-proof (c2sp.org/tlog-proof@v1). Whoever has the log's key checks it with 'kmo audit check', or with other code of that format.

Exit statuses: 0 made, 1 error (there is no such record), 2 usage, 3 refused (the log is not as it was written).`,
		Example: "  kmo audit prove 12 --out 12.tlog-proof",
		Args:    indexArg,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := dial(cmd.Context(), flags)
			if err != nil {
				return err
			}
			defer func() { _ = c.close() }()
			var proof []byte
			if err := c.get(cmd.Context(), "GET", "/log/proof", url.Values{"index": args}, &proof); err != nil {
				return err
			}
			if out != "" {
				return os.WriteFile(out, proof, 0o644)
			}
			_, err = cmd.OutOrStdout().Write(proof)
			return err
		},
	}
	flags.add(cmd)
	cmd.Flags().StringVar(&out, "out", "", "the file to write; the standard output if not given")
	return cmd
}

func auditCheckCommand() *cobra.Command {
	out, key := &cli.Output{}, ""
	cmd := &cobra.Command{
		Use:   "check PROOF",
		Short: "Check a proof of another host's log, on any machine",
		Long: `Check a proof that 'kmo audit prove' has made, and say which record it shows, of which log, and how many records that had when it signed them.
Nothing of this host is needed but the file ('-' is the standard input) and the log's key, which 'kmo audit verify' prints where the log is. What does
not fit is refused with its place in the file.

Exit statuses: 0 the record is in the log, 1 error, 2 usage, 3 refused (the proof shows nothing).`,
		Example: "  kmo audit check 12.tlog-proof --key edge-1.north-sea/kmo-audit+0377ade0+AWdw…",
		Args:    cli.OneArg("the file of a proof"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if key == "" {
				return cli.Usagef("audit check needs --key KEY, which 'kmo audit verify' prints where the log is")
			}
			file, err := readNamed(args[0], cmd.InOrStdin())
			if err != nil {
				return err
			}
			proven, err := audit.Check(file, key)
			if err != nil {
				return err
			}
			return out.Print(forPeople(cmd.OutOrStdout()), proven, func(w io.Writer) {
				_, _ = fmt.Fprintf(w, "record %d is in %s, which had %d records when it signed this\n", proven.Record.Index, proven.Log, proven.Size)
				printWhole(w, proven.Record)
			})
		},
	}
	out.Add(cmd)
	cmd.Flags().StringVar(&key, "key", "", "the log's key")
	return cmd
}

func auditExportCommand() *cobra.Command {
	flags := &hostFlags{log: true}
	var as, key string
	cmd := &cobra.Command{
		Use:   "export COMMIT|INDEX",
		Short: "A decision as a signed attestation that others understand",
		Long: `Print a decision as a SLSA Verification Summary Attestation (https://slsa.dev/verification_summary/v1): an in-toto statement whose subjects are the
commit and the images of the units that it changes here, in a DSSE envelope that this host's key signs. Of a commit it is the newest decision. A
number of fewer than seven digits is an index.

Exit statuses: 0 good, 1 error (there is no such decision), 2 usage, 3 refused (the record is no decision, or the log is not as it was written).`,
		Example: "  kmo audit export 3f9a2c1d --as vsa >relay.vsa.json\n  kmo audit export 12 --as vsa --key ~/.ssh/id_ed25519",
		Args:    cli.OneArg("a commit or the index of a record"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if as != "vsa" {
				return cli.Usagef("--as %q: want vsa", as)
			}
			shown, err := decisionOf(cmd.Context(), flags, strings.ToLower(args[0]))
			if err != nil {
				return err
			}
			statement, err := vsa.Of(shown.Record, shown.Log)
			if err != nil {
				return err
			}
			if key == "" {
				config, err := loadConfig(flags.config)
				if err != nil {
					return err
				}
				key = config.Key
			}
			signer, err := cli.PrivateKey(key)
			if err != nil {
				return err
			}
			envelope, err := registry.SignStatement(statement, signer)
			if err == nil {
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s\n", envelope)
			}
			return err
		},
	}
	flags.add(cmd)
	cmd.Flags().StringVar(&flags.config, "config", defaultConfig(), "the agent's file, which names this host's key")
	cmd.Flags().StringVar(&as, "as", "", "the form: vsa")
	cmd.Flags().StringVar(&key, "key", "", "the private key file that signs; this host's if not given")
	return cmd
}

// decisionOf is the record with that index, or the newest decision about that commit.
func decisionOf(ctx context.Context, flags *hostFlags, which string) (s Shown, err error) {
	c, err := dial(ctx, flags)
	if err != nil {
		return s, err
	}
	defer func() { _ = c.close() }()
	index := which
	if strings.Trim(which, "0123456789") != "" || len(which) >= 7 { // one commit in 27 begins with seven digits; no log is that long
		if !abbreviated(which) {
			return s, cli.Usagef("%q: want the index of a record, or at least four hex digits of a commit's id", refusal.Clip(which, 60))
		}
		n, err := c.records(ctx, url.Values{"last": {"1"}, "kind": {"decision"}, "commit": {which}}, func(r audit.Record) error {
			index = strconv.FormatInt(r.Index, 10)
			return nil
		})
		if err == nil && n == 0 {
			err = fmt.Errorf("commit %s: there is no decision about it; 'kmo explain' says what there is", which)
		}
		if err != nil {
			return s, err
		}
	}
	err = c.get(ctx, "GET", "/log/record", url.Values{"index": {index}}, &s)
	return s, err
}
