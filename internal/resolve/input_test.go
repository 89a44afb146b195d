package resolve

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	meshconfig "istio.io/api/mesh/v1alpha1"
	networking "istio.io/api/networking/v1alpha3"
	security "istio.io/api/security/v1beta1"
	"sigs.k8s.io/yaml"

	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

// document is one object of an input file. Objects are as old as they stand
// early in the file.
type document struct {
	Kind     string `json:"kind"`
	Metadata struct {
		Name        string            `json:"name"`
		Namespace   string            `json:"namespace"`
		Labels      map[string]string `json:"labels"`
		Annotations map[string]string `json:"annotations"`
	} `json:"metadata"`
	Spec json.RawMessage `json:"spec"`
}

func (d document) key() model.Key {
	return model.Key{Namespace: d.Metadata.Namespace, Name: d.Metadata.Name}
}

func (d document) meta(age int) model.Meta {
	return model.Meta{Key: d.key(), Created: time.Unix(int64(1000+age), 0)}
}

// serviceInput is a core/v1 Service, as far as it concerns us.
type serviceInput struct {
	Selector  map[string]string `json:"selector"`
	ClusterIP string            `json:"clusterIP"`
	Ports     []struct {
		Name        string `json:"name"`
		Port        uint32 `json:"port"`
		TargetPort  any    `json:"targetPort"`
		AppProtocol string `json:"appProtocol"`
	} `json:"ports"`
	PublishNotReadyAddresses bool `json:"publishNotReadyAddresses"`
}

// workloadInput is a pod or a virtual machine.
type workloadInput struct {
	ServiceAccount string            `json:"serviceAccount"`
	Address        string            `json:"address"`
	Ports          map[string]uint32 `json:"ports"`
	PortsByService bool              `json:"portsByService"`
	Locality       string            `json:"locality"`
	Health         string            `json:"health"`
	NoSidecar      bool              `json:"noSidecar"`
	Weight         uint32            `json:"weight"`
}

func protocolOf(name, app string) model.Protocol {
	if app == "" {
		app, _, _ = strings.Cut(name, "-")
	}
	return map[string]model.Protocol{"http": model.HTTP, "http2": model.HTTP2, "grpc": model.GRPC, "https": model.HTTPS,
		"tls": model.TLS, "tcp": model.TCP, "mysql": model.TCP, "mongo": model.TCP, "udp": model.UDP}[strings.ToLower(app)]
}

func locality(s string) model.Locality {
	parts := append(strings.Split(s, "/"), "", "", "")
	return model.Locality{Region: parts[0], Zone: parts[1], Subzone: parts[2]}
}

// input is a mesh, and what of it is looked at.
type input struct {
	batch store.Batch
	shows []show
	age   int
}

func readInput(t *testing.T, file string) *input {
	t.Helper()
	in := &input{}
	in.read(t, file)
	return in
}

func (in *input) read(t *testing.T, file string) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	in.parse(t, file, string(text))
}

func (in *input) parse(t *testing.T, file, text string) {
	t.Helper()
	for _, part := range strings.Split(text, "\n---\n") {
		if included, ok := strings.CutPrefix(strings.TrimSpace(part), "# include "); ok {
			in.read(t, "testdata/"+included)
			continue
		}
		in.age++
		if err := in.add(part, in.age); err != nil {
			t.Fatalf("%s, object %d: %v", file, in.age, err)
		}
	}
}

func (in *input) add(text string, age int) error {
	var d document
	if err := yaml.Unmarshal([]byte(text), &d); err != nil {
		return err
	}
	b := &in.batch
	switch d.Kind {
	case "Show":
		var s show
		if err := json.Unmarshal(d.Spec, &s); err != nil {
			return err
		}
		in.shows = append(in.shows, s)
		return nil
	case "MeshConfig":
		spec := &meshconfig.MeshConfig{}
		err := json.Unmarshal(d.Spec, spec)
		store.Put(b, store.MeshConfigs, model.Key{}, &model.MeshConfig{
			Mesh: spec, RootNamespace: "istio-system", TrustDomain: "cluster.local", ClusterDomain: "cluster.local", Cluster: "Kubernetes"})
		return err
	case "Service":
		return in.service(d, age)
	case "Workload":
		return in.workload(d)
	case "ServiceEntry":
		return in.serviceEntry(d, age)
	case "VirtualService":
		return put(b, store.VirtualServices, d, age, &networking.VirtualService{})
	case "DestinationRule":
		return put(b, store.DestinationRules, d, age, &networking.DestinationRule{})
	case "Sidecar":
		return put(b, store.Sidecars, d, age, &networking.Sidecar{})
	case "PeerAuthentication":
		return put(b, store.PeerAuthentications, d, age, &security.PeerAuthentication{})
	case "AuthorizationPolicy":
		return put(b, store.AuthorizationPolicies, d, age, &security.AuthorizationPolicy{})
	default:
		return fmt.Errorf("kind %q is unknown", d.Kind)
	}
}

func put[S proto.Message](b *store.Batch, table *store.Table[model.Key, *model.Config[S]], d document, age int, spec S) error {
	if len(d.Spec) > 0 {
		if err := json.Unmarshal(d.Spec, spec); err != nil {
			return err
		}
	}
	store.Put(b, table, d.key(), &model.Config[S]{Meta: d.meta(age), Spec: spec})
	return nil
}

func (in *input) service(d document, age int) error {
	var spec serviceInput
	if err := json.Unmarshal(d.Spec, &spec); err != nil {
		return err
	}
	key := model.ServiceKey{Namespace: d.Metadata.Namespace, Name: d.Metadata.Name,
		Host: d.Metadata.Name + "." + d.Metadata.Namespace + ".svc.cluster.local"}
	s := &model.Service{Key: key, Created: d.meta(age).Created, Selector: spec.Selector, PublishNotReady: spec.PublishNotReadyAddresses}
	if spec.ClusterIP == "None" {
		s.Headless, s.Resolution = true, model.Passthrough
	} else if spec.ClusterIP != "" {
		a := netip.MustParseAddr(spec.ClusterIP)
		s.Addresses = []netip.Prefix{netip.PrefixFrom(a, a.BitLen())}
	}
	if to := d.Metadata.Annotations["networking.istio.io/exportTo"]; to != "" {
		s.ExportTo = strings.Split(to, ",")
	}
	for _, p := range spec.Ports {
		port := model.Port{Name: p.Name, Number: p.Port, Protocol: protocolOf(p.Name, p.AppProtocol)}
		switch target := p.TargetPort.(type) {
		case string:
			port.TargetName = target
		case float64:
			port.TargetPort = uint32(target)
		}
		s.Ports = append(s.Ports, port)
	}
	store.Put(&in.batch, store.Services, key, s)
	return nil
}

func (in *input) workload(d document) error {
	var spec workloadInput
	if err := json.Unmarshal(d.Spec, &spec); err != nil {
		return err
	}
	account := spec.ServiceAccount
	if account == "" {
		account = "default"
	}
	w := &model.Workload{
		Key:    model.WorkloadKey{Namespace: d.Metadata.Namespace, ServiceAccount: account, Instance: d.Metadata.Name},
		Labels: d.Metadata.Labels, Ports: spec.Ports, PortsByService: spec.PortsByService, Workload: d.Metadata.Labels["app"],
		Cluster: "Kubernetes", Locality: locality(spec.Locality), Weight: spec.Weight, TLS: model.TLSIstio,
		Health: map[string]model.Health{"unhealthy": model.Unhealthy, "draining": model.Draining}[spec.Health],
	}
	if spec.NoSidecar {
		w.TLS = model.TLSDisabled
	}
	if spec.Address != "" {
		w.Addresses = []netip.Addr{netip.MustParseAddr(spec.Address)}
	}
	store.Put(&in.batch, store.Workloads, w.Key, w)
	return nil
}

func (in *input) serviceEntry(d document, age int) error {
	spec := &networking.ServiceEntry{}
	if err := json.Unmarshal(d.Spec, spec); err != nil {
		return err
	}
	for _, host := range spec.GetHosts() {
		s := &model.Service{
			Key:     model.ServiceKey{Kind: model.ServiceEntry, Namespace: d.Metadata.Namespace, Name: d.Metadata.Name, Host: host},
			Created: d.meta(age).Created, Selector: spec.GetWorkloadSelector().GetLabels(), ExportTo: spec.GetExportTo(),
			External: spec.GetLocation() == networking.ServiceEntry_MESH_EXTERNAL, SANs: spec.GetSubjectAltNames(),
			Resolution: map[networking.ServiceEntry_Resolution]model.Resolution{
				networking.ServiceEntry_NONE: model.Passthrough, networking.ServiceEntry_STATIC: model.Static,
				networking.ServiceEntry_DNS: model.DNS, networking.ServiceEntry_DNS_ROUND_ROBIN: model.DNSRoundRobin}[spec.GetResolution()],
		}
		for _, a := range spec.GetAddresses() {
			p, ok := parsePrefix(a)
			if !ok {
				return fmt.Errorf("address %q", a)
			}
			s.Addresses = append(s.Addresses, p)
		}
		for _, p := range spec.GetPorts() {
			s.Ports = append(s.Ports, model.Port{Name: p.GetName(), Number: p.GetNumber(), Protocol: protocolOf("", p.GetProtocol()), TargetPort: p.GetTargetPort()})
		}
		for _, e := range spec.GetEndpoints() {
			listed := model.Endpoint{Ports: e.GetPorts(), Labels: e.GetLabels(), Locality: locality(e.GetLocality()), Weight: e.GetWeight(), Account: e.GetServiceAccount()}
			if a, err := netip.ParseAddr(e.GetAddress()); err == nil {
				listed.Address = a
			} else {
				listed.Host = e.GetAddress()
			}
			s.Endpoints = append(s.Endpoints, listed)
		}
		store.Put(&in.batch, store.Services, s.Key, s)
	}
	return nil
}

func newStore() *store.Store { return store.New(slog.New(slog.DiscardHandler)) }
