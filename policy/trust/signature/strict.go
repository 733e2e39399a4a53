package signature

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"reflect"
	"strings"
	"unicode/utf8"

	"github.com/kindos/kmo/policy/refusal"
)

const maxDepth = 16 // of nested JSON

// Decode decodes one JSON value of at most so many bytes into a struct without maps: UTF-8, no duplicate, unknown or differently cased key, no
// null, integers only, at most 16 levels, nothing after it.
func Decode(file []byte, into any, most int, subject string) error {
	if len(file) > most {
		return &refusal.Error{Code: "E_LIMIT", Subject: subject, Got: fmt.Sprintf("%d bytes", len(file)), Want: fmt.Sprintf("at most %d", most)}
	}
	if !utf8.Valid(file) {
		return undecoded(subject, "bytes that are not UTF-8", "UTF-8 JSON")
	}
	w := walker{decoder: json.NewDecoder(bytes.NewReader(file)), known: map[string]bool{}}
	w.learn(reflect.TypeOf(into).Elem())
	w.decoder.UseNumber()
	if err := w.value(0); err != nil {
		return undecoded(subject, err.Error(), "strict JSON")
	}
	if _, err := w.decoder.Token(); err != io.EOF {
		return undecoded(subject, "bytes after the JSON value", "one value")
	}
	decoder := json.NewDecoder(bytes.NewReader(file))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(into); err != nil {
		return undecoded(subject, err.Error(), "the fields of this version")
	}
	return nil
}

func undecoded(subject, got, want string) error {
	return &refusal.Error{Code: "E_DECODE", Subject: subject, Got: refusal.Clip(got, 200), Want: want}
}

// walker looks at every token, because encoding/json takes duplicate keys, other case, null and floats in silence.
type walker struct {
	decoder *json.Decoder
	known   map[string]bool // every field name of the wanted type
}

// learn collects the field names below t. Types without fields of ours, such as time.Time, have none to learn.
func (w *walker) learn(t reflect.Type) {
	switch t.Kind() {
	case reflect.Pointer, reflect.Slice:
		w.learn(t.Elem())
	case reflect.Struct:
		for i := range t.NumField() {
			if name, _, _ := strings.Cut(t.Field(i).Tag.Get("json"), ","); name != "" {
				w.known[name] = true
				w.learn(t.Field(i).Type)
			}
		}
	}
}

func (w *walker) value(depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("more than %d levels", maxDepth)
	}
	token, err := w.decoder.Token()
	if err != nil {
		return err
	}
	switch t := token.(type) {
	case nil:
		return fmt.Errorf("null at offset %d", w.decoder.InputOffset())
	case json.Number:
		if strings.ContainsAny(t.String(), ".eE") {
			return fmt.Errorf("number %s is no integer", refusal.Clip(t.String(), 30))
		}
	case string:
		if strings.ContainsRune(t, utf8.RuneError) {
			return fmt.Errorf("a broken character at offset %d", w.decoder.InputOffset())
		}
	case json.Delim:
		return w.inside(t, depth)
	}
	return nil
}

func (w *walker) inside(open json.Delim, depth int) error {
	seen := map[string]bool{}
	for w.decoder.More() {
		if open == '{' {
			token, err := w.decoder.Token()
			if err != nil {
				return err
			}
			key, _ := token.(string) // the decoder lets nothing else stand here
			if !w.known[key] {
				return fmt.Errorf("unknown key %q", refusal.Clip(key, 60))
			}
			if seen[key] {
				return fmt.Errorf("key %q twice", key)
			}
			seen[key] = true
		}
		if err := w.value(depth + 1); err != nil {
			return err
		}
	}
	_, err := w.decoder.Token()
	return err
}
