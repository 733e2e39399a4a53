package backends

// Feature is something a workload may ask for and a backend may lack.
type Feature string

// The features a backend may have; [Features] says what each means.
const (
	PortMap       Feature = "port-map"
	LowPorts      Feature = "low-ports"
	LimitCPU      Feature = "limit-cpu"
	LimitMemory   Feature = "limit-memory"
	LimitPIDs     Feature = "limit-pids"
	LimitDisk     Feature = "limit-disk"
	Overlays      Feature = "overlay"
	OverlayRoot   Feature = "overlay-root"
	OwnNetwork    Feature = "own-network"
	Keep          Feature = "keep"
	Files         Feature = "files"
	Secrets       Feature = "secrets"
	MemoryPool    Feature = "memory-pool"
	Sockets       Feature = "sockets"
	Hooking       Feature = "hooks"
	HostNetwork   Feature = "host-network"
	Exec          Feature = "exec"
	Mounts        Feature = "mounts"
	Devices       Feature = "devices"
	Capabilities  Feature = "capabilities"
	HostNamespace Feature = "host-namespace"
	Privileged    Feature = "privileged"
	WritableBase  Feature = "writable-base"
	Unconfined    Feature = "unconfined"
)

// Described is a feature and what it means, in the words of a unit.
type Described struct {
	Feature Feature
	Meaning string
}

// Features lists every feature there is, as documents show them.
func Features() []Described {
	return []Described{
		{PortMap, "a port of the workload is published under another number of the host"},
		{OwnNetwork, "a workload has a network of its own, so its ports are nobody else's, unless it asks for the host's; no unit asks for this"},
		{LowPorts, "ports below 1024 can be listened on"},
		{LimitCPU, "resources.cpu.max is enforced"},
		{LimitMemory, "resources.memory.max is enforced"},
		{LimitPIDs, "resources.pids.max is enforced"},
		{LimitDisk, "resources.disk.max and overlay.size are enforced"},
		{Overlays, "the workload may write, beside an immutable base: at least to /tmp"},
		{OverlayRoot, "what may be written is all of the root, not only /tmp; no unit asks for this"},
		{Keep, "kept paths survive a change of spec"},
		{Files, "files are placed"},
		{Secrets, "secrets are placed, on storage that is memory"},
		{MemoryPool, "links via memory: a folder whose files units of this host share and map"},
		{Sockets, "links via rpc: a folder of unix sockets that units of this host reach each other by"},
		{Hooking, "hooks are run"},
		{HostNetwork, "security.host can name network: the host's is shared"},
		{Exec, "commands can be run inside, by a health probe too"},
		{Mounts, "folders of the host can be mounted"},
		{Devices, "named devices can be given"},
		{Capabilities, "security.capabilities and security.escalation can be given"},
		{HostNamespace, "security.host can name other namespaces than network"},
		{Privileged, "security.privileged can be given"},
		{WritableBase, "security.writableBase can be given"},
		{Unconfined, "security.unconfined can be given"},
	}
}
