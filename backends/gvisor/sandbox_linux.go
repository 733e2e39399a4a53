package gvisor

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/kindos/kmo/backends/process/monitor"
)

// sandbox is one of runsc's.
type sandbox struct {
	runtime
	id      string
	root    string // where runsc keeps what it knows of it
	log     string // where runsc says what went wrong; its standard error may be the workload's
	network string // sandbox, host or none
	sockets bool   // unix sockets of this host can be made and reached
}

// identify names the sandbox of a folder: on the whole host, as runsc's sockets have that name.
func identify(dir string) string { return fmt.Sprintf("kmo-%x", sha256.Sum256([]byte(dir)))[:16] }

// sandboxOf is the sandbox of a workload.
func sandboxOf(r runtime, t monitor.Task) sandbox {
	s := sandbox{runtime: r, id: identify(t.Dir), root: filepath.Join(t.Dir, "runsc"), log: filepath.Join(t.Dir, "runsc.log"), network: "sandbox"}
	if onHost(t.Workload) {
		s.network = "host"
	}
	for _, d := range t.Workload.Doors {
		s.sockets = s.sockets || d.Via == "socket"
	}
	return s
}

// command is a command of runsc. The keeper's cgroup bounds whatever it starts.
func (s sandbox) command(ctx context.Context, words ...string) *exec.Cmd {
	sockets := "none"
	if s.sockets {
		sockets = "all"
	}
	args := []string{
		"--root", s.root, "--platform", s.Platform, "--network", s.network, "--host-uds", sockets, "--overlay2", "none", "--ignore-cgroups",
		"--log", s.log, "--log-format", "json",
	}
	cmd := exec.CommandContext(ctx, s.Runsc, append(args, words...)...)
	cmd.Env = []string{"PATH=" + cmp.Or(os.Getenv("PATH"), defaultPath)}
	return cmd
}

// fault is why a command of runsc has failed, in the words of all its processes, of which the first knew best.
func (s sandbox) fault(err error, said []byte) error {
	text, _ := os.ReadFile(s.log) // there may be none
	var words []string
	for entries := json.NewDecoder(bytes.NewReader(text)); ; {
		var entry struct{ Level, Msg string }
		if entries.Decode(&entry) != nil {
			break
		}
		if entry.Level == "error" {
			words = append(words, strings.TrimSpace(entry.Msg))
		}
	}
	if word := strings.TrimSpace(string(said)); len(words) == 0 && word != "" {
		words = []string{word}
	}
	if len(words) == 0 {
		return err
	}
	return errors.New(strings.Join(words, "; "))
}

// commandTime bounds what runsc does without a program.
const commandTime = time.Minute

// do runs a command of runsc that ends by itself.
func (s sandbox) do(words ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), commandTime)
	defer cancel()
	if err := s.command(ctx, words...).Run(); err != nil {
		return errors.Join(ctx.Err(), s.fault(err, nil))
	}
	return nil
}

// create makes the sandbox, which writes to this process's standard output and error, and returns its process, a child of this one.
func (s sandbox) create(dir string) (int, error) {
	ctx, cancel := context.WithTimeout(context.Background(), commandTime)
	defer cancel()
	at := filepath.Join(dir, "pid")
	cmd := s.command(ctx, "create", "--bundle", dir, "--pid-file", at, s.id)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return 0, fmt.Errorf("creating a sandbox: %w", errors.Join(ctx.Err(), s.fault(err, nil)))
	}
	text, err := os.ReadFile(at)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(text)))
}

// start starts the program. That runsc cannot execute it is the workload's fault, every other error the host's: a sandbox that is gone, or slow.
func (s sandbox) start(argv []string) error {
	err := s.do("start", s.id)
	switch {
	case err == nil:
		return nil
	case unexecutable(err.Error()):
		return monitor.Blame{Step: "exec " + argv[0], Cause: err}
	}
	return fmt.Errorf("starting the program in its sandbox: %w", err)
}

// unexecutable says whether what runsc says means that it has found nothing to execute, or not what can be. It has no code for that. A file that
// could not be read is no such thing: its file server may be gone.
func unexecutable(text string) bool {
	return regexp.MustCompile("(?:failed to load|error finding executable|failed to find initial working directory) .*: (?:no such file or directory|" +
		"permission denied|exec format error|not a directory|is a directory|too many symbolic links encountered|too many levels of symbolic links|" +
		"file name too long|argument list too long|invalid argument)(?:$|;)").MatchString(text)
}
