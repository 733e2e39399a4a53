package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/appimage"
	"github.com/kindos/kmo/backends/docker"
	"github.com/kindos/kmo/backends/gvisor"
	"github.com/kindos/kmo/backends/kubernetes"
	"github.com/kindos/kmo/backends/lxc"
	"github.com/kindos/kmo/backends/microvm"
	"github.com/kindos/kmo/backends/native"
	"github.com/kindos/kmo/backends/plugin"
	"github.com/kindos/kmo/backends/wasm"
	"github.com/kindos/kmo/cmd/kmo/cli"
	"github.com/kindos/kmo/reconciler/template"
)

// builtIn is a backend in this binary.
type builtIn struct {
	name string
	runs string   // what, in a few words
	env  []string // of the agent's variables, those that its process gets too
	at   string   // what may be named as its runtime; "" if nothing may
	open func(o opening) (backends.Backend, error)
}

// opening is how a built-in backend is opened.
type opening struct {
	state  string // its folder
	engine string // where its runtime is, "" where that usually is
	site   string // the site's name
	look   bool   // nothing but the fingerprint is asked for
	logger *slog.Logger
}

// builtIns lists every backend in this binary.
func builtIns() []builtIn {
	return []builtIn{
		{name: native.Name, runs: "programs and images, as processes", open: func(o opening) (backends.Backend, error) {
			return native.Open(native.Options{State: o.state, Logger: o.logger})
		}},
		{name: wasm.Name, runs: "WASI modules", open: func(o opening) (backends.Backend, error) {
			return wasm.Open(wasm.Options{State: o.state, Logger: o.logger})
		}},
		{name: appimage.Name, runs: "AppImages", open: func(o opening) (backends.Backend, error) {
			return appimage.Open(appimage.Options{State: o.state, Logger: o.logger})
		}},
		{name: docker.Docker, runs: "images, on Docker Engine", at: "a socket", env: []string{"XDG_RUNTIME_DIR"}, open: func(o opening) (backends.Backend, error) {
			return docker.Open(docker.Options{Name: docker.Docker, State: o.state, Socket: o.engine, Look: o.look, Logger: o.logger})
		}},
		{name: docker.Podman, runs: "images, on Podman", at: "a socket", env: []string{"XDG_RUNTIME_DIR"}, open: func(o opening) (backends.Backend, error) {
			return docker.Open(docker.Options{Name: docker.Podman, State: o.state, Socket: o.engine, Look: o.look, Logger: o.logger})
		}},
		{name: lxc.Name, runs: "LXC root file systems and images, in containers", open: func(o opening) (backends.Backend, error) {
			return lxc.Open(lxc.Options{State: o.state, Logger: o.logger})
		}},
		{name: gvisor.Name, runs: "images, in gVisor's sandbox", at: "runsc", open: func(o opening) (backends.Backend, error) {
			return gvisor.Open(gvisor.Options{State: o.state, Runsc: o.engine, Logger: o.logger})
		}},
		{name: kubernetes.Name, runs: "images, as Deployments of a cluster", at: "a kubeconfig", env: []string{"KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT", "HTTPS_PROXY", "NO_PROXY"}, open: func(o opening) (backends.Backend, error) {
			return kubernetes.Open(kubernetes.Options{State: o.state, Kubeconfig: o.engine, Namespace: o.site, Logger: o.logger})
		}},
		{name: microvm.Name, runs: "images, each with a kernel of its own", at: "a kernel, or a folder with boot and lib/modules", open: func(o opening) (backends.Backend, error) {
			return microvm.Open(microvm.Options{State: o.state, Kernel: o.engine, Logger: o.logger})
		}},
	}
}

func builtInNames() (names []string) {
	for _, b := range builtIns() {
		names = append(names, b.name)
	}
	return names
}

func findBuiltIn(name string) (builtIn, error) {
	all := builtIns()
	i := slices.IndexFunc(all, func(b builtIn) bool { return b.name == name })
	if i < 0 {
		return builtIn{}, cli.Usagef("no built-in backend %q; there are %s", name, strings.Join(builtInNames(), ", "))
	}
	return all[i], nil
}

// checkEngines judges where built-in backends' runtimes are said to be, by their names.
func checkEngines(engines map[string]string) error {
	var faults []error
	for _, name := range slices.Sorted(maps.Keys(engines)) {
		path := engines[name]
		b, err := findBuiltIn(name)
		switch {
		case err != nil:
			faults = append(faults, err)
		case b.at == "":
			faults = append(faults, cli.Usagef("engine of %s: %s; it has no runtime that can be named", name, path))
		case !filepath.IsAbs(path):
			faults = append(faults, cli.Usagef("engine of %s: %q; want the absolute path of %s", name, path, b.at))
		}
	}
	return errors.Join(faults...)
}

// passed is what a built-in backend's process gets of this one's environment.
func passed(name string) (env []string) {
	b, _ := findBuiltIn(name) // a name that is none gets nothing
	for _, variable := range b.env {
		if value, ok := os.LookupEnv(variable); ok {
			env = append(env, variable+"="+value)
		}
	}
	return env
}

func backendCommand() *cobra.Command {
	return cli.Group("backend", "What this host can run things with", backendList(), backendCheck(), backendFit(), backendManifest(), backendServe())
}

func backendManifest() *cobra.Command {
	return &cobra.Command{
		Use:     "manifest NAMESPACE",
		Short:   "Print the account and the rights that the kubernetes backend needs in a cluster, for one site's namespace",
		Long:    "Print the account and the least rights that the kubernetes backend needs in a cluster, for one site's namespace.\n\nExit statuses: 0 good, 1 error, 2 usage.",
		Example: "  kmo backend manifest north-sea | kubectl apply -f -",
		Args:    cli.OneArg("a namespace"),
		RunE: func(cmd *cobra.Command, args []string) error {
			_, err := io.WriteString(cmd.OutOrStdout(), kubernetes.Manifest(args[0]))
			return err
		},
	}
}

func backendServe() *cobra.Command {
	var o opening
	serve := &cobra.Command{
		Use:    "serve NAME",
		Short:  "Be the plugin process of a built-in backend; the agent starts this",
		Hidden: true,
		Args:   cli.OneArg("a built-in backend"),
		RunE: func(cmd *cobra.Command, args []string) error {
			b, err := findBuiltIn(args[0])
			if err != nil {
				return err
			}
			o.logger = newLogger(cmd.ErrOrStderr())
			backend, err := b.open(o)
			if err != nil {
				return err
			}
			plugin.Serve(backend, o.logger)
			return closed(backend)
		},
	}
	serve.Flags().StringVar(&o.state, "state", "", "the backend's state folder")
	serve.Flags().StringVar(&o.site, "site", "", "the site's name")
	serve.Flags().StringVar(&o.engine, "engine", "", "where its runtime is")
	return serve
}

func closed(backend backends.Backend) error {
	if closer, ok := backend.(io.Closer); ok {
		return closer.Close()
	}
	return nil
}

// found is what was found out about a built-in backend on this host.
type found struct {
	backends.Fingerprint
	Runs    string `json:"runs"`
	Trouble string `json:"trouble,omitempty"` // why it runs nothing here
}

// look asks built-in backends, each over a state folder of its own that is gone afterwards.
func look(cmd *cobra.Command, all []builtIn, engines map[string]string) (list []found, err error) {
	if err := checkEngines(engines); err != nil {
		return nil, err
	}
	folder, err := os.MkdirTemp("", "kmo-backend-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(folder)) }()
	logger := slog.New(slog.DiscardHandler) // what matters is in what is printed
	for _, b := range all {
		f := found{Runs: b.runs, Fingerprint: backends.Fingerprint{Backend: b.name}}
		backend, err := b.open(opening{state: filepath.Join(folder, b.name), engine: engines[b.name], site: "kmo", look: true, logger: logger})
		if err == nil {
			f.Fingerprint, err = asked(cmd.Context(), backend)
			err = errors.Join(err, closed(backend))
		}
		switch {
		case cmd.Context().Err() != nil:
			return nil, cmd.Context().Err()
		case err != nil:
			f.Backend, f.Trouble = b.name, err.Error()
		case len(f.Formats) == 0:
			f.Trouble = "it runs nothing on this host; see what is missing"
		}
		list = append(list, f)
	}
	return list, nil
}

// asked is what a backend says of itself, in a time in which each does that whose runtime answers.
func asked(ctx context.Context, b backends.Backend) (backends.Fingerprint, error) {
	const limit = 30 * time.Second
	within, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	print, err := b.Fingerprint(within)
	if err != nil && within.Err() != nil && ctx.Err() == nil {
		err = fmt.Errorf("its runtime has not answered within %v: %w", limit, err)
	}
	return print, err
}

func backendList() *cobra.Command {
	out, engines := &cli.Output{}, map[string]string{}
	list := &cobra.Command{
		Use:   "list",
		Short: "List the built-in backends and what they can run on this host",
		Long: `List the built-in backends and what they can run on this host, measured now. What one can do in full, and what it cannot and why, is
for 'kmo backend check'.

Exit statuses: 0 good, 1 error, 2 usage.`,
		Example: "  kmo backend list\n  kmo backend list -o json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			all, err := look(cmd, builtIns(), engines)
			if err != nil {
				return err
			}
			return out.Print(cmd.OutOrStdout(), all, func(w io.Writer) { printBackends(w, all) })
		},
	}
	out.Add(list)
	addEngines(list, &engines)
	return list
}

func addEngines(cmd *cobra.Command, engines *map[string]string) {
	cmd.Flags().StringToStringVar(engines, "engine", nil, "where a backend's runtime is, as NAME=PATH; as engines in the agent's file")
}

func printBackends(w io.Writer, all []found) {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(table, "BACKEND\tRUNS\tISOLATION\tHERE")
	for _, f := range all {
		here := f.Version
		if f.Trouble != "" {
			here = "no: " + f.Trouble
		}
		isolation := ""
		if f.Version != "" {
			isolation = f.Isolation.String()
		}
		_, _ = fmt.Fprintf(table, "%s\t%s\t%s\t%s\n", f.Backend, f.Runs, isolation, here)
	}
	_ = table.Flush()
}

func backendCheck() *cobra.Command {
	out, engines := &cli.Output{}, map[string]string{}
	check := &cobra.Command{
		Use:   "check NAME",
		Short: "Say all that a built-in backend can do on this host, and what it cannot and why",
		Long: `Say all that a built-in backend can do on this host, measured now, and what it cannot do and why. A unit that asks for a feature which
its backend lacks is refused when it is planned, or runs by its next variant.

Exit statuses: 0 it can run something, 1 it cannot, or an error, 2 usage.`,
		Example: "  kmo backend check native",
		Args:    cli.OneArg("a built-in backend"),
		RunE: func(cmd *cobra.Command, args []string) error {
			b, err := findBuiltIn(args[0])
			if err != nil {
				return err
			}
			all, err := look(cmd, []builtIn{b}, engines)
			if err != nil {
				return err
			}
			if err := out.Print(cmd.OutOrStdout(), all[0], func(w io.Writer) { printBackend(w, all[0]) }); err != nil {
				return err
			}
			if all[0].Trouble != "" {
				return cli.Status(cli.ExitError)
			}
			return nil
		},
	}
	out.Add(check)
	addEngines(check, &engines)
	return check
}

func printBackend(w io.Writer, f found) {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row := func(name string, value any) { _, _ = fmt.Fprintf(table, "%s\t%v\n", name, value) }
	row("backend", f.Backend+", "+f.Runs)
	if f.Trouble != "" {
		row("trouble", f.Trouble)
	}
	if f.Version != "" {
		row("version", f.Version)
		row("formats", f.Formats)
		row("platforms", f.Platforms)
		row("isolation", f.Isolation)
	}
	for _, feature := range backends.Features() {
		if f.Version != "" {
			row(string(feature.Feature), map[bool]string{true: "yes", false: "no"}[f.Has(feature.Feature)]+"\t"+feature.Meaning)
		}
	}
	_ = table.Flush()
	for _, missing := range f.Missing {
		_, _ = fmt.Fprintln(w, "not on this host:", missing)
	}
}

func backendFit() *cobra.Command {
	var folder string
	out, engines := &cli.Output{}, map[string]string{}
	fit := &cobra.Command{
		Use:   "fit UNIT",
		Short: "Say by which variant and backend a unit of a site folder would run on this host, and why not by the others",
		Long: `Say by which variant and which built-in backend a unit of a site folder would run on this host, and why not by the others. Where the unit is
to be placed (place.on) is not looked at, nor what the rules say: for that there is 'kmo plan'. The agent's file is not read: where its engines say
that a runtime is elsewhere, --engine has to say it here too.

Exit statuses: 0 it would run, 1 error, 2 usage, 3 it would not, or the folder is refused.`,
		Example: "  kmo backend fit relay\n  kmo backend fit relay --site ../north-sea -o json\n  kmo backend fit relay --engine docker=/run/user/1000/docker.sock",
		Args:    cli.OneArg("a unit"),
		RunE: func(cmd *cobra.Command, args []string) error {
			root, err := os.OpenRoot(folder)
			if err != nil {
				return err
			}
			defer root.Close()
			site, err := template.Load(root.FS())
			if err != nil {
				return err
			}
			all, err := look(cmd, builtIns(), engines)
			if err != nil {
				return err
			}
			fits, err := site.Fits(args[0], thisHost(all))
			if err != nil {
				return err
			}
			if err := out.Print(cmd.OutOrStdout(), fits, func(w io.Writer) { printFits(w, fits) }); err != nil {
				return err
			}
			if !slices.ContainsFunc(fits, func(f template.Fit) bool { return f.Why == "" }) {
				return cli.Status(cli.ExitRefused)
			}
			return nil
		},
	}
	fit.Flags().StringVar(&folder, "site", ".", "the site's folder")
	out.Add(fit)
	addEngines(fit, &engines)
	return fit
}

// thisHost is what is known of this machine without an agent.
func thisHost(all []found) template.Host {
	host := template.Host{Name: "this host", OS: runtime.GOOS, Arch: runtime.GOARCH, Fingerprints: map[string]backends.Fingerprint{}}
	for _, f := range all {
		if f.Trouble == "" {
			host.Fingerprints[f.Backend] = f.Fingerprint
		}
	}
	return host
}

func printFits(w io.Writer, fits []template.Fit) {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(table, "VARIANT\tFORMAT\tBACKEND\tFITS")
	taken := false
	for _, f := range fits {
		says := "no: " + f.Why
		if f.Why == "" {
			says = "yes"
			if !taken {
				says = "yes, and is the one that runs"
			}
			taken = true
		}
		_, _ = fmt.Fprintf(table, "%d\t%s\t%s\t%s\n", f.Variant, f.Format, f.Backend, says)
	}
	_ = table.Flush()
}
