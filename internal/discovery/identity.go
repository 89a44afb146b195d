package discovery

import (
	"context"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
	"isthmus.dev/internal/xds"
)

// instances finds workloads by namespace and name, whatever their account.
var instances = store.NewIndex(store.Workloads, "workloads by instance",
	func(k workloadKey, _ *model.Workload) []model.Key {
		return []model.Key{{Namespace: k.Namespace, Name: k.Instance}}
	})

// authenticate tells which workload a proxy is. Of what the node says only its
// name counts, and only if the peer proved the namespace, the row of that name has
// the account that it proved, and it is the workload that the peer proved to be: an
// account may be shared by many. (Istio's own agents prove the account only.) Labels
// in the node's metadata are ignored: a workload is what its row says.
func (m *Mesh) authenticate(ctx context.Context, peer xds.Peer, node *corev3.Node) (workloadKey, error) {
	key, err := parseNode(node.GetId())
	if err != nil {
		return key, err
	}
	if peer.Identity == "" {
		if !m.opts.AllowUnauthenticated {
			return key, status.Error(codes.Unauthenticated, "the peer presented no certificate and no token; connect with the workload's certificate")
		}
		if key.ServiceAccount = claimOf(node, "SERVICE_ACCOUNT"); key.ServiceAccount == "" {
			key.ServiceAccount = "default"
		}
		return key, nil
	}
	id, err := spiffeid.FromString(peer.Identity)
	if err != nil {
		return key, status.Errorf(codes.PermissionDenied, "the peer's identity is no SPIFFE id: %v", err)
	}
	namespace, account, ok := parseAccount(id)
	if !ok {
		return key, status.Errorf(codes.PermissionDenied, "identity %s is not of a service account (spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/ACCOUNT)", id)
	}
	if namespace != key.Namespace {
		return key, status.Errorf(codes.PermissionDenied, "node %q claims namespace %s, its certificate is of namespace %s; a proxy can only be of its certificate's namespace",
			node.GetId(), key.Namespace, namespace)
	}
	key.ServiceAccount = account
	if err := m.checkTrustDomain(id); err != nil {
		return key, err
	}
	if name := peer.Instance.Name; name != "" && name != key.Instance {
		return key, status.Errorf(codes.PermissionDenied, "node %q claims to be %s, the peer is %s of the same service account by its certificate; connect with the certificate of the workload itself",
			node.GetId(), key.Instance, name)
	}
	wait, cancel := context.WithTimeout(ctx, m.opts.Patience)
	defer cancel()
	if _, err := m.store.WaitFor(wait, func(r *store.Reader) bool {
		w, ok := store.Get(r, store.Workloads, key)
		return ok && proves(peer.Instance, w)
	}); err == nil {
		return key, nil
	}
	return key, m.unknown(key, peer.Instance)
}

// proves tells whether a row is of the instance, not of one that had the name
// before it or has got it since.
func proves(i xds.Instance, w *model.Workload) bool { return i.Name == "" || i.UID == w.UID }

// unknown says why there is no such workload.
func (m *Mesh) unknown(key workloadKey, proved xds.Instance) (err error) {
	m.store.Read(func(r *store.Reader) {
		if w, ok := store.Get(r, store.Workloads, key); ok && !proves(proved, w) {
			err = status.Errorf(codes.PermissionDenied, "the peer's certificate is of another workload that had the name %s/%s; where it is to be in the mesh, invite it under a name of its own",
				key.Namespace, key.Instance)
			return
		}
		for _, w := range store.Lookup(r, instances, model.Key{Namespace: key.Namespace, Name: key.Instance}) {
			err = status.Errorf(codes.PermissionDenied, "workload %s/%s has service account %s, the peer's certificate is of %s; join the machine again, or correct the workload's service account",
				key.Namespace, key.Instance, w.Key.ServiceAccount, key.ServiceAccount)
		}
	})
	if err != nil {
		return err
	}
	return status.Errorf(codes.Unavailable, "no workload %s is registered in namespace %s; register it (isthmus-agent does so when it starts), or see whether its WorkloadEntry or Pod exists and has an address",
		key.Instance, key.Namespace)
}

func (m *Mesh) checkTrustDomain(id spiffeid.ID) (err error) {
	m.store.Read(func(r *store.Reader) {
		c, ok := store.Get(r, store.MeshConfigs, model.Key{})
		domain := id.TrustDomain().Name()
		if ok && domain != c.TrustDomain && !slices.Contains(c.Mesh.GetTrustDomainAliases(), domain) {
			err = status.Errorf(codes.PermissionDenied, "identity %s is not of the mesh's trust domain %s; name the other in MeshConfig's trustDomainAliases if it is trusted", id, c.TrustDomain)
		}
	})
	return err
}

// parseNode reads "sidecar~IP~NAME.NAMESPACE~DOMAIN".
func parseNode(id string) (workloadKey, error) {
	parts := strings.Split(id, "~")
	if len(parts) == 4 && (parts[0] == "sidecar" || parts[0] == "router") {
		// Names of objects may have dots, namespaces have none.
		if dot := strings.LastIndexByte(parts[2], '.'); dot > 0 && dot < len(parts[2])-1 {
			return workloadKey{Namespace: parts[2][dot+1:], Instance: parts[2][:dot]}, nil
		}
	}
	return workloadKey{}, status.Errorf(codes.InvalidArgument, "node id %q is not of the form sidecar~IP~NAME.NAMESPACE~DOMAIN; Envoy must be started by isthmus-agent, or with such an id", id)
}

func parseAccount(id spiffeid.ID) (namespace, account string, ok bool) {
	s := strings.Split(strings.TrimPrefix(id.Path(), "/"), "/")
	if len(s) != 4 || s[0] != "ns" || s[2] != "sa" {
		return "", "", false
	}
	return s[1], s[3], true
}

func claimOf(node *corev3.Node, name string) string {
	return node.GetMetadata().GetFields()[name].GetStringValue()
}

// claim writes a row for a peer that need not prove what it is, unless there is
// one. It has no address, so it is nobody's endpoint.
func (m *Mesh) claim(key workloadKey, node *corev3.Node) bool {
	m.claiming.Lock()
	defer m.claiming.Unlock()
	if m.claims[key] > 0 {
		m.claims[key]++
		return true
	}
	exists := false
	m.store.Read(func(r *store.Reader) { _, exists = store.Get(r, store.Workloads, key) })
	if exists {
		return false
	}
	m.claims[key] = 1
	labels := map[string]string{}
	for name, v := range node.GetMetadata().GetFields()["LABELS"].GetStructValue().GetFields() {
		labels[name] = v.GetStringValue()
	}
	b := &store.Batch{}
	store.Put(b, store.Workloads, key, &model.Workload{Key: key, Labels: labels, Network: claimOf(node, "NETWORK")})
	m.store.Commit(b)
	return true
}

func (m *Mesh) unclaim(key workloadKey) {
	m.claiming.Lock()
	defer m.claiming.Unlock()
	m.claims[key]--
	if m.claims[key] > 0 {
		return
	}
	delete(m.claims, key)
	b := &store.Batch{}
	store.Delete(b, store.Workloads, key)
	m.store.Commit(b)
}
