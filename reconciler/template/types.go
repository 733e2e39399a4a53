package template

import (
	"github.com/kindos/kmo/registry/merkle"
)

//go:generate go test -run ^TestSchemas$ -update .

// The JSON of these types has the keys of the YAML. Tags: doc is the schema's description, need:"yes" a required key, min and max bound
// a number, enum lists the words a string may be, items bounds a list's length ("1-16"), unique:"yes" forbids a value twice, and one:"yes"
// marks the keys of which there is at most one (or exactly one, where the blank field says so).

// Config is site.yaml.
type Config struct {
	Site       Name       `json:"site" need:"yes" doc:"the site's name, as its approvals name it"`
	Branch     Branch     `json:"branch" need:"yes" doc:"the branch that hosts follow"`
	Zones      []Name     `json:"zones" need:"yes" items:"1-256" unique:"yes" doc:"the zones, in the order in which a change goes out"`
	Registries []Registry `json:"registries,omitempty" items:"0-256" unique:"yes" doc:"where images may come from: hosts, or hosts with a repository prefix"`
	Forbidden  []Network  `json:"forbidden,omitempty" items:"0-256" unique:"yes" doc:"networks that no unit may be told to reach, beside those of cloud metadata: that of management"`
	Burned     []Burned   `json:"burned,omitempty" items:"0-4096" unique:"yes" doc:"what must not run again: sha256 of images, kmo1 roots of images and of units' content"`
	Freeze     []Window   `json:"freeze,omitempty" items:"0-64" doc:"when nothing is changed; a revert is, and site.yaml alone, so that a freeze can be ended"`
	Rollout    *Rollout   `json:"rollout,omitempty" doc:"how a change goes from zone to zone"`
	Gate       *Gate      `json:"gate,omitempty" doc:"the gate of units that say nothing about it"`
	Events     *Open      `json:"events,omitempty" doc:"where events go"`
	Snapshots  *Open      `json:"snapshots,omitempty" doc:"when snapshots are taken"`
	Retention  *Open      `json:"retention,omitempty" doc:"how long what is old is kept"`
}

// Rollout is how a change goes from zone to zone.
type Rollout struct {
	Bake           Duration `json:"bake,omitzero" doc:"how long a zone must be good before the next one moves"`
	MaxUnavailable Share    `json:"maxUnavailable,omitempty" doc:"hosts of a zone that may be down at once"`
	Missing        Percent  `json:"missing,omitempty" doc:"hosts of a zone that may be silent"`
}

// Window is a time from a moment up to another, which is not in it any more.
type Window struct {
	From Moment `json:"from" need:"yes" doc:"when it begins"`
	To   Moment `json:"to" need:"yes" doc:"when it is over"`
	Why  string `json:"why,omitempty" max:"200" doc:"one line for people"`
}

// Open is a mapping whose keys are not decided yet.
type Open struct{}

// Unit is units/<name>/unit.yaml after its profile.
type Unit struct {
	Unit      Name      `json:"unit" need:"yes" doc:"the unit's name, which is its folder's"`
	Profile   Name      `json:"profile,omitempty" doc:"the profile whose defaults it takes: profiles/<name>.yaml"`
	Tier      int       `json:"tier" min:"0" max:"3" doc:"how sensitive it is: 0 core kernel extensions, 1 base services, 2 agent modules, 3 environment adapters; with a profile's, the more sensitive counts"`
	Intent    *Intent   `json:"intent,omitempty" doc:"why it was changed last"`
	Needs     []Name    `json:"needs,omitempty" items:"0-256" unique:"yes" doc:"units that must be healthy first"`
	Variants  []Variant `json:"variants" need:"yes" items:"1-16" doc:"ways to run it, tried in order; the first that fits the host runs"`
	Resources Resources `json:"resources,omitzero" doc:"what it needs and what it may use"`
	Place     Place     `json:"place,omitzero" doc:"where it runs"`
	Run       Run       `json:"run" doc:"how its program is started"`
	Files     []File    `json:"files,omitempty" items:"0-256" doc:"files of the unit's folder that the workload gets"`
	Secrets   []Secret  `json:"secrets,omitempty" items:"0-256" doc:"secrets, decrypted on the host only"`
	Mounts    []Mount   `json:"mounts,omitempty" items:"0-64" doc:"folders of the host inside the workload"`
	Overlay   Overlay   `json:"overlay,omitzero" doc:"where it may write; the base stays immutable"`
	Hooks     Hooks     `json:"hooks,omitzero" doc:"commands run inside the workload at its moments"`
	Links     []Link    `json:"links,omitempty" items:"0-64" doc:"connections to other units"`
	Health    Health    `json:"health,omitzero" doc:"how it is asked whether it is healthy; without one, whether its program runs"`
	Gate      Gate      `json:"gate,omitzero" doc:"what must hold after a change"`
	Security  Security  `json:"security,omitzero" doc:"what it asks for beyond the default confinement; the rules judge it"`
}

// Profile is profiles/<name>.yaml: the part of a unit that may come from elsewhere. What gives a unit rights, or runs, stands in the unit.
type Profile struct {
	Profile   Name      `json:"profile,omitempty" doc:"the profile's name, which is its file's"`
	Tier      int       `json:"tier" min:"0" max:"3" doc:"how sensitive its units are at least: 0 is the most sensitive"`
	Resources Resources `json:"resources,omitzero" doc:"what its units need and may use"`
	Place     Place     `json:"place,omitzero" doc:"where its units run"`
	Run       Run       `json:"run" doc:"how its units' programs are started"`
	Overlay   Overlay   `json:"overlay,omitzero" doc:"where its units may write"`
	Health    Health    `json:"health,omitzero" doc:"how its units are asked whether they are healthy"`
	Gate      Gate      `json:"gate,omitzero" doc:"what must hold after a change of its units"`
}

// Intent says why a unit was changed.
type Intent struct {
	Kind    string `json:"kind" need:"yes" enum:"feature fix security rollback config" doc:"what kind of change"`
	Summary string `json:"summary,omitempty" max:"200" doc:"one line for people"`
	Ticket  string `json:"ticket,omitempty" max:"100" doc:"where it was asked for"`
}

// Variant is one way to run a unit. Exactly one of its formats is set.
type Variant struct {
	_        struct{}      `one:"exactly"`
	Image    Ref           `json:"image,omitempty" one:"yes" doc:"an OCI image"`
	LXC      Ref           `json:"lxc,omitempty" one:"yes" doc:"an LXC root file system"`
	WASM     Ref           `json:"wasm,omitempty" one:"yes" doc:"a WASI module"`
	AppImage Ref           `json:"appimage,omitempty" one:"yes" doc:"a type-2 AppImage"`
	Native   Ref           `json:"native,omitempty" one:"yes" doc:"one static program"`
	Merkle   merkle.Digest `json:"merkle,omitzero" doc:"the kmo1 root of what the reference names"`
	Backends []Name        `json:"backends,omitempty" items:"0-16" unique:"yes" doc:"backends that may run it, in order of preference; without them, every one that can"`
}

// Resources bounds a unit. min is needed to be placed, max is enforced; the rules refuse a missing max.
type Resources struct {
	CPU     CPURange  `json:"cpu,omitzero" doc:"processor time"`
	Memory  ByteRange `json:"memory,omitzero" doc:"memory"`
	PIDs    MaxCount  `json:"pids,omitzero" doc:"processes and threads"`
	Disk    MaxBytes  `json:"disk,omitzero" doc:"bytes its overlay may hold"`
	Devices []Name    `json:"devices,omitempty" items:"0-64" unique:"yes" doc:"named devices it needs"`
}

// CPURange is a need and a bound.
type CPURange struct {
	Min CPU `json:"min,omitzero" doc:"needed to be placed"`
	Max CPU `json:"max,omitzero" doc:"enforced"`
}

// ByteRange is a need and a bound.
type ByteRange struct {
	Min Bytes `json:"min,omitzero" doc:"needed to be placed"`
	Max Bytes `json:"max,omitzero" doc:"enforced"`
}

// MaxCount is a bound on a number of things.
type MaxCount struct {
	Max int64 `json:"max,omitzero" min:"1" max:"4194304" doc:"enforced"`
}

// MaxBytes is a bound.
type MaxBytes struct {
	Max Bytes `json:"max,omitzero" doc:"enforced"`
}

// Place says where a unit runs.
type Place struct {
	On     On       `json:"on,omitzero" doc:"hosts that may run it; all that is given must hold"`
	Count  Count    `json:"count,omitempty" doc:"all: one copy on each host that may run it, the default; or how many copies there are"`
	Prefer []Prefer `json:"prefer,omitempty" items:"0-32" doc:"hosts that would be better"`
	Spread string   `json:"spread,omitempty" max:"64" doc:"what the copies are spread over: zone, host or a label"`
}

// On admits hosts. An empty part admits every host.
type On struct {
	Zone   []Name          `json:"zone,omitempty" items:"0-256" unique:"yes" doc:"zones of site.yaml"`
	Arch   []string        `json:"arch,omitempty" items:"0-16" unique:"yes" enum:"amd64 arm64 arm riscv64 386 ppc64le s390x loong64" doc:"architectures, as Go names them"`
	CPU    []Label         `json:"cpu,omitempty" items:"0-64" unique:"yes" doc:"what the processor must have, as /proc/cpuinfo lists it: avx2, aes"`
	Labels map[Label]Label `json:"labels,omitempty" doc:"labels the host must have, with these values"`
}

// Prefer is a bias towards some hosts.
type Prefer struct {
	Label  map[Label]Label `json:"label" need:"yes" doc:"labels the host should have"`
	Weight int             `json:"weight" need:"yes" min:"1" max:"100" doc:"how much that counts"`
}

// Run says how a unit's program is started. Nothing in it is expanded: ${HOME} is seven characters.
type Run struct {
	Args  []string           `json:"args,omitempty" items:"0-512" doc:"replaces the image's arguments; nothing is expanded"`
	Env   map[EnvName]string `json:"env,omitempty" doc:"added to the image's environment; nothing is expanded, nothing of the host's is inherited"`
	Dir   Path               `json:"dir,omitempty" doc:"the folder it starts in"`
	User  int                `json:"user" min:"0" max:"2147483647" doc:"uid and gid, 65532 if not given; the rules refuse 0"`
	Ports []Port             `json:"ports,omitempty" items:"0-64" doc:"TCP ports it listens on"`
	Grace Duration           `json:"grace,omitzero" doc:"from the stop signal to the kill, 10s if not given"`
}

// Port is a TCP port.
type Port struct {
	Name PortName `json:"name" need:"yes" doc:"its name; the program finds the number in KMO_PORT_<NAME>"`
	Port int      `json:"port,omitempty" min:"1" max:"65535" doc:"the number the program listens on; without it, the backend's choice"`
	Host int      `json:"host,omitempty" min:"1" max:"65535" doc:"the number on the host; without it, the backend's choice"`
}

// File is a file of the unit's folder inside the workload.
type File struct {
	From LocalPath `json:"from" need:"yes" doc:"path in the unit's folder"`
	To   Path      `json:"to" need:"yes" doc:"path inside the workload"`
	Mode Mode      `json:"mode,omitempty" doc:"four octal digits in quotes, 0644 if not given"`
}

// Secret is a secret of the unit inside the workload.
type Secret struct {
	From LocalPath `json:"from" need:"yes" doc:"encrypted file in the unit's folder"`
	Key  string    `json:"key" need:"yes" max:"200" doc:"key in that file"`
	To   Path      `json:"to" need:"yes" doc:"path inside the workload"`
}

// Mount is a folder of the host inside the workload.
type Mount struct {
	From     HostPath `json:"from" need:"yes" doc:"folder of the host"`
	To       Path     `json:"to" need:"yes" doc:"path inside the workload"`
	ReadOnly bool     `json:"readOnly" doc:"it cannot be written there"`
}

// Overlay is where a unit may write.
type Overlay struct {
	Size Bytes  `json:"size,omitzero" doc:"how much; without it, nothing but kept paths can be written"`
	Keep []Path `json:"keep,omitempty" items:"0-64" unique:"yes" doc:"paths that outlive a change of the unit"`
}

// Hooks are commands, each a list of words; no shell reads them.
type Hooks struct {
	PreInit  [][]string `json:"preInit,omitempty" items:"0-32" doc:"before the program; each must end with 0"`
	PostInit [][]string `json:"postInit,omitempty" items:"0-32" doc:"once the program has been started"`
	Exit     [][]string `json:"exit,omitempty" items:"0-32" doc:"before the program is stopped"`
}

// Link is a connection to another unit.
type Link struct {
	To  Name   `json:"to" need:"yes" doc:"the other unit"`
	Via string `json:"via" need:"yes" enum:"rpc memory bus" doc:"what carries it"`
}

// Health says how a unit is asked whether it is healthy. At most one kind of probe is set; none means Process.
type Health struct {
	HTTP     *HTTPProbe    `json:"http,omitempty" one:"yes" doc:"GET is answered"`
	TCP      *TCPProbe     `json:"tcp,omitempty" one:"yes" doc:"a connection is accepted"`
	Exec     *ExecProbe    `json:"exec,omitempty" one:"yes" doc:"a command inside the workload ends with 0"`
	Process  *ProcessProbe `json:"process,omitempty" one:"yes" doc:"the program runs: {}"`
	Every    Duration      `json:"every,omitzero" doc:"between two probes"`
	Timeout  Duration      `json:"timeout,omitzero" doc:"of one probe"`
	Start    Duration      `json:"start,omitzero" doc:"how long failures do not count after the start"`
	After    int           `json:"after,omitempty" min:"1" max:"1000" doc:"successes in a row that make it healthy"`
	Failures int           `json:"failures,omitempty" min:"1" max:"1000" doc:"failures in a row that make it unhealthy"`
}

// HTTPProbe is a GET.
type HTTPProbe struct {
	Port   PortName `json:"port" need:"yes" doc:"name of a port under run"`
	Path   URLPath  `json:"path" need:"yes" doc:"path and query: /healthz"`
	Status int      `json:"status,omitempty" min:"100" max:"599" doc:"the one status that is good; without it, any 2xx or 3xx"`
}

// TCPProbe is a connection.
type TCPProbe struct {
	Port PortName `json:"port" need:"yes" doc:"name of a port under run"`
}

// ExecProbe is a command inside the workload.
type ExecProbe struct {
	Argv []string `json:"argv" need:"yes" items:"1-64" doc:"the command, word by word; no shell reads it"`
}

// ProcessProbe asks only whether the program runs.
type ProcessProbe struct{}

// Gate is what must hold after a change.
type Gate struct {
	Bake     Duration `json:"bake,omitzero" doc:"how long it must stay healthy; 10s if not given"`
	Deadline Duration `json:"deadline,omitzero" doc:"how long until the verdict must be there"`
	Metrics  []Metric `json:"metrics,omitempty" items:"0-32" doc:"figures that must not get worse"`
}

// Metric is a figure that must not get worse.
type Metric struct {
	Name   string  `json:"name" need:"yes" max:"100" doc:"what it is"`
	Scrape Scrape  `json:"scrape" need:"yes" doc:"where it is read"`
	Worse  Percent `json:"worse" need:"yes" doc:"how much worse it may be"`
}

// Scrape is where a metric is read.
type Scrape struct {
	Port  PortName `json:"port" need:"yes" doc:"name of a port under run"`
	Path  URLPath  `json:"path" need:"yes" doc:"path: /metrics"`
	Query string   `json:"query" need:"yes" max:"4096" doc:"the figure among those scraped"`
}

// Security is what a unit asks for beyond the default confinement.
type Security struct {
	Privileged   bool         `json:"privileged,omitempty" doc:"all of the host"`
	Escalation   bool         `json:"escalation,omitempty" doc:"set-uid programs and file capabilities work"`
	WritableBase bool         `json:"writableBase,omitempty" doc:"the base itself may be written"`
	Unconfined   bool         `json:"unconfined,omitempty" doc:"no seccomp, no security module"`
	Capabilities []Capability `json:"capabilities,omitempty" items:"0-64" unique:"yes" doc:"single capabilities"`
	Host         []string     `json:"host,omitempty" items:"0-6" unique:"yes" enum:"pid ipc uts user cgroup network" doc:"namespaces shared with the host"`
}
