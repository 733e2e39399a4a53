// Package appimage runs type-2 AppImages without FUSE and without any engine: the format to fall back to where there is none.
//
// An AppImage is an ELF program with a squashfs behind it. The program is never executed: the file system is read and unpacked by
// this package, once for each content, and its AppRun is run as package native runs programs. What keeps, confines and finds it
// again is package process.
//
// An AppImage brings what it needs beyond a base system, and the base system is this host's: /usr, the library folders, and the few files
// of /etc that every program of the host reads are seen inside, read-only. Those are not the image's bytes and nobody has verified
// them; the fingerprint says so. The unpacked image is seen at /opt/app, which APPDIR tells; /app in a hook is its AppRun.
//
// The state folder:
//
//	apps/<key>/<n>/app       an unpacked image, whose content root is measured again before each start, once a minute at most
//	apps/<key>/<n>/about     what it was made from, and that root
//	programs/                package process's
//
// One that has changed is not repaired: programs may run from it. The next copy is made beside it, and what nobody runs from goes when a
// workload is removed.
package appimage

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/process"
)

// Name is the backend's name.
const Name = "appimage"

// Where things are inside.
const (
	app    = "/app" // as hooks name the program
	appDir = "/opt/app"
	appRun = appDir + "/AppRun"
)

// Options are what a Backend needs. State is.
type Options struct {
	State   string                           // the state folder: trusted, made if there is none
	Logger  *slog.Logger                     // nil is silent
	Backoff func(restarts int) time.Duration // as process.Options has it
}

// Backend runs AppImages. It is a backends.Backend and a backends.Execer.
type Backend struct {
	*process.Keeper
	apps *apps
}

// Open goes on with what an earlier process left in the state folder.
func Open(o Options) (*Backend, error) {
	state, err := filepath.Abs(o.State)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(state, 0o700); err != nil {
		return nil, err
	}
	b := &Backend{}
	if b.apps, err = openApps(filepath.Join(state, "apps")); err != nil {
		return nil, err
	}
	b.Keeper, err = process.Open(process.Options{
		Backend: Name, State: filepath.Join(state, "programs"), Plan: b.plan, Logger: o.Logger, Backoff: o.Backoff,
	})
	if err != nil {
		return nil, err
	}
	return b, nil
}

// Fingerprint says what was measured when the backend was opened.
func (b *Backend) Fingerprint(context.Context) (backends.Fingerprint, error) {
	p := backends.Fingerprint{
		Backend: Name, Version: b.Kernel(), Platforms: []string{runtime.GOOS + "/" + runtime.GOARCH},
		Isolation: backends.IsolationProcess, Features: b.Features(),
		Missing: append(b.Missing(), "a base of its own: the libraries of this host are seen inside, read-only, and are not verified"),
	}
	if b.Confines() {
		p.Formats = []backends.Format{backends.AppImage}
	}
	return p, nil
}

// Apply unpacks the image, if that was not done before, and starts its AppRun.
func (b *Backend) Apply(ctx context.Context, w backends.Workload) error {
	if w.Format != backends.AppImage {
		return &backends.FeatureError{Backend: Name, Feature: backends.Feature(w.Format), Detail: "it runs the format appimage only"}
	}
	for _, hooks := range []*[][]string{&w.Hooks.PreInit, &w.Hooks.PostInit, &w.Hooks.Exit} {
		var inside [][]string
		for _, argv := range *hooks {
			inside = append(inside, seen(argv))
		}
		*hooks = inside
	}
	b.apps.want(w.Image.Content, 1)
	defer b.apps.want(w.Image.Content, -1)
	return b.Keeper.Apply(ctx, w)
}

// seen is a command as it is inside.
func seen(argv []string) []string {
	if len(argv) == 0 || argv[0] != app {
		return argv
	}
	return append([]string{appRun}, argv[1:]...)
}

// Remove clears everything of a program but its kept paths, and unpacked images that nobody uses any more.
func (b *Backend) Remove(ctx context.Context, name string) error {
	if err := b.Keeper.Remove(ctx, name); err != nil {
		return err
	}
	return b.apps.keep(ctx, func() ([]use, error) { return b.used(ctx) })
}

// used is what every workload runs from, as its program sees it where it has a root of its own.
func (b *Backend) used(ctx context.Context) ([]use, error) {
	list, err := b.Observe(ctx)
	var used []use
	for _, s := range list {
		u := use{content: s.Content}
		if b.Mounts() && s.State == backends.Running { // before, its root may still be this host's
			if found, err := os.Stat(filepath.Join("/proc", strconv.Itoa(s.PID), "root", appDir)); err == nil {
				u.folder = found
			}
		}
		used = append(used, u)
	}
	return used, err
}

// Exec runs a command inside a running workload.
func (b *Backend) Exec(ctx context.Context, name string, argv []string) (int, []byte, error) {
	return b.Keeper.Exec(ctx, name, seen(argv))
}

// plan says what of a workload is run, and how.
func (b *Backend) plan(ctx context.Context, w backends.Workload, place process.Place) (process.Program, error) {
	dir, err := b.apps.ready(ctx, w.Image.Content)
	var bad *imageError
	if errors.As(err, &bad) {
		err = &backends.StartError{Workload: w.Name, Stage: "unpacking " + w.Image.Content, Cause: bad.Error()}
	}
	if err != nil {
		return process.Program{}, err
	}
	p := process.Program{Argv: append([]string{appRun}, w.Argv()...), Env: w.Env(), Dir: w.Run.Dir}
	p.Binds = []process.Bind{{From: dir, To: appDir}}
	p.Env["APPDIR"] = appDir
	if place.Bare {
		p.Env["APPDIR"] = dir
	}
	for _, path := range baseSystem() {
		if _, err := os.Stat(path); err == nil {
			p.Binds = append(p.Binds, process.Bind{From: path, To: path})
		}
	}
	return p, nil
}

// baseSystem lists what an AppImage may expect of any host. Nothing of it is this host's secret.
func baseSystem() []string {
	return []string{
		"/usr", "/bin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/alternatives", "/etc/fonts", "/etc/hosts", "/etc/ld.so.cache", "/etc/localtime",
		"/etc/nsswitch.conf", "/etc/resolv.conf", "/etc/ssl/certs",
	}
}
