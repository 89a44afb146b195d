package kube

import (
	"strings"

	"sigs.k8s.io/yaml"
)

const (
	annotationProxyConfig = "proxy.istio.io/config"
	scopeSetting          = "ISTHMUS_SCOPE"
)

// scopeOf is how much of the mesh a workload's proxy is given, by the proxyMetadata
// of its own ProxyConfig: "on-demand" or "full"; "" is as the mesh says. Of an
// annotation that cannot be read nothing has an effect.
func scopeOf(annotations map[string]string) string {
	text := annotations[annotationProxyConfig]
	if !strings.Contains(text, scopeSetting) {
		return ""
	}
	var config struct {
		ProxyMetadata map[string]string `json:"proxyMetadata"`
	}
	if yaml.Unmarshal([]byte(text), &config) != nil {
		return ""
	}
	if scope := config.ProxyMetadata[scopeSetting]; scope == "on-demand" || scope == "full" {
		return scope
	}
	return ""
}
