package cli

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	controlv1 "isthmus.dev/api/control/v1"
)

func acknowledged() map[string]controlv1.TypeStatus {
	types := map[string]controlv1.TypeStatus{}
	for _, k := range controlv1.Kinds {
		types[k] = controlv1.TypeStatus{Synced: true, Revision: 41}
	}
	return types
}

// proxies connects a VM and two pods.
func (a *fakeAPI) proxies() {
	refused := acknowledged()
	refused["listeners"] = controlv1.TypeStatus{Revision: 40, Refused: &controlv1.Refusal{Names: []string{"0.0.0.0_9080"}, Detail: "Error adding listener: duplicate address", At: time.Now()}}
	list := func(name, namespace, address string, since time.Duration, types map[string]controlv1.TypeStatus) controlv1.Proxy {
		return controlv1.Proxy{Name: name, Namespace: namespace, ServiceAccount: "reviews", Identity: "spiffe://cluster.local/ns/" + namespace + "/sa/reviews",
			Address: address, ConnectedAt: time.Now().Add(-since), Types: types, Version: "1.0.0"}
	}
	leaving := list("reviews-v2-7d4b9c6f5d-x2lqp", "bookinfo-production", "[fd00:10:244:1::a2f]:49152", 3*24*time.Hour+time.Minute, refused)
	leaving.Leaving = true
	a.answers[controlv1.ProxiesPath] = controlv1.ProxyList{Revision: 41, Proxies: []controlv1.Proxy{
		leaving,
		list("ratings-6c8f9d7b4-zzkw8", "bookinfo-production", "10.244.1.17:51022", 150*time.Second, map[string]controlv1.TypeStatus{"clusters": {Synced: true}}),
		list("reviews-1", "shop", "10.120.34.7:40112", 5*time.Minute, acknowledged()),
	}}
}

func TestProxyStatus(t *testing.T) {
	a := newAPI(t)
	a.proxies()
	for name, args := range map[string][]string{
		"proxy-status.golden": {}, "proxy-status-one.golden": {"reviews-1", "-n", "shop"}, "proxy-status-wide.golden": {"-o", "wide"},
		"proxy-status.json": {"-n", "shop", "-o", "json"}, "proxy-status.yaml": {"-n", "shop", "-o", "yaml"},
	} {
		t.Run(name, func(t *testing.T) {
			out := a.run(append([]string{"proxy", "status"}, args...)...).ok(t)
			golden(t, name, out)
			if !slices.Contains(args, "-o") {
				fits(t, out)
			}
		})
	}
	a.run("proxy", "status", "nobody").failed(t, 1, "no proxy nobody is connected")
	if r := a.run("proxy", "status", "-n", "empty"); r != (result{0, "", "No proxies found in namespace empty.\n"}) {
		t.Errorf("%+v", r)
	}
	a.answers[controlv1.ProxiesPath] = controlv1.ProxyList{Proxies: []controlv1.Proxy{}}
	if r := a.run("proxy", "status"); r != (result{0, "", "No proxies found.\n"}) {
		t.Errorf("%+v", r)
	}
	if out := a.run("proxy", "status", "-o", "json").ok(t); !strings.Contains(out, `"proxies": []`) {
		t.Errorf("%s", out)
	}
}

// bodies are what isthmusd answers, in the shape of Envoy's protos.
var bodies = map[string]map[string]string{
	"clusters": {
		"outbound|9080|v1|reviews.bookinfo-production.svc.cluster.local": `{"type": "EDS"}`,
		"BlackHoleCluster": `{}`,
	},
	"endpoints": {
		"outbound|9080||reviews.bookinfo-production.svc.cluster.local": `{"endpoints": [{"lbEndpoints": [
			{"endpoint": {"address": {"socketAddress": {"address": "10.244.1.17", "portValue": 9080}}}, "loadBalancingWeight": 4},
			{"endpoint": {"address": {"socketAddress": {"address": "fd00::17", "portValue": 9080}}}, "healthStatus": "DRAINING"}]}]}`,
		"outbound|9090||ratings.bookinfo-production.svc.cluster.local": `{}`,
	},
	"listeners": {"0.0.0.0_9080": `{"address": {"socketAddress": {"address": "0.0.0.0", "portValue": 9080}}, "filterChains": [{}, {}]}`},
	"routes": {"9080": `{"virtualHosts": [
		{"name": "reviews.bookinfo-production.svc.cluster.local:9080", "routes": [
			{"route": {"weightedClusters": {"clusters": [
				{"name": "outbound|9080|v1|reviews.bookinfo-production.svc.cluster.local", "weight": 90},
				{"name": "outbound|9080|v2|reviews.bookinfo-production.svc.cluster.local", "weight": 10}]}}},
			{"route": {"cluster": "PassthroughCluster"}}]},
		{"name": "allow_any", "routes": [{"redirect": {}}]}]}`},
	"names":    {"reviews.bookinfo-production.svc.cluster.local": `{"addresses": ["10.96.0.7", "fd00::7"]}`, "none.example.com": `{}`},
	"workload": {"default": `{"inboundPorts": [9080, 9081]}`},
}

func TestProxyConfig(t *testing.T) {
	a := newAPI(t)
	a.proxies()
	for _, kind := range controlv1.Kinds {
		answer := controlv1.ProxyConfig{Kind: kind}
		for name, body := range bodies[kind] {
			answer.Resources = append(answer.Resources, controlv1.Resource{Name: name, Version: "9f2c1e7a00d4b3c8", Body: json.RawMessage(body)})
		}
		slices.SortFunc(answer.Resources, func(a, b controlv1.Resource) int { return strings.Compare(a.Name, b.Name) })
		a.answers[controlv1.ProxiesPath+"/shop/reviews-1/config/"+kind] = answer
		t.Run(kind, func(t *testing.T) {
			out := a.run("proxy", "config", kind, "reviews-1").ok(t)
			golden(t, "config-"+kind+".golden", out)
			fits(t, out)
		})
	}
	golden(t, "config-routes-wide.golden", a.run("proxy", "config", "route", "reviews-1", "-o", "wide").ok(t))
	golden(t, "config-listeners.json", a.run("proxy", "config", "listeners", "reviews-1", "-o", "json").ok(t))
	golden(t, "config-listeners.yaml", a.run("proxy", "config", "listeners", "reviews-1", "-o", "yaml").ok(t))
	a.run("proxy", "config", "routes", "nobody").failed(t, 1, "isthmusd has no /api/v1/proxies/shop/nobody/config/routes")
}
