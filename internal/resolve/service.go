package resolve

import (
	"cmp"
	"slices"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

// serviceSet is what a view holds of a shard: one service a host, but for ServiceEntries
// of one namespace that each serve other ports of a host. Order is that of
// precedence: the older first.
type serviceSet struct {
	list   []*model.Service
	byHost map[string][]*model.Service
	byPort map[uint32][]*model.Service
}

func (s *serviceSet) equal(o *serviceSet) bool { return equalRows(s.list, o.list) }

func equalRows[V interface {
	comparable
	Equal(V) bool
}](a, b []V) bool {
	return slices.EqualFunc(a, b, func(x, y V) bool { return x == y || x.Equal(y) })
}

// view is what a group of proxies sees of the services or of the VirtualServices:
// those of a namespace, narrowed by a Sidecar, if there is one. Namespace "" stands
// for all namespaces that nothing is private to.
type view struct {
	Namespace string
	Sidecar   ir.ObjectKey
}

func viewOf(v ir.Visibility) view { return view{v.Namespace, v.Sidecar} }

// serviceView is whose view of the services a namespace shares.
var serviceView = store.NewRule("service view", equal[view], func(r *store.Reader, v view) view {
	def := meshConfig(r).Mesh.GetDefaultServiceExportTo()
	if !hasScopes(r, servicesByScope, privateScopes(def, v.Namespace)) && !store.Eval(r, namesOwnHosts, v.Sidecar) {
		v.Namespace = ""
	}
	return v
})

// newServiceSet drops what loses its host to another, and sorts rows in place.
func newServiceSet(rows []*model.Service) *serviceSet {
	slices.SortFunc(rows, olderService)
	candidates := make(map[string][]*model.Service, len(rows)) // the winner first
	for _, s := range rows {
		of := candidates[s.Key.Host]
		if len(of) > 0 && of[0].Key.Kind == model.ServiceEntry && s.Key.Kind == model.KubernetesService {
			candidates[s.Key.Host] = append([]*model.Service{s}, of...)
		} else {
			candidates[s.Key.Host] = append(of, s)
		}
	}
	set := &serviceSet{byHost: make(map[string][]*model.Service, len(candidates)), byPort: map[uint32][]*model.Service{}}
	for host, of := range candidates {
		set.byHost[host] = slices.DeleteFunc(of, func(s *model.Service) bool {
			return s != of[0] && !sharesHost(of[0], s)
		})
	}
	for _, s := range rows {
		of := set.byHost[s.Key.Host]
		if !slices.Contains(of, s) {
			continue
		}
		set.list = append(set.list, s)
		for _, p := range s.Ports {
			at := set.byPort[p.Number]
			if p.Protocol != model.UDP && servingPort(of, p.Number) == s && (len(at) == 0 || at[len(at)-1] != s) {
				set.byPort[p.Number] = append(at, s)
			}
		}
	}
	return set
}

// sharesHost: ServiceEntries of one namespace may each add ports to a host.
func sharesHost(winner, s *model.Service) bool {
	return winner.Key.Kind == model.ServiceEntry && s.Key.Kind == model.ServiceEntry &&
		winner.Key.Namespace == s.Key.Namespace && winner.Resolution == s.Resolution && winner.External == s.External
}

// servingPort is the first service of a host that has the port.
func servingPort(of []*model.Service, number uint32) *model.Service {
	for _, s := range of {
		if _, ok := portOf(s, number); ok {
			return s
		}
	}
	return nil
}

// viewPort and viewHost ask for a part of a view. Others are by shard (shard.go).
type (
	viewPort struct {
		View view
		Port uint32
	}
	viewHost struct {
		View view
		Host string
	}
)

var servicesByHost = store.NewIndex(store.Services, "services by host",
	func(k model.ServiceKey, _ *model.Service) []string { return []string{k.Host} })

// hostServices are the services of a host that a namespace sees, found without the
// others, whether a Sidecar narrows or not.
var hostServices = store.NewRule("services of a host", equalRows[*model.Service],
	func(r *store.Reader, k viewHost) []*model.Service {
		def := meshConfig(r).Mesh.GetDefaultServiceExportTo()
		var visible []*model.Service
		for _, s := range store.Lookup(r, servicesByHost, k.Host) {
			if exported(s.ExportTo, def, s.Key.Namespace, k.View.Namespace) {
				visible = append(visible, s)
			}
		}
		return newServiceSet(visible).byHost[k.Host]
	})

// kubernetesFirst orders services as they take names from each other.
func kubernetesFirst(a, b servedPort) int {
	return cmp.Or(cmp.Compare(a.Key.Kind, b.Key.Kind), a.Created.Compare(b.Created), compareServiceKeys(a.Key, b.Key))
}
