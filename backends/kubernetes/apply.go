package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/kindos/kmo/backends"
)

// label says whether a workload's name is one: that of an object, and a value of a label.
func label(name string) bool {
	return regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`).MatchString(name)
}

// hold waits until no other call changes a workload, and keeps others from it until release.
func (b *Backend) hold(ctx context.Context, name string) (release func(), err error) {
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		b.mu.Lock()
		held, is := b.busy[name]
		if !is {
			mine := make(chan struct{})
			b.busy[name] = mine
			b.mu.Unlock()
			return func() {
				b.mu.Lock()
				defer b.mu.Unlock()
				delete(b.busy, name)
				close(mine)
			}, nil
		}
		b.mu.Unlock()
		select {
		case <-held:
		case <-ctx.Done():
		}
	}
}

// Apply makes a workload's objects as they should be. Without hooks it does not wait for the cluster to pull the image and start the
// program; with hooks it does, since how they end is its answer.
func (b *Backend) Apply(ctx context.Context, w backends.Workload) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	c, err := b.cluster()
	if err != nil {
		return err
	}
	v, err := c.version(ctx)
	if err != nil {
		return b.answer(err)
	}
	able := fingerprint(v)
	if err := errors.Join(able.Check(w, b.options.State, "/proc", "/sys", "/dev"), pinned(w.Image), placeable(w)); err != nil {
		return err
	}
	if !label(w.Name) || !label(w.Unit) {
		return &backends.StartError{Workload: w.Name, Stage: "name", Cause: "it is no name of an object; want lower-case letters, digits and dashes, 63 at most"}
	}
	p := planned(w, b.instance)
	release, err := b.hold(ctx, w.Name)
	if err != nil {
		return err
	}
	defer release()
	created, err := b.place(ctx, c, w, &p)
	if err != nil {
		return b.answer(err)
	}
	if len(w.Hooks.PreInit)+len(w.Hooks.PostInit) == 0 {
		return nil
	}
	err = b.begun(ctx, c, w)
	var start *backends.StartError
	if created && errors.As(err, &start) && strings.HasPrefix(start.Stage, "preInit") { // or the kubelet tries again, and one day it may start
		err = errors.Join(err, b.clear(ctx, w.Name))
	}
	if err != nil {
		return err
	}
	return b.postInit(ctx, w.Name)
}

// place applies the objects, those the Deployment needs before it. It says whether the Deployment was not there before.
func (b *Backend) place(ctx context.Context, c *cluster, w backends.Workload, p *plan) (created bool, err error) {
	there, err := b.ours(ctx, c, p)
	if err != nil {
		return false, err
	}
	if there != nil && there.Metadata.DeletionTimestamp != nil { // a removal that was cut off
		if err := b.clear(ctx, w.Name); err != nil {
			return false, err
		}
		there = nil
	}
	if there == nil {
		if err := b.send(ctx, c, w, p, true); missing(err) {
			if err := c.makeNamespace(ctx); err != nil {
				return false, err
			}
			err = b.send(ctx, c, w, p, true)
			if err != nil {
				return false, err
			}
		} else if err != nil {
			return false, err
		}
	}
	err = b.send(ctx, c, w, p, false)
	if there == nil && err != nil && ctx.Err() == nil && !silent(err) { // a trial does not try everything
		err = errors.Join(err, b.clear(ctx, w.Name))
	}
	return there == nil, err
}

// send applies the objects of a plan, or only asks the cluster whether it would take them all as they are.
func (b *Backend) send(ctx context.Context, c *cluster, w backends.Workload, p *plan, dry bool) error {
	apply := func(k kind, o object) (item, error) {
		var now item
		err := refused(w, k, c.apply(ctx, k, o, dry, &now))
		return now, err
	}
	if p.files != nil {
		now, err := apply(configMaps, p.files)
		if err != nil {
			return err
		}
		p.applied.Files = now.Metadata.UID
	}
	for _, o := range p.services {
		if _, err := apply(services, o); err != nil {
			return err
		}
	}
	if err := p.note(); err != nil {
		return err
	}
	now, err := apply(deployments, p.deployment)
	if err != nil {
		return err
	}
	if changed := drift(plain(p.applied.Deployment), now.Spec, "deployment"); changed != "" {
		feature := backends.Feature(backends.OCI)
		if strings.Contains(changed, "restartPolicy") {
			feature = backends.Hooking
		}
		return &backends.FeatureError{Backend: Name, Feature: feature, Detail: "the cluster does not take it as it is: " + changed}
	}
	return nil
}

// ours returns the Deployment of a plan, nil if there is none. A name that another's object has is an error.
func (b *Backend) ours(ctx context.Context, c *cluster, p *plan) (*item, error) {
	check := func(k kind, o object) (*item, error) {
		var now item
		err := c.get(ctx, k, o.name(), &now)
		if missing(err) {
			return nil, nil //nolint:nilnil // there is none
		}
		if err != nil {
			return nil, err
		}
		has := now.Metadata.Labels
		if has[managedBy] != fieldManager || has[labelInstance] != b.instance {
			_, plural := k.split()
			return nil, fmt.Errorf("%s/%s of namespace %s is another's (labels %v); want a namespace of the site's own for each agent", plural, o.name(), c.namespace, has)
		}
		return &now, nil
	}
	for _, o := range p.services {
		if _, err := check(services, o); err != nil {
			return nil, err
		}
	}
	if p.files != nil {
		files, err := check(configMaps, p.files)
		if err != nil {
			return nil, err
		}
		if err := c.replaceable(ctx, files, p.files); err != nil {
			return nil, err
		}
	}
	return check(deployments, p.deployment)
}

// replaceable deletes a ConfigMap of ours that holds something else than it should, since what it holds cannot be changed.
func (c *cluster) replaceable(ctx context.Context, files *item, want object) error {
	if files == nil {
		return nil
	}
	var now map[string]any
	if err := c.get(ctx, configMaps, files.Metadata.Name, &now); err != nil {
		return err
	}
	same := reflect.DeepEqual(now["binaryData"], plain(want["binaryData"])) && now["data"] == nil && now["immutable"] == true
	if same && files.Metadata.DeletionTimestamp == nil {
		return nil
	}
	return c.remove(ctx, configMaps, files.Metadata)
}

// refused says what it means that the cluster does not take an object.
func refused(w backends.Workload, k kind, err error) error {
	var told apierrors.APIStatus
	if !errors.As(err, &told) {
		return err
	}
	text := told.Status().Message
	switch {
	case strings.Contains(text, "provided port is already allocated"):
		return fmt.Errorf("a port of the host is another's: %s", text) // who may give it back
	case strings.Contains(text, "not in the valid range"):
		return &backends.FeatureError{Backend: Name, Feature: backends.PortMap, Detail: text}
	case apierrors.IsInvalid(err), apierrors.IsBadRequest(err), apierrors.IsRequestEntityTooLargeError(err):
		_, plural := k.split()
		return &backends.StartError{Workload: w.Name, Stage: "apply " + plural, Cause: text}
	}
	return err
}

// Remove runs the exit hooks and deletes what there is of a workload, by its labels, and waits until it has gone.
func (b *Backend) Remove(ctx context.Context, name string) error {
	if err := ctx.Err(); err != nil || !label(name) {
		return err
	}
	release, err := b.hold(ctx, name)
	if err != nil {
		return err
	}
	defer release()
	f, err := b.one(ctx, name)
	if errors.Is(err, backends.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if note, err := f.note(); err == nil && !f.removed() && len(note.Exit) > 0 {
		for _, hook := range note.Exit {
			if err := b.hook(ctx, name, "exit", hook); err != nil {
				if ctx.Err() != nil {
					return ctx.Err()
				}
				b.options.Logger.Warn("exit hook", "workload", name, "err", err)
			}
		}
	}
	return b.clear(ctx, name)
}

// clear deletes what there is of a workload and waits until it has gone.
func (b *Backend) clear(ctx context.Context, name string) error {
	c, err := b.cluster()
	if err != nil {
		return err
	}
	for pause := 20 * time.Millisecond; ; pause = min(pause*3/2, time.Second) {
		f, err := b.one(ctx, name)
		if errors.Is(err, backends.ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := f.delete(ctx, c); err != nil {
			return b.answer(err)
		}
		if err := after(ctx, pause); err != nil {
			return err
		}
	}
}

// delete tells the cluster to delete what it is not deleting yet. What hangs on a Deployment goes with it.
func (f *found) delete(ctx context.Context, c *cluster) error {
	all := []struct {
		k    kind
		list []item
	}{{services, f.services}, {configMaps, f.files}, {replicaSets, f.sets}, {pods, f.pods}}
	if f.deployment != nil {
		all[2].k, all[2].list, all[3].list = deployments, []item{*f.deployment}, nil
	}
	for _, these := range all {
		for _, one := range these.list {
			if one.Metadata.DeletionTimestamp != nil {
				continue
			}
			if err := c.remove(ctx, these.k, one.Metadata); err != nil {
				return err
			}
		}
	}
	return nil
}

// after waits, unless the context ends.
func after(ctx context.Context, pause time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(pause):
		return nil
	}
}
