package etcd

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/etcdutl/v3/snapshot"
	"go.uber.org/zap"

	"isthmus.dev/kube/datadir"
)

// revisionBump lifts a restored store's revision above whatever clients have seen
// since the snapshot, and marks what was before as compacted. Informers then list
// again, instead of waiting at a revision that is still to come.
const revisionBump = 1_000_000_000

// Save writes the content of the server that runs on dir to a file.
func Save(ctx context.Context, dir datadir.Dir, file string, log *slog.Logger) error {
	cfg := clientv3.Config{Endpoints: []string{URL(dir)}, DialTimeout: 10 * time.Second}
	if _, err := snapshot.NewV3(logger(log)).Save(ctx, cfg, file); err != nil {
		return fmt.Errorf("save etcd snapshot: %w", err)
	}
	return nil
}

// Restore makes the etcd folder to of a file that Save wrote, whose checksum it verifies.
func Restore(file, to string, log *slog.Logger) error {
	err := snapshot.NewV3(logger(log)).Restore(snapshot.RestoreConfig{
		SnapshotPath:        file,
		Name:                member,
		OutputDataDir:       to,
		PeerURLs:            []string{advertisedPeer},
		InitialCluster:      member + "=" + advertisedPeer,
		InitialClusterToken: "isthmus-kube",
		RevisionBump:        revisionBump,
		MarkCompacted:       true,
	})
	if err != nil {
		return fmt.Errorf("restore etcd snapshot: %w", err)
	}
	return nil
}

func logger(log *slog.Logger) *zap.Logger { return zap.New(slogCore{log: log}) }
