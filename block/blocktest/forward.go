package blocktest

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"syscall"
	"testing"

	"github.com/dmsnap/dmsnap/block"
)

// RunForward checks that a device which is stacked on another device passes on all abilities of the underlying device: each method of
// block.Forward arrives once with the same arguments, and its result comes back. Over a device without abilities the
// functions of package block must fall back as they do for that device.
//
// wrap returns the device under test over lower; it closes it with t.Cleanup. changes names the methods that it
// changes on purpose ("Discard", "Grow"), which are left out; a name that is no method of block.Forward panics, and a
// change of WriteAt implies the other methods that write.
func RunForward(t *testing.T, wrap func(t *testing.T, lower block.Device) block.Device, changes ...string) {
	for _, name := range changes {
		if !slices.ContainsFunc(forwardCalls, func(c forwardCall) bool { return c.method == name }) {
			panic("blocktest.RunForward: no method " + name)
		}
	}
	if slices.Contains(changes, "WriteAt") {
		for _, name := range []string{"WriteDurableAt", "WriteLastAt", "ZeroAt"} {
			if !slices.Contains(changes, name) {
				t.Errorf("WriteAt is changed, and %s goes past it", name)
			}
		}
	}
	if slices.Contains(changes, "ReadAt") && !slices.Contains(changes, "ReadCached") {
		t.Error("ReadAt is changed, and ReadCached goes past it")
	}
	for _, c := range forwardCalls {
		if slices.Contains(changes, c.method) {
			continue
		}
		t.Run(c.method, func(t *testing.T) { c.check(t, wrap) })
	}
	for _, c := range plainCalls {
		if slices.ContainsFunc(c.methods, func(m string) bool { return slices.Contains(changes, m) }) {
			continue
		}
		t.Run("without "+c.methods[0], func(t *testing.T) {
			p := &plainDevice{Device: block.MemoryFrom(Pattern(forwardSize, 20))}
			dev := wrap(t, Plain(p))
			p.take()
			c.check(t, dev, p)
		})
	}
}

// forwardSize is the size of the underlying devices, in bytes.
const forwardSize = 256 << 10

// able is a device with every ability, each of which answers as no fallback would. It notes what is called.
type able struct {
	*block.Memory
	mu    sync.Mutex
	calls []string
	fail  error // of every call that can fail
}

func (a *able) note(format string, args ...any) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.calls = append(a.calls, fmt.Sprintf(format, args...))
	return a.fail
}

// reset forgets the calls and makes later ones fail with err.
func (a *able) reset(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.calls, a.fail = nil, err
}

// times counts a call.
func (a *able) times(call string) (n int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, c := range a.calls {
		if c == call {
			n++
		}
	}
	return n
}

func (a *able) ReadAt(p []byte, off int64) (int, error) {
	if err := a.note("ReadAt %d+%d", off, len(p)); err != nil {
		return 0, err
	}
	return a.Memory.ReadAt(p, off)
}

func (a *able) WriteAt(p []byte, off int64) (int, error) {
	if err := a.note("WriteAt %d+%d", off, len(p)); err != nil {
		return 0, err
	}
	return a.Memory.WriteAt(p, off)
}

func (a *able) Flush() error { return a.note("Flush") }

func (a *able) Size() int64 {
	a.note("Size")
	return a.Memory.Size()
}

func (a *able) WriteDurableAt(p []byte, off int64) error {
	if err := a.note("WriteDurableAt %d+%d", off, len(p)); err != nil {
		return err
	}
	return a.Memory.WriteDurableAt(p, off)
}

func (a *able) WriteLastAt(p []byte, off int64) error {
	if err := a.note("WriteLastAt %d+%d", off, len(p)); err != nil {
		return err
	}
	return a.Memory.WriteDurableAt(p, off)
}

func (a *able) BeginFlush(off, n int64) { a.note("BeginFlush %d+%d", off, n) }

func (a *able) BeginRead(off, n int64) { a.note("BeginRead %d+%d", off, n) }

func (a *able) ReadCached(reads []block.Read) int {
	for i := range reads {
		r := &reads[i]
		a.note("ReadCached %d+%d", r.Off, len(r.P))
		a.Memory.ReadAt(r.P, r.Off)
		r.Done = true
	}
	return len(reads)
}

func (a *able) ZeroAt(off, n int64, flags block.ZeroFlags) error {
	if err := a.note("ZeroAt %d+%d flags %d", off, n, flags); err != nil {
		return err
	}
	return a.Memory.ZeroAt(off, n, 0)
}

func (a *able) Allocate(off, n int64) error { return a.note("Allocate %d+%d", off, n) }

func (a *able) Discard(off, n int64) error { return a.note("Discard %d+%d", off, n) }

func (a *able) Extents(off, n int64) ([]block.Extent, error) {
	if err := a.note("Extents %d+%d", off, n); err != nil {
		return nil, err
	}
	return []block.Extent{{Length: 4096, Flags: block.Hole}, {Length: n - 4096}}, nil
}

func (a *able) DropCache(off, n int64) error { return a.note("DropCache %d+%d", off, n) }

func (a *able) Refresh() (int64, error) { return a.Memory.Size(), a.note("Refresh") }

func (a *able) Grow(size int64) error {
	if err := a.note("Grow %d", size); err != nil {
		return err
	}
	return a.Memory.Grow(size)
}

func (a *able) CanGrow() bool {
	a.note("CanGrow")
	return false // a Resizer without this method says true
}

func (a *able) BlockSize() int {
	a.note("BlockSize")
	return 4096
}

func (a *able) Identity() string {
	a.note("Identity")
	return "able"
}

// A forwardCall is one method of block.Forward: how to call it so that the underlying device is to see want, and
// whether its result is the able device's.
type forwardCall struct {
	method string
	want   string
	call   func(dev block.Device) error
	fails  bool // the call returns the error of the underlying device
}

var forwardCalls = []forwardCall{
	{"ReadAt", "ReadAt 4096+8192", func(dev block.Device) error {
		p := make([]byte, 8192)
		if _, err := dev.ReadAt(p, 4096); err != nil {
			return err
		}
		return equal(p, Pattern(forwardSize, 20)[4096:4096+8192])
	}, true},
	{"ReadCached", "ReadCached 4096+8192", func(dev block.Device) error {
		p := make([]byte, 8192)
		if n := block.ReadCached(dev, []block.Read{{P: p, Off: 4096}}); n != 1 {
			return fmt.Errorf("%d of 1 read done", n)
		}
		return equal(p, Pattern(forwardSize, 20)[4096:4096+8192])
	}, false},
	{"WriteAt", "WriteAt 4096+8192", func(dev block.Device) error {
		_, err := dev.WriteAt(make([]byte, 8192), 4096)
		return err
	}, true},
	{"Flush", "Flush", block.Device.Flush, true},
	{"Size", "Size", func(dev block.Device) error { return equal(dev.Size(), int64(forwardSize)) }, false},
	{"WriteDurableAt", "WriteDurableAt 4096+8192", func(dev block.Device) error {
		return block.WriteDurable(dev, make([]byte, 8192), 4096)
	}, true},
	{"WriteLastAt", "WriteLastAt 4096+8192", func(dev block.Device) error {
		return block.WriteLast(dev, make([]byte, 8192), 4096)
	}, true},
	{"BeginFlush", "BeginFlush 4096+8192", func(dev block.Device) error {
		block.BeginFlush(dev, 4096, 8192)
		return nil
	}, false},
	{"BeginRead", "BeginRead 4096+8192", func(dev block.Device) error {
		block.BeginRead(dev, 4096, 8192)
		return nil
	}, false},
	{"ZeroAt", "ZeroAt 4096+8192 flags 1", func(dev block.Device) error {
		return block.Zero(dev, 4096, 8192, block.KeepAllocated)
	}, true},
	{"Allocate", "Allocate 4096+8192", func(dev block.Device) error {
		can, err := block.Allocate(dev, 4096, 8192)
		if err == nil {
			err = equal(can, true)
		}
		return err
	}, true},
	{"Discard", "Discard 4096+8192", func(dev block.Device) error { return block.Discard(dev, 4096, 8192) }, true},
	{"Extents", "Extents 4096+8192", func(dev block.Device) error {
		list, err := block.Extents(dev, 4096, 8192)
		if err != nil {
			return err
		}
		return equal(list, []block.Extent{{Length: 4096, Flags: block.Hole}, {Length: 4096}})
	}, true},
	{"DropCache", "DropCache 4096+8192", func(dev block.Device) error { return block.DropCache(dev, 4096, 8192) }, true},
	{"Refresh", "Refresh", func(dev block.Device) error {
		n, err := block.Refresh(dev)
		if err == nil {
			err = equal(n, int64(forwardSize))
		}
		return err
	}, true},
	{"Grow", "Grow 270336", func(dev block.Device) error { return block.Grow(dev, forwardSize+8192) }, true},
	{"CanGrow", "CanGrow", func(dev block.Device) error { return equal(block.CanGrow(dev), false) }, false},
	{"BlockSize", "BlockSize", func(dev block.Device) error { return equal(block.BlockSize(dev), 4096) }, false},
	{"Identity", "Identity", func(dev block.Device) error {
		return equal(block.Same(dev, &able{Memory: block.NewMemory(0)}), true)
	}, false},
}

// equal is an error unless got is want.
func equal(got, want any) error {
	if g, w := fmt.Sprint(got), fmt.Sprint(want); g != w {
		return fmt.Errorf("got %.80s, want %.80s", g, w)
	}
	return nil
}

// remembered are the answers that a device may have asked for once, when it was opened.
var remembered = []string{"Size", "BlockSize", "Identity"}

func (c forwardCall) check(t *testing.T, wrap func(t *testing.T, lower block.Device) block.Device) {
	a := &able{Memory: block.MemoryFrom(Pattern(forwardSize, 20))}
	dev := wrap(t, a)
	if !slices.Contains(remembered, c.method) {
		a.reset(nil)
	}
	if err := c.call(dev); err != nil {
		t.Errorf("%s: %v", c.method, err)
	}
	if n := a.times(c.want); n == 0 || n > 1 && !slices.Contains(remembered, c.method) {
		t.Errorf("below, a call of %s arrived %d times %q, in %q", c.method, n, c.want, a.calls)
	}
	if c.fails {
		a.reset(syscall.EIO)
		if err := c.call(dev); !errors.Is(err, syscall.EIO) {
			t.Errorf("%s: %v, want the error of the underlying device, EIO", c.method, err)
		}
		a.reset(nil) // for a flush at the end
	}
}

// plainDevice has the four methods alone. It notes what changes it.
type plainDevice struct {
	block.Device // its abilities are what is to be missed
	mu           sync.Mutex
	calls        []string
}

func (p *plainDevice) note(call string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.calls = append(p.calls, call)
}

// take returns the calls so far and forgets them.
func (p *plainDevice) take() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	calls := p.calls
	p.calls = nil
	return calls
}

func (p *plainDevice) WriteAt(b []byte, off int64) (int, error) {
	p.note("WriteAt")
	return p.Device.WriteAt(b, off)
}

func (p *plainDevice) Flush() error {
	p.note("Flush")
	return p.Device.Flush()
}

// A plainCall checks the fallback of some methods over a device that has none of them.
type plainCall struct {
	methods []string
	check   func(t *testing.T, dev block.Device, lower *plainDevice)
}

var plainCalls = []plainCall{
	{[]string{"WriteDurableAt", "WriteAt", "Flush"}, func(t *testing.T, dev block.Device, lower *plainDevice) {
		p := Pattern(4096, 21)
		if err := block.WriteDurable(dev, p, 512); err != nil {
			t.Fatal(err)
		}
		want(t, dev, 512, p)
		if calls := fmt.Sprint(lower.take()); calls != "[WriteAt Flush]" {
			t.Errorf("a durable write became %s", calls)
		}
	}},
	{[]string{"WriteLastAt", "WriteAt", "Flush"}, func(t *testing.T, dev block.Device, lower *plainDevice) {
		p := Pattern(4096, 22)
		if err := block.WriteLast(dev, p, 512); err != nil {
			t.Fatal(err)
		}
		want(t, dev, 512, p)
		if calls := fmt.Sprint(lower.take()); calls != "[WriteAt Flush]" {
			t.Errorf("a last write became %s", calls)
		}
	}},
	{[]string{"ZeroAt", "WriteAt"}, func(t *testing.T, dev block.Device, lower *plainDevice) {
		if err := block.Zero(dev, 512, 4096, block.OnlyFast); !errors.Is(err, block.ErrNotFast) || len(lower.take()) > 0 {
			t.Errorf("fast zero: %v", err)
		}
		if err := block.Zero(dev, 512, 4096, 0); err != nil {
			t.Fatal(err)
		}
		want(t, dev, 512, make([]byte, 4096))
	}},
	{[]string{"Allocate"}, func(t *testing.T, dev block.Device, _ *plainDevice) {
		if can, err := block.Allocate(dev, 0, 4096); can || err != nil {
			t.Errorf("allocate: %v, %v", can, err)
		}
	}},
	{[]string{"Discard"}, func(t *testing.T, dev block.Device, lower *plainDevice) {
		if err := block.Discard(dev, 0, 4096); err != nil || len(lower.take()) > 0 {
			t.Errorf("discard: %v", err)
		}
	}},
	{[]string{"BeginFlush"}, func(t *testing.T, dev block.Device, lower *plainDevice) {
		if block.BeginFlush(dev, 0, 4096); len(lower.take()) > 0 {
			t.Error("a begun flush became something else")
		}
	}},
	{[]string{"BeginRead"}, func(t *testing.T, dev block.Device, lower *plainDevice) {
		if block.BeginRead(dev, 0, 4096); len(lower.take()) > 0 {
			t.Error("a begun read became something else")
		}
	}},
	{[]string{"Extents"}, func(t *testing.T, dev block.Device, _ *plainDevice) {
		if list, err := block.Extents(dev, 512, 4096); err != nil || len(list) != 1 || list[0] != (block.Extent{Length: 4096}) {
			t.Errorf("extents: %v, %v", list, err)
		}
	}},
	{[]string{"Grow", "CanGrow", "Refresh", "Size"}, func(t *testing.T, dev block.Device, _ *plainDevice) {
		if n, err := block.Refresh(dev); err != nil || n != dev.Size() {
			t.Errorf("refresh: %d, %v", n, err)
		}
		if err := block.Grow(dev, dev.Size()); err != nil {
			t.Errorf("grow to the present size: %v", err)
		}
		if err := block.Grow(dev, dev.Size()+1); !errors.Is(err, block.ErrFixedSize) || block.CanGrow(dev) {
			t.Errorf("grow: %v", err)
		}
	}},
	{[]string{"DropCache"}, func(t *testing.T, dev block.Device, lower *plainDevice) {
		if err := block.DropCache(dev, 0, 4096); err != nil || len(lower.take()) > 0 {
			t.Errorf("drop cache: %v", err)
		}
	}},
	{[]string{"BlockSize"}, func(t *testing.T, dev block.Device, _ *plainDevice) {
		if n := block.BlockSize(dev); n != block.SectorSize {
			t.Errorf("blocks of %d bytes", n)
		}
	}},
	{[]string{"Identity"}, func(t *testing.T, dev block.Device, _ *plainDevice) {
		other := Plain(block.NewMemory(0))
		if !block.Same(dev, dev) || block.Same(dev, other) || block.Same(dev, block.NewForward(other)) {
			t.Errorf("same as itself: %v; as another disk: %v, %v", block.Same(dev, dev), block.Same(dev, other), block.Same(dev, block.NewForward(other)))
		}
	}},
}
