package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/reconciler/template"
)

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
	command       bool // the host is opened for one command
}

func (f *hostFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.config, "config", defaultConfig(), "the agent's file")
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
