package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/kindos/kmo/reconciler"
	"github.com/kindos/kmo/registry"
)

func demoCommand() *cobra.Command {
	d := &demo{}
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Play the whole story on this machine, in a temporary folder",
		Long: `Play the whole story on this machine, in a temporary folder: a site with three units, a registry on the loopback, an agent, and pushes
by real git. Nothing is installed and nothing is left, unless --keep leaves it running for play. With --backend two of the units run on that
backend, whose engine has to be there.

Exit statuses: 0 each act ended as it must, 1 one did not.`,
		Example: "  kmo demo\n  kmo demo --backend podman\n  kmo demo --keep",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if runtime.GOOS == "linux" && os.Geteuid() != 0 {
				return errors.New("the demo runs programs within bounds, for which native needs root: run it as root, or in a container of your own")
			}
			if err := d.engine(cmd); err != nil {
				return err
			}
			d.out = cmd.OutOrStdout()
			// Nobody who listens any more, or a terminal that goes away, is its end too: nothing is left then either.
			signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE) // a write is an error then, and no end at once
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGHUP)
			defer stop()
			return d.play(ctx)
		},
	}
	cmd.Flags().BoolVar(&d.keep, "keep", false, "leave everything running, and say where it is; Ctrl-C ends it")
	cmd.Flags().StringVar(&d.backend, "backend", "native", "what the units relay and ledger run on")
	cmd.Flags().StringVar(&d.enginePath, "engine", "", "where the backend's runtime is, if not where it usually is")
	cmd.Flags().StringVar(&d.programs, "programs", "", "folder with relay-1, relay-2 and bus.wasm, as make builds them; beside this binary if not given")
	return cmd
}

// demo is the stage: everything below dir.
//
//	dir/site.git   the remote that everybody pushes to
//	dir/site       the checked-out repository
//	dir/keys       of alice, bob, carol, dave and the host
//	dir/agent.yaml, dir/state, dir/agent.log
type demo struct {
	out      io.Writer
	keep     bool
	programs string
	backend  string

	enginePath string // of the backend, "" where it usually is
	dir        string
	self       string
	agent      *exec.Cmd
	ended      <-chan error // the agent's exit error, once it has ended; then closed
	registry   string
	pins       map[string]string // variant lines of unit.yaml by program
	begun      time.Time
}

// act is one push and how it must end.
type act struct {
	title   string
	push    func(context.Context) error
	outcome reconciler.Outcome
	says    string                                // in the record's reason
	check   func(context.Context) (string, error) // what else must be true; what it found is printed
}

func (d *demo) play(ctx context.Context) (err error) {
	d.begun = time.Now()
	if d.self, err = os.Executable(); err != nil {
		return err
	}
	if d.programs == "" {
		d.programs = filepath.Join(filepath.Dir(d.self), "programs")
	}
	if d.dir, err = os.MkdirTemp("", "kmo-demo-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.end(ctx, err)) }()
	if err := d.build(ctx); err != nil {
		return err
	}
	acts := d.acts()
	for i, act := range acts {
		if err := d.perform(ctx, i+1, act); err != nil {
			return err
		}
	}
	_, err = fmt.Fprintf(d.out, "\n%d acts ended as they must, in %.1f s\n", len(acts), time.Since(d.begun).Seconds())
	return err
}

// build makes the keys, the registry with its images, the site and the agent.
func (d *demo) build(ctx context.Context) error {
	if err := os.Mkdir(filepath.Join(d.dir, "keys"), 0o700); err != nil {
		return err
	}
	for _, name := range append(people(), "edge-1") {
		if _, err := newKey(d.key(name)); err != nil {
			return err
		}
	}
	if err := d.serveImages(ctx); err != nil {
		return err
	}
	if err := d.buildSite(ctx); err != nil {
		return err
	}
	return d.startAgent(ctx)
}

// engine sees that the backend can run the demo's units here.
func (d *demo) engine(cmd *cobra.Command) error {
	b, err := findBuiltIn(d.backend)
	if err != nil {
		return err
	}
	engines := map[string]string{}
	if d.enginePath != "" {
		engines[d.backend] = d.enginePath
	}
	all, err := look(cmd, []builtIn{b}, engines)
	if err != nil {
		return err
	}
	if f := all[0]; f.Trouble != "" {
		return fmt.Errorf("%s: %s", f.Backend, f.Trouble)
	}
	return nil
}

// format is what relay is on the demo's backend.
func (d *demo) format() registry.Format {
	switch format := registry.Format(d.backend); format {
	case registry.Native, registry.WASM, registry.AppImage:
		return format
	}
	return registry.OCI
}

// program is the file of a program in the format of the demo's backend.
func (d *demo) program(name string) string {
	return filepath.Join(d.programs, name+map[registry.Format]string{registry.WASM: ".wasm", registry.AppImage: ".AppImage"}[d.format()])
}

func people() []string { return []string{"alice", "bob", "carol", "dave"} }

func (d *demo) key(name string) string { return filepath.Join(d.dir, "keys", name) }

// serveImages starts a registry on the loopback and pushes the three programs to it.
func (d *demo) serveImages(ctx context.Context) error {
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	d.registry = listener.Addr().String()
	server := &http.Server{Handler: registry.Memory(), ReadHeaderTimeout: 10 * time.Second}
	context.AfterFunc(ctx, func() { _ = server.Close() })
	go func() { _ = server.Serve(listener) }() // ends with the process
	d.pins = map[string]string{}
	return withStore(func(store *registry.Store) error {
		for name, path := range map[string]string{"relay-1": d.program("relay-1"), "relay-2": d.program("relay-2"), "bus": filepath.Join(d.programs, "bus.wasm")} {
			if _, err := os.Stat(path); err != nil {
				return fmt.Errorf("the demo's programs are not built: %w; 'make demo' builds them", err)
			}
			as, backend := d.format(), d.backend
			if name == "bus" {
				as, backend = registry.WASM, string(registry.WASM)
			}
			if d.pins[name], err = d.pushImage(ctx, store, path, name, as); err != nil {
				return err
			}
			d.pins[name] += "    backends: [" + backend + "]\n"
		}
		return nil
	})
}

// pushImage pushes a program and returns the lines of unit.yaml that pin it.
func (d *demo) pushImage(ctx context.Context, store *registry.Store, path, name string, as registry.Format) (string, error) {
	place, err := registry.ParsePlace(d.registry + "/" + name)
	if err != nil {
		return "", err
	}
	ref, root, err := store.PushFile(ctx, path, place, as)
	return fmt.Sprintf("  - %s: %s\n    merkle: %s\n", as, ref, root), err
}

func (d *demo) buildSite(ctx context.Context) error {
	site, bare := filepath.Join(d.dir, "site"), filepath.Join(d.dir, "site.git")
	if _, err := d.run(ctx, d.dir, "git", "init", "-q", "--bare", "-b", "main", bare); err != nil {
		return err
	}
	if _, err := d.run(ctx, d.dir, "git", "clone", "-q", bare, site); err != nil {
		return err
	}
	args := []string{"site", "init", site, "--name", "north-sea", "--zone", "edge", "--registry", d.registry, "--sign", d.key("alice"), "--host", "edge-1=" + d.key("edge-1") + ".pub"}
	for _, name := range people() {
		args = append(args, "--person", name+"="+name+"@example.org="+d.key(name)+".pub")
	}
	pin, err := d.run(ctx, d.dir, d.self, args...)
	if err != nil {
		return err
	}
	config := fmt.Sprintf("site: north-sea\nremote: %s\nhost: edge-1\nzone: edge\nkey: %s\n%s", bare, d.key("edge-1"), pin)
	if d.backend != "native" && d.backend != "wasm" {
		config += "backends: [wasm, " + d.backend + "]\n"
	}
	if d.enginePath != "" {
		config += "engines: {" + d.backend + ": " + d.enginePath + "}\n"
	}
	return os.WriteFile(filepath.Join(d.dir, "agent.yaml"), []byte(config), 0o600)
}

func (d *demo) startAgent(ctx context.Context) error {
	log, err := os.Create(filepath.Join(d.dir, "agent.log"))
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	d.agent = exec.CommandContext(ctx, d.self, "agent", "--config", filepath.Join(d.dir, "agent.yaml"), "--state", d.state())
	d.agent.Stderr = log
	d.agent.Cancel = func() error { return d.agent.Process.Signal(syscall.SIGTERM) }
	d.agent.WaitDelay = 10 * time.Second
	if err := d.agent.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	d.ended = ended
	go func(agent *exec.Cmd) {
		ended <- agent.Wait()
		close(ended)
	}(d.agent)
	return nil
}

func (d *demo) state() string { return filepath.Join(d.dir, "state") }

// run runs a command and returns what it printed.
func (d *demo) run(ctx context.Context, dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1")
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", filepath.Base(name), args[0], err, strings.TrimSpace(said.String()))
	}
	return out.String(), nil
}

// git runs git in the checked-out site as alice.
func (d *demo) git(ctx context.Context, args ...string) (string, error) {
	as := []string{"-c", "user.name=alice", "-c", "user.email=alice@example.org", "-c", "gpg.format=ssh", "-c", "user.signingkey=" + d.key("alice")}
	return d.run(ctx, filepath.Join(d.dir, "site"), "git", append(as, args...)...)
}

// commit writes files (an empty text removes one), commits and pushes them as alice.
func (d *demo) commit(ctx context.Context, message string, sign bool, files map[string]string) error {
	for name, text := range files {
		path := filepath.Join(d.dir, "site", name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return err
		}
	}
	if _, err := d.git(ctx, "add", "-A"); err != nil {
		return err
	}
	args := []string{"commit", "-q", "-m", message}
	if sign {
		args = append(args, "-S")
	}
	if _, err := d.git(ctx, args...); err != nil {
		return err
	}
	_, err := d.git(ctx, "push", "-q", "origin", "main")
	return err
}

// approve has people approve what the branch changes, and pushes that as alice.
func (d *demo) approve(ctx context.Context, base, message string, who ...string) error {
	for _, name := range who {
		if _, err := d.run(ctx, filepath.Join(d.dir, "site"), d.self, "approve", "--yes", "--base", base, "--key", d.key(name)); err != nil {
			return err
		}
	}
	return d.commit(ctx, message, true, nil)
}

// perform plays one act and waits until the host has come to its end.
func (d *demo) perform(ctx context.Context, number int, a act) error {
	if err := a.push(ctx); err != nil {
		return fmt.Errorf("act %d, %s: %w", number, a.title, err)
	}
	pushed := time.Now()
	head, err := d.git(ctx, "rev-parse", "HEAD")
	if err != nil {
		return err
	}
	head = strings.TrimSpace(head)
	rec, err := d.wait(ctx, func(rec reconciler.Record) bool {
		if a.outcome == reconciler.Reverted {
			return rec.Outcome == a.outcome && len(rec.Bad) > 0 && rec.Bad[0].Commit == head && rec.Good == rec.Bad[0].Revert
		}
		return rec.Head == head && rec.Outcome == a.outcome && rec.Trying == ""
	})
	_, told := fmt.Fprintf(d.out, "\n%d. %s\n   pushed %s: %s after %d ms\n", number, a.title, short(head), rec.Outcome, time.Since(pushed).Milliseconds())
	err = errors.Join(err, told)
	if rec.Reason != "" {
		_, _ = fmt.Fprintf(d.out, "   %s: %s\n", rec.Stage, strings.ReplaceAll(rec.Reason, "\n", "\n   "))
	}
	if err != nil || !strings.Contains(rec.Reason, a.says) {
		return errors.Join(fmt.Errorf("act %d, %s: it ended %s at %s: %s; it must end %s and say %q", number, a.title, rec.Outcome, rec.Stage, rec.Reason, a.outcome, a.says), err)
	}
	if a.check == nil {
		return nil
	}
	found, err := a.check(ctx)
	if err != nil {
		return fmt.Errorf("act %d, %s: %w", number, a.title, err)
	}
	_, err = fmt.Fprintf(d.out, "   %s\n", strings.ReplaceAll(strings.TrimSpace(found), "\n", "\n   "))
	return err
}

// ask gets a page of a unit over HTTP, as its users do.
func (d *demo) ask(ctx context.Context, unit string) (string, error) {
	c, err := dial(ctx, &hostFlags{state: d.state()})
	if err != nil {
		return "", err
	}
	defer func() { _ = c.close() }()
	var s Status
	if err := c.get(ctx, http.MethodGet, "/status", nil, &s); err != nil {
		return "", err
	}
	for _, have := range s.Workloads {
		if have.Unit() != unit || len(have.Addresses) == 0 {
			continue
		}
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+have.Addresses[0].Address+"/", nil)
		if err != nil {
			return "", err
		}
		response, err := http.DefaultClient.Do(request)
		if err != nil {
			return "", err
		}
		defer func() { _ = response.Body.Close() }()
		page, err := io.ReadAll(io.LimitReader(response.Body, 1<<10))
		return strings.TrimSpace(string(page)), err
	}
	return "", fmt.Errorf("no workload of %s has an address", unit)
}

// serves checks that a unit answers with that text.
func (d *demo) serves(unit, want string) func(context.Context) (string, error) {
	return func(ctx context.Context) (string, error) {
		got, err := d.ask(ctx, unit)
		if err == nil && got != want {
			err = fmt.Errorf("%s answers %q, want %q", unit, got, want)
		}
		return unit + " answers: " + got, err
	}
}

// takenBack checks that the branch ends in a revert signed by the host, whose content is the good commit's, and that v1 serves.
func (d *demo) takenBack(ctx context.Context) (string, error) {
	if _, err := d.git(ctx, "pull", "-q", "--ff-only"); err != nil {
		return "", err
	}
	log, err := d.git(ctx, "log", "--oneline", "-3")
	if err != nil {
		return "", err
	}
	if same, err := d.git(ctx, "diff", "HEAD", "HEAD~2"); err != nil || same != "" || !strings.Contains(log, "Revert to") {
		return "", errors.Join(fmt.Errorf("the branch does not end in a revert to the good content: %s%s", log, same), err)
	}
	page, err := d.serves("relay", "relay 1")(ctx)
	return "git log:\n" + log + page, err
}

// wait asks the agent until done is content, for at most two minutes.
func (d *demo) wait(ctx context.Context, done func(reconciler.Record) bool) (reconciler.Record, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 2*time.Minute, errors.New("two minutes have gone by"))
	defer cancel()
	journal := reconciler.FileJournal{Path: filepath.Join(d.state(), "journal.json")}
	for {
		rec, err := journal.Load()
		if err == nil && done(rec) {
			return rec, nil
		}
		select {
		case <-ctx.Done():
			return rec, errors.Join(context.Cause(ctx), err)
		case how := <-d.ended:
			return rec, errors.Join(fmt.Errorf("the agent has ended: %v", cmp.Or(how, errors.New("exit status 0"))), context.Cause(ctx), err)
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// end stops the agent, has the workloads removed and clears the folder; with keep it waits to be interrupted first.
func (d *demo) end(ctx context.Context, played error) error {
	if d.keep && played == nil {
		_, _ = fmt.Fprintf(d.out, "\nit goes on running until Ctrl-C; play with it:\n  export KMO_CONFIG=%s/agent.yaml KMO_STATE=%s\n  %s status\n  cd %s/site\n", d.dir, d.state(), d.self, d.dir)
		<-ctx.Done()
	}
	var errs []error
	if d.ended != nil {
		_ = d.agent.Process.Signal(syscall.SIGTERM)
		for range d.ended { // however it ended
		}
		errs = append(errs, d.removeWorkloads())
	}
	if played != nil {
		log, _ := os.ReadFile(filepath.Join(d.dir, "agent.log"))
		errs = append(errs, fmt.Errorf("the agent's log:\n%s", log))
	}
	return errors.Join(append(errs, os.RemoveAll(d.dir))...)
}

// removeWorkloads removes what the agent ran: workloads outlive it.
func (d *demo) removeWorkloads() error {
	ctx, cancel := background()
	defer cancel()
	h, err := openHost(ctx, &hostFlags{config: filepath.Join(d.dir, "agent.yaml"), state: d.state()}, io.Discard)
	if err != nil {
		return err
	}
	all, err := h.observe(ctx)
	errs := []error{err}
	for _, have := range slices.Backward(all) {
		errs = append(errs, h.backends[have.Backend].Remove(ctx, have.Name))
	}
	return errors.Join(append(errs, h.close())...)
}
