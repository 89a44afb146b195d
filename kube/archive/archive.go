// Package archive is the file of a snapshot: a tar of a header, which names the other
// files with their SHA-256 sums, and these files. isthmus-kube writes and reads it.
package archive

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// format is the version of the layout; a reader refuses others.
const format = 1

const (
	headerName = "snapshot.json"
	headerMax  = 1 << 20
)

// Header is what a snapshot says of itself. Write fills in the rest.
type Header struct {
	Format     int               `json:"format"`
	Created    time.Time         `json:"created"`
	Kubernetes string            `json:"kubernetes"`
	Isthmus    string            `json:"isthmus"`
	SHA256     map[string]string `json:"sha256"`
}

// Entry is a file to put in, under a name with forward slashes.
type Entry struct{ Name, Path string }

// Write makes the file as a whole, mode 0600: nothing is left of one that fails.
func Write(file string, h Header, entries []Entry) (err error) {
	h.Format, h.Created, h.SHA256 = format, time.Now().UTC().Truncate(time.Second), map[string]string{}
	for _, e := range entries {
		if h.SHA256[e.Name], err = sum(e.Path); err != nil {
			return fmt.Errorf("snapshot: %w", err)
		}
	}
	header, err := json.MarshalIndent(h, "", "  ")
	if err != nil {
		return fmt.Errorf("snapshot: encode header: %w", err)
	}
	out, err := os.CreateTemp(filepath.Dir(file), "."+filepath.Base(file)+".*") // 0600
	if err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	defer os.Remove(out.Name())
	defer out.Close()
	tw := tar.NewWriter(out)
	if err := writeHeader(tw, header, h.Created); err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	for _, e := range entries {
		if err := writeEntry(tw, e, h.Created); err != nil {
			return fmt.Errorf("snapshot: write %s: %w", e.Name, err)
		}
	}
	if err := errors.Join(tw.Close(), out.Sync(), out.Close()); err != nil {
		return fmt.Errorf("snapshot: write %s: %w", file, err)
	}
	if err := os.Rename(out.Name(), file); err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	return nil
}

// Read unpacks the wanted files, all of which must be there and unharmed, into a new
// folder. What else the archive holds is ignored.
func Read(file, dir string, wanted []string) error {
	in, err := os.Open(file)
	if err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	defer in.Close()
	tr := tar.NewReader(in)
	h, err := readHeader(tr)
	if err != nil {
		return fmt.Errorf("%s is not a snapshot of isthmus-kube: %w", file, err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	missing := slices.Clone(wanted)
	for {
		th, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("snapshot %s is cut short or damaged: %w", file, err)
		}
		i := slices.Index(missing, th.Name)
		if i < 0 {
			continue
		}
		missing = slices.Delete(missing, i, i+1)
		if err := readEntry(tr, filepath.Join(dir, filepath.FromSlash(th.Name)), h.SHA256[th.Name]); err != nil {
			return fmt.Errorf("snapshot %s: %s: %w", file, th.Name, err)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("snapshot %s lacks %v", file, missing)
	}
	return nil
}

func writeHeader(tw *tar.Writer, header []byte, at time.Time) error {
	if err := tw.WriteHeader(&tar.Header{Name: headerName, Mode: 0o600, Size: int64(len(header)), ModTime: at}); err != nil {
		return err
	}
	_, err := tw.Write(header)
	return err
}

func writeEntry(tw *tar.Writer, e Entry, at time.Time) error {
	f, err := os.Open(e.Path)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if err := tw.WriteHeader(&tar.Header{Name: e.Name, Mode: 0o600, Size: st.Size(), ModTime: at}); err != nil {
		return err
	}
	_, err = io.Copy(tw, f)
	return err
}

func readHeader(tr *tar.Reader) (Header, error) {
	var h Header
	th, err := tr.Next()
	if err != nil {
		return h, err
	}
	if th.Name != headerName {
		return h, fmt.Errorf("its first file is %q, not %q", th.Name, headerName)
	}
	if err := json.NewDecoder(io.LimitReader(tr, headerMax)).Decode(&h); err != nil {
		return h, fmt.Errorf("%s: %w", headerName, err)
	}
	if h.Format != format {
		return h, fmt.Errorf("format %d, this program reads %d: use the release that wrote it (%s)", h.Format, format, h.Isthmus)
	}
	return h, nil
}

func readEntry(r io.Reader, path, want string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	digest := sha256.New()
	if _, err := io.Copy(io.MultiWriter(f, digest), r); err != nil {
		return err
	}
	if got := hex.EncodeToString(digest.Sum(nil)); got != want {
		return fmt.Errorf("damaged: SHA-256 %s, want %s", got, want)
	}
	return errors.Join(f.Sync(), f.Close())
}

func sum(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	digest := sha256.New()
	if _, err := io.Copy(digest, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(digest.Sum(nil)), nil
}
