package resolve

import (
	"fmt"
	"slices"

	networking "istio.io/api/networking/v1alpha3"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

// clusterTLS says how a cluster is connected to: as a rule says, else with mTLS
// to whatever endpoint answers it.
func clusterTLS(r *store.Reader, m *model.MeshConfig, k ir.ClusterKey, c clusterInputs, kind ir.ClusterKind) ir.ClusterTLS {
	settings := c.policy.GetTls()
	if settings == nil {
		if !autoMTLS(m) || c.service.External {
			return ir.ClusterTLS{Mode: ir.TLSDisable}
		}
		out := meshTLS(r, m, k, c)
		if kind == ir.OriginalDst {
			// There is no endpoint to tell by: all of them must answer it.
			out.Mode = ir.TLSDisable
			if store.Eval(r, allMTLS, k) {
				out.Mode = ir.TLSIstioMutual
			}
		}
		if out.Mode == ir.TLSDisable {
			return ir.ClusterTLS{Mode: ir.TLSDisable}
		}
		return out
	}
	switch settings.GetMode() {
	case networking.ClientTLSSettings_ISTIO_MUTUAL:
		out := meshTLS(r, m, k, c)
		out.Mode = ir.TLSIstioMutual
		if sni := settings.GetSni(); sni != "" {
			out.SNI = sni
		}
		if len(settings.GetSubjectAltNames()) > 0 {
			out.SANs = sortedUnique(settings.GetSubjectAltNames())
		}
		return out
	case networking.ClientTLSSettings_SIMPLE, networking.ClientTLSSettings_MUTUAL:
		return ownTLS(settings, c.service)
	default:
		return ir.ClusterTLS{Mode: ir.TLSDisable}
	}
}

func ownTLS(settings *networking.ClientTLSSettings, s *model.Service) ir.ClusterTLS {
	out := ir.ClusterTLS{
		Mode:               ir.TLSSimple,
		SNI:                settings.GetSni(),
		SANs:               sortedUnique(settings.GetSubjectAltNames()),
		CA:                 settings.GetCaCertificates(),
		InsecureSkipVerify: settings.GetInsecureSkipVerify().GetValue(),
	}
	if len(out.SANs) == 0 {
		out.SANs = sortedUnique(s.SANs)
	}
	if settings.GetMode() == networking.ClientTLSSettings_MUTUAL {
		out.Mode, out.Cert, out.Key = ir.TLSMutual, settings.GetClientCertificate(), settings.GetPrivateKey()
	}
	return out
}

func meshTLS(r *store.Reader, m *model.MeshConfig, k ir.ClusterKey, c clusterInputs) ir.ClusterTLS {
	identities := store.Eval(r, Identities, k.Service)
	if accepted, ok := store.Get(r, AcceptedIdentities, k.Service); ok {
		identities = slices.Concat(identities, accepted.Identities)
	}
	return ir.ClusterTLS{
		Mode:         ir.TLSAuto,
		SNI:          fmt.Sprintf("outbound_.%d_.%s_.%s", k.Port, k.Subset, k.Service.Host),
		SANs:         sortedUnique(slices.Concat(c.service.SANs, identities)),
		TrustDomains: trustDomains(m),
	}
}

func sortedUnique(in []string) []string {
	out := slices.Clone(in)
	slices.Sort(out)
	return slices.Compact(out)
}
