package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	networkingapi "istio.io/api/networking/v1alpha3"
	networking "istio.io/client-go/pkg/apis/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"isthmus.dev/internal/demo/machine"
)

// An Envoy's gauges of update_time say when it took a configuration, in
// milliseconds since the epoch: just before it acknowledges. The observed
// machine's keeps those that agents leave out otherwise.
const observedStats = `["http.outbound", "cluster.outbound"]`

const (
	entry     = "changing" // WorkloadEntry, ServiceEntry
	entryHost = "changing.example"
	pause     = 30 * time.Millisecond // between changes: the control plane is idle
)

// change is one kind of change, and where Envoy notes it.
type change struct {
	kind, object string
	// gauge is part of the name of an update_time.
	gauge string
	apply func(ctx context.Context, i int) error
}

// measureConvergence times changes from the API's answer to the acknowledgement
// by a machine's Envoy.
func measureConvergence(ctx context.Context, m *mesh, o Options) ([]Measurement, error) {
	changes, err := m.changes(ctx)
	if err != nil {
		return nil, err
	}
	admin := newCaller(m.observed.Machine, netip.MustParseAddrPort("127.0.0.1:15000"), "admin", 1)
	defer admin.close()
	monitoring := newCaller(m.control.Machine, netip.MustParseAddrPort("127.0.0.1:15014"), "isthmusd", 1)
	defer monitoring.close()
	// The first change of each kind makes the objects known; it is not counted.
	took := map[string][]float64{}
	var all, calls []float64
	var before convergence
	for i := -len(changes); i < o.Changes; i++ {
		if i == 0 {
			if before, err = readConvergence(ctx, monitoring); err != nil {
				return nil, err
			}
		}
		c := changes[(i+len(changes))%len(changes)]
		call, ack, err := timeChange(ctx, admin, c, i+len(changes))
		if err != nil {
			return nil, fmt.Errorf("change %d, of the %s: %w", i, c.object, err)
		}
		if i >= 0 {
			took[c.kind] = append(took[c.kind], ack)
			all, calls = append(all, ack), append(calls, call)
		}
	}
	after, err := readConvergence(ctx, monitoring)
	if err != nil {
		return nil, err
	}
	out := quantiles("every kind", all, 50)
	for _, c := range changes {
		out = append(out, quantiles(c.kind, took[c.kind], 0)...)
	}
	return append(out,
		Measurement{Name: "the API call itself, median", Value: percentile(calls, 50), Unit: "ms"},
		Measurement{Name: "in isthmusd: commit to acknowledgement, mean of all proxies", Value: before.mean(after), Unit: "ms"},
	), nil
}

func quantiles(kind string, values []float64, aim float64) []Measurement {
	if len(values) == 0 {
		return nil
	}
	note := fmt.Sprintf("%d changes", len(values))
	return []Measurement{
		{Name: "API to Envoy's acknowledgement, " + kind + ", p50", Value: percentile(values, 50), Unit: "ms", Note: note},
		{Name: "API to Envoy's acknowledgement, " + kind + ", p99", Value: percentile(values, 99), Unit: "ms", Aim: aim, Note: note},
	}
}

// timeChange returns how long the call took, and how long after it Envoy took
// the change: both in ms. Envoy may be faster than the API's answer.
func timeChange(ctx context.Context, admin *caller, c change, i int) (call, ack float64, err error) {
	old, err := updateTime(ctx, admin, c.gauge)
	if err != nil {
		return 0, 0, err
	}
	time.Sleep(pause)
	begin := time.Now()
	if err := c.apply(ctx, i); err != nil {
		return 0, 0, err
	}
	answered := time.Now()
	var at int64
	err = machine.Await(ctx, 10*time.Second, 5*time.Millisecond, func(ctx context.Context) error {
		if at, err = updateTime(ctx, admin, c.gauge); err == nil && at == old {
			err = fmt.Errorf("gauge %s of Envoy does not change", c.gauge)
		}
		return err
	})
	// Envoy's clock is cut to milliseconds: in the middle, it is right on average.
	ack = float64(at) + 0.5 - float64(answered.UnixNano())/1e6
	return float64(answered.Sub(begin).Nanoseconds()) / 1e6, max(ack, 0), err
}

// updateTime reads the newest of the gauges that a name matches; 0 without any.
func updateTime(ctx context.Context, admin *caller, gauge string) (int64, error) {
	body, _, err := admin.read(ctx, "/stats?format=json&type=Gauges&filter=update_time$")
	if err != nil {
		return 0, err
	}
	var got struct {
		Stats []struct {
			Name  string
			Value int64
		}
	}
	if err := json.Unmarshal(body, &got); err != nil {
		return 0, fmt.Errorf("statistics of Envoy: %w", err)
	}
	var newest int64
	for _, s := range got.Stats {
		if strings.Contains(s.Name, gauge) {
			newest = max(newest, s.Value)
		}
	}
	return newest, nil
}

// changes makes the objects, and says how each is changed. Patches, since the
// status of the objects is written meanwhile.
func (m *mesh) changes(ctx context.Context) ([]change, error) {
	api := m.control.Clients.Istio.NetworkingV1()
	services, entries := api.ServiceEntries(namespace), api.WorkloadEntries(namespace)
	routes, rules := api.VirtualServices(namespace), api.DestinationRules(namespace)
	meta := metav1.ObjectMeta{Name: entry, Namespace: namespace}
	se := &networking.ServiceEntry{ObjectMeta: meta}
	se.Spec.Hosts, se.Spec.Addresses = []string{entryHost}, []string{"10.99.0.1"}
	se.Spec.Location, se.Spec.Resolution = networkingapi.ServiceEntry_MESH_INTERNAL, networkingapi.ServiceEntry_STATIC
	se.Spec.Ports = []*networkingapi.ServicePort{{Name: "http", Number: appPort, Protocol: "HTTP"}}
	se.Spec.WorkloadSelector = &networkingapi.WorkloadSelector{Labels: map[string]string{"app": entry}}
	we := &networking.WorkloadEntry{ObjectMeta: meta}
	we.Spec.Address, we.Spec.Labels = "10.98.0.1", map[string]string{"app": entry}
	vs := &networking.VirtualService{ObjectMeta: meta}
	vs.Spec.Hosts = []string{entryHost}
	dr := &networking.DestinationRule{ObjectMeta: meta}
	dr.Spec.Host = entryHost
	vs.Spec.Http = []*networkingapi.HTTPRoute{{
		Timeout: durationpb.New(time.Second),
		Route:   []*networkingapi.HTTPRouteDestination{{Destination: &networkingapi.Destination{Host: entryHost}}},
	}}
	var options metav1.CreateOptions
	_, err1 := services.Create(ctx, se, options)
	_, err2 := entries.Create(ctx, we, options)
	_, err3 := routes.Create(ctx, vs, options)
	_, err4 := rules.Create(ctx, dr, options)
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		return nil, err
	}
	return []change{
		{"endpoint", "WorkloadEntry", "||" + entryHost, func(ctx context.Context, i int) error {
			patch := fmt.Sprintf(`{"spec":{"address":"10.98.1.%d"}}`, 1+i%250)
			_, err := entries.Patch(ctx, entry, types.MergePatchType, []byte(patch), metav1.PatchOptions{})
			return err
		}},
		{"route", "VirtualService", ".rds.", func(ctx context.Context, i int) error {
			patch := fmt.Sprintf(`[{"op":"replace","path":"/spec/http/0/timeout","value":"%dms"}]`, 2000+i)
			_, err := routes.Patch(ctx, entry, types.JSONPatchType, []byte(patch), metav1.PatchOptions{})
			return err
		}},
		{"cluster", "DestinationRule", "cluster_manager.cds.update_time", func(ctx context.Context, i int) error {
			patch := fmt.Sprintf(`{"spec":{"trafficPolicy":{"connectionPool":{"tcp":{"connectTimeout":"%dms"}}}}}`, 2000+i)
			_, err := rules.Patch(ctx, entry, types.MergePatchType, []byte(patch), metav1.PatchOptions{})
			return err
		}},
	}, nil
}

// convergence is what isthmusd's pilot_proxy_convergence_time has counted.
type convergence struct{ sum, count float64 }

// mean of what was counted until then, in ms.
func (c convergence) mean(then convergence) float64 {
	if then.count == c.count {
		return 0
	}
	return 1e3 * (then.sum - c.sum) / (then.count - c.count)
}

func readConvergence(ctx context.Context, monitoring *caller) (c convergence, err error) {
	body, _, err := monitoring.read(ctx, "/metrics")
	if err != nil {
		return c, err
	}
	return parseConvergence(string(body))
}

// parseConvergence reads Prometheus' text.
func parseConvergence(text string) (c convergence, err error) {
	const name = "pilot_proxy_convergence_time"
	for _, one := range []struct {
		to   *float64
		line string
	}{{&c.sum, name + "_sum "}, {&c.count, name + "_count "}} {
		lines := strings.Split(text, "\n")
		i := slices.IndexFunc(lines, func(l string) bool { return strings.HasPrefix(l, one.line) })
		if i < 0 {
			return c, fmt.Errorf("isthmusd's metrics hold no %s", strings.TrimSpace(one.line))
		}
		if _, err := fmt.Sscan(strings.TrimPrefix(lines[i], one.line), one.to); err != nil {
			return c, fmt.Errorf("%s: %w", one.line, err)
		}
	}
	return c, nil
}
