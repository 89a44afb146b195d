package xds

import "sync/atomic"

// Counters is what a Server has done so far, for the metrics of its owner. Of
// Istio's, pilot_xds is Streams, pilot_xds_pushes Types[i].Responses,
// pilot_total_xds_rejects Types[i].Refused; Options.Converged gives the samples of
// pilot_proxy_convergence_time.
type Counters struct {
	Streams  int64 // connected now
	Waiting  int64 // of these, how many wait for their turn at a first push
	Total    uint64
	Shed     uint64 // streams refused because of load
	Requests uint64
	Types    [6]TypeCounters // clusters, endpoints, listeners, routes, virtual hosts, all others
}

// TypeNames are the usual short names for Counters.Types.
var TypeNames = [6]string{"cds", "eds", "lds", "rds", "vhds", "other"}

// TypeCounters counts responses of one type.
type TypeCounters struct {
	Responses  uint64
	Resources  uint64
	Removed    uint64
	Bytes      uint64 // of resources
	Saved      uint64 // resources that were not sent because the proxy had the version
	SavedBytes uint64
	Refused    uint64 // responses
}

type counters struct {
	streams, waiting      atomic.Int64
	total, shed, requests atomic.Uint64
	types                 [6]struct {
		responses, resources, removed, bytes, saved, savedBytes, refused atomic.Uint64
	}
}

func (c *counters) sent(rank int, resources []*Resource, removed int) {
	t := &c.types[rank]
	t.responses.Add(1)
	t.resources.Add(uint64(len(resources)))
	t.removed.Add(uint64(removed))
	n := 0
	for _, r := range resources {
		n += len(r.Body.GetValue())
	}
	t.bytes.Add(uint64(n))
}

func (c *counters) saved(rank int, r *Resource) {
	c.types[rank].saved.Add(1)
	c.types[rank].savedBytes.Add(uint64(len(r.Body.GetValue())))
}

func (c *counters) refused(rank int) { c.types[rank].refused.Add(1) }

func (c *counters) read() Counters {
	out := Counters{Streams: c.streams.Load(), Waiting: c.waiting.Load(), Total: c.total.Load(), Shed: c.shed.Load(), Requests: c.requests.Load()}
	for i := range c.types {
		t := &c.types[i]
		out.Types[i] = TypeCounters{
			Responses: t.responses.Load(), Resources: t.resources.Load(), Removed: t.removed.Load(), Bytes: t.bytes.Load(),
			Saved: t.saved.Load(), SavedBytes: t.savedBytes.Load(), Refused: t.refused.Load(),
		}
	}
	return out
}
