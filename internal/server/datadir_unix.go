//go:build unix

package server

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// dataDir is the hold on a standalone isthmusd's data directory: a lock that the
// kernel releases with the process, however that ends, in a file that says who
// holds it.
type dataDir struct{ file *os.File }

// What the file says, behind the process id, of one that is about to end.
const ending = "ending"

// heldDataDir is that another isthmusd has the directory.
type heldDataDir struct {
	path, pid string
	ending    bool
}

func (e *heldDataDir) Error() string {
	return fmt.Sprintf("another isthmusd (process %s) serves from --data-dir %s: end it, or choose another directory", e.pid, e.path)
}

// holdDataDir takes a data directory, which is made if it is missing, or fails at
// once with heldDataDir.
func holdDataDir(path string) (*dataDir, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("--data-dir: %w: give one that this user may write", err)
	}
	name := filepath.Join(path, "isthmusd.lock")
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("--data-dir: %w: give one that this user may write", err)
	}
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		defer f.Close()
		b, err := os.ReadFile(name)
		if err != nil {
			return nil, fmt.Errorf("--data-dir: %w", err)
		}
		pid, state, _ := strings.Cut(strings.TrimSpace(string(b)), " ")
		return nil, &heldDataDir{path: path, pid: pid, ending: state == ending}
	}
	d := &dataDir{f}
	if err == nil {
		err = d.say("")
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock --data-dir %s: %w: is it on a file system with locks?", path, err)
	}
	return d, nil
}

// end says that the process will end soon: who wants the directory may wait.
func (d *dataDir) end() error { return d.say(" " + ending) }

func (d *dataDir) say(more string) error {
	if err := d.file.Truncate(0); err != nil {
		return err
	}
	_, err := d.file.WriteAt(fmt.Appendf(nil, "%d%s\n", os.Getpid(), more), 0)
	return err
}

// release gives the directory up. The file stays: to remove it would let two
// processes lock two files of one name.
func (d *dataDir) release() error { return d.file.Close() }
