package plugin

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/policy/refusal"
)

// plant writes a program into a folder and returns its pin.
func plant(t *testing.T, dir, name, text string) string {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:])
}

func TestFind(t *testing.T) {
	outside := t.TempDir()
	pin := plant(t, outside, "good", "#!/bin/true")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	tests := []struct {
		name  string
		spoil func(dir string)
		says  string
	}{
		{"T71 unpinned", func(dir string) { plant(t, dir, "other", "x") }, "other: no pin; want its sha256"},
		{"T71 binary replaced", func(dir string) { plant(t, dir, "good", "#!/bin/false") }, "good: sha256 "},
		{"T71 binary gone", func(dir string) { must(os.Remove(filepath.Join(dir, "good"))) }, "good: no such file"},
		{"U-02 symbolic link", func(dir string) {
			must(os.Remove(filepath.Join(dir, "good")))
			must(os.Symlink(filepath.Join(outside, "good"), filepath.Join(dir, "good")))
		}, "good: a symbolic link; want a plain file"},
		{"U-02 symbolic link loop", func(dir string) {
			must(os.Remove(filepath.Join(dir, "good")))
			must(os.Symlink("good", filepath.Join(dir, "good")))
		}, "good: a symbolic link; want a plain file"},
		{"U-02 named pipe", func(dir string) {
			must(os.Remove(filepath.Join(dir, "good")))
			must(syscall.Mkfifo(filepath.Join(dir, "good"), 0o755))
		}, "good: a named pipe; want a plain file"},
		{"a folder", func(dir string) {
			must(os.Remove(filepath.Join(dir, "good")))
			must(os.Mkdir(filepath.Join(dir, "good"), 0o755))
		}, "good: a folder; want a plain file"},
		{"T71 T63 KT023 trips on a file writable by the group", func(dir string) { must(os.Chmod(filepath.Join(dir, "good"), 0o775)) }, "good: mode 0775; want writable by its owner only"},
		{"T71 file writable by all", func(dir string) { must(os.Chmod(filepath.Join(dir, "good"), 0o757)) }, "good: mode 0757"},
		{"T71 file of somebody else", func(dir string) { must(os.Chown(filepath.Join(dir, "good"), 12345, 0)) }, "good: owner 12345; want owner 0"},
		{"not executable", func(dir string) { must(os.Chmod(filepath.Join(dir, "good"), 0o644)) }, "good: mode 0644; want an executable file"},
		{"T71 folder writable by the group", func(dir string) { must(os.Chmod(dir, 0o775)) }, "mode 0775; want writable by its owner only"},
		{"T71 folder writable by all, sticky", func(dir string) { must(os.Chmod(dir, 0o777|os.ModeSticky)) }, "mode 0777"},
		{"T71 folder of somebody else", func(dir string) { must(os.Chown(dir, 12345, 0)) }, "owner 12345"},
		{"T71 folder above writable by all", func(dir string) { must(os.Chmod(filepath.Dir(dir), 0o777)) }, "mode 0777"},
		{"U-02 folder by a symbolic link", func(dir string) {
			must(os.Rename(dir, dir+".moved"))
			must(os.Symlink(dir+".moved", dir))
		}, "a symbolic link; want a folder"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "plugins")
			must(os.Mkdir(dir, 0o755))
			plant(t, dir, "good", "#!/bin/true")
			pins := map[string]string{"good": pin}
			if found, err := Find(dir, pins); err != nil || len(found) != 1 || found[0].Name != "good" {
				t.Fatalf("unspoilt: found %v, error %v", found, err)
			}
			tt.spoil(dir)
			_, err := Find(dir, pins)
			all := refusal.All(err)
			if len(all) != 1 || all[0].Code != "KT023" || !strings.Contains(all[0].Error(), tt.says) {
				t.Errorf("error %v, want one KT023 that says %q", err, tt.says)
			}
		})
	}
}

func TestT63FindBadPins(t *testing.T) {
	dir := t.TempDir()
	good := plant(t, dir, "good", "#!/bin/true")
	for _, pin := range []string{"", "sha256:" + good, strings.ToUpper(good), good[:62], good + "00", "\x1b[2J"} {
		found, err := Find(dir, map[string]string{"good": pin})
		if r := refusal.Of(err); r == nil || r.Code != "KT023" || len(found) != 0 || strings.Contains(err.Error(), "\x1b") {
			t.Errorf("pin %q: found %v, error %v; want KT023", pin, found, err)
		}
	}
	plant(t, dir, "bad", "#!/bin/false")
	found, err := Find(dir, map[string]string{"good": good, "bad": good, "gone": good})
	if len(found) != 1 || found[0].Name != "good" || len(refusal.All(err)) != 2 {
		t.Errorf("found %v, error %v; want good, and two refusals", found, err)
	}
}

// TestExample builds the example plugin, pins it, finds it, runs it; and does not run what took its place.
func TestExample(t *testing.T) {
	dir, list := t.TempDir(), t.TempDir()
	path := filepath.Join(dir, "list")
	if output, err := exec.Command("go", "build", "-o", path, "../../fixtures/plugin-example").CombinedOutput(); err != nil {
		t.Fatalf("building the example: %v\n%s", err, output)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(text)
	found, err := Find(dir, map[string]string{"list": hex.EncodeToString(sum[:])})
	if err != nil || len(found) != 1 {
		t.Fatalf("found %v, error %v", found, err)
	}
	o := Options{Name: "list", Found: &found[0], Env: []string{"KMO_STATE=" + list}, Dir: shortDir(t)}
	c := open(t, o)
	w := workload("relay-1")
	if err := c.Apply(t.Context(), w); err != nil {
		t.Fatal(err)
	}
	all, err := c.Observe(t.Context())
	if err != nil || len(all) != 1 || all[0].Name != w.Name || all[0].Spec != w.Spec {
		t.Errorf("observe %+v, error %v", all, err)
	}
	w.Run.Args, w.Overlay.Size = []string{"x"}, 1
	var lacking *backends.FeatureError
	if err := c.Apply(t.Context(), w); !errors.As(err, &lacking) || lacking.Feature != backends.Overlays {
		t.Errorf("apply with an overlay: error %v, want a *FeatureError", err)
	}
	if _, _, err := c.Exec(t.Context(), "relay-1", []string{"/app"}); !errors.As(err, &lacking) || lacking.Feature != backends.Exec {
		t.Errorf("exec: error %v, want a *FeatureError", err)
	}

	t.Run("T71 U-41 binary swapped between find and start", func(t *testing.T) {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		plant(t, dir, "list", "#!/bin/true")
		o.Dir = shortDir(t)
		_, err := Open(t.Context(), o)
		if r := refusal.Of(err); r == nil || r.Code != "KT023" {
			t.Errorf("error %v, want KT023", err)
		}
		if _, err := c.Observe(t.Context()); err != nil {
			t.Errorf("the plugin that runs already has stopped: %v", err)
		}
	})
	t.Run("T71 U-41 binary swapped after the check", func(t *testing.T) { swapped(t, found[0], text) })
}

// TestScripts are plugins whose first line names their interpreter, which must find them.
func TestScripts(t *testing.T) {
	for _, tt := range []struct{ name, text, says string }{
		{"one that becomes a plugin", "exec " + os.Args[0] + " plugin fake " + t.TempDir(), ""},
		{"one that forges its handshake", "echo '1|1|tcp|127.0.0.1:80|grpc|'; exec sleep 1000", "E_PLUGIN: plugin handshake: tcp 127.0.0.1:80"},
		{"one that says something else", "echo hello of a script; exec sleep 1000", "Unrecognized remote plugin message: hello of a script"},
		{"one that dies", "echo its last words >&2; exit 3", "its last words"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			pin := plant(t, dir, "fake", "#!/bin/sh\n"+tt.text+"\n")
			found, err := Find(dir, map[string]string{"fake": pin})
			if err != nil {
				t.Fatal(err)
			}
			c, err := Open(t.Context(), Options{Name: "fake", Found: &found[0], Dir: shortDir(t)})
			if tt.says != "" {
				if err == nil || !strings.Contains(err.Error(), tt.says) {
					t.Errorf("error %v, want one that says %q", err, tt.says)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if _, err := c.Fingerprint(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}

// swapped replaces the program once it was checked, and runs what was checked.
func swapped(t *testing.T, found Found, text []byte) {
	if err := os.WriteFile(found.Path, text, 0o755); err != nil {
		t.Fatal(err)
	}
	file, err := found.open()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := os.Remove(found.Path); err != nil {
		t.Fatal(err)
	}
	plant(t, filepath.Dir(found.Path), "list", "#!/bin/sh\necho swapped\n")
	run := exec.Cmd{Args: []string{found.Path}, Env: []string{"KMO_STATE=" + t.TempDir()}}
	runFile(&run, file)
	output, _ := run.CombinedOutput()
	if !strings.Contains(string(output), "This binary is a plugin") {
		t.Errorf("what ran is not what was checked: %s", output)
	}
}
