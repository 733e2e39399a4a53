package kubernetes

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/conformance"
)

// TestKubelet is the suite on a real node, whose programs run.
func TestKubelet(t *testing.T) {
	if os.Getenv(kubeletEnv) == "" {
		t.Skip("a real node is asked for by make test-kubelet")
	}
	image := control.join(t)
	t.Run("conformance", func(t *testing.T) {
		conformance.Test(t, func(t *testing.T) conformance.Subject { return onNode(t, image) })
	})
	for name, test := range map[string]func(b *bench, w backends.Workload){
		"begun again": begunAgain, "dollars": dollarsStay, "no such program": noProgram, "no such hook": noHook, "no such image": noImage,
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			w := workload("relay", "1")
			w.Image, w.Image.Config.Entrypoint = image, []string{"/app"}
			test(b, w)
			b.remove(w.Name)
			if left := control.objects(t, b.namespace); len(left) > 0 {
				t.Errorf("left behind: %q", left)
			}
		})
	}
}

// said waits until the log has a text.
func (b *bench) said(w backends.Workload, want string) {
	b.Helper()
	var text []byte
	for deadline := time.Now().Add(time.Minute); !strings.Contains(string(text), want); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			b.Fatalf("the log is %q, want %q", text, want)
		}
		log, err := b.Logs(b.Context(), w.Name, backends.LogOptions{})
		if err == nil {
			text, err = io.ReadAll(log)
			log.Close()
		}
		if err != nil {
			b.Fatal(err)
		}
	}
}

// begunAgain: before a program that is started again its preInit hooks run again, and after it its postInit hooks.
func begunAgain(b *bench, w backends.Workload) {
	w.Overlay.Size = 1 << 20
	w.Hooks.PreInit = [][]string{{"/app", "append /tmp/order pre1,"}, {"/app", "append /tmp/order pre2,"}}
	w.Hooks.PostInit = [][]string{{"/app", "append /tmp/order post,"}}
	w.Run.Args = []string{"append /tmp/order main,", "wait"}
	b.apply(w)
	want := "pre1,pre2,main,post,"
	for restarts := range 3 {
		b.until("started again", func(s backends.Status) bool { return s.State == backends.Running && s.Restarts == restarts })
		status, output, err := b.Exec(b.Context(), w.Name, []string{"/app", "cat /tmp/order"})
		if got := fmt.Sprintf("cat /tmp/order: %q\n", strings.Repeat(want, restarts+1)); status != 0 || err != nil || string(output) != got {
			b.Errorf("after %d restarts: %d, %q, %v; want %q", restarts, status, output, err, got)
		}
		if err := syscall.Kill(program(b, b.namespace, w.Name), syscall.SIGKILL); err != nil {
			b.Fatal(err)
		}
	}
}

// dollarsStay: what looks like a variable to a kubelet reaches the program as it is.
func dollarsStay(b *bench, w backends.Workload) {
	w.Run.Env = map[string]string{"COST": "$(HOME) $$ $5 $"}
	w.Image.Config.Env = []string{"PRICE=$(COST)", "COST=other"}
	w.Run.Args = []string{"say $(COST) $$ $5 $", "env", "wait"}
	b.apply(w)
	b.said(w, "waiting")
	for _, want := range []string{"$(COST) $$ $5 $\n", "env COST=$(HOME) $$ $5 $\n", "env PRICE=$(COST)\n"} {
		b.said(w, want)
	}
}

// noProgram: what cannot be started is told as what ended, and why.
func noProgram(b *bench, w backends.Workload) {
	w.Image.Config.Entrypoint = []string{"/nothing"}
	b.apply(w)
	s := b.until("that it cannot be started, twice", func(s backends.Status) bool { return s.Restarts > 0 && s.State == backends.Backoff })
	if s.ExitCode != 128 || !strings.Contains(s.Detail, "/nothing: no such file or directory") {
		b.Errorf("it is %+v, want why it cannot be started", s)
	}
}

// noHook: a hook whose program is not there has ended badly, and is no reason to wait.
func noHook(b *bench, w backends.Workload) {
	w.Run.Args = []string{"wait"}
	w.Hooks.PostInit = [][]string{{"/nothing"}}
	var start *backends.StartError
	if err := b.Apply(b.Context(), w); !errors.As(err, &start) || start.Stage != "postInit [/nothing]" || !strings.Contains(start.Output, "no such file") {
		b.Errorf("apply: %v; want a *StartError of the hook that says why", err)
	}
	if s := b.status(); s.State != backends.Damaged {
		b.Errorf("it is %+v, want it damaged", s)
	}
	b.remove(w.Name)
	w.Hooks.PostInit, w.Hooks.PreInit = nil, w.Hooks.PostInit
	if err := b.Apply(b.Context(), w); !errors.As(err, &start) || start.Stage != "preInit [/nothing]" || !strings.Contains(start.Cause, "no such file") {
		b.Errorf("apply: %v; want a *StartError of the hook that says why", err)
	}
}

// noImage: a digest that the registry does not have is waited for, and with hooks that is said.
func noImage(b *bench, w backends.Workload) {
	w.Image.Ref, w.Image.SHA256 = strings.Replace(w.Image.Ref, w.Image.SHA256, strings.Repeat("a", 64), 1), ""
	b.apply(w)
	b.until("that there is no such image", func(s backends.Status) bool {
		return s.State == backends.Starting && strings.Contains(s.Detail, "not found")
	})
	b.remove(w.Name)
	w.Hooks.PostInit = [][]string{{"/app"}}
	plainly(b, "with hooks that wait for it", b.Apply(b.Context(), w))
}

// onNode works as the account of the manifest, with its rights and no others.
func onNode(t *testing.T, image backends.Image) conformance.Subject {
	namespace, account := control.site(t)
	options := Options{Kubeconfig: account, Namespace: namespace, State: t.TempDir()}
	return conformance.Subject{
		Table: "testdata/features",
		Open:  func(t *testing.T) backends.Backend { return open(t, options) },
		At: func(t *testing.T, state string) backends.Backend {
			return open(t, Options{Kubeconfig: account, Namespace: namespace, State: state})
		},
		Images:   map[backends.Format]backends.Image{backends.OCI: image},
		Patience: time.Minute,
		Leaks: func(t *testing.T) []string {
			left := control.objects(t, namespace)
			for _, pid := range members(filepath.Base(os.Getenv(nodeEnv))) {
				left = append(left, fmt.Sprint("process ", pid))
			}
			return left
		},
		Kill: func(t *testing.T, s backends.Status) {
			time.Sleep(time.Until(s.Started.Add(time.Second))) // a cluster tells the second of a start, and the next is to be another
			if err := syscall.Kill(program(t, namespace, s.Name), syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		},
		Used: func(t *testing.T, s backends.Status) time.Duration { return used(t, program(t, namespace, s.Name)) },
		// A kubelet tells every program where the cluster is, although the pod asks not to be told of services.
		Sets: []string{
			"KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT", "KUBERNETES_SERVICE_PORT_HTTPS", "KUBERNETES_PORT",
			"KUBERNETES_PORT_443_TCP", "KUBERNETES_PORT_443_TCP_ADDR", "KUBERNETES_PORT_443_TCP_PORT", "KUBERNETES_PORT_443_TCP_PROTO",
		},
		Damage: func(t *testing.T, w backends.Workload) {
			control.must(t, http.MethodPatch, "/apis/apps/v1/namespaces/"+namespace+"/deployments/"+w.Name, mergePatch, `{"spec":{"replicas":0}}`, nil)
		},
		Stranger: func(t *testing.T) func(*testing.T) {
			o := options
			o.State = t.TempDir()
			return stranger(t, &bench{t, open(t, o), o, namespace}, image)
		},
	}
}

// stranger runs a workload of another agent in the same namespace, and returns a check that it is untouched.
func stranger(t *testing.T, b *bench, image backends.Image) func(*testing.T) {
	w := workload("stranger", "1")
	w.Image, w.Run.Args = image, []string{"/app", "wait"}
	b.apply(w)
	before := b.running()
	return func(t *testing.T) {
		if after := b.running(); !after.Started.Equal(before.Started) || after.Restarts != 0 {
			t.Errorf("the stranger is %+v, was %+v", after, before)
		}
		b.remove(w.Name)
	}
}

// members are the processes of cgroups whose path has a part.
func members(part string) (pids []int) {
	all, _ := filepath.Glob("/proc/[0-9]*/cgroup")
	for _, path := range all {
		text, err := os.ReadFile(path)
		pid, atoiErr := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err == nil && atoiErr == nil && strings.Contains(string(text), part) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// program is the process of a workload.
func program(t testing.TB, namespace, workload string) int {
	t.Helper()
	var all items
	control.must(t, http.MethodGet, "/api/v1/namespaces/"+namespace+"/pods?labelSelector=kmo/workload%3D"+workload, "", nil, &all)
	for _, pod := range all.Items {
		for _, c := range pod.Status.ContainerStatuses {
			if _, id, is := strings.Cut(c.ContainerID, "://"); is && c.State.Running != nil {
				if pids := members(id); len(pids) > 0 {
					return pids[0]
				}
			}
		}
	}
	t.Fatalf("%s has no process: %+v", workload, all.Items)
	return 0
}

// used is how much of the processor a process has used, in the kernel's hundredths of a second.
func used(t *testing.T, pid int) time.Duration {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), ") ")
	fields := strings.Fields(rest)
	user, err := strconv.Atoi(fields[11])
	system, systemErr := strconv.Atoi(fields[12])
	if err != nil || systemErr != nil {
		t.Fatalf("processor times of %s", text)
	}
	return time.Duration(user+system) * 10 * time.Millisecond
}
