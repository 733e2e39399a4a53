package kubernetes

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/kindos/kmo/backends"
)

// The labels of our objects, beside app.kubernetes.io/managed-by. Whatever lacks one of the first two is not ours.
const (
	managedBy     = "app.kubernetes.io/managed-by"
	labelInstance = "kmo/instance"
	labelUnit     = "kmo/unit"
	labelWorkload = "kmo/workload"
	labelSpec     = "kmo/spec" // its first eight digits; a label holds no more
)

// The annotations of a Deployment of ours.
const (
	noteApplied  = "kmo/applied"   // what was applied: see applied
	notePostInit = "kmo/post-init" // of which container the postInit hooks were run, and how that ended: see outcome
)

const (
	container  = "app"
	firstPort  = 20000 // of those that are chosen; a pod's network is its own
	filesName  = "files"
	overlay    = "overlay"
	hostPrefix = "host-" // of the Service of ports with a number of the host
)

// object is one object as it is sent: only the fields that are to be ours.
type object map[string]any

func (o object) name() string {
	m, _ := o["metadata"].(object)
	name, _ := m["name"].(string)
	return name
}

// applied is what a Deployment of ours says of itself: what a later process must know to judge it, to reach it and to end it.
type applied struct {
	Unit       string            `json:"unit"`
	Spec       string            `json:"spec"`
	Ports      []reached         `json:"ports,omitempty"`
	PostInit   [][]string        `json:"postInit,omitempty"`
	Exit       [][]string        `json:"exit,omitempty"`
	Files      string            `json:"files,omitempty"` // uid of the ConfigMap, which cannot be changed
	Deployment object            `json:"deployment"`
	Services   map[string]object `json:"services,omitempty"`
}

// reached is a port as it is reached: by the cluster's address of the workload, or as a port of the node that it runs on.
type reached struct {
	Name   string `json:"name"`
	Number int    `json:"number"`
	Host   int    `json:"host,omitempty"`
}

// plan is a workload as objects.
type plan struct {
	files      object // nil if there are none
	services   []object
	deployment object
	applied    applied
}

// planned says what a workload becomes. It has been admitted.
func planned(w backends.Workload, instance string) plan {
	labels := object{
		managedBy: fieldManager, labelInstance: instance, labelUnit: w.Unit, labelWorkload: w.Name, labelSpec: w.Spec.Short(),
	}
	identity := object{labelInstance: instance, labelWorkload: w.Name}
	numbers := inside(w.Run.Ports)
	spec := object{
		"replicas":             1,
		"revisionHistoryLimit": 0,
		"strategy":             object{"type": "Recreate"}, // the new beside the old is a workload of its own
		"selector":             object{"matchLabels": identity},
		"template":             object{"metadata": object{"labels": labels}, "spec": podSpec(w, numbers)},
	}
	p := plan{
		deployment: object{"apiVersion": "apps/v1", "kind": "Deployment", "metadata": object{"name": w.Name, "labels": labels}, "spec": spec},
		applied: applied{
			Unit: w.Unit, Spec: w.Spec.String(), PostInit: w.Hooks.PostInit, Exit: w.Hooks.Exit, Deployment: spec, Services: map[string]object{},
		},
	}
	if len(w.Files) > 0 {
		content := map[string][]byte{}
		for i, file := range w.Files {
			content[key(i)] = file.Content
		}
		p.files = object{
			"apiVersion": "v1", "kind": "ConfigMap", "metadata": object{"name": w.Name, "labels": labels}, "immutable": true, "binaryData": content,
		}
	}
	var within, host []any
	for i, port := range w.Run.Ports {
		number := numbers[i]
		p.applied.Ports = append(p.applied.Ports, reached{Name: port.Name, Number: number, Host: port.Host})
		at := object{"name": port.Name, "port": number, "targetPort": number, "protocol": "TCP"}
		if port.Host == 0 {
			within = append(within, at)
			continue
		}
		at["nodePort"] = port.Host
		host = append(host, at)
	}
	add := func(name, kind string, ports []any) {
		if len(ports) == 0 {
			return
		}
		spec := object{"type": kind, "selector": identity, "ports": ports}
		p.applied.Services[name] = spec
		p.services = append(p.services, object{"apiVersion": "v1", "kind": "Service", "metadata": object{"name": name, "labels": labels}, "spec": spec})
	}
	add(w.Name, "ClusterIP", within)
	add(hostPrefix+w.Name[max(0, len(w.Name)-58):], "NodePort", host)
	return p
}

// note puts what was applied into the Deployment.
func (p *plan) note() error {
	text, err := json.Marshal(p.applied)
	if err != nil {
		return err
	}
	if m, ok := p.deployment["metadata"].(object); ok {
		m["annotations"] = object{noteApplied: string(text)}
	}
	return nil
}

func key(i int) string { return "f" + strconv.Itoa(i) }

// inside chooses the number each port has inside.
func inside(ports []backends.Port) []int {
	numbers := make([]int, len(ports))
	for i, port := range ports {
		numbers[i] = cmp.Or(port.Port, port.Host)
	}
	next := firstPort
	for i := range numbers {
		for numbers[i] == 0 {
			if !slices.Contains(numbers, next) {
				numbers[i] = next
			}
			next++
		}
	}
	return numbers
}

// podSpec is the pod that runs a workload. It passes the cluster's strictest standard for pods where the user is not 0.
func podSpec(w backends.Workload, numbers []int) object {
	security := object{"seccompProfile": object{"type": "RuntimeDefault"}}
	if w.Run.User != 0 && (len(w.Files) > 0 || w.Overlay.Size > 0) {
		security["fsGroup"] = w.Run.User // what is placed belongs to root and to this group
	}
	if slices.ContainsFunc(numbers, func(n int) bool { return n < 1024 }) {
		security["sysctls"] = []any{object{"name": "net.ipv4.ip_unprivileged_port_start", "value": "0"}}
	}
	main := containerSpec(w, numbers)
	main["name"] = container
	if len(w.Run.Ports) > 0 {
		main["ports"] = containerPorts(w.Run.Ports, numbers)
	}
	argv(main, w)
	spec := object{
		"automountServiceAccountToken": false, "enableServiceLinks": false, "nodeSelector": object{"kubernetes.io/os": "linux"},
		"terminationGracePeriodSeconds": max(1, int((w.Run.Grace+time.Second-1)/time.Second)),
		"securityContext":               security,
		"containers":                    []any{main},
	}
	var before []any
	for i, hook := range w.Hooks.PreInit {
		c := containerSpec(w, numbers)
		c["name"], c["command"] = preInit(i), literal(hook)
		before = append(before, c)
	}
	if len(before) > 0 {
		spec["initContainers"] = before
		main["restartPolicy"] = "Always" // and then all of the pod is begun again, with what comes before the program
		main["restartPolicyRules"] = []any{object{
			"action": "RestartAllContainers", "exitCodes": object{"operator": "NotIn", "values": []any{255}}},
			object{"action": "RestartAllContainers", "exitCodes": object{"operator": "In", "values": []any{255}}},
		}
	}
	if volumes := volumes(w); len(volumes) > 0 {
		spec["volumes"] = volumes
	}
	return spec
}

func preInit(i int) string { return "pre-init-" + strconv.Itoa(i) }

func containerPorts(ports []backends.Port, numbers []int) []any {
	var all []any
	for i, port := range ports {
		all = append(all, object{"name": port.Name, "containerPort": numbers[i], "protocol": "TCP"})
	}
	return all
}

// containerSpec is what the program and its preInit hooks have in common.
func containerSpec(w backends.Workload, numbers []int) object {
	c := object{
		"image": w.Image.Ref, "imagePullPolicy": "IfNotPresent",
		"securityContext": object{
			"runAsUser": w.Run.User, "runAsGroup": w.Run.User, "runAsNonRoot": w.Run.User != 0, "readOnlyRootFilesystem": true,
			"allowPrivilegeEscalation": false, "privileged": false, "capabilities": object{"drop": []any{"ALL"}},
		},
	}
	var env []any
	values := variables(w, numbers)
	for _, name := range slices.Sorted(maps.Keys(values)) {
		env = append(env, object{"name": name, "value": dollars(values[name])})
	}
	c["env"] = env
	if dir := cmp.Or(w.Run.Dir, w.Image.Config.Dir); dir != "" {
		c["workingDir"] = dir
	}
	limits, requests := object{}, object{}
	if w.Resources.CPU > 0 {
		limits["cpu"] = resource.NewMilliQuantity(w.Resources.CPU, resource.DecimalSI).String()
		requests["cpu"] = resource.NewMilliQuantity(w.Resources.CPUMin, resource.DecimalSI).String()
	}
	if w.Resources.Memory > 0 {
		limits["memory"] = resource.NewQuantity(w.Resources.Memory, resource.BinarySI).String()
		requests["memory"] = resource.NewQuantity(w.Resources.MemoryMin, resource.BinarySI).String()
	}
	if len(limits) > 0 {
		c["resources"] = object{"limits": limits, "requests": requests}
	}
	var mounts []any
	for i, file := range w.Files {
		mounts = append(mounts, object{"name": filesName, "mountPath": file.To, "subPath": key(i), "readOnly": true})
	}
	if w.Overlay.Size > 0 {
		mounts = append(mounts, object{"name": overlay, "mountPath": "/tmp"})
	}
	if mounts != nil {
		c["volumeMounts"] = mounts
	}
	return c
}

// variables are the environment, with the ports' numbers inside.
func variables(w backends.Workload, numbers []int) map[string]string {
	w.Run.Ports = slices.Clone(w.Run.Ports)
	for i := range w.Run.Ports {
		w.Run.Ports[i].Port = numbers[i]
	}
	return w.Env()
}

// argv is what the program is started with. Where nobody has said what the image's entrypoint is, the cluster knows.
func argv(c object, w backends.Workload) {
	entrypoint := w.Image.Config.Entrypoint
	if len(entrypoint) > 0 {
		c["command"] = literal(entrypoint)
	}
	if args := w.Argv()[len(entrypoint):]; len(args) > 0 {
		c["args"] = literal(args)
	}
}

// volumes are the files, and an overlay in memory: that is the one the kernel bounds, where one on a node's disk is looked at now and then.
func volumes(w backends.Workload) []any {
	var all []any
	if len(w.Files) > 0 {
		var content []any
		for i, file := range w.Files {
			content = append(content, object{"key": key(i), "path": key(i), "mode": file.Mode})
		}
		all = append(all, object{"name": filesName, "configMap": object{"name": w.Name, "items": content}})
	}
	if size := w.Overlay.Size; size > 0 {
		if w.Resources.Disk > 0 {
			size = min(size, w.Resources.Disk)
		}
		bound := resource.NewQuantity(size, resource.BinarySI).String()
		all = append(all, object{"name": overlay, "emptyDir": object{"medium": "Memory", "sizeLimit": bound}})
	}
	return all
}

// dollars keeps a text as it is: the kubelet would put variables into it.
func dollars(text string) string { return strings.ReplaceAll(text, "$", "$$") }

func literal(argv []string) []any {
	var all []any
	for _, arg := range argv {
		all = append(all, dollars(arg))
	}
	return all
}

// pinned refuses an image that is not named by its digest alone.
func pinned(image backends.Image) error {
	refuse := func(why string) error {
		return &backends.FeatureError{Backend: Name, Feature: backends.Feature(backends.OCI), Detail: fmt.Sprintf(
			"%q %s; want host/repository@sha256:… and 64 digits", image.Ref, why)}
	}
	digest := regexp.MustCompile(`^[^@]+@sha256:([0-9a-f]{64})$`).FindStringSubmatch(image.Ref)
	repository, _, _ := strings.Cut(image.Ref, "@")
	switch tag := strings.LastIndexByte(repository, ':'); {
	case digest == nil:
		return refuse("names no digest, and what it names can change")
	case tag > strings.LastIndexByte(repository, '/'):
		return refuse("has a tag beside its digest")
	case image.SHA256 != "" && strings.TrimPrefix(image.SHA256, "sha256:") != digest[1]:
		return refuse("is not the image of digest " + image.SHA256 + " that was verified")
	}
	return nil
}

// placeable refuses a file that the cluster cannot give the workload's user as asked: it belongs to root, and to the user's group.
func placeable(w backends.Workload) error {
	for _, file := range w.Files {
		if w.Run.User != 0 && file.Mode&0o440 != 0o440 {
			return &backends.FeatureError{Backend: Name, Feature: backends.Files, Detail: fmt.Sprintf(
				"%s has mode %04o, and a file of a cluster belongs to root and to the workload's group, which both can read it; want 0440 or more", file.To, file.Mode)}
		}
	}
	return nil
}
