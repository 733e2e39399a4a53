package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/kindos/kmo/cmd/kmo/cli"
	"github.com/kindos/kmo/reconciler"
	"github.com/kindos/kmo/reconciler/template"
)

func agentCommand() *cobra.Command {
	flags := &hostFlags{makes: true}
	cmd := &cobra.Command{
		Use:   "agent",
		Short: "Keep this host as the branch says, until stopped",
		Long: `Keep this host as the branch says, until stopped. The branch is looked at when a push to a local repository is seen, when
'kmo reconcile' asks, and at every poll. Workloads go on running when the agent stops, and are found again when it starts.

Its file says which site and where; the last lines are as 'kmo site init' printed them:

  site: north-sea
  remote: ssh://git@git.example/north-sea.git
  zone: edge-a
  key: host.key
  trust:
    sha256: …
    kmo1: kmo1:sha3-256:…

Exit statuses: 0 stopped by a signal, 1 error, 3 refused (kMO's own state is not as it left it).`,
		Example: "  kmo agent --config /etc/kmo/agent.yaml\n  kmo agent --config agent.yaml --state /tmp/kmo",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			h, err := onceFree(cmd.Context(), func() (*host, error) { return openHost(cmd.Context(), flags, cmd.ErrOrStderr()) })
			if err != nil {
				return err
			}
			return errors.Join(h.serve(cmd.Context()), h.close())
		},
	}
	flags.add(cmd)
	return cmd
}

// registryWait is how long a look of the agent waits for registries before it goes on without. A command was asked for its one look.
const registryWait = 10 * time.Second

// serve runs the agent until ctx ends: the API on its socket, and the loop.
func (h *host) serve(ctx context.Context) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	listener, err := h.listen(ctx)
	if err != nil {
		return err
	}
	server := &http.Server{Handler: h.api(ctx), ReadHeaderTimeout: 10 * time.Second, MaxHeaderBytes: 64 << 10,
		BaseContext: func(net.Listener) context.Context { return ctx }}
	h.agent = true
	h.reconciler.Wait, h.preview.Wait = registryWait, registryWait
	var group sync.WaitGroup
	group.Go(func() {
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			h.logger.Error("listener", "err", err)
		}
	})
	h.logger.Info("agent", "site", h.config.Site, "branch", h.config.Branch, "zone", h.config.Zone, "version", version)
	err = h.loop(ctx)
	stop() // requests see their context end
	ended, cancel := background()
	defer cancel()
	if late := server.Shutdown(ended); late != nil { // until then they work with what the caller closes next
		h.logger.Error("requests that do not end", "err", errors.Join(late, server.Close()))
	}
	group.Wait()
	return err
}

// listen opens the API's unix socket: the agent listens on nothing else.
func (h *host) listen(ctx context.Context) (net.Listener, error) {
	path := filepath.Join(h.dir, "agent.sock")
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) { // the lock says that nobody else is there
		return nil, fmt.Errorf("clearing the old socket: %w", err)
	}
	listener, err := (&net.ListenConfig{}).Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listening for commands: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, listener.Close())
	}
	return listener, nil
}

// loop reconciles whenever something says "look again".
func (h *host) loop(ctx context.Context) error {
	pushed := h.source.Watch(ctx)
	delay := newDelay(time.Duration(h.config.Poll))
	for {
		rec, err := h.reconcileNow(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			h.logger.Error("reconcile", "err", err)
		}
		wait := delay.after(rec, err)
		if wait > 0 {
			debug.FreeOSMemory() // what a look needed is not kept through the rest
		}
		h.rest(ctx, pushed, time.Now().Add(wait))
	}
}

// probePause bounds how often what runs is probed, however often its units ask for it.
const probePause = 250 * time.Millisecond

// rest waits until the branch is to be looked at: at that time, after a push, or when the probes that are made meanwhile come to something new.
func (h *host) rest(ctx context.Context, pushed <-chan struct{}, look time.Time) {
	for probing := true; ; {
		wait, due := h.due()
		due = due && probing
		if left := time.Until(look); !due || left < wait {
			wait, due = left, false
		} else {
			wait = max(wait, probePause)
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-pushed:
		case <-timer.C:
			if due {
				news, err := h.probe(ctx)
				probing = err == nil // what does not answer now is for the next look to tell
				if !news {
					continue
				}
			}
		}
		timer.Stop()
		return
	}
}

func (h *host) due() (time.Duration, bool) {
	h.line.Lock()
	defer h.line.Unlock()
	return h.reconciler.Due()
}

func (h *host) probe(ctx context.Context) (news bool, err error) {
	h.line.Lock()
	defer h.line.Unlock()
	return h.reconciler.Probe(ctx)
}

// delay spaces the looks: the poll with jitter, sooner and then ever later while the world does not answer.
type delay struct {
	poll   time.Duration
	next   time.Duration
	revert string // the newest that was looked for at once
}

func newDelay(poll time.Duration) *delay { return &delay{poll: poll} }

// after returns how long to wait after a reconcile that ended so.
func (d *delay) after(rec reconciler.Record, err error) time.Duration {
	wait := d.poll
	if err == nil && rec.Trying != "" && rec.Stage == reconciler.StageWatch {
		return 0
	}
	if err != nil || rec.Outcome == reconciler.Waiting {
		d.next = min(max(2*d.next, time.Second), d.poll)
		wait = d.next
	} else {
		d.next = 0
		if rec.Outcome == reconciler.Reverted && rec.Head != rec.Good && len(rec.Bad) > 0 && rec.Bad[0].Revert != d.revert {
			d.revert = rec.Bad[0].Revert
			return 0 // the revert is the head now, unless the remote is slow to show it
		}
	}
	return wait*9/10 + rand.N(wait/5+1)
}

// reconcileNow reconciles, one at a time.
func (h *host) reconcileNow(ctx context.Context) (reconciler.Record, error) {
	h.line.Lock()
	defer h.line.Unlock()
	rec, err := h.reconciler.Reconcile(ctx)
	h.ended(rec, err)
	return rec, err
}

// slogLevel reads a level's name.
func slogLevel(name string) (slog.Level, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(name)); err != nil {
		return level, cli.Usagef("log level %q: want debug, info, warn or error", name)
	}
	return level, nil
}

// Config is the agent's file. Relative paths in it start from the file's folder.
type Config struct {
	Site     template.Name                     `json:"site" need:"yes" doc:"the site's name"`
	Remote   string                            `json:"remote" need:"yes" max:"4096" doc:"where the site's repository is: a path, file://, ssh://, https://, or http:// on the loopback"`
	Branch   template.Branch                   `json:"branch,omitempty" doc:"the branch this host follows, main if not given"`
	Trust    Pin                               `json:"trust" need:"yes" doc:"the trust root this host is pinned to, as 'kmo site init' and 'kmo site pin' print it"`
	Host     template.Name                     `json:"host,omitempty" doc:"this host's name, the machine's if not given"`
	Zone     template.Name                     `json:"zone" need:"yes" doc:"the zone of site.yaml this host is in"`
	Labels   map[template.Label]template.Label `json:"labels,omitempty" doc:"labels that units may ask for"`
	Devices  map[template.Name][]template.Path `json:"devices,omitempty" doc:"devices that units may ask for: for each name its nodes, such as /dev/video0"`
	Key      string                            `json:"key" need:"yes" max:"4096" doc:"this host's private SSH key, which signs reverts; mode 0600"`
	Poll     template.Duration                 `json:"poll,omitzero" doc:"how often the branch is looked at when nothing else says so, 30s if not given"`
	Check    template.Duration                 `json:"check,omitzero" doc:"how often the bytes of one running base are read again, 1m if not given"`
	Git      Git                               `json:"git,omitzero" doc:"credentials for the remote"`
	Images   Images                            `json:"images,omitzero" doc:"where images come from"`
	Backends []template.Name                   `json:"backends,omitempty" items:"0-16" unique:"yes" doc:"built-in backends of this host, native and wasm if not given"`
	Engines  map[template.Name]template.Path   `json:"engines,omitempty" doc:"where a built-in backend's runtime is, if not where it usually is: the socket of docker or podman, the kubeconfig of kubernetes, runsc for gvisor, for microvm a kernel or a folder with boot and lib/modules"`
	Plugins  Plugins                           `json:"plugins,omitzero" doc:"backends of others"`
	Log      string                            `json:"log,omitempty" enum:"debug info warn error" doc:"how much is logged, info if not given"`
}

// Pin is the two digests of the file trust/1.root.json, and what this host bounds by itself.
type Pin struct {
	SHA256  string `json:"sha256" need:"yes" max:"64" doc:"64 hex digits"`
	Kmo1    string `json:"kmo1" need:"yes" max:"100" doc:"its kmo1 root"`
	Reverts int    `json:"revertsPerDay,omitempty" min:"1" max:"1000" doc:"how many reverts are accepted without a quorum in 24 hours, 10 if not given; after that a person must sign the way back"`
}

// Git is where the credentials for the remote are. They are files and variables, never values.
type Git struct {
	User         string `json:"user,omitempty" max:"256" doc:"https: git if not given"`
	PasswordFile string `json:"passwordFile,omitempty" max:"4096" doc:"https: file with a password or token"`
	PasswordEnv  string `json:"passwordEnv,omitempty" max:"256" doc:"https: variable with it"`
	CAFile       string `json:"caFile,omitempty" max:"4096" doc:"https: PEM file instead of the system's authorities"`
	KeyFile      string `json:"keyFile,omitempty" max:"4096" doc:"ssh: private key; the agent's if not given"`
	KnownHosts   string `json:"knownHosts,omitempty" max:"4096" doc:"ssh: known_hosts file"`
}

// Images is where images come from beside their registries.
type Images struct {
	Mirror string `json:"mirror,omitempty" max:"4096" doc:"OCI layout folder that is asked first"`
}

// Plugins are backends from a folder. Only those whose checksum is given are used.
type Plugins struct {
	Folder string            `json:"folder,omitempty" max:"4096" doc:"where they are; nobody else may write there"`
	Pins   map[string]string `json:"pins,omitempty" doc:"sha256 of each, by name"`
}

// hostFlags are the flags of every command that speaks of this host.
type hostFlags struct {
	config, state string
	makes         bool // the state folder may be made; what only asks makes nothing
	glances       bool // without an agent the journal will do
	log           bool // without an agent the audit log will do
	command       bool // the host is opened for one command
}

func (f *hostFlags) add(cmd *cobra.Command) {
	if !f.log {
		cmd.Flags().StringVar(&f.config, "config", defaultConfig(), "the agent's file")
	}
	cmd.Flags().StringVar(&f.state, "state", defaultState(), "the folder of kMO's state")
}

func defaultConfig() string {
	if path := os.Getenv("KMO_CONFIG"); path != "" {
		return path
	}
	return "/etc/kmo/agent.yaml"
}

func defaultState() string {
	if path := os.Getenv("KMO_STATE"); path != "" {
		return path
	}
	if os.Geteuid() == 0 {
		return "/var/lib/kmo"
	}
	if path := os.Getenv("XDG_STATE_HOME"); path != "" {
		return filepath.Join(path, "kmo")
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "kmo-state"
	}
	return filepath.Join(home, ".local/state/kmo")
}

// loadConfig reads the agent's file, fills in what is not given and makes its paths absolute.
func loadConfig(path string) (Config, error) {
	var c Config
	text, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return c, fmt.Errorf("the agent's file %s is not there; 'kmo agent --help' shows one, --config names another", path)
	}
	if err != nil {
		return c, err
	}
	if err := template.Decode(path, text, &c); err != nil {
		return c, err
	}
	if c.Branch == "" {
		c.Branch = "main"
	}
	if c.Host == "" {
		name, err := os.Hostname()
		if err != nil {
			return c, err
		}
		c.Host = template.Name(name)
	}
	if c.Poll == 0 {
		c.Poll = template.Duration(30 * time.Second)
	}
	if c.Backends == nil {
		c.Backends = []template.Name{"native", "wasm"}
	}
	engines := map[string]string{}
	for name, at := range c.Engines {
		engines[string(name)] = string(at)
	}
	if err := checkEngines(engines); err != nil {
		return c, fmt.Errorf("%s: engines: %w", path, err)
	}
	folder := filepath.Dir(path)
	if !strings.Contains(c.Remote, ":") && c.Remote != "" && !filepath.IsAbs(c.Remote) { // a path, as no URL and no host:path is
		if c.Remote, err = filepath.Abs(filepath.Join(folder, c.Remote)); err != nil {
			return c, err
		}
	}
	for _, p := range []*string{&c.Key, &c.Git.PasswordFile, &c.Git.CAFile, &c.Git.KeyFile, &c.Git.KnownHosts, &c.Images.Mirror, &c.Plugins.Folder} {
		if *p == "" {
			continue
		}
		if !filepath.IsAbs(*p) {
			*p = filepath.Join(folder, *p)
		}
		if *p, err = filepath.Abs(*p); err != nil {
			return c, err
		}
	}
	return c, nil
}

// devices are the named devices that this host has: one with a node that is not there is none.
func (c Config) devices() map[string][]string {
	var found map[string][]string
	for name, nodes := range c.Devices {
		var list []string
		for _, node := range nodes {
			if _, err := os.Stat(string(node)); err == nil {
				list = append(list, string(node))
			}
		}
		if len(list) < len(nodes) {
			continue
		}
		if found == nil {
			found = map[string][]string{}
		}
		found[string(name)] = list
	}
	return found
}

// counts is what /metrics tells.
type counts struct {
	mu       sync.Mutex
	outcomes map[reconciler.Outcome]int
	errors   int
	last     reconciler.Record
	failure  string // why the last look came to no outcome
}

// failure says why the last look came to no outcome, "" if it came to one.
func (h *host) failure() string {
	h.counts.mu.Lock()
	defer h.counts.mu.Unlock()
	return h.counts.failure
}

// healthy is the agent's own health: whether it can do its work, not whether the branch is good.
func (h *host) healthy(w http.ResponseWriter, _ *http.Request) {
	if failure := h.failure(); failure != "" {
		http.Error(w, failure, http.StatusServiceUnavailable)
		return
	}
	_, _ = io.WriteString(w, "ok\n")
}

// ended counts one reconcile.
func (h *host) ended(rec reconciler.Record, err error) {
	h.counts.mu.Lock()
	defer h.counts.mu.Unlock()
	h.counts.failure = ""
	if err != nil {
		h.counts.errors++
		h.counts.failure, h.counts.last = err.Error(), reconciler.Record{}
		return
	}
	if h.counts.outcomes == nil {
		h.counts.outcomes = map[reconciler.Outcome]int{}
	}
	h.counts.outcomes[rec.Outcome]++
	h.counts.last = rec
}

// metrics is the text form that Prometheus reads. No label holds anything from outside.
func (h *host) metrics(w http.ResponseWriter, _ *http.Request) {
	h.counts.mu.Lock()
	defer h.counts.mu.Unlock()
	w.Header().Set("Content-Type", "text/plain; version=0.0.4")
	_, _ = fmt.Fprintln(w, "# HELP kmo_reconciles_total Reconciles by how they ended.\n# TYPE kmo_reconciles_total counter")
	for _, outcome := range []reconciler.Outcome{reconciler.Converged, reconciler.Refused, reconciler.Waiting, reconciler.Reverted, reconciler.Stuck} {
		_, _ = fmt.Fprintf(w, "kmo_reconciles_total{outcome=%q} %d\n", outcome, h.counts.outcomes[outcome])
	}
	_, _ = fmt.Fprintf(w, "# HELP kmo_reconcile_errors_total Reconciles that kMO's own state ended.\n# TYPE kmo_reconcile_errors_total counter\nkmo_reconcile_errors_total %d\n", h.counts.errors)
	_, _ = fmt.Fprintln(w, "# HELP kmo_outcome How the last reconcile ended: 1 for one outcome, 0 for the others.\n# TYPE kmo_outcome gauge")
	for _, outcome := range []reconciler.Outcome{reconciler.Converged, reconciler.Refused, reconciler.Waiting, reconciler.Reverted, reconciler.Stuck} {
		value := 0
		if h.counts.last.Outcome == outcome {
			value = 1
		}
		_, _ = fmt.Fprintf(w, "kmo_outcome{outcome=%q} %d\n", outcome, value)
	}
}
