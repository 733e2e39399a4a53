package appimage

import (
	"crypto/sha256"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/conformance"
	"github.com/kindos/kmo/backends/process"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == process.StageArg {
		process.Stage()
	}
	os.Exit(m.Run())
}

func open(t testing.TB, state string) *Backend {
	t.Helper()
	b, err := Open(Options{State: state, Backoff: func(n int) time.Duration { return 10 * time.Millisecond << min(n, 6) }})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// pack makes an AppImage of a folder with the real mksquashfs, behind an ELF program that would leave a mark if it were executed.
func pack(t testing.TB, appDir string, options ...string) string {
	t.Helper()
	dir := t.TempDir()
	source := filepath.Join(dir, "stub.go")
	mark := fmt.Sprintf("package main\n\nimport \"os\"\n\nfunc main() { _ = os.WriteFile(%q, nil, 0o600) }\n", filepath.Join(dir, "executed"))
	image, system := filepath.Join(dir, "app.AppImage"), filepath.Join(dir, "app.squashfs")
	if err := os.WriteFile(source, []byte(mark), 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, "go", "build", "-o", image, source)
	run(t, "mksquashfs", append([]string{appDir, system, "-quiet", "-no-progress", "-all-root"}, options...)...)
	text, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	copy(text[8:], "AI\x02")
	tail, err := os.ReadFile(system)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(image, append(text, tail...), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := os.Stat(filepath.Join(dir, "executed")); err == nil {
			t.Error("the image itself was executed")
		}
	})
	return image
}

func run(t testing.TB, name string, args ...string) {
	t.Helper()
	command := exec.Command(name, args...)
	command.Env = append(os.Environ(), "CGO_ENABLED=0")
	if output, err := command.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", name, err, output)
	}
}

// folder makes an AppDir of files: a text that begins with "-> " is a link.
func folder(t testing.TB, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		at := filepath.Join(dir, name)
		err := os.MkdirAll(filepath.Dir(at), 0o755)
		if to, link := strings.CutPrefix(text, "-> "); link {
			err = errors.Join(err, os.Symlink(to, at))
		} else {
			err = errors.Join(err, os.WriteFile(at, []byte(text), 0o755))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func testProgram(t testing.TB) string {
	t.Helper()
	text, err := os.ReadFile(conformance.Build(t, "linux", runtime.GOARCH))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// packed is the test program.
func packed(t testing.TB) backends.Image {
	t.Helper()
	return backends.Image{Content: pack(t, folder(t, map[string]string{"AppRun": "-> usr/bin/relay", "usr/bin/relay": testProgram(t)}))}
}

func TestConformance(t *testing.T) {
	image := packed(t)
	conformance.Test(t, func(t *testing.T) conformance.Subject {
		dir := t.TempDir()
		return conformance.Subject{
			Open:   func(t *testing.T) backends.Backend { return open(t, dir) },
			At:     func(t *testing.T, state string) backends.Backend { return open(t, state) },
			Dies:   true,
			Images: map[backends.Format]backends.Image{backends.AppImage: image},
			Disk:   []string{dir},
			Table:  "testdata/features",
			Leaks: func(t *testing.T) []string {
				left, _ := filepath.Glob(filepath.Join(dir, "*", "work", "*"))
				unpacked, _ := filepath.Glob(filepath.Join(dir, "apps", "*"))
				own := fmt.Sprintf("/sys/fs/cgroup/*/kmo/appimage-%.4x", sha256.Sum256([]byte(filepath.Join(dir, "programs"))))
				groups, _ := filepath.Glob(own)
				return append(append(left, unpacked...), groups...)
			},
		}
	})
}

func TestDemo(t *testing.T) { conformance.Demo(t, Name, "") }

// A script with links, which runs programs of the base system, is what most AppImages begin with.
func TestScript(t *testing.T) {
	script := "#!/bin/sh\nhere=$(dirname \"$(readlink -f \"$0\")\")\necho \"here $here $APPDIR $(cat \"$here/usr/share/word\")\"\nls /root /etc/shadow 2>&1 | head -1\nexec sleep 1000\n"
	files := map[string]string{"AppRun": script, "usr/share/word": "-> ../text", "usr/text": "found"}
	for _, compression := range []string{"gzip", "xz", "zstd"} {
		t.Run(compression, func(t *testing.T) {
			image := pack(t, folder(t, files), "-comp", compression)
			b := open(t, t.TempDir())
			defer b.Close()
			w := workload(image)
			if err := b.Apply(t.Context(), w); err != nil {
				t.Fatal(err)
			}
			want := "here /opt/app /opt/app found\n"
			until(t, b, w.Name, want)
			if err := b.Remove(t.Context(), w.Name); err != nil {
				t.Error(err)
			}
		})
	}
}

func workload(image string) backends.Workload {
	return backends.Workload{Name: "relay-00000001", Unit: "relay", Format: backends.AppImage, Image: backends.Image{Content: image}, Run: backends.Run{User: 65532}}
}

func until(t *testing.T, b *Backend, name, want string) {
	t.Helper()
	text := ""
	for deadline := time.Now().Add(20 * time.Second); !strings.Contains(text, want); time.Sleep(10 * time.Millisecond) {
		log, err := b.Logs(t.Context(), name, backends.LogOptions{})
		if err != nil {
			t.Fatal(err)
		}
		buffer := make([]byte, 1<<16)
		n, _ := log.Read(buffer)
		_ = log.Close()
		if text = string(buffer[:n]); time.Now().After(deadline) {
			t.Fatalf("log %q, want %q in it", text, want)
		}
	}
}

func TestRefused(t *testing.T) {
	good := pack(t, folder(t, map[string]string{"AppRun": "#!/bin/sh\n"}))
	text, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	f, err := elf.Open(good)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	file := func(text []byte) string {
		at := filepath.Join(t.TempDir(), "image")
		if err := os.WriteFile(at, text, 0o600); err != nil {
			t.Fatal(err)
		}
		return at
	}
	changed := func(at int, to string) string {
		other := append([]byte{}, text...)
		copy(other[at:], to)
		return file(other)
	}
	at := strings.LastIndex(string(text), "hsqs")
	special := folder(t, map[string]string{"AppRun": "#!/bin/sh\n"})
	run(t, "mkfifo", filepath.Join(special, "pipe"))
	for _, test := range []struct{ name, image, want string }{
		{"empty", file(nil), "fewer than 64 bytes"},
		{"no ELF", file([]byte(strings.Repeat("x", 100))), "want AI and 2"},
		{"type 1", changed(8, "AI\x01"), "want AI and 2"},
		{"a plain program", changed(8, "\x00\x00\x00"), "want AI and 2"},
		{"a broken ELF", changed(4, "\x07"), "its ELF part"},
		{"no squashfs", file(text[:at]), "want a squashfs"},
		{"a squashfs of zeros", changed(at+4, strings.Repeat("\x00", 92)), "squashfs"},
		{"a squashfs cut short", file(text[:at+200]), "squashfs"},
		{"no AppRun", pack(t, folder(t, map[string]string{"other": "x"})), "AppRun is no program"},
		{"an AppRun outside", pack(t, folder(t, map[string]string{"AppRun": "-> /bin/sh"})), "AppRun is no program"},
		{"an AppRun above", pack(t, folder(t, map[string]string{"AppRun": "-> ../../../../bin/sh"})), "AppRun is no program"},
		{"a pipe", pack(t, special), "want files, folders and links"},
	} {
		t.Run(test.name, func(t *testing.T) {
			state := t.TempDir()
			b := open(t, state)
			defer b.Close()
			var fault *backends.StartError
			if err := b.Apply(t.Context(), workload(test.image)); !errors.As(err, &fault) || !strings.Contains(fault.Cause, test.want) {
				t.Errorf("got %v, want a *StartError with %q", err, test.want)
			}
			if left, _ := filepath.Glob(filepath.Join(state, "*", "*", "*")); len(left) > 0 {
				t.Errorf("left behind: %q", left)
			}
		})
	}
}

// What was unpacked is measured before a start, and made anew when it is not what it was.
func TestDamagedAppIsMadeAnew(t *testing.T) {
	image := pack(t, folder(t, map[string]string{"AppRun": "#!/bin/sh\necho genuine\nexec sleep 1000\n"}))
	state := t.TempDir()
	b := open(t, state)
	w, other := workload(image), workload(image)
	other.Name = "relay-00000002"
	for _, one := range []backends.Workload{w, other} {
		if err := b.Apply(t.Context(), one); err != nil {
			t.Fatal(err)
		}
		until(t, b, one.Name, "genuine\n")
	}
	found, _ := filepath.Glob(filepath.Join(state, "apps", "*", "*", "app", "AppRun"))
	if len(found) != 1 {
		t.Fatalf("unpacked is %q", found)
	}
	if err := os.WriteFile(found[0], []byte("#!/bin/sh\necho forged\nexec sleep 1000\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	b = open(t, state)
	defer b.Close()
	list, err := b.Observe(t.Context())
	if err != nil || len(list) != 2 {
		t.Fatal(list, err)
	}
	kill := func(name string) {
		for _, s := range list {
			if s.Name == name {
				if err := syscall.Kill(s.PID, syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
			}
		}
		until(t, b, name, "genuine\ngenuine\n")
	}
	remove := func(name string, copies int) {
		if err := b.Remove(t.Context(), name); err != nil {
			t.Fatal(err)
		}
		if left, _ := filepath.Glob(filepath.Join(state, "apps", "*", "*")); len(left) != copies {
			t.Errorf("%s is removed, and copies are %q; want %d", name, left, copies)
		}
	}
	kill(w.Name)
	remove(w.Name, 2)
	code, said, err := b.Exec(t.Context(), other.Name, []string{"/bin/cat", appRun})
	if err != nil || code != 0 || !strings.Contains(string(said), "forged") {
		t.Errorf("the other program sees %d, %q, %v; want the copy that it was started from", code, said, err)
	}
	kill(other.Name)
	remove("none", 1)
	remove(other.Name, 0)
	if left, _ := filepath.Glob(filepath.Join(state, "apps", "*")); len(left) > 0 {
		t.Errorf("unpacked images that nobody uses are left: %q", left)
	}
}
