package render

import (
	"regexp"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"

	"isthmus.dev/internal/ir"
)

// maxHeaderValue is Envoy's limit.
const maxHeaderValue = 16384

// headerOperations are ir.Headers in Envoy's terms.
type headerOperations struct {
	add    []*corev3.HeaderValueOption
	remove []string
	host   string // what "host" is set to: Envoy has a field of its own for that
}

func headers(h ir.Headers) (out headerOperations) {
	operate := func(list []ir.Header, action corev3.HeaderValueOption_HeaderAppendAction) {
		for _, x := range list {
			if isHost(x.Name) {
				if validValue(x.Value) && x.Value != "" {
					out.host = x.Value
				}
				continue
			}
			if validName(x.Name) && len(x.Value) <= maxHeaderValue/2 && validValue(x.Value) {
				out.add = append(out.add, headerOption(x.Name, headerFormat(x.Value), action))
			}
		}
	}
	operate(h.Set, corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD)
	operate(h.Add, corev3.HeaderValueOption_APPEND_IF_EXISTS_OR_ADD)
	for _, name := range h.Remove {
		if validName(name) && !isHost(name) {
			out.remove = append(out.remove, name)
		}
	}
	return out
}

func headerOption(name, value string, action corev3.HeaderValueOption_HeaderAppendAction) *corev3.HeaderValueOption {
	return &corev3.HeaderValueOption{Header: &corev3.HeaderValue{Key: name, Value: value}, AppendAction: action}
}

func isHost(name string) bool {
	return strings.EqualFold(name, "host") || name == ":authority"
}

// validName: a token of HTTP. Pseudo headers (":path") can be matched but not
// changed.
func validName(name string) bool {
	if name == "" || len(name) > 1024 {
		return false
	}
	for i := 0; i < len(name); i++ {
		if c := name[i]; !isAlnum(c) && !strings.ContainsRune("!#$%&'*+-.^_`|~", rune(c)) {
			return false
		}
	}
	return true
}

func isAlnum(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
}

// matchable is validName or the name of a pseudo header.
func matchable(name string) bool { return validName(strings.TrimPrefix(name, ":")) }

func validValue(value string) bool {
	for i := 0; i < len(value); i++ {
		if c := value[i]; c < ' ' && c != '\t' || c == 0x7f {
			return false
		}
	}
	return true
}

// Envoy's commands that a header value may hold, as Istio's users write them.
var (
	bareCommand = `START_TIME|PROTOCOL|RESPONSE_CODE|RESPONSE_FLAGS|HOSTNAME|REQUESTED_SERVER_NAME|ROUTE_NAME|UPSTREAM_CLUSTER|UPSTREAM_HOST|` +
		`UPSTREAM_(?:LOCAL|REMOTE)_(?:ADDRESS|PORT|ADDRESS_WITHOUT_PORT)|` +
		`DOWNSTREAM_(?:LOCAL|REMOTE|DIRECT_REMOTE)_(?:ADDRESS|PORT|ADDRESS_WITHOUT_PORT)|` +
		`DOWNSTREAM_(?:PEER|LOCAL)_(?:URI_SAN|DNS_SAN|SUBJECT)|` +
		`DOWNSTREAM_PEER_(?:ISSUER|SERIAL|FINGERPRINT_256|FINGERPRINT_1|CERT)|` +
		`DOWNSTREAM_TLS_(?:CIPHER|VERSION|SESSION_ID)`
	headerCommand   = `(?:REQ|RESP)\(:?[A-Za-z0-9_-]+\)`
	metadataCommand = `(?:DYNAMIC_METADATA|UPSTREAM_METADATA|CLUSTER_METADATA)\([A-Za-z0-9_.-]+(?::[A-Za-z0-9_.-]+)*\)`
	ownCommand      = `ENVIRONMENT\([A-Za-z0-9_]+\)`

	headerFormatRE = regexp.MustCompile(`^(?:[^%]|%%|%(?:` + bareCommand + `|` + headerCommand + `|` + metadataCommand + `|` + ownCommand + `)%)*$`)
)

// headerFormat is what Envoy formats to the value. A value that is made of
// Envoy's own commands is one already; in any other a "%" stands for itself.
func headerFormat(value string) string {
	if headerFormatRE.MatchString(value) {
		return value
	}
	return strings.ReplaceAll(value, "%", "%%")
}
