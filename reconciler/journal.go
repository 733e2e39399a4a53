package reconciler

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"

	"github.com/kindos/kmo/policy/refusal"
)

// FileJournal is a Journal in one JSON file, replaced as a whole: after a crash it is the old one or the new one.
type FileJournal struct{ Path string }

// Load returns the record last saved. A file that is there but cannot be read as a record is E_STATE: it is never taken for an empty one.
func (j FileJournal) Load() (Record, error) {
	var rec Record
	text, err := os.ReadFile(j.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return rec, nil
	}
	if err != nil {
		return rec, fmt.Errorf("reading the journal: %w", err)
	}
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&rec); err != nil || rec.Seq == 0 {
		return Record{}, &refusal.Error{Code: "E_STATE", Subject: "the journal " + j.Path, Got: fmt.Sprintf("it does not hold a record (%v)", err),
			Want: "the file as kMO left it, from before it was damaged"}
	}
	return rec, nil
}

// Save replaces the file and returns once it would survive a power cut.
func (j FileJournal) Save(rec Record) error {
	text, err := json.MarshalIndent(rec, "", "  ")
	if err != nil {
		return fmt.Errorf("encoding the journal: %w", err)
	}
	if err := renameio.WriteFile(j.Path, append(text, '\n'), 0o600); err != nil {
		return fmt.Errorf("saving the journal: %w", err)
	}
	folder, err := os.Open(filepath.Dir(j.Path))
	if err != nil {
		return fmt.Errorf("saving the journal: %w", err)
	}
	return errors.Join(folder.Sync(), folder.Close())
}
