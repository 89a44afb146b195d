package cache

import (
	"bytes"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"isthmus.dev/internal/xds"
)

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// sample is a journal of one record of each kind, and where each record ends.
func sample() (b []byte, ends []int, records []record) {
	records = []record{
		{kind: kindGood, typeURL: xds.ClusterType, name: "a", version: "1", body: []byte("one")},
		{kind: kindOffered, typeURL: xds.ClusterType, name: "a", version: "2", body: []byte("two")},
		{kind: kindAccepted, typeURL: xds.ClusterType, name: "a", version: "2"},
		{kind: kindOffered, typeURL: xds.ClusterType, name: "a", version: "3", body: bytes.Repeat([]byte{0xd1}, 300)},
		{kind: kindRefused, typeURL: xds.ClusterType, name: "a", version: "3", text: "no good"},
		{kind: kindAbsent, typeURL: xds.EndpointType, name: "x"},
		{kind: kindGood, typeURL: xds.RouteType, name: "r", version: "1", body: []byte("route")},
		{kind: kindDropped, typeURL: xds.RouteType, name: "r"},
		{kind: kindComplete, typeURL: xds.ClusterType},
		{kind: kindContact, text: "2026-11-21T00:00:00Z"},
	}
	b = []byte(journalHeader)
	for _, r := range records {
		b = r.append(b)
		ends = append(ends, len(b))
	}
	return b, ends, records
}

func equal(a, b record) bool {
	return a.kind == b.kind && a.typeURL == b.typeURL && a.name == b.name && a.version == b.version && a.text == b.text && bytes.Equal(a.body, b.body)
}

// Torn anywhere, the journal gives exactly the records before.
func TestJournalTornAtEveryOffset(t *testing.T) {
	b, ends, records := sample()
	for n := range len(b) + 1 {
		whole := 0
		for whole < len(ends) && ends[whole] <= n {
			whole++
		}
		got, damaged := readJournal(b[:n])
		if !slices.EqualFunc(got, records[:whole], equal) {
			t.Fatalf("torn at %d: %d records, want %d", n, len(got), whole)
		}
		left := n
		if whole > 0 {
			left = n - ends[whole-1]
		} else if n >= len(journalHeader) {
			left = n - len(journalHeader)
		}
		if damaged != left {
			t.Fatalf("torn at %d: %d bytes damaged, want %d", n, damaged, left)
		}
	}
}

// With any one byte changed, all other records are still there.
func TestJournalDamagedAtEveryOffset(t *testing.T) {
	b, ends, records := sample()
	for at := len(journalHeader); at < len(b); at++ {
		hurt := bytes.Clone(b)
		hurt[at] ^= 0x41
		i := 0
		for ends[i] <= at {
			i++
		}
		want := slices.Delete(slices.Clone(records), i, i+1)
		got, damaged := readJournal(hurt)
		if !slices.EqualFunc(got, want, equal) {
			t.Fatalf("byte %d: %d records, want %d", at, len(got), len(want))
		}
		if damaged == 0 {
			t.Fatalf("byte %d: no damage noticed", at)
		}
	}
}

func FuzzJournal(f *testing.F) {
	b, _, _ := sample()
	f.Add(b)
	f.Add(b[:len(b)-3])
	f.Fuzz(func(t *testing.T, in []byte) {
		records, _ := readJournal(append([]byte(journalHeader), in...))
		again := []byte(journalHeader)
		for _, r := range records {
			again = r.append(again)
		}
		same, damaged := readJournal(again)
		if damaged != 0 || !slices.EqualFunc(records, same, equal) {
			t.Fatal("records read are not read again as they were")
		}
	})
}

// served is what a cache gives, by type and name.
func served(c *Cache) map[string]string {
	out := map[string]string{}
	for url := range c.State().Types {
		for r := range c.All(url) {
			out[url+" "+r.Name] = r.Version
		}
	}
	return out
}

func TestOpenReplays(t *testing.T) {
	b, _, _ := sample()
	dir := t.TempDir()
	path := filepath.Join(dir, journalName)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time from what the first wrote anew
		c := Open(Options{Dir: dir, Log: quiet()})
		if got, want := served(c), map[string]string{xds.ClusterType + " a": "2"}; !maps.Equal(got, want) {
			t.Errorf("served %v, want %v", got, want)
		}
		s := c.State()
		if len(s.Refused) != 1 || s.Refused[0].Version != "3" || s.Refused[0].LastGood != "2" {
			t.Errorf("refused: %+v", s.Refused)
		}
		if s.LastContact.Year() != 2026 {
			t.Errorf("last contact %v", s.LastContact)
		}
		c.expect(false)
		v := c.snapshot()
		if v.Awaiting(xds.ClusterType, "*") || !v.Awaiting(xds.ListenerType, "*") || v.Awaiting(xds.EndpointType, "x") {
			t.Error("what is known to be complete or absent is awaited, or the other way round")
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	}
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if st.Mode().Perm() != 0o600 {
		t.Errorf("journal has mode %v", st.Mode())
	}
}

// fullDisk is a file on a disk with room for some bytes.
type fullDisk struct {
	file
	room *int
}

func (f fullDisk) Write(b []byte) (int, error) {
	n := min(len(b), *f.room)
	*f.room -= n
	written, err := f.file.Write(b[:n])
	if err == nil && n < len(b) {
		err = syscall.ENOSPC
	}
	return written, err
}

func TestDiskFull(t *testing.T) {
	dir := t.TempDir()
	var log bytes.Buffer
	c := Open(Options{Dir: dir, Log: slog.New(slog.NewTextHandler(&log, nil))})
	room := 2000
	c.mu.Lock()
	c.journal.file = fullDisk{c.journal.file, &room}
	open := c.journal.open
	c.journal.open = func(path string, flag int) (file, error) {
		if room == 0 {
			return nil, syscall.ENOSPC
		}
		return open(path, flag)
	}
	c.mu.Unlock()
	put := func(i int) {
		c.mu.Lock()
		defer c.mu.Unlock()
		ch := c.begin()
		tbl := c.table(xds.NameType)
		r := record{kind: kindGood, typeURL: xds.NameType, name: fmt.Sprint(i), version: "1", body: make([]byte, 300)}
		tbl.entries[r.name] = &entry{good: r.resource()}
		ch.touch(tbl, r.name)
		ch.record(tbl, r)
		ch.commit()
	}
	for i := range 20 {
		put(i)
	}
	if got := len(served(c)); got != 20 {
		t.Errorf("%d names served from memory, want 20", got)
	}
	if !strings.Contains(c.State().Disk, "no space left") {
		t.Errorf("state says %q of the disk", c.State().Disk)
	}
	if n := strings.Count(log.String(), "can't be cached"); n != 1 {
		t.Errorf("logged %d times, want once", n)
	}
	b, err := os.ReadFile(filepath.Join(dir, journalName))
	if err != nil {
		t.Fatal(err)
	}
	if got, damaged := readJournal(b); damaged != 0 || len(got) != 5 {
		t.Errorf("left on disk: %d records, %d damaged bytes", len(got), damaged)
	}
	// Room again: all of it is written.
	c.mu.Lock()
	room = 1 << 20
	c.journal.tried = c.journal.tried.Add(-retryAfter)
	c.mu.Unlock()
	put(20)
	if c.State().Disk != "" {
		t.Errorf("state still says %q", c.State().Disk)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	again := Open(Options{Dir: dir, Log: quiet()})
	defer again.Close()
	if got := len(served(again)); got != 21 {
		t.Errorf("%d names after the restart, want 21", got)
	}
}

func TestDirectoryCannotBeMade(t *testing.T) {
	notDir := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(notDir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	c := Open(Options{Dir: filepath.Join(notDir, "cache"), Log: quiet()})
	if c.State().Disk == "" {
		t.Error("state says nothing of the disk")
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

func TestJournalIsCompacted(t *testing.T) {
	dir := t.TempDir()
	j, _ := openJournal(dir, quiet())
	live := []record{{kind: kindGood, typeURL: "t", name: "n", version: "last", body: make([]byte, 100<<10)}}
	dump := func() []record { return live }
	for range 200 { // 20 MB in all
		j.write(live, dump)
	}
	if err := j.close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(j.path + ".new"); err == nil {
		t.Error("a compaction left its file behind")
	}
	st, err := os.Stat(j.path)
	if err != nil {
		t.Fatal(err)
	}
	if st.Size() > compactSize+1<<20 {
		t.Errorf("journal has %d bytes", st.Size())
	}
	// The next agent may have the file by now.
	j.write(live, dump)
	if now, err := os.Stat(j.path); err != nil || !os.SameFile(st, now) || now.Size() != st.Size() {
		t.Errorf("written to after its end: %v", err)
	}
}
