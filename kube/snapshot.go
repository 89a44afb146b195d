package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	apiversion "k8s.io/component-base/version"

	"isthmus.dev/kube/archive"
	"isthmus.dev/kube/datadir"
	"isthmus.dev/kube/etcd"
	"isthmus.dev/kube/pki"
	"isthmus.dev/kube/report"
)

const etcdFile = "etcd.db" // in the archive

func snapshotCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "snapshot", Short: "Save or restore everything that the API holds"}
	var dataDir string
	save := &cobra.Command{
		Use:   "save FILE",
		Short: "Write objects, certificate authority and token key to one file (mode 0600)",
		Long: `Write all objects, the certificate authority and the key of service account
tokens to one file of mode 0600, while the server runs or when it is stopped.
Who has the file owns the mesh: keep it as you keep keys.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return saveSnapshot(cmd.Context(), dataDir, args[0])
		},
	}
	restore := &cobra.Command{
		Use:   "restore FILE",
		Short: "Make a data directory of a snapshot",
		Long: `Make a data directory of a snapshot. Kubeconfigs and tokens that were valid
when it was saved are valid again.`,
		Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			return restoreSnapshot(args[0], dataDir)
		},
	}
	for _, c := range []*cobra.Command{save, restore} {
		c.Flags().StringVar(&dataDir, "data-dir", "", "`directory` of the server (required)")
		cmd.AddCommand(c)
	}
	return cmd
}

// saveSnapshot asks the server that runs on a data directory, or else runs its etcd
// for as long as it takes.
func saveSnapshot(ctx context.Context, dataDir, file string) error {
	dir, err := datadir.Existing(dataDir)
	if err != nil {
		return err
	}
	if _, err := os.Stat(dir.Etcd()); err != nil {
		return report.Errorf(report.CodeDataDir, "%s has no etcd of its own: save the external one by `etcdctl snapshot save`, and copy %s", dir, dir.PKI())
	}
	lock, err := dir.Lock()
	if err == nil {
		defer lock.Release()
		e, err := etcd.Start(ctx, dir, slog.Default())
		if err != nil {
			return &report.Error{Code: report.CodeEtcd, Err: err}
		}
		defer e.Close()
	} else if coded := (*report.Error)(nil); !errors.As(err, &coded) || coded.Code != report.CodeDataDirBusy {
		return err
	}

	scratch, err := os.MkdirTemp(filepath.Dir(file), ".isthmus-kube-snapshot-*")
	if err != nil {
		return fmt.Errorf("make scratch folder beside the snapshot: %w", err)
	}
	defer os.RemoveAll(scratch)
	db := filepath.Join(scratch, etcdFile)
	if err := etcd.Save(ctx, dir, db, slog.Default()); err != nil {
		return &report.Error{Code: report.CodeEtcd, Err: err}
	}
	entries := []archive.Entry{{Name: etcdFile, Path: db}}
	for _, name := range pki.Durable() {
		entries = append(entries, archive.Entry{Name: "pki/" + name, Path: filepath.Join(dir.PKI(), name)})
	}
	return archive.Write(file, archive.Header{Kubernetes: apiversion.Get().GitVersion, Isthmus: release}, entries)
}

// restoreSnapshot fills an empty data directory. Files go to a folder inside first:
// a start refuses a directory where that is left over.
func restoreSnapshot(file, dataDir string) error {
	if err := refuseContent(dataDir); err != nil {
		return err
	}
	dir, lock, err := datadir.Open(dataDir)
	if err != nil {
		return err
	}
	defer lock.Release()
	wanted := []string{etcdFile}
	for _, name := range pki.Durable() {
		wanted = append(wanted, "pki/"+name)
	}
	staged := dir.Restoring()
	if err := archive.Read(file, staged, wanted); err != nil {
		return errors.Join(err, os.RemoveAll(staged))
	}
	if err := etcd.Restore(filepath.Join(staged, etcdFile), filepath.Join(staged, "etcd"), slog.Default()); err != nil {
		return errors.Join(&report.Error{Code: report.CodeEtcd, Err: err}, os.RemoveAll(staged))
	}
	if err := os.Rename(filepath.Join(staged, "pki"), dir.PKI()); err != nil {
		return fmt.Errorf("put restored keys in place: %w", err)
	}
	if err := os.Rename(filepath.Join(staged, "etcd"), dir.Etcd()); err != nil {
		return fmt.Errorf("put restored objects in place: %w", err)
	}
	return os.RemoveAll(staged)
}

func refuseContent(dataDir string) error {
	found, err := os.ReadDir(dataDir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return report.Errorf(report.CodeDataDir, "read data directory: %w", err)
	}
	for _, f := range found {
		if f.Name() != "lost+found" && f.Name() != "lock" {
			return report.Errorf(report.CodeDataDir, "data directory %s is not empty (%s): restore into an empty one", dataDir, f.Name())
		}
	}
	return nil
}
