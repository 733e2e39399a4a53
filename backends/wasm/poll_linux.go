package wasm

import (
	"context"
	"encoding/binary"
	"math"
	"net"
	"reflect"
	"syscall"
	"time"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/api"
	"golang.org/x/sys/unix"
)

// The record sizes and numbers of poll_oneoff (WASI preview 1, "subscription", "event", "errno").
const (
	subscriptionSize, eventSize        = 48, 32
	eventClock, eventRead              = 0, 1
	eventWrite                         = 2
	errnoBadf, errnoFault              = 8, 21
	errnoInval, errnoIO                = 28, 29
	errnoNotsup                        = 58
	hangup                      uint16 = 1
)

// unknownPause bounds the answers about a descriptor whose socket cannot be seen: "ready", but no more often than this.
const unknownPause = 5 * time.Millisecond

// exportPoll puts a poll_oneoff in the place of wazero's that waits for sockets. wazero's says at once of every non-blocking
// socket that it is ready, so that a waiting server uses a whole core, and that none can be waited for to be writable, so that
// an answer larger than the socket's buffer is an error.
func exportPoll(b wazero.HostModuleBuilder) {
	i32 := api.ValueTypeI32
	b.NewFunctionBuilder().WithGoModuleFunction(api.GoModuleFunc(func(_ context.Context, mod api.Module, stack []uint64) {
		in, out, n, result := uint32(stack[0]), uint32(stack[1]), uint32(stack[2]), uint32(stack[3])
		stack[0] = uint64(pollOneoff(mod, in, out, n, result))
	}), []api.ValueType{i32, i32, i32, i32}, []api.ValueType{i32}).Export("poll_oneoff")
}

// subscription is one thing that a guest waits for.
type subscription struct {
	userdata uint64
	kind     byte
	errno    uint16 // why it cannot be waited for; 0 if it can
	flags    uint16
	ready    bool
	slot     int // index of its socket in the poll set, or -1
}

func pollOneoff(mod api.Module, in, out, n, result uint32) uint32 {
	memory := mod.Memory()
	if n == 0 {
		return errnoInval
	}
	if uint64(n)*subscriptionSize > uint64(memory.Size()) {
		return errnoFault
	}
	asked, ok := memory.Read(in, n*subscriptionSize)
	if !ok {
		return errnoFault
	}
	if _, ok := memory.Read(out, n*eventSize); !ok {
		return errnoFault
	}
	subscriptions := make([]subscription, 0, n)
	var sockets []unix.PollFd
	timeout := time.Duration(math.MaxInt64)
	for i := range n {
		s, wait, errno := subscribe(mod, asked[i*subscriptionSize:][:subscriptionSize], &sockets)
		if errno != 0 {
			return errno
		}
		timeout = min(timeout, wait)
		subscriptions = append(subscriptions, s)
	}
	deadline := time.Now().Add(timeout)
	if err := poll(sockets, timeout); err != nil {
		return errnoIO
	}
	// The memory may not have moved: the guest has one thread, and it is in this call.
	events := uint32(0)
	for _, s := range subscriptions {
		if s.settle(sockets, deadline) {
			record, _ := memory.Read(out+events*eventSize, eventSize)
			s.put(record)
			events++
		}
	}
	if !memory.WriteUint32Le(result, events) {
		return errnoFault
	}
	return 0
}

// subscribe reads one subscription, adds its socket to the poll set, and says how long it lets the whole call wait.
func subscribe(mod api.Module, record []byte, sockets *[]unix.PollFd) (s subscription, wait time.Duration, errno uint32) {
	s = subscription{userdata: binary.LittleEndian.Uint64(record), kind: record[8], slot: -1}
	wait = math.MaxInt64
	switch s.kind {
	case eventClock:
		if flags := binary.LittleEndian.Uint16(record[40:]); flags != 0 {
			return s, 0, errnoNotsup // an absolute time, as wazero's own
		}
		wait = time.Duration(min(binary.LittleEndian.Uint64(record[24:]), math.MaxInt64))
		return s, wait, 0
	case eventRead, eventWrite:
	default:
		return s, 0, errnoInval
	}
	fd := int32(binary.LittleEndian.Uint32(record[16:])) // a descriptor is a signed number
	if fd >= 0 && fd <= 2 {
		s.ready = true // the null device or the log: never waits
		return s, 0, 0
	}
	socket, found := socketOf(mod, fd)
	switch {
	case !found:
		s.ready, s.errno = true, errnoBadf
		return s, 0, 0
	case socket < 0:
		s.ready = true // a file, or a socket that this code does not know how to see
		return s, unknownPause, 0
	}
	events := int16(unix.POLLIN)
	if s.kind == eventWrite {
		events = unix.POLLOUT
	}
	s.slot = len(*sockets)
	*sockets = append(*sockets, unix.PollFd{Fd: socket, Events: events})
	return s, wait, 0
}

// poll waits until a socket is ready or the time is over, whatever signals come.
func poll(sockets []unix.PollFd, timeout time.Duration) error {
	end := time.Now().Add(timeout)
	for {
		var limit *unix.Timespec
		if timeout < math.MaxInt64 {
			t := unix.NsecToTimespec(max(0, time.Until(end).Nanoseconds()))
			limit = &t
		}
		_, err := unix.Ppoll(sockets, limit, nil)
		if err != unix.EINTR {
			return err
		}
	}
}

// settle says whether the subscription has something to tell.
func (s *subscription) settle(sockets []unix.PollFd, deadline time.Time) bool {
	switch {
	case s.kind == eventClock:
		return !time.Now().Before(deadline)
	case s.slot < 0:
		return s.ready
	}
	got := sockets[s.slot].Revents
	if got&unix.POLLNVAL != 0 {
		s.errno = errnoBadf
	}
	if got&unix.POLLHUP != 0 {
		s.flags = hangup
	}
	return got != 0
}

// put writes the event's 32 bytes.
func (s *subscription) put(record []byte) {
	clear(record)
	binary.LittleEndian.PutUint64(record, s.userdata)
	binary.LittleEndian.PutUint16(record[8:], s.errno)
	record[10] = s.kind
	binary.LittleEndian.PutUint16(record[24:], s.flags)
}

// socketOf returns the host's descriptor of the socket that is fd to the guest, and -1 if fd is open but no socket. wazero keeps its
// table of descriptors to itself, so it is looked at by reflection: the module's Sys.FS().LookupFile(fd), whose File holds the
// *net.TCPListener as tl or the *net.TCPConn as tc. Should a later wazero name them otherwise, the answer is -1, and a test fails.
func socketOf(mod api.Module, fd int32) (socket int32, found bool) {
	instance := reflect.Indirect(reflect.ValueOf(mod))
	if instance.Kind() != reflect.Struct {
		return -1, true
	}
	system := instance.FieldByName("Sys")
	if !system.IsValid() {
		return -1, true
	}
	files := system.MethodByName("FS")
	if !files.IsValid() {
		return -1, true
	}
	lookup := files.Call(nil)[0].MethodByName("LookupFile")
	if !lookup.IsValid() {
		return -1, true
	}
	entry := lookup.Call([]reflect.Value{reflect.ValueOf(fd)})
	if !entry[1].Bool() {
		return -1, false
	}
	file := reflect.Indirect(reflect.Indirect(entry[0]).FieldByName("File").Elem())
	if file.Kind() != reflect.Struct {
		return -1, true
	}
	for _, name := range []string{"tl", "tc"} {
		if field := file.FieldByName(name); field.Kind() == reflect.Pointer && !field.IsNil() {
			return descriptor(field), true
		}
	}
	return -1, true
}

// descriptor reads the number behind a *net.TCPListener or *net.TCPConn in an unexported field.
func descriptor(field reflect.Value) int32 {
	var conn syscall.Conn
	switch field.Type() {
	case reflect.TypeFor[*net.TCPListener]():
		conn = (*net.TCPListener)(field.UnsafePointer())
	case reflect.TypeFor[*net.TCPConn]():
		conn = (*net.TCPConn)(field.UnsafePointer())
	default:
		return -1
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return -1
	}
	socket := int32(-1)
	if raw.Control(func(fd uintptr) { socket = int32(fd) }) != nil {
		return -1
	}
	return socket
}
