package xds

import (
	"slices"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// world speaks the state-of-the-world variant for a session: it turns requests
// into those of the delta variant, and what the session puts in flight into
// responses that hold all clusters or listeners, or those endpoints or routes that
// changed. Order, acknowledgements and refusals are the session's.
//
// What the delta variant says by removal, this one says by omission, so it does
// list what the client has. That is also what version_info is the hash of: a client
// that comes back with it, and for which nothing changed, is sent nothing.
type world struct {
	session *session
	types   map[string]*worldType
}

// worldType is what a client has of one type.
type worldType struct {
	state *typeState
	full  bool // what a response leaves out is gone
	all   bool // names were never given, which stands for "*"
	// blind: the client brought something else than it is to have, and accepted
	// nothing since. What it has is not known, so nothing is left out for a try.
	blind bool
	equal bool   // it brought just what it is to have
	sent  bool   // something, on this stream
	nonce string // of the newest response

	has  holding // accepted
	next holding // when what is in flight is
}

func newWorld(s *session) *world { return &world{session: s, types: map[string]*worldType{}} }

// receive takes in one request.
func (w *world) receive(req *discoveryv3.DiscoveryRequest) error {
	if req.TypeUrl == "" {
		return status.Error(codes.InvalidArgument, "discovery request names no type_url")
	}
	t := w.types[req.TypeUrl]
	if t == nil {
		return w.open(req)
	}
	// Answers to older responses are followed by one to the newest, which names all
	// that the client wants by then.
	if req.ResponseNonce != "" && req.ResponseNonce != t.nonce {
		return nil
	}
	if f := t.state.flight; f != nil && f.nonce == req.ResponseNonce {
		w.answer(t, f, req)
	}
	return w.subscribe(t, req.ResourceNames)
}

// open takes in the first request for a type.
func (w *world) open(req *discoveryv3.DiscoveryRequest) error {
	rank := rankOf(req.TypeUrl)
	t := &worldType{full: rank == rankCluster || rank == rankListener, all: len(req.ResourceNames) == 0}
	delta := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: req.TypeUrl, ResourceNamesSubscribe: req.ResourceNames}
	if req.VersionInfo != "" {
		now := w.wanted(req.TypeUrl, req.ResourceNames, t.full && t.all)
		if clusters := w.types[ClusterType]; now.version() == req.VersionInfo &&
			// The endpoints of a cluster that is sent are sent with it.
			(rank != rankEndpoint || clusters == nil || !clusters.sent) {
			t.has, t.equal = now, true
			delta.InitialResourceVersions = make(map[string]string, len(now.list))
			for _, r := range now.list {
				delta.InitialResourceVersions[r.Name] = r.Version
			}
		} else {
			t.blind = t.full
		}
	}
	if err := w.session.receive(delta); err != nil {
		return err
	}
	t.state = w.session.find(req.TypeUrl)
	// A part of a full type would remove the rest.
	t.state.whole = t.full
	w.types[req.TypeUrl] = t
	return nil
}

// wanted is what the View gives of names, or of "*".
func (w *world) wanted(typeURL string, names []string, all bool) holding {
	var list []*Resource
	if all || slices.Contains(names, "*") {
		list = slices.Collect(w.session.view.All(typeURL))
	}
	for _, name := range names {
		if r := w.session.view.Get(typeURL, name); r != nil {
			list = append(list, r)
		}
	}
	return holding{}.with(list, nil)
}

// subscribe makes a request's names those that the client is subscribed to.
func (w *world) subscribe(t *worldType, names []string) error {
	state := t.state
	if t.all && len(names) == 0 {
		return nil
	}
	t.all = false
	delta := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: state.url}
	kept := 0
	for _, name := range names {
		if name == "*" && state.wildcard {
			continue
		}
		if name != "*" && state.names.has(name) {
			kept++
			continue
		}
		delta.ResourceNamesSubscribe = append(delta.ResourceNamesSubscribe, name)
	}
	if kept != state.names.len() || state.wildcard {
		delta.ResourceNamesUnsubscribe = missing(state, names)
	}
	if len(delta.ResourceNamesSubscribe)+len(delta.ResourceNamesUnsubscribe) == 0 {
		return nil
	}
	if err := w.session.receive(delta); err != nil {
		return err
	}
	if len(delta.ResourceNamesUnsubscribe) > 0 {
		t.has, t.next = t.has.only(state.wants), t.next.only(state.wants)
	}
	return nil
}

// missing are the subscribed names that a request does not name.
func missing(t *typeState, names []string) (out []string) {
	named := make(map[string]struct{}, len(names))
	for _, name := range names {
		named[name] = struct{}{}
	}
	if _, ok := named["*"]; t.wildcard && !ok {
		out = append(out, "*")
	}
	for name := range t.names.all() {
		if _, ok := named[name]; !ok {
			out = append(out, name)
		}
	}
	return out
}

// answer takes in what the client made of the response in flight.
func (w *world) answer(t *worldType, f *flight, req *discoveryv3.DiscoveryRequest) {
	delta := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: req.TypeUrl, ResponseNonce: req.ResponseNonce, ErrorDetail: req.ErrorDetail}
	if req.ErrorDetail == nil {
		t.accept()
	} else if t.blind {
		t.blame(f, delta)
	}
	t.next = holding{}
	w.session.answer(t.state, delta)
}

func (t *worldType) accept() { t.has, t.blind = t.next, false }

// blame settles who is to blame for a refusal without sending parts apart. The
// others are in use by then: Envoy applies of clusters and listeners what it can.
func (t *worldType) blame(f *flight, answer *discoveryv3.DeltaDiscoveryRequest) {
	t.state.tries = maxTries
	detail := answer.ErrorDetail.GetMessage()
	named := func(r *Resource) bool { return mentions(detail, r.Name) }
	if !slices.ContainsFunc(t.next.list, named) {
		return
	}
	f.resources = slices.DeleteFunc(f.resources, func(r *Resource) bool {
		if named(r) {
			return false
		}
		delete(t.state.refused, r.Name)
		return true
	})
	if len(f.resources) == 0 {
		answer.ErrorDetail = nil // all that it names was refused before
	}
}

// next gives the next response to send, or nil when everything that can be sent
// now has been.
func (w *world) next() *worldResponse {
	for {
		state, f := w.session.take()
		if f == nil {
			return nil
		}
		t := w.types[state.url]
		if t != nil {
			if resp := w.response(t, f); resp != nil {
				return resp
			}
			t.accept()
		}
		// What can't be said in this variant is taken as read.
		w.session.answer(state, &discoveryv3.DeltaDiscoveryRequest{ResponseNonce: f.nonce})
	}
}

// response is the form of what is in flight in this variant; nil if it has none.
func (w *world) response(t *worldType, f *flight) *worldResponse {
	t.next = t.has.with(f.resources, f.removed)
	list := f.resources
	switch {
	case !t.full:
		if len(list) == 0 {
			return nil // what is gone goes with the cluster or listener that used it
		}
	case t.blind:
		t.next = w.wanted(t.state.url, slices.Collect(t.state.names.all()), t.state.wildcard)
		list = t.next.list
	default:
		if t.equal && !t.sent && len(list)+len(f.removed) == 0 {
			return nil
		}
		list = t.next.list
	}
	t.sent, t.nonce = true, f.nonce
	w.session.counters.sent(t.state.rank, list, 0)
	return &worldResponse{typeURL: t.state.url, nonce: f.nonce, version: t.next.version(), resources: list}
}
