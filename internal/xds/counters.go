package xds

import "sync/atomic"

// Counters is what a Server has done so far, for the metrics of its owner.
type Counters struct {
	Streams int64 // connected now
	Waiting int64 // of these, how many wait for their turn at a first push
	Total   uint64
	Shed    uint64          // refused because of load
	Types   [6]TypeCounters // clusters, endpoints, listeners, routes, virtual hosts, all others
}

// TypeNames are the usual short names for Counters.Types.
var TypeNames = [6]string{"cds", "eds", "lds", "rds", "vhds", "other"}

// TypeCounters counts responses of one type.
type TypeCounters struct {
	Responses uint64
	Resources uint64
	Removed   uint64
	Bytes     uint64 // of resources
	Refused   uint64 // responses
}

type counters struct {
	streams, waiting atomic.Int64
	total, shed      atomic.Uint64
	types            [6]struct {
		responses, resources, removed, bytes, refused atomic.Uint64
	}
}

func (c *counters) sent(rank int, f *flight) {
	t := &c.types[rank]
	t.responses.Add(1)
	t.resources.Add(uint64(len(f.resources)))
	t.removed.Add(uint64(len(f.removed)))
	n := 0
	for _, r := range f.resources {
		n += len(r.Body.GetValue())
	}
	t.bytes.Add(uint64(n))
}

func (c *counters) refused(rank int) { c.types[rank].refused.Add(1) }

func (c *counters) read() Counters {
	out := Counters{Streams: c.streams.Load(), Waiting: c.waiting.Load(), Total: c.total.Load(), Shed: c.shed.Load()}
	for i := range c.types {
		t := &c.types[i]
		out.Types[i] = TypeCounters{t.responses.Load(), t.resources.Load(), t.removed.Load(), t.bytes.Load(), t.refused.Load()}
	}
	return out
}
