package channel

import (
	"bytes"
	"io"
	"strings"
	"testing"
)

func FuzzReceive(f *testing.F) {
	var said bytes.Buffer
	if err := Open(&said, 100).Say(Ended, 7, End{Code: 137, OOM: true}); err != nil {
		f.Fatal(err)
	}
	f.Add(said.Bytes())
	f.Add([]byte("O\x00\x00\x00\x00\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, text []byte) {
		frame, err := Open(bytes.NewBuffer(text), 100).Receive()
		if err != nil {
			return
		}
		var again bytes.Buffer
		if err := Open(&again, 100).Send(frame.Kind, frame.ID, frame.Body); err != nil || !bytes.HasPrefix(text, again.Bytes()) {
			t.Errorf("%q was read as %v, which is %q; %v", text, frame, again.Bytes(), err)
		}
	})
}

func TestBounds(t *testing.T) {
	var stream bytes.Buffer
	long := strings.Repeat("x", MaxToHost+1)
	if _, err := io.WriteString(Open(&stream, MaxToHost).Writer(3), long); err != nil {
		t.Fatal(err)
	}
	conn, got := Open(&stream, MaxToHost), ""
	for range 2 {
		f, err := conn.Receive()
		if err != nil || f.Kind != Output || f.ID != 3 {
			t.Fatalf("%c %d %v", f.Kind, f.ID, err)
		}
		got += string(f.Body)
	}
	if got != long {
		t.Errorf("%d bytes came, want %d", len(got), len(long))
	}
	if err := conn.Send(Output, 0, []byte(long)); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Receive(); err == nil || !strings.Contains(err.Error(), "want at most") {
		t.Errorf("a frame too large: %v", err)
	}
}
