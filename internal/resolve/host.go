package resolve

import "strings"

// fullHost resolves a name without dots against a namespace, as Istio does for
// the hosts of its objects.
func fullHost(host, namespace, clusterDomain string) string {
	if host == "" || strings.ContainsAny(host, ".*") {
		return strings.ToLower(host)
	}
	return strings.ToLower(host) + "." + namespace + ".svc." + clusterDomain
}

func isWildcard(host string) bool { return strings.HasPrefix(host, "*") }

// hostMatches tells whether every name that host stands for is one of pattern's.
func hostMatches(pattern, host string) bool {
	if suffix, ok := strings.CutPrefix(pattern, "*"); ok {
		return strings.HasSuffix(strings.TrimPrefix(host, "*"), suffix)
	}
	return pattern == host
}

// moreSpecific orders host patterns: names without a wildcard first, then longer
// ones, then by name.
func moreSpecific(a, b string) int {
	if wa, wb := isWildcard(a), isWildcard(b); wa != wb {
		if wb {
			return -1
		}
		return 1
	}
	if len(a) != len(b) {
		return len(b) - len(a)
	}
	return strings.Compare(a, b)
}

// cutSuffixDot cuts "."+suffix off a name, if a single label is left.
func cutSuffixDot(host, suffix string) (string, bool) {
	short, ok := strings.CutSuffix(host, "."+suffix)
	if !ok || short == "" || strings.ContainsAny(short, ".*") {
		return "", false
	}
	return short, true
}
