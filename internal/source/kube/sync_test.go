package kube

import (
	"net/netip"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"isthmus.dev/internal/model"
	"isthmus.dev/internal/status"
	"isthmus.dev/internal/store"
)

func virtualService(name, host string) string {
	return `
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: ` + name + `, namespace: shop}
spec: {hosts: ["` + host + `"], http: [{route: [{destination: {host: a}}]}]}`
}

func TestInvalidChangesLeaveTheLastGoodRow(t *testing.T) {
	m := start(t, virtualService("reviews", "reviews"))
	key := model.Key{Namespace: "shop", Name: "reviews"}
	hosts := func() string {
		vs, _ := row(m, store.VirtualServices, key)
		if vs == nil {
			return ""
		}
		return strings.Join(vs.Spec.GetHosts(), ",")
	}
	if hosts() != "reviews" {
		t.Fatalf("hosts %q", hosts())
	}
	m.apply(virtualService("reviews", "re views"))
	m.waitFor("the mistake is reported", func() bool {
		return m.condition(status.VirtualService, "reviews", status.Accepted).Status == metav1.ConditionFalse
	})
	if hosts() != "reviews" {
		t.Errorf("an invalid change made the hosts %q", hosts())
	}
	m.apply(virtualService("reviews", "reviews.example.com"))
	m.waitFor("the next valid one counts", func() bool { return hosts() == "reviews.example.com" })
	if c := m.condition(status.VirtualService, "reviews", status.Accepted); c.Status != metav1.ConditionTrue {
		t.Errorf("condition %+v", c)
	}
	m.apply(virtualService("reviews", "re views"))
	m.remove(virtualService("reviews", "x"))
	m.waitFor("a deleted object has no row", func() bool { return hosts() == "" })
	if c := m.condition(status.VirtualService, "reviews", status.Accepted); c.Status != "" {
		t.Errorf("a deleted object is still reported: %+v", c)
	}
}

func TestPoliciesFailClosed(t *testing.T) {
	policy := func(annotations, rules string) string {
		return `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: a, namespace: shop, annotations: {` + annotations + `}}
spec: {rules: [` + rules + `]}`
	}
	const valid, invalid = `{from: [{source: {namespaces: [front]}}]}`, `{from: [{source: {ipBlocks: [x]}}]}`
	m := start(t, policy("", invalid))
	count := func() int {
		p, ok := row(m, store.AuthorizationPolicies, model.Key{Namespace: "shop", Name: "a"})
		if !ok {
			return -1
		}
		return len(p.Spec.GetRules())
	}
	if count() != 0 {
		t.Fatalf("a policy that was never valid has %d rules in effect, want a row that allows nothing", count())
	}
	m.apply(policy("", valid+","+valid))
	m.waitFor("the valid one", func() bool { return count() == 2 })
	m.apply(policy("", invalid))
	m.waitFor("the mistake is reported", func() bool {
		return strings.Contains(m.condition(status.AuthorizationPolicy, "a", status.Accepted).Message, "last valid version stays")
	})
	if count() != 2 {
		t.Errorf("%d rules after an invalid change, want the last valid 2", count())
	}
	m.apply(policy(`istio.io/dry-run: "true"`, valid))
	m.waitFor("a dry run is not enforced", func() bool { return count() == -1 })
	m.apply(policy("", invalid+","+valid))
	m.waitFor("its valid rules, since nothing better is known", func() bool { return count() == 1 })
}

const reviewsPod = `
apiVersion: v1
kind: Pod
metadata: {name: reviews-1, namespace: shop, labels: {app: reviews, security.istio.io/tlsMode: istio, service.istio.io/workload-name: reviews}}
spec: {serviceAccountName: reviews, nodeName: n1, containers: [{name: a, image: x, ports: [{name: http, containerPort: 9080}]}]}
status: {phase: Running, podIP: 10.1.0.1, conditions: [{type: Ready, status: "True"}]}`

const reviewsVM = `
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: reviews-1, namespace: shop}
spec:
  address: 10.1.0.1
  serviceAccount: reviews
  locality: eu/eu-1
  labels: {app: reviews, security.istio.io/tlsMode: istio, service.istio.io/workload-name: reviews}
  ports: {http: 9080}`

const nodeEU = `
apiVersion: v1
kind: Node
metadata: {name: n1, labels: {topology.kubernetes.io/region: eu, topology.kubernetes.io/zone: eu-1}}`

// TestPodsAndMachinesAreAlike: what is said alike is the same row, but for what
// only a pod has (a UID, a node) and how its ports are named.
func TestPodsAndMachinesAreAlike(t *testing.T) {
	pod, vm := start(t, reviewsPod+"\n---\n"+nodeEU).workload("reviews", "reviews-1"), start(t, reviewsVM).workload("reviews", "reviews-1")
	if pod == nil || vm == nil {
		t.Fatalf("pod %v, machine %v", pod, vm)
	}
	normal := *pod
	normal.UID, normal.Node, normal.PortsByService = vm.UID, vm.Node, vm.PortsByService
	if !normal.Equal(vm) {
		t.Errorf("pod     %+v\nmachine %+v", *pod, *vm)
	}
}

func TestPodWinsOverAnEntryOfItsKey(t *testing.T) {
	m := start(t, reviewsVM)
	if w := m.workload("reviews", "reviews-1"); w == nil || w.Node != "" {
		t.Fatalf("row %+v", w)
	}
	for range 2 { // it may pass from one to the other, and back
		m.apply(reviewsPod)
		m.waitFor("the pod has the row", func() bool { w := m.workload("reviews", "reviews-1"); return w != nil && w.Node == "n1" })
		m.waitFor("the entry is told", func() bool {
			return m.condition(status.WorkloadEntry, "reviews-1", status.Accepted).Reason == status.ReasonConflict
		})
		m.remove(reviewsPod)
		m.waitFor("the entry has it again", func() bool { w := m.workload("reviews", "reviews-1"); return w != nil && w.Node == "" })
	}
	m.apply(strings.ReplaceAll(reviewsVM, "serviceAccount: reviews", "serviceAccount: other"))
	m.waitFor("another account is another workload", func() bool {
		return m.workload("other", "reviews-1") != nil && m.workload("reviews", "reviews-1") == nil
	})
	m.remove(reviewsVM)
	m.waitFor("nothing is left", func() bool { return len(rows(m, store.Workloads)) == 0 })
}

func TestRowsFollowWhatTheyDependOn(t *testing.T) {
	const group = `
apiVersion: networking.istio.io/v1
kind: WorkloadGroup
metadata: {name: legacy, namespace: shop}
spec: {template: {ports: {http: 8080}}}`
	const entry = `
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: legacy-1, namespace: shop, annotations: {istio.io/autoRegistrationGroup: legacy}}
spec: {address: 10.1.0.9}`
	const service = `
apiVersion: v1
kind: Service
metadata: {name: manual, namespace: shop}
spec: {clusterIP: 10.96.0.9, ports: [{port: 80}]}`
	const slice = `
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: manual-1, namespace: shop, labels: {kubernetes.io/service-name: manual}}
addressType: IPv4
endpoints: [{addresses: [10.2.0.1]}]`
	m := start(t, strings.Join([]string{reviewsPod, entry, slice}, "\n---\n"))

	m.apply(nodeEU)
	m.waitFor("the node gives the pod its locality", func() bool { return m.workload("reviews", "reviews-1").Locality.Zone == "eu-1" })

	m.apply(group)
	m.waitFor("the group gives the entry its ports", func() bool { return m.workload("default", "legacy-1").Ports["http"] == 8080 })
	if h := m.workload("default", "legacy-1").Health; h != model.Healthy {
		t.Errorf("without a probe it is %d", h)
	}
	m.apply(strings.Replace(group, "spec: {", "spec: {probe: {tcpSocket: {port: 1}}, ", 1))
	m.waitFor("with a probe it has to pass first", func() bool {
		w := m.workload("default", "legacy-1")
		return w.Probe != nil && w.Health == model.Unhealthy
	})

	hasSlice := func() bool { return len(rows(m, store.EndpointSlices)) == 1 }
	if hasSlice() {
		t.Error("a slice without its service has a row")
	}
	m.apply(service)
	m.waitFor("with its service it has one", hasSlice)
	m.apply(strings.Replace(service, "spec: {", "spec: {selector: {app: a}, ", 1))
	m.waitFor("of a service with a selector it has none", func() bool { return !hasSlice() })

	m.apply(`
apiVersion: v1
kind: Namespace
metadata: {name: istio-system, labels: {topology.istio.io/network: main}}`)
	m.waitFor("the root namespace names the network", func() bool {
		return m.workload("reviews", "reviews-1").Network == "main" && m.workload("default", "legacy-1").Network == "main"
	})
}

func TestServiceEntryHostsComeAndGo(t *testing.T) {
	entry := func(hosts string) string {
		return `
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: apis, namespace: shop}
spec: {hosts: [` + hosts + `], ports: [{number: 443, name: tls, protocol: TLS}]}`
	}
	m := start(t, entry("a.com, b.com"))
	hosts := func() string {
		var list []string
		for _, s := range rows(m, store.Services) {
			list = append(list, s.Key.Host)
		}
		return strings.Join(list, " ")
	}
	if hosts() != "a.com b.com" {
		t.Fatalf("hosts %q", hosts())
	}
	m.apply(entry("b.com, c.com"))
	m.waitFor("hosts change", func() bool { return hosts() == "b.com c.com" })
	m.apply(entry(`"*"`))
	m.waitFor("the mistake is reported", func() bool {
		return m.condition(status.ServiceEntry, "apis", status.Accepted).Status == metav1.ConditionFalse
	})
	if hosts() != "b.com c.com" {
		t.Errorf("hosts %q after an invalid change", hosts())
	}
	m.remove(entry("x"))
	m.waitFor("hosts go", func() bool { return hosts() == "" })
}

func TestMeshConfigKeepsTheLastGood(t *testing.T) {
	config := func(mesh string) string {
		return `
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data: {mesh: "` + mesh + `"}`
	}
	m := start(t, "")
	domain := func() string {
		c, _ := row(m, store.MeshConfigs, model.Key{})
		return c.TrustDomain
	}
	if domain() != "cluster.local" {
		t.Fatalf("trust domain %q without a ConfigMap", domain())
	}
	m.apply(config("trustDomain: a.example"))
	m.waitFor("it is read", func() bool { return domain() == "a.example" })
	m.apply(config("connectTimeout: soon") + "\n---\n" + virtualService("after", "after"))
	m.waitFor("something later is read", func() bool { return len(rows(m, store.VirtualServices)) == 1 })
	if domain() != "a.example" {
		t.Errorf("trust domain %q after an invalid change", domain())
	}
	m.remove(config(""))
	m.waitFor("without it the defaults count", func() bool { return domain() == "cluster.local" })
}

func TestUnknownFieldsAreNamed(t *testing.T) {
	got, err := unmarshalYAML("a: 1\ndefaultConfig: {b: {c: 1}, proxyMetadata: {X: a}}\nextensionProviders: [{name: zipkin, d: 2}]\nenableAutoMtls: true", DefaultMesh("r"))
	if err != nil {
		t.Fatal(err)
	}
	if strings.Join(got, " ") != "a defaultConfig.b extensionProviders[0].d" {
		t.Errorf("unknown %q", got)
	}
	if _, err := unmarshalYAML("a: [", DefaultMesh("r")); err == nil {
		t.Error("broken YAML is read")
	}
}

func TestNetworks(t *testing.T) {
	const text = `networks: {a: {endpoints: [{fromRegistry: here}]}, b: {endpoints: [{fromCidr: 10.0.0.0/8}]}}`
	n, err := parseNetworks(text, "elsewhere")
	if err != nil {
		t.Fatal(err)
	}
	address := netip.MustParseAddr("10.1.2.3")
	if got := n.of("", address); got != "b" {
		t.Errorf("by CIDR it is on %q", got)
	}
	if n, err = parseNetworks(text, "here"); err != nil || n.of("", address) != "a" || n.of("own", address) != "own" {
		t.Errorf("by registry %+v, %v", n, err)
	}
	for _, bad := range []string{"networks: {a: {endpoints: [{fromCidr: x}]}}", "network: {}"} {
		if _, err := parseNetworks(bad, ""); err == nil {
			t.Errorf("%s is read", bad)
		}
	}
}
