package server

import (
	"bufio"
	"context"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	networking "istio.io/api/networking/v1alpha3"
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"

	"isthmus.dev/internal/meshtest"
	"isthmus.dev/internal/xds"
)

func TestProfilesAreForThisHost(t *testing.T) {
	h := (&server{}).monitoring(prometheus.NewRegistry())
	for _, c := range []struct {
		path, from, host string
		want             int
	}{
		{"/debug/pprof/heap", "127.0.0.1:40000", "127.0.0.1:15014", http.StatusOK},
		{"/debug/pprof/", "[::1]:40000", "localhost:15014", http.StatusOK},
		{"/debug/pprof/heap", "192.0.2.7:40000", "127.0.0.1:15014", http.StatusForbidden},
		{"/debug/pprof/heap", "127.0.0.1:40000", "evil.example.com:15014", http.StatusForbidden},
		{"/debug/pprof/profile", "192.0.2.7:40000", "192.0.2.1:15014", http.StatusForbidden},
		{"/debug/pprof/trace", "192.0.2.7:40000", "192.0.2.1:15014", http.StatusForbidden},
		{"/livez", "192.0.2.7:40000", "192.0.2.1:15014", http.StatusOK},
		{"/debug/pprof/cmdline", "192.0.2.7:40000", "192.0.2.1:15014", http.StatusForbidden},
	} {
		r := httptest.NewRequest(http.MethodGet, c.path, http.NoBody)
		r.RemoteAddr, r.Host = c.from, c.host
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != c.want {
			t.Errorf("%s from %s as %s: %d %s", c.path, c.from, c.host, w.Code, w.Body)
		}
	}
}

// scrape reads all metrics, by name with labels.
func (r *running) scrape(t *testing.T) map[string]float64 {
	t.Helper()
	answer, err := http.Get("http://" + r.Monitoring + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	out := map[string]float64{}
	for lines := bufio.NewScanner(answer.Body); lines.Scan(); {
		name, value, ok := strings.Cut(lines.Text(), " ")
		if !ok || strings.HasPrefix(name, "#") {
			continue
		}
		if i := strings.LastIndex(lines.Text(), "} "); i > 0 { // spaces in labels
			name, value = lines.Text()[:i+1], lines.Text()[i+2:]
		}
		if out[name], err = strconv.ParseFloat(value, 64); err != nil {
			t.Fatalf("%s: %v", lines.Text(), err)
		}
	}
	return out
}

// checkSaved reconnects with what was sent before.
func checkSaved(t *testing.T, d *running, cc *grpc.ClientConn, resources []*discoveryv3.Resource) {
	const saved = `isthmus_xds_saved_bytes_total{type="cds"}`
	before := d.scrape(t)[saved]
	ctx, hangUp := context.WithCancel(t.Context())
	defer hangUp()
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(cc).DeltaAggregatedResources(ctx)
	if err != nil {
		t.Fatal(err)
	}
	versions := map[string]string{}
	for _, r := range resources {
		versions[r.Name] = r.Version
	}
	if err := stream.Send(&discoveryv3.DeltaDiscoveryRequest{Node: meshtest.Node(meshtest.VM("default", "client", 1, nil)),
		TypeUrl: xds.ClusterType, InitialResourceVersions: versions}); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	if now := d.scrape(t)[saved]; now-before < 100 {
		t.Errorf("%s went from %v to %v", saved, before, now)
	}
}

// checkMetrics has each metric move by what it says that it measures.
func checkMetrics(t *testing.T, d *running) {
	before := d.scrape(t)
	kube, istio := d.clients(t)
	service := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "measured"},
		Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Name: "http", Port: 80}}, Selector: map[string]string{"app": "measured"}}}
	if _, err := kube.CoreV1().Services("default").Create(t.Context(), service, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	route := &networkingv1.VirtualService{ObjectMeta: metav1.ObjectMeta{Name: "measured"}, Spec: networking.VirtualService{
		Hosts: []string{"measured"}, Http: []*networking.HTTPRoute{{Route: []*networking.HTTPRouteDestination{{Destination: &networking.Destination{Host: "measured"}}}}},
	}}
	if _, err := istio.NetworkingV1().VirtualServices("default").Create(t.Context(), route, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	cc, err := grpc.NewClient(d.XDSPlaintext, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	ctx, hangUp := context.WithCancel(t.Context())
	defer hangUp()
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(cc).DeltaAggregatedResources(ctx)
	if err != nil {
		t.Fatal(err)
	}
	client := meshtest.VM("default", "client", 1, nil)
	if err := stream.Send(&discoveryv3.DeltaDiscoveryRequest{Node: meshtest.Node(client), TypeUrl: xds.ClusterType}); err != nil {
		t.Fatal(err)
	}
	answer, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType, ResponseNonce: answer.Nonce}); err != nil {
		t.Fatal(err)
	}
	moved := map[string]float64{ // at least
		"pilot_services": 1, "pilot_virt_services": 1, `pilot_k8s_cfg_events{event="add",type="VirtualService"}`: 1,
		`pilot_inbound_updates{type="config"}`: 1, `pilot_inbound_updates{type="svc"}`: 1,
		`pilot_push_triggers{type="service"}`: 1, `pilot_push_triggers{type="config"}`: 1,
		"pilot_xds": 1, `pilot_xds_pushes{type="cds"}`: 1, `isthmus_xds_sent_bytes_total{type="cds"}`: 100, "isthmus_xds_streams_total": 1,
		`isthmus_xds_resources_total{type="cds"}`: 1, "pilot_proxy_convergence_time_count": 1,
		"isthmus_revision": 2, "isthmus_commits_total": 2, "isthmus_commit_seconds_total": 0.000001, "isthmus_rule_runs_total": 5,
		"isthmus_store_vertices": 5, `isthmus_store_rows{table="services"}`: 1,
	}
	eventually(t, "all metrics move", func() bool {
		now := d.scrape(t)
		for name, by := range moved {
			if now[name]-before[name] < by {
				return false
			}
		}
		return true
	})
	checkWhy(t, d, "measured", client.Key.Instance)
	hangUp()
	checkSaved(t, d, cc, answer.Resources)
	eventually(t, "the proxy is gone", func() bool { return d.scrape(t)["pilot_xds"] == before["pilot_xds"] })
	now := d.scrape(t)
	if now["isthmus_leader"] != 1 {
		t.Error("a standalone isthmusd does not lead")
	}
	for _, name := range []string{"isthmus_rule_cutoffs_total", "isthmus_xds_waiting", `pilot_total_xds_rejects{type="cds"}`, "go_goroutines", "process_resident_memory_bytes",
		`isthmus_shed_total{what="stream"}`, `isthmus_shed_total{what="connection"}`, `isthmus_shed_total{what="download"}`, `isthmus_shed_total{what="api"}`} {
		if _, ok := now[name]; !ok {
			t.Errorf("there is no %s", name)
		}
	}
}
