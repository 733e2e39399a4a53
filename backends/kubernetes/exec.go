package kubernetes

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	gorilla "github.com/gorilla/websocket"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/transport/websocket"

	"github.com/kindos/kmo/backends"
)

const (
	execProtocol = "v5.channel.k8s.io"
	maxOutput    = 64 << 10
	maxTold      = 4 << 10         // of what a hook wrote, in an error
	beginTime    = 2 * time.Minute // for a pod to be placed, and its image pulled, where hooks wait for it
)

// The channels of the protocol: the first byte of a message says which it belongs to.
const (
	channelOut = 1 + iota
	channelErr
	channelEnd // a metav1.Status, the last
)

// errNoExec says that the cluster did not let a command in; the workload need not be at fault.
var errNoExec = errors.New("exec")

// Exec runs a command in the container of a workload, by the cluster's API.
func (b *Backend) Exec(ctx context.Context, name string, argv []string) (status int, output []byte, err error) {
	f, err := b.one(ctx, name)
	if err != nil {
		return 0, nil, err
	}
	pod, _, running := f.running()
	if !running {
		return 0, nil, backends.ErrNotFound
	}
	c, err := b.cluster()
	if err != nil {
		return 0, nil, err
	}
	status, output, err = c.exec(ctx, pod.Metadata.Name, argv)
	if ctx.Err() != nil {
		return 0, output, ctx.Err()
	}
	return status, output, b.answer(err)
}

// running is the pod whose program runs, and which of its starts that is.
func (f *found) running() (pod *item, start string, is bool) {
	pod = f.pod()
	if pod == nil || f.removed() {
		return nil, "", false
	}
	i := slices.IndexFunc(pod.Status.ContainerStatuses, func(c containerStatus) bool { return c.Name == container })
	if i < 0 || pod.Status.ContainerStatuses[i].State.Running == nil {
		return nil, "", false
	}
	return pod, pod.Metadata.UID + "/" + strconv.Itoa(pod.Status.ContainerStatuses[i].RestartCount), true
}

func (c *cluster) exec(ctx context.Context, pod string, argv []string) (status int, output []byte, err error) {
	url := c.request(http.MethodGet, pods, pod, "exec").Param("container", container).Param("stdout", "true").Param("stderr", "true").URL()
	query := url.Query()
	query["command"] = argv
	url.RawQuery = query.Encode()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url.String(), http.NoBody)
	if err != nil {
		return 0, nil, err
	}
	dialer, holder, err := websocket.RoundTripperFor(c.config)
	if err != nil {
		return 0, nil, err
	}
	conn, err := websocket.Negotiate(dialer, holder, request, execProtocol)
	if err != nil {
		return 0, nil, fmt.Errorf("%w: %v", errNoExec, err)
	}
	defer conn.Close()                                      //nolint:errcheck // it was read to its end, or is given up
	stop := context.AfterFunc(ctx, func() { conn.Close() }) //nolint:errcheck // it is cut off on purpose
	defer stop()
	return receive(conn)
}

// receive reads what a command writes until it ends.
func receive(conn *gorilla.Conn) (status int, output []byte, err error) {
	for {
		_, message, err := conn.NextReader()
		if err != nil {
			return 0, output, fmt.Errorf("exec was cut off: %v", err)
		}
		var channel [1]byte
		if _, err := io.ReadFull(message, channel[:]); err != nil {
			continue // an empty one
		}
		text, err := io.ReadAll(io.LimitReader(message, maxOutput))
		if err != nil {
			return 0, output, fmt.Errorf("exec was cut off: %v", err)
		}
		switch channel[0] {
		case channelOut, channelErr:
			output = append(output, text[:min(len(text), maxOutput-len(output))]...)
		case channelEnd:
			status, said, err := exitStatus(text)
			return status, append(output, said...), err
		}
	}
}

// exitStatus reads how a command ended. One that the container does not have, or that cannot be run there, is told as a shell does: 126,
// and what the runtime said of it.
func exitStatus(text []byte) (status int, said string, err error) {
	var end metav1.Status
	if err := json.Unmarshal(text, &end); err != nil {
		return 0, "", fmt.Errorf("exec ended as %q", text)
	}
	if end.Status == metav1.StatusSuccess {
		return 0, "", nil
	}
	if end.Details != nil {
		for _, cause := range end.Details.Causes {
			if cause.Type == "ExitCode" {
				status, err := strconv.Atoi(cause.Message)
				return status, "", err
			}
		}
	}
	if _, why, tried := strings.Cut(end.Message, "OCI runtime exec failed: "); tried && noCommand.MatchString(why) {
		return 126, why, nil
	}
	return 0, "", fmt.Errorf("%w: %s", errNoExec, end.Message)
}

// noCommand is how the runtimes of a node say that it is the command that cannot be begun; a container that has just ended is told otherwise.
var noCommand = regexp.MustCompile(`no such file or directory|not found|permission denied|exec format error`)

// hook runs one hook in the running container. That it ended badly is a *StartError; what it wrote is its output.
func (b *Backend) hook(ctx context.Context, name, moment string, argv []string) error {
	bounded, cancel := context.WithTimeout(ctx, b.hookTime)
	defer cancel()
	status, output, err := b.Exec(bounded, name, argv)
	cause := ""
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case bounded.Err() != nil:
		cause = fmt.Sprintf("it has not ended in %v", b.hookTime)
	case errors.Is(err, backends.ErrNotFound):
		cause = "the program does not run"
	case err != nil:
		return err
	case status == 0:
		return nil
	default:
		cause = fmt.Sprint("exit status ", status)
	}
	return &backends.StartError{
		Workload: name, Stage: fmt.Sprint(moment, " ", argv), Output: string(output[max(0, len(output)-maxTold):]), Cause: cause,
	}
}

// begun waits until the preInit hooks have ended and the program has been started.
func (b *Backend) begun(ctx context.Context, c *cluster, w backends.Workload) error {
	bounded, cancel := context.WithTimeout(ctx, beginTime+time.Duration(len(w.Hooks.PreInit))*b.hookTime)
	defer cancel()
	since, hook, seen := time.Now(), -1, "" // the hook that runs, and since when; what is waited for
	for pause := 20 * time.Millisecond; ; pause = min(pause*3/2, time.Second) {
		f, err := b.one(bounded, w.Name)
		if err != nil && bounded.Err() == nil {
			return err
		}
		if bounded.Err() == nil {
			s, _ := f.status()
			if s.State != backends.Starting {
				return nil // it was started, whatever became of it
			}
			seen = s.Detail
			now, failed := f.preInit()
			if now != hook {
				since, hook = time.Now(), now
			}
			switch {
			case failed != "":
			case hook >= 0 && time.Since(since) > b.hookTime:
				failed = fmt.Sprintf("it has not ended in %v", b.hookTime)
			case stuck(f):
				return fmt.Errorf("%s cannot begin: %s", w.Name, s.Detail)
			}
			if failed != "" && hook >= 0 && hook < len(w.Hooks.PreInit) {
				output := c.hookOutput(bounded, f.pod().Metadata.Name, preInit(hook))
				return &backends.StartError{Workload: w.Name, Stage: fmt.Sprint("preInit ", w.Hooks.PreInit[hook]), Output: output, Cause: failed}
			}
		}
		if err := after(bounded, pause); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return fmt.Errorf("%s has not begun in %v: %s", w.Name, beginTime, seen)
		}
	}
}

// preInit is the hook that runs or ended badly, -1 for none, and how it ended.
func (f *found) preInit() (hook int, failed string) {
	pod := f.pod()
	if pod == nil {
		return -1, ""
	}
	for i, c := range pod.Status.InitContainerStatuses {
		if end := cmp.Or(c.State.Terminated, c.LastState.Terminated); end != nil && end.ExitCode != 0 { // one that passed when it was tried again has passed
			return i, strings.TrimSuffix(fmt.Sprintf("exit status %d: %s", end.ExitCode, end.Message), ": ")
		}
		if c.State.Running != nil {
			return i, ""
		}
	}
	return -1, ""
}

// stuck says that a pod waits for what does not come by itself, or not soon.
func stuck(f *found) bool {
	pod := f.pod()
	if pod == nil {
		return false
	}
	if slices.ContainsFunc(pod.Status.Conditions, func(c condition) bool { return c.Reason == "Unschedulable" }) {
		return true
	}
	return slices.ContainsFunc(slices.Concat(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses), func(c containerStatus) bool {
		return c.State.Waiting != nil && slices.Contains([]string{"ImagePullBackOff", "InvalidImageName", "CreateContainerConfigError"}, c.State.Waiting.Reason)
	})
}

// hookOutput is the last of what an init container wrote, as far as it can be had.
func (c *cluster) hookOutput(ctx context.Context, pod, name string) string {
	log, err := stream(ctx, c.request(http.MethodGet, pods, pod, "log").Param("container", name).Param("tailLines", "50"))
	if err != nil {
		return ""
	}
	defer log.Close()
	text, _ := io.ReadAll(io.LimitReader(log, maxOutput)) // what there is
	return string(text[max(0, len(text)-maxTold):])
}

// outcome is what is remembered of the postInit hooks: in which start of the program they were run, and what was wrong.
type outcome struct {
	Start  string `json:"start"`
	Failed string `json:"failed,omitempty"`
}

func (f *found) outcome() (o outcome) {
	if f.deployment != nil {
		_ = json.Unmarshal([]byte(f.deployment.Metadata.Annotations[notePostInit]), &o) // what cannot be read was not run
	}
	return o
}

// owes says that the postInit hooks are to be run, since the program has been started again, and puts what became of them into s.
func (b *Backend) owes(f *found, note applied, s *backends.Status) bool {
	_, start, running := f.running()
	if len(note.PostInit) == 0 || !running || s.State != backends.Running {
		return false
	}
	switch o := f.outcome(); {
	case o.Start != start:
		s.State, s.Detail = backends.Starting, "its postInit hooks are to be run"
		return true
	case o.Failed != "":
		s.State, s.Detail = backends.Damaged, o.Failed
	}
	return false
}

// postInit runs the postInit hooks of a workload in its running container, unless they were run there and ended well.
func (b *Backend) postInit(ctx context.Context, name string) error {
	f, err := b.one(ctx, name)
	if err != nil {
		return err
	}
	note, err := f.note()
	if err != nil {
		return err
	}
	_, start, running := f.running()
	if o := f.outcome(); !running || len(note.PostInit) == 0 || o.Start == start && o.Failed == "" {
		return nil
	}
	o := outcome{Start: start}
	for _, hook := range note.PostInit {
		if err = b.hook(ctx, name, "postInit", hook); err != nil {
			break
		}
	}
	var failed *backends.StartError
	if err != nil && !errors.As(err, &failed) {
		return err
	}
	if failed != nil {
		o.Failed = failed.Stage + ": " + failed.Cause
	}
	text, problem := json.Marshal(o)
	c, noCluster := b.cluster()
	if problem = errors.Join(problem, noCluster); problem == nil {
		problem = b.answer(c.annotate(ctx, deployments, f.deployment.Metadata, map[string]any{notePostInit: string(text)}))
	}
	if err == nil {
		err = problem
	}
	return err
}

// postInitSoon runs the hooks of a program that the cluster has started again, unless somebody is at it.
func (b *Backend) postInitSoon(name string) {
	b.mu.Lock()
	_, busy := b.busy[name]
	b.mu.Unlock()
	if busy || b.ctx.Err() != nil {
		return
	}
	b.loose.Go(func() {
		release, err := b.hold(b.ctx, name)
		if err != nil {
			return
		}
		defer release()
		if err := b.postInit(b.ctx, name); err != nil && b.ctx.Err() == nil {
			b.options.Logger.Warn("postInit hooks of a program that was started again", "workload", name, "err", err)
		}
	})
}
