package discovery_test

import (
	"slices"
	"strings"
	"testing"

	"isthmus.dev/internal/discovery"
	"isthmus.dev/internal/meshtest"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
	"isthmus.dev/internal/xds"
)

// rows are those that a resource was computed from, as "table key", and with
// "!" before it what was looked for in vain.
func rows(c *store.Cause) map[string]bool {
	out := map[string]bool{}
	var walk func(*store.Cause)
	walk = func(c *store.Cause) {
		if c.Table != "" && c.RowCount == 0 && !c.KeysOnly {
			out["!"+c.Table+" "+c.Key] = true
		}
		for _, row := range c.Rows {
			out[c.Table+" "+row] = true
		}
		for _, below := range c.Causes {
			walk(below)
		}
	}
	walk(c)
	return out
}

func TestResourcesAreExplained(t *testing.T) {
	for _, shape := range meshtest.Shapes {
		t.Run(shape.Name, func(t *testing.T) {
			mesh := meshtest.New(t)
			client, reviews := shape.Make("shop", "client", 1, nil), shape.Make("shop", "reviews", 2, nil)
			stranger := shape.Make("bank", "client", 3, nil)
			mesh.Apply(meshtest.MeshConfig(), client, reviews, stranger, meshtest.Service("shop", "reviews", 1), meshtest.Service("shop", "ratings", 2),
				meshtest.DestinationRule(t, "shop", "reviews", `{host: reviews, exportTo: ["."], trafficPolicy: {connectionPool: {tcp: {maxConnections: 7}}}}`),
				meshtest.VirtualService(t, "shop", "reviews", `{hosts: [reviews], http: [{route: [{destination: {host: reviews}}]}]}`))
			mesh.Connect(client).Settled()
			mesh.Connect(stranger).Settled()

			const cluster = "outbound|80||reviews.shop.svc.cluster.local"
			revision, found := mesh.Discovery.Explain(xds.ClusterType, cluster, model.WorkloadKey{}, 0)
			if len(found) != 2 || revision == 0 || found[0].Resource.Version == found[1].Resource.Version {
				t.Fatalf("two namespaces are given different clusters, explained are %d at revision %d", len(found), revision)
			}
			for i, w := range []*model.Workload{stranger, client} {
				if !slices.Equal(found[i].Proxies, []model.WorkloadKey{w.Key}) {
					t.Errorf("%d is given to %v, not %v", i, found[i].Proxies, w.Key)
				}
			}
			_, own := mesh.Discovery.Explain(xds.ClusterType, cluster, client.Key, 0)
			if len(own) != 1 {
				t.Fatalf("the client is given %d", len(own))
			}
			read := rows(own[0].Cause)
			for _, want := range []string{"services shop/reviews", "destinationrules shop/reviews", "workloads " + reviews.Key.String(), "!destinationrules namespace=shop host=reviews.shop.svc.cluster.local"} {
				if !read[want] {
					t.Errorf("the cluster does not name %s, only %v", want, read)
				}
			}
			if read["services shop/ratings"] {
				t.Error("the cluster names another service")
			}
			if own[0].Cause.Rule != "rendered cluster" || !strings.Contains(own[0].Cause.Key, "service=shop/reviews port=80 rule=shop/reviews") {
				t.Errorf("it is computed by %s %s", own[0].Cause.Rule, own[0].Cause.Key)
			}
			if read := rows(found[0].Cause); read["destinationrules shop/reviews"] {
				t.Error("a rule that is private to its namespace is named where it is not seen")
			}
			if _, none := mesh.Discovery.Explain(xds.ClusterType, "outbound|1||nowhere", client.Key, 0); none != nil {
				t.Errorf("what does not exist is explained by %v", none)
			}
			checkReached(t, mesh, client)
		})
	}
}

func checkReached(t *testing.T, mesh *meshtest.Mesh, client *model.Workload) {
	reached := func(object func(tx *store.Tx) ([]store.Root, bool)) discovery.Reach {
		return mesh.Discovery.Reached(func(tx *store.Tx) []store.Root {
			roots, ok := object(tx)
			if !ok {
				t.Error("the object is not known")
			}
			return roots
		})
	}
	names := func(r discovery.Reach) (out []string) {
		for _, res := range r.Resources {
			out = append(out, res.Name)
		}
		return out
	}
	routes := reached(func(tx *store.Tx) ([]store.Root, bool) {
		return store.Reach(tx, store.VirtualServices, model.Key{Namespace: "shop", Name: "reviews"})
	})
	if got := names(routes); !slices.ContainsFunc(got, func(n string) bool { return n == "80" || strings.HasPrefix(n, "80/reviews.") }) || slices.Contains(got, "inbound|8080||") {
		t.Errorf("a virtual service reaches %v", got)
	}
	self := reached(func(tx *store.Tx) ([]store.Root, bool) { return store.Reach(tx, store.Workloads, client.Key) })
	if !slices.Equal(self.Proxies, []model.WorkloadKey{client.Key}) || !slices.Equal(names(self), []string{"default"}) {
		t.Errorf("a workload reaches %v of %v", names(self), self.Proxies)
	}
}

// TestVirtualHostsAreExplained: one is explained by itself, though others are
// rendered together with it.
func TestVirtualHostsAreExplained(t *testing.T) {
	mesh := meshtest.New(t)
	client := meshtest.VM("shop", "client", 1, nil)
	mesh.Apply(meshtest.MeshConfig(), client, meshtest.Service("shop", "reviews", 1), meshtest.Service("shop", "ratings", 2),
		meshtest.VirtualService(t, "shop", "reviews", `{hosts: [reviews], http: [{route: [{destination: {host: reviews}}]}]}`),
		meshtest.VirtualService(t, "shop", "ratings", `{hosts: [ratings], http: [{route: [{destination: {host: ratings}}]}]}`))
	mesh.Connect(client, xds.SplitRoutesFeature).Settled()
	_, found := mesh.Discovery.Explain(xds.VirtualHostType, "80/reviews.shop.svc.cluster.local:80", client.Key, 0)
	if len(found) != 1 {
		t.Fatalf("explained are %d", len(found))
	}
	read := rows(found[0].Cause)
	if !read["virtualservices shop/reviews"] || read["virtualservices shop/ratings"] || found[0].Cause.Rule != "virtual host" {
		t.Errorf("computed by %s %s of %v", found[0].Cause.Rule, found[0].Cause.Key, read)
	}
}
