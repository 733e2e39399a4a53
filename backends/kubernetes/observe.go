package kubernetes

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/registry/merkle"
)

// found is what there is of one workload on the cluster.
type found struct {
	name       string
	deployment *item
	sets       []item
	pods       []item // newest first
	services   []item
	files      []item
}

// nothing says that none of it is left.
func (f *found) nothing() bool {
	return f == nil || f.deployment == nil && len(f.sets)+len(f.pods)+len(f.services)+len(f.files) == 0
}

// selector chooses our objects, of one workload or of all.
func (b *Backend) selector(workload string) string {
	text := managedBy + "=" + fieldManager + "," + labelInstance + "=" + b.instance
	if workload != "" {
		text += "," + labelWorkload + "=" + workload
	}
	return text
}

// look lists what is ours: five lists at once, however many workloads there are. A namespace that is not there has none.
func (b *Backend) look(ctx context.Context, workload string) (map[string]*found, error) {
	c, err := b.cluster()
	if err != nil {
		return nil, err
	}
	kinds := []kind{deployments, replicaSets, pods, services, configMaps}
	lists, errs := make([]items, len(kinds)), make([]error, len(kinds))
	var all sync.WaitGroup
	for i, k := range kinds {
		all.Go(func() { errs[i] = c.list(ctx, k, b.selector(workload), &lists[i]) })
	}
	all.Wait()
	for _, err := range errs {
		if err != nil {
			return nil, b.answer(err)
		}
	}
	seen := map[string]*found{}
	for i, k := range kinds {
		for _, one := range lists[i].Items {
			name := one.Metadata.Labels[labelWorkload]
			f := seen[name]
			if f == nil {
				f = &found{name: name}
				seen[name] = f
			}
			f.add(k, one)
		}
	}
	for _, f := range seen {
		slices.SortFunc(f.pods, func(a, b item) int {
			return cmp.Or(b.Metadata.CreationTimestamp.Compare(a.Metadata.CreationTimestamp), strings.Compare(a.Metadata.Name, b.Metadata.Name))
		})
	}
	return seen, nil
}

func (f *found) add(k kind, one item) {
	switch k {
	case deployments:
		f.deployment = &one
	case replicaSets:
		f.sets = append(f.sets, one)
	case pods:
		f.pods = append(f.pods, one)
	case services:
		f.services = append(f.services, one)
	case configMaps:
		f.files = append(f.files, one)
	}
}

// Observe lists our workloads, whatever there is of each.
func (b *Backend) Observe(ctx context.Context) ([]backends.Status, error) {
	seen, err := b.look(ctx, "")
	if err != nil {
		return nil, err
	}
	list := make([]backends.Status, 0, len(seen))
	for _, name := range slices.Sorted(maps.Keys(seen)) {
		f := seen[name]
		s, note := f.status()
		if b.owes(f, note, &s) {
			b.postInitSoon(name)
		}
		list = append(list, s)
	}
	return list, nil
}

// note reads what a Deployment says of itself.
func (f *found) note() (note applied, err error) {
	if f.deployment == nil {
		return note, errors.New("its Deployment is missing")
	}
	if err := json.Unmarshal([]byte(f.deployment.Metadata.Annotations[noteApplied]), &note); err != nil {
		return note, errors.New("the Deployment's annotation " + noteApplied + " is not as it was applied")
	}
	return note, nil
}

// status is one workload as it is.
func (f *found) status() (backends.Status, applied) {
	s := backends.Status{Name: f.name, State: backends.Starting}
	note, err := f.note()
	if pod := f.pod(); pod != nil {
		podStatus(pod, &s)
	} else {
		s.Detail = f.noPod()
	}
	if err == nil {
		s.Spec, err = merkle.Parse(note.Spec)
	}
	s.Addresses = f.addresses(note)
	switch {
	case f.removed():
		s.State, s.Detail = backends.Exited, "it is being removed"
	case err != nil:
		s.State, s.Detail = backends.Damaged, err.Error()
	default:
		if changed := f.drift(note); changed != "" {
			s.State, s.Detail = backends.Damaged, changed
		}
	}
	return s, note
}

// removed says that it is on its way out: its Deployment is, or there is none and all that is left is.
func (f *found) removed() bool {
	if f.deployment != nil {
		return f.deployment.Metadata.DeletionTimestamp != nil
	}
	for _, one := range slices.Concat(f.sets, f.pods, f.services, f.files) {
		if one.Metadata.DeletionTimestamp == nil {
			return false
		}
	}
	return true
}

// pod is the one that runs the program, or is to: the newest that is not ending.
func (f *found) pod() *item {
	for i := range f.pods {
		if f.pods[i].Metadata.DeletionTimestamp == nil {
			return &f.pods[i]
		}
	}
	return nil
}

// noPod says why there is no pod yet.
func (f *found) noPod() string {
	if f.deployment == nil {
		return ""
	}
	for _, c := range f.deployment.Status.Conditions {
		if c.Type == "ReplicaFailure" && c.Status == "True" || c.Type == "Progressing" && c.Status == "False" {
			return c.Type + ": " + c.Message
		}
	}
	return "the cluster has made no pod of it yet"
}

// drift says what of our objects is not as it was applied.
func (f *found) drift(note applied) string {
	if changed := drift(plain(note.Deployment), f.deployment.Spec, "deployment"); changed != "" {
		return changed
	}
	for _, name := range slices.Sorted(maps.Keys(note.Services)) {
		i := slices.IndexFunc(f.services, func(one item) bool { return one.Metadata.Name == name })
		if i < 0 {
			return "the Service " + name + " is missing"
		}
		if changed := drift(plain(note.Services[name]), f.services[i].Spec, "service"); changed != "" {
			return changed
		}
	}
	if note.Files == "" {
		return ""
	}
	for _, one := range f.files {
		if one.Metadata.UID == note.Files {
			return ""
		}
	}
	return "the ConfigMap of its files is missing, or another than was applied"
}

// addresses tells the ports that can be reached.
func (f *found) addresses(note applied) []backends.Address {
	var all []backends.Address
	for _, port := range note.Ports {
		host, number := "", port.Number
		if port.Host != 0 {
			number = port.Host
			if pod := f.pod(); pod != nil {
				host = pod.Status.HostIP
			}
		} else {
			for _, one := range f.services {
				spec, _ := one.Spec.(map[string]any)
				if ip, ok := spec["clusterIP"].(string); ok && one.Metadata.Name == f.name {
					host = ip
				}
			}
		}
		if host != "" {
			all = append(all, backends.Address{Port: port.Name, Address: net.JoinHostPort(host, strconv.Itoa(number))})
		}
	}
	return all
}

// podStatus is what a pod does, as its container says, or what keeps it from having one.
func podStatus(pod *item, s *backends.Status) {
	i := slices.IndexFunc(pod.Status.ContainerStatuses, func(c containerStatus) bool { return c.Name == container })
	if i < 0 {
		s.Detail = pending(pod)
		if pod.Status.Phase == "Failed" {
			s.State = backends.Backoff
		}
		return
	}
	c := pod.Status.ContainerStatuses[i]
	s.Restarts = c.RestartCount
	last := cmp.Or(c.State.Terminated, c.LastState.Terminated)
	if last != nil {
		s.ExitCode, s.OOM = last.ExitCode, last.Reason == "OOMKilled"
	}
	waiting := c.State.Waiting
	switch {
	case c.State.Running != nil:
		s.State, s.Started = backends.Running, c.State.Running.StartedAt
	case c.State.Terminated != nil:
		s.State, s.Detail = backends.Backoff, ended(last)
	case waiting != nil && (waiting.Reason == "CrashLoopBackOff" || waiting.Reason == "RunContainerError" && last != nil):
		s.State, s.Detail = backends.Backoff, ended(last)
	case waiting != nil && waiting.Reason != "ContainerCreating" && waiting.Reason != "PodInitializing":
		s.Detail = strings.TrimSuffix(waiting.Reason+": "+waiting.Message, ": ")
	default:
		s.Detail = pending(pod)
	}
	if pod.Status.Phase == "Failed" && pod.Status.Reason != "" { // it was evicted, or its node has gone
		s.State, s.Detail = backends.Backoff, pod.Status.Reason+": "+pod.Status.Message
	}
}

func ended(t *terminated) string {
	if t == nil {
		return ""
	}
	text := fmt.Sprintf("its program ended with status %d", t.ExitCode)
	if t.Reason != "" && t.Reason != "Error" && t.Reason != "Completed" {
		text += ", " + t.Reason
	}
	if t.Message != "" {
		text += ": " + t.Message
	}
	return text
}

// pending says what a pod waits for.
func pending(pod *item) string {
	for _, c := range pod.Status.InitContainerStatuses {
		switch {
		case c.State.Running != nil:
			return "hook " + c.Name + " runs"
		case c.State.Terminated != nil && c.State.Terminated.ExitCode != 0:
			return fmt.Sprintf("hook %s ended with status %d", c.Name, c.State.Terminated.ExitCode)
		case c.State.Waiting != nil && c.State.Waiting.Reason != "PodInitializing" && c.State.Waiting.Reason != "ContainerCreating":
			return "hook " + c.Name + ": " + c.State.Waiting.Reason + ": " + c.State.Waiting.Message
		}
	}
	for _, c := range pod.Status.Conditions {
		if c.Type == "PodScheduled" && c.Status == "False" {
			return c.Reason + ": " + c.Message
		}
	}
	if pod.Status.Reason != "" {
		return pod.Status.Reason + ": " + pod.Status.Message
	}
	return "its pod is being made"
}

// one is what there is of one workload; ErrNotFound if nothing.
func (b *Backend) one(ctx context.Context, name string) (*found, error) {
	if !label(name) {
		return nil, backends.ErrNotFound
	}
	seen, err := b.look(ctx, name)
	if err != nil {
		return nil, err
	}
	if seen[name].nothing() {
		return nil, backends.ErrNotFound
	}
	return seen[name], nil
}

func missing(err error) bool { return apierrors.IsNotFound(err) }
