package fake

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
)

// keptFile holds the kept paths of all units; no workload's name has a dot.
const keptFile = "kept.json"

// load reads the state that an earlier Backend has left in Dir, once.
func (b *Backend) load() error {
	if b.loaded {
		return nil
	}
	b.workloads, b.kept = map[string]*workload{}, map[string]map[string][]byte{}
	b.loaded = true
	if b.Dir == "" {
		return nil
	}
	entries, err := os.ReadDir(b.Dir)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		name, isJSON := strings.CutSuffix(entry.Name(), ".json")
		if !isJSON {
			continue // the rest of a write that was cut off
		}
		text, err := os.ReadFile(filepath.Join(b.Dir, entry.Name()))
		if err != nil {
			return err
		}
		var into any = &b.kept
		if entry.Name() != keptFile {
			b.workloads[name] = &workload{}
			into = b.workloads[name]
		}
		if err := json.Unmarshal(text, into); err != nil {
			return err
		}
	}
	return nil
}

// changed makes what has become of one workload last.
func (b *Backend) changed(name string) error {
	b.list = nil
	if b.Dir == "" {
		return nil
	}
	if err := b.save(keptFile, b.kept); err != nil {
		return err
	}
	if x := b.workloads[name]; x != nil {
		return b.save(name+".json", x)
	}
	if err := os.Remove(filepath.Join(b.Dir, name+".json")); err != nil && !os.IsNotExist(err) {
		return err
	}
	return nil
}

// save replaces a file as a whole.
func (b *Backend) save(file string, value any) error {
	text, err := json.Marshal(value)
	if err != nil {
		return err
	}
	path := filepath.Join(b.Dir, file)
	if err := os.WriteFile(path+".new", text, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}
