package kubernetes

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/kindos/kmo/backends"
)

// followPause is how often a log whose program ended is looked at for the next start of it.
const followPause = 200 * time.Millisecond

// Logs is what the container wrote, with that of its start before: the cluster keeps no more, and none of a pod that is no more. One
// that is followed goes over to the next start, or the next pod.
func (b *Backend) Logs(ctx context.Context, name string, options backends.LogOptions) (io.ReadCloser, error) {
	f, err := b.one(ctx, name)
	if err != nil {
		return nil, err
	}
	c, err := b.cluster()
	if err != nil {
		return nil, err
	}
	if !options.Follow {
		text, err := c.past(ctx, f, options.Tail)
		return text, b.answer(err)
	}
	ctx, cancel := context.WithCancel(ctx)
	from, to := io.Pipe()
	go func() {
		defer cancel()
		to.CloseWithError(b.follow(ctx, c, name, options.Tail, to))
	}()
	return &follower{from, cancel}, nil
}

// follower is a log that goes on until it is closed.
type follower struct {
	*io.PipeReader
	cancel context.CancelFunc
}

// Close wakes a Read that waits, and ends the stream.
func (f *follower) Close() error {
	f.cancel()
	return f.PipeReader.Close()
}

// latest is the newest pod, ending or not, and which start of its container there is something to read of, "" for none yet.
func (f *found) latest() (pod *item, restarts int, start string) {
	pod = f.pod()
	if pod == nil && len(f.pods) > 0 {
		pod = &f.pods[0]
	}
	if pod == nil {
		return nil, 0, ""
	}
	i := slices.IndexFunc(pod.Status.ContainerStatuses, func(c containerStatus) bool { return c.Name == container })
	if i < 0 {
		return pod, 0, ""
	}
	c := pod.Status.ContainerStatuses[i]
	if c.State.Running == nil && c.State.Terminated == nil && c.LastState.Terminated == nil {
		return pod, c.RestartCount, ""
	}
	return pod, c.RestartCount, pod.Metadata.UID + "/" + strconv.Itoa(c.RestartCount)
}

// log opens the log of one start of a pod's container. It is empty if the node has it no more, or not yet.
func (c *cluster) log(ctx context.Context, pod string, previous, follow bool, tail int) (io.ReadCloser, error) {
	r := c.request(http.MethodGet, pods, pod, "log").Param("container", container)
	if previous {
		r = r.Param("previous", "true")
	}
	if follow {
		r = r.Param("follow", "true")
	}
	if tail > 0 {
		r = r.Param("tailLines", strconv.Itoa(tail))
	}
	body, err := stream(ctx, r)
	if missing(err) || apierrors.IsBadRequest(err) && (previous || strings.Contains(err.Error(), "waiting to start")) {
		return io.NopCloser(bytes.NewReader(nil)), nil
	}
	return body, err
}

// past is what was written so far: of the start before, if there was one, and of the last.
func (c *cluster) past(ctx context.Context, f *found, tail int) (io.ReadCloser, error) {
	pod, restarts, start := f.latest()
	if start == "" {
		return io.NopCloser(bytes.NewReader(nil)), nil
	}
	var parts chain
	for _, previous := range []bool{true, false} {
		if previous && restarts == 0 {
			continue
		}
		part, err := c.log(ctx, pod.Metadata.Name, previous, false, tail)
		if err != nil {
			return nil, errors.Join(err, parts.Close())
		}
		parts = append(parts, part)
	}
	if tail == 0 {
		return &parts, nil
	}
	text, err := io.ReadAll(&parts)
	if err = errors.Join(err, parts.Close()); err != nil {
		return nil, err
	}
	lines := bytes.SplitAfter(bytes.TrimSuffix(text, []byte("\n")), []byte("\n"))
	last := bytes.Join(lines[max(0, len(lines)-tail):], nil)
	if bytes.HasSuffix(text, []byte("\n")) {
		last = append(last, '\n')
	}
	return io.NopCloser(bytes.NewReader(last)), nil
}

// follow writes a log, and that of each start that comes, until the workload is gone.
func (b *Backend) follow(ctx context.Context, c *cluster, name string, tail int, to io.Writer) error {
	seen := ""
	for {
		f, err := b.one(ctx, name)
		if errors.Is(err, backends.ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		if pod, restarts, start := f.latest(); start != "" && start != seen {
			if seen == "" && restarts > 0 && tail == 0 {
				if err := c.copyLog(ctx, pod.Metadata.Name, true, 0, to); err != nil {
					return b.answer(err)
				}
			}
			seen = start
			if err := c.copyLog(ctx, pod.Metadata.Name, false, tail, to); err != nil {
				return b.answer(err)
			}
			tail = 0
		}
		if err := after(ctx, followPause); err != nil {
			return err
		}
	}
}

// copyLog writes the log of one start to its end.
func (c *cluster) copyLog(ctx context.Context, pod string, previous bool, tail int, to io.Writer) error {
	part, err := c.log(ctx, pod, previous, !previous, tail)
	if err != nil {
		return err
	}
	defer part.Close()
	_, err = io.Copy(to, part)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

// chain is several logs, one after the other.
type chain []io.ReadCloser

// Read reads from the first that is not at its end.
func (c *chain) Read(p []byte) (int, error) {
	for len(*c) > 0 {
		n, err := (*c)[0].Read(p)
		if !errors.Is(err, io.EOF) {
			return n, err
		}
		(*c)[0].Close()
		*c = (*c)[1:]
		if n > 0 {
			return n, nil
		}
	}
	return 0, io.EOF
}

// Close closes those that were not read to their end.
func (c *chain) Close() error {
	for _, one := range *c {
		one.Close()
	}
	*c = nil
	return nil
}
