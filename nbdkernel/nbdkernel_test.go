package nbdkernel

import (
	"encoding/binary"
	"encoding/hex"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/nbd/wire"
)

func TestIndexOf(t *testing.T) {
	for path, want := range map[string]int{"/dev/nbd0": 0, "/dev/nbd17": 17, "/dev/nbd": -1, "/dev/nbd1p1": -1, "/dev/sda": -1, "nbd0": -1, "/dev/nbd99999999": -1} {
		if got, err := IndexOf(path); err == nil && got != want || (err != nil) != (want < 0) {
			t.Errorf("%s: %d, %v", path, got, err)
		}
	}
}

// transmissions are n connections to an export.
func transmissions(n int, change func(*nbd.Transmission)) (list []*nbd.Transmission) {
	for range n {
		t := &nbd.Transmission{Info: nbd.Info{Size: 1 << 20, MinBlock: 1, MaxBlock: 32 << 20, MultiConn: true}, Flags: wire.HasFlags | wire.SendFlush | wire.CanMultiConn | wire.SendResize}
		change(t)
		list = append(list, t)
	}
	return list
}

func TestConfigure(t *testing.T) {
	for _, c := range []struct {
		change    func(*nbd.Transmission)
		options   Options
		says      string
		blockSize int
	}{
		{options: Options{}, blockSize: 512},
		{options: Options{BlockSize: 2048}, blockSize: 2048},
		{change: func(x *nbd.Transmission) { x.Info.MinBlock = 4096 }, blockSize: 4096},
		{change: func(x *nbd.Transmission) { x.Info.MinBlock = 4096 }, options: Options{BlockSize: 512}, says: "from 4096"},
		{change: func(x *nbd.Transmission) { x.Info.MinBlock = 65536 }, says: "power of two"},
		{options: Options{BlockSize: 1000}, says: "power of two"},
		{change: func(x *nbd.Transmission) { x.Info.Size = 0 }, says: "empty"},
		{change: func(x *nbd.Transmission) { x.Info.Size = 1<<20 + 512 }, options: Options{BlockSize: 4096}, says: "no multiple"},
		{change: func(x *nbd.Transmission) { x.Info.MaxBlock = 4096 }, says: "at most 4096"},
	} {
		if c.change == nil {
			c.change = func(*nbd.Transmission) {}
		}
		got, err := configure("nbd://x", transmissions(1, c.change), c.options)
		if c.says != "" {
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%+v: %v, want %q", c.options, err, c.says)
			}
		} else if err != nil || got.blockSize != c.blockSize || got.flags != wire.HasFlags|wire.SendFlush|wire.CanMultiConn {
			t.Errorf("%+v: %+v, %v", c.options, got, err)
		}
	}
	if got, err := configure("nbd://x", transmissions(1, func(*nbd.Transmission) {}), Options{ReadOnly: true}); err != nil || got.flags&wire.ReadOnly == 0 {
		t.Errorf("read-only: %+v, %v", got, err)
	}
	list := transmissions(2, func(x *nbd.Transmission) { x.Info.MultiConn = false })
	if err := sameExport(list[0], list[1], 2); err == nil {
		t.Error("several connections without multi-conn")
	}
	list = transmissions(2, func(*nbd.Transmission) {})
	list[1].Info.Size *= 2
	if err := sameExport(list[0], list[1], 2); err == nil {
		t.Error("connections to exports of different sizes")
	}
}

// The bytes of CONNECT, attribute by attribute: length and type, 16 bits each, and the value, padded to 4 bytes.
func TestEncode(t *testing.T) {
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Skip("the bytes are those of a little-endian machine")
	}
	c := configuration{index: 5, size: 1 << 20, blockSize: 512, flags: 0x105, timeout: 1500 * time.Millisecond, deadTimeout: time.Second, backend: "uri"}
	got, err := c.encode([]int{7, 8}).Encode()
	if err != nil {
		t.Fatal(err)
	}
	want := "0800 0100 05000000" +
		"0c00 0200 0000100000000000" +
		"0c00 0300 0002000000000000" +
		"0c00 0400 0200000000000000" +
		"0c00 0800 0100000000000000" +
		"0c00 0500 0501000000000000" +
		"0c00 0600 0000000000000000" +
		"0800 0a00 75726900" +
		"1c00 0780 0c00 0180 0800 0100 07000000 0c00 0180 0800 0100 08000000"
	if hex.EncodeToString(got) != strings.ReplaceAll(want, " ", "") {
		t.Errorf("%x", got)
	}
	c.index = AnyIndex
	if got, err := c.encode(nil).Encode(); err != nil || got[2] == 1 {
		t.Errorf("an index that was not chosen: %x, %v", got, err)
	}
}

func status(t testing.TB, text string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(text, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// twoDevices is a STATUS of two devices, of which the second is attached.
const twoDevices = "2c00 0980 1400 0180 0800 0100 00000000 0500 0200 00 000000" + "1400 0180 0800 0100 03000000 0500 0200 01 000000"

func TestDecodeStatus(t *testing.T) {
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Skip("the bytes are those of a little-endian machine")
	}
	if got, err := decodeStatus(nil, status(t, twoDevices)); err != nil || !slices.Equal(got, []int{3}) {
		t.Errorf("%v, %v", got, err)
	}
	for _, cut := range []string{"2c00", "ffff 0980 1400 0180", "0800 0980 ffff 0180", "1000 0980 0c00 0180 0700 0100 000000 00"} {
		if got, err := decodeStatus(nil, status(t, cut)); err == nil || len(got) > 0 {
			t.Errorf("%s: %v, %v", cut, got, err)
		}
	}
}

func FuzzDecodeStatus(f *testing.F) {
	f.Add(status(f, twoDevices))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		if list, _ := decodeStatus(nil, b); len(list) > len(b)/8 {
			t.Errorf("%d devices in %d bytes", len(list), len(b))
		}
	})
}
