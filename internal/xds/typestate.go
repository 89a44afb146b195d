package xds

import "slices"

// Ranks of the types in a push. Types of rankOther depend on nothing.
const (
	rankCluster = iota
	rankEndpoint
	rankListener
	rankRoute
	rankHost
	rankOther
)

func rankOf(typeURL string) int {
	switch typeURL {
	case ClusterType:
		return rankCluster
	case EndpointType:
		return rankEndpoint
	case ListenerType:
		return rankListener
	case RouteType:
		return rankRoute
	case VirtualHostType:
		return rankHost
	}
	return rankOther
}

// typeState is what a session keeps for one type. At rest that is the subscribed
// names and the few that were refused, and no version of anything accepted: what
// the proxy has is what the session's View says, but for what is in the queues.
type typeState struct {
	url  string
	rank int

	whole bool // never split over several responses

	opened   bool // by the proxy
	wildcard bool
	names    nameSet
	resolved map[string]string   // names asked for → what answers them, where that is another
	derived  map[string]struct{} // what is among names only because it does so

	owed    bool              // a response is due, be it empty
	filling bool              // "*" is subscribed to and the View awaits its content
	initial map[string]string // versions that the proxy brought, until "*" is filled

	answers  queue    // subscribed to just now: sent, or told not to exist, at once
	changed  queue    // sent in the order of the push
	removals removals // of what existed
	retries  []batch  // parts of a refused response, to be sent apart
	tries    int      // refusals in a row
	refused  map[string]refusal
	flight   *flight

	reported uint64 // 1 + the revision last reported as acknowledged
}

// refusal is a version that the proxy did not accept, and the push since when the
// proxy is behind because of it.
type refusal struct {
	version string
	push    uint64
}

// batch is a part of a refused response.
type batch struct {
	names []string
	push  uint64
}

// flight is a response that is not answered yet.
type flight struct {
	nonce     string
	revision  uint64
	resources []*Resource
	aliases   map[string][]string // by name of a resource: what else it answers
	removed   []string
	removal   bool   // removes what existed, and does nothing else
	push      uint64 // the oldest push that it holds something of
	last      bool   // it leaves nothing unsent of its revision
	answers   bool   // it holds something that was subscribed to just now
}

// wants says that the proxy asked for a name, by itself or by "*".
func (t *typeState) wants(name string) bool { return t.wildcard || t.names.has(name) }

// arriving says that clusters, or endpoints that one waits for, are on their way.
// Endpoints that only changed hold up nothing.
func (t *typeState) arriving() bool {
	updating := t.flight != nil && !t.flight.removal
	switch t.rank {
	case rankCluster:
		return updating
	case rankEndpoint:
		return t.answers.len() > 0 || updating && t.flight.answers
	}
	return false
}

// unsent is the oldest push of which an update is not sent yet.
func (t *typeState) unsent() uint64 {
	if t == nil {
		return never
	}
	return t.changed.oldest()
}

// unaccepted is the oldest push of which an update is not accepted yet, because
// it is not sent, not answered, or refused.
func (t *typeState) unaccepted() uint64 {
	if t == nil {
		return never
	}
	oldest := min(t.changed.oldest(), t.answers.oldest())
	if t.flight != nil && !t.flight.removal {
		oldest = min(oldest, t.flight.push)
	}
	for _, b := range t.retries {
		oldest = min(oldest, b.push)
	}
	for _, r := range t.refused {
		oldest = min(oldest, r.push)
	}
	return oldest
}

// pending is the oldest push of which an update of a name may not be accepted yet.
func (t *typeState) pending(name string) uint64 {
	oldest := uint64(never)
	if t.changed.has(name) {
		oldest = t.changed.since
	}
	if r, ok := t.refused[name]; ok {
		oldest = min(oldest, r.push)
	}
	if f := t.flight; f != nil && slices.ContainsFunc(f.resources, func(r *Resource) bool { return r.Name == name }) {
		oldest = min(oldest, f.push)
	}
	for _, b := range t.retries {
		if slices.Contains(b.names, name) {
			oldest = min(oldest, b.push)
		}
	}
	return oldest
}

// unremoved is the oldest push of which a removal is not accepted yet.
func (t *typeState) unremoved() uint64 {
	if t == nil {
		return never
	}
	oldest := uint64(never)
	if t.flight != nil && t.flight.removal {
		oldest = t.flight.push
	}
	return min(oldest, t.removals.oldest())
}

// answered says that the proxy has answered for all updates that there are. Names
// that the View awaits don't count: they may come only after this is known.
func (t *typeState) answered() bool {
	return (!t.owed || t.answers.len() > 0) && !t.filling &&
		t.changed.len() == 0 && len(t.retries) == 0 &&
		(t.flight == nil || t.flight.removal)
}
