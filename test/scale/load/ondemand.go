package load

import "time"

// destination is a service that a proxy sends requests to: what it asks for the
// first time that it does.
type destination struct {
	virtualHost, cluster int // numbers of names
}

// configured is called whenever all that was asked for is there. A proxy on demand
// then makes its first requests: for each destination that it was not given, it
// asks for the virtual host, and once it has that for the cluster, each in a
// request of its own, as Envoy does; endpoints follow a cluster as ever.
func (p *proxy) configured() error {
	for i := 0; i < len(p.uses); i++ {
		d := p.uses[i]
		for _, step := range []struct{ t, name int }{{vhds, d.virtualHost}, {cds, d.cluster}} {
			if p.have[step.t].has(step.name) {
				continue
			}
			if !p.want[step.t].has(step.name) {
				var one set
				one.add(step.name)
				p.want[step.t].add(step.name)
				if err := p.request(step.t, one, nil, false); err != nil {
					return err
				}
			}
			break // the cluster is asked for by what is routed to it
		}
	}
	if !p.has(eds) || len(p.uses) > 0 && (!p.has(vhds) || !p.has(cds) || !p.usesAll()) {
		return nil
	}
	if p.complete.CompareAndSwap(0, int64(time.Since(p.load.begin))) {
		p.load.configured.Done()
	}
	return nil
}

func (p *proxy) usesAll() bool {
	for _, d := range p.uses {
		if !p.have[cds].has(d.cluster) {
			return false
		}
	}
	return true
}
