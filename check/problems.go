package check

import "fmt"

//go:generate go test -run TestProblemsPage . -update

// A Code identifies a problem. Codes are never reused for another problem.
type Code uint8

// The problems a store can have. [Problems] describes each.
const (
	NoStore          Code = 1
	WrongMagic       Code = 2
	WrongVersion     Code = 3
	BadChunkSize     Code = 4
	ChunkNotBlocks   Code = 5
	DeviceTooSmall   Code = 6
	MarkedInvalid    Code = 7
	OddValidWord     Code = 8
	Unreadable       Code = 9
	NoEndMark        Code = 10
	AreaPastDevice   Code = 11
	DeviceCut        Code = 12
	VoidSlots        Code = 13
	HeaderNamed      Code = 14
	DuplicateOrigin  Code = 15
	COWPastDevice    Code = 16
	COWIsMetadata    Code = 17
	COWTooLarge      Code = 18
	COWShared        Code = 19
	OriginImpossible Code = 20
	OriginTooSmall   Code = 21
	LeakedChunks     Code = 22
	OutOfOrder       Code = 23

	numCodes = 24 // one more than the last
)

// String is the code as it is printed and searched for: "DS015".
func (c Code) String() string { return fmt.Sprintf("DS%03d", uint8(c)) }

// MarshalText gives JSON the printed form.
func (c Code) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// UnmarshalText reads the printed form.
func (c *Code) UnmarshalText(b []byte) error {
	for _, p := range Problems() {
		if p.Code.String() == string(b) {
			*c = p.Code
			return nil
		}
	}
	return fmt.Errorf("%q is no code of a problem", b)
}

// Problem returns the table's row for c.
func (c Code) Problem() Problem { return problems[c] }

// Severity is the severity of a problem.
type Severity uint8

const (
	// Note: nothing is lost and nothing will be; space may be.
	Note Severity = iota + 1
	// Warning: the content of the store is correct now, but a later operation may damage it.
	Warning
	// Error: the store can't be loaded, or what it shows is wrong or missing somewhere.
	Error
)

func (s Severity) String() string {
	return [...]string{"none", "note", "warning", "error"}[s]
}

// MarshalText gives JSON the printed form.
func (s Severity) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads the printed form.
func (s *Severity) UnmarshalText(b []byte) error {
	for _, l := range []Severity{Note, Warning, Error} {
		if l.String() == string(b) {
			*s = l
			return nil
		}
	}
	return fmt.Errorf("%q is no severity", b)
}

// Repairability says whether package repair can repair a problem.
type Repairability string

// The values of Repairability.
const (
	Repairable    Repairability = "yes"
	WithChunkSize Repairability = "with the chunk size" // repair.Options.ChunkSectors
	NotRepairable Repairability = "no"
)

// A Problem is a row of the table: what can be wrong, what follows, and the remedy.
type Problem struct {
	Code     Code
	Name     string // a few words, for headings
	Severity Severity
	Means    string // a sentence for the owner of the store
	Kernel   string // what Linux does with such a store
	Repair   Repairability
	Remedy   string // what repair does, or what to do instead
}

// Problems returns the table in the order of the codes.
func Problems() []Problem { return append([]Problem(nil), problems[1:]...) }

// problems is the table, by code. docs/problems.md is made from it.
var problems = [numCodes]Problem{
	NoStore: {Name: "no store", Severity: Error,
		Means:  "The first four bytes are zero: there is no exception store here, or its beginning was overwritten with zeros.",
		Kernel: "A table with store P creates a new, empty store over the content.",
		Repair: WithChunkSize,
		Remedy: "For a fresh device run `dmsnap create`. If the header of a store was overwritten, repair finds the areas by the given chunk size and writes a new header."},
	WrongMagic: {Name: "wrong magic", Severity: Error,
		Means:  "The device does not begin with \"SnAp\": it holds something else, or the header was overwritten.",
		Kernel: "Refuses to load it: \"Invalid or corrupt snapshot\".",
		Repair: WithChunkSize,
		Remedy: "Make sure that it is the right file. With the chunk size, repair writes a new header."},
	WrongVersion: {Name: "wrong version", Severity: Error,
		Means:  "The header names a version of the format other than 1, the only one there is.",
		Kernel: "Refuses to load it: \"unable to handle snapshot disk version\", also when it is marked invalid.",
		Repair: WithChunkSize,
		Remedy: "With the chunk size, repair writes a new header."},
	BadChunkSize: {Name: "bad chunk size", Severity: Error,
		Means:  "The chunk size in the header is 0, no power of two, or larger than 1 GiB, so that the areas can't be located.",
		Kernel: "Refuses to load it: \"invalid on-disk chunk size\".",
		Repair: WithChunkSize,
		Remedy: "Repair uses the chunk size that it is given. LVM's default is 4 KiB; its metadata backup has the size."},
	ChunkNotBlocks: {Name: "chunk is no multiple of the device's block", Severity: Error,
		Means:  "The store has chunks smaller than a block of its device: it was copied here from a device with smaller blocks.",
		Kernel: "Refuses to load it: \"Chunk size is not a multiple of device blocksize\".",
		Repair: Repairable,
		Remedy: "Repair writes the same store into a file. For a device with such blocks it needs larger chunks."},
	DeviceTooSmall: {Name: "device too small", Severity: Error,
		Means:  "The device ends within the header or the first area: it was truncated, or the chunk size is wrong.",
		Kernel: "Fails to load it with an I/O error.",
		Repair: NotRepairable,
		Remedy: "Restore the device's size; nothing can be read from the rest."},
	MarkedInvalid: {Name: "marked invalid", Severity: Error,
		Means:  "The snapshot was invalidated: its COW device was full or failed, and changes of the origin since then were not preserved.",
		Kernel: "Loads it as Invalid; every read and write fails. The areas are not read.",
		Repair: NotRepairable,
		Remedy: "Chunks stored before that are still there: `dmsnap rescue` recovers them."},
	OddValidWord: {Name: "odd valid word", Severity: Note,
		Means:  "The header's valid word is neither 0 nor 1. Anything but 0 means valid.",
		Kernel: "Loads it as valid and leaves the word as it is.",
		Repair: Repairable,
		Remedy: "Repair writes 1."},
	Unreadable: {Name: "unreadable metadata", Severity: Error,
		Means:  "The device reports an error where the header or slots are.",
		Kernel: "Fails to load it with the device's error.",
		Repair: Repairable,
		Remedy: "Repair keeps the slots that can be read; those in the unreadable sectors are lost. For a header that can't be read it needs the chunk size."},
	NoEndMark: {Name: "no end mark", Severity: Error,
		Means:  "Every slot of the last area is used and the device ends where the next area would be, so that the exceptions have no end.",
		Kernel: "Fails to load it with an I/O error. A kernel that fills the last slot itself invalidates the snapshot.",
		Repair: Repairable,
		Remedy: "Repair adds space for one more area; so does growing the device by a chunk, if that chunk is zero."},
	AreaPastDevice: {Name: "area past the device", Severity: Error,
		Means:  "An area that should hold exceptions lies past the end of the device, wholly or in part: the device was truncated.",
		Kernel: "Fails to load it with an I/O error.",
		Repair: Repairable,
		Remedy: "If the device can be restored to its old size with its content, do that first. Repair keeps what is in the areas before; the exceptions of the missing ones are lost."},
	DeviceCut: {Name: "device was cut", Severity: Error,
		Means:  "Exceptions, in the order in which they were made, continue past the end of the device: it was shrunk, and their data is lost.",
		Kernel: "Loads it if the areas are there; reading such a chunk fails, and the next new exception invalidates the snapshot.",
		Repair: Repairable,
		Remedy: "If the device can be restored to its old size with its content, do that first. Repair drops the exceptions whose data is lost."},
	VoidSlots: {Name: "slots after the end mark", Severity: Warning,
		Means:  "There are slots after the end mark. They are ignored now: a write of slots, or a merge, was interrupted by a power cut.",
		Kernel: "Ignores them at first, but writes them back; when a new exception replaces the end mark, the next slot becomes valid again and maps wrong data.",
		Repair: Repairable,
		Remedy: "Repair drops them. So does dmsnap itself, before it adds a slot."},
	HeaderNamed: {Name: "slot names the header", Severity: Warning,
		Means:  "A slot with an origin chunk has COW chunk 0, which is the header. Such a slot is the end mark: its chunk is not mapped, nor any in slots after it.",
		Kernel: "Treats it as the end of the exceptions.",
		Repair: Repairable,
		Remedy: "Repair writes zeros there."},
	DuplicateOrigin: {Name: "origin chunk twice", Severity: Error,
		Means:  "Two slots have the same origin chunk.",
		Kernel: "Loads it. Kernel 6.1 uses the first slot, 6.12 the last.",
		Repair: Repairable,
		Remedy: "Repair keeps the first: a second one is most often a void slot that a kernel made valid again."},
	COWPastDevice: {Name: "COW chunk past the device", Severity: Error,
		Means:  "A slot names a COW chunk past the end of the device, not in the order in which chunks are allocated.",
		Kernel: "Loads it; reading the chunk fails, and the next new exception invalidates the snapshot.",
		Repair: Repairable,
		Remedy: "Repair drops the slot; the chunk's old content is lost."},
	COWIsMetadata: {Name: "COW chunk is an area", Severity: Error,
		Means:  "A slot names a COW chunk that is an area of slots.",
		Kernel: "Loads it and shows the slots' bytes; writing to that chunk of the snapshot destroys the store.",
		Repair: Repairable,
		Remedy: "Repair drops the slot; the chunk's old content is lost."},
	COWTooLarge: {Name: "COW chunk number too large", Severity: Error,
		Means:  "A slot names a COW chunk of more than 56 bits, which no kernel can represent.",
		Kernel: "Loads it, truncates the number and uses the rest as a count of chunks: unrelated chunks show wrong data.",
		Repair: Repairable,
		Remedy: "Repair drops the slot; the chunk's old content is lost."},
	COWShared: {Name: "COW chunk used twice", Severity: Error,
		Means:  "Two slots name the same COW chunk: one of the two origin chunks shows the other's data.",
		Kernel: "Loads it and shows the same data for both; a write to one changes the other.",
		Repair: Repairable,
		Remedy: "Repair keeps the first: the chunk was allocated again when a later void slot became valid again."},
	OriginImpossible: {Name: "impossible origin chunk", Severity: Error,
		Means:  "A slot names an origin chunk past the largest possible device: no snapshot wrote this slot.",
		Kernel: "Loads it; it is never read. A merge of it fails.",
		Repair: Repairable,
		Remedy: "Repair drops the slot."},
	OriginTooSmall: {Name: "origin too small", Severity: Error,
		Means:  "There are exceptions for chunks past the end of the origin: it is not this store's origin, or it was shrunk.",
		Kernel: "Loads it; those chunks can't be read. A merge of them fails.",
		Repair: NotRepairable,
		Remedy: "Use the right origin, or restore its size."},
	LeakedChunks: {Name: "holes", Severity: Note,
		Means:  "Some chunks between those in use are in no slot: their space is lost until the store is emptied. Old kernels leave them after a crash.",
		Kernel: "Loads it and never allocates those chunks.",
		Repair: Repairable,
		Remedy: "Repair fills them. They do no harm."},
	OutOfOrder: {Name: "slots out of order", Severity: Note,
		Means:  "Slots do not name COW chunks in ascending order. Kernels before target version 1.10.2 wrote them so.",
		Kernel: "Loads it. Order does not matter.",
		Repair: Repairable,
		Remedy: "Repair writes them in order. They do no harm."},
}

func init() {
	for c := range problems {
		problems[c].Code = Code(c)
	}
}
