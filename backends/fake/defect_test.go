package fake_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/fake"
)

type defect struct {
	check string
	spoil func(b *fake.Backend) backends.Backend
}

// defects are ways to break the contract, each with the check of the suite that must notice.
var defects = []defect{
	{"apply twice is once", func(b *fake.Backend) backends.Backend {
		return &spoilt{Backend: b, apply: func(ctx context.Context, w backends.Workload) error {
			if err := b.Remove(ctx, w.Name); err != nil {
				return err
			}
			return b.Apply(ctx, w)
		}}
	}},
	{"two specs of one unit stand side by side", func(b *fake.Backend) backends.Backend {
		return &spoilt{Backend: b, apply: func(ctx context.Context, w backends.Workload) error {
			for _, other := range b.Workloads() {
				if other.Unit == w.Unit && other.Name != w.Name {
					b.Remove(ctx, other.Name)
				}
			}
			return b.Apply(ctx, w)
		}}
	}},
	{"remove clears and is nil if there is none", func(b *fake.Backend) backends.Backend {
		return &spoilt{Backend: b, remove: func(ctx context.Context, name string) error {
			for _, w := range b.Workloads() {
				if w.Name == name {
					return b.Remove(ctx, name)
				}
			}
			return backends.ErrNotFound
		}}
	}},
	{"a new process finds what an old one left", func(b *fake.Backend) backends.Backend {
		b.Dir = ""
		return b
	}},
	{"a program that ends is told with its exit code", func(b *fake.Backend) backends.Backend {
		return &spoilt{Backend: b, observed: func(s *backends.Status) { s.ExitCode = 0 }}
	}},
	{"logs: both streams, tail, and none of an unknown workload", func(b *fake.Backend) backends.Backend {
		return &spoilt{Backend: b, logs: func(ctx context.Context, name string, o backends.LogOptions) (io.ReadCloser, error) {
			o.Tail = 0
			return b.Logs(ctx, name, o)
		}}
	}},
	{"the environment holds nothing of the host's", func(b *fake.Backend) backends.Backend {
		return spoilProgram(b, func(p *fake.Process) { p.Env = append(p.Env, os.Environ()...) })
	}},
	{"arguments, folder and user are those asked for", func(b *fake.Backend) backends.Backend {
		return spoilProgram(b, func(p *fake.Process) { p.Workload.Run.User = 0 })
	}},
	{"files arrive with mode and content", func(b *fake.Backend) backends.Backend {
		return spoilProgram(b, func(p *fake.Process) { p.Workload.Files[0].Content = bytes.ToUpper(p.Workload.Files[0].Content) })
	}},
	{"hooks run at their moments", func(b *fake.Backend) backends.Backend {
		return &spoilt{Backend: b, apply: func(ctx context.Context, w backends.Workload) error {
			w.Hooks.PostInit = nil
			return b.Apply(ctx, w)
		}}
	}},
	{"preInit runs again before a program that is started again", func(b *fake.Backend) backends.Backend {
		hooks := 0
		return spoilProgram(b, func(p *fake.Process) {
			if slices.Contains(p.Argv, "append /keep/order pre,") {
				if hooks++; hooks > 1 {
					p.Argv = nil
				}
			}
		})
	}},
	{"an exit hook that does not end holds nobody", func(b *fake.Backend) backends.Backend {
		return &spoilt{Backend: b, remove: func(ctx context.Context, name string) error {
			if all := b.Workloads(); len(all) == 1 && len(all[0].Hooks.Exit) > 0 {
				return errors.New("its hook does not end")
			}
			return b.Remove(ctx, name)
		}}
	}},
	{"a postInit hook that ends badly damages the workload", func(b *fake.Backend) backends.Backend {
		return &spoilt{Backend: b, observed: func(s *backends.Status) {
			if s.State == backends.Damaged {
				s.State = backends.Running
			}
		}}
	}},
	{"another content of the same spec starts it again", func(b *fake.Backend) backends.Backend {
		return &spoilt{Backend: b, apply: func(ctx context.Context, w backends.Workload) error {
			if all := b.Workloads(); len(all) == 1 && all[0].Name == w.Name {
				return nil
			}
			return b.Apply(ctx, w)
		}}
	}},
	{"remove gives the program its grace", func(b *fake.Backend) backends.Backend {
		program := b.Program
		b.Program = func(p *fake.Process) (int, bool) {
			if p.Argv == nil {
				return 0, true
			}
			return program(p)
		}
		return b
	}},
	{"what nobody knows is refused", func(b *fake.Backend) backends.Backend {
		return &spoilt{Backend: b, apply: func(ctx context.Context, w backends.Workload) error {
			w.Resources.Devices = nil
			return b.Apply(ctx, w)
		}}
	}},
	{claimed, func(b *fake.Backend) backends.Backend {
		b.Print.Features = append(slices.Clone(b.Print.Features), "moonlight")
		return b
	}},
	{"a failing preInit is an error with its output, and no program", func(b *fake.Backend) backends.Backend {
		return &spoilt{Backend: b, apply: func(ctx context.Context, w backends.Workload) error {
			w.Hooks = backends.Hooks{}
			return b.Apply(ctx, w)
		}}
	}},
	{"a context that has ended changes nothing", func(b *fake.Backend) backends.Backend {
		return &spoilt{Backend: b, remove: func(ctx context.Context, name string) error {
			return b.Remove(context.WithoutCancel(ctx), name)
		}}
	}},
	{"nothing can be written without an overlay", func(b *fake.Backend) backends.Backend {
		return &spoilt{Backend: b, apply: func(ctx context.Context, w backends.Workload) error {
			w.Overlay.Size = 1 << 20
			return b.Apply(ctx, w)
		}}
	}},
	{"T56 the base is immutable, the overlay is not", func(b *fake.Backend) backends.Backend {
		return spoilProgram(b, func(p *fake.Process) { os.Chmod(p.Workload.Image.Content, 0o700+os.FileMode(len(p.Argv))) })
	}},
	{"a kept path survives a new spec and belongs to its unit", func(b *fake.Backend) backends.Backend {
		return &spoilt{Backend: b, apply: func(ctx context.Context, w backends.Workload) error {
			w.Unit = "one for all"
			return b.Apply(ctx, w)
		}}
	}},
	{"the disk limit bites", func(b *fake.Backend) backends.Backend {
		return &spoilt{Backend: b, apply: func(ctx context.Context, w backends.Workload) error {
			w.Overlay.Size = 1 << 30
			return b.Apply(ctx, w)
		}}
	}},
	{"what it lacks is refused and nothing changed", func(b *fake.Backend) backends.Backend {
		return &spoilt{Backend: b, apply: func(ctx context.Context, w backends.Workload) error {
			w.Mounts = nil
			return b.Apply(ctx, w)
		}}
	}},
	{"an unknown format is refused", func(b *fake.Backend) backends.Backend {
		return &spoilt{Backend: b, apply: func(ctx context.Context, w backends.Workload) error {
			w.Format = backends.Native
			return b.Apply(ctx, w)
		}}
	}},
	{"many at once", func(b *fake.Backend) backends.Backend {
		return &spoilt{Backend: b, observed: func(s *backends.Status) { s.Restarts++ }}
	}},
}

// claimed is a defect that no check notices, but all of them together.
const claimed = ""

// spoilt is a fake with other methods.
type spoilt struct {
	*fake.Backend
	apply    func(context.Context, backends.Workload) error
	remove   func(context.Context, string) error
	logs     func(context.Context, string, backends.LogOptions) (io.ReadCloser, error)
	observed func(*backends.Status)
}

func (s *spoilt) Apply(ctx context.Context, w backends.Workload) error {
	if s.apply == nil {
		return s.Backend.Apply(ctx, w)
	}
	return s.apply(ctx, w)
}

func (s *spoilt) Remove(ctx context.Context, name string) error {
	if s.remove == nil {
		return s.Backend.Remove(ctx, name)
	}
	return s.remove(ctx, name)
}

func (s *spoilt) Logs(ctx context.Context, name string, o backends.LogOptions) (io.ReadCloser, error) {
	if s.logs == nil {
		return s.Backend.Logs(ctx, name, o)
	}
	return s.logs(ctx, name, o)
}

func (s *spoilt) Observe(ctx context.Context) ([]backends.Status, error) {
	list, err := s.Backend.Observe(ctx)
	for i := range list {
		if s.observed != nil {
			s.observed(&list[i])
		}
	}
	return list, err
}

func spoilProgram(b *fake.Backend, spoil func(p *fake.Process)) backends.Backend {
	program := b.Program
	b.Program = func(p *fake.Process) (int, bool) {
		spoil(p)
		return program(p)
	}
	return b
}

// TestSuiteNoticesDefects runs one check of the suite on each broken backend, in a process of its own: it must fail.
func TestSuiteNoticesDefects(t *testing.T) {
	for _, defect := range defects {
		t.Run(defect.check, func(t *testing.T) {
			t.Parallel()
			name := strings.ReplaceAll(defect.check, " ", "_")
			pattern, said := "^TestConformance$/^value$/^native$/^"+name+"$", "--- FAIL: TestConformance/value/native/"+name
			if defect.check == claimed {
				pattern, said = "^TestConformance$/^value$/^native$", "the fingerprint has moonlight, which no check exercises"
			}
			suite := exec.Command(os.Args[0], "-test.run="+pattern, "-test.v")
			suite.Env = append(os.Environ(), "KMO_DEFECT=defect "+defect.check)
			output, err := suite.CombinedOutput()
			if err == nil || !strings.Contains(string(output), said) {
				t.Errorf("the suite does not notice: error %v, output %s", err, output)
			}
		})
	}
}

// spoiled is the backend with the defect that this process was started for, or as it is.
func spoiled(b *fake.Backend) backends.Backend {
	i := slices.IndexFunc(defects, func(d defect) bool { return "defect "+d.check == os.Getenv("KMO_DEFECT") })
	if i < 0 {
		return b
	}
	return defects[i].spoil(b)
}
