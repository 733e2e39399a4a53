package template

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"path"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/registry/merkle"
)

// What a unit gets that says nothing about it.
const (
	defaultUser  = 65532
	defaultGrace = Duration(10 * time.Second)
	defaultEvery = Duration(5 * time.Second) // of package gate
)

// DefaultBake is the bake of a gate that says none: a program that runs has not yet shown that it goes on.
const DefaultBake = Duration(10 * time.Second)

// Host is the facts that a site is rendered against.
type Host struct {
	Name         string                          `json:"name"`
	Zone         string                          `json:"zone"`
	OS           string                          `json:"os"`
	Arch         string                          `json:"arch"` // as Go names it
	Labels       map[string]string               `json:"labels"`
	CPU          int64                           `json:"cpu"`               // thousandths of a core
	CPUHas       []string                        `json:"cpuHas,omitempty"`  // what the processor has, as /proc/cpuinfo lists it
	Memory       int64                           `json:"memory"`            // bytes
	PIDs         int64                           `json:"-"`                 // for the rules; nothing is placed by it
	Disk         int64                           `json:"-"`                 // bytes, for the rules; nothing is placed by it
	Engines      []string                        `json:"-"`                 // where runtimes are that the host's owner names, for the rules
	Own          []string                        `json:"-"`                 // kMO's own binary, file, keys and plugins, for the rules
	Devices      map[string][]string             `json:"devices,omitempty"` // device nodes by the name that units know
	Doors        string                          `json:"doors"`             // folder on storage that is memory, below which doors are; "" is none
	Fingerprints map[string]backends.Fingerprint `json:"fingerprints"`      // by backend
}

// Plan is what a site asks of one host.
type Plan struct {
	Workloads []backends.Workload // dependencies first; the slice is the caller's, what it points to is read-only
	Checks    []Check             // Checks[i] belongs to Workloads[i]
	Skipped   []Skip              // the units that are not placed here, in the site's order
	// Lacks are E_FIT refusals for workloads that ask for more of the host than any fitting backend gives. Asking for so much is for
	// the rules to judge first; a plan that they let pass must still be refused with these.
	Lacks []error
}

// Check is what is watched about a workload.
type Check struct {
	Unit     string
	Workload string
	Needs    []string // units that must be healthy first, those included that are not placed on this host
	Health   Health
	Gate     Gate
	Passed   []string // why the variants and backends before were passed over
}

// Skip is a unit that is not placed on this host.
type Skip struct {
	Unit string `json:"unit"`
	Why  string `json:"why"` // "zone edge-c; want edge-a or edge-b"
}

// render is a unit rendered for one host.
type render struct {
	host     [sha256.Size]byte
	offers   []string
	skip     string
	workload backends.Workload
	check    Check
	ports    []int // of the host, that it takes
	lack     *refusal.Error
	err      error
}

// lastRender is a unit's newest render. It only saves time: what it holds follows from the unit and the host.
type lastRender struct{ atomic.Pointer[render] }

// Render says what the host is asked to run. The error joins a refusal for each unit that fits nowhere (E_FIT) and for each host
// port that two units claim (E_CONFLICT).
func (s *Site) Render(host Host) (Plan, error) {
	facts, err := json.Marshal(host)
	if err != nil {
		return Plan{}, fmt.Errorf("the host's facts: %v", err)
	}
	key := sha256.Sum256(facts)
	plan := Plan{Workloads: make([]backends.Workload, 0, len(s.units)), Checks: make([]Check, 0, len(s.units))}
	var errs []error
	taken := make(map[int]string) // host ports, by the unit that has them
	for _, e := range s.units {
		r, offers := e.rendered.Load(), s.offers[string(e.unit.Unit)]
		if r == nil || r.host != key || !slices.Equal(r.offers, offers) {
			r = e.render(host, offers)
			r.host, r.offers = key, offers
			e.rendered.Store(r)
		}
		switch {
		case r.err != nil:
			errs = append(errs, r.err)
		case r.skip != "":
			plan.Skipped = append(plan.Skipped, Skip{Unit: string(e.unit.Unit), Why: r.skip})
		default:
			plan.Workloads, plan.Checks = append(plan.Workloads, r.workload), append(plan.Checks, r.check)
			errs = append(errs, r.take(taken, host.Name)...)
		}
		if r.lack != nil {
			plan.Lacks = append(plan.Lacks, r.lack)
		}
	}
	if len(errs) > 0 {
		return Plan{}, errors.Join(errs...)
	}
	return plan, nil
}

// render renders one unit, to which others link by what it offers.
func (e *entry) render(host Host, offers []string) *render {
	if why := e.unit.misplaced(host); why != "" {
		return &render{skip: why}
	}
	w := e.unit.workload(e.files, host)
	w.Doors = append(w.Doors, doors(w.Unit, offers, host)...)
	r := &render{check: Check{Unit: w.Unit, Needs: texts(e.unit.Needs), Health: e.unit.Health, Gate: e.unit.Gate}}
	if r.err = e.unit.choose(&w, host, r); r.err != nil {
		return r
	}
	if r.err = seal(&w); r.err != nil {
		return r
	}
	r.check.Workload, r.workload, r.ports = w.Name, w, HostPorts(w, host.Fingerprints[w.Backend])
	return r
}

// misplaced says why a unit is not placed on a host, "" if it is.
func (u *Unit) misplaced(host Host) string {
	on := u.Place.On
	if len(on.Zone) > 0 && !slices.Contains(on.Zone, Name(host.Zone)) {
		return fmt.Sprintf("zone %s; want %s", show(host.Zone), words(texts(on.Zone)))
	}
	if len(on.Arch) > 0 && !slices.Contains(on.Arch, host.Arch) {
		return fmt.Sprintf("architecture %s; want %s", show(host.Arch), words(on.Arch))
	}
	for _, feature := range on.CPU {
		if !slices.Contains(host.CPUHas, string(feature)) {
			return fmt.Sprintf("the processor has no %s; want a host whose /proc/cpuinfo lists it", feature)
		}
	}
	var labels []string
	for key, value := range on.Labels {
		if have, ok := host.Labels[string(key)]; !ok || have != string(value) {
			labels = append(labels, fmt.Sprintf("label %s is %s; want %s", key, show(have), value))
		}
	}
	if len(labels) > 0 {
		return slices.Min(labels)
	}
	for _, device := range u.Resources.Devices {
		if len(host.Devices[string(device)]) == 0 {
			return fmt.Sprintf("no device %s; want a host whose agent.yaml names its nodes", device)
		}
	}
	if host.Doors == "" && slices.ContainsFunc(u.Links, func(l Link) bool { return l.Via != "bus" }) {
		return "no storage that is memory for its links; want /run/kmo or /dev/shm/kmo on a tmpfs"
	}
	if need := u.Resources.CPU.Min; int64(need) > host.CPU {
		return fmt.Sprintf("%s cores; want %s", CPU(host.CPU), need)
	}
	if need := u.Resources.Memory.Min; int64(need) > host.Memory {
		return fmt.Sprintf("%s bytes of memory; want %s", Bytes(host.Memory), need)
	}
	return ""
}

// workload is the unit without what depends on the variant.
func (u *Unit) workload(files []backends.File, host Host) backends.Workload {
	w := backends.Workload{
		Unit: string(u.Unit), Tier: u.Tier, Files: files,
		Run: backends.Run{Args: u.Run.Args, Dir: string(u.Run.Dir), User: u.Run.User, Grace: time.Duration(u.Run.Grace)},
		Resources: backends.Resources{
			CPUMin: int64(u.Resources.CPU.Min), CPU: int64(u.Resources.CPU.Max),
			MemoryMin: int64(u.Resources.Memory.Min), Memory: int64(u.Resources.Memory.Max),
			PIDs: u.Resources.PIDs.Max, Disk: int64(u.Resources.Disk.Max),
		},
		Overlay: backends.Overlay{Size: int64(u.Overlay.Size), Keep: texts(u.Overlay.Keep)},
		Hooks:   backends.Hooks{PreInit: u.Hooks.PreInit, PostInit: u.Hooks.PostInit, Exit: u.Hooks.Exit},
		Security: backends.Security{
			Privileged: u.Security.Privileged, Escalation: u.Security.Escalation, WritableBase: u.Security.WritableBase,
			Unconfined: u.Security.Unconfined, Capabilities: texts(u.Security.Capabilities), Host: u.Security.Host,
		},
	}
	for name, value := range u.Run.Env {
		if w.Run.Env == nil {
			w.Run.Env = make(map[string]string, len(u.Run.Env))
		}
		w.Run.Env[string(name)] = value
	}
	for _, name := range u.Resources.Devices {
		w.Resources.Devices = append(w.Resources.Devices, backends.Device{Name: string(name), Nodes: host.Devices[string(name)]})
	}
	for _, p := range u.Run.Ports {
		w.Run.Ports = append(w.Run.Ports, backends.Port{Name: string(p.Name), Port: p.Port, Host: p.Host})
	}
	for _, m := range u.Mounts {
		w.Mounts = append(w.Mounts, backends.Mount{From: m.From.clean(), To: string(m.To), ReadOnly: m.ReadOnly})
	}
	for _, link := range u.Links {
		if link.To != u.Unit { // what others see of it is its own, too
			w.Doors = append(w.Doors, doors(string(link.To), []string{link.Via}, host)...)
		}
	}
	return w
}

// doors are the doors of a unit for what others link to it by. The bus has none: it is no matter of one host.
func doors(unit string, vias []string, host Host) (list []backends.Door) {
	for _, via := range vias {
		if kind := map[string]string{"memory": "memory", "rpc": "socket"}[via]; kind != "" {
			list = append(list, backends.Door{Unit: unit, Via: kind, From: path.Join(host.Doors, unit, kind), To: path.Join("/run/kmo", unit, kind)})
		}
	}
	return list
}

// format is what a variant's bytes are and where they are.
func (v Variant) format() (backends.Format, Ref) {
	switch {
	case v.Image != "":
		return backends.OCI, v.Image
	case v.LXC != "":
		return backends.LXC, v.LXC
	case v.WASM != "":
		return backends.WASM, v.WASM
	case v.AppImage != "":
		return backends.AppImage, v.AppImage
	}
	return backends.Native, v.Native
}

// choose sets the workload's format, image and backend: the first variant and backend that fit, else, with a lack, the first that
// would if the unit asked for no more than the default confinement.
func (u *Unit) choose(w *backends.Workload, host Host, r *render) error {
	var near *Fit
	for fit := range u.fits(w, host) {
		switch {
		case fit.Why == "":
			u.Variants[fit.Variant-1].take(w, fit.Backend)
			return nil
		case near == nil && len(fit.guarded) > 0:
			near = &fit
		}
		r.check.Passed = append(r.check.Passed, fmt.Sprintf("variant %d (%s): %s", fit.Variant, fit.Format, fit.Why))
	}
	misfit := &refusal.Error{Code: "E_FIT", Subject: "unit " + string(u.Unit) + " on " + refusal.Clip(host.Name, maxShown),
		Got: strings.Join(r.check.Passed, "; "), Want: "a variant with a backend that has all of it"}
	if near == nil {
		return misfit
	}
	misfit.Want = "a unit that does not ask for " + words(near.guarded) + ", or a backend that has it"
	u.Variants[near.Variant-1].take(w, near.Backend)
	r.lack = misfit
	return nil
}

// Fit is one way in which a unit may run on a host: one of its variants on one backend.
type Fit struct {
	Variant int             `json:"variant"` // counted from 1
	Format  backends.Format `json:"format"`
	Backend string          `json:"backend"`
	Why     string          `json:"why,omitempty"` // why it cannot; "" if it can
	guarded []string        // what is all that it lacks: features that weaken the confinement
}

// Fits lists the ways in which a unit may run on a host, the preferred first. The first that can is the one that is taken.
func (s *Site) Fits(unit string, host Host) ([]Fit, error) {
	i := slices.IndexFunc(s.units, func(e *entry) bool { return string(e.unit.Unit) == unit })
	if i < 0 {
		return nil, fmt.Errorf("the site has no unit %s", show(unit))
	}
	u := s.units[i].unit
	w := u.workload(s.units[i].files, host)
	return slices.Collect(u.fits(&w, host)), nil
}

func (u *Unit) fits(w *backends.Workload, host Host) iter.Seq[Fit] {
	asked, guarded := u.features(w)
	return func(yield func(Fit) bool) {
		for i, v := range u.Variants {
			format, _ := v.format()
			for _, name := range v.candidates(format, host) {
				fit := Fit{Variant: i + 1, Format: format, Backend: name, Why: unfit(name, format, asked, host)}
				if fit.Why == "" {
					if fit.guarded = missing(host.Fingerprints[name], guarded); len(fit.guarded) > 0 {
						fit.Why = name + " has no " + words(fit.guarded)
					}
				}
				if !yield(fit) {
					return
				}
			}
		}
	}
}

// take makes the workload one of a variant on a backend.
func (v Variant) take(w *backends.Workload, backend string) {
	format, ref := v.format()
	w.Format, w.Backend = format, backend
	w.Image = backends.Image{Ref: string(ref), SHA256: v.SHA256(), Root: v.Merkle}
}

// SHA256 is the digest that the image is pinned by, in hex; "" if it is not pinned.
func (v Variant) SHA256() string {
	_, ref := v.format()
	_, digest, _ := strings.Cut(string(ref), "@sha256:")
	return digest
}

// candidates are the backends that may run a variant, the preferred first. Without a list these are all of the host's, the one that is named
// as the format first (native for images), then by name.
func (v Variant) candidates(format backends.Format, host Host) []string {
	if len(v.Backends) > 0 {
		return texts(v.Backends)
	}
	own := string(format)
	if format == backends.OCI {
		own = string(backends.Native)
	}
	var names []string
	for name := range host.Fingerprints {
		names = append(names, name)
	}
	slices.Sort(names)
	if at := slices.Index(names, own); at > 0 {
		names = slices.Insert(slices.Delete(names, at, at+1), 0, own)
	}
	if len(names) == 0 {
		return []string{own}
	}
	return names
}

// unfit says why a backend cannot run a workload, "" if it can.
func unfit(name string, format backends.Format, asked []backends.Feature, host Host) string {
	print, ok := host.Fingerprints[name]
	if !ok {
		return name + " is not on this host"
	}
	if !slices.Contains(print.Formats, format) {
		return fmt.Sprintf("%s runs no %s", name, format)
	}
	arch := host.Arch
	if format == backends.WASM {
		arch = "wasm"
	}
	if !slices.ContainsFunc(print.Platforms, func(p string) bool {
		parts := strings.Split(p, "/")
		return len(parts) > 1 && parts[1] == arch
	}) {
		return fmt.Sprintf("%s runs nothing for %s", name, refusal.Clip(arch, maxShown))
	}
	if lack := missing(print, asked); len(lack) > 0 {
		return name + " has no " + words(lack)
	}
	return ""
}

// missing lists the features that a fingerprint lacks.
func missing(print backends.Fingerprint, asked []backends.Feature) []string {
	var lack []string
	for _, f := range asked {
		if !print.Has(f) {
			lack = append(lack, string(f))
		}
	}
	return lack
}

// features lists what a workload asks of a backend: what any may ask for, and what weakens the confinement, which the rules judge first.
func (u *Unit) features(w *backends.Workload) (asked, guarded []backends.Feature) {
	bounded := *w
	bounded.Resources.Disk = max(w.Resources.Disk, w.Overlay.Size) // an overlay's size is a bound on the disk too
	for _, f := range bounded.Needs() {
		switch f {
		case backends.Mounts, backends.Capabilities, backends.HostNetwork, backends.HostNamespace, backends.Privileged, backends.WritableBase, backends.Unconfined:
			guarded = append(guarded, f)
		default:
			asked = append(asked, f)
		}
	}
	if u.Health.Exec != nil {
		asked = append(asked, backends.Exec)
	}
	return asked, guarded
}

// seal sets Spec and Name from everything else but where it runs and what fetching adds.
func seal(w *backends.Workload) error {
	covered := *w
	covered.Name, covered.Backend, covered.Spec = "", "", merkle.Digest{}
	covered.Image.Content, covered.Image.ContentRoot, covered.Image.Config = "", merkle.Digest{}, backends.ImageConfig{}
	text, err := json.Marshal(covered)
	if err != nil {
		return fmt.Errorf("unit %s: %v", w.Unit, err)
	}
	w.Spec = merkle.BlobRoot(text)
	w.Name = w.Unit + "-" + w.Spec.Short()
	return nil
}

// Exclusive says in words what two workloads of one unit cannot both have: "host port 18080", "kept path /var/lib/relay", "device
// camera", "writable mount /srv/data". Nothing means that they can stand side by side. prints are the host's fingerprints.
func Exclusive(a, b backends.Workload, prints map[string]backends.Fingerprint) []string {
	var shared []string
	theirs := HostPorts(b, prints[b.Backend])
	for _, port := range HostPorts(a, prints[a.Backend]) {
		if slices.Contains(theirs, port) {
			shared = append(shared, fmt.Sprintf("host port %d", port))
		}
	}
	for _, path := range a.Overlay.Keep {
		if slices.Contains(b.Overlay.Keep, path) {
			shared = append(shared, "kept path "+path)
		}
	}
	for _, device := range a.Resources.Devices {
		if slices.ContainsFunc(b.Resources.Devices, func(d backends.Device) bool { return d.Name == device.Name }) {
			shared = append(shared, "device "+device.Name)
		}
	}
	for _, mount := range a.Mounts {
		if !mount.ReadOnly && slices.ContainsFunc(b.Mounts, func(m backends.Mount) bool { return m.From == mount.From && !m.ReadOnly }) {
			shared = append(shared, "writable mount "+mount.From)
		}
	}
	return shared
}

// HostPorts lists the fixed ports of the host that a workload takes, in order. Without a network of its own, the port that the program listens on is
// one of them.
func HostPorts(w backends.Workload, print backends.Fingerprint) []int {
	direct := !print.Has(backends.OwnNetwork) || slices.Contains(w.Security.Host, "network")
	var taken []int
	for _, p := range w.Run.Ports {
		if p.Host != 0 {
			taken = append(taken, p.Host)
		}
		if p.Port != 0 && direct {
			taken = append(taken, p.Port)
		}
	}
	slices.Sort(taken)
	return slices.Compact(taken)
}

// take notes the host ports of a workload and refuses those that another unit has.
func (r *render) take(taken map[int]string, host string) []error {
	var errs []error
	for _, port := range r.ports {
		by, ok := taken[port]
		if !ok {
			taken[port] = r.workload.Unit
			continue
		}
		errs = append(errs, &refusal.Error{Code: "E_CONFLICT", Subject: fmt.Sprintf("units %s and %s on %s", by, r.workload.Unit, refusal.Clip(host, maxShown)),
			Got: fmt.Sprintf("host port %d for both", port), Want: "another port under run.ports of one of them"})
	}
	return errs
}
