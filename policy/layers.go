package policy

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/registry/merkle"
)

// source is one file of a layer, read once: what is judged is what is compiled.
type source struct {
	layer int
	path  string
	text  []byte
}

// name is what errors call the file: rego/… for the shipped layer, policy/… for a site's.
func (s source) name() string {
	if s.layer == 0 {
		return "rego/" + s.path
	}
	return "policy/" + s.path
}

func (s source) test() bool { return strings.HasSuffix(s.path, "_test.rego") }

type sources []source

// read takes every file of the layers but the shipped tests, in order.
func read(layers []fs.FS) (sources, error) {
	if len(layers) == 0 {
		return nil, &refusal.Error{Code: codeMissing, Subject: "policy", Got: "no layer of rules", Want: "the shipped rules as the first"}
	}
	var all sources
	for n, layer := range layers {
		files, err := readLayer(n, layer)
		if err != nil {
			return nil, err
		}
		all = append(all, files...)
	}
	return all, nil
}

func readLayer(n int, layer fs.FS) (sources, error) {
	var files sources
	total := 0
	err := fs.WalkDir(layer, ".", func(name string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		file := source{layer: n, path: name}
		if !entry.Type().IsRegular() {
			return &refusal.Error{Code: codePath, Subject: file.name(), Got: "not a regular file", Want: "files and folders only"}
		}
		wanted, err := file.wanted()
		if err != nil || !wanted {
			return err
		}
		if file.text, err = fs.ReadFile(layer, name); err != nil {
			return err
		}
		total += len(file.text)
		if files = append(files, file); len(files) > maxFiles || total > maxLayer {
			return &refusal.Error{Code: codeLimit, Subject: file.name(), Got: "more files or bytes of rules than are read",
				Want: fmt.Sprintf("at most %d files and %d bytes in all", maxFiles, maxLayer)}
		}
		return nil
	})
	if n > 0 && len(files) == 0 && errors.Is(err, fs.ErrNotExist) {
		return nil, nil // a site without a policy folder
	}
	return files, err
}

// wanted says whether the file belongs to the set. A site brings modules and texts for people, and nothing that looks like data for rules.
func (s source) wanted() (bool, error) {
	if s.layer == 0 {
		return !s.test() && (path.Ext(s.path) == ".rego" || s.path == "limits.json" || s.path == "capabilities.json"), nil
	}
	switch path.Ext(s.path) {
	case ".rego":
		return true, nil
	case ".md":
		return false, nil
	}
	return false, &refusal.Error{Code: codeCompile, Subject: s.name(), Got: "not a module", Want: "*.rego, and *.md for people"}
}

// digest is the content root of a folder that holds each layer as 0/, 1/, …
func (s sources) digest() (merkle.Digest, error) {
	entries := make([]merkle.Entry, 0, len(s))
	for _, file := range s {
		entries = append(entries, merkle.Entry{
			Type: merkle.File, Path: path.Join(strconv.Itoa(file.layer), file.path), Mode: 0o644,
			Size: uint64(len(file.text)), Blob: merkle.BlobRoot(file.text),
		})
	}
	slices.SortFunc(entries, func(a, b merkle.Entry) int { return strings.Compare(a.Path, b.Path) })
	root, err := merkle.SiteRoot(entries)
	if err != nil {
		return root, &refusal.Error{Code: codePath, Subject: "policy", Got: refusal.Clip(err.Error(), 200), Want: "plain file names"}
	}
	return root, nil
}

// shipped returns the text of one file of the first layer.
func (s sources) shipped(name string) ([]byte, error) {
	for _, file := range s {
		if file.layer == 0 && file.path == name {
			return file.text, nil
		}
	}
	return nil, &refusal.Error{Code: codeMissing, Subject: "rego/" + name, Got: "missing", Want: "the file as kMO ships it"}
}
