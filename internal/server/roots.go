package server

import (
	"context"
	"time"

	"k8s.io/client-go/util/workqueue"

	"isthmus.dev/internal/ca"
)

// reloadPeriod is how often the CA's Secret is looked at.
const reloadPeriod = time.Minute

// distributeRoots keeps the ConfigMap with the mesh's roots in every namespace,
// where this replica leads, and the authority as its Secret says.
func (s *server) distributeRoots(ctx context.Context) error {
	queue := s.rootless
	s.source.OnNamespace(queue.Add)
	written := make(chan struct{})
	go func() {
		defer close(written)
		s.writeRoots(ctx, queue)
	}()
	defer func() {
		queue.ShutDown()
		<-written
	}()
	tick := time.NewTicker(reloadPeriod)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		changed, err := s.authority.Reload(ctx)
		if err != nil {
			s.log.Warn("could not reload the certificate authority: the one in use stays", "error", err)
		}
		if !changed {
			continue
		}
		for _, name := range s.source.Namespaces() {
			queue.Add(name)
		}
		if s.replica.leads() {
			s.untilDone(ctx, "publish", s.publish)
		}
	}
}

// writeRoots writes the roots into the namespaces of the queue until that is shut
// down. One that fails comes again. What comes while another replica leads is that
// one's; all come again when this one is to lead.
func (s *server) writeRoots(ctx context.Context, queue workqueue.TypedRateLimitingInterface[string]) {
	maps := &ca.RootConfigMaps{Client: s.kube, Signer: s.authority}
	for {
		name, over := queue.Get()
		if over {
			return
		}
		err := error(nil)
		if s.replica.leads() {
			err = maps.Ensure(ctx, name)
		}
		switch {
		case err == nil:
			queue.Forget(name)
		case ctx.Err() == nil:
			s.log.Warn("could not write the mesh's roots", "namespace", name, "error", err)
			queue.AddRateLimited(name)
		}
		queue.Done(name)
	}
}
