package envoy

import (
	"encoding/base64"
	"fmt"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
)

// unknown is what Istio's telemetry says of what it does not know.
const unknown = "unknown"

// Environment holds what is this workload's own in telemetry. Outbound
// configuration is shared by all clients and refers to it by %ENVIRONMENT(X)%.
func (b Bootstrap) Environment() ([]string, error) {
	m := b.Membership
	labels := m.GetLabels()
	app := first(labels["app"], labels["app.kubernetes.io/name"])
	version := first(labels["version"], labels["app.kubernetes.io/version"])
	facts := []struct{ key, value string }{
		{"workload", m.GetWorkload()},
		{"namespace", m.GetNamespace()},
		{"principal", b.Principal},
		{"app", app},
		{"version", version},
		{"canonical_service", first(labels["service.istio.io/canonical-name"], app, m.GetWorkload())},
		{"canonical_revision", first(labels["service.istio.io/canonical-revision"], version, "latest")},
		{"cluster", m.GetCluster()},
	}
	var env []string
	peer := map[string]any{}
	for _, f := range facts {
		v := first(f.value, unknown)
		env = append(env, "ISTHMUS_"+strings.ToUpper(f.key)+"="+v)
		peer[f.key] = v
	}
	value, err := structpb.NewValue(peer)
	if err != nil {
		return nil, fmt.Errorf("peer metadata: %w", err)
	}
	raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(value)
	if err != nil {
		return nil, fmt.Errorf("peer metadata: %w", err)
	}
	return append(env,
		"ISTHMUS_PEER_METADATA="+base64.StdEncoding.EncodeToString(raw),
		"ISTHMUS_PEER_ID="+b.NodeID(),
	), nil
}

func locality(s string) *corev3.Locality {
	parts := strings.SplitN(s, "/", 3)
	for len(parts) < 3 {
		parts = append(parts, "")
	}
	return &corev3.Locality{Region: parts[0], Zone: parts[1], SubZone: parts[2]}
}

func first(values ...string) string {
	for _, v := range values {
		if v != "" {
			return v
		}
	}
	return ""
}
