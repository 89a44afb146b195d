package resolve

import (
	"maps"
	"slices"
	"strings"

	networking "istio.io/api/networking/v1alpha3"

	"isthmus.dev/internal/ir"
)

// headers are the operations, each list in the order of names. Envoy refuses
// operations on the host and on pseudo-headers; setting the host is kept, for
// takeHost.
func headers(h *networking.Headers_HeaderOperations) ir.Headers {
	return ir.Headers{
		Set:    headerList(h.GetSet(), func(name string) bool { return isHost(name) || !isPseudo(name) }),
		Add:    headerList(h.GetAdd(), func(name string) bool { return !isHost(name) && !isPseudo(name) }),
		Remove: removals(h.GetRemove()),
	}
}

func headerList(in map[string]string, allowed func(string) bool) []ir.Header {
	var out []ir.Header
	for _, name := range slices.Sorted(maps.Keys(in)) {
		if allowed(name) {
			out = append(out, ir.Header{Name: name, Value: in[name]})
		}
	}
	return out
}

func removals(in []string) []string {
	var out []string
	for _, name := range in {
		if !isHost(name) && !isPseudo(name) {
			out = append(out, name)
		}
	}
	return out
}

func isHost(name string) bool { return strings.EqualFold(name, "host") || name == ":authority" }

func isPseudo(name string) bool { return name == "" || strings.HasPrefix(name, ":") }

// takeHost takes an operation that sets the host out of the others: Envoy has it
// as a rewrite.
func takeHost(h ir.Headers) (string, ir.Headers) {
	i := slices.IndexFunc(h.Set, func(x ir.Header) bool { return isHost(x.Name) })
	if i < 0 {
		return "", h
	}
	host := h.Set[i].Value
	h.Set = slices.DeleteFunc(slices.Clone(h.Set), func(x ir.Header) bool { return isHost(x.Name) })
	if len(h.Set) == 0 {
		h.Set = nil
	}
	return host, h
}
