package layer

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func folder(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	err := errors.Join(
		os.MkdirAll(filepath.Join(dir, "etc"), 0o755), os.Mkdir(filepath.Join(dir, "tmp"), 0o755),
		os.WriteFile(filepath.Join(dir, "etc", "passwd"), []byte("root"), 0o640), os.WriteFile(filepath.Join(dir, "app"), []byte("program"), 0o755),
		os.Link(filepath.Join(dir, "app"), filepath.Join(dir, "zap")), os.Symlink("/app", filepath.Join(dir, "link")),
	)
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func measure(t *testing.T, dir string) *Image {
	t.Helper()
	i, err := Measure(t.Context(), dir, "amd64")
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// What is sent is what its names say, and a folder's copy of another time is the same image.
func TestImageIsItsFolder(t *testing.T) {
	dir := folder(t)
	image := measure(t, dir)
	if err := os.Chtimes(filepath.Join(dir, "app"), time.Unix(1, 0), time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	if other := measure(t, dir); other.ID != image.ID || measure(t, folder(t)).ID != image.ID {
		t.Errorf("image %s, at another time %s", image.ID, other.ID)
	}
	var sent bytes.Buffer
	if err := image.Send(t.Context(), &sent); err != nil {
		t.Fatal(err)
	}
	parts := map[string][]byte{}
	for archive := tar.NewReader(&sent); ; {
		head, err := archive.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if parts[head.Name], err = io.ReadAll(archive); err != nil {
			t.Fatal(err)
		}
	}
	var manifest []struct {
		Config           string
		RepoTags, Layers []string
	}
	if err := json.Unmarshal(parts["manifest.json"], &manifest); err != nil || len(manifest) != 1 {
		t.Fatalf("manifest %s: %v", parts["manifest.json"], err)
	}
	sum := func(text []byte) string {
		sum := sha256.Sum256(text)
		return "sha256:" + hex.EncodeToString(sum[:])
	}
	if got := sum(parts[manifest[0].Config]); got != image.ID {
		t.Errorf("the configuration is %s, want %s", got, image.ID)
	}
	if got := sum(parts["layer.tar"]); got != image.DiffID || !strings.Contains(string(parts[manifest[0].Config]), got) {
		t.Errorf("the layer is %s, want %s, and in the configuration %s", got, image.DiffID, parts[manifest[0].Config])
	}
	seen := map[string]*tar.Header{}
	for archive := tar.NewReader(bytes.NewReader(parts["layer.tar"])); ; {
		head, err := archive.Next()
		if err != nil {
			break
		}
		seen[head.Name] = head
	}
	if seen["tmp/"].Mode != 0o1777 || seen["etc/passwd"].Mode != 0o640 || seen["zap"].Linkname != "app" || seen["link"].Linkname != "/app" || len(seen) != 6 {
		t.Errorf("the layer has %+v", seen)
	}
}

func TestChangedContentIsNotSent(t *testing.T) {
	dir := folder(t)
	image := measure(t, dir)
	if err := os.WriteFile(filepath.Join(dir, "app"), []byte("PROGRAM"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := image.Send(t.Context(), io.Discard); err == nil || !strings.Contains(err.Error(), image.DiffID) {
		t.Errorf("sending changed content: %v", err)
	}
	if measure(t, dir).ID == image.ID {
		t.Error("changed content is the same image")
	}
}

func TestRefused(t *testing.T) {
	dir := folder(t)
	if err := os.WriteFile(filepath.Join(dir, "etc", ".wh.passwd"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Measure(t.Context(), dir, "amd64"); err == nil || !strings.Contains(err.Error(), "etc/.wh.passwd") {
		t.Errorf("a name that deletes: %v", err)
	}
	for _, dir := range []string{filepath.Join(dir, "none"), filepath.Join(dir, "app")} {
		if _, err := Measure(t.Context(), dir, "amd64"); err == nil {
			t.Errorf("%s: no error", dir)
		}
	}
}
