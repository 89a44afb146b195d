// Package datadir is the layout of isthmus-kube's data directory and the lock that
// gives it to one process at a time. Everything under it is readable by its owner
// only.
package datadir

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"isthmus.dev/kube/report"
)

// Dir is a data directory by its absolute path.
type Dir string

// Files and folders in it.
func (d Dir) PKI() string            { return d.join("pki") }
func (d Dir) Etcd() string           { return d.join("etcd") }
func (d Dir) ClientSocket() string   { return d.join("etcd.sock") }
func (d Dir) PeerSocket() string     { return d.join("etcd-peer.sock") }
func (d Dir) Kubeconfig() string     { return d.join("admin.kubeconfig") }
func (d Dir) Authentication() string { return d.join("authentication.yaml") }
func (d Dir) Port() string           { return d.join("port") }
func (d Dir) LockFile() string       { return d.join("lock") }

// Restoring is where a snapshot is unpacked; it remains only if that was cut short.
func (d Dir) Restoring() string { return d.join("restoring") }

func (d Dir) join(name string) string { return filepath.Join(string(d), name) }

// Lock is the hold on a data directory. The kernel releases it with the process,
// however that ends.
type Lock struct{ file *os.File }

// Open makes the directory where it is missing and locks it.
func Open(path string) (Dir, *Lock, error) {
	d, err := clean(path)
	if err != nil {
		return "", nil, err
	}
	if err := os.MkdirAll(string(d), 0o700); err != nil {
		return "", nil, report.Errorf(report.CodeDataDir, "make data directory: %w", err)
	}
	// It holds every secret of the mesh, so a directory made by others is closed too.
	if err := os.Chmod(string(d), 0o700); err != nil {
		return "", nil, report.Errorf(report.CodeDataDir, "close data directory to other users: %w", err)
	}
	lock, err := d.Lock()
	if err != nil {
		return "", nil, err
	}
	return d, lock, nil
}

// Existing is a data directory that must be there, not locked.
func Existing(path string) (Dir, error) {
	d, err := clean(path)
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(d.PKI()); err != nil {
		return "", report.Errorf(report.CodeDataDir, "%s is not a data directory of isthmus-kube: %w", d, err)
	}
	return d, nil
}

// Lock locks the directory, or says which process holds it.
func (d Dir) Lock() (*Lock, error) {
	f, err := os.OpenFile(d.LockFile(), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, report.Errorf(report.CodeDataDir, "open lock: %w", err)
	}
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		defer f.Close()
		return nil, report.Errorf(report.CodeDataDirBusy,
			"data directory %s is in use%s (lock %s): stop that process first, or give this one another --data-dir",
			d, holder(d.LockFile()), d.LockFile())
	}
	if err != nil {
		f.Close()
		return nil, report.Errorf(report.CodeDataDir, "lock %s: %w (is it on a file system with locks?)", d.LockFile(), err)
	}
	if err := writePID(f); err != nil {
		f.Close()
		return nil, report.Errorf(report.CodeDataDir, "write %s: %w", d.LockFile(), err)
	}
	return &Lock{file: f}, nil
}

// Release gives the directory up. The file stays: to remove it would let two
// processes lock two files of one name.
func (l *Lock) Release() error { return l.file.Close() }

// LastPort is the port served last, 0 if none was.
func (d Dir) LastPort() int {
	b, err := os.ReadFile(d.Port())
	if err != nil {
		return 0
	}
	port, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || port < 1 || port > 65535 {
		return 0
	}
	return port
}

// SavePort keeps the port for the next start, so that kubeconfigs stay right.
func (d Dir) SavePort(port int) error {
	return WriteFile(d.Port(), []byte(strconv.Itoa(port)+"\n"))
}

// WriteFile replaces a file as a whole, readable by its owner only.
func WriteFile(path string, data []byte) error {
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, data) {
		return os.Chmod(path, 0o600)
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*") // 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if _, err := f.Write(data); err != nil {
		f.Close()
		return err
	}
	if err := f.Sync(); err != nil {
		f.Close()
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

func clean(path string) (Dir, error) {
	if path == "" {
		return "", report.Errorf(report.CodeUsage, "no data directory: give --data-dir")
	}
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", report.Errorf(report.CodeDataDir, "data directory: %w", err)
	}
	d := Dir(abs)
	// sockaddr_un holds 108 bytes with the final zero on Linux, 104 elsewhere.
	if long := d.PeerSocket(); len(long) > 103 {
		return "", report.Errorf(report.CodeDataDir,
			"data directory's path is %d bytes too long for the Unix socket %s: use a shorter --data-dir", len(long)-103, long)
	}
	return d, nil
}

func holder(lockFile string) string {
	b, err := os.ReadFile(lockFile)
	pid := strings.TrimSpace(string(b))
	if err != nil || pid == "" {
		return ""
	}
	return " by process " + pid
}

func writePID(f *os.File) error {
	if err := f.Truncate(0); err != nil {
		return err
	}
	_, err := f.WriteAt(fmt.Appendf(nil, "%d\n", os.Getpid()), 0)
	return err
}
