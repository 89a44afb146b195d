package meshtest

import (
	"maps"
	"net/netip"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	meshconfig "istio.io/api/mesh/v1alpha1"
	networking "istio.io/api/networking/v1alpha3"
	security "istio.io/api/security/v1beta1"
	"sigs.k8s.io/yaml"

	"isthmus.dev/internal/model"
)

// Shape makes the row of one workload as some source does. app is its label, its
// service account and the name of its group; n tells the replicas apart.
type Shape struct {
	Name string
	Make func(namespace, app string, n int, labels map[string]string) *model.Workload
}

// Shapes are those that there are.
var Shapes = []Shape{{"pod", Pod}, {"vm", VM}}

// Pod is what internal/source/kube makes of a ready Pod of a Deployment.
func Pod(namespace, app string, n int, labels map[string]string) *model.Workload {
	w := workload(namespace, app, labels)
	w.Key.Instance = app + "-5d8f7c9b64-" + string(rune('a'+n%26)) + string(rune('a'+n/26))
	w.Addresses = []netip.Addr{netip.AddrFrom4([4]byte{10, 244, byte(n >> 8), byte(n)})}
	w.Node = "node-1"
	w.Ports = map[string]uint32{"http": 8080, "tcp": 9000}
	w.ServicePorts = servedPorts()
	return w
}

// VM is what internal/source/kube makes of the WorkloadEntry of a registered
// virtual machine.
func VM(namespace, app string, n int, labels map[string]string) *model.Workload {
	w := workload(namespace, app, labels)
	w.Key.Instance = app + "-vm-" + string(rune('a'+n%26)) + string(rune('a'+n/26))
	w.Addresses = []netip.Addr{netip.AddrFrom4([4]byte{192, 168, byte(n >> 8), byte(n)})}
	w.Ports = map[string]uint32{"http": 8080, "tcp": 9000}
	w.PortsByService = true
	w.ServicePorts = servedPorts()
	w.Probe = &model.Probe{Period: 10 * time.Second, HTTP: &model.HTTPProbe{Path: "/healthz", Port: 8080}}
	return w
}

func workload(namespace, app string, labels map[string]string) *model.Workload {
	all := map[string]string{"app": app}
	maps.Copy(all, labels)
	return &model.Workload{
		Key:      model.WorkloadKey{Namespace: namespace, ServiceAccount: app},
		Labels:   all,
		Workload: app,
		Cluster:  "Kubernetes",
		Locality: model.Locality{Region: "eu", Zone: "eu-1"},
		TLS:      model.TLSIstio,
	}
}

func servedPorts() []model.Port {
	return []model.Port{{Name: "http", Number: 8080, Protocol: model.HTTP}, {Name: "tcp", Number: 9000, Protocol: model.TCP}}
}

// Service is a Kubernetes Service that selects an app: HTTP on 80, which the
// workloads serve on their port "http", and TCP on 9000. address is its last byte.
func Service(namespace, app string, address byte) *model.Service {
	return &model.Service{
		Key: model.ServiceKey{Namespace: namespace, Name: app, Host: app + "." + namespace + ".svc.cluster.local"},
		Addresses: []netip.Prefix{
			netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 96, byte(len(namespace)), address}), 32),
		},
		Ports: []model.Port{
			{Name: "http", Number: 80, Protocol: model.HTTP, TargetName: "http"},
			{Name: "tcp", Number: 9000, Protocol: model.TCP},
		},
		Selector: map[string]string{"app": app},
	}
}

// MeshConfig is the mesh's settings without any of the user's.
func MeshConfig() *model.MeshConfig {
	return &model.MeshConfig{
		Mesh: &meshconfig.MeshConfig{}, RootNamespace: "istio-system", TrustDomain: "cluster.local",
		ClusterDomain: "cluster.local", Cluster: "Kubernetes",
	}
}

// VirtualService has a spec in YAML, as the rest below.
func VirtualService(t testing.TB, namespace, name, spec string) *model.VirtualService {
	return config(t, namespace, name, spec, &networking.VirtualService{})
}

// Sidecar has a spec in YAML.
func Sidecar(t testing.TB, namespace, name, spec string) *model.Sidecar {
	return config(t, namespace, name, spec, &networking.Sidecar{})
}

// DestinationRule has a spec in YAML.
func DestinationRule(t testing.TB, namespace, name, spec string) *model.DestinationRule {
	return config(t, namespace, name, spec, &networking.DestinationRule{})
}

// PeerAuthentication has a spec in YAML.
func PeerAuthentication(t testing.TB, namespace, name, spec string) *model.PeerAuthentication {
	return config(t, namespace, name, spec, &security.PeerAuthentication{})
}

// AuthorizationPolicy has a spec in YAML.
func AuthorizationPolicy(t testing.TB, namespace, name, spec string) *model.AuthorizationPolicy {
	return config(t, namespace, name, spec, &security.AuthorizationPolicy{})
}

func config[S proto.Message](t testing.TB, namespace, name, spec string, into S) *model.Config[S] {
	t.Helper()
	j, err := yaml.YAMLToJSON([]byte(spec))
	if err == nil {
		err = protojson.Unmarshal(j, into)
	}
	if err != nil {
		t.Fatalf("spec of %s/%s: %v", namespace, name, err)
	}
	return &model.Config[S]{Meta: model.Meta{Key: model.Key{Namespace: namespace, Name: name}}, Spec: into}
}
