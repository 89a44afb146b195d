package kube

import (
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/status"
	"isthmus.dev/internal/store"
)

// sync writes the rows of what changed, and of what depends on that, as one
// batch.
func (s *Source) sync(changed map[ref]struct{}) {
	b := &store.Batch{}
	if s.syncMesh(b, changed) {
		for _, kind := range []status.Kind{kindPod, status.WorkloadEntry, status.ServiceEntry} {
			for _, key := range s.feeds[kind].keys() {
				changed[ref{kind, key}] = struct{}{}
			}
		}
	}
	s.addDependents(changed)
	for r := range changed {
		switch r.kind {
		case kindNamespace:
			s.syncNamespace(b, r)
		case kindService:
			s.syncService(b, r)
		case kindEndpointSlice:
			s.syncSlice(b, r)
		case status.ServiceEntry:
			s.syncServiceEntry(b, r)
		case status.WorkloadGroup:
			s.syncGroup(r)
		case status.VirtualService, status.DestinationRule, status.Sidecar, status.PeerAuthentication, status.AuthorizationPolicy:
			s.syncConfig(b, r)
		}
	}
	s.syncWorkloads(b, changed)
	if !b.Empty() {
		s.cfg.Writer.Write(b)
	}
}

// addDependents adds the objects whose rows are made of others that changed.
func (s *Source) addDependents(changed map[ref]struct{}) {
	var more []ref
	depend := func(kind status.Kind, on model.Key) {
		for _, key := range s.feeds[kind].dependOn(on) {
			more = append(more, ref{kind, key})
		}
	}
	for r := range changed {
		switch r.kind {
		case kindNode:
			depend(kindPod, r.key)
		case kindService:
			depend(kindEndpointSlice, r.key)
		case status.WorkloadGroup:
			depend(status.WorkloadEntry, r.key)
		case kindPod:
			// It may take the key of a WorkloadEntry, or give it back.
			if _, ok := s.feeds[status.WorkloadEntry].get(r.key); ok {
				more = append(more, ref{status.WorkloadEntry, r.key})
			}
		}
	}
	for _, r := range more {
		changed[r] = struct{}{}
		if entry := (ref{status.WorkloadEntry, r.key}); r.kind == kindPod {
			if _, ok := s.feeds[status.WorkloadEntry].get(r.key); ok {
				changed[entry] = struct{}{}
			}
		}
	}
}

// syncWorkloads writes the rows of pods and WorkloadEntries. What is left is
// deleted before anything is put, since a key may pass from one object to
// another.
func (s *Source) syncWorkloads(b *store.Batch, changed map[ref]struct{}) {
	rows := map[ref]*model.Workload{}
	for r := range changed {
		switch r.kind {
		case kindPod:
			rows[r] = s.podRow(r)
		case status.WorkloadEntry:
			rows[r] = s.entryRow(r)
		}
	}
	for r, row := range rows {
		if old := s.workloads[r]; old != nil && (row == nil || row.Key != old.Key) {
			store.Delete(b, store.Workloads, old.Key)
		}
	}
	for r, row := range rows {
		if row == nil {
			delete(s.workloads, r)
			continue
		}
		s.workloads[r] = row
		store.Put(b, store.Workloads, row.Key, row)
	}
}
