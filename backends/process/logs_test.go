package process

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kindos/kmo/backends"
)

func TestTail(t *testing.T) {
	long := strings.Repeat("y", 50<<10)
	for _, test := range []struct {
		name, older, now string
		tail             int
		want             string
	}{
		{"all", "a\nb\n", "c\nd\n", 0, "a\nb\nc\nd\n"},
		{"last of one", "a\nb\n", "c\nd\n", 1, "d\n"},
		{"all of one", "a\nb\n", "c\nd\n", 2, "c\nd\n"},
		{"into the older", "a\nb\n", "c\nd\n", 3, "b\nc\nd\n"},
		{"more than there are", "a\nb\n", "c\nd\n", 9, "a\nb\nc\nd\n"},
		{"half a line at the end", "", "c\nd", 1, "d"},
		{"half a line alone", "", "d", 1, "d"},
		{"empty", "", "", 3, ""},
		{"empty lines", "", "a\n\n\n", 2, "\n\n"},
		{"over a chunk", "", "a\n" + long + "\n" + long + "\nb\n", 2, long + "\nb\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			for name, text := range map[string]string{olderFile: test.older, logFile: test.now} {
				if text == "" && name == olderFile {
					continue
				}
				if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			r, err := readLog(t.Context(), t.Context(), dir, backends.LogOptions{Tail: test.tail})
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(r)
			if err := errors.Join(err, r.Close()); err != nil || string(got) != test.want {
				t.Errorf("got %.200q, %v; want %.200q", got, err, test.want)
			}
		})
	}
	if _, err := readLog(t.Context(), t.Context(), t.TempDir(), backends.LogOptions{}); !errors.Is(err, backends.ErrNotFound) {
		t.Errorf("no log: %v, want ErrNotFound", err)
	}
}

func TestTrim(t *testing.T) {
	dir := t.TempDir()
	f, err := openLog(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	write := func(text string) {
		t.Helper()
		if _, err := f.WriteString(text); err != nil {
			t.Fatal(err)
		}
	}
	check := func(now, older string) {
		t.Helper()
		if _, _, err := trim(dir, 4); err != nil {
			t.Fatal(err)
		}
		for name, want := range map[string]string{logFile: now, olderFile: older} {
			if got, err := os.ReadFile(filepath.Join(dir, name)); string(got) != want || err != nil && want != "" {
				t.Errorf("%s is %q, %v; want %q", name, got, err, want)
			}
		}
	}
	write("abcd")
	check("abcd", "")
	write("efgh")
	check("", "efgh")
	write("ij") // the writer goes on where the file now ends
	check("ij", "efgh")
}

func TestHoles(t *testing.T) {
	dir := t.TempDir()
	f, err := openLog(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	page := strings.Repeat("a", 4095) + "\n" // what a file system gives room to
	if _, err := f.WriteString(page + page); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(1 << 42); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("b"); err != nil {
		t.Fatal(err)
	}
	r, err := readLog(t.Context(), t.Context(), dir, backends.LogOptions{Tail: 2})
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(r)
	if err := errors.Join(err, r.Close()); err != nil || string(got) != page+"b" {
		t.Errorf("the last two lines are %d bytes, %v; want %d", len(got), err, len(page)+1)
	}
	if got := since(dir, 4096); got != page[1:]+"b" {
		t.Errorf("the last 4 KiB are %d bytes, want 4096 without a hole", len(got))
	}
	if before, after, err := trim(dir, 4097); before != 1<<42+1 || after != 0 || err != nil {
		t.Errorf("trimmed from %d to %d, %v; want from %d to 0", before, after, err, 1<<42+1)
	}
	if older, err := os.ReadFile(filepath.Join(dir, olderFile)); string(older) != page+"b" {
		t.Errorf("the older part has %d bytes, %v; want the last 4097 that were written", len(older), err)
	}
}

// A reader that is closed, or whose keeper is, leaves nobody waiting for the next line, though its context goes on.
func TestFollowEndsAtClose(t *testing.T) {
	for name, end := range map[string]func(r io.Closer, keeper func()) error{
		"the reader": func(r io.Closer, _ func()) error { return r.Close() }, "the keeper": func(_ io.Closer, keeper func()) error { keeper(); return nil },
	} {
		t.Run(name, func(t *testing.T) { followEnds(t, end) })
	}
}

// What is written while a log is opened to be followed is read once.
func TestFollowMissesNothing(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, olderFile), bytes.Repeat([]byte("y"), 16<<20), 0o600); err != nil { // to be looked through, which takes a while
		t.Fatal(err)
	}
	f, err := openLog(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	stop, begun, ended := make(chan struct{}), make(chan struct{}), make(chan int)
	go func() {
		n := 0
		for ; ; n++ {
			select {
			case <-stop:
				ended <- n
				return
			default:
			}
			if _, err := fmt.Fprintf(f, "\nline %d", n); err != nil {
				t.Error(err)
			}
			if n == 0 {
				close(begun)
			}
		}
	}()
	<-begun
	r, err := readLog(t.Context(), t.Context(), dir, backends.LogOptions{Follow: true, Tail: 1 << 30})
	close(stop)
	lines := <-ended
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := f.WriteString("\nend\n"); err != nil {
		t.Fatal(err)
	}
	text := bufio.NewReader(r)
	if _, err := text.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	for n := range lines {
		if got, err := text.ReadString('\n'); err != nil || got != fmt.Sprintf("line %d\n", n) {
			t.Fatalf("got %.200q, %v; want line %d of %d", got, err, n, lines)
		}
	}
}

func followEnds(t *testing.T, end func(r io.Closer, keeper func()) error) {
	keeper, closeKeeper := context.WithCancel(t.Context())
	defer closeKeeper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, logFile), []byte("the last line\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := readLog(t.Context(), keeper, dir, backends.LogOptions{Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(r, make([]byte, len("the last line\n"))); err != nil {
		t.Fatal(err)
	}
	open := func() (n int) {
		found, _ := os.ReadDir("/proc/self/fd")
		for _, one := range found {
			if to, err := os.Readlink("/proc/self/fd/" + one.Name()); err == nil && to == filepath.Join(dir, logFile) {
				n++
			}
		}
		return n
	}
	if open() != 1 {
		t.Fatalf("the log is open %d times, want once", open())
	}
	if err := end(r, closeKeeper); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); open() > 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the log is still open 10 s after the reader was closed")
		}
	}
}
