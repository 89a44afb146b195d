package kube

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
	meshconfig "istio.io/api/mesh/v1alpha1"
	networking "istio.io/api/networking/v1alpha3"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

// DefaultMesh is what Istio takes where the ConfigMap says nothing.
func DefaultMesh(rootNamespace string) *meshconfig.MeshConfig {
	return &meshconfig.MeshConfig{
		TrustDomain: "cluster.local", RootNamespace: rootNamespace,
		EnableAutoMtls:           wrapperspb.Bool(true),
		EnablePrometheusMerge:    wrapperspb.Bool(true),
		ConnectTimeout:           durationpb.New(10 * time.Second),
		ProtocolDetectionTimeout: durationpb.New(0),
		DnsRefreshRate:           durationpb.New(60 * time.Second),
		OutboundTrafficPolicy:    &meshconfig.MeshConfig_OutboundTrafficPolicy{Mode: meshconfig.MeshConfig_OutboundTrafficPolicy_ALLOW_ANY},
		InboundTrafficPolicy:     &meshconfig.MeshConfig_InboundTrafficPolicy{},
		LocalityLbSetting:        &networking.LocalityLoadBalancerSetting{Enabled: wrapperspb.Bool(true)},
		IngressClass:             "istio", IngressService: "istio-ingressgateway",
		IngressControllerMode:          meshconfig.MeshConfig_STRICT,
		DefaultServiceExportTo:         []string{"*"},
		DefaultVirtualServiceExportTo:  []string{"*"},
		DefaultDestinationRuleExportTo: []string{"*"},
		DefaultConfig: &meshconfig.ProxyConfig{
			ConfigPath: "./etc/istio/proxy", BinaryPath: "/usr/local/bin/envoy",
			ClusterName:              &meshconfig.ProxyConfig_ServiceCluster{ServiceCluster: "istio-proxy"},
			DiscoveryAddress:         "istiod." + rootNamespace + ".svc:15012",
			DrainDuration:            durationpb.New(45 * time.Second),
			TerminationDrainDuration: durationpb.New(5 * time.Second),
			ProxyAdminPort:           15000, StatusPort: 15020, StatNameLength: 189,
			ControlPlaneAuthPolicy: meshconfig.AuthenticationPolicy_MUTUAL_TLS,
		},
	}
}

// syncMesh writes the mesh's configuration if it changed, and says whether
// networks did, which are part of other rows. What cannot be read leaves what
// was before in effect: a ConfigMap has no status, so the log says why.
func (s *Source) syncMesh(b *store.Batch, changed map[ref]struct{}) bool {
	_, config := changed[ref{kindConfigMap, s.meshConfigKey()}]
	root := ref{kindNamespace, model.Key{Name: s.cfg.RootNamespace}}
	_, namespace := changed[root]
	if !config && !namespace {
		return false
	}
	before := s.networks
	if config {
		s.readMesh(b)
	}
	s.networks.root = ""
	if ns, ok := get[*model.Namespace](s, root); ok {
		s.networks.root = ns.Labels[labelNetwork]
	}
	return !before.equal(s.networks)
}

func (s *Source) readMesh(b *store.Batch) {
	data := map[string]string{}
	if cm, ok := get[*corev1.ConfigMap](s, ref{kindConfigMap, s.meshConfigKey()}); ok {
		data = cm.Data
	}
	mesh, err := s.parseMesh(data["mesh"])
	switch {
	case err == nil:
	case s.mesh != nil:
		s.cfg.Log.Error("mesh configuration refused, the last one stays in effect", "configmap", s.meshConfigKey().String(), "error", err)
		mesh = s.mesh.Mesh
	default:
		s.cfg.Log.Error("mesh configuration refused, the defaults are in effect", "configmap", s.meshConfigKey().String(), "error", err)
		mesh = DefaultMesh(s.cfg.RootNamespace)
	}
	s.mesh = &model.MeshConfig{
		Mesh: mesh, RootNamespace: s.cfg.RootNamespace, TrustDomain: cmp.Or(mesh.GetTrustDomain(), "cluster.local"),
		ClusterDomain: s.cfg.ClusterDomain, Cluster: s.cfg.Cluster,
	}
	store.Put(b, store.MeshConfigs, model.Key{}, s.mesh)
	if networks, err := parseNetworks(data["meshNetworks"], s.cfg.Cluster); err != nil {
		s.cfg.Log.Error("mesh networks refused, the last ones stay in effect", "configmap", s.meshConfigKey().String(), "error", err)
	} else {
		s.networks = networks
	}
}

// parseMesh lays what the ConfigMap says over the defaults.
func (s *Source) parseMesh(text string) (*meshconfig.MeshConfig, error) {
	mesh := DefaultMesh(s.cfg.RootNamespace)
	said := &meshconfig.MeshConfig{}
	unknown, err := unmarshalYAML(text, said)
	if err != nil {
		return nil, fmt.Errorf("key mesh: %w", err)
	}
	if len(unknown) > 0 {
		s.cfg.Log.Warn("fields of the mesh configuration are not known and have no effect", "fields", unknown)
	}
	overlay(mesh.ProtoReflect(), said.ProtoReflect())
	if said.GetRootNamespace() != "" && said.GetRootNamespace() != s.cfg.RootNamespace {
		s.cfg.Log.Warn("rootNamespace of the mesh configuration has no effect", "says", said.GetRootNamespace(), "is", s.cfg.RootNamespace)
		mesh.RootNamespace = s.cfg.RootNamespace
	}
	return mesh, nil
}

// istioMessage is one of Istio's: its own JSON takes durations such as "1h".
type istioMessage interface {
	proto.Message
	json.Unmarshaler
}

// unmarshalYAML reads YAML into a message, and names the fields that it does not
// have: they may be of a newer Istio.
func unmarshalYAML(text string, to istioMessage) (unknown []string, err error) {
	var fields any
	if err := yaml.Unmarshal([]byte(text), &fields); err != nil {
		return nil, fmt.Errorf("not YAML: %w", err)
	}
	if fields == nil {
		return nil, nil
	}
	encoded, err := json.Marshal(fields)
	if err != nil {
		return nil, err
	}
	if err := to.UnmarshalJSON(encoded); err != nil {
		return nil, err
	}
	return unknownFields(to.ProtoReflect().Descriptor(), fields, ""), nil
}

func unknownFields(d protoreflect.MessageDescriptor, value any, at string) []string {
	if list, ok := value.([]any); ok {
		var names []string
		for i, element := range list {
			names = append(names, unknownFields(d, element, fmt.Sprintf("%s[%d]", at, i))...)
		}
		return names
	}
	object, ok := value.(map[string]any)
	if !ok || d.ParentFile().Package() == "google.protobuf" {
		return nil
	}
	var names []string
	for _, name := range slices.Sorted(maps.Keys(object)) {
		f := d.Fields().ByJSONName(name)
		if f == nil {
			f = d.Fields().ByTextName(name)
		}
		switch path := strings.TrimPrefix(at+"."+name, "."); {
		case f == nil:
			names = append(names, path)
		case f.Message() != nil && !f.IsMap():
			names = append(names, unknownFields(f.Message(), object[name], path)...)
		}
	}
	return names
}

// overlay replaces in a message what another one sets: lists and maps as a
// whole, messages field by field, except for wrapped scalars and durations.
func overlay(to, from protoreflect.Message) {
	from.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		nested := f.Kind() == protoreflect.MessageKind && !f.IsList() && !f.IsMap()
		if nested && f.Message().ParentFile().Package() != "google.protobuf" && to.Has(f) {
			overlay(to.Mutable(f).Message(), v.Message())
		} else {
			to.Set(f, v)
		}
		return true
	})
}
