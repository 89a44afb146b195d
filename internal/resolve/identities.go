package resolve

import (
	"slices"
	"strings"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/store"
)

// Identities are the SPIFFE ids of a service's endpoints, whatever their
// health, so that a probe changes no cluster.
var Identities = store.NewRule("identities of a service", slices.Equal[[]string],
	func(r *store.Reader, k ir.ServiceKey) []string {
		s, ok := store.Get(r, store.Services, serviceRow(k))
		if !ok {
			return nil
		}
		domains := trustDomains(meshConfig(r))
		var out []string
		add := func(namespace, account string) {
			if strings.HasPrefix(account, "spiffe://") {
				out = append(out, account)
				return
			}
			for _, d := range domains {
				out = append(out, "spiffe://"+d+"/ns/"+namespace+"/sa/"+account)
			}
		}
		for _, w := range store.Eval(r, selectedWorkloads, k) {
			if w.Key.ServiceAccount != "" {
				add(w.Key.Namespace, w.Key.ServiceAccount)
			}
		}
		for _, e := range s.Endpoints {
			if e.Account != "" {
				add(k.Namespace, e.Account)
			}
		}
		return sortedUnique(out)
	})

// AcceptedIdentities are those that the clusters of a service accept besides the
// Identities of its endpoints now. internal/discovery writes them, so that an
// identity is accepted for as long as some proxy may have an endpoint of it.
var AcceptedIdentities = store.NewTable[ir.ServiceKey, *ServiceIdentities]("accepted identities", compareKeys)

// ServiceIdentities is a row of AcceptedIdentities.
type ServiceIdentities struct {
	Service    ir.ServiceKey
	Identities []string // sorted
}

// Equal implements store.Row.
func (s *ServiceIdentities) Equal(o *ServiceIdentities) bool {
	return s.Service == o.Service && slices.Equal(s.Identities, o.Identities)
}

func compareKeys(a, b ir.ServiceKey) int {
	return compareServiceKeys(serviceRow(a), serviceRow(b))
}

// Services are the keys of all services.
func Services(r *store.Reader) []ir.ServiceKey {
	rows := store.All(r, store.Services)
	out := make([]ir.ServiceKey, len(rows))
	for i, s := range rows {
		out[i] = serviceKey(s.Key)
	}
	return out
}
