package host

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// etc is where the user database is; files is its part that we may edit.
const etc = "/etc"

// MakeUser gives the system user of agent and Envoy, made if it is missing.
func (r *Record) MakeUser(name string) (*Owner, error) {
	if o, err := lookup(name); err == nil {
		return o, nil
	}
	if err := r.note(Step{KindUser, name}); err != nil {
		return nil, err
	}
	if err := addUser(name); err != nil {
		return nil, fmt.Errorf("make the system user %s: %w", name, err)
	}
	o, err := lookup(name)
	if err != nil {
		return nil, fmt.Errorf("the system user %s was made and is not found: %w", name, err)
	}
	return o, nil
}

func lookup(name string) (*Owner, error) {
	u, err := user.Lookup(name)
	if err != nil {
		return nil, err
	}
	uid, err := strconv.Atoi(u.Uid)
	if err != nil {
		return nil, err
	}
	gid, err := strconv.Atoi(u.Gid)
	if err != nil {
		return nil, err
	}
	if uid == 0 {
		return nil, errors.New("it is root: agent and Envoy never run as root")
	}
	return &Owner{UID: uid, GID: gid}, nil
}

// addUser uses the host's own tool, and edits the files where there is none.
func addUser(name string) error {
	for _, tool := range [][]string{
		{"useradd", "--system", "--user-group", "--no-create-home", "--home-dir", "/nonexistent", "--shell", "/usr/sbin/nologin", name},
		{"adduser", "-S", "-D", "-H", "-h", "/nonexistent", "-s", "/sbin/nologin", name}, // busybox
	} {
		if path, err := exec.LookPath(tool[0]); err == nil {
			return keepingBackups(etc, func() error { return run(path, tool[1:]...) })
		}
	}
	return addToFiles(etc, name)
}

func removeUser(name string) error {
	if _, err := user.Lookup(name); err != nil {
		return nil
	}
	for _, tool := range []string{"userdel", "deluser"} {
		path, err := exec.LookPath(tool)
		if err != nil {
			continue
		}
		// Processes that were just told to end are in the way for a moment.
		return keepingBackups(etc, func() (err error) {
			for end := time.Now().Add(5 * time.Second); ; time.Sleep(100 * time.Millisecond) {
				if err = run(path, name); err == nil || time.Now().After(end) {
					return err
				}
			}
		})
	}
	return removeFromFiles(etc, name)
}

// keepingBackups runs a tool, and then puts back the backups that it writes of the
// user database (passwd- and so on): those are of the host's own last change, and
// one that is undone leaves them as they were.
func keepingBackups(dir string, tool func() error) error {
	type backup struct {
		path    string
		content []byte
		info    fs.FileInfo // nil: there was none
	}
	var all []backup
	for _, file := range []string{"passwd-", "shadow-", "group-", "gshadow-", "subuid-", "subgid-"} {
		b := backup{path: filepath.Join(dir, file)}
		var err error
		if b.info, err = os.Stat(b.path); err == nil {
			b.content, err = os.ReadFile(b.path)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		all = append(all, b)
	}
	err := tool()
	for _, b := range all {
		if b.info == nil {
			if removed := os.Remove(b.path); removed != nil && !errors.Is(removed, fs.ErrNotExist) {
				err = errors.Join(err, removed)
			}
			continue
		}
		err = errors.Join(err, replace(b.path, b.content, b.info), os.Chtimes(b.path, time.Time{}, b.info.ModTime()))
	}
	return err
}

func run(path string, args ...string) error {
	out, err := exec.Command(path, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", filepath.Base(path), err, bytes.TrimSpace(out))
	}
	return nil
}

// System users' ids, as Debian and Red Hat give them.
const firstID, lastID = 201, 999

// addToFiles adds user and group to the files of the user database.
func addToFiles(dir, name string) error {
	id, err := freeID(dir)
	if err != nil {
		return err
	}
	for _, f := range []struct{ file, line string }{
		{"group", fmt.Sprintf("%s:x:%d:", name, id)},
		{"gshadow", fmt.Sprintf("%s:!::", name)},
		{"passwd", fmt.Sprintf("%s:x:%d:%d::/nonexistent:/usr/sbin/nologin", name, id, id)},
		{"shadow", fmt.Sprintf("%s:!:::::::", name)},
	} {
		err := edit(filepath.Join(dir, f.file), func(old []byte) []byte {
			if len(old) > 0 && old[len(old)-1] != '\n' {
				old = append(old, '\n')
			}
			return append(old, f.line+"\n"...)
		})
		if errors.Is(err, fs.ErrNotExist) && strings.HasSuffix(f.file, "shadow") {
			continue // a host without shadow passwords
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func removeFromFiles(dir, name string) error {
	for _, file := range []string{"shadow", "passwd", "gshadow", "group"} {
		err := edit(filepath.Join(dir, file), func(old []byte) []byte {
			var out []byte
			for line := range bytes.Lines(old) {
				if !bytes.HasPrefix(line, []byte(name+":")) {
					out = append(out, line...)
				}
			}
			return out
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// freeID is unused as a user's and as a group's.
func freeID(dir string) (int, error) {
	used := map[int]bool{}
	for _, file := range []string{"passwd", "group"} {
		b, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			return 0, err
		}
		lines := bufio.NewScanner(bytes.NewReader(b))
		for lines.Scan() {
			if f := strings.Split(lines.Text(), ":"); len(f) > 2 {
				if id, err := strconv.Atoi(f[2]); err == nil {
					used[id] = true
				}
			}
		}
	}
	for id := lastID; id >= firstID; id-- {
		if !used[id] {
			return id, nil
		}
	}
	return 0, errors.New("no system user id is free")
}

// edit replaces a file of the user database in one step, with its mode and owner.
func edit(path string, f func([]byte) []byte) error {
	old, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	return replace(path, f(bytes.Clone(old)), st)
}

// replace writes a file in one step, with the mode and owner of another.
func replace(path string, content []byte, like fs.FileInfo) error {
	tmp := path + ".isthmus"
	if err := os.WriteFile(tmp, content, 0o600); err != nil {
		return err
	}
	defer os.Remove(tmp) // fails once renamed
	if err := copyOwner(tmp, like); err != nil {
		return err
	}
	if err := os.Chmod(tmp, like.Mode().Perm()); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}
