// Package host changes the machine that joins a mesh, and changes it back. Each
// step is noted in a record on disk before it is taken; undoing the record, after
// a failed join or at `isthmus-agent leave`, restores the host as it was.
package host

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// Kind of a step.
type Kind string

// What join does to a host.
const (
	KindUser    Kind = "user"    // made; Target is its name
	KindFile    Kind = "file"    // written where none was
	KindDir     Kind = "dir"     // made; removed with all that is in it
	KindService Kind = "service" // systemd unit; Target is its file
	KindProcess Kind = "process" // started by us, where there is no systemd; Target is the config file
)

// Step is one change.
type Step struct {
	Kind   Kind   `json:"kind"`
	Target string `json:"target"`
}

// String gives "user isthmus".
func (s Step) String() string { return string(s.Kind) + " " + s.Target }

// Record lists the steps taken, in order.
type Record struct {
	path  string
	Steps []Step `json:"steps"`
}

// OpenRecord reads a record, empty if there is none.
func OpenRecord(path string) (*Record, error) {
	r := &Record{path: path}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(b, r); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil
}

func (r *Record) note(s Step) error {
	if slices.Contains(r.Steps, s) {
		return nil
	}
	r.Steps = append(r.Steps, s)
	return r.save()
}

func (r *Record) save() error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	tmp := r.path + ".new"
	if err := os.WriteFile(tmp, append(b, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, r.path)
}

// MakeDir makes a directory for an owner. The highest directory that is missing
// is the one noted, so that nothing of the path stays behind. One that is there
// already is left as it is, and must be the owner's, or empty.
func (r *Record) MakeDir(path string, mode fs.FileMode, o *Owner) error {
	top := missing(path)
	if top == "" {
		return o.own(path, mode)
	}
	if top == filepath.Dir(r.path) { // the record itself must have somewhere to be
		if err := os.Mkdir(top, 0o755); err != nil {
			return err
		}
	}
	if err := r.note(Step{KindDir, top}); err != nil {
		return err
	}
	if err := os.MkdirAll(path, 0o755); err != nil {
		return err
	}
	for p := path; p != filepath.Dir(top); p = filepath.Dir(p) {
		if err := os.Chmod(p, 0o755); err != nil { // whatever root's umask is
			return err
		}
	}
	if err := os.Chmod(path, mode); err != nil {
		return err
	}
	return o.take(path)
}

// missing is the highest directory of a path that does not exist, "" if all do.
func missing(path string) string {
	top := ""
	for {
		if _, err := os.Lstat(path); err == nil {
			return top
		}
		top = path
		up := filepath.Dir(path)
		if up == path {
			return top
		}
		path = up
	}
}

// WriteFile writes a file that this join makes.
func (r *Record) WriteFile(path string, content []byte, mode fs.FileMode, o *Owner) error {
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		if err := r.note(Step{KindFile, path}); err != nil {
			return err
		}
	}
	if err := os.WriteFile(path, content, mode); err != nil {
		return err
	}
	if err := os.Chmod(path, mode); err != nil { // whatever root's umask is
		return err
	}
	return o.take(path)
}

// Adopt notes a file that was put here for this join, for it to be removed.
func (r *Record) Adopt(path string) error { return r.note(Step{KindFile, path}) }

// Undo takes the steps back, the last first. What can't be is kept in the record
// and returned; say hears of each that was.
func (r *Record) Undo(say func(string)) error {
	var failed []error
	var left []Step
	for i := len(r.Steps) - 1; i >= 0; i-- {
		s := r.Steps[i]
		if err := undo(s); err != nil {
			failed = append(failed, fmt.Errorf("%s: %w", s, err))
			left = append([]Step{s}, left...)
			continue
		}
		if s.Kind != KindProcess { // ended before
			say("removed " + s.String())
		}
	}
	r.Steps = left
	if len(left) > 0 {
		if _, err := os.Stat(filepath.Dir(r.path)); err == nil {
			failed = append(failed, r.save())
		}
		return errors.Join(failed...)
	}
	if err := os.Remove(r.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func undo(s Step) error {
	switch s.Kind {
	case KindFile:
		err := os.Remove(s.Target)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	case KindDir:
		return os.RemoveAll(s.Target)
	case KindUser:
		return removeUser(s.Target)
	case KindService:
		return removeService(s.Target)
	case KindProcess:
		return nil // ended by who undoes: it has a socket to be asked by
	}
	return fmt.Errorf("unknown step; this record is of a newer isthmus-agent")
}

// Owner of a file; nil leaves it the caller's.
type Owner struct{ UID, GID int }

func (o *Owner) take(path string) error {
	if o == nil {
		return nil
	}
	return os.Lchown(path, o.UID, o.GID)
}

// own makes an empty directory the owner's.
func (o *Owner) own(path string, mode fs.FileMode) error {
	st, err := os.Stat(path)
	if err != nil || o == nil || ownedBy(st, o.UID) {
		return err
	}
	content, err := os.ReadDir(path)
	if err != nil {
		return err
	}
	if len(content) > 0 {
		return fmt.Errorf("%s is there already and belongs to another user: remove it, or give it to the agent's", path)
	}
	if err := os.Chmod(path, mode); err != nil {
		return err
	}
	return o.take(path)
}
