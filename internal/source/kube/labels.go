package kube

import (
	"cmp"
	"maps"
	"strings"

	"isthmus.dev/internal/model"
)

// Labels and annotations of Istio and Kubernetes that rows are made of.
const (
	labelTLSMode           = "security.istio.io/tlsMode"
	labelNetwork           = "topology.istio.io/network"
	labelRegion            = "topology.kubernetes.io/region"
	labelZone              = "topology.kubernetes.io/zone"
	labelSubzone           = "topology.istio.io/subzone"
	labelLocality          = "topology.istio.io/locality"
	labelLegacyLocality    = "istio-locality"
	labelCanonicalName     = "service.istio.io/canonical-name"
	labelCanonicalRevision = "service.istio.io/canonical-revision"
	labelWorkloadName      = "service.istio.io/workload-name"

	annotationStatus   = "sidecar.istio.io/status"
	annotationGroup    = "istio.io/autoRegistrationGroup"
	annotationExportTo = "networking.istio.io/exportTo"
	annotationChecked  = "proxy.istio.io/health-checks-enabled"

	proxyContainer = "istio-proxy"
)

// withCanonical adds the canonical service's name and revision, which telemetry
// of every workload has, where the object does not say them itself.
func withCanonical(labels map[string]string, workload string) map[string]string {
	name := cmp.Or(labels[labelCanonicalName], labels["app.kubernetes.io/name"], labels["app"], workload)
	revision := cmp.Or(labels[labelCanonicalRevision], labels["app.kubernetes.io/version"], labels["version"], "latest")
	if labels[labelCanonicalName] == name && labels[labelCanonicalRevision] == revision {
		return labels
	}
	all := make(map[string]string, len(labels)+2)
	maps.Copy(all, labels)
	all[labelCanonicalName], all[labelCanonicalRevision] = name, revision
	return all
}

// localityOf the workload's own labels: slashes are not possible in them, so
// dots stand for them.
func localityOf(labels map[string]string) (model.Locality, bool) {
	v := cmp.Or(labels[labelLocality], labels[labelLegacyLocality])
	if v == "" {
		return model.Locality{}, false
	}
	if !strings.Contains(v, "/") {
		v = strings.ReplaceAll(v, ".", "/")
	}
	return parseLocality(v), true
}

// parseLocality reads region/zone/subzone.
func parseLocality(s string) model.Locality {
	parts := strings.SplitN(s, "/", 3)
	parts = append(parts, "", "")
	return model.Locality{Region: parts[0], Zone: parts[1], Subzone: parts[2]}
}
