// Package cgroup bounds and counts workloads in cgroups of version 1, 2 or a mixture, whichever hierarchy can bound what is to be bounded.
//
// It is plain file work, so that a tree on disk tests the version a machine has not. Only folders below its own are ever made,
// written, counted or removed.
package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/kindos/kmo/backends"
	"golang.org/x/sys/unix"
)

// Groups are the cgroups of one keeper's workloads. The zero value bounds nothing.
type Groups struct {
	folder string // below each hierarchy: kmo/<backend>-<hash of the state folder>
	kinds  []kind
}

// kind is one kind of bound, the kernel's controller, and where its hierarchy is mounted.
type kind struct {
	name string // memory, cpu, pids, cpuacct
	base string
	v2   bool
}

// Find looks below root, usually /sys/fs/cgroup, for hierarchies in which a bound can be set. It sets one, on a cgroup that it makes
// and removes: which controllers a folder names, and what its mode allows, does not say whether the kernel hands them down.
func Find(root, folder string) Groups {
	c := Groups{folder: folder}
	for _, name := range []string{"memory", "cpu", "cpuacct", "pids"} {
		for _, at := range []kind{{name, root, true}, {name, filepath.Join(root, "unified"), true}, {name, filepath.Join(root, name), false}} {
			if at.there() && at.bounds(folder) {
				c.kinds = append(c.kinds, at)
				break
			}
		}
	}
	return c
}

// trial is the cgroup that Find makes. No workload is named so.
const trial = ".trial"

func (k kind) bounds(folder string) bool {
	alone := Groups{folder: folder, kinds: []kind{k}}
	dir := filepath.Join(k.base, folder, trial)
	defer func() {
		_ = os.Remove(dir)
		alone.prune(k.base)
	}()
	return alone.Make(trial, map[string]backends.Resources{"memory": {Memory: 64 << 20}, "cpu": {CPU: 1000}, "pids": {PIDs: 64}}[k.name]) == nil
}

func (k kind) there() bool {
	if !k.v2 {
		_, err := os.Stat(filepath.Join(k.base, "tasks"))
		return err == nil && writable(k.base)
	}
	list, err := os.ReadFile(filepath.Join(k.base, "cgroup.controllers"))
	return err == nil && slices.Contains(strings.Fields(string(list)), k.name) && writable(k.base)
}

func writable(dir string) bool { return unix.Access(dir, unix.W_OK) == nil }

// Has says whether a kind of bound can be set: "memory", "cpu" or "pids".
func (c Groups) Has(name string) bool {
	return slices.ContainsFunc(c.kinds, func(have kind) bool { return have.name == name })
}

// bases lists each hierarchy once, as the first kind that it has.
func (c Groups) bases() (list []kind) {
	for _, one := range c.kinds {
		if !slices.ContainsFunc(list, func(have kind) bool { return have.base == one.base }) {
			list = append(list, one)
		}
	}
	return list
}

// Make makes a workload's cgroups with its bounds. A bound that cannot be set is an error: nothing runs unbounded that was to be bounded.
func (c Groups) Make(name string, r backends.Resources) error {
	for _, base := range c.bases() {
		if err := makeAll(filepath.Join(base.base, c.folder, name)); err != nil {
			return err
		}
		if base.v2 {
			c.delegate(base.base)
		}
	}
	for _, bound := range []struct {
		name string
		want int64
	}{{"memory", r.Memory}, {"cpu", r.CPU}, {"pids", r.PIDs}} {
		if bound.want <= 0 {
			continue
		}
		i := slices.IndexFunc(c.kinds, func(have kind) bool { return have.name == bound.name })
		if i < 0 {
			return fmt.Errorf("%s bound: no %s cgroup takes one on this host", bound.name, bound.name)
		}
		if err := c.bound(c.kinds[i], name, bound.want, r); err != nil {
			return fmt.Errorf("%s bound: %v", bound.name, err)
		}
	}
	return nil
}

// makeAll is MkdirAll against another process that removes an empty parent at the same time.
func makeAll(at string) (err error) {
	for range 5 {
		if err = os.MkdirAll(at, 0o755); !errors.Is(err, os.ErrNotExist) { // cgroups are read by all
			return err
		}
	}
	return err
}

// delegate lets the controllers of version 2 reach our folders. What is refused shows when the bound is set.
func (c Groups) delegate(base string) {
	at := base
	for _, part := range append([]string{""}, strings.Split(c.folder, "/")...) {
		at = filepath.Join(at, part)
		for _, one := range c.kinds {
			if one.base == base {
				_ = os.WriteFile(filepath.Join(at, "cgroup.subtree_control"), []byte("+"+one.name), 0o644)
			}
		}
	}
}

func (c Groups) bound(at kind, name string, want int64, r backends.Resources) error {
	dir := filepath.Join(at.base, c.folder, name)
	put := func(file string, value any) error {
		return os.WriteFile(filepath.Join(dir, file), fmt.Append(nil, value), 0o644)
	}
	switch {
	case at.name == "memory" && at.v2:
		return errors.Join(put("memory.max", want), ifThere(put("memory.swap.max", 0)))
	case at.name == "memory":
		return errors.Join(put("memory.limit_in_bytes", want), ifThere(put("memory.memsw.limit_in_bytes", want)))
	case at.name == "pids":
		return put("pids.max", want)
	case at.v2:
		weight := min(max(r.CPUMin/10, 1), 10000)
		return errors.Join(put("cpu.max", fmt.Sprint(max(want*100, 1000), " 100000")), put("cpu.weight", weight))
	}
	return errors.Join(put("cpu.cfs_period_us", 100000), put("cpu.cfs_quota_us", max(want*100, 1000)),
		put("cpu.shares", max(r.CPUMin*1024/1000, 2)))
}

// ifThere forgives a file that this kernel has not: no swap accounting.
func ifThere(err error) error {
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) {
		return nil
	}
	return err
}

// Usage reads what a workload uses. What cannot be read is 0.
func (c Groups) Usage(name string) (u backends.Usage) {
	for _, one := range c.kinds {
		dir := filepath.Join(one.base, c.folder, name)
		switch {
		case one.name == "memory" && one.v2:
			u.Memory = Number(dir, "memory.current", "")
		case one.name == "memory":
			u.Memory = Number(dir, "memory.usage_in_bytes", "")
		case one.name == "pids":
			u.PIDs = Number(dir, "pids.current", "")
		case one.name == "cpu" && one.v2:
			u.CPU = time.Duration(Number(dir, "cpu.stat", "usage_usec")) * time.Microsecond
		case one.name == "cpuacct":
			u.CPU = time.Duration(Number(dir, "cpuacct.usage", ""))
		}
	}
	return u
}

// OOMs counts the processes of a workload that were killed for want of memory.
func (c Groups) OOMs(name string) int64 {
	for _, one := range c.kinds {
		if one.name != "memory" {
			continue
		}
		file := "memory.oom_control"
		if one.v2 {
			file = "memory.events"
		}
		return Number(filepath.Join(one.base, c.folder, name), file, "oom_kill")
	}
	return 0
}

// Number reads a file of a cgroup as a number, or, with a key, the number after that. What cannot be read is 0.
func Number(dir, file, key string) int64 {
	// By hand: package os would register each file with the poller, which costs more than the reading.
	fd, err := unix.Open(filepath.Join(dir, file), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0
	}
	defer unix.Close(fd)
	var text [4096]byte
	n, err := unix.Read(fd, text[:])
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(text[:n]))
	at := 0
	if key != "" {
		at = slices.Index(fields, key) + 1
	}
	if at >= len(fields) || at == 0 && key != "" {
		return 0
	}
	value, err := strconv.ParseInt(fields[at], 10, 64)
	if err != nil {
		return 0
	}
	return value
}

// Hold says whether a process, by the text of its /proc/PID/cgroup, is in all cgroups of a workload.
func (c Groups) Hold(name, text string) bool {
	for _, base := range c.bases() {
		in := slices.ContainsFunc(strings.Split(text, "\n"), func(line string) bool {
			parts := strings.SplitN(line, ":", 3)
			if len(parts) != 3 || !strings.HasSuffix(parts[2], "/"+c.folder+"/"+name) {
				return false
			}
			return base.v2 && parts[1] == "" || !base.v2 && slices.Contains(strings.Split(parts[1], ","), base.name)
		})
		if !in {
			return false
		}
	}
	return true
}

// Names lists the workloads that have a cgroup.
func (c Groups) Names() (list []string) {
	for _, base := range c.bases() {
		found, err := os.ReadDir(filepath.Join(base.base, c.folder))
		if err != nil {
			continue
		}
		for _, entry := range found {
			if entry.IsDir() && entry.Name() != trial && !slices.Contains(list, entry.Name()) {
				list = append(list, entry.Name())
			}
		}
	}
	return list
}

// Kill ends everybody in a workload's cgroups: at once where version 2 can, otherwise one by one, each held by a pidfd before it is
// looked at again, so that no number that has become another's is signalled.
func (c Groups) Kill(name string) {
	for _, base := range c.bases() {
		dir := filepath.Join(base.base, c.folder, name)
		if base.v2 {
			f, err := os.OpenFile(filepath.Join(dir, "cgroup.kill"), os.O_WRONLY, 0)
			if err == nil {
				_, err = f.WriteString("1")
				if err = errors.Join(err, f.Close()); err == nil {
					continue
				}
			}
		}
		for _, pid := range members(dir) {
			fd, err := unix.PidfdOpen(pid, 0)
			if err != nil {
				continue // gone
			}
			if slices.Contains(members(dir), pid) {
				_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
			}
			_ = unix.Close(fd)
		}
	}
}

// members lists who is in one cgroup.
func members(dir string) (pids []int) {
	text, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return nil
	}
	for _, field := range strings.Fields(string(text)) {
		if pid, err := strconv.Atoi(field); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids
}

// Remove removes a workload's cgroups and what a runtime made below them, which must be empty or about to be, and those above if they are
// the last.
func (c Groups) Remove(name string) error {
	var all error
	for _, base := range c.bases() {
		at := filepath.Join(base.base, c.folder, name)
		err := removeAll(at)
		for pause := time.Millisecond; err != nil && !errors.Is(err, os.ErrNotExist) && pause < time.Second; pause *= 2 {
			time.Sleep(pause) // an ended process leaves its cgroup a little later
			err = removeAll(at)
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			all = errors.Join(all, err)
		}
		c.prune(base.base)
	}
	return all
}

// removeAll removes a cgroup and those in it. The files of one are the kernel's.
func removeAll(at string) error {
	err := os.Remove(at)
	if err == nil || errors.Is(err, os.ErrNotExist) {
		return err
	}
	inner, _ := os.ReadDir(at) // what cannot be read is not removed
	for _, one := range inner {
		if one.IsDir() {
			if inner := removeAll(filepath.Join(at, one.Name())); inner != nil && !errors.Is(inner, os.ErrNotExist) {
				return inner
			}
		}
	}
	return os.Remove(at)
}

// prune removes the folders above the workloads' if they are empty.
func (c Groups) prune(base string) {
	above := filepath.Join(base, c.folder)
	_ = os.Remove(above) // no error counts: there are others
	_ = os.Remove(filepath.Dir(above))
}

// Joins are the files through which a thread joins a workload's cgroups by writing "0", one a hierarchy.
//
// A thread that moves itself, alone, by the tasks file of version 1 does not take the lock of all forks, which costs
// milliseconds for each hierarchy; execve leaves no other thread.
func (c Groups) Joins(name string) (files []string) {
	for _, base := range c.bases() {
		file := "tasks"
		if base.v2 {
			file = "cgroup.procs"
		}
		files = append(files, filepath.Join(base.base, c.folder, name, file))
	}
	return files
}
