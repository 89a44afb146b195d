package load

import "time"

// destination is a service that a proxy sends requests to: what it asks for the
// first time that it does.
type destination struct {
	virtualHost, cluster int // numbers of names
}

// configured is called whenever all that was asked for is there. A proxy on demand
// then makes its first requests, one after the other: for each destination that it
// was not given, it asks for the virtual host, and then for the cluster, unless that
// came along. Endpoints follow a cluster as ever.
func (p *proxy) configured() error {
	if !p.has(eds) || !p.has(vhds) || !p.has(cds) {
		return nil
	}
	for _, d := range p.uses {
		for _, step := range []struct{ t, name int }{{vhds, d.virtualHost}, {cds, d.cluster}} {
			if p.have[step.t].has(step.name) {
				continue
			}
			var one set
			one.add(step.name)
			p.want[step.t].add(step.name)
			return p.request(step.t, one, nil, false)
		}
	}
	if p.complete.CompareAndSwap(0, int64(time.Since(p.load.begin))) {
		p.load.configured.Done()
	}
	return nil
}
