// Package backends is the contract between kMO and whatever makes a host run something.
//
// A [Backend] gets workloads whose images are already verified content on this host; it never resolves a name and never
// downloads. Its state lives in the runtime (labels, or a state folder), so that a new process finds what an old one left.
// Package conformance is this contract as a test.
package backends

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/kindos/kmo/registry/merkle"
)

// Backend makes this host run workloads. Every method may be called concurrently, must return soon after its context ends,
// and must leave nothing half-made that Observe does not show and Remove does not clear.
type Backend interface {
	// Fingerprint says what this backend can do on this host, now. It is measured, not assumed.
	Fingerprint(context.Context) (Fingerprint, error)
	// Observe lists the workloads of ours that exist, sorted by name, whoever started them and however long ago; never
	// anybody else's. A workload whose process ended is listed with the state it is in.
	Observe(context.Context) ([]Status, error)
	// Apply makes the workload exist as specified and returns once its program has been started; it does not wait for
	// health. Applying what already runs with the same spec and Content changes nothing; applying what is there but damaged, or stands on
	// another Content than Status says, starts it again. A postInit hook that ends badly is a *StartError and makes the workload Damaged;
	// its program goes on, and applying it again runs the postInit hooks again, which make it well when all end well.
	// It must return a *FeatureError, having changed nothing, for anything asked that it cannot give or does not know, and a *StartError
	// if the workload itself is at fault.
	Apply(context.Context, Workload) error
	// Remove runs the exit hooks, stops the workload and clears everything of it but kept paths, whatever its hooks say. It returns nil
	// if there is none. One whose context ends is gone on with by the next.
	Remove(ctx context.Context, name string) error
	// Logs returns what the workload wrote, oldest first, stdout and stderr in one stream. It must return ErrNotFound
	// if there is no such workload. A log that is followed ends with the workload, after the last it wrote. The caller closes the reader.
	Logs(ctx context.Context, name string, options LogOptions) (io.ReadCloser, error)
}

// Execer is what a backend also is when it can run a command inside a workload. Exec returns the command's exit status and
// its output, stdout and stderr together, at most 64 KiB. It must return ErrNotFound if the workload does not run.
type Execer interface {
	Exec(ctx context.Context, name string, argv []string) (status int, output []byte, err error)
}

// ErrNotFound says that there is no workload of that name.
var ErrNotFound = errors.New("no such workload")

// FeatureError says that a workload asks for something this backend does not have here.
type FeatureError struct {
	Backend string
	Feature Feature // or the Format, or a name of its own, where that is what it lacks
	Detail  string  // why not, on this host
}

// Error names the backend, the feature and why there is none.
func (e *FeatureError) Error() string {
	return e.Backend + " has no " + string(e.Feature) + " here: " + e.Detail
}

// Format is what an image's bytes are.
type Format string

// The formats. Each is a key of a unit's variants.
const (
	OCI      Format = "image"    // an OCI image: Content is a folder, its unpacked root file system
	LXC      Format = "lxc"      // an LXC root file system: Content is a folder
	WASM     Format = "wasm"     // a WASI module: Content is a file
	AppImage Format = "appimage" // a type-2 AppImage: Content is a file
	Native   Format = "native"   // one static program: Content is a file
)

// Fingerprint is what a backend can do on this host, now.
type Fingerprint struct {
	Backend   string    `json:"backend"`
	Version   string    `json:"version"`           // of the runtime, not of the plugin
	Formats   []Format  `json:"formats"`           // what it can run
	Platforms []string  `json:"platforms"`         // "linux/amd64"; for wasm "wasip1/wasm"
	Isolation Isolation `json:"isolation"`         // how strongly it separates
	Features  []Feature `json:"features"`          // sorted
	Missing   []string  `json:"missing,omitempty"` // what this host does not let it apply: subjects, a colon, why: "landlock: kernel has none"
}

// Has says whether the fingerprint has feature f.
func (p Fingerprint) Has(f Feature) bool {
	return slices.Contains(p.Features, f)
}

// Concerning picks from lines as Fingerprint.Missing has them those that begin with one of the subjects: "apparmor, selinux: …" is about both.
func Concerning(missing []string, subjects ...string) (list []string) {
	for _, line := range missing {
		about, _, _ := strings.Cut(line, ":")
		if slices.ContainsFunc(strings.Split(about, ", "), func(subject string) bool { return slices.Contains(subjects, subject) }) {
			list = append(list, line)
		}
	}
	return list
}

// Isolation orders backends by how strongly they separate a workload from the host; more is stronger.
type Isolation int

// The strengths of isolation.
const (
	IsolationNone      Isolation = iota // a process like any other
	IsolationProcess                    // namespaces, limits, filters, as the host allows
	IsolationContainer                  // a container engine's default set
	IsolationSandbox                    // the workload never talks to the host's kernel itself: WASM, gVisor
	IsolationMachine                    // its own kernel
)

// String is the word for it.
func (i Isolation) String() string {
	if words := isolations(); i >= 0 && int(i) < len(words) {
		return words[i]
	}
	return strconv.Itoa(int(i))
}

func isolations() []string { return []string{"none", "process", "container", "sandbox", "machine"} }

// MarshalText returns the word.
func (i Isolation) MarshalText() ([]byte, error) { return []byte(i.String()), nil }

// UnmarshalText reads the word.
func (i *Isolation) UnmarshalText(text []byte) error {
	at := slices.Index(isolations(), string(text))
	if at < 0 {
		return fmt.Errorf("isolation %.100q; want one of %v", text, isolations())
	}
	*i = Isolation(at)
	return nil
}

// Workload is a unit's chosen variant, rendered for one host: everything a backend needs, and nothing it must look up.
type Workload struct {
	Name      string        `json:"name"` // Unit, "-", the first eight hex digits of Spec
	Unit      string        `json:"unit"`
	Spec      merkle.Digest `json:"spec"`    // covers everything below but Backend and what fetching adds to Image
	Backend   string        `json:"backend"` // which backend is asked to run it
	Tier      int           `json:"tier"`    // 0 (most sensitive) to 3
	Format    Format        `json:"format"`
	Image     Image         `json:"image"`
	Run       Run           `json:"run"`
	Resources Resources     `json:"resources"`
	Files     []File        `json:"files,omitempty"` // sorted by To
	Mounts    []Mount       `json:"mounts,omitempty"`
	Doors     []Door        `json:"doors,omitempty"`
	Overlay   Overlay       `json:"overlay"`
	Hooks     Hooks         `json:"hooks"`
	Security  Security      `json:"security"`
}

// Image is verified content. Ref and the digests say what it is; Content says where it lies on this host.
type Image struct {
	Ref     string        `json:"ref"`               // as the unit names it: host/repository@sha256:…
	SHA256  string        `json:"sha256"`            // hex, of the manifest or index the reference names
	Root    merkle.Digest `json:"root"`              // the kmo1 root the unit pins
	Content string        `json:"content,omitempty"` // folder or file by Format; set once fetched; read-only for the backend
	// ContentRoot is the level-3 root of the folder, or the blob root of the file, at Content: what drift is measured against.
	ContentRoot merkle.Digest `json:"contentRoot,omitzero"`
	Config      ImageConfig   `json:"config"` // from the image itself; set once fetched
}

// ImageConfig is what the image says about how to run it; Run overrides it. Its user is never used: it may be a name, which means
// something in the image only, and Run always has a number.
type ImageConfig struct {
	Entrypoint []string `json:"entrypoint,omitempty"`
	Cmd        []string `json:"cmd,omitempty"`
	Env        []string `json:"env,omitempty"` // NAME=value
	Dir        string   `json:"dir,omitempty"`
	User       string   `json:"user,omitempty"`
}

// Run says how the program is started.
type Run struct {
	Args  []string          `json:"args,omitempty"` // replaces the image's Cmd
	Env   map[string]string `json:"env,omitempty"`  // added to the image's Env; nothing of the host's is inherited
	Dir   string            `json:"dir,omitempty"`
	User  int               `json:"user"` // uid and gid; never a name
	Ports []Port            `json:"ports,omitempty"`
	Grace time.Duration     `json:"grace"` // from the stop signal to the kill
}

// Port is a TCP port the workload listens on. The program is told the number it must listen on as KMO_PORT_<NAME>, upper case, dashes as underscores.
//
// Port 0 and Host 0: the backend chooses a free port of the loopback, the same one while the workload exists.
// Only Host: the program listens on that port of the host. Only Port: the program listens on exactly that port; a backend that shares
// the host's network publishes it under the same number, another one under a number of its choice. Both, and different: needs PortMap.
type Port struct {
	Name string `json:"name"`
	Port int    `json:"port,omitempty"`
	Host int    `json:"host,omitempty"`
}

// Variable is the environment variable that tells the program the port's number.
func (p Port) Variable() string {
	return "KMO_PORT_" + strings.ToUpper(strings.ReplaceAll(p.Name, "-", "_"))
}

// Resources bounds a workload. 0 means not bounded, which policy refuses.
type Resources struct {
	CPUMin    int64    `json:"cpuMin,omitempty"`    // thousandths of a core, needed to be placed
	CPU       int64    `json:"cpu,omitempty"`       // thousandths of a core, enforced
	MemoryMin int64    `json:"memoryMin,omitempty"` // bytes, needed to be placed
	Memory    int64    `json:"memory,omitempty"`    // bytes, enforced
	PIDs      int64    `json:"pids,omitempty"`
	Disk      int64    `json:"disk,omitempty"` // bytes the overlay may hold
	Devices   []Device `json:"devices,omitempty"`
}

// Device is a device of this host, whole. A name that this host gives no nodes, or one of whose nodes is not there, is refused.
type Device struct {
	Name  string   `json:"name"`
	Nodes []string `json:"nodes,omitempty"` // device nodes of this host, seen inside under the same path
}

// File is a file the unit brings. It is replaced as a whole, and a changed byte is a changed spec.
type File struct {
	To      string `json:"to"` // clean absolute path inside the workload
	Mode    uint32 `json:"mode"`
	Content []byte `json:"content"`
	// Secret says that Content must reach no disk, log, label or error: it lies on storage that is memory and is gone with this host's.
	// A workload that is to be started again when its secrets are gone is Damaged, as Detail says, until it is applied again.
	Secret bool `json:"secret,omitempty"`
}

// Veil returns files without the contents of those that are secret: what may be recorded and shown.
func Veil(files []File) []File {
	files = slices.Clone(files)
	for i := range files {
		if files[i].Secret {
			files[i].Content = nil
		}
	}
	return files
}

// Door is a folder of this host, on storage that is memory, which the workloads of a unit and of those that link to it see. The agent makes
// it before Apply, and it outlives them.
type Door struct {
	Unit string `json:"unit"` // whose it is
	From string `json:"from"`
	To   string `json:"to"`
	Via  string `json:"via"` // memory: files that are mapped; socket: unix sockets
}

// Mount is a folder of the host inside the workload. That it is not there blames nobody, for it may yet come; a link on the way to it is
// the unit's fault, a *StartError.
type Mount struct {
	From     string `json:"from"`
	To       string `json:"to"`
	ReadOnly bool   `json:"readOnly"`
}

// Overlay is where the workload may write; the base below it never changes. With a size, /tmp is there, anybody may write in it, and
// where else may be written OverlayRoot says. A kept path is a folder, made for Run.User where it is not there yet; it belongs to the
// unit, not to one spec of it. Each backend has its own: a unit with kept paths that is to move to another one is refused (E_KEEP).
type Overlay struct {
	Size int64    `json:"size,omitempty"` // bytes; 0 means that nothing can be written but kept paths
	Keep []string `json:"keep,omitempty"` // clean absolute paths that outlive a change of spec
}

// Hooks are commands run inside the workload at its moments, each an argv; argv[0] is a path inside. An image that is one
// program (Native, WASM, AppImage) is /app there. A hook that has not ended in the backend's own bound is ended, and has ended badly.
// A program that is started again, by whomever, has its preInit and postInit hooks run again.
type Hooks struct {
	PreInit  [][]string `json:"preInit,omitempty"`  // before the program, same image and mounts; each must end 0
	PostInit [][]string `json:"postInit,omitempty"` // once the program has been started; each must end 0
	Exit     [][]string `json:"exit,omitempty"`     // before it is stopped
}

// Security is what a workload asks for beyond the default confinement. The zero value asks for nothing.
type Security struct {
	Privileged   bool     `json:"privileged,omitempty"`
	Escalation   bool     `json:"escalation,omitempty"`   // set-uid and file capabilities work
	WritableBase bool     `json:"writableBase,omitempty"` // the base itself may be written
	Unconfined   bool     `json:"unconfined,omitempty"`   // no seccomp, no LSM
	Capabilities []string `json:"capabilities,omitempty"` // CAP_…
	Host         []string `json:"host,omitempty"`         // shared namespaces: pid, ipc, uts, user, cgroup, network
}

// State is what a workload is doing.
type State string

// The states.
const (
	Starting State = "starting" // its hooks run, or its program is about to
	Running  State = "running"  // its program runs
	Backoff  State = "backoff"  // its program ended and will be started again
	Exited   State = "exited"   // it has no program and gets none until it is applied again: it ended for good, or is being removed, as Detail says
	Damaged  State = "damaged"  // it exists, but is not what was applied; Detail says how
)

// Status is one workload as it is.
type Status struct {
	Name      string        `json:"name"`
	Spec      merkle.Digest `json:"spec"`
	State     State         `json:"state"`
	Content   string        `json:"content,omitempty"`   // Image.Content that it was started from; "" where the backend has a copy of its own
	Addresses []Address     `json:"addresses,omitempty"` // in the order of Run.Ports
	PID       int           `json:"pid,omitempty"`       // on the host, where there is one
	Started   time.Time     `json:"started,omitzero"`    // of the present program
	Restarts  int           `json:"restarts"`
	ExitCode  int           `json:"exitCode,omitempty"` // of the last program that ended; 128 + signal; 0 too if nobody saw it, which Detail says
	OOM       bool          `json:"oom,omitempty"`      // the last end was for want of memory
	Usage     Usage         `json:"usage"`
	Unapplied []string      `json:"unapplied,omitempty"` // what the host did not let the backend apply, in words; what Missing says of its confinement too
	Detail    string        `json:"detail,omitempty"`
}

// Address is where a port of the workload is reached from this host.
type Address struct {
	Port    string `json:"port"`    // the port's name
	Address string `json:"address"` // host:port
}

// Usage is what a workload uses now.
type Usage struct {
	Memory int64         `json:"memory"` // bytes
	CPU    time.Duration `json:"cpu"`    // since the program was started
	PIDs   int64         `json:"pids"`
}

// LogOptions chooses what Logs returns.
type LogOptions struct {
	Follow bool `json:"follow"` // go on until the context ends
	Tail   int  `json:"tail"`   // only the last so many lines; 0 means all
}
