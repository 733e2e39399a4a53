package main

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/plugin"
	"github.com/kindos/kmo/cmd/kmo/thishost"
	"github.com/kindos/kmo/policy"
	"github.com/kindos/kmo/policy/audit"
	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/policy/trust"
	"github.com/kindos/kmo/policy/trust/signature"
	"github.com/kindos/kmo/reconciler"
	"github.com/kindos/kmo/reconciler/gitrepo"
	"github.com/kindos/kmo/reconciler/template"
	"github.com/kindos/kmo/registry"
	"github.com/kindos/kmo/registry/merkle"
	"github.com/kindos/kmo/rego"
)

// host is this host, opened: everything that the agent and the one-shot commands work with. Its state folder:
//
//	lock            held (flock) while the host is open
//	agent.sock      the running agent's commands
//	journal.json    what was good, what is being tried
//	trust.json      what was accepted
//	audit/          the log of decisions; audit.key signs it
//	site/           the bare copy of the site's branch
//	images/         verified content
//	backends/NAME/  a backend's own state
//	plugins/        sockets of plugin processes
type host struct {
	flags      *hostFlags
	config     Config
	dir        string
	logger     *slog.Logger
	lock       *os.File
	source     *gitrepo.Repository
	audit      *audit.Log
	journal    reconciler.FileJournal
	backends   map[string]backends.Backend
	release    []func() error // of plugins, and then of what the doors lie in
	reconciler *reconciler.Reconciler
	preview    preview
	agent      bool
	line       sync.Mutex // one reconcile or probe at a time
	counts     counts
}

// preview plans beside a running reconcile, with caches of its own; one plan at a time.
type preview struct {
	sync.Mutex
	*reconciler.Reconciler
}

// openHost opens this host for one process: it takes the lock and starts the backends' plugins.
func openHost(ctx context.Context, flags *hostFlags, stderr io.Writer) (h *host, err error) {
	if err := thishost.Supported(); err != nil {
		return nil, err
	}
	h = &host{backends: map[string]backends.Backend{}, flags: flags}
	defer func() {
		if err != nil {
			err = errors.Join(err, h.close())
		}
	}()
	if h.config, err = loadConfig(flags.config); err != nil {
		return h, err
	}
	level := slog.LevelInfo
	if flags.command {
		level = slog.LevelWarn // it says itself how it ended
	}
	if h.config.Log != "" {
		if level, err = slogLevel(h.config.Log); err != nil {
			return h, err
		}
	}
	h.logger = slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: level}))
	if h.dir, err = filepath.Abs(flags.state); err != nil {
		return h, err
	}
	for _, open := range []func(context.Context) error{h.openState, h.openSource, h.openBackends, h.openReconciler} {
		if err := open(ctx); err != nil {
			return h, err
		}
	}
	return h, nil
}

// errInUse says that another kmo process holds the state folder's lock: a command for a moment, or an agent that is starting or running.
var errInUse = errors.New("in use by another kmo process")

// onceFree tries again while the state folder is in use, for at most ten seconds.
func onceFree[T any](ctx context.Context, try func() (T, error)) (T, error) {
	for deadline := time.Now().Add(10 * time.Second); ; {
		value, err := try()
		if !errors.Is(err, errInUse) || time.Now().After(deadline) {
			return value, err
		}
		select {
		case <-ctx.Done():
			return value, context.Cause(ctx)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// lockState claims and locks the state folder.
func (h *host) lockState() error {
	if err := claim(h.dir, h.flags.makes); err != nil {
		return err
	}
	lock, err := os.OpenFile(filepath.Join(h.dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	h.lock = lock
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		who, _ := io.ReadAll(io.LimitReader(lock, 200)) // for people only
		return fmt.Errorf("the state folder %s: %w: %s", h.dir, errInUse, refusal.Clip(strings.TrimSpace(string(who)), 200))
	} else if err != nil {
		return fmt.Errorf("locking the state folder %s: %w", h.dir, err)
	}
	h.journal = reconciler.FileJournal{Path: filepath.Join(h.dir, "journal.json")}
	return errors.Join(lock.Truncate(0), h.sign())
}

// openState takes the state folder and opens the audit log.
func (h *host) openState(context.Context) error {
	if err := h.lockState(); err != nil {
		return err
	}
	if err := sweep(h.dir); err != nil {
		return err
	}
	rec, err := h.journal.Load()
	if err != nil {
		return err
	}
	return h.openAudit(rec.Audit)
}

// openAudit opens the audit log, which must go on from what was seen of it.
func (h *host) openAudit(seen audit.Tree) error {
	key, err := auditKey(h.dir, true)
	if err != nil {
		return err
	}
	h.audit, err = audit.Open(audit.Options{Dir: filepath.Join(h.dir, "audit"), Name: string(h.config.Host) + "." + string(h.config.Site) + "/kmo-audit", Key: key, Seen: seen})
	return err
}

// claim sees that dir is kMO's own, or makes it so where it may: a new or an empty folder. One that holds anything else is somebody's, and
// nothing in it is touched.
func claim(dir string, makes bool) error {
	list, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("the state folder: %w", err)
	}
	ours := slices.ContainsFunc(list, func(one fs.DirEntry) bool { return one.Name() == "lock" && one.Type().IsRegular() })
	switch {
	case len(list) > 0 && !ours:
		return &refusal.Error{Code: "E_STATE", Subject: "the state folder " + dir, Got: "other files and no lock: kMO did not make it",
			Want: "a new or an empty folder, or the one that kMO made (--state, or KMO_STATE)"}
	case !ours && !makes:
		return fmt.Errorf("no state folder %s: no agent has run here; --state or KMO_STATE names another", dir)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	found, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if of, ok := found.Sys().(*syscall.Stat_t); ok && int(of.Uid) != os.Geteuid() { // its owner could exchange what is in it
		return &refusal.Error{Code: "E_STATE", Subject: "the state folder " + dir, Got: fmt.Sprintf("a folder of user %d", of.Uid),
			Want: fmt.Sprintf("one of user %d, who runs kMO", os.Geteuid())}
	}
	return os.Chmod(dir, 0o700)
}

// sweep removes what a process killed while it replaced a file has left beside it in the state folder, which is locked: a dot, the file's name
// and a number.
func sweep(dir string) error {
	for _, name := range []string{"journal.json", "trust.json", "audit.key", "audit/checkpoint"} {
		folder, file := filepath.Split(filepath.Join(dir, name))
		list, err := os.ReadDir(folder)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		for _, one := range list {
			number, is := strings.CutPrefix(one.Name(), "."+file)
			if !is || number == "" || strings.Trim(number, "0123456789") != "" {
				continue
			}
			if err := os.Remove(filepath.Join(folder, one.Name())); err != nil {
				return fmt.Errorf("removing a half-written file: %w", err)
			}
		}
	}
	return nil
}

// syncFolder returns once the names in a folder would survive a power cut.
func syncFolder(path string) error {
	folder, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(folder.Sync(), folder.Close())
}

// auditKey reads the key that signs the audit log's checkpoints, and makes one on a new host if it may.
func auditKey(folder string, makes bool) (ed25519.PrivateKey, error) {
	path := filepath.Join(folder, "audit.key")
	seed, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && makes {
		seed = make([]byte, ed25519.SeedSize)
		if _, err := rand.Read(seed); err != nil {
			return nil, err
		}
		if err := renameio.WriteFile(path, seed, 0o600, renameio.WithTempDir(folder)); err != nil { // half a key would be an alarm for ever
			return nil, err
		}
		if err := syncFolder(folder); err != nil {
			return nil, err
		}
	} else if errors.Is(err, fs.ErrNotExist) {
		return nil, &refusal.Error{Code: "E_STATE", Subject: path, Got: "no key", Want: "the key as kMO made it: what the log's checkpoints are signed with"}
	} else if err != nil {
		return nil, err
	}
	if len(seed) != ed25519.SeedSize {
		return nil, &refusal.Error{Code: "E_STATE", Subject: path, Got: fmt.Sprintf("%d bytes", len(seed)), Want: "the key as kMO made it"}
	}
	return ed25519.NewKeyFromSeed(seed), nil
}

// sign says in the lock's file who holds it.
func (h *host) sign() error {
	_, err := fmt.Fprintf(h.lock, "process %d, kmo %s\n", os.Getpid(), strings.Join(os.Args[1:], " "))
	return err
}

func (h *host) openSource(context.Context) error {
	signer, err := signature.LoadKey(h.config.Key, nil)
	if err != nil {
		return fmt.Errorf("this host's key: %w", err)
	}
	source := &gitrepo.Repository{
		Dir: filepath.Join(h.dir, "site"), Remote: h.config.Remote, Branch: string(h.config.Branch), Auth: gitrepo.Auth(h.config.Git),
		Signer: signer, Name: "kMO on " + string(h.config.Host), Email: "kmo@" + string(h.config.Host),
		Keep: h.kept, Logger: h.logger,
	}
	if err := source.Open(); err != nil {
		return err
	}
	h.source = source
	return nil
}

// kept are the commits that this host goes back to or compares with: what its copy of the branch must never lose.
func (h *host) kept() ([]string, error) {
	rec, err := h.journal.Load()
	if err != nil {
		return nil, err
	}
	state, err := h.trusted().Load()
	if errors.Is(err, fs.ErrNotExist) && rec.Good == "" && rec.Trying == "" {
		err = nil // a new host
	}
	ids := append([]string{rec.Good, rec.Before, rec.Trying, state.Accepted.Commit}, state.Burned...)
	for _, bad := range rec.Bad {
		ids = append(ids, bad.Commit)
	}
	for _, entry := range state.Log {
		ids = append(ids, entry.Commit)
	}
	return slices.DeleteFunc(ids, func(id string) bool { return id == "" }), err
}

// trusted is where what this host has accepted is remembered.
func (h *host) trusted() trust.StateFile {
	return trust.StateFile{Path: filepath.Join(h.dir, "trust.json")}
}

// openBackends starts a plugin process for each built-in backend of this host and each plugin found. One that does not start now keeps nobody from
// asking this host what runs.
func (h *host) openBackends(ctx context.Context) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	sockets := filepath.Join(h.dir, "plugins")
	var all []plugin.Options
	for _, name := range h.config.Backends {
		state := filepath.Join(h.dir, "backends", string(name))
		all = append(all, plugin.Options{Name: string(name), Env: passed(string(name)), Cmd: []string{self, "backend", "serve", string(name), "--state", state, "--engine", string(h.config.Engines[name]), "--site", string(h.config.Site)}})
	}
	if h.config.Plugins.Folder != "" {
		found, err := plugin.Find(h.config.Plugins.Folder, h.config.Plugins.Pins)
		if err != nil {
			return err
		}
		for i := range found {
			if slices.Contains(h.config.Backends, template.Name(found[i].Name)) { // they would have one state folder
				return fmt.Errorf("plugin %s: the built-in backend %s has its name; want another name for it, or the built-in out of backends", found[i].Path, found[i].Name)
			}
			state := filepath.Join(h.dir, "backends", found[i].Name)
			if err := os.MkdirAll(state, 0o700); err != nil {
				return err
			}
			all = append(all, plugin.Options{Name: found[i].Name, Found: &found[i], Env: []string{"KMO_STATE=" + state}})
		}
	}
	for _, options := range all {
		options.Dir, options.Logger = sockets, h.logger.With("backend", options.Name)
		client, err := plugin.Open(ctx, options)
		if client == nil {
			return fmt.Errorf("backend %s: %w", options.Name, err)
		}
		if err != nil {
			h.logger.Warn("a backend that does not start: this host waits for it, and tries again", "backend", options.Name, "err", err)
		}
		h.release = append(h.release, client.Close)
		h.backends[options.Name] = client
	}
	return nil
}

// orphans warns of backends that this host had, and says whether there are any: what they started goes on running, and nothing here sees it.
func (h *host) orphans() (some bool, err error) {
	folder := filepath.Join(h.dir, "backends")
	entries, err := os.ReadDir(folder)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	for _, entry := range entries {
		if h.backends[entry.Name()] == nil {
			some = true
			h.logger.Warn("a backend that is not configured any more: what it runs is neither seen nor stopped", "backend", entry.Name(),
				"want", "it in the agent's file until the site asks nothing of it, or no folder "+filepath.Join(folder, entry.Name()))
		}
	}
	return some, err
}

func (h *host) openReconciler(context.Context) error {
	rec, err := h.journal.Load()
	if err != nil {
		return err
	}
	state := h.trusted()
	if rec.Seq == 0 { // a new host: both files are made, in this order, so that one alone is always an alarm
		tree, err := h.audit.Tree()
		if err != nil {
			return err
		}
		if _, err := state.Load(); !errors.Is(err, fs.ErrNotExist) || tree.N > 0 {
			return noJournal(h.journal.Path)
		}
		if err := h.journal.Save(reconciler.Record{Seq: 1, Host: string(h.config.Host)}); err != nil {
			return err
		}
	}
	verifier, err := h.verifier(rec)
	if err != nil {
		return err
	}
	blind, err := h.orphans()
	if err != nil {
		return err
	}
	store := &registry.Store{Dir: filepath.Join(h.dir, "images"), Mirror: h.config.Images.Mirror, Keychain: registry.UserKeychain()}
	fetches := &images{store: store, jobs: map[string]*job{}, blind: blind}
	facts, err := hostFacts(h.config, h.flags.config, h.dir)
	if err != nil {
		return err
	}
	doors, release := thishost.Doors(h.dir)
	facts.Doors, h.release = doors, append(h.release, func() error { release(); return nil })
	make := func() *reconciler.Reconciler {
		return &reconciler.Reconciler{Host: facts, State: h.dir, Source: h.source, Trust: verifier, Images: fetches, Backends: h.backends,
			Journal: h.journal, Audit: h.audit, Rules: rules, Logger: h.logger, Every: time.Duration(h.config.Check)}
	}
	h.reconciler, h.preview.Reconciler = make(), make()
	return nil
}

// verifier judges for this host, whose record that is.
func (h *host) verifier(rec reconciler.Record) (*trust.Verifier, error) {
	root, err := merkle.Parse(h.config.Trust.Kmo1)
	if err != nil {
		return nil, fmt.Errorf("trust.kmo1: %w", err)
	}
	return &trust.Verifier{Site: string(h.config.Site), Branch: string(h.config.Branch), Pin: trust.Pin{SHA256: h.config.Trust.SHA256, Root: root}, State: h.trusted(),
		Clock: time.Now, Describe: reconciler.Declare(), MustExist: rec.Good != "" || rec.Trying != "", MinSeq: rec.Trust, RevertsPerDay: h.config.Trust.Reverts}, nil
}

// rules are the shipped rules with a site's own.
func rules(site fs.FS) (*policy.Set, error) {
	if site == nil {
		return policy.Load(rego.Rules())
	}
	return policy.Load(rego.Rules(), site)
}

// leading are those paths that are given, and where links lead from there, sorted.
func leading[T ~string](paths []T) []string {
	var all []string
	for _, path := range paths {
		if path == "" {
			continue
		}
		all = append(all, string(path))
		if leads, err := filepath.EvalSymlinks(string(path)); err == nil { // it may come later
			all = append(all, leads)
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// hostFacts measures this host, whose agent's file that is.
func hostFacts(config Config, file, dir string) (template.Host, error) {
	facts := template.Host{Name: string(config.Host), Zone: string(config.Zone), OS: runtime.GOOS, Arch: runtime.GOARCH, Labels: map[string]string{},
		CPU: int64(runtime.NumCPU()) * 1000}
	for name, value := range config.Labels {
		facts.Labels[string(name)] = string(value)
	}
	facts.Devices = config.devices()
	facts.Engines = leading(slices.Collect(maps.Values(config.Engines)))
	self, err := os.Executable()
	if err != nil {
		return facts, err
	}
	if file, err = filepath.Abs(file); err != nil {
		return facts, err
	}
	facts.Own = leading([]string{self, file, config.Key, config.Git.PasswordFile, config.Git.KeyFile, config.Plugins.Folder})
	return facts, thishost.Measure(&facts, dir)
}

// close lets go of everything; workloads go on running.
func (h *host) close() error {
	var errs []error
	for _, release := range h.release {
		errs = append(errs, release())
	}
	if h.source != nil {
		errs = append(errs, h.source.Close())
	}
	if h.audit != nil {
		errs = append(errs, h.audit.Close())
	}
	if h.lock != nil {
		errs = append(errs, h.lock.Close())
	}
	return errors.Join(errs...)
}

// newLogger is the logger of a plugin process: its agent reads the lines and says how much is kept.
func newLogger(w io.Writer) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelDebug}))
}
