package engine

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestFrames(t *testing.T) {
	frame := func(stream byte, text string) string {
		return string([]byte{stream, 0, 0, 0, 0, 0, byte(len(text) >> 8), byte(len(text))}) + text
	}
	whole := frame(1, "one\n") + frame(2, "two\n")
	for _, c := range []struct {
		name, stream, want string
		fails              bool
	}{
		{"both streams", whole, "one\ntwo\n", false},
		{"nothing", "", "", false},
		{"broken off in a head", whole + "\x01\x00", "one\ntwo\n", false},
		{"broken off in a piece", whole[:len(whole)-2], "one\n", false},
		{"another stream", frame(9, "x"), "", true},
		{"too long", "\x01\x00\x00\x00\xff\xff\xff\xff", "", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got bytes.Buffer
			err := Frames(strings.NewReader(c.stream), func(piece []byte) error {
				got.Write(piece)
				return nil
			})
			if got.String() != c.want || (err != nil) != c.fails {
				t.Errorf("%q, %v; want %q", got.String(), err, c.want)
			}
		})
	}
}

func TestLogFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ctr.log")
	log := OpenLog(path)
	defer log.Close()
	next := func() (got []string) {
		t.Helper()
		if err := log.Next(func(piece []byte) error {
			got = append(got, string(piece))
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return got
	}
	add := func(text string) {
		t.Helper()
		f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteString(text); err != nil {
			t.Fatal(err)
		}
	}
	want := func(want string) {
		t.Helper()
		if got := strings.Join(next(), "|"); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	want("")
	add("2026-01-01T00:00:00.1+00:00 stdout F one\n2026-01-01T00:00:00.2+00:00 stderr P two \n2026-01-01T00:00:00.3+00:00 stderr F goes on\n2026-01-01T00:00:00.4+00:00 stdout F thr")
	want("one\n|two |goes on\n")
	add("ee\n")
	want("three\n")
	want("")
	add("2026-01-01T00:00:00.5+00:00 stdout F last\n")
	if err := os.Rename(path, path+".old"); err != nil {
		t.Fatal(err)
	}
	add("2026-01-01T00:00:00.6+00:00 stdout F first\n")
	want("last\n|first\n")
}

func TestTail(t *testing.T) {
	pieces := [][]byte{[]byte("a\n"), []byte("b "), []byte("b\n"), []byte("c\n"), []byte("d")}
	for lines, want := range map[int]string{0: "a\nb b\nc\nd", 1: "d", 2: "c\nd", 3: "b b\nc\nd", 9: "a\nb b\nc\nd"} {
		if got := string(bytes.Join(Tail(pieces, lines), nil)); got != want {
			t.Errorf("the last %d lines are %q, want %q", lines, got, want)
		}
	}
}

func TestStamps(t *testing.T) {
	var s Stamps
	read := func(pieces ...string) (got string) {
		s.Again()
		for _, piece := range pieces {
			if text, ok := s.New([]byte(piece)); ok {
				got += string(text)
			}
		}
		return got
	}
	for _, c := range []struct {
		pieces []string
		want   string
	}{
		{[]string{"1 a\n", "2 long", "2 line\n"}, "a\nlongline\n"},
		{[]string{"2 long", "2 line\n"}, ""},
		{[]string{"2 long", "2 line\n", "2 more\n", "3 b\n"}, "more\nb\n"},
		{[]string{"3 b\n", "4 \n"}, "\n"},
	} {
		if got := read(c.pieces...); got != c.want {
			t.Errorf("of %q new are %q, want %q", c.pieces, got, c.want)
		}
	}
}
