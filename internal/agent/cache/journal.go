package cache

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"
)

// The journal is a file of records, each framed as
//
//	magic (4 bytes) | length (4) | CRC-32C of the payload (4) | payload
//
// The payload is a kind and five strings (type, name, version, detail, body), each
// with its length before it. A record that is torn or damaged is skipped: what it said is
// fetched again, because the control plane is told only of the versions that are
// left.
const (
	journalName   = "xds.journal"
	journalHeader = "isthmus xds journal 1\n"
	frameSize     = 12
	maxRecord     = 64 << 20
	// A journal is compacted when it is this large and twice what is live.
	compactSize = 4 << 20
	// What was written is made safe from a power failure this much later: a lost
	// tail costs a request to the control plane, a sync at each change a disk.
	syncAfter = time.Second
	// After a failed write the journal is tried again this much later.
	retryAfter = 10 * time.Second
)

var (
	magic      = [4]byte{0xd1, 'i', 's', 't'}
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

type kind byte

const (
	kindGood     kind = iota + 1 // a version that Envoy accepted, or needs no Envoy
	kindOffered                  // a version from the control plane, not accepted yet
	kindAccepted                 // the offered version became the good one
	kindRefused                  // Envoy refused the offered version
	kindAbsent                   // the control plane said that it does not exist
	kindDropped                  // nothing is known of it
	kindComplete                 // "*" of a type has been answered; of virtual hosts: those of the named route are there
	kindContact                  // when the control plane was last heard of
	kindAlias                    // the resource in text answers the name
)

// record is one step in what the cache knows.
type record struct {
	kind                         kind
	typeURL, name, version, text string
	body                         []byte
}

func (r record) append(b []byte) []byte {
	b = append(b, magic[:]...)
	at := len(b)
	b = append(b, make([]byte, frameSize-len(magic))...)
	b = append(b, byte(r.kind))
	for _, s := range []string{r.typeURL, r.name, r.version, r.text} {
		b = binary.AppendUvarint(b, uint64(len(s)))
		b = append(b, s...)
	}
	b = binary.AppendUvarint(b, uint64(len(r.body)))
	b = append(b, r.body...)
	payload := b[at+frameSize-len(magic):]
	binary.LittleEndian.PutUint32(b[at:], uint32(len(payload)))
	binary.LittleEndian.PutUint32(b[at+4:], crc32.Checksum(payload, castagnoli))
	return b
}

// parseRecord reads the record at the start of b, and how long it is.
func parseRecord(b []byte) (r record, size int, ok bool) {
	if len(b) < frameSize || !bytes.Equal(b[:4], magic[:]) {
		return r, 0, false
	}
	n := binary.LittleEndian.Uint32(b[4:])
	if n == 0 || n > maxRecord || uint64(len(b)) < frameSize+uint64(n) {
		return r, 0, false
	}
	payload := b[frameSize : frameSize+int(n)]
	if crc32.Checksum(payload, castagnoli) != binary.LittleEndian.Uint32(b[8:]) {
		return r, 0, false
	}
	r.kind = kind(payload[0])
	payload = payload[1:]
	fields := [5][]byte{}
	for i := range fields {
		length, used := binary.Uvarint(payload)
		if used <= 0 || length > uint64(len(payload)-used) {
			return r, 0, false
		}
		fields[i] = payload[used : used+int(length)]
		payload = payload[used+int(length):]
	}
	if len(payload) != 0 {
		return r, 0, false
	}
	r.typeURL, r.name, r.version, r.text = string(fields[0]), string(fields[1]), string(fields[2]), string(fields[3])
	r.body = bytes.Clone(fields[4])
	return r, frameSize + int(n), true
}

// readJournal gives the sound records of a journal and how many of its bytes are
// none. After damage it goes on at the next sound record.
func readJournal(b []byte) (records []record, damaged int) {
	if !bytes.HasPrefix(b, []byte(journalHeader)) {
		return nil, len(b)
	}
	for b = b[len(journalHeader):]; len(b) > 0; {
		r, n, ok := parseRecord(b)
		if ok {
			records = append(records, r)
			b = b[n:]
			continue
		}
		skip := bytes.Index(b[1:], magic[:]) + 1
		if skip == 0 {
			skip = len(b)
		}
		damaged += skip
		b = b[skip:]
	}
	return records, damaged
}

// file is what the journal needs of an *os.File.
type file interface {
	io.Writer
	io.Closer
	Sync() error
	Truncate(int64) error
}

// journal is the append-only file. It is used under the cache's lock, but for its
// syncs.
type journal struct {
	path string
	log  *slog.Logger
	open func(path string, flag int) (file, error)

	file  file  // nil while nothing can be written
	size  int64 // of what was written whole
	floor int64 // size after the last compaction
	err   error // why nothing can be written
	tried time.Time
	due   atomic.Bool // a sync is

	closed bool // the file may be another's by now
}

func openFile(path string, flag int) (file, error) {
	return os.OpenFile(path, flag, 0o600)
}

// openJournal reads the journal in a directory. A journal that can't be read or
// written is reported by health, and not an error: the cache works without.
func openJournal(dir string, log *slog.Logger) (*journal, []record) {
	j := &journal{path: filepath.Join(dir, journalName), log: log, open: openFile}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		j.fail(err)
		return j, nil
	}
	b, err := os.ReadFile(j.path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		j.fail(err)
		return j, nil
	}
	records, damaged := readJournal(b)
	if damaged > 0 {
		log.Warn("cached configuration is damaged in part: the control plane will be asked for it again",
			slog.String("path", j.path), slog.Int("bytes", damaged), slog.Int("sound_records", len(records)))
	}
	return j, records
}

// write appends records. dump gives all that is live, for when the file has to be
// written anew: at the start, after a failure, and when it has grown.
func (j *journal) write(records []record, dump func() []record) {
	if j == nil || j.closed {
		return
	}
	if j.file == nil {
		if j.err == nil || time.Since(j.tried) >= retryAfter {
			j.rewrite(dump())
		}
		return
	}
	var b []byte
	for _, r := range records {
		b = r.append(b)
	}
	if _, err := j.file.Write(b); err != nil {
		// Part of it may have been written. That is skipped when it is read.
		_ = j.file.Truncate(j.size)
		_ = j.file.Close()
		j.file = nil
		j.fail(err)
		return
	}
	j.size += int64(len(b))
	j.syncLater()
	if j.size > compactSize && j.size > 2*j.floor {
		_ = j.file.Close() // replaced, with all that it holds
		j.file = nil
		j.rewrite(dump())
	}
}

func (j *journal) syncLater() {
	if !j.due.CompareAndSwap(false, true) {
		return
	}
	f := j.file
	time.AfterFunc(syncAfter, func() {
		j.due.Store(false)
		// A failure shows in the next write; a file closed meanwhile is safe.
		_ = f.Sync()
	})
}

// rewrite replaces the journal by one that holds just what is live.
func (j *journal) rewrite(records []record) {
	j.tried = time.Now()
	b := []byte(journalHeader)
	for _, r := range records {
		b = r.append(b)
	}
	f, err := j.replace(b)
	if err != nil {
		j.fail(err)
		return
	}
	if j.err != nil {
		j.log.Info("configuration is cached on disk again", slog.String("path", j.path))
	}
	j.file, j.err = f, nil
	j.size, j.floor = int64(len(b)), int64(len(b))
}

func (j *journal) replace(b []byte) (file, error) {
	tmp := j.path + ".new"
	f, err := j.open(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY|os.O_APPEND)
	if err != nil {
		return nil, err
	}
	if _, err = f.Write(b); err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = os.Rename(tmp, j.path)
	}
	if err == nil {
		err = syncDir(filepath.Dir(j.path))
	}
	if err != nil {
		_ = f.Close() // the first error is the one to tell
		_ = os.Remove(tmp)
		return nil, err
	}
	return f, nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	// Some file systems can't, and lose nothing but the newest rename.
	if err := d.Sync(); err != nil && !errors.Is(err, errors.ErrUnsupported) && !errors.Is(err, os.ErrInvalid) {
		return err
	}
	return nil
}

// fail remembers why nothing can be written, and says so once.
func (j *journal) fail(err error) {
	if j.err == nil {
		j.log.Error("configuration can't be cached on disk: this machine won't come up without its control plane until that is mended",
			slog.String("path", j.path), slog.Any("error", err))
	}
	j.tried = time.Now()
	j.err = fmt.Errorf("write %s: %w", j.path, err)
}

// close makes what was written safe.
func (j *journal) close() error {
	if j == nil {
		return nil
	}
	j.closed = true
	if j.file == nil {
		return nil
	}
	err := errors.Join(j.file.Sync(), j.file.Close())
	j.file = nil
	return err
}
