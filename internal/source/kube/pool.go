package kube

import (
	"encoding/binary"
	"maps"
	"slices"
	"strings"
	"sync"

	"isthmus.dev/internal/model"
)

// poolSize bounds what a pool remembers; what was shared stays shared.
const poolSize = 1 << 16

// pool has workloads that say the same share memory: replicas differ in little
// more than a name and an address.
type pool struct {
	mu      sync.Mutex
	strings map[string]string
	labels  map[string]map[string]string
	ports   map[string]ports
}

// ports of a workload: by name, and as what it serves.
type ports struct {
	named  map[string]uint32
	served []model.Port
}

func newPool() *pool {
	return &pool{strings: map[string]string{}, labels: map[string]map[string]string{}, ports: map[string]ports{}}
}

func (p *pool) string(s string) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stringLocked(s)
}

func (p *pool) stringLocked(s string) string {
	if s == "" {
		return ""
	}
	if known, ok := p.strings[s]; ok {
		return known
	}
	if len(p.strings) >= poolSize {
		p.strings = map[string]string{}
	}
	s = strings.Clone(s) // it may be a part of something large
	p.strings[s] = s
	return s
}

// labelsOf gives a map with the same content.
func (p *pool) labelsOf(m map[string]string) map[string]string {
	if len(m) == 0 {
		return nil
	}
	id := make([]byte, 0, 256)
	for _, k := range slices.Sorted(maps.Keys(m)) {
		id = appendText(appendText(id, k), m[k])
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if known, ok := p.labels[string(id)]; ok {
		return known
	}
	if len(p.labels) >= poolSize {
		p.labels = map[string]map[string]string{}
	}
	shared := make(map[string]string, len(m))
	for k, v := range m {
		shared[p.stringLocked(k)] = p.stringLocked(v)
	}
	p.labels[string(id)] = shared
	return shared
}

// portsOf gives named ports, no name twice, in the order of their numbers.
func (p *pool) portsOf(list []model.Port) ports {
	if len(list) == 0 {
		return ports{}
	}
	slices.SortFunc(list, comparePorts)
	id := make([]byte, 0, 64)
	for _, port := range list {
		id = append(binary.AppendUvarint(appendText(id, port.Name), uint64(port.Number)), byte(port.Protocol))
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if known, ok := p.ports[string(id)]; ok {
		return known
	}
	if len(p.ports) >= poolSize {
		p.ports = map[string]ports{}
	}
	shared := ports{named: make(map[string]uint32, len(list)), served: slices.Clone(list)}
	for i := range shared.served {
		port := &shared.served[i]
		port.Name = p.stringLocked(port.Name)
		shared.named[port.Name] = port.Number
	}
	p.ports[string(id)] = shared
	return shared
}

func appendText(id []byte, s string) []byte {
	return append(binary.AppendUvarint(id, uint64(len(s))), s...)
}
