package resolve

import (
	"cmp"
	"maps"
	"slices"
	"strconv"
	"strings"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/model"
)

// ProxyKey names the workload that a proxy serves. OnDemand: the proxy can ask for
// what it does not have.
type ProxyKey struct {
	Workload model.WorkloadKey
	OnDemand bool
}

// serviceKey turns a row's key into the resolved mesh's.
func serviceKey(k model.ServiceKey) ir.ServiceKey {
	return ir.ServiceKey{Entry: k.Kind == model.ServiceEntry, Namespace: k.Namespace, Name: k.Name, Host: k.Host}
}

// serviceRow is serviceKey's inverse.
func serviceRow(k ir.ServiceKey) model.ServiceKey {
	kind := model.KubernetesService
	if k.Entry {
		kind = model.ServiceEntry
	}
	return model.ServiceKey{Kind: kind, Namespace: k.Namespace, Name: k.Name, Host: k.Host}
}

func objectKey(k model.Key) ir.ObjectKey { return ir.ObjectKey{Namespace: k.Namespace, Name: k.Name} }

func objectRow(k ir.ObjectKey) model.Key { return model.Key{Namespace: k.Namespace, Name: k.Name} }

func serviceRef(k model.ServiceKey) ir.ServiceRef {
	return ir.ServiceRef{Host: k.Host, Name: k.Name, Namespace: k.Namespace}
}

func compareServiceKeys(a, b model.ServiceKey) int {
	return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Namespace, b.Namespace),
		cmp.Compare(a.Name, b.Name), cmp.Compare(a.Host, b.Host))
}

// olderService orders services as they win: the older first, ties by key.
func olderService(a, b *model.Service) int {
	return cmp.Or(a.Created.Compare(b.Created), compareServiceKeys(a.Key, b.Key))
}

// olderMeta orders objects as they win: the older first, ties by key.
func olderMeta(a, b model.Meta) int {
	return cmp.Or(a.Created.Compare(b.Created), a.Key.Compare(b.Key))
}

// labelString is "k=v,k=v", sorted: labels as part of a key. Label keys and
// values hold neither of the separators.
func labelString(labels map[string]string) string {
	var b strings.Builder
	for i, k := range slices.Sorted(maps.Keys(labels)) {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteString(k)
		b.WriteByte('=')
		b.WriteString(labels[k])
	}
	return b.String()
}

// parseLabels is labelString's inverse.
func parseLabels(s string) map[string]string {
	labels := map[string]string{}
	for s != "" {
		var pair string
		pair, s, _ = strings.Cut(s, ",")
		k, v, _ := strings.Cut(pair, "=")
		labels[k] = v
	}
	return labels
}

// selects tells whether labels hold all of the selector's pairs.
func selects(selector, labels map[string]string) bool {
	for k, v := range selector {
		if got, ok := labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// clusterName is Istio's name of an outbound cluster.
func clusterName(port uint32, subset, host string) string {
	return "outbound|" + strconv.FormatUint(uint64(port), 10) + "|" + subset + "|" + host
}

// protocol is what the resolved mesh says of a declared protocol.
func protocol(p model.Protocol) ir.Protocol {
	switch p {
	case model.Auto:
		return ir.Auto
	case model.HTTP:
		return ir.HTTP1
	case model.HTTP2, model.GRPC:
		return ir.HTTP2
	default:
		return ir.TCP
	}
}

func portOf(s *model.Service, number uint32) (model.Port, bool) {
	for _, p := range s.Ports {
		if p.Number == number && p.Protocol != model.UDP {
			return p, true
		}
	}
	return model.Port{}, false
}
